"""The bootstrap base for real, and system packages on it: two builds that share nothing but the locks are one.

One suite by default; TORCHYARD_TEST_SUITES="bookworm trixie" names others.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from builder import base, layout
from builder.rootfs import is_dropped
from builder.store import Store
from builder.tar import Kind

pytestmark = [pytest.mark.debian, pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(900)]

SUITES = os.environ.get("TORCHYARD_TEST_SUITES", "bookworm").split()

# Enough to meet compiled bytecode, certificates with odd names and hard links; without compilers it is quick.
PACKAGES = ("ca-certificates", "passwd", "python3", "tini")
# It makes a user and keys, asks debconf, registers with PAM and systemd, and brings Perl scripts and libraries.
SYSTEM = ("openssh-server",)

MAKE = """\
import os, sys
from pathlib import Path
os.umask(0o077)
from builder import base
from builder.store import Store
store = Store.open(Path(sys.argv[1]))
lock, system = (base.loads(Path(name).read_text(), where=name) for name in sys.argv[2:])
base.fetch(system, store)
print(base.make(lock, store).digest, base.make(lock, store, system=system).digest)
"""


@dataclass(frozen=True, kw_only=True)
class Made:
    """Two locks made into images twice: here, and by another process where everything else differs."""

    lock: base.BaseLock
    system: base.BaseLock
    store: Store
    image: base.BaseImage
    extended: base.BaseImage
    """The same base with the system packages."""
    elsewhere: subprocess.CompletedProcess[str]
    tar: tarfile.TarFile
    """The base's layer."""
    added: tarfile.TarFile
    """The layer of the system packages."""


@pytest.fixture(scope="module", params=SUITES)
def made(request: pytest.FixtureRequest) -> Iterator[Made]:
    if shutil.which("mmdebstrap") is None:
        pytest.skip("mmdebstrap is not installed")
    lock, system = base.lock(suite=request.param, architecture="amd64", packages=PACKAGES, systems=[SYSTEM])
    with tempfile.TemporaryDirectory() as here, tempfile.TemporaryDirectory() as there:
        # Open to everybody, unlike the other: apt then works as another user than in the second build.
        Path(here).chmod(0o755)
        # Both at a time: most of a build keeps one core busy.
        with another_machine((lock, system), Path(there)) as other:
            store = Store.open(Path(here))
            base.fetch(system, store)
            image = base.make(lock, store)
            extended = base.make(lock, store, system=system)
            said, complained = other.communicate()
        assert extended.system is not None
        blobs = [
            io.BytesIO(store.path(sha256).read_bytes()) for sha256 in (image.layer.sha256, extended.system.blob.sha256)
        ]
        with tarfile.open(fileobj=blobs[0], mode="r:gz") as tar, tarfile.open(fileobj=blobs[1], mode="r:gz") as added:
            yield Made(
                lock=lock,
                system=system,
                store=store,
                image=image,
                extended=extended,
                elsewhere=subprocess.CompletedProcess(other.args, other.returncode, said, complained),
                tar=tar,
                added=added,
            )


def another_machine(locks: Iterable[base.BaseLock], directory: Path) -> subprocess.Popen[str]:
    home = directory / "else where"
    home.mkdir()
    files = []
    for number, lock in enumerate(locks):
        files.append(directory / f"{number}.toml")
        files[-1].write_text(base.dumps(lock))
    environment = dict(os.environ) | {
        "TZ": "Asia/Tokyo",
        "LC_ALL": "C",
        "PYTHONHASHSEED": "7",
        "HOME": str(home),
        "PYTHONPATH": str(Path(base.__file__).parents[1]),
    }
    make = [sys.executable, "-c", MAKE, str(home / "store"), *map(str, files)]
    # Another host name too, where a namespace for it may be made.
    if os.geteuid() == 0 and shutil.which("unshare"):
        make = ["unshare", "--uts", "sh", "-c", 'hostname other-machine; exec "$@"', "sh", *make]
    return subprocess.Popen(make, cwd=home, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def text(made: Made, path: str) -> str:
    file = made.tar.extractfile(path)
    assert file is not None
    return file.read().decode()


def test_another_machine_makes_the_same_digests(made: Made) -> None:
    assert made.elsewhere.stdout.split() == [made.image.digest, made.extended.digest], made.elsewhere.stderr


def test_a_lock_names_no_host_and_no_future(made: Made) -> None:
    for lock in (made.lock, made.system):
        assert "://" not in base.dumps(lock)
        assert lock.epoch < time.time()


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


# --------------------------------------------------------------------------- system packages


# What packages change of the base when they are installed: accounts, and what is recorded in one file for all.
REGISTERS = {
    *(f"etc/{name}" for name in ("group", "gshadow", "passwd", "shadow", "ld.so.cache")),
    *(f"var/cache/debconf/{name}.dat" for name in ("config", "templates")),
    "var/lib/dpkg/status",
    "var/lib/dpkg/triggers/File",
}


def names(archive: tarfile.TarFile) -> set[str]:
    return set(archive.getnames())


def content(archive: tarfile.TarFile, path: str) -> bytes:
    file = archive.extractfile(path)
    assert file is not None
    return file.read()


def test_the_base_below_is_the_very_same(made: Made) -> None:
    assert (made.extended.layer, made.extended.diff_id) == (made.image.layer, made.image.diff_id)
    found = layout.read(made.extended.layout)
    assert found is not None
    layout.verify(made.extended.layout, found)
    assert [layer.blob for layer in found.layers[:-1]] == [made.image.layer]
    assert found.layers[-1] == made.extended.system


def test_the_layer_has_every_file_of_its_packages(made: Made) -> None:
    added = {deb.name for deb in made.system.debs} - {deb.name for deb in made.lock.debs}
    assert set(SYSTEM) <= added
    lists = {
        Path(name).stem.partition(":")[0]: name
        for name in names(made.added)
        if name.startswith("var/lib/dpkg/info/") and name.endswith(".list")
    }
    assert set(lists) == added
    there = names(made.added) | names(made.tar)
    for name in lists.values():
        for line in content(made.added, name).decode().splitlines():
            path = re.sub(r"^/(?=(?:bin|sbin|lib|lib64)/)", "/usr/", line).removeprefix("/")
            if path != "." and not dropped(path):
                assert path in there, f"{path} of {name}"


def dropped(path: str) -> bool:
    return is_dropped(path, Kind.FILE) or is_dropped(path, Kind.DIRECTORY)


def test_the_layer_holds_only_what_is_new_or_changed(made: Made) -> None:
    base_files = {member.name: member for member in made.tar.getmembers()}
    epochs = {made.lock.epoch, made.system.epoch}
    for member in made.added.getmembers():
        assert member.mtime in epochs
        assert not re.search(r"(^|/)\.wh\.", member.name), "installing a package takes nothing away"
        if member.isfile() and member.name in base_files and base_files[member.name].isfile():
            assert content(made.added, member.name) != content(made.tar, member.name), member.name
    changed = {member.name for member in made.added.getmembers() if member.name in base_files and not member.isdir()}
    assert changed <= REGISTERS, "a file that differs between builds, or ought to be one of these"


def test_no_key_and_no_trace_of_the_build_is_in_the_layer(made: Made) -> None:
    found = {member.name for member in made.added.getmembers() if not member.isdir()}
    assert not [name for name in found if re.search(r"ssh_host_|\.pwd\.lock|-old$|etc/(passwd|group|shadow)-$", name)]
    assert not [name for name in found if name.startswith(("dev/", "tmp/", "run/", "proc/", "sys/", "var/log/"))]
    assert "etc/ssh/sshd_config" in found
    for member in made.added.getmembers():
        if member.isfile() and member.name.startswith("etc/"):
            assert b"PRIVATE KEY-----" not in content(made.added, member.name), member.name
    days = {line.split(":")[2] for line in content(made.added, "etc/shadow").decode().splitlines()}
    assert days <= {str(made.lock.epoch // 86400)}


def test_the_user_is_still_there(made: Made) -> None:
    accounts = content(made.added, "etc/passwd").decode().splitlines()
    assert set(content(made.tar, "etc/passwd").decode().splitlines()) < set(accounts)
    assert any(line.startswith("sshd:") for line in accounts)
    assert accounts[-1].startswith("torch:")
