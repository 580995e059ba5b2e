"""Images in which the checks of `validate/checks/serve.py` must not pass: a stand-in for the service, and libraries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.mutations import Mutation

DECLARED: Mapping[str, Any] = {
    "program": "serve",
    "port": 8000,
    "expect": {"packages": {"onnx": "1.23.2", "onnxscript": "0.7.2"}},
}

# ----------------------------------------------------------------------------------------------------
# The program: what the check asks of it, without a model

SERVICE = """
import http.server, json, os, random, signal, sys, threading, time

FAULT = {fault!r}
token, model = os.environ.get("TORCHYARD_TOKEN"), os.environ["TORCHYARD_MODEL"]
limits = {{name: int(os.environ["TORCHYARD_MAX_" + name]) for name in ("BODY_BYTES", "BATCH", "NEW_TOKENS")}}

def refuse(what):
    print("torchyard-serve:", what, flush=True)
    sys.exit(2)

if sys.argv[1:] == ["--health"]:
    sys.exit(FAULT == "sick")
if FAULT == "broken":
    refuse("it cannot start")
if not token and FAULT != "takes an empty token":
    refuse("TORCHYARD_TOKEN is empty")
if not os.path.exists(model + "/model.safetensors") and FAULT != "unpickles":
    print("Traceback\\n" if FAULT == "traceback" else "", end="")
    refuse("pytorch_model.bin is a pickle")
known = {{"prompt", "max_new_tokens", "temperature", "seed", "stream"}}
ending = threading.Event()

class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, status, document, kind="application/json"):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(document if isinstance(document, bytes) else json.dumps(document).encode())

    def allowed(self):
        given = self.headers.get("Authorization")
        if FAULT == "any token" and given:
            return True
        if FAULT in ("open", "open metrics") and (FAULT == "open" or self.path == "/metrics"):
            return True
        return given == "Bearer " + token and FAULT != "refuses all"

    def do_GET(self):
        if self.path == "/metrics" and not self.allowed():
            return self.answer(401, {{}})
        self.answer(200, {{"status": "ready"}})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.allowed():
            return self.answer(401, {{}})
        asked = json.loads(body)
        if FAULT == "prints prompts":
            print(asked.get("prompt"), flush=True)
        prompt = asked.get("prompt")
        wrong = (
            not prompt or len(body) > limits["BODY_BYTES"] or len(prompt) > limits["BATCH"] and isinstance(prompt, list)
            or len(str(prompt)) > 300 or asked.get("max_new_tokens", 1) > limits["NEW_TOKENS"]
            or asked.get("temperature", 1) < 0 or set(asked) - known
        )
        if wrong and FAULT != "takes everything":
            return self.answer(422, {{}} if FAULT == "gives no reason" else {{"error": {{"message": "no"}}}})
        made = random.Random(0 if asked.get("temperature") == 0 else asked.get("seed"))
        if FAULT == "random" or (FAULT == "no seed" and asked.get("temperature")):
            made = random.Random()
        if FAULT == "ignores seeds":
            made = random.Random(5)
        count = asked.get("max_new_tokens", 8)
        text = "" if FAULT == "says nothing" else "".join(made.choice("abcdef") for _ in range(count))
        document = {{"answers": [{{"text": text, "new_tokens": count - (FAULT == "too short")}}]}}
        if FAULT == "answers otherwise":
            document = {{"text": text}}
        if not asked.get("stream"):
            return self.answer(200, document)
        self.send_response(200)
        self.end_headers()
        for index, character in enumerate(text):
            character = "?" if FAULT == "streams otherwise" else character
            data = json.dumps({{"index": 0, "text": character}})
            self.wfile.write(("event: text\\ndata: " + data + "\\n\\n").encode())
            if count == 200:
                time.sleep(0.003)
        self.wfile.write(b"event: end\\ndata: {{}}\\n\\n" if FAULT != "breaks off" else b"")
        ending.set()

    def log_message(self, *_):
        pass

if FAULT == "prints its token":
    print("token:", token, flush=True)
if FAULT == "shows its token" and "shown" not in sys.argv:
    os.execv(sys.executable, [sys.executable, __file__, "shown", token])
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["TORCHYARD_PORT"])), Handler)

def end(*_):
    ending.clear()
    threading.Thread(target=lambda: (ending.wait(10), os._exit(1 if FAULT == "ends with 1" else 0))).start()

signal.signal(signal.SIGTERM, end)
server.serve_forever()
"""
PLANT = """
import os, sys
site = os.path.join(os.getcwd(), "site")

def write(name, content, mode=0o644):
    path = os.path.join(site, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as it:
        it.write(content)
    os.chmod(path, mode)

write("empty/none", "")
os.environ["PYTHONPATH"] = site
"""


def with_service(fault: str) -> str:
    """Return a prelude that plants a stand-in for the service with one fault, or none, and a model for it."""
    return f"""{PLANT}
write("bin/torchyard-serve", "#!" + sys.executable + "\\n" + {SERVICE.format(fault=fault)!r}, 0o755)
os.environ["PATH"] = os.path.join(site, "bin") + os.pathsep + os.environ["PATH"]
for name in ("config.json", "model.safetensors"):
    write("../tiny-model/" + name, "{{}}")
"""


_SERVICE: tuple[tuple[str, str], ...] = (
    ("broken", "does not come to answer"),
    ("takes an empty token", "starts with an empty token"),
    ("unpickles", "starts with pickled weights"),
    ("traceback", "does not refuse pickled weights with one line and exit code 2"),
    ("open", "POST /generate is answered with 200 without a token"),
    ("open metrics", "GET /metrics is answered with 200 without a token"),
    ("any token", "POST /generate is answered with 200 with a wrong token"),
    ("refuses all", "with the token is answered with 401"),
    ("answers otherwise", "does not answer a request"),
    ("too short", "generates 23 tokens, not 24"),
    ("says nothing", "gives an empty answer"),
    ("random", "greedy decoding gives another text the second time"),
    ("no seed", "one seed gives two texts"),
    ("ignores seeds", "two seeds give one text"),
    ("streams otherwise", "streaming gives another text"),
    ("takes everything", "does not refuse a negative temperature"),
    ("gives no reason", "does not refuse no prompt"),
    ("prints its token", "prints the token that it was given"),
    ("prints prompts", "prints prompts"),
    ("shows its token", "the token stands in the list of processes"),
    ("sick", "the health check fails"),
    ("breaks off", "breaks off at SIGTERM without a last event"),
    ("ends with 1", "ends with 1 after SIGTERM"),
)

# ----------------------------------------------------------------------------------------------------
# The libraries

NO_TOKENIZERS = PLANT + (
    "write('torch.py', '')\nwrite('tokenizers.py', 'raise ImportError(\"GLIBC_2.38 not found\")')\n"
)
NO_ACCELERATE = PLANT + "write('accelerate/__init__.py', 'raise ImportError(\"no psutil here\")')\n"


def _patched(source: str) -> str:
    """Return a prelude by which every Python that is started runs some source first."""
    return PLANT + f"write('sitecustomize.py', {source!r})\n"


IGNORES_TOP_K = _patched("""
from transformers.generation import logits_process
logits_process.TopKLogitsWarper.__call__ = lambda self, tokens, scores: scores
""")
TAKES_THE_SECOND = _patched("""
import torch
torch.argmax = lambda scores, dim=-1, **_: scores.topk(2, dim=dim).indices.select(dim, 1)
""")
LOADS_OTHER_WEIGHTS = _patched("""
import torch
from transformers import LlamaForCausalLM
whole = LlamaForCausalLM.from_pretrained.__func__
def careless(cls, *arguments, **options):
    model = whole(cls, *arguments, **options)
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    return model
LlamaForCausalLM.from_pretrained = classmethod(careless)
""")
EXPORTS_ANOTHER = _patched("""
import torch
whole = torch.export.load
def load(path):
    program = whole(path)
    next(iter(program.state_dict.values())).data.add_(0.5)
    return program
torch.export.load = load
""")
NO_ONNX = PLANT + "write('onnx.py', 'raise ImportError(\"onnx was built for another protobuf\")')\n"
PREPARES_NOTHING = _patched("""
import accelerate
accelerate.Accelerator.prepare = lambda self, *them: them
""")

MUTATIONS = [
    *(
        Mutation(check="svc.generate", name=fault, prelude=with_service(fault), says=says, declared=DECLARED)
        for fault, says in _SERVICE
    ),
    Mutation(
        check="svc.generate",
        name="no program",
        prelude=with_service("") + "os.environ['PATH'] = '/usr/bin'",
        says="there is no torchyard-serve on PATH",
        declared=DECLARED,
    ),
    Mutation(
        check="llm.transformers",
        name="tokenizers cannot be imported",
        prelude=NO_TOKENIZERS,
        says="GLIBC_2.38 not found",
        declared=DECLARED,
    ),
    Mutation(
        check="llm.transformers",
        name="top_k is ignored",
        prelude=IGNORES_TOP_K,
        says="sampling with top_k=3 took number",
        declared=DECLARED,
        needs="llm",
    ),
    Mutation(
        check="llm.transformers",
        name="greedy decoding takes the second likeliest token",
        prelude=TAKES_THE_SECOND,
        says="greedy decoding does not take the likeliest token",
        declared=DECLARED,
        needs="llm",
    ),
    Mutation(
        check="llm.transformers",
        name="other weights are loaded than were saved",
        prelude=LOADS_OTHER_WEIGHTS,
        says="a model that was saved and loaded computes something else",
        declared=DECLARED,
        needs="llm",
    ),
    Mutation(
        check="llm.export",
        name="tokenizers cannot be imported",
        prelude=NO_TOKENIZERS,
        says="a model cannot be exported: exit code 1",
        declared=DECLARED,
    ),
    Mutation(
        check="llm.export",
        name="onnx cannot be imported",
        prelude=NO_ONNX,
        says="onnx was built for another protobuf",
        declared=DECLARED,
        needs="llm",
    ),
    Mutation(
        check="llm.export",
        name="an exported graph has other weights",
        prelude=EXPORTS_ANOTHER,
        says="a model exported by torch.export gives other logits for the tokens that it was made with",
        declared=DECLARED,
        needs="llm",
    ),
    Mutation(
        check="llm.accelerate",
        name="accelerate cannot be imported",
        prelude=NO_ACCELERATE,
        says="accelerate launch does not work: exit code 1",
        declared=DECLARED,
    ),
    Mutation(
        check="llm.accelerate",
        name="nothing is prepared",
        prelude=PREPARES_NOTHING,
        says="the processes trained two models",
        declared=DECLARED,
        needs="llm",
    ),
]
