"""The suite's own decoder: random weights, no downloads; small on a CPU as a reference, large on a GPU as a probe.

Pre-RMSNorm, rotary positions, grouped-query attention, SwiGLU, an untied head, no biases. Its weights are plain tensors
and its functions are plain functions, so that a benchmark can compile one block and capture a whole step. `step`
touches the host nowhere: token, position and history live on the device.

Below fp64 what is summed up (norms, attention, logits) is summed up in fp32; the weights keep their dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Callable, List, Mapping, NamedTuple, Optional, Tuple

if TYPE_CHECKING:
    import torch

EPSILON = 1e-6
"""Of the norms."""
ROTARY_BASE = 10000.0


@dataclass(frozen=True)
class Geometry:
    """The sizes of a decoder."""

    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    layers: int

    def __post_init__(self) -> None:
        assert self.hidden % (2 * self.heads) == 0, "rotary positions turn pairs within a head"
        assert self.heads % self.kv_heads == 0, "every key/value head serves as many query heads"

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads

    @property
    def kv(self) -> int:
        """Width of all keys of one position, and of all values."""
        return self.kv_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer without its two norms: qkv, output, gate and up, down."""
        return self.hidden * (self.hidden + 2 * self.kv) + self.hidden**2 + 3 * self.hidden * self.ffn

    @property
    def norm_parameters(self) -> int:
        """Weights of all norms."""
        return (2 * self.layers + 1) * self.hidden

    @property
    def parameters(self) -> int:
        """All weights, embedding and head among them."""
        return self.layers * self.layer_parameters + 2 * self.vocab * self.hidden + self.norm_parameters

    def bytes_per_token(self, context: int, *, element_bytes: int = 2, folded: bool = False) -> int:
        """Return what decoding one token of one sequence must move: weights, cache, norms, one row of the embedding.

        `context` is the number of positions whose keys and values are read: the allocated ones, as the attention of
        `decode_block` is dense under a mask. `folded` weights have no norms of their own. Activations, which stay in
        the device's caches, are not counted.
        """
        weights = self.layers * self.layer_parameters + self.vocab * self.hidden
        norms = 0 if folded else self.norm_parameters
        cache = 2 * self.layers * self.kv * (context + 1)
        return element_bytes * (weights + cache + norms + self.hidden)

    def prefill_flops(self, tokens: int) -> int:
        """Return the floating-point operations of a prompt, for the logits of its last token.

        Two per weight and token, and attention with its causal half counted.
        """
        return (
            2 * self.layers * self.layer_parameters * tokens
            + 2 * self.vocab * self.hidden
            + 2 * self.layers * self.hidden * tokens**2
        )


TINY = Geometry(hidden=512, heads=8, kv_heads=2, ffn=1536, vocab=2048, layers=2)
"""For a CPU, and as the twin in fp64 of what runs on a GPU."""
NARROW = Geometry(hidden=2048, heads=32, kv_heads=8, ffn=8192, vocab=32000, layers=16)
"""Like a model of a billion parameters: its kernels are short, so it shows what launching them costs."""
WIDE = Geometry(hidden=8192, heads=64, kv_heads=8, ffn=28672, vocab=32000, layers=8)
"""Layers as those of a model of 70 billion parameters: its kernels are long, so it shows the memory's bandwidth."""
WIDE_SMALL = Geometry(hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=32000, layers=8)
"""Wide, for less memory."""
PRESETS: Mapping[str, Geometry] = {"tiny": TINY, "narrow": NARROW, "wide": WIDE, "wide-small": WIDE_SMALL}


def wide_for(memory_bytes: int) -> Geometry:
    """Return the wide geometry whose layers take at most an eighth, or so, of a GPU's memory; one layer at least."""
    geometry = WIDE if memory_bytes >= 12e9 else WIDE_SMALL
    fitting = int(0.12 * memory_bytes / (2 * geometry.layer_parameters))
    return replace(geometry, layers=max(1, min(geometry.layers, fitting)))


class Layer(NamedTuple):
    """The weights of one layer; each matrix as [outputs, inputs]."""

    attention_norm: Optional[torch.Tensor]
    """None if it is folded into `qkv`."""
    qkv: torch.Tensor
    """Rows of the queries, then of the keys, then of the values."""
    output: torch.Tensor
    ffn_norm: Optional[torch.Tensor]
    """None if it is folded into `gate_up`."""
    gate_up: torch.Tensor
    """Rows of the gate, then those of up."""
    down: torch.Tensor


@dataclass(frozen=True)
class Decoder:
    """All weights, and the rotary tables for as many positions as may be used."""

    geometry: Geometry
    embedding: torch.Tensor
    layers: Tuple[Layer, ...]
    norm: Optional[torch.Tensor]
    """None if it is folded into `head`."""
    head: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    @property
    def positions(self) -> int:
        """How many positions it can be used for."""
        return int(self.cos.shape[0])

    def weights(self) -> List[torch.Tensor]:
        """Return every weight, in a fixed order; not the rotary tables."""
        found = [self.embedding, self.norm, self.head, *(weight for layer in self.layers for weight in layer)]
        return [weight for weight in found if weight is not None]

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Decoder:
        """Return a decoder whose weights are `change` of these."""

        def changed(weight: Optional[torch.Tensor]) -> Any:  # noqa: ANN401 (a tensor, or None where there was none)
            return None if weight is None else change(weight)

        return replace(
            self,
            embedding=change(self.embedding),
            layers=tuple(Layer(*(changed(weight) for weight in layer)) for layer in self.layers),
            norm=changed(self.norm),
            head=change(self.head),
        )


# ----------------------------------------------------------------------------------------------------
# Making one


def create(geometry: Geometry, *, positions: int, dtype: torch.dtype, device: str, seed: int = 0) -> Decoder:
    """Return a decoder with random weights, drawn on the device: normal, scaled by 1/√inputs, so that nothing grows."""
    import torch

    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(rows: int, columns: int, scale: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=dtype, device=device).mul_(scale)

    def norm() -> torch.Tensor:
        # Not all ones: a norm whose weight is left out must show.
        return draw(1, geometry.hidden, 0.1).add_(1.0).squeeze(0)

    def matrix(outputs: int, inputs: int) -> torch.Tensor:
        return draw(outputs, inputs, 1 / math.sqrt(inputs))

    hidden = geometry.hidden
    embedding = draw(geometry.vocab, hidden, 1.0)
    layers = tuple(
        Layer(
            attention_norm=norm(),
            qkv=matrix(hidden + 2 * geometry.kv, hidden),
            output=matrix(hidden, hidden),
            ffn_norm=norm(),
            gate_up=matrix(2 * geometry.ffn, hidden),
            down=matrix(hidden, geometry.ffn),
        )
        for _ in range(geometry.layers)
    )
    cos, sin = _rotary(geometry.head_dim, positions, _sums(dtype), device)
    return Decoder(geometry, embedding, layers, norm=norm(), head=matrix(geometry.vocab, hidden), cos=cos, sin=sin)


def converted(decoder: Decoder, *, dtype: torch.dtype, device: str) -> Decoder:
    """Return a decoder with the same weights in another dtype, or elsewhere."""
    cos, sin = _rotary(decoder.geometry.head_dim, decoder.positions, _sums(dtype), device)
    return replace(decoder.mapped(lambda weight: weight.to(device, dtype)), cos=cos, sin=sin)


def folded(decoder: Decoder) -> Decoder:
    """Return a decoder that computes the same without weights of norms: they are in the matrices that follow."""
    layers = tuple(
        layer._replace(
            attention_norm=None,
            qkv=_scaled(layer.qkv, layer.attention_norm),
            ffn_norm=None,
            gate_up=_scaled(layer.gate_up, layer.ffn_norm),
        )
        for layer in decoder.layers
    )
    return replace(decoder, layers=layers, norm=None, head=_scaled(decoder.head, decoder.norm))


def _scaled(matrix: torch.Tensor, norm: Optional[torch.Tensor]) -> torch.Tensor:
    return matrix if norm is None else matrix * norm


def _sums(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums are made."""
    import torch

    return torch.float64 if dtype == torch.float64 else torch.float32


def _rotary(head_dim: int, positions: int, dtype: torch.dtype, device: str) -> Tuple[torch.Tensor, torch.Tensor]:
    import torch

    # On the CPU in fp64: the same tables for every device and dtype.
    frequencies = ROTARY_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


# ----------------------------------------------------------------------------------------------------
# What a block is made of


def rms_norm(x: torch.Tensor, weight: Optional[torch.Tensor]) -> torch.Tensor:
    """Return x over the root mean square of its last dimension."""
    import torch

    wide = x.to(_sums(x.dtype))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)
    return (normed if weight is None else normed * weight).to(x.dtype)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the halves of x's last dimension against each other; `cos` and `sin` broadcast against a half."""
    import torch

    first, second = x.to(cos.dtype).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def feed_forward(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Return down(silu(gate(x)) · up(x)).

    Two products with the halves of one weight: compiled as reductions of one shape they become one kernel, silu
    included.
    """
    from torch.nn import functional

    gate, up = layer.gate_up.chunk(2, 0)
    return functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), layer.down)


def block(
    geometry: Geometry, layer: Layer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run one layer over whole sequences; return them, their keys and their values.

    Sequences are [batch, tokens, hidden], keys and values [batch, kv_heads, tokens, head_dim]; `cos` and `sin` are the
    first `tokens` rows of the tables.
    """
    from torch.nn import functional

    batch, tokens, _ = x.shape
    qkv = functional.linear(rms_norm(x, layer.attention_norm), layer.qkv)
    q, k, v = (
        part.view(batch, tokens, -1, geometry.head_dim).transpose(1, 2)
        for part in qkv.split((geometry.hidden, geometry.kv, geometry.kv), -1)
    )
    q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    group = geometry.heads // geometry.kv_heads
    # Not enable_gqa: of it torch 2.5 and 2.6 know only some backends.
    attended = functional.scaled_dot_product_attention(
        q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), is_causal=True
    )
    x = x + functional.linear(attended.transpose(1, 2).reshape(batch, tokens, geometry.hidden), layer.output)
    return x + feed_forward(layer, rms_norm(x, layer.ffn_norm)), k, v


def decode_block(
    geometry: Geometry,
    layer: Layer,
    x: torch.Tensor,
    position: torch.Tensor,
    *,
    keys: torch.Tensor,
    values: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> torch.Tensor:
    """Run one layer over one token of each sequence, [batch, hidden], and write its keys and values to the cache.

    `position` is int64[1] on the device, the same for all sequences; `keys` and `values` are [batch, kv_heads,
    positions, head_dim]; `cos` and `sin` the whole tables. What stands in the cache beyond `position` has no
    influence, NaN neither.
    """
    import torch
    from torch.nn import functional

    batch, sums = x.shape[0], cos.dtype
    group = geometry.heads // geometry.kv_heads
    qkv = functional.linear(rms_norm(x, layer.attention_norm), layer.qkv)
    q, k, v = qkv.split((geometry.hidden, geometry.kv, geometry.kv), -1)
    turn = cos.index_select(0, position), sin.index_select(0, position)
    q = rotated(q.view(batch, geometry.kv_heads, group, 1, geometry.head_dim), *turn)
    k = rotated(k.view(batch, geometry.kv_heads, 1, geometry.head_dim), *turn)
    keys.index_copy_(2, position, k)
    values.index_copy_(2, position, v.view(batch, geometry.kv_heads, 1, geometry.head_dim))
    # Products and sums, not matmul: for one query compiled code streams the cache through reductions.
    seen = torch.arange(keys.shape[2], device=x.device) <= position
    scores = (q.to(sums) * keys.to(sums).unsqueeze(2)).sum(-1) * geometry.head_dim**-0.5
    weights = torch.where(seen, scores, -math.inf).softmax(-1)
    used = torch.where(seen.unsqueeze(-1), values, 0.0).to(sums)
    attended = (weights.unsqueeze(-1) * used.unsqueeze(2)).sum(-2).to(x.dtype)
    x = x + functional.linear(attended.reshape(batch, geometry.hidden), layer.output)
    return x + feed_forward(layer, rms_norm(x, layer.ffn_norm))


def logits(x: torch.Tensor, norm: Optional[torch.Tensor], head: torch.Tensor) -> torch.Tensor:
    """Return the logits of [..., hidden], fp32 from whatever the weights are: in bf16 the largest ones are often equal.

    The head is not copied to fp32 as a whole; that would be more than all else a token moves.
    """
    import torch
    from torch.nn import functional

    x = rms_norm(x, norm)
    if head.dtype == _sums(head.dtype):
        return functional.linear(x, head)
    if head.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):  # torch 2.8 and newer, on CUDA
        flat = torch.mm(x.reshape(-1, x.shape[-1]), head.t(), out_dtype=torch.float32)
        return flat.view(*x.shape[:-1], head.shape[0])
    return torch.cat([functional.linear(x.float(), part.float()) for part in head.split(4096)], -1)


def logits_of_one(x: torch.Tensor, norm: Optional[torch.Tensor], head: torch.Tensor) -> torch.Tensor:
    """Return the logits of [1, hidden], to be compiled: one reduction that reads the head as it is, and sums in fp32.

    Not compiled it is right as well, but writes the whole product.
    """
    sums = _sums(head.dtype)
    return (rms_norm(x, norm).to(sums) * head.to(sums)).sum(-1).unsqueeze(0)


# ----------------------------------------------------------------------------------------------------
# Using one


@dataclass(frozen=True)
class State:
    """What generation carries from token to token, all of it on the device and written in place."""

    token: torch.Tensor
    """int64[batch]: the last one, not yet in the cache."""
    position: torch.Tensor
    """int64[1]: where `token` goes."""
    history: torch.Tensor
    """int64[positions, batch]: every token by its position."""
    keys: Tuple[torch.Tensor, ...]
    values: Tuple[torch.Tensor, ...]


def state(decoder: Decoder, *, batch: int = 1) -> State:
    """Return an empty state with caches for all of the decoder's positions."""
    import torch

    geometry, like = decoder.geometry, decoder.embedding
    shape = (batch, geometry.kv_heads, decoder.positions, geometry.head_dim)

    def caches() -> Tuple[torch.Tensor, ...]:
        return tuple(torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(geometry.layers))

    def integers(*sizes: int) -> torch.Tensor:
        return torch.zeros(sizes, dtype=torch.int64, device=like.device)

    return State(integers(batch), integers(1), integers(decoder.positions, batch), caches(), caches())


Block = Callable[..., Tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]]
DecodeBlock = Callable[..., "torch.Tensor"]
Logits = Callable[..., "torch.Tensor"]


def forward(
    decoder: Decoder, tokens: torch.Tensor, *, into: Optional[State] = None, run: Block = block
) -> torch.Tensor:
    """Return the last layer's [batch, tokens, hidden] for int64[batch, tokens]; `logits` does the rest.

    Keys and values go into the caches of `into`. `run` is `block`, or that compiled.
    """
    from torch.nn import functional

    length = tokens.shape[1]
    cos, sin = decoder.cos[:length], decoder.sin[:length]
    x = functional.embedding(tokens, decoder.embedding)
    for number, layer in enumerate(decoder.layers):
        x, keys, values = run(decoder.geometry, layer, x, cos, sin)
        if into is not None:
            into.keys[number][:, :, :length].copy_(keys)
            into.values[number][:, :, :length].copy_(values)
    return x


def prefill(
    decoder: Decoder, tokens: torch.Tensor, into: State, *, run: Block = block, finish: Logits = logits
) -> torch.Tensor:
    """Read a prompt into a state, and choose the token after it; return that token's logits, [batch, vocab]."""
    x = forward(decoder, tokens, into=into, run=run)
    length = tokens.shape[1]
    found = finish(x[:, -1], decoder.norm, decoder.head)
    into.history[:length].copy_(tokens.t())
    into.token.copy_(found.argmax(-1))
    into.position.fill_(length)
    into.history[length].copy_(into.token)
    return found


def step(decoder: Decoder, at: State, *, run: DecodeBlock = decode_block, finish: Logits = logits) -> torch.Tensor:
    """Decode one token greedily, on the device alone; return its logits, [batch, vocab].

    Can be captured as a whole. `run` and `finish` are `decode_block` and `logits`, or `logits_of_one`, or those
    compiled. The last position must not be stepped from: the token after it has no place.
    """
    x = decoder.embedding.index_select(0, at.token)
    for layer, keys, values in zip(decoder.layers, at.keys, at.values):
        x = run(decoder.geometry, layer, x, at.position, keys=keys, values=values, cos=decoder.cos, sin=decoder.sin)
    found = finish(x, decoder.norm, decoder.head)
    at.token.copy_(found.argmax(-1))
    at.position.add_(1)
    at.history.index_copy_(0, at.position, at.token.unsqueeze(0))
    return found
