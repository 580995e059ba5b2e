"""Images in which the checks of `security.py` must not pass: trees of files that stand for them."""

from typing import Any

from tests.support.mutations import Mutation
from validate.verdict import Status

# An image that is in order, and hands to change it.
TREE = """
import os
from validate.checks import security
tree = os.path.join(os.getcwd(), "tree")
security.ROOT = tree
uid, gid = os.geteuid(), os.getegid()
os.geteuid, os.getegid, os.getgroups = lambda: 1000, lambda: 0, lambda: [0]

def put(path, text="x", mode=0o644):
    path = tree + path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as it:
        it.write(text)
    os.chmod(path, mode)

put("/etc/passwd", "root:x:0:0:root:/root:/bin/bash\\ntorch:x:1000:0::/home/torch:/bin/bash\\n")
put("/usr/bin/su", mode=0o4755)
put("/var/lib/dpkg/info/util-linux.list", "/.\\n/bin\\n/bin/su\\n")
put("/opt/venv/pyvenv.cfg")
put("/opt/venv/lib/python3/site-packages/tornado/test/test.key", "-----BEGIN PRIVATE KEY-----")
for name in [name for name in os.environ if "KEY" in name or "TOKEN" in name or "SECRET" in name]:
    del os.environ[name]
"""


def declared(user: str = "1000:0", **config: Any) -> dict[str, Any]:
    return {"config": {"user": user, "env": {"PATH": "/opt/venv/bin"}, "labels": {}, "cmd": ["bash"], **config}}


OURS = declared()


def secret(name: str, prelude: str, says: str) -> Mutation:
    return Mutation(check="sec.secrets", name=name, prelude=TREE + prelude, declared=OURS, says=says)


MUTATIONS = [
    Mutation(check="sec.user", name="root", prelude=TREE, declared=declared("0:0"), says="the image's user is root"),
    Mutation(check="sec.user", name="no user", prelude=TREE, declared=declared(""), says="names no user"),
    Mutation(check="sec.user", name="a name", prelude=TREE, declared=declared("torch"), says="'torch', not a number"),
    Mutation(
        check="sec.user",
        name="started as root",
        prelude=TREE + "os.geteuid = lambda: 0",
        declared=OURS,
        status=Status.WARN,
        says="this container runs as root",
    ),
    Mutation(check="sec.user", name="a machine", prelude=TREE, status=Status.SKIP, says="this is a machine"),
    Mutation(
        check="sec.user",
        name="root without a password",
        prelude=TREE + "put('/etc/passwd', 'root::0:0:root:/root:/bin/bash')",
        declared=OURS,
        says="root: an empty password",
    ),
    Mutation(
        check="sec.user",
        name="a password in the image, for everybody to read",
        prelude=TREE + "put('/etc/shadow', 'root:$y$j9T$abc$def:19000:0:99999:7:::')",
        declared=OURS,
        says="a password that all who have the image share",
    ),
    Mutation(
        check="sec.user",
        name="sudo for everybody",
        prelude=TREE + "put('/etc/sudoers.d/torch', '# a rule\\ntorch ALL=(ALL) NOPASSWD: ALL\\n')",
        declared=OURS,
        says="/etc/sudoers.d/torch: torch ALL=(ALL) NOPASSWD: ALL",
    ),
    Mutation(
        check="sec.user",
        name="a program that becomes root",
        prelude=TREE + "put('/usr/local/bin/helper', mode=0o4755)",
        declared=OURS,
        says="/usr/local/bin/helper",
    ),
    Mutation(
        check="sec.user",
        name="a known program that no package brought",
        prelude=TREE + "put('/usr/bin/mount', mode=0o4755)",
        declared=OURS,
        says="/usr/bin/mount",
    ),
    Mutation(
        check="sec.user",
        name="the list of users can be written",
        prelude=TREE + "os.chmod(tree + '/etc/passwd', 0o666)",
        declared=OURS,
        says="uid 1000 can change files of the system",
    ),
    Mutation(
        check="sec.user",
        name="a directory of programs that can be written",
        prelude=TREE + "os.chmod(tree + '/usr/bin', 0o777)",
        declared=OURS,
        says="/usr/bin",
    ),
    Mutation(check="sec.secrets", name="a machine", prelude=TREE, status=Status.SKIP, says="this is a machine"),
    secret("an SSH key", "put('/home/torch/.ssh/id_ed25519')", "/home/torch/.ssh/id_ed25519"),
    secret("a host key", "put('/etc/ssh/ssh_host_ed25519_key', mode=0o600)", "an SSH host key is in the image"),
    secret("who may log in", "put('/home/torch/.ssh/authorized_keys')", "keys that may log in"),
    secret("a password for the network", "put('/root/.netrc')", "/root/.netrc"),
    secret(
        "a Hugging Face token by its place", "put('/home/torch/.cache/huggingface/token')", "a token is in the image"
    ),
    secret("a token in a file", "put('/workspace/run.sh', 'login hf_' + 'a1B2' * 9)", "/workspace/run.sh"),
    secret("a key in a file", "put('/etc/tls/server.pem', '-----BEGIN RSA PRIVATE KEY-----')", "/etc/tls/server.pem"),
    secret("cloud credentials", "put('/home/torch/.aws/credentials')", "credentials of a cloud"),
    secret(
        "a package index with a password",
        "put('/etc/pip.conf', '[global]\\nindex-url = https://joe:hunter2@index.example.org/simple\\n')",
        "/etc/pip.conf",
    ),
    secret(
        "a cookie secret of Jupyter", "put('/home/torch/.local/share/jupyter/runtime/jupyter_cookie_secret')", "cookie"
    ),
    secret(
        "a key of an ssh server that was started while the image was made",
        "put('/home/torch/.local/share/torchyard/ssh/host_key')",
        "a secret of a service",
    ),
    Mutation(
        check="sec.secrets",
        name="a token in the image's variables",
        prelude=TREE,
        declared=declared(env={"HF_TOKEN": "hf_x"}),
        says="the image's variable HF_TOKEN holds a secret",
    ),
    Mutation(
        check="sec.secrets",
        name="a key in the image's labels",
        prelude=TREE,
        declared=declared(labels={"org.example.api-key": "0123456789"}),
        says="the image's label org.example.api-key holds a secret",
    ),
    Mutation(
        check="sec.secrets",
        name="a token in the image's command",
        prelude=TREE,
        declared=declared(cmd=["serve", "--token", "hf_" + "a1B2" * 9]),
        says="the image's command holds a secret",
    ),
    Mutation(
        check="sec.secrets",
        name="a history",
        prelude=TREE + "put('/root/.bash_history', 'export PASSWORD=x')",
        declared=OURS,
        status=Status.WARN,
        says="/root/.bash_history",
    ),
    Mutation(
        check="sec.secrets",
        name="pip's cache",
        prelude=TREE + "put('/home/torch/.cache/pip/http-v2/a/b', 'x' * 200000)",
        declared=OURS,
        status=Status.WARN,
        says="/home/torch/.cache/pip: 0.2 MB",
    ),
]
