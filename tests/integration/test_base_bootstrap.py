"""The bootstrap base for real: two builds that share nothing but the lock give one digest."""

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
from pathlib import Path

import pytest

from builder import base, layout
from builder.store import Store

pytestmark = [pytest.mark.debian, pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(900)]

# Enough to meet compiled bytecode, certificates with odd names and hard links; without compilers it is quick.
PACKAGES = ("ca-certificates", "python3", "python3-venv", "tini")

MAKE = """\
import os, sys
from pathlib import Path
os.umask(int(sys.argv[3], 8))
from builder import base
from builder.store import Store
store = Store.open(Path(sys.argv[1]))
lock = base.loads(Path(sys.argv[2]).read_text(), where=sys.argv[2])
base.fetch(lock, store)
print(base.make(lock, store).digest)
"""


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def lock(request: pytest.FixtureRequest) -> base.BaseLock:
    if shutil.which("mmdebstrap") is None:
        pytest.skip("mmdebstrap is not installed")
    return base.lock(suite=request.param, architecture="amd64", packages=PACKAGES)


@pytest.fixture(scope="module")
def image(lock: base.BaseLock) -> Iterator[base.BaseImage]:
    # Open to everybody, unlike pytest's directories: apt then works as another user than in the second build.
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o755)
        store = Store.open(Path(home))
        base.fetch(lock, store)
        yield base.make(lock, store)


@pytest.fixture(scope="module")
def tar(image: base.BaseImage) -> tarfile.TarFile:
    blob = image.layout / "blobs/sha256" / image.layer.sha256
    return tarfile.open(fileobj=io.BytesIO(blob.read_bytes()), mode="r:gz")


def text(tar: tarfile.TarFile, path: str) -> str:
    file = tar.extractfile(path)
    assert file is not None
    return file.read().decode()


def test_relocking_keeps_a_lock_that_is_still_right(lock: base.BaseLock) -> None:
    again = base.lock(
        suite=lock.suite,
        architecture=lock.architecture,
        packages=reversed(lock.packages),
        previous=lock,
    )
    assert again is lock
    assert "://" not in base.dumps(lock)
    assert lock.epoch < time.time()


def test_another_machine_makes_the_same_digest(
    lock: base.BaseLock,
    image: base.BaseImage,
    tmp_path: Path,
) -> None:
    file = tmp_path / "lock.toml"
    file.write_text(base.dumps(lock))
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    environment = dict(os.environ) | {
        "TZ": "Asia/Tokyo",
        "LC_ALL": "C",
        "PYTHONHASHSEED": "7",
        "HOME": str(elsewhere),
        "PYTHONPATH": str(Path(base.__file__).parents[1]),
    }
    make = [sys.executable, "-c", MAKE, str(tmp_path / "two"), str(file), "077"]
    # Another host name too, where a namespace for it may be made.
    if os.geteuid() == 0 and shutil.which("unshare"):
        make = ["unshare", "--uts", "sh", "-c", 'hostname other-machine; exec "$@"', "sh", *make]
    done = subprocess.run(
        make,
        cwd=elsewhere,
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.stdout.strip() == image.digest, done.stderr


def test_a_second_call_costs_nothing(lock: base.BaseLock, image: base.BaseImage) -> None:
    store = Store.open(image.layout.parents[1])
    began = time.monotonic()
    assert base.make(lock, store) == image
    assert time.monotonic() - began < 1
    (store.path(image.layer.sha256)).unlink()
    assert base.make(lock, store) == image
    assert store.has(image.layer.sha256), "a blob that was collected is linked back from the layout"


def test_the_layout_is_whole(image: base.BaseImage) -> None:
    found = layout.read(image.layout)
    assert found is not None
    assert (found.manifest.digest, found.layers[0].diff_id) == (image.digest, image.diff_id)
    layout.verify(image.layout, found)


def test_nothing_of_the_building_machine_is_inside(tar: tarfile.TarFile, image: base.BaseImage) -> None:
    names = set(tar.getnames())
    assert not names & {"etc/resolv.conf", "etc/hostname", "etc/hosts", "etc/apt/apt.conf.d/99mmdebstrap"}
    assert not [name for name in names if name.startswith(("dev/", "tmp/", "run/", "proc/", "sys/"))]
    files = [member.name for member in tar if member.isfile()]
    assert not [name for name in files if name.startswith(("var/log/", "var/cache/apt/"))]
    assert {int(member.mtime) for member in tar} == {image.epoch}
    assert not [member.name for member in tar if member.uname or member.gname]
    assert not [name for name in names if name.endswith("-old")]


def test_the_user_and_apt_are_ready(tar: tarfile.TarFile, lock: base.BaseLock) -> None:
    assert "torch:" in text(tar, "etc/passwd")
    for path in ("home/torch", "workspace"):
        member = tar.getmember(path)
        assert (member.uid, member.gid, member.mode) == (1000, 0, 0o775)
    names = [name for name in tar.getnames() if name.startswith("etc/apt/sources.list")]
    sources = "".join(text(tar, name) for name in names if not tar.getmember(name).isdir())
    assert f"{lock.suite}-security" in sources
    assert "trusted" not in sources
    assert "copy:" not in sources
    assert any(name.startswith("usr/share/keyrings/debian-archive") for name in tar.getnames())


def test_python_starts_with_bytecode_that_needs_no_check(tar: tarfile.TarFile) -> None:
    flags = set()
    for member in tar:
        if member.name.endswith(".pyc"):
            file = tar.extractfile(member)
            assert file is not None
            flags.add(file.read(8)[4:])
    assert flags == {b"\x01\0\0\0"}
