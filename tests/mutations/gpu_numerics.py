"""Ways to compute wrongly that the checks of `validate/checks/gpu_numerics.py` must find."""

from tests.support.mutations import Mutation
from validate.verdict import Status

# TF32 keeps ten bits of the fraction, as fp16 does.
SILENT_TF32 = """
import torch
real = torch.mm
def mm(a, b, *, out):
    if a.dtype == torch.float32:
        a, b = a.half().float(), b.half().float()
    return real(a, b, out=out)
torch.mm = mm
"""
TF32_BY_DEFAULT = """
import torch
real = torch.mm
calls = []
def mm(a, b, *, out):
    calls.append(a)
    if len(calls) <= 4:
        a, b = a.half().float(), b.half().float()
    return real(a, b, out=out)
torch.mm = mm
"""
UNWRITTEN_ROW = """
import torch
real = torch.mm
def mm(a, b, *, out):
    real(a[:-1], b, out=out[:-1])
torch.mm = mm
"""
WRONG_NORM = """
import torch
real = torch.nn.functional.layer_norm
def layer_norm(x, shape, w, b):
    return real(x, shape, w, b, eps=1e-5 if x.dtype == torch.float64 else 0.01)
torch.nn.functional.layer_norm = layer_norm
"""
CHANGED_ELEMENT = """
import torch
real = torch.Tensor.sort
calls = []
def sort(self, dim):
    found = real(self, dim)
    calls.append(dim)
    if len(calls) == 1:
        found.values[7, -1] += 1
    return found
torch.Tensor.sort = sort
"""
NOT_CAUSAL = """
import torch
real = torch.nn.functional.scaled_dot_product_attention
torch.nn.functional.scaled_dot_product_attention = lambda *a, is_causal, **k: real(*a, is_causal=False, **k)
"""
ONLY_MATH = """
from torch.nn import attention
real = attention.sdpa_kernel
def sdpa_kernel(backend):
    if backend != attention.SDPBackend.MATH:
        raise RuntimeError("No available kernel. Aborting execution.")
    return real(backend)
attention.sdpa_kernel = sdpa_kernel
"""
NO_AUTOCAST = """
import contextlib, torch
torch.autocast = lambda *_, **__: contextlib.nullcontext()
"""
CARELESS_SCALER = """
import torch
def step(self, optimizer):
    self.unscale_(optimizer)
    optimizer.step()
torch.amp.GradScaler.step = step
"""
NO_STEPS = "import torch; torch.optim.AdamW.step = lambda self, closure=None: None"
NO_SEED = "import torch; torch.manual_seed = lambda seed: None"
FORGETFUL = """
import torch
real = torch.save
def save(state, path):
    state["optimizer"]["state"] = {}
    real(state, path)
torch.save = save
"""
# Unlike the real one it does not draw again what the first pass drew.
OTHER_DROPOUT = """
import torch.utils.checkpoint as module
real = module.checkpoint
module.checkpoint = lambda f, x, use_reentrant: real(f, x, use_reentrant=use_reentrant, preserve_rng_state=False)
"""
WRONG_CODE = """
import torch
torch.compile = lambda f, **_: lambda x, w, g: f(x, w.to(torch.bfloat16).to(w.dtype), g)
"""

MUTATIONS = [
    Mutation(
        check="num.gemm",
        name="silent TF32",
        prelude=SILENT_TF32,
        needs="torch",
        says="fp32 is computed in TF32 although",
    ),
    Mutation(
        check="num.gemm",
        name="TF32 by default",
        prelude=TF32_BY_DEFAULT,
        needs="torch",
        says="unless a program switches that off",
        status=Status.WARN,
    ),
    Mutation(
        check="num.gemm",
        name="a row that is not written",
        prelude=UNWRITTEN_ROW,
        needs="torch",
        says="the product in fp64",
    ),
    Mutation(
        check="num.ops",
        name="another epsilon",
        prelude=WRONG_NORM,
        needs="torch",
        says="layer_norm in fp32, output, is wrong",
    ),
    Mutation(check="num.ops", name="a changed element", prelude=CHANGED_ELEMENT, needs="torch", says="sort differs"),
    Mutation(check="num.sdpa", name="no mask", prelude=NOT_CAUSAL, needs="torch", says="fp32 causal, output, is wrong"),
    Mutation(
        check="num.sdpa",
        name="only the slow one",
        prelude=ONLY_MATH,
        needs="torch",
        says="slow attention",
        status=Status.WARN,
    ),
    Mutation(
        check="num.amp",
        name="autocast does nothing",
        prelude=NO_AUTOCAST,
        needs="torch",
        says="computes in torch.float32",
    ),
    Mutation(
        check="num.amp",
        name="overflows are taken",
        prelude=CARELESS_SCALER,
        needs="torch",
        says="GradScaler takes a step",
    ),
    Mutation(check="num.amp", name="weights do not change", prelude=NO_STEPS, needs="torch", says="does not learn"),
    Mutation(
        check="num.compile",
        name="compiling is switched off",
        prelude="import os; os.environ['TORCHDYNAMO_DISABLE'] = '1'",
        needs="torch",
        says="TORCHDYNAMO_DISABLE=1",
    ),
    Mutation(check="num.compile", name="wrong code", prelude=WRONG_CODE, needs="torch", says="less exact than eager"),
    Mutation(
        check="num.compile",
        name="no compiler",
        prelude="import os; os.environ['PATH'] = '/nonexistent'; os.environ['CXX'] = '/nonexistent/g++'",
        needs="torch",
        says="ompiler",
    ),
    Mutation(check="num.determinism", name="seeds are ignored", prelude=NO_SEED, needs="torch", says="different bits"),
    Mutation(
        check="num.checkpoint",
        name="the optimizer is not saved",
        prelude=FORGETFUL,
        needs="torch",
        says="does not go on",
    ),
    Mutation(
        check="num.checkpoint",
        name="dropout is drawn anew",
        prelude=OTHER_DROPOUT,
        needs="torch",
        says="recomputed activations",
    ),
]
