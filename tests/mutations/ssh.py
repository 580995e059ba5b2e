"""Environments in which checks must not pass: those of `ssh.py`, with stand-ins for OpenSSH's programs."""

from collections.abc import Mapping
from typing import Any

from tests.support.mutations import Mutation
from validate.verdict import Status

DECLARED: Mapping[str, Any] = {"program": "ssh", "prefix": "/opt/venv", "config": {"env": {"VIRTUAL_ENV": "/opt/venv"}}}
# Stand-ins that do what the programs do if all is well; {settings} change that.
PLANT = """
import os, sys
place = os.path.join(os.getcwd(), "bin")
os.makedirs(place)
os.environ["PATH"] = place + ":" + os.environ["PATH"]
os.environ["VIRTUAL_ENV"] = "/opt/venv"
settings = dict(methods="publickey", login="/opt/venv/bin/python", executable="/opt/venv/bin/python", host_key="",
                refuses="wrong", lost="", ends="0", config="", sftp="True", dies="")
settings.update({settings})

def program(name, source):
    path = os.path.join(place, name)
    with open(path, "w") as it:
        it.write("#!" + sys.executable + "\\n" + "S = " + repr(settings) + "\\n" + source)
    os.chmod(path, 0o755)

program("ssh-keygen", '''
import sys
path = sys.argv[sys.argv.index("-f") + 1]
open(path, "w").close()
open(path + ".pub", "w").write("ssh-ed25519 AAAA")
''')
program("torchyard-ssh", '''
import base64, json, os, signal, socket, sys
if "--check" in sys.argv:
    values = dict(authenticationmethods="publickey", pubkeyauthentication="yes", passwordauthentication="no",
                  kbdinteractiveauthentication="no", hostbasedauthentication="no", gssapiauthentication="no",
                  permitemptypasswords="no", permitrootlogin="no", permituserenvironment="no", permittunnel="no",
                  allowagentforwarding="no", allowtcpforwarding="no", gatewayports="no", x11forwarding="no",
                  pubkeyacceptedalgorithms="ssh-ed25519")
    values.update(json.loads(S["config"] or "{}"))
    print(*(name + " " + value for name, value in values.items()), sep="\\\\n")
    sys.exit()
if S["dies"]:
    sys.exit(S["dies"])
signal.signal(signal.SIGTERM, lambda *_: os._exit(int(S["ends"])))
with open("environment-" + os.environ["SSH_PORT"], "w") as it:
    json.dump(dict(os.environ), it)
listening = socket.create_server(("127.0.0.1", int(os.environ["SSH_PORT"])))
while True:
    with listening.accept()[0] as made:
        made.sendall(b"SSH-2.0-stand-in")
''')
program("ssh", '''
import base64, json, os, sys
words = sys.argv
port = words[words.index("-p") + 1]
if "-v" in words:
    sys.exit("debug1: Authentications that can continue: " + S["methods"])
(known,) = [word.partition("=")[2] for word in words if word.startswith("UserKnownHostsFile=")]
with open(known, "w") as it:
    it.write("x ssh-ed25519 " + base64.b64encode((S["host_key"] or port).encode()).decode())
if os.path.basename(words[words.index("-i") + 1]) == S["refuses"]:
    sys.exit("Permission denied (publickey).")
if "-s" in words:
    os.write(1, bytes([0, 0, 0, 5, 2, 0, 0, 0, 3]) if S["sftp"] else b"")
elif words[-1].startswith("bash"):
    print(S["login"])
elif words[-1] != "true":
    with open("environment-" + port) as it:
        environment = json.load(it)
    given = [name for name in environment if name not in ("SSH_AUTHORIZED_KEYS", "TORCHYARD_PROBE_TOKEN", S["lost"])]
    print(json.dumps([S["executable"], {name: environment[name] for name in given + S.get("leaks", [])}]))
''')
"""


def planted(**settings: object) -> str:
    return PLANT.replace("{settings}", repr(settings))


MUTATIONS = [
    Mutation(
        check="svc.sshd",
        name="no SSH server",
        prelude="",
        declared={**DECLARED, "program": None},
        status=Status.SKIP,
        says="the image runs no SSH server",
    ),
    Mutation(
        check="svc.sshd",
        name="the program is missing",
        prelude="import os; os.environ['PATH'] = os.getcwd()",
        declared=DECLARED,
        says="torchyard-ssh is not in PATH",
    ),
    Mutation(
        check="svc.sshd",
        name="the program ends",
        prelude=planted(dies="no keys"),
        declared=DECLARED,
        says="it ended with 1: no keys",
    ),
    Mutation(
        check="svc.sshd",
        name="passwords are asked for",
        prelude=planted(methods="publickey,password,keyboard-interactive"),
        declared=DECLARED,
        says="offers password, keyboard-interactive",
    ),
    Mutation(
        check="svc.sshd",
        name="any key will do",
        prelude=planted(refuses=""),
        declared=DECLARED,
        says="a key that was not given opens",
    ),
    Mutation(
        check="svc.sshd",
        name="no key will do, as where sshd takes the home for unsafe",
        prelude=planted(refuses="right"),
        declared=DECLARED,
        says="refuses the key that it was given",
    ),
    Mutation(
        check="svc.sshd",
        name="sessions begin with an environment of their own",
        prelude=planted(lost="VIRTUAL_ENV"),
        declared=DECLARED,
        says="there VIRTUAL_ENV is None, not '/opt/venv'",
    ),
    Mutation(
        check="svc.sshd",
        name="sessions have the secrets of the container",
        prelude=planted(leaks=["TORCHYARD_PROBE_TOKEN"]),
        declared=DECLARED,
        says="should stay out of them: TORCHYARD_PROBE_TOKEN",
    ),
    Mutation(
        check="svc.sshd",
        name="sessions find the system's Python",
        prelude=planted(executable="/usr/bin/python"),
        declared=DECLARED,
        says="an SSH session finds /usr/bin/python",
    ),
    Mutation(
        check="svc.sshd",
        name="/etc/profile sets PATH anew",
        prelude=planted(login=""),
        declared=DECLARED,
        says="a login shell finds no python",
    ),
    Mutation(
        check="svc.sshd",
        name="no SFTP",
        prelude=planted(sftp=""),
        declared=DECLARED,
        says="transfers no files",
    ),
    Mutation(
        check="svc.sshd",
        name="a host key in the image",
        prelude=planted(host_key="baked"),
        declared=DECLARED,
        says="have the same host key",
    ),
    Mutation(
        check="svc.sshd",
        name="SIGTERM is an error",
        prelude=planted(ends="143"),
        declared=DECLARED,
        says="after SIGTERM it ends with 143",
    ),
    Mutation(
        check="sec.sshd",
        name="no SSH server",
        prelude="",
        declared={**DECLARED, "program": "notebook"},
        status=Status.SKIP,
        says="the image runs no SSH server",
    ),
    Mutation(
        check="sec.sshd",
        name="passwords are allowed",
        prelude=planted(config='{"passwordauthentication": "yes"}'),
        declared=DECLARED,
        says="passwordauthentication of the SSH server is yes, not no",
    ),
    Mutation(
        check="sec.sshd",
        name="root may log in with a key",
        prelude=planted(config='{"permitrootlogin": "prohibit-password"}'),
        declared=DECLARED,
        says="permitrootlogin of the SSH server is prohibit-password",
    ),
    Mutation(
        check="sec.sshd",
        name="DSA",
        prelude=planted(config='{"pubkeyacceptedalgorithms": "ssh-ed25519,ssh-dss"}'),
        declared=DECLARED,
        says="too weak: ssh-dss",
    ),
    Mutation(
        check="sec.sshd",
        name="host keys that the installation of openssh-server made",
        prelude=planted()
        + """
import glob
real = glob.glob
glob.glob = lambda pattern: ["/etc/ssh/ssh_host_rsa_key"] if pattern == "/etc/ssh/ssh_host_*" else []
lstat = os.lstat
os.lstat = lambda path, *a, **k: lstat("/" if path == "/etc/ssh/ssh_host_rsa_key" else path, *a, **k)
""",
        declared=DECLARED,
        says="the image holds keys of SSH: /etc/ssh/ssh_host_rsa_key",
    ),
]
