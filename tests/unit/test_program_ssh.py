"""torchyard-ssh: which keys and settings it takes, what it gives to sshd; with a stand-in for sshd."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from builder.render import programs_of, templates_of
from builder.schema import Variant
from tests.support.cells import cell

ROOT = Path(__file__).parents[2]
REFUSED = 2
# Writes down what it was started with, as the last thing its environment; {body} is what it does then.
SSHD = """#!/bin/bash
cp -r "$(dirname "${@: -1}")" {seen}/private
umask >{seen}/umask
grep SigIgn: /proc/$$/status >{seen}/ignored
printf '%s\\n' "$@" >{seen}/arguments
env -0 >{seen}/part && mv {seen}/part {seen}/environment
[ "$1" != -T ] || { echo effective; exit; }
{body}
"""
WAIT = "trap 'exit 0' TERM; while :; do sleep 0.05; done"
# Knows no user but {account}, unless libnss_wrapper would show another file.
GETENT = """#!/bin/bash
case $1 in
    group) printf '%s' {tty} ;;
    *)
        if {wrapper} && [ -n "${{NSS_WRAPPER_PASSWD-}}" ]; then exec grep ":$2:" "$NSS_WRAPPER_PASSWD"; fi
        [ -z {account} ] || exec echo {account}
        ;;
esac
exit 2
"""


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    said: str

    @property
    def refusal(self) -> str:
        """The one line that says why nothing was started."""
        assert self.code == REFUSED, self
        assert self.out == ""
        lines = self.said.splitlines()
        assert all(line.startswith("torchyard-ssh: ") for line in lines), self.said
        return lines[-1].removeprefix("torchyard-ssh: ")


def terminals() -> str:
    """Return an entry of the group that this machine gives to terminals; empty if it gives them to none."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        if (place, kind) == ("/dev/pts", "devpts"):
            for option in options.split(","):
                if option.startswith("gid="):
                    return f"tty:x:{option.removeprefix('gid=')}:"
    return ""


@dataclass
class Container:
    """What the program finds: a home, programs, an environment."""

    root: Path
    uid: int = 1000
    account: str = "torch:x:1000:0::/home/torch:/bin/bash"
    tty: str = field(default_factory=terminals)
    wrapper: bool = True
    body: str = WAIT
    env: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def seen(self) -> Path:
        """Where sshd leaves what it saw."""
        return self.root / "seen"

    @property
    def kept(self) -> Path:
        return self.home / ".local/share/torchyard/ssh"

    @property
    def secret(self) -> Path:
        return self.root / "run/secrets/authorized_keys"

    @property
    def config(self) -> str:
        return (self.seen / "private/sshd_config").read_text()

    @property
    def keys(self) -> str:
        return (self.seen / "private/authorized_keys").read_text()

    @property
    def session(self) -> Mapping[str, str]:
        """The variables of a session; in double quotes sshd takes backslashes as Python's shlex does."""
        (line,) = [line for line in self.config.splitlines() if line.startswith("SetEnv ")]
        found: dict[str, str] = {}
        for word in shlex.split(line)[1:]:
            name, _, value = word.partition("=")
            found.setdefault(name, value)
        return found

    def plant(self, name: str, source: str) -> Path:
        path = self.root / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
        path.chmod(0o755)
        return path

    def file(self, path: Path, content: str | bytes) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def prepare(self) -> Path:
        for directory in (self.home, self.seen, self.root / "tmp"):
            directory.mkdir(exist_ok=True)
        self.plant("id", f'#!/bin/sh\n[ "$1" = -g ] && echo 0 || echo {self.uid}\n')
        self.plant(
            "getent",
            GETENT.format(
                tty=shlex.quote(self.tty), account=shlex.quote(self.account), wrapper=str(self.wrapper).lower()
            ),
        )
        sshd = SSHD.replace("{seen}", str(self.seen)).replace("{body}", self.body)
        values: Mapping[str, object] = {"home": str(self.home), "secret": str(self.secret)}
        return self.plant("torchyard-ssh", program(sshd=str(self.plant("sshd", sshd)), **values))

    def environment(self, **env: str) -> dict[str, str]:
        return {
            "PATH": f"{self.root}/bin:{os.environ['PATH']}",
            "HOME": str(self.home),
            "TMPDIR": str(self.root / "tmp"),
            **self.env,
            **env,
        }

    def run(self, *arguments: str, user: int | None = None, **env: str) -> Ran:
        done = subprocess.run(
            [str(self.prepare()), *arguments],
            env=self.environment(**env),
            user=user,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    @contextlib.contextmanager
    def started(self, **env: str) -> Iterator[subprocess.Popen[str]]:
        """Start it, and wait until it has started sshd."""
        shutil.rmtree(self.seen, ignore_errors=True)
        with subprocess.Popen(
            [str(self.prepare())], env=self.environment(**env), stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                end = time.monotonic() + 20
                while not (self.seen / "environment").exists():
                    assert process.poll() is None, process.stderr and process.stderr.read()
                    assert time.monotonic() < end
                    time.sleep(0.02)
                yield process
            finally:
                process.terminate()

    def served(self, **env: str) -> str:
        """Start it, end it, and return what it said."""
        with self.started(**env) as process:
            process.terminate()
            assert process.stderr is not None
            said = process.stderr.read()
        assert process.returncode == 0, said
        return said


@functools.cache
def program(**values: object) -> str:
    ssh = replace(cell(), variant=Variant(description="a test", program="ssh", port=2222))
    made = programs_of(
        ssh,
        templates=templates_of(ROOT),
        config=SimpleNamespace(cmd=("torchyard-ssh",)),
        driver=None,
        prefix="/opt/venv",
        image_json="/image.json",
        **values,
    )
    return made["torchyard-ssh"].decode()


@functools.cache
def key(kind: str = "ed25519", *options: str, comment: str = "me@laptop") -> tuple[str, str]:
    """Return a public key and its private one."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "key")
        command = ["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", comment, *options, "-f", str(path)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        return path.with_suffix(".pub").read_text().strip(), path.read_text()


PUBLIC, PRIVATE = key()


def certificate() -> str:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "key")
        for content, name in ((PRIVATE, "key"), (PUBLIC, "key.pub")):
            Path(place, name).write_text(content)
        path.chmod(0o600)
        subprocess.run(["ssh-keygen", "-q", "-s", str(path), "-I", "me", str(path) + ".pub"], check=True)
        return Path(place, "key-cert.pub").read_text().strip()


@pytest.fixture
def container(tmp_path: Path) -> Container:
    return Container(root=tmp_path)


# --------------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("given", "number", "says"),
    [
        ("hello", 1, "this is no public key"),
        (PUBLIC[:40], 1, "this is no public key"),
        ("~/.ssh/id_ed25519.pub", 1, "this is no public key"),
        (f"{PUBLIC}\n\n# two\n{PUBLIC.replace('AAAA', 'AAAB')}", 4, "this is no public key"),
        (f"{PUBLIC}\nssh-dss AAAAB3NzaC1kc3MAAACBAMb1", 2, "DSA is too weak"),
        (key("rsa", "-b", "1024")[0], 1, "RSA with 1024 bits is too weak"),
        (certificate(), 1, "this is a certificate"),
        (PRIVATE, 1, "this is a PRIVATE key"),
        (f"{PUBLIC}\n{PRIVATE}", 2, "this is a PRIVATE key"),
        (PRIVATE.splitlines()[1], 1, "this is a PRIVATE key"),
        (" ".join(PRIVATE.splitlines()), 1, "this is a PRIVATE key"),
        (key("rsa", "-m", "PEM")[1], 1, "this is a PRIVATE key"),
        ("PuTTY-User-Key-File-3: ssh-ed25519\nEncryption: none", 1, "this is a PRIVATE key"),
        ("---- BEGIN SSH2 PUBLIC KEY ----\nAAAA", 1, "ssh-keygen -i -f"),
        (f"{PUBLIC} {PUBLIC}", 1, "there are two keys"),
        (f"{PUBLIC}\\n{PUBLIC}", 1, "there are two keys"),
    ],
    ids=[
        "a word",
        "cut off",
        "a path",
        "the fourth line",
        "DSA",
        "a short RSA key",
        "a certificate",
        "a private key",
        "both halves of a pair",
        "a private key without its first line",
        "a private key in one line",
        "PEM",
        "PuTTY",
        "RFC 4716",
        "two in one line",
        "two with an escaped end of line",
    ],
)
def test_what_is_no_good_key_is_told_by_its_line_and_not_shown(
    container: Container, given: str, number: int, says: str
) -> None:
    refusal = container.run(SSH_AUTHORIZED_KEYS=given).refusal
    assert refusal.startswith(f"SSH_AUTHORIZED_KEYS, line {number}: ")
    assert says in refusal
    container.file(container.secret, given)
    assert container.run().refusal == refusal.replace("SSH_AUTHORIZED_KEYS", str(container.secret))
    for word in {word for word in given.split() if len(word) > 20}:
        assert word not in refusal
    assert not (container.seen / "arguments").exists()
    assert list((container.root / "tmp").iterdir()) == []


@pytest.mark.parametrize("given", ["", "\n\n", "# a comment\n", " \t \r\n"])
def test_no_key_among_the_lines_is_refused(container: Container, given: str) -> None:
    assert container.run(SSH_AUTHORIZED_KEYS=given).refusal.startswith("SSH_AUTHORIZED_KEYS has no key")
    container.file(container.secret, given)
    assert container.run().refusal.startswith(f"{container.secret} has no key")


def test_no_keys_at_all_are_refused_with_the_places_for_them(container: Container) -> None:
    refusal = container.run().refusal
    for place in ("SSH_AUTHORIZED_KEYS", container.secret, container.home / ".ssh/authorized_keys"):
        assert str(place) in refusal


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (PUBLIC, [PUBLIC]),
        (f"\ufeff{PUBLIC}\r\n", [PUBLIC]),
        (f"# mine\n\n  {PUBLIC}\n\t{PUBLIC}\n", [PUBLIC, PUBLIC]),
        (f'from="10.0.0.0/8",no-pty {PUBLIC}\n', [f'from="10.0.0.0/8",no-pty {PUBLIC}']),
        (PUBLIC.replace("me@laptop", "jos\u00e9's -----"), [PUBLIC.replace("me@laptop", "jos\u00e9's -----")]),
        (key("ecdsa")[0], [key("ecdsa")[0]]),
        (key("rsa", "-b", "2048")[0], [key("rsa", "-b", "2048")[0]]),
    ],
    ids=["no end of line", "from Windows", "comments", "options", "any comment", "ECDSA", "RSA"],
)
def test_good_keys_reach_sshd(container: Container, given: str, read: Sequence[str]) -> None:
    assert f"keys: {len(read)} from SSH_AUTHORIZED_KEYS" in container.served(SSH_AUTHORIZED_KEYS=given)
    assert container.keys.splitlines() == read
    container.file(container.secret, given)
    container.served()
    assert container.keys.splitlines() == read


def test_one_source_is_read_and_the_others_are_named(container: Container) -> None:
    home = container.file(container.home / ".ssh/authorized_keys", key("ecdsa")[0])
    assert f"keys: 1 from {home}" in container.served()
    assert container.keys.strip() == key("ecdsa")[0]
    container.file(container.secret, f"{PUBLIC}\n{PUBLIC}")
    said = container.served()
    assert f"not read, since the keys come from {container.secret}: {home}" in said
    assert f"keys: 2 from {container.secret}" in said
    said = container.served(SSH_AUTHORIZED_KEYS=PUBLIC)
    assert f"not read, since the keys come from SSH_AUTHORIZED_KEYS: {container.secret} {home}" in said
    assert container.keys.strip() == PUBLIC


def test_a_file_may_be_a_link_and_only_readable(container: Container) -> None:
    real = container.file(container.root / "volume/..data/authorized_keys", PUBLIC)
    real.chmod(0o444)
    container.secret.parent.mkdir(parents=True)
    container.secret.symlink_to(real)
    container.served()
    assert container.keys.strip() == PUBLIC
    assert stat.S_IMODE((container.seen / "private/authorized_keys").stat().st_mode) == 0o600


def test_what_is_no_file_of_keys_is_told(container: Container) -> None:
    container.secret.parent.mkdir(parents=True)
    container.secret.symlink_to("nowhere")
    assert container.run().refusal == f"{container.secret} is a link to nowhere"
    container.secret.unlink()
    container.secret.mkdir()
    assert "is a directory: was there no such file to mount" in container.run().refusal
    container.secret.rmdir()
    os.mkfifo(container.secret)
    assert container.run().refusal == f"{container.secret} is not an ordinary file"
    container.secret.unlink()
    container.file(container.secret, f"{PUBLIC}\n" * 1000)
    assert "more than 64 KiB" in container.run().refusal
    container.file(container.secret, PUBLIC.encode("utf-16"))
    assert "is not plain text" in container.run().refusal


def test_an_unreadable_file_is_told_with_its_mode() -> None:
    with tempfile.TemporaryDirectory() as place:  # pytest's own are only for the user who runs it
        Path(place).chmod(0o755)
        container = Container(root=Path(place), uid=65534)
        container.file(container.secret, PUBLIC).chmod(0o600 if os.geteuid() == 0 else 0)
        container.prepare()
        (container.root / "tmp").chmod(0o777)
        refusal = container.run(user=65534 if os.geteuid() == 0 else None).refusal
        mode = "600" if os.geteuid() == 0 else "0"
        assert f"cannot be read by uid 65534: its mode is {mode}, its owner" in refusal


# --------------------------------------------------------------------------- the host's key


def fingerprint(path: Path) -> str:
    told = subprocess.run(["ssh-keygen", "-l", "-f", str(path)], capture_output=True, text=True, check=True)
    return told.stdout.split()[1]


def test_a_host_key_is_made_once_and_kept(container: Container, tmp_path: Path) -> None:
    container.env = {"SSH_AUTHORIZED_KEYS": PUBLIC}
    said = container.served()
    (made,) = container.kept.iterdir()
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    assert stat.S_IMODE(container.kept.stat().st_mode) == 0o700
    assert f"host key {fingerprint(made)} (ED25519)" in said
    content = made.read_text()
    assert container.served() == said
    assert made.read_text() == content == (container.seen / "private/host_key").read_text()
    other = Container(root=tmp_path / "other", env=container.env)
    other.root.mkdir()
    other.served()
    assert (other.kept / made.name).read_text() != content


def test_the_directories_above_the_key_are_for_group_0(container: Container) -> None:
    container.served(SSH_AUTHORIZED_KEYS=PUBLIC)
    assert stat.S_IMODE(container.kept.parent.stat().st_mode) == 0o775


def test_a_volume_may_have_given_the_host_key_to_a_group(container: Container) -> None:
    container.env = {"SSH_AUTHORIZED_KEYS": PUBLIC}
    container.served()
    (made,) = container.kept.iterdir()
    container.kept.chmod(0o2770)
    made.chmod(0o660)
    container.served()
    copy = container.seen / "private/host_key"
    assert (copy.read_text(), stat.S_IMODE(copy.stat().st_mode)) == (made.read_text(), 0o600)


@pytest.mark.parametrize("content", ["", "no key", PUBLIC], ids=["empty", "text", "the public half"])
def test_a_damaged_host_key_is_refused(container: Container, content: str) -> None:
    path = container.file(container.kept / "ssh_host_ed25519_key", content)
    refusal = container.run(SSH_AUTHORIZED_KEYS=PUBLIC).refusal
    assert refusal == f"the host key {path} is damaged, or has a passphrase: remove it, and a new one is made"


@pytest.mark.parametrize("kind", ["file", "link"])
def test_where_no_host_key_can_be_kept_one_is_made_for_this_start(container: Container, kind: str) -> None:
    if kind == "file":
        container.file(container.home / ".local", "")
    else:
        container.kept.parent.mkdir(parents=True)
        container.kept.symlink_to(container.root)
    said = container.served(SSH_AUTHORIZED_KEYS=PUBLIC)
    assert f"this host key lasts as long as the container: none can be kept in {container.kept}, " in said
    assert f"host key {fingerprint(container.seen / 'private/host_key')}" in said


def test_a_host_key_that_cannot_be_made_is_told(container: Container) -> None:
    container.plant(
        "ssh-keygen",
        f'#!/bin/sh\n[ "$1" != -q ] || {{ echo No space left >&2; exit 1; }}\nexec {shutil.which("ssh-keygen")} "$@"\n',
    )
    refusal = container.run(SSH_AUTHORIZED_KEYS=PUBLIC).refusal
    assert refusal == f"no host key can be made in {container.kept}: No space left"
    assert list(container.kept.iterdir()) == []


# --------------------------------------------------------------------------- sessions


def test_a_session_has_the_variables_of_the_container(container: Container) -> None:
    tricky = {
        "SPACES": "a  b ",
        "QUOTES": """it's "quoted" \\" \\' """,
        "BACKSLASHES": "\\ \\\\ \\n C:\\dir\\",
        "HASH": "# no comment",
        "PERCENTS": "%h %% %u",
        "SHELL_CODE": "$HOME `id` $(id); *",
        "EMPTY": "",
        "UNICODE": "\u00e9\u4e2d",
        "LANG": "C.UTF-8",
        "LC_ALL": "C.UTF-8",
        "LD_LIBRARY_PATH": "/usr/local/nvidia/lib64",
        "NVIDIA_VISIBLE_DEVICES": "all",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_HOME": "/cache/torch",
        "HTTP_PROXY": "http://proxy:3128/x@y",
    }
    container.served(SSH_AUTHORIZED_KEYS=PUBLIC, **tricky)
    expected = {"HOME": str(container.home), "TMPDIR": f"{container.root}/tmp", **tricky}
    assert container.session == {"PATH": f"{container.root}/bin:{os.environ['PATH']}", **expected}


def test_what_is_called_like_a_secret_is_kept_out(container: Container) -> None:
    names = [
        "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "DB_PASS", "GH_PAT", "GOOGLE_APPLICATION_CREDENTIALS", "HF_TOKEN",
        "HTTP_AUTH", "HUGGINGFACEHUB_API_TOKEN", "JUPYTERTOKEN", "MYSQL_PWD", "MY_PASSWORD", "OPENAI_APIKEY",
        "PGPASSWORD", "WANDB_API_KEY", "hf_token",
    ]  # fmt: skip
    said = container.served(SSH_AUTHORIZED_KEYS=PUBLIC, **dict.fromkeys(names, "hush"))
    (line,) = [line for line in said.splitlines() if "for they look like secrets: " in line]
    assert sorted(line.partition("secrets: ")[2].split()) == sorted(names)
    assert not set(names) & set(container.session)
    assert "hush" not in said + container.config


@pytest.mark.parametrize("value", ["postgres://me:hush@host/db", "x -----BEGIN OPENSSH PRIVATE KEY----- hush"])
def test_what_looks_like_a_secret_is_kept_out(container: Container, value: str) -> None:
    said = container.served(SSH_AUTHORIZED_KEYS=PUBLIC, PLAIN=value)
    assert "look like secrets: PLAIN\n" in said
    assert "hush" not in said + container.config


def test_what_cannot_be_said_in_one_line_is_kept_out(container: Container) -> None:
    large = {f"LARGE_{number}": "x" * 60_000 for number in range(4)}
    said = container.served(SSH_AUTHORIZED_KEYS=PUBLIC, LINES="a\nForceCommand reboot", **large)
    (line,) = [line for line in said.splitlines() if "too long or of several lines" in line]
    assert "LINES" in line.split()
    assert "reboot" not in container.config
    assert len(container.config) < 200_000


def test_what_belongs_to_the_program_or_to_a_session_is_kept_out(container: Container) -> None:
    odd = {"TERM": "dumb", "USER": "x", "SHELL": "/bin/sh", "SSH_CLIENT": "1", "BASH_FUNC_f%%": "() { :; }", "a.b": "c"}
    said = container.served(SSH_AUTHORIZED_KEYS=PUBLIC, SSH_PORT="2200", **odd)
    assert "not in sessions" not in said
    assert set(container.session) == {"PATH", "HOME", "TMPDIR"}


def test_sshd_itself_gets_nothing_of_the_container(container: Container) -> None:
    container.served(SSH_AUTHORIZED_KEYS=PUBLIC, HF_TOKEN="hush")
    names = {line.partition("=")[0] for line in (container.seen / "environment").read_text().split("\0")}
    assert names - {"", "PATH", "PWD", "SHLVL", "_", "OLDPWD"} <= {"LC_CTYPE"}
    assert PUBLIC not in (container.seen / "arguments").read_text()


def test_sessions_begin_with_the_container_s_umask_and_heed_ctrl_c(container: Container) -> None:
    container.served(SSH_AUTHORIZED_KEYS=PUBLIC)
    assert (container.seen / "umask").read_text() == f"{_umask():04o}\n"
    ignored = int((container.seen / "ignored").read_text().split()[1], 16)
    assert not ignored & (1 << (signal.SIGINT - 1))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --------------------------------------------------------------------------- settings


def settings(container: Container) -> Mapping[str, str]:
    lines = [line for line in container.config.splitlines() if line and not line.startswith(("#", "SetEnv"))]
    assert len({line.partition(" ")[0] for line in lines}) == len(lines)
    return dict(line.split(" ", 1) for line in lines)


def test_keys_are_the_only_way_in(container: Container) -> None:
    container.served(SSH_AUTHORIZED_KEYS=PUBLIC)
    found = settings(container)
    assert (container.seen / "arguments").read_text().split()[:3] == ["-D", "-e", "-f"]
    assert {name: found[name] for name in ("Port", "AllowUsers", "AuthenticationMethods")} == {
        "Port": "2222",
        "AllowUsers": "torch",
        "AuthenticationMethods": "publickey",
    }
    for name in ("PasswordAuthentication", "KbdInteractiveAuthentication", "PermitRootLogin", "PermitEmptyPasswords"):
        assert found[name] == "no"
    for name in ("AllowTcpForwarding", "AllowStreamLocalForwarding", "AllowAgentForwarding", "X11Forwarding"):
        assert found[name] == "no"
    assert "ListenAddress" not in found


@pytest.mark.parametrize(("asked", "set_to"), [("", "no"), ("no", "no"), ("local", "local"), ("all", "yes")])
def test_forwarding_is_an_option(container: Container, asked: str, set_to: str) -> None:
    said = container.served(SSH_AUTHORIZED_KEYS=PUBLIC, SSH_PORT_FORWARDING=asked)
    found = settings(container)
    assert (found["AllowTcpForwarding"], found["AllowStreamLocalForwarding"]) == (set_to, set_to)
    assert f"port forwarding: {asked or 'no'}\n" in said


def test_the_place_to_listen_is_an_option(container: Container) -> None:
    container.served(SSH_AUTHORIZED_KEYS=PUBLIC, SSH_PORT="2022", SSH_ADDRESS="::1")
    assert (settings(container)["Port"], settings(container)["ListenAddress"]) == ("2022", "::1")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("SSH_PORT", value) for value in ("0", "70000", "ssh", "-1", "22 ", "022", "1\nPermitRootLogin yes")),
        *(("SSH_ADDRESS", value) for value in ("a b", "x\ny", '"', "0.0.0.0/0")),
        *(("SSH_PORT_FORWARDING", value) for value in ("yes", "on", "LOCAL")),
    ],
)
def test_settings_that_are_none_are_refused(container: Container, name: str, value: str) -> None:
    container.env = {"SSH_AUTHORIZED_KEYS": PUBLIC, name: value}
    assert container.run().refusal.startswith(f"{name} is ")


@pytest.mark.parametrize("words", [["--help"], ["-D"], ["--check", "--check"], ["--port", "22"]])
def test_unknown_words_are_refused(container: Container, words: Sequence[str]) -> None:
    assert "there are --check and --health" in container.run(*words, SSH_AUTHORIZED_KEYS=PUBLIC).refusal


def test_check_prints_the_effective_configuration(container: Container) -> None:
    ran = container.run("--check", SSH_AUTHORIZED_KEYS=PUBLIC)
    assert (ran.code, ran.out, ran.said) == (0, "effective\n", "")
    assert (container.seen / "arguments").read_text().split()[:2] == ["-T", "-f"]
    assert list((container.root / "tmp").iterdir()) == []
    assert "no public key was given" in container.run("--check").refusal


# --------------------------------------------------------------------------- accounts


def test_root_is_refused(container: Container) -> None:
    container.uid = 0
    assert container.run(SSH_AUTHORIZED_KEYS=PUBLIC).refusal.startswith("it does not run as root")


def test_without_sshd_it_says_what_is_missing(container: Container) -> None:
    script = container.prepare()
    (container.root / "bin/sshd").unlink()
    done = subprocess.run(
        [str(script)],
        env=container.environment(SSH_AUTHORIZED_KEYS=PUBLIC),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "openssh-server" in Ran(done.returncode, done.stdout, done.stderr).refusal


@pytest.mark.parametrize("account", ["", "www-data:x:12345:33::/var/www:/usr/sbin/nologin"])
def test_who_has_no_account_gets_one_for_sshd_and_for_sessions(container: Container, account: str) -> None:
    container.uid, container.account = 12345, account
    assert "user torch, " in container.served(SSH_AUTHORIZED_KEYS=PUBLIC, LD_PRELOAD="libm.so.6")
    (mine,) = [
        line for line in (container.seen / "private/passwd").read_text().splitlines() if line.startswith("torch:")
    ]
    assert mine == f"torch:x:12345:0::{container.home}:/bin/bash"
    given = dict(
        entry.split("=", 1) for entry in (container.seen / "environment").read_text().split("\0") if "=" in entry
    )
    assert given["LD_PRELOAD"] == "libnss_wrapper.so"
    assert container.session["LD_PRELOAD"] == "libnss_wrapper.so:libm.so.6"
    for name in ("NSS_WRAPPER_PASSWD", "NSS_WRAPPER_GROUP"):
        assert container.session[name] == given[name]
    assert not (container.seen / "private/group").read_text().startswith("tty:")


def test_without_libnss_wrapper_nobody_can_be_let_in_who_has_no_account(container: Container) -> None:
    container.uid, container.account, container.wrapper = 12345, "", False
    refusal = container.run(SSH_AUTHORIZED_KEYS=PUBLIC).refusal
    assert "uid 12345 has not (--user 1000:0 has)" in refusal
    assert "libnss-wrapper" in refusal


def test_terminals_of_another_group_are_made_up_for(container: Container) -> None:
    container.tty = "tty:x:77:"
    container.served(SSH_AUTHORIZED_KEYS=PUBLIC)
    groups = [line.partition(":")[0] for line in (container.seen / "private/group").read_text().splitlines()]
    assert "root" in groups
    assert "tty" not in groups


def test_a_home_that_is_none_is_replaced_by_the_image_s(container: Container) -> None:
    container.served(SSH_AUTHORIZED_KEYS=PUBLIC, HOME="/")
    assert container.session["HOME"] == str(container.home)
    assert container.kept.is_dir()


def test_without_a_place_for_files_it_says_so(container: Container) -> None:
    container.plant("mktemp", "#!/bin/sh\nexit 1\n")
    refusal = container.run(SSH_AUTHORIZED_KEYS=PUBLIC).refusal
    assert refusal.startswith("there is no place for files")
    assert "--tmpfs /tmp" in refusal


def test_a_temporary_directory_that_cannot_be_written_is_not_needed(container: Container) -> None:
    container.served(SSH_AUTHORIZED_KEYS=PUBLIC, TMPDIR="/proc")
    assert container.config


# --------------------------------------------------------------------------- its life


def test_it_ends_within_seconds_and_what_runs_in_sessions_with_it(container: Container) -> None:
    container.body = (
        f"(trap '' TERM; echo $BASHPID >{container.seen}/stubborn; while :; do sleep 0.1; done) &\n"
        f"(trap 'echo saved >{container.seen}/saved; exit' TERM; echo >{container.seen}/polite\n"
        f"while :; do sleep 0.1; done) &\n{WAIT}"
    )
    with container.started(SSH_AUTHORIZED_KEYS=PUBLIC) as process:
        for name in ("stubborn", "polite"):
            while not (container.seen / name).exists() or not (container.seen / name).read_text():
                time.sleep(0.02)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert time.monotonic() - began < 10
    assert (container.seen / "saved").read_text() == "saved\n"
    stubborn = Path("/proc", (container.seen / "stubborn").read_text().strip(), "stat")
    assert not stubborn.exists() or stubborn.read_text().split()[2] == "Z"
    assert list((container.root / "tmp").iterdir()) == []


def test_it_can_be_ended_while_it_prepares(container: Container) -> None:
    container.plant("getent", "")
    script = container.prepare()
    container.plant("getent", f"#!/bin/sh\ntouch {container.root}/waits; sleep 0.5; exec echo {container.account}\n")
    process = subprocess.Popen([str(script)], env=container.environment(SSH_AUTHORIZED_KEYS=PUBLIC))
    while not (container.root / "waits").exists():
        time.sleep(0.02)
    process.terminate()
    assert process.wait(10) == 0
    assert not (container.seen / "arguments").exists()
    assert list((container.root / "tmp").iterdir()) == []


def test_if_sshd_ends_so_does_it(container: Container) -> None:
    container.body = "echo 'Cannot bind any address.' >&2; exit 255"
    ran = container.run(SSH_AUTHORIZED_KEYS=PUBLIC)
    assert ran.code == 1
    assert "Cannot bind any address." in ran.said
    assert "sshd ended by itself, with status 255" in ran.said


def test_the_log_is_sshd_s_without_what_health_leaves_in_it(container: Container) -> None:
    noise = [
        "kex_exchange_identification: Connection closed by remote host",
        "Connection closed by 127.0.0.1 port 40000",
        "Attempt to write login records by non-root user (aborting)",
    ]
    kept = ["Accepted publickey for torch", "Connection closed by 172.17.0.1 port 40000"]
    lines = "\n".join([*noise, *kept])
    container.body = f"cat >&2 <<'END'\n{lines}\nEND\nexit 3"
    said = container.run(SSH_AUTHORIZED_KEYS=PUBLIC).said.splitlines()
    assert [line for line in said if not line.startswith("torchyard-ssh: ")] == kept


@contextlib.contextmanager
def listening(banner: bytes) -> Iterator[int]:
    """Send `banner` to whoever comes."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                with server.accept()[0] as made:
                    made.sendall(banner)

    thread = threading.Thread(target=serve)
    thread.start()
    yield int(server.getsockname()[1])
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


@pytest.mark.parametrize("address", ["", "127.0.0.1", "0.0.0.0"])
def test_health_reads_the_banner(container: Container, address: str) -> None:
    with listening(b"SSH-2.0-OpenSSH_9.2p1\r\n") as port:
        ran = container.run("--health", SSH_PORT=str(port), SSH_ADDRESS=address)
    line = f"torchyard-ssh: SSH-2.0-OpenSSH_9.2p1 answers on 127.0.0.1, port {port}\n"
    assert (ran.code, ran.out, ran.said) == (0, "", line)
    assert not container.kept.exists()


@pytest.mark.parametrize("banner", [b"HTTP/1.1 400 Bad Request\r\n", b""])
def test_health_is_bad_where_something_else_answers(container: Container, banner: bytes) -> None:
    with listening(banner) as port:
        ran = container.run("--health", SSH_PORT=str(port))
    assert (ran.code, ran.said) == (1, f"torchyard-ssh: no SSH server answers on 127.0.0.1, port {port}\n")


def test_health_is_bad_where_nothing_answers(container: Container) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        ran = container.run("--health", SSH_PORT=str(port))
    assert (ran.code, ran.said) == (1, f"torchyard-ssh: no SSH server answers on 127.0.0.1, port {port}\n")
    assert container.run("--health", SSH_PORT="x").code == 1


# --------------------------------------------------------------------------- the program itself


def test_it_is_sound_shell(container: Container) -> None:
    script = container.prepare()
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck is not None
    done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert script.read_text().startswith("#!/bin/bash\n")
