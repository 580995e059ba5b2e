"""The bootstrap base for real: two builds that share nothing but the lock give one digest.

One suite by default; TORCHYARD_TEST_SUITES="bookworm trixie" names others.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from builder import base, layout
from builder.store import Store

pytestmark = [pytest.mark.debian, pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(900)]

SUITES = os.environ.get("TORCHYARD_TEST_SUITES", "bookworm").split()

# Enough to meet compiled bytecode, certificates with odd names and hard links; without compilers it is quick.
PACKAGES = ("ca-certificates", "python3", "tini")

MAKE = """\
import os, sys
from pathlib import Path
os.umask(0o077)
from builder import base
from builder.store import Store
store = Store.open(Path(sys.argv[1]))
lock = base.loads(Path(sys.argv[2]).read_text(), where=sys.argv[2])
base.fetch(lock, store)
print(base.make(lock, store).digest)
"""


@dataclass(frozen=True, kw_only=True)
class Made:
    """One lock made into an image twice: here, and by another process where everything else differs."""

    lock: base.BaseLock
    store: Store
    image: base.BaseImage
    elsewhere: subprocess.CompletedProcess[str]
    tar: tarfile.TarFile


@pytest.fixture(scope="module", params=SUITES)
def made(request: pytest.FixtureRequest) -> Iterator[Made]:
    if shutil.which("mmdebstrap") is None:
        pytest.skip("mmdebstrap is not installed")
    lock = base.lock(suite=request.param, architecture="amd64", packages=PACKAGES)
    with tempfile.TemporaryDirectory() as here, tempfile.TemporaryDirectory() as there:
        # Open to everybody, unlike the other: apt then works as another user than in the second build.
        Path(here).chmod(0o755)
        # Both at a time: most of a build keeps one core busy.
        with another_machine(lock, Path(there)) as other:
            store = Store.open(Path(here))
            base.fetch(lock, store)
            image = base.make(lock, store)
            said, complained = other.communicate()
        blob = io.BytesIO(store.path(image.layer.sha256).read_bytes())
        with tarfile.open(fileobj=blob, mode="r:gz") as tar:
            yield Made(
                lock=lock,
                store=store,
                image=image,
                elsewhere=subprocess.CompletedProcess(other.args, other.returncode, said, complained),
                tar=tar,
            )


def another_machine(lock: base.BaseLock, directory: Path) -> subprocess.Popen[str]:
    home = directory / "else where"
    home.mkdir()
    file = directory / "lock.toml"
    file.write_text(base.dumps(lock))
    environment = dict(os.environ) | {
        "TZ": "Asia/Tokyo",
        "LC_ALL": "C",
        "PYTHONHASHSEED": "7",
        "HOME": str(home),
        "PYTHONPATH": str(Path(base.__file__).parents[1]),
    }
    make = [sys.executable, "-c", MAKE, str(home / "store"), str(file)]
    # Another host name too, where a namespace for it may be made.
    if os.geteuid() == 0 and shutil.which("unshare"):
        make = ["unshare", "--uts", "sh", "-c", 'hostname other-machine; exec "$@"', "sh", *make]
    return subprocess.Popen(make, cwd=home, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def text(made: Made, path: str) -> str:
    file = made.tar.extractfile(path)
    assert file is not None
    return file.read().decode()


def test_another_machine_makes_the_same_digest(made: Made) -> None:
    assert made.elsewhere.stdout.strip() == made.image.digest, made.elsewhere.stderr


def test_a_lock_names_no_host_and_no_future(made: Made) -> None:
    assert "://" not in base.dumps(made.lock)
    assert made.lock.epoch < time.time()


def test_a_second_call_costs_nothing(made: Made) -> None:
    began = time.monotonic()
    assert base.make(made.lock, made.store) == made.image
    assert time.monotonic() - began < 1


def test_the_layout_is_whole(made: Made) -> None:
    found = layout.read(made.image.layout)
    assert found is not None
    assert (found.manifest.digest, found.layers[0].diff_id) == (made.image.digest, made.image.diff_id)
    layout.verify(made.image.layout, found)


def test_nothing_of_the_building_machine_is_inside(made: Made) -> None:
    members = made.tar.getmembers()
    names = {member.name for member in members}
    assert not names & {"etc/resolv.conf", "etc/hostname", "etc/hosts", "etc/apt/apt.conf.d/99mmdebstrap"}
    assert not [name for name in names if name.startswith(("dev/", "tmp/", "run/", "proc/", "sys/"))]
    files = [member.name for member in members if member.isfile()]
    assert not [name for name in files if name.startswith(("var/log/", "var/cache/apt/"))]
    assert {int(member.mtime) for member in members} == {made.image.epoch}
    assert not [member.name for member in members if member.uname or member.gname]
    assert not [name for name in names if name.endswith("-old")]


def test_the_user_and_apt_are_ready(made: Made) -> None:
    assert "torch:" in text(made, "etc/passwd")
    for path in ("home/torch", "workspace"):
        member = made.tar.getmember(path)
        assert (member.uid, member.gid, member.mode) == (1000, 0, 0o775)
    names = [name for name in made.tar.getnames() if name.startswith("etc/apt/sources.list")]
    sources = "".join(text(made, name) for name in names if not made.tar.getmember(name).isdir())
    assert f"{made.lock.suite}-security" in sources
    assert "trusted" not in sources
    assert "copy:" not in sources
    assert any(name.startswith("usr/share/keyrings/debian-archive") for name in made.tar.getnames())


def test_python_starts_with_bytecode_that_needs_no_check(made: Made) -> None:
    flags = set()
    for member in made.tar.getmembers():
        if member.name.endswith(".pyc"):
            file = made.tar.extractfile(member)
            assert file is not None
            flags.add(file.read(8)[4:])
    assert flags == {b"\x01\0\0\0"}


def test_hard_links_are_there(made: Made) -> None:
    links = [member for member in made.tar.getmembers() if member.islnk()]
    assert links, "PACKAGES has none, so that they are not tested"
    assert all(made.tar.getmember(link.linkname).isfile() for link in links)
