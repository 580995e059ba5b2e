"""Users, rights and secrets of an image: what is told of trees of files that stand for one."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from validate.check import Probe, Request, SkippedError
from validate.checks import security
from validate.checks.security import Entry, Walk, is_likely, is_secret, may_write, mounts, named, written
from validate.profile import DEFAULTS
from validate.verdict import Finding, Skip, Status

OURS = {"config": {"user": "1000:0", "env": {"PATH": "/opt/venv/bin"}, "labels": {}, "cmd": ["bash"]}}


class Tree:
    """The files of an image."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, path: str, text: str = "x", mode: int = 0o644) -> Path:
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(mode)
        return target


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """An image that is in order, seen by its user."""
    tree = Tree(tmp_path / "tree")
    tree.put("/etc/passwd", "root:x:0:0:root:/root:/bin/bash\ntorch:x:1000:0::/home/torch:/bin/bash\n")
    tree.put("/etc/ssl/certs/ca-certificates.crt", "-----BEGIN CERTIFICATE-----\n")
    tree.put("/etc/apt/apt.conf", 'Acquire::http::Proxy "http://proxy.example.org:3128/";\n# user:password@host\n')
    tree.put("/usr/bin/su", mode=0o4755)
    tree.put("/opt/venv/pyvenv.cfg")
    tree.put("/opt/venv/lib/python3/site-packages/botocore/config.py", "AKIA" + "A" * 16)
    tree.put("/opt/venv/lib/python3/site-packages/tornado/test/id_rsa", "-----BEGIN PRIVATE KEY-----")
    tree.put("/home/torch/.ssh/id_rsa.pub", "ssh-rsa AAAA")
    tree.put("/home/torch/.ssh/authorized_keys", "")
    (tree.root / "var/run").mkdir(parents=True)
    (tree.root / "var/run/loop").symlink_to(".")
    os.mkfifo(tree.root / "home/torch/.netrc")
    for path in tree.root.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    monkeypatch.setattr(security, "ROOT", str(tree.root))
    me = os.getuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1000)
    monkeypatch.setattr(os, "getegid", lambda: 0)
    monkeypatch.setattr(os, "getgroups", lambda: [0])
    for name in [name for name in os.environ if is_secret(name, os.environ[name])]:
        monkeypatch.delenv(name)
    return tree


def findings(
    body: Any, declared: Mapping[str, Any] | None = OURS, *, image: bool = True, **options: Any
) -> list[Finding]:
    probe = Probe(Request(declared=declared, image=image, options={**DEFAULTS, **options}), lambda _: None)
    body(probe)
    return probe.findings


def only(body: Any, **more: Any) -> Finding:
    (finding,) = findings(body, **more)
    return finding


# --------------------------------------------------------------------------- whom it is about


def test_an_image_in_order_passes(tree: Tree) -> None:
    assert findings(security.user) == []
    assert findings(security.secrets) == []


@pytest.mark.parametrize("body", [security.user, security.secrets])
def test_a_machine_is_left_alone(tree: Tree, body: Any) -> None:
    tree.put("/home/me/.ssh/id_rsa")
    with pytest.raises(SkippedError) as skipped:
        findings(body, None, image=False)
    assert skipped.value.reason is Skip.NOT_DECLARED


def test_somebody_else_s_image_may_run_as_root(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert only(security.user, declared=None).status is Status.WARN
    strict = only(security.user, declared=None, foreign_user="fail")
    assert (strict.status, strict.mode) == (Status.FAIL, "F80")


def test_but_it_may_not_hold_secrets_either(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.put("/etc/ssh/ssh_host_rsa_key")
    monkeypatch.setenv("MY_API_KEY", "0123456789")
    told = findings(security.secrets, None)
    assert [(it.status, it.mode) for it in told] == [(Status.FAIL, "F81"), (Status.FAIL, "F62")]


def test_what_a_container_was_given_is_not_the_image_s(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    assert findings(security.secrets) == []


# --------------------------------------------------------------------------- users


@pytest.mark.parametrize(
    ("passwd", "shadow", "says"),
    [
        ("root:x:0:0::/:/bin/sh", None, []),
        ("root:*:0:0::/:/bin/sh\n+::::::\n\n# a:comment\nbroken\n", None, ["+: an empty password"]),
        ("root::0:0::/:/bin/sh", None, ["root: an empty password"]),
        ("root:$6$salt$hash:0:0::/:/bin/sh", None, ["root: a password that all who have the image share"]),
        ("root:x:0:0::/:/bin/sh", "root:!:1::\ndaemon:*:1::\na:!$6$x:1::\nb:!!:1::", ["uid 1 can read /etc/shadow"]),
        ("root:x:0:0::/:/bin/sh", "a::1::\nb:$y$j9T$:1::", ["a: an empty", "b: a password", "uid 1 can read"]),
    ],
)
def test_passwords(passwd: str, shadow: str | None, says: list[str]) -> None:
    probe = Probe(Request(), lambda _: None)
    security.judge_passwords(passwd, shadow, 1, probe)
    assert len(probe.findings) == len(says)
    assert all(finding.what.startswith(text) for finding, text in zip(probe.findings, says, strict=True))
    assert "$" not in "".join(f"{it.what}{it.why}" for it in probe.findings), "a report is no place for a hash"


def test_root_may_read_the_hashes() -> None:
    probe = Probe(Request(), lambda _: None)
    security.judge_passwords("", "root:*:1::", 0, probe)
    assert probe.findings == []


@pytest.mark.parametrize(
    ("mode", "owner", "writes"),
    [
        (0o100644, (0, 0), False),
        (0o100664, (0, 0), True),
        (0o100666, (5, 5), True),
        (0o100646, (0, 0), False),  # the group's bits count for it, not everybody's
        (0o100444, (1000, 0), True),  # it can give itself the right
        (0o040755, (0, 0), False),
        (0o040775, (0, 0), True),
        (0o040765, (0, 0), False),  # cannot be entered
        (0o041777, (5, 5), False),
        (0o120777, (5, 5), False),
    ],
)
def test_who_may_write(mode: int, owner: tuple[int, int], *, writes: bool) -> None:
    status: Any = SimpleNamespace(st_mode=mode, st_uid=owner[0], st_gid=owner[1])
    assert may_write(status, 1000, {0}) is writes


@pytest.mark.parametrize(
    ("package", "path", "known"),
    [
        ("/bin/su", "/usr/bin/su", True),
        ("/usr/bin/su", "/bin/su", True),
        ("/usr/bin/other", "/usr/bin/su", False),
        ("/usr/bin/pkexec", "/usr/bin/pkexec", False),
        (None, "/usr/bin/su", True),
        (None, "/usr/bin/sudo", False),
    ],
)
def test_programs_with_more_rights_belong_to_packages(
    tree: Tree, package: str | None, path: str, *, known: bool
) -> None:
    (tree.root / "usr/bin/su").unlink()
    tree.put(path, mode=0o4755)
    if package:
        tree.put("/var/lib/dpkg/info/any:amd64.list", f"/.\n{package}\n")
    told = findings(security.user)
    assert [path in finding.why for finding in told] == ([] if known else [True])


def test_a_group_s_rights_count_too(tree: Tree) -> None:
    tree.put("/usr/games/score", mode=0o2755)
    assert "/usr/games/score" in only(security.user).why


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ("root ALL=(ALL:ALL) ALL\n%sudo ALL=(ALL:ALL) ALL\n# torch ALL=(ALL) NOPASSWD: ALL\n", False),
        ("  torch ALL=(root) NOPASSWD: /usr/bin/apt-get\n", True),
        ("Defaults !authenticate\n", True),
    ],
)
def test_sudo(tree: Tree, rules: str, *, told: bool) -> None:
    tree.put("/etc/sudoers", rules)
    assert bool(findings(security.user)) is told


# --------------------------------------------------------------------------- the walk


def test_mounts_are_not_the_image_s(tree: Tree) -> None:
    tree.put("/data/my key/id_rsa")
    text = "22 1 0:21 / / rw - overlay o rw\n23 22 0:5 / /data/my\\040key rw,nosuid - ext4 /dev/sda rw\nbroken\n"
    assert mounts(text) == {"/data/my key"}
    paths = {entry.path for entry in Walk(str(tree.root), mounts(text))}
    assert "/data" in paths
    assert not any(path.startswith("/data/") for path in paths)


def test_what_cannot_be_seen_is_said(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, scandir = f"{tree.put('/root/.netrc').parent}/", os.scandir

    def refuse(path: str) -> Any:
        if path == closed:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    told: list[str] = []
    security.secrets(Probe(Request(declared=OURS), lambda it: told.append(str(it.get("detail", "")))))
    assert told[-1].endswith("; only root can look into /root")


def test_a_hostile_tree_is_walked(tree: Tree) -> None:
    (tree.root / "a").symlink_to("/")
    tree.put("/opt/\x1b[31m/id_rsa\n/id_rsa")
    (tree.root / os.fsdecode(b"\xff\xfe")).mkdir()
    deep = tree.root / "deep" / "/".join("d" * 200 for _ in range(15))
    deep.mkdir(parents=True)
    finding = only(security.secrets)
    assert "\\x1b[31m" in finding.why
    assert finding.why.isprintable()


def test_many_are_counted(tree: Tree) -> None:
    for number in range(30):
        tree.put(f"/home/u{number:02}/.netrc")
    assert "/home/u00/.netrc" in only(security.secrets).why
    assert "and 25 more" in only(security.secrets).why


# --------------------------------------------------------------------------- secrets


def file(path: str, size: int = 100, *, installed: bool = False) -> Entry:
    status: Any = SimpleNamespace(st_mode=0o100644, st_size=size)
    return Entry(path, status, installed)


@pytest.mark.parametrize(
    "path",
    [
        "/root/.ssh/id_rsa", "/x/id_ed25519_sk", "/etc/ssh/ssh_host_dsa_key", "/root/.ssh/authorized_keys2",
        "/root/_netrc", "/root/.pypirc", "/root/.config/git/credentials", "/root/.huggingface/token",
        "/cache/huggingface/token", "/cache/huggingface/stored_tokens", "/root/.azure/msal_token_cache.json",
        "/root/.kube/config", "/root/.config/gcloud/application_default_credentials.json", "/root/.kaggle/kaggle.json",
        "/root/.gnupg/private-keys-v1.d/0A.key", "/root/.local/share/jupyter/runtime/jpserver-7.json",
        "/home/torch/.local/share/torchyard/notebook/token",
    ],
)  # fmt: skip
def test_names_that_tell(path: str) -> None:
    assert named(file(path)) is not None
    assert named(file(path, size=0)) is None


@pytest.mark.parametrize(
    "path",
    [
        "/root/.ssh/id_rsa.pub", "/root/.ssh/known_hosts", "/etc/ssh/ssh_host_rsa_key.pub", "/usr/share/doc/netrc",
        "/opt/x/token", "/opt/x/credentials", "/opt/x/config.json", "/opt/tokens/huggingface.py", "/x/my_id_rsa.py",
    ],
)  # fmt: skip
def test_names_that_do_not(path: str) -> None:
    assert named(file(path)) is None


def test_keys_in_packages_tests_are_known_to_everybody() -> None:
    assert named(file("/opt/venv/lib/python3/site-packages/x/tests/id_rsa", installed=True)) is None
    assert named(file("/opt/venv/lib/python3/site-packages/x/id_rsa", installed=True)) is not None


@pytest.mark.parametrize(
    "text",
    [
        "-----BEGIN PRIVATE KEY-----", "x\n-----BEGIN OPENSSH PRIVATE KEY-----\n", "HF_TOKEN=hf_" + "aB3" * 12,
        "-----BEGIN PGP PRIVATE KEY BLOCK-----", "-----BEGIN ENCRYPTED PRIVATE KEY-----", "ghp_" + "a1" * 18,
        "github_pat_" + "A1_" * 10, "glpat-" + "a" * 20, "xoxb-1234567890-a", "npm_" + "a" * 36,
        "sk-proj-" + "a-B" * 20, "AIza" + "b" * 35, "AKIA" + "B" * 16, "aws_secret_access_key = " + "a/+" * 13 + "a",
        "index-url=https://joe:hunter2@index.example.org/simple", "machine example.org login joe password hunter2",
        "//registry.example.org/:_authToken=" + "a" * 30, '{"auths": {"example.org": {"auth": "am9lOmh1bnRlcjI="}}}',
        "c.ServerApp.token = 'abcdefgh12345'", '"hashed_password": "argon2:$argon2id$v=19$m=10240"',
    ],
)  # fmt: skip
def test_texts_that_tell(text: str) -> None:
    assert written(text) is not None


@pytest.mark.parametrize(
    "text",
    [
        "", "-----BEGIN CERTIFICATE-----", "-----BEGIN PUBLIC KEY-----", "hf_hub_download(x)", "hf_" + "a" * 20,
        "https://example.org:8080/a@b", "http://user:password@example.org", "http://$USER:$PASS@example.org",
        "ssh://git@example.org:22/x", "postgres://user:{password}@localhost/db", "task-" + "a" * 60,
        "c.ServerApp.token = ''", "c.ServerApp.token = token", '{"auth": "basic"}', "AKIA" + "a" * 16,
    ],
)  # fmt: skip
def test_texts_that_do_not(text: str) -> None:
    assert written(text) is None


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("HF_TOKEN", "abc", True),
        ("AWS_SECRET_ACCESS_KEY", "abc", True),
        ("AWS_ACCESS_KEY_ID", "abc", True),
        ("db-password", "abc", True),
        ("com.example.api.key", "abc", True),
        ("ANYTHING", "hf_" + "a1" * 20, True),
        ("HF_TOKEN", "", False),
        ("JUPYTER_TOKEN", "$OTHER", False),
        ("JUPYTER_TOKEN_FILE", "/run/secrets/token", False),
        ("MY_SECRET", "/run/secrets/it", False),
        ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1", False),
        ("TOKENIZERS_PARALLELISM", "abc", False),
        ("GPG_KEY", "A035C8C19219BA821ECEA86B64E628F8D684696D", False),
        ("PATH", "/usr/bin", False),
        ("KEYBOARD", "de", False),
    ],
)
def test_variables(name: str, value: str, *, secret: bool) -> None:
    assert is_secret(name, value) is secret


def test_only_likely_files_are_read() -> None:
    assert is_likely(file("/etc/pip.conf"))
    assert is_likely(file("/.env"))
    assert not is_likely(file("/etc/big", size=1 << 20))
    assert not is_likely(file("/etc/empty", size=0))
    assert not is_likely(file("/usr/share/doc/x"))
    assert not is_likely(file("/opt/venv/bin/x", installed=True))


@pytest.mark.parametrize(
    "unit",
    [
        "a", " ", "\n", "\t", "sk-", "://", "://a:", "a:b@", "machine ", "machine a login ", '"auths"', "App.token = ",
        "gh", "-----BEGIN ", "-----BEGIN A B ",
    ],
)  # fmt: skip
def test_no_text_takes_long(unit: str) -> None:
    text = unit * (security._READ // len(unit))
    started = time.process_time()
    written(text)
    assert time.process_time() - started < 0.5


def test_what_was_not_read_is_said(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "_READ_S", -1.0)
    finding = only(security.secrets)
    assert finding.status is Status.WARN
    assert re.fullmatch(r"\d+ files were not read", finding.what)


def test_a_finding_names_the_place_and_not_the_secret(tree: Tree) -> None:
    tree.put("/workspace/.env", "HF_TOKEN=hf_" + "aB3" * 12)
    finding = only(security.secrets)
    assert "/workspace/.env" in finding.why
    assert "aB3" not in f"{finding.what}{finding.why}{finding.remedy}"


def test_caches_are_weighed_and_small_ones_left_alone(tree: Tree) -> None:
    tree.put("/var/lib/apt/lists/lock", "")
    tree.put("/home/torch/.cache/pip/selfcheck/a", "x" * 1000)
    assert findings(security.secrets) == []
    tree.put("/var/lib/apt/lists/example_Packages", "x" * 200_000)
    tree.put("/var/cache/apt/archives/a.deb", "x" * 100_000)
    told = only(security.secrets)
    assert told.status is Status.WARN
    assert "/var/lib/apt/lists: 0.2 MB" in told.why
    assert "/var/cache/apt/archives: 0.1 MB" in told.why
