"""Language models in an llm image: its service, and transformers, export and accelerate with a tiny model: T1.

The model is made on the spot, by transformers itself and at random: nothing is downloaded. Only the image's own Python
imports what is beyond torch, in programs of its own.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from validate.check import Probe, check
from validate.service import ANSWER_S, MOST, Service, free_port, judge_end, judge_health, judge_token, told_to_end
from validate.verdict import Skip

NAME = "serve"
PROGRAM = f"torchyard-{NAME}"
START_S = 120.0
PROGRAM_S = 240.0
_NEW = 24
"""Tokens of each answer."""
_TOP = 3
_CLOSE = 1e-4
"""Of logits that are computed in another order, in fp32; they are about 1."""
_PROMPT = "the quick brown fox"
_LIMITS = {"MAX_PROMPT_TOKENS": "64", "MAX_NEW_TOKENS": "200", "MAX_BATCH": "2", "MAX_BODY_BYTES": "4096"}


def _skip_others(probe: Probe) -> None:
    program = probe.declared.get("program")
    if program != NAME:
        probe.skip(Skip.NOT_THIS_KIND, f"the image runs {program or 'no service'}, not {NAME}")


# ----------------------------------------------------------------------------------------------------
# Programs of the image's Python

MODEL_CODE = """
import json, sys
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

def make_tokenizer():
    # Trained in memory; each printable character of ASCII is a token, so the text of any answer can be read.
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=160,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=[chr(number) for number in range(33, 127)],
        show_progress=False,
    )
    inner.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")

def make_model(tokenizer):
    torch.manual_seed(20)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        # A head that never ends an answer: all of them have the length that was asked for.
        model.lm_head.weight[[tokenizer.bos_token_id, tokenizer.eos_token_id]] = 0.0
    return model

tokenizer = make_tokenizer()
model = make_model(tokenizer)
told = {}
"""
_TELL = """
with open(sys.argv[1], "w", encoding="utf-8") as file:
    json.dump(told, file)
"""
_USE = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder = sys.argv[2]
inputs = tokenizer({_PROMPT!r}, return_tensors="pt", return_token_type_ids=False)
length = inputs["input_ids"].shape[1]

def generate(model=model, seed=0, **options):
    torch.manual_seed(seed)
    out = model.generate(**inputs, max_new_tokens={_NEW}, pad_token_id=tokenizer.eos_token_id, **options)
    return out[0, length:].tolist()

def logits(model, tokens):
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float()

prompt = inputs["input_ids"][0].tolist()
by_hand = []
for _ in range({_NEW}):
    by_hand.append(int(logits(model, prompt + by_hand)[-1].argmax()))
told["greedy"] = [generate(do_sample=False), generate(do_sample=False), by_hand]
sampling = dict(do_sample=True, temperature=1.5, top_k={_TOP}, top_p=1.0)
told["sampled"] = [generate(seed=seed, **sampling) for seed in (1, 1, 2, 3)]
told["top_1"] = generate(do_sample=True, temperature=1.0, top_k=1)
told["cold"] = generate(do_sample=True, temperature=1e-4, top_k=0)
ranks = []
for tokens in told["sampled"]:
    rows = logits(model, prompt + tokens)[length - 1 : -1]
    ranks += [int((row > row[token]).sum()) for row, token in zip(rows, tokens)]
told["ranks"] = ranks

told["text"] = tokenizer.decode(told["greedy"][0])
run = pipeline("text-generation", model=model, tokenizer=tokenizer)
(said,) = run({_PROMPT!r}, do_sample=False, max_new_tokens={_NEW}, return_full_text=False)
told["pipeline"] = said["generated_text"]

model.save_pretrained(folder)
tokenizer.save_pretrained(folder)
again = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
told["reloaded"] = torch.equal(logits(again, prompt), logits(model, prompt))
told["retokenized"] = AutoTokenizer.from_pretrained(folder, local_files_only=True)({_PROMPT!r})["input_ids"] == prompt
"""
_EXPORT = """
class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, tokens):
        return self.model(input_ids=tokens, use_cache=False).logits

wrapped = Logits(model).eval()
draw = torch.Generator().manual_seed(4)
first, other = (torch.randint(2, len(tokenizer), (1, length), generator=draw) for length in (12, 29))
shapes = {"tokens": {1: torch.export.Dim("length", min=2, max=64)}}
with torch.no_grad():
    truth = {"first": wrapped(first), "other": wrapped(other)}
    exported = torch.export.export(wrapped, (first,), dynamic_shapes=shapes)
    torch.export.save(exported, sys.argv[2] + ".pt2")
    loaded = torch.export.load(sys.argv[2] + ".pt2").module()
    for which, tokens in (("first", first), ("other", other)):
        told["export_" + which] = float((loaded(tokens) - truth[which]).abs().max())
told["logits"] = float(truth["first"].std())
"""
_ONNX = """
import onnx
from onnx.reference import ReferenceEvaluator

with torch.no_grad():
    graph = torch.onnx.export(wrapped, (first,), dynamo=True, dynamic_shapes=shapes, verbose=False)
graph.save(sys.argv[2] + ".onnx")
onnx.checker.check_model(sys.argv[2] + ".onnx", full_check=True)
evaluator = ReferenceEvaluator(sys.argv[2] + ".onnx")
for which, tokens in (("first", first), ("other", other)):
    (found,) = evaluator.run(None, {evaluator.input_names[0]: tokens.numpy()})
    told["onnx_" + which] = float((torch.from_numpy(found) - truth[which]).abs().max())
"""
_TRAIN = """
import json, os, sys
import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
torch.manual_seed(accelerator.process_index)  # the launcher's ranks begin apart; prepare must bring them together
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
samples = torch.arange(64, dtype=torch.float32)
features = torch.stack([torch.sin(samples * (power + 1) / 20) for power in range(8)], 1)
targets = features.sum(1, keepdim=True)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(features, targets, samples), batch_size=8)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
seen, losses = [], []
for epoch in range(8):
    total = 0.0
    for x, y, which in loader:
        loss = torch.nn.functional.mse_loss(model(x), y)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        total += float(loss)
        if not epoch:
            seen += which.int().tolist()
    losses.append(total)
told = {
    "rank": accelerator.process_index,
    "world": accelerator.num_processes,
    "seen": seen,
    "losses": losses,
    "weights": [float(it) for it in torch.cat([it.detach().flatten() for it in model.parameters()])],
    "gathered": accelerator.gather(torch.tensor([accelerator.process_index])).tolist(),
}
with open(os.path.join(sys.argv[1], "rank-" + str(told["rank"]) + ".json"), "w") as file:
    json.dump(told, file)
accelerator.end_training()
"""


def environment(probe: Probe) -> Dict[str, str]:
    """Return the environment of the programs: offline, one thread each, caches where anybody can write."""
    return {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": f"{probe.request.scratch}/huggingface",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _run(probe: Probe, command: Sequence[str], *, what: str, remedy: str) -> None:
    """Run a program to its end; stops the check, saying `what` does not work, if it fails."""
    try:
        done = subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment(probe),
            timeout=PROGRAM_S,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        said = late.output.decode("utf-8", "replace") if isinstance(late.output, bytes) else str(late.output or "")
        probe.stop(f"{what}: no end within {PROGRAM_S:.0f} s", why=said.strip()[-600:], remedy=remedy)
    if done.returncode != 0:
        probe.stop(f"{what}: exit code {done.returncode}", why=done.stdout.strip()[-600:], remedy=remedy)


def _observed(probe: Probe, code: str, *arguments: str, what: str, remedy: str) -> Mapping[str, Any]:
    """Return what a program of the image's Python saw."""
    path = f"{probe.request.scratch}/told-{os.getpid()}.json"
    _run(probe, [sys.executable, "-c", code + _TELL, path, *arguments], what=what, remedy=remedy)
    with open(path, encoding="utf-8") as file:  # noqa: PTH123
        seen: Mapping[str, Any] = json.load(file)
    return seen


def _model_folder(probe: Probe) -> str:
    """Return a directory with the tiny model; llm.transformers leaves one, and without it one is made."""
    folder = f"{probe.request.scratch}/tiny-model"
    if not os.path.isdir(folder):  # noqa: PTH112
        making = tempfile.mkdtemp(dir=probe.request.scratch)
        code = MODEL_CODE + "model.save_pretrained(sys.argv[2]); tokenizer.save_pretrained(sys.argv[2])\n"
        _observed(probe, code, making, what="transformers cannot make a model", remedy="run llm.transformers")
        _leave(making, folder)
    return folder


def _leave(making: str, folder: str) -> None:
    with contextlib.suppress(OSError):  # another check was quicker
        os.rename(making, folder)  # noqa: PTH104


# ----------------------------------------------------------------------------------------------------
# transformers


def judge_generation(probe: Probe, seen: Mapping[str, Any]) -> None:
    """Judge tokens: greedy ones are the likeliest and the same each time, sampled ones obey their parameters."""
    first, second, by_hand = seen["greedy"]
    sampled = seen["sampled"]
    highest = max(seen["ranks"])
    wrong = [
        (first != second, "greedy decoding gives other tokens the second time", _parted(first, second)),
        (
            first != by_hand,
            "greedy decoding does not take the likeliest token",
            f"against one forward pass per token: {_parted(first, by_hand)}",
        ),
        (sampled[0] != sampled[1], "one seed gives two samples", _parted(sampled[0], sampled[1])),
        (
            all(one == sampled[0] for one in sampled),
            "sampling gives the same tokens whatever the seed",
            "three seeds, temperature 1.5",
        ),
        (highest >= _TOP, f"sampling with top_k={_TOP} took number {highest + 1}", "by likelihood, of a forward pass"),
        (seen["top_1"] != first, "sampling with top_k=1 is not greedy decoding", _parted(seen["top_1"], first)),
        (seen["cold"] != first, "sampling at temperature 0.0001 is not greedy", _parted(seen["cold"], first)),
    ]
    _tell(probe, wrong)


def judge_forms(probe: Probe, seen: Mapping[str, Any], files: Sequence[str]) -> None:
    """Judge the pipeline, and what became of a model that was saved and loaded."""
    pickles = [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    wrong = [
        (
            seen["pipeline"] != seen["text"],
            "the pipeline gives another text than generate",
            f"{seen['pipeline'][:80]!r}, not {seen['text'][:80]!r}",
        ),
        (
            "model.safetensors" not in files or bool(pickles),
            "save_pretrained does not write safetensors",
            ", ".join(sorted(files)),
        ),
        (not seen["reloaded"], "a model that was saved and loaded computes something else", "the same prompt"),
        (not seen["retokenized"], "a tokenizer that was saved and loaded gives other tokens", "the same prompt"),
    ]
    _tell(probe, wrong)


def _parted(left: Sequence[int], right: Sequence[int]) -> str:
    at = next((number for number, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))
    return f"they differ from token {at + 1} of {len(left)} on"


def _tell(probe: Probe, wrong: Sequence[Tuple[bool, str, str]]) -> None:
    for found, what, why in wrong:
        if found:
            probe.fail(what, why=why, remedy="pip install --force-reinstall transformers, of the image's version")


@check(
    "llm.transformers",
    title="transformers generates, samples as it is told, and saves what it loads",
    tier=1,
    needs=("run.import",),
)
def transformers(probe: Probe) -> None:
    """Generate with a tiny model of random weights: greedy, sampled, through the pipeline, saved and loaded."""
    _skip_others(probe)
    making = tempfile.mkdtemp(dir=probe.request.scratch)
    seen = _observed(
        probe,
        MODEL_CODE + _USE,
        making,
        what="transformers does not work",
        remedy="pip check; pip install transformers",
    )
    files = os.listdir(making)  # noqa: PTH208
    _leave(making, f"{probe.request.scratch}/tiny-model")
    judge_generation(probe, seen)
    judge_forms(probe, seen, files)
    probe.saw(greedy=seen["greedy"][0], text=seen["text"])
    probe.detail(f"{_NEW} tokens greedy and sampled, by generate and by a pipeline; saved and loaded bit for bit")


# ----------------------------------------------------------------------------------------------------
# Export


def judge_export(probe: Probe, seen: Mapping[str, float]) -> None:
    """Judge exported graphs by their logits: for the tokens they were made with, and for more of them."""
    spread = seen["logits"]
    for form, title in (("export", "torch.export"), ("onnx", "ONNX")):
        for which, tokens in (("first", "the tokens that it was made with"), ("other", "more tokens")):
            if f"{form}_{which}" not in seen:
                continue
            error = seen[f"{form}_{which}"]
            probe.metric(f"{form}_{which}", error, "absolute", better="lower")
            if not error <= _CLOSE * max(1.0, spread):
                probe.fail(
                    f"a model exported by {title} gives other logits for {tokens}",
                    why=f"they are up to {error:.2g} apart; their own spread is {spread:.2g}",
                    remedy=f"do not use {title} with this pair of torch and transformers",
                )


@check(
    "llm.export",
    title="a model can be exported, as a graph of torch and as ONNX if that is declared, for any length",
    tier=1,
    needs=("llm.transformers",),
)
def export(probe: Probe) -> None:
    """Export a tiny model in two forms, save and load them, and compare their logits with the model's."""
    _skip_others(probe)
    path = f"{probe.request.scratch}/exported-{os.getpid()}"
    packages = probe.declared.get("expect", {}).get("packages", {})
    to_onnx = {"onnx", "onnxscript"} <= set(packages)
    code = MODEL_CODE + _EXPORT + (_ONNX if to_onnx else "")
    seen = _observed(probe, code, path, what="a model cannot be exported", remedy="pip check")
    judge_export(probe, seen)
    probe.detail(f"torch.export {'and ONNX give' if to_onnx else 'gives'} the model's logits, for two lengths")


# ----------------------------------------------------------------------------------------------------
# accelerate


def judge_ranks(probe: Probe, ranks: Sequence[Mapping[str, Any]]) -> None:
    """Judge what two processes saw of each other, of the samples, and of the model that they trained together."""
    numbers = sorted(one["rank"] for one in ranks)
    if numbers != [0, 1] or any(one["world"] != 2 or one["gathered"] != [0, 1] for one in ranks):
        worlds = [one["world"] for one in ranks]
        probe.stop(
            "accelerate launch does not make one group of two processes",
            why=f"ranks {numbers}, of so many each: {worlds}",
            remedy="see dist.gloo",
        )
    first, second = sorted(ranks, key=lambda one: int(one["rank"]))
    if sorted(first["seen"] + second["seen"]) != list(range(64)):
        probe.fail("the processes do not share the samples out", why=f"{len(first['seen'])} and {len(second['seen'])}")
    if first["weights"] != second["weights"]:
        probe.fail("the processes trained two models", why="their weights differ after eight epochs")
    for one in ranks:
        if not one["losses"][-1] < 0.5 * one["losses"][0]:
            probe.fail(
                "training does not reduce the loss",
                why=f"rank {one['rank']}: from {one['losses'][0]:.3g} to {one['losses'][-1]:.3g}",
            )


@check(
    "llm.accelerate",
    title="accelerate launches two processes that train one model",
    tier=1,
    needs=("run.import",),
)
def accelerate(probe: Probe) -> None:
    """Launch two processes on the CPU, on loopback alone, and have them train."""
    _skip_others(probe)
    folder = tempfile.mkdtemp(prefix="accelerate-", dir=probe.request.scratch)
    script = os.path.join(folder, "train.py")  # noqa: PTH118
    with open(script, "w", encoding="utf-8") as file:  # noqa: PTH123
        file.write(_TRAIN)
    # --cpu would look for mpirun; --multi_gpu goes through torchrun, and the script asks for the CPU.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={free_port()}"]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    _run(probe, [*command, script, folder], what="accelerate launch does not work", remedy="see dist.gloo; pip check")
    ranks = []
    for name in sorted(os.listdir(folder)):  # noqa: PTH208
        if name.endswith(".json"):
            with open(os.path.join(folder, name), encoding="utf-8") as file:  # noqa: PTH118, PTH123
                ranks.append(json.load(file))
    judge_ranks(probe, ranks)
    probe.detail("two processes share the samples and train one model")


# ----------------------------------------------------------------------------------------------------
# The service


class Served(Service):
    """The running service."""

    def generate(self, **asked: Any) -> Tuple[int, str]:  # noqa: ANN401 (whatever JSON can hold)
        """Return the answer to one request, with the token."""
        return self.ask("POST", "/generate", json.dumps(asked), token=self.token)

    def is_ready(self) -> bool:
        """Tell whether it takes requests."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.ask("GET", "/readyz")[0] == http.client.OK
        return False


@contextlib.contextmanager
def serving(probe: Probe, program: str, folder: str, token: str) -> Iterator[Served]:
    """Start the program with a model and a token; ended afterwards."""
    port = free_port()
    place = tempfile.mkdtemp(prefix="serve-", dir=probe.request.scratch)
    variables = {name: value for name, value in environment(probe).items() if not name.startswith("TORCHYARD_")}
    given = {"MODEL": folder, "TOKEN": token, "HOST": "127.0.0.1", "PORT": str(port), **_LIMITS}
    variables.update({f"TORCHYARD_{name}": value for name, value in given.items()}, HOME=place)
    log = f"{place}/log"
    with open(log, "wb") as output:  # noqa: PTH123
        process = subprocess.Popen(
            [program], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=variables
        )
    try:
        yield Served(process, port, token, log, variables, "Bearer")
    finally:
        process.kill()
        process.wait()


@check(
    "svc.generate",
    title="the service generates for whom has the token, within its limits, and ends when it is told to",
    tier=1,
    needs=("run.import", "llm.transformers"),
    modes=("F62",),
)
def service(probe: Probe) -> None:
    """Start the image's program with a tiny model on a port of the loopback, and use it with and without the token."""
    _skip_others(probe)
    program = shutil.which(PROGRAM)
    if program is None:
        probe.stop(f"there is no {PROGRAM} on PATH", why="the image declares it as its program")
    folder = _model_folder(probe)
    token, canary = secrets.token_hex(24), f"canary-{secrets.token_hex(4)}"
    _judge_refusals(probe, program, folder)
    began = time.monotonic()
    with serving(probe, program, folder, token) as server:
        while not server.is_ready():
            if server.process.poll() is not None or time.monotonic() > began + START_S:
                probe.stop(
                    f"{PROGRAM} does not come to answer",
                    why=server.printed().strip()[-600:] or "it printed nothing",
                    remedy=f"{PROGRAM} says what it lacks when it is started by hand",
                )
            time.sleep(0.05)
        probe.metric("start_s", time.monotonic() - began, "s", better="lower")
        _judge_doors(probe, server)
        _judge_answers(probe, server)
        _judge_limits(probe, server, canary)
        _judge_discretion(probe, server, canary)
        judge_health(probe, server, program, without="TORCHYARD_TOKEN")
        _judge_end(probe, server)
    probe.detail("nobody is answered without the token; greedy answers repeat, streamed or whole; it ends with 0")


def _judge_refusals(probe: Probe, program: str, folder: str) -> None:
    """Judge that it does not start without a token, nor with a model that it would have to unpickle."""
    pickled = tempfile.mkdtemp(dir=probe.request.scratch)
    shutil.copy(f"{folder}/config.json", pickled)
    with open(f"{pickled}/pytorch_model.bin", "wb") as file:  # noqa: PTH123
        file.write(b"\x80\x04N.")
    for label, model, token, mode in (
        ("an empty token", folder, "", "F62"),
        ("pickled weights", pickled, secrets.token_hex(24), ""),
    ):
        with serving(probe, program, model, token) as server:
            end = time.monotonic() + START_S
            while server.process.poll() is None and time.monotonic() < end and not server.is_ready():
                time.sleep(0.05)
            code, said = server.process.poll(), server.printed().strip()
            if code is None:
                probe.fail(f"{PROGRAM} starts with {label}", why=said[-300:], mode=mode)
            elif code != 2 or not said or "\n" in said:
                probe.fail(
                    f"{PROGRAM} does not refuse {label} with one line and exit code 2",
                    why=f"exit code {code}; {said[-300:] or 'it printed nothing'}",
                )


def _judge_doors(probe: Probe, server: Served) -> None:
    """Judge what is answered with no token, with a wrong one and with the right one."""
    wrong = server.token[:-1] + ("0" if server.token[-1] != "0" else "1")
    body = json.dumps({"prompt": _PROMPT, "max_new_tokens": 2})
    asked: List[Tuple[str, str, str, str, Optional[str], int]] = [
        ("without a token", "POST", "/generate", body, None, 401),
        ("with a wrong token", "POST", "/generate", body, wrong, 401),
        ("with an empty token", "POST", "/generate", body, "", 401),
        ("without a token", "GET", "/metrics", "", None, 401),
        ("without a token", "GET", "/healthz", "", None, 200),
        ("with the token", "GET", "/metrics", "", server.token, 200),
        ("with the token", "POST", "/generate", body, server.token, 200),
    ]
    seen: Dict[str, int] = {}
    for label, method, path, content, token, right in asked:
        status, _ = server.ask(method, path, content, token=token)
        seen[f"{method} {path} {label}"] = status
        if status == right:
            continue
        if right == http.client.OK:
            probe.fail(f"{method} {path} {label} is answered with {status}, not with 200")
        else:
            probe.fail(
                f"{method} {path} is answered with {status} {label}",
                why="it should be 401: whoever reaches the port can use the model",
                remedy="install the image's own torchyard-serve again",
                mode="F62",
            )
    probe.saw(answers=seen)


def _judge_answers(probe: Probe, server: Served) -> None:
    """Judge the texts: greedy twice the same, a sample repeated by its seed, streamed as whole."""
    greedy = {"prompt": _PROMPT, "max_new_tokens": _NEW, "temperature": 0}
    whole = [_answer(probe, server, greedy), _answer(probe, server, greedy)]
    sampled = [_answer(probe, server, {**greedy, "temperature": 1.5, "seed": seed}) for seed in (1, 1, 2)]
    status, streamed = server.generate(stream=True, **greedy)
    pieces = "".join(data["text"] for name, data in events(streamed) if name == "text")
    for wrong, what, why in (
        (not whole[0].strip(), "the service gives an empty answer", f"to {_NEW} tokens"),
        (whole[0] != whole[1], "greedy decoding gives another text the second time", f"{whole[0]!r}, {whole[1]!r}"),
        (sampled[0] != sampled[1], "one seed gives two texts", f"{sampled[0]!r}, {sampled[1]!r}"),
        (sampled[0] == sampled[2], "two seeds give one text", f"{sampled[0]!r} at temperature 1.5"),
        (
            status != 200 or pieces != whole[0],
            "streaming gives another text",
            f"{status}: {pieces!r}, not {whole[0]!r}",
        ),
    ):
        if wrong:
            probe.fail(what, why=why[:400], remedy="run llm.transformers: it tries the same without the service")


def _answer(probe: Probe, server: Served, asked: Mapping[str, Any]) -> str:
    status, text = server.generate(**asked)
    try:
        (one,) = json.loads(text)["answers"]
        count, said = int(one["new_tokens"]), str(one["text"])
    except (ValueError, KeyError, TypeError):
        probe.stop("the service does not answer a request", why=f"{status}: {text[:300]}")
    if count != asked["max_new_tokens"]:
        probe.fail(f"the service generates {count} tokens, not {asked['max_new_tokens']}")
    return said


def events(stream: str) -> List[Tuple[str, Any]]:
    """Return the server-sent events of a stream: name and data; what is no event of this kind is left out."""
    found: List[Tuple[str, Any]] = []
    for block in stream.split("\n\n"):
        name, _, data = block.partition("\n")
        if name.startswith("event: ") and data.startswith("data: "):
            with contextlib.suppress(ValueError):
                found.append((name[len("event: ") :], json.loads(data[len("data: ") :])))
    return found


def _judge_limits(probe: Probe, server: Served, canary: str) -> None:
    """Judge that too much, and what is no request, is refused with a reason of one shape."""
    for label, body in (
        ("a prompt that is too long", {"prompt": f"{canary} " * 40}),
        ("a body that is too large", {"prompt": f"{canary} " * 400}),
        ("too many prompts", {"prompt": [canary] * 3}),
        ("too many new tokens", {"prompt": canary, "max_new_tokens": 201}),
        ("a negative temperature", {"prompt": canary, "temperature": -1}),
        ("an unknown parameter", {"prompt": canary, "temprature": 1}),
        ("no prompt", {}),
    ):
        status, text = server.generate(**body)
        error: Any = None
        with contextlib.suppress(ValueError, TypeError, KeyError):
            error = json.loads(text)["error"]["message"]
        if status not in (413, 422) or not error:
            probe.fail(
                f"the service does not refuse {label}",
                why=f"it answers {status}, not 413 or 422 with a reason: {text[:200]}",
                remedy="install the image's own torchyard-serve again",
            )


def _judge_discretion(probe: Probe, server: Served, canary: str) -> None:
    """Judge that neither prompts nor the token are in the log, nor the token in the list of processes."""
    judge_token(probe, server)
    printed = server.printed()
    if canary in printed or _PROMPT in printed:
        probe.fail("the service prints prompts", why="logs are read by more people than may read prompts")


def _judge_end(probe: Probe, server: Served) -> None:
    """Judge that the service ends when it is told to, and that what it was generating comes to an end of its own."""
    body = json.dumps({"prompt": _PROMPT, "max_new_tokens": 200, "temperature": 0, "stream": True})
    headers = {"Authorization": f"Bearer {server.token}"}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=ANSWER_S)) as connection:
        connection.request("POST", "/generate", body=body, headers=headers)
        answer = connection.getresponse()
        beginning = answer.read1(200)
        since = told_to_end(server)
        with contextlib.suppress(OSError, http.client.HTTPException):
            beginning += answer.read(MOST)
    names = [name for name, _ in events(beginning.decode("utf-8", "replace"))]
    if not names or names[-1] not in ("end", "error"):
        probe.fail("a stream breaks off at SIGTERM without a last event", why=f"the last of {len(names)}: {names[-1:]}")
    judge_end(probe, server, since=since)
