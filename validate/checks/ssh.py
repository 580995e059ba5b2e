"""Whether the image's SSH server lets in who has the key, and nobody else: T1, of images that run one."""

from __future__ import annotations

import base64
import contextlib
import glob
import hashlib
import json
import os
import pwd
import shlex
import shutil
import socket
import subprocess
import threading
import time
from dataclasses import dataclass, replace
from typing import Mapping, Optional, Sequence, Tuple

from validate.check import Probe, check
from validate.verdict import Skip

PROGRAM = "torchyard-ssh"
_START_S, _CLIENT_S, _END_S = 60.0, 60.0, 8.0


def _require_program(probe: Probe) -> None:
    if probe.declared.get("program") != "ssh":
        probe.skip(Skip.NOT_THIS_KIND, "the image runs no SSH server")
    for tool in (PROGRAM, "ssh", "ssh-keygen"):
        if shutil.which(tool) is None:
            probe.stop(f"{tool} is not in PATH", why="the image declares that it runs an SSH server")


# ----------------------------------------------------------------------------------------------------
# Who is let in, and what they find

_MARK, _MARK_VALUE = "TORCHYARD_PROBE", "a \"b\" 'c' \\d #e $HOME %h"
"""A variable that somebody gives the container, of all that could be mistaken on its way into a session."""
_SECRET = "TORCHYARD_PROBE_TOKEN"  # noqa: S105
_PASSED_ON = ("CUDA_", "HF_", "LD_LIBRARY_PATH", "NVIDIA_", "TORCH_")
_OWN = ("HOME", "LOGNAME", "SHELL", "USER")
"""Variables of a session that are not the image's to set."""
_TELL = "import json, os, sys; print(json.dumps([sys.executable, dict(os.environ)]))"


@dataclass(frozen=True)
class Session:
    """What a program in an SSH session sees."""

    executable: str
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Seen:
    """What clients made of two servers, each started for the first time."""

    methods: Tuple[str, ...] = ()
    """By which a client may show who it is."""
    refusal: str = ""
    """What a client said whose key is the right one; empty if it was let in."""
    session: Optional[Session] = None
    login_python: str = ""
    """The python that a login shell finds."""
    stranger: bool = False
    """Whether a client with another key was let in."""
    sftp: str = ""
    """What is wrong with file transfer; empty if it answers."""
    host_keys: Tuple[str, ...] = ()
    """Fingerprints, one of each server."""
    ends: Tuple[str, ...] = ()
    """What was wrong with the end of each that did not end as it should."""


@check("svc.sshd", title="SSH lets in who has the key, and nobody else", tier=1)
def service(probe: Probe) -> None:
    """Start the image's server twice, as in two containers, and log in with the key, with another, with none."""
    _require_program(probe)
    seen = _observe(probe)
    probe.saw(methods=list(seen.methods), host_keys=list(seen.host_keys))
    judge_service(probe, seen, os.environ)
    probe.detail(f"offers {', '.join(seen.methods) or 'nothing'}; host keys of two starts: {' '.join(seen.host_keys)}")


def judge_service(probe: Probe, seen: Seen, environment: Mapping[str, str]) -> None:
    """Judge what clients saw of servers that were started in `environment`."""
    others = [method for method in seen.methods if method != "publickey"]
    if others:
        probe.fail(f"the SSH server offers {', '.join(others)}", why="whoever guesses a password is in")
    if seen.stranger:
        probe.fail("a key that was not given opens the SSH server")
    if seen.refusal or seen.session is None:
        probe.fail("the SSH server refuses the key that it was given", why=seen.refusal)
    else:
        _judge_session(probe, seen.session, environment)
        _judge_python(probe, seen.session.executable, seen.login_python)
    if seen.sftp:
        probe.fail("the SSH server transfers no files by SFTP", why=seen.sftp)
    if len(set(seen.host_keys)) < len(seen.host_keys):
        probe.fail(
            "two SSH servers have the same host key",
            why="whoever has the image can pretend to be any container of it",
            remedy=f"leave host keys out of the image: {PROGRAM} makes one at its first start",
        )
    for end in seen.ends:
        probe.fail("the SSH server does not end as it should", why=end)


def _judge_session(probe: Probe, session: Session, environment: Mapping[str, str]) -> None:
    """Judge whether a session has the variables that the container has."""
    declared = probe.declared["config"]["env"]
    expected = {
        name: value
        for name, value in environment.items()
        if name not in _OWN and (name in declared or name.startswith(_PASSED_ON))
    }
    expected[_MARK] = _MARK_VALUE
    wrong = [name for name, value in sorted(expected.items()) if session.environment.get(name) != value]
    if wrong:
        probe.fail(
            f"variables of the container are not those of an SSH session: {', '.join(wrong)}",
            why=f"there {wrong[0]} is {session.environment.get(wrong[0])!r}, not {expected[wrong[0]]!r}",
        )
    leaked = [name for name in (_SECRET, "SSH_AUTHORIZED_KEYS") if name in session.environment]
    if leaked:
        probe.fail(f"SSH sessions have variables that should stay out of them: {', '.join(leaked)}")


def _judge_python(probe: Probe, executable: str, login_python: str) -> None:
    home = f"{probe.declared['prefix']}/bin"
    if os.path.dirname(executable) != home:  # noqa: PTH120
        probe.fail(f"an SSH session finds {executable}, not the python of {home}")
    elif os.path.dirname(login_python) != home:  # noqa: PTH120
        probe.fail(
            f"a login shell finds {login_python or 'no python'}, not the one of {home}",
            why="/etc/profile of Debian sets PATH anew",
            remedy=f"put {home} into PATH again, in a file of /etc/profile.d",
        )


def _observe(probe: Probe) -> Seen:
    """Start two servers, be their clients, and end them."""
    place = probe.request.scratch
    client = _Client(place, _account(place))
    key, other = client.new_key("right"), client.new_key("wrong")
    servers = [_Server(f"{place}/{name}", f"{key}.pub") for name in ("one", "two")]
    try:
        for server in servers:
            if trouble := server.trouble():
                probe.stop(f"{PROGRAM} does not start", why=trouble)
        first, second = servers
        told = client.run(first, key, f"python -c {shlex.quote(_TELL)}")
        also = client.run(second, key, "true")
        seen = Seen(
            methods=client.methods(first),
            refusal=told.trouble or also.trouble,
            session=None if told.trouble else _session(told.out),
            login_python=client.run(first, key, "bash -lc 'command -v python'").out.strip(),
            stranger=client.run(first, other, "true").code == 0,
            sftp=client.sftp(first, key),
            host_keys=tuple(client.host_key(server) for server in servers),
        )
    finally:
        ends = [server.end() for server in servers]
    return replace(seen, ends=tuple(end for end in ends if end))


def _session(told: str) -> Session:
    """Return what Python told in a session, after whatever a shell may have printed before."""
    with contextlib.suppress(ValueError):
        return Session(*json.loads(told.strip().rpartition("\n")[2]))
    return Session(f"what prints {told[-200:]!r}", {})


# ----------------------------------------------------------------------------------------------------
# Servers and clients

_USER = "torch"
"""Whom the program lets in where the user has no entry in /etc/passwd."""
_SFTP_INIT = b"\x00\x00\x00\x05\x01\x00\x00\x00\x03"
"""Length, type 1, version 3: draft-ietf-secsh-filexfer-02, section 4. The answer is of type 2."""


@dataclass(frozen=True)
class _Ran:
    code: int
    out: str
    err: str

    @property
    def trouble(self) -> str:
        """The end of what was said, if it failed."""
        return "" if self.code == 0 else self.err.strip()[-400:] or f"it ended with {self.code}"


def _account(place: str) -> Mapping[str, str]:
    """Return variables with which OpenSSH's client works for a user whom /etc/passwd does not know."""
    with contextlib.suppress(KeyError):
        pwd.getpwuid(os.getuid())
        return {}
    known = f"{place}/passwd"
    with open(known, "w", encoding="utf-8") as file:  # noqa: PTH123
        file.write(f"{_USER}:x:{os.getuid()}:{os.getgid()}::{place}:/bin/sh\n")
    return {"LD_PRELOAD": "libnss_wrapper.so", "NSS_WRAPPER_PASSWD": known, "NSS_WRAPPER_GROUP": "/etc/group"}


class _Server:
    """The image's program, listening on a free port of the loopback interface, with a home of its own."""

    def __init__(self, home: str, public_key: str) -> None:
        os.makedirs(home)  # noqa: PTH103
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        with open(public_key, encoding="ascii") as file:  # noqa: PTH123
            given = file.read()
        self._log = f"{home}/log"
        with open(self._log, "wb") as log:  # noqa: PTH123
            self._process = subprocess.Popen(
                [PROGRAM],
                env={
                    **os.environ,
                    "HOME": home,
                    "SSH_ADDRESS": "127.0.0.1",
                    "SSH_AUTHORIZED_KEYS": given,
                    "SSH_PORT": str(self.port),
                    _MARK: _MARK_VALUE,
                    _SECRET: "not for sessions",
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def trouble(self) -> str:
        """Wait until it answers, and return what keeps it from that; empty if nothing does."""
        end = time.monotonic() + _START_S
        while time.monotonic() < end:
            if self._process.poll() is not None:
                return f"it ended with {self._process.returncode}: {self._said()}"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1) as made:
                if made.recv(8) == b"SSH-2.0-":
                    return ""
            time.sleep(0.1)
        return f"it does not answer after {_START_S:.0f} s: {self._said()}"

    def end(self) -> str:
        """End it as an engine does, and return what is wrong with that; empty if nothing is."""
        if self._process.poll() is not None:
            return ""
        self._process.terminate()
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return f"it goes on {_END_S:.0f} s after SIGTERM"
        return "" if code == 0 else f"after SIGTERM it ends with {code}: {self._said()}"

    def _said(self) -> str:
        with open(self._log, encoding="utf-8", errors="replace") as log:  # noqa: PTH123
            return log.read().strip()[-400:]


class _Client:
    """OpenSSH's client, without any configuration of the machine's or the user's."""

    def __init__(self, place: str, account: Mapping[str, str]) -> None:
        self._place = place
        self._environment = {**os.environ, "LC_ALL": "C", **account}
        self._user = _USER if account else pwd.getpwuid(os.getuid()).pw_name

    def new_key(self, name: str) -> str:
        """Make a pair of keys, and return the path of the private one."""
        path = f"{self._place}/{name}"
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", path]
        subprocess.run(command, env=self._environment, check=True, capture_output=True, stdin=subprocess.DEVNULL)
        return path

    def run(self, server: _Server, key: str, command: str) -> _Ran:
        """Run a command in a session."""
        return self._ssh(server, "-i", key, word=command)

    def methods(self, server: _Server) -> Tuple[str, ...]:
        """Return the methods of authentication that are offered to a client which has nothing to show."""
        said = self._ssh(server, "-v", "-o", "PreferredAuthentications=none", word="true").err
        lines = [line.rpartition(": ")[2] for line in said.splitlines() if "Authentications that can continue" in line]
        return tuple(lines[0].strip().split(",")) if lines else ()

    def sftp(self, server: _Server, key: str) -> str:
        """Return what is wrong with file transfer; empty if the protocol's first message is answered."""
        with subprocess.Popen(
            self._command(server, "-i", key, "-s", word="sftp"),
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            late = threading.Timer(_CLIENT_S, process.kill)
            late.start()
            try:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(_SFTP_INIT)
                    process.stdin.flush()
                # The connection stays open meanwhile: the server would go with it before it has answered.
                answer = process.stdout.read(5)
            finally:
                late.cancel()
                process.kill()
        return "" if answer[4:] == b"\x02" else f"the protocol's first message is answered with {answer!r}"

    def host_key(self, server: _Server) -> str:
        """Return the fingerprint that a client has kept of the server's key, as OpenSSH shows it."""
        with open(self._known(server), encoding="ascii") as file:  # noqa: PTH123
            blob = base64.b64decode(file.readline().split()[2])
        return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")

    def _known(self, server: _Server) -> str:
        return f"{self._place}/known-{server.port}"

    def _command(self, server: _Server, *options: str, word: str) -> Sequence[str]:
        settings = (
            "BatchMode=yes",
            "IdentitiesOnly=yes",
            "IdentityAgent=none",
            "StrictHostKeyChecking=accept-new",
            f"UserKnownHostsFile={self._known(server)}",
            "GlobalKnownHostsFile=/dev/null",
        )
        command = ["ssh", "-F", "none", "-p", str(server.port), *options]
        command += [part for setting in settings for part in ("-o", setting)]
        return [*command, f"{self._user}@127.0.0.1", word]

    def _ssh(self, server: _Server, *options: str, word: str) -> _Ran:
        try:
            done = subprocess.run(
                self._command(server, *options, word=word),
                env=self._environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_CLIENT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return _Ran(124, "", f"ssh did not end within {_CLIENT_S:.0f} s")
        return _Ran(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))


# ----------------------------------------------------------------------------------------------------
# How it is configured, and what must not be in the image

_DEMANDED: Mapping[str, str] = {
    "authenticationmethods": "publickey",
    "pubkeyauthentication": "yes",
    "passwordauthentication": "no",
    "kbdinteractiveauthentication": "no",
    "hostbasedauthentication": "no",
    "gssapiauthentication": "no",
    "permitemptypasswords": "no",
    "permitrootlogin": "no",
    "permituserenvironment": "no",
    "permittunnel": "no",
    "allowagentforwarding": "no",
    "allowtcpforwarding": "no",
    "gatewayports": "no",
    "x11forwarding": "no",
}
"""What sshd makes of the configuration that the program writes, for a user who asks for nothing."""
_OPTIONAL = ("gssapiauthentication",)
"""What an sshd may have been compiled without."""
_ALGORITHMS = ("ciphers", "macs", "kexalgorithms", "hostkeyalgorithms", "pubkeyacceptedalgorithms")
_WEAK = ("ssh-dss", "-cbc", "arcfour", "hmac-md5", "hmac-sha1", "diffie-hellman-group1-", "-group-exchange-sha1")
"""Parts of the names of algorithms: DSA, and what rests on MD5, SHA-1, RC4 or small groups."""
_BAKED = (
    "/etc/dropbear/dropbear_*_host_key",
    "/etc/skel/.ssh/*",
    "/etc/ssh/authorized_keys*",
    "/etc/ssh/ssh_host_*",
    "/home/*/.local/share/torchyard/ssh/*",
    "/home/*/.ssh/*",
    "/root/.ssh/*",
)
"""Keys of hosts and of users."""


@check("sec.sshd", title="the SSH server takes keys only, and the image holds none", tier=1)
def configuration(probe: Probe) -> None:
    """Read the effective configuration, and look for keys that every container of the image would share."""
    _require_program(probe)
    place = probe.request.scratch
    key = _Client(place, _account(place)).new_key("any")
    given = {name: value for name, value in os.environ.items() if not name.startswith("SSH_")}
    with open(f"{key}.pub", encoding="ascii") as file:  # noqa: PTH123
        given.update(HOME=place, SSH_AUTHORIZED_KEYS=file.read())
    done = subprocess.run(
        [PROGRAM, "--check"], env=given, capture_output=True, text=True, timeout=_START_S, check=False
    )
    if done.returncode != 0:
        probe.stop(f"{PROGRAM} --check ends with {done.returncode}", why=done.stderr.strip()[-400:])
    values = dict(line.partition(" ")[::2] for line in done.stdout.splitlines())
    baked = sorted(path for pattern in _BAKED for path in glob.glob(pattern) if not _is_mounted(path))  # noqa: PTH207
    probe.saw(configuration={name: values[name] for name in (*_DEMANDED, *_ALGORITHMS) if name in values}, keys=baked)
    judge_configuration(probe, values)
    judge_keys(probe, baked)
    probe.detail(f"{len(_DEMANDED)} settings and {len(_ALGORITHMS)} lists of algorithms, no key in the image")


def _is_mounted(path: str) -> bool:
    """Tell whether a file lies on another file system than the image's: somebody gave it to this container."""
    return os.lstat(path).st_dev != os.lstat("/").st_dev


def judge_configuration(probe: Probe, values: Mapping[str, str]) -> None:
    """Judge sshd's effective configuration, as `sshd -T` prints it."""
    for name, demanded in _DEMANDED.items():
        value = values.get(name, "missing")
        if value != demanded and not (name in _OPTIONAL and name not in values):
            probe.fail(f"{name} of the SSH server is {value}, not {demanded}")
    for name in _ALGORITHMS:
        algorithms = values.get(name, "").split(",")
        weak = [it for it in algorithms if it == "ssh-rsa" or any(part in it for part in _WEAK)]
        if weak:
            probe.fail(f"{name} of the SSH server are too weak: {', '.join(weak)}")


def judge_keys(probe: Probe, baked: Sequence[str]) -> None:
    """Judge the files of the image that hold keys of hosts or users."""
    if baked:
        probe.fail(
            f"the image holds keys of SSH: {', '.join(baked)}",
            why="all containers of the image share them, and whoever has the image has them",
            remedy=f"remove them in the step of the build that makes them; {PROGRAM} makes a host key at its first "
            "start. If a server has run in this container before: validate the image instead",
        )
