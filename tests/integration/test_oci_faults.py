"""Building in the store through the command line: killed, interrupted, several at once, without room, without network.

Tiny wheels on a small base. Whatever happens, no blob is half written, and the next run gives the digest that an
undisturbed one gives.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from builder.base import BaseImage
from builder.matrix import Cell
from builder.store import sha256_of
from tests.integration.conftest import Ran, Tiny, bookworm, command, new_store, tiny_project, torchyard
from tests.support.index_server import IndexServer
from tests.support.wheels import FakeWheel, universe

pytestmark = [pytest.mark.debian, pytest.mark.slow, pytest.mark.timeout(900)]

CELLS: Sequence[Mapping[str, str]] = (
    {"torch": "2.8.0", "cuda": "12.8"},
    {"torch": "2.8.0", "cuda": "12.8", "cudnn": "9.16.0.29"},
    {"torch": "2.7.1", "cuda": "12.6"},
    {"torch": "2.9.1", "cuda": "12.8"},
)


@dataclass(frozen=True, kw_only=True)
class World:
    """A project whose cells are locked and rendered, two stores to start from, and what its images must be."""

    tiny: Tiny
    cells: tuple[Cell, ...]
    bare: Path
    """Holds the base, and the packages it was made from."""
    filled: Path
    """Holds the wheels as well."""
    digests: Mapping[str, str]
    """By cell: what undisturbed builds, one after the other, gave."""
    seconds: float
    """What the first of them took."""

    def env(self, home: Path) -> dict[str, str]:
        return {**os.environ, **self.tiny.env, "TORCHYARD_HOME": str(home)}

    def run(self, home: Path, *arguments: str) -> Ran:
        return torchyard(*arguments, cwd=self.tiny.root, env=self.env(home))

    def start(self, home: Path, *arguments: str, before: Sequence[str] = ()) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*before, *command(*arguments)],
            cwd=self.tiny.root,
            env=self.env(home),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def digest(self, home: Path, cell: Cell) -> str:
        """Build a cell and return its image's digest."""
        ran = self.run(home, "build", cell.id, "--json")
        assert ran.code == 0, ran.err
        return str(ran.document[0]["digest"])

    def wheels(self, *cells: Cell) -> dict[str, FakeWheel]:
        """Return the locked wheels of the cells, by hash."""
        named: dict[str, FakeWheel] = {}
        for cell in cells:
            lock = (self.tiny.root / "images" / cell.id / "pylock.toml").read_text("utf-8")
            named |= {one.sha256: one for one in universe(cell).wheels if one.sha256 in lock}
        return named


def clone(source: Path, target: Path) -> Path:
    """Give a store a second life elsewhere: nothing in it is ever written to, so links are as good as copies."""

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:  # another file system
            shutil.copyfile(one, other)

    shutil.copytree(source, target, copy_function=link)
    return target


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, small_base: BaseImage) -> Iterator[World]:
    root = tmp_path_factory.mktemp("world")
    with IndexServer() as server:
        tiny = tiny_project(root, server)
        project = tiny.write(repository="torchyard-test-faults", include=CELLS)
        tiny.serve_cells(project)
        for verb in ("lock", "render"):
            ran = tiny.run(verb)
            assert ran.code == 0, ran.err
        cells = project.cells
        new_store(bare := root / "bare", bookworm(), base=small_base)
        filled = clone(bare, root / "filled")
        made = World(tiny=tiny, cells=cells, bare=bare, filled=filled, digests={}, seconds=0)
        ran = made.run(filled, "fetch")
        assert ran.code == 0, ran.err
        home = clone(filled, root / "undisturbed")
        started = time.monotonic()
        digests = {cells[0].id: made.digest(home, cells[0])}
        seconds = time.monotonic() - started
        digests |= {cell.id: made.digest(home, cell) for cell in cells[1:]}
        assert len(set(digests.values())) == len(cells)
        shutil.rmtree(home)
        yield World(tiny=tiny, cells=cells, bare=bare, filled=filled, digests=digests, seconds=seconds)
        shutil.rmtree(bare)
        shutil.rmtree(filled)


def require_whole(home: Path, *, known: Path) -> None:
    """Fail if a blob that is not of `known` has another hash than its name."""
    for path in (home / "blobs").iterdir():
        if not (known / "blobs" / path.name).exists():
            with path.open("rb") as file:
                assert sha256_of(file) == path.name
    for manifest in (home / "proofs").rglob("*.json"):
        assert not manifest.name.startswith(".") or manifest.name.endswith(".tmp")
        if not manifest.name.startswith("."):
            json.loads(manifest.read_bytes())


def require_clean(home: Path) -> None:
    """Fail if something is left of work that is done."""
    assert list((home / "work").iterdir()) == []
    assert list((home / "partial").iterdir()) == []
    assert [path for path in home.rglob("*.tmp") if path.is_file()] == []


# --------------------------------------------------------------------------- killed


def test_killed_at_any_moment(world: World, tmp_path: Path) -> None:
    cell = world.cells[0]
    home = clone(world.bare, tmp_path / "home")
    chance = random.Random()
    seed = chance.randrange(10**6)
    chance.seed(seed)
    killed = 0
    for _ in range(8):
        with world.start(home, "build", cell.id) as process:
            try:
                # Not before it does something: what its start takes differs between machines.
                process.wait(chance.uniform(0.2, 1.1) * world.seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                killed += 1
        require_whole(home, known=world.bare)
    assert killed, "nothing was killed"
    assert world.digest(home, cell) == world.digests[cell.id], f"seed {seed}"
    require_whole(home, known=world.bare)
    require_clean(home)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after", ["base", "layer 1 of", "layer 3 of"])
def test_interrupted(world: World, tmp_path: Path, number: int, after: str) -> None:
    cell = world.cells[0]
    home = clone(world.filled, tmp_path / "home")
    with world.start(home, "build", cell.id) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if after in line:
                break
        else:
            pytest.fail(f"it never came to {after!r}")
        process.send_signal(number)
        sent = time.monotonic()
        rest = process.stderr.read()
        code = process.wait(60)
    assert code == 130, rest
    assert "Traceback" not in rest
    assert "stopped; what is finished is kept" in rest
    assert time.monotonic() - sent < 10
    assert not list((home / "proofs").rglob("*.json")), "what was not proven is not recorded"
    require_whole(home, known=world.filled)
    require_clean(home)
    assert world.digest(home, cell) == world.digests[cell.id]


# --------------------------------------------------------------------------- several at once


def together(world: World, home: Path, cells: Sequence[Cell]) -> dict[str, set[str]]:
    """Build all at the same time, each in a process, and return the digests by cell."""
    processes = [(cell, world.start(home, "build", cell.id, "--json")) for cell in cells]
    found: dict[str, set[str]] = {}
    for cell, process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        found.setdefault(cell.id, set()).add(json.loads(out)[0]["digest"])
    return found


@pytest.mark.parametrize("count", [1, 4])
def test_at_once_in_one_store(world: World, tmp_path: Path, count: int) -> None:
    """Two runs of each of so many cells."""
    cells = world.cells[:count]
    home = clone(world.bare, tmp_path / "home")
    world.tiny.server.requests.clear()
    found = together(world, home, [*cells, *cells] if count == 1 else cells)
    assert found == {cell.id: {world.digests[cell.id]} for cell in cells}
    for wheel in world.wheels(*cells).values():
        assert len(world.tiny.server.asked(IndexServer.file(wheel))) == 1, wheel.filename
    require_whole(home, known=world.bare)
    require_clean(home)


def test_remembered_layers_are_made_again_at_once(world: World, tmp_path: Path) -> None:
    """All wheels are there, and each cell shares layers with another: who is first makes them, who waits gets them."""
    home = clone(world.filled, tmp_path / "home")
    for _ in range(2):
        assert together(world, home, world.cells) == {cell.id: {world.digests[cell.id]} for cell in world.cells}
        shutil.rmtree(home / "proofs")
        for path in sorted((home / "layers").iterdir())[::2]:
            path.unlink()


# --------------------------------------------------------------------------- no room


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 320 MiB: the base, its packages and a Python fit, and little else."""
    directory = tmp_path / "small"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=320m", "tmpfs", str(directory)]
    if subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system takes root")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def leave(directory: Path, size: int) -> Path:
    """Fill the disk but for so many bytes."""
    ballast = directory / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(directory).free - size)
    return ballast


def test_a_full_disk(world: World, small_disk: Path) -> None:
    cell = world.cells[0]
    home = clone(world.filled, small_disk / "home")
    codes = []
    for size in (0, 64 << 10, 8 << 20, 24 << 20, 40 << 20):
        ballast = leave(small_disk, size)
        ran = world.run(home, "build", cell.id)
        codes.append(ran.code)
        assert ran.code in (0, 9), ran.err
        assert "Traceback" not in ran.err
        require_whole(home, known=world.filled)
        ballast.unlink()
        if ran.code == 0:
            break
        assert "free" in ran.err, "what helps is said"
        assert not list((home / "proofs").rglob("*.json"))
        assert list((home / "work").iterdir()) == [], "what did not fit is not left to fill the disk"
    assert codes[0] == 9
    assert codes.count(9) >= 3, codes
    assert world.digest(home, cell) == world.digests[cell.id]
    require_whole(home, known=world.filled)
    require_clean(home)


def test_no_room_for_the_wheels(world: World, small_disk: Path) -> None:
    home = clone(world.bare, small_disk / "home")
    ran = world.run(home, "build", world.cells[0].id)
    assert ran.code == 9
    assert "not enough disk to fetch" in ran.err
    require_clean(home)


# --------------------------------------------------------------------------- another machine


def unshared(*arguments: str) -> tuple[str, ...]:
    """Return what runs a command in namespaces of its own; skips the test where that is not allowed."""
    command = ("unshare", *arguments)
    if subprocess.run([*command, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("namespaces take root")
    return command


def test_without_network(world: World, tmp_path: Path) -> None:
    cell = world.cells[0]
    home = clone(world.filled, tmp_path / "home")
    with world.start(home, "build", cell.id, "--json", before=unshared("--net")) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(out)[0]["digest"] == world.digests[cell.id]


def test_without_network_and_without_a_wheel(world: World, tmp_path: Path) -> None:
    cell = world.cells[0]
    home = clone(world.filled, tmp_path / "home")
    torch = next(one for one in world.wheels(cell).values() if one.project == "torch")
    (home / "blobs" / torch.sha256).unlink()
    with world.start(home, "build", cell.id, before=unshared("--net")) as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == 7, err
    assert torch.filename in err
    assert "Traceback" not in err
    require_clean(home)


def test_under_another_name_of_the_host(world: World, tmp_path: Path) -> None:
    cell = world.cells[0]
    home = clone(world.filled, tmp_path / "home")
    renamed = "import os, socket, sys; socket.sethostname('elsewhere'); os.execvp(sys.argv[1], sys.argv[1:])"
    before = (*unshared("--uts"), sys.executable, "-c", renamed)
    with world.start(home, "build", cell.id, "--json", before=before) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(out)[0]["digest"] == world.digests[cell.id]


# --------------------------------------------------------------------------- damage


def test_a_damaged_wheel_is_fetched_again(world: World, tmp_path: Path) -> None:
    cell = world.cells[0]
    home = clone(world.filled, tmp_path / "home")
    world.tiny.server.requests.clear()
    torch = next(one for one in world.wheels(cell).values() if one.project == "torch")
    path = home / "blobs" / torch.sha256
    path.unlink()  # a link: the other stores keep theirs
    content = bytearray(torch.content)
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    ran = world.run(home, "build", cell.id, "--json")
    assert ran.code == 0, ran.err
    assert "fetching again" in ran.err
    assert ran.document[0]["digest"] == world.digests[cell.id]
    assert len(world.tiny.server.asked(IndexServer.file(torch))) == 1
    assert hashlib.sha256(path.read_bytes()).hexdigest() == torch.sha256
