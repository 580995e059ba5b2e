"""Layers spliced from wheels: what any gzip and tar reader finds in them, and what must not get into one."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import os
import random
import struct
import tarfile
import tracemalloc
import unicodedata
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import deflate
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builder.engines.oci import splice as splicing
from builder.engines.oci.install import SITE, Placed, placed
from builder.engines.oci.recipe import keep, pieces
from builder.engines.oci.splice import INLINE, TIME, Advance, Spliced
from builder.engines.oci.wheel import Member, Wheel, open_wheel
from builder.errors import WheelError
from builder.sha256 import Hasher
from builder.store import Store
from tests.support.evil import (
    EVIL,
    FILENAME,
    METADATA,
    MODULE,
    MODULE_PART,
    TEXT,
    WHEEL,
    EvilWheel,
    Part,
    deflated,
    pack,
    record_of,
    wheel_parts,
)
from tests.support.wheels import FakeWheel, cudnn_wheel, nccl_wheel, torch_wheel, wheel


def noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def words(size: int) -> bytes:
    """Text that deflate halves, different everywhere."""
    return b"".join(b"%x " % (n * 2654435761) for n in range(size // 8 + 1))[:size]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def quickly_deflated(content: bytes) -> bytes:
    return bytes(deflate.deflate_compress(content, 1))


def opened(store: Store, content: bytes, filename: str = FILENAME) -> Wheel:
    sha256 = store.put(content)
    return open_wheel(store.path(sha256), filename=filename, sha256=sha256)


def fake(store: Store, made: FakeWheel) -> Wheel:
    return opened(store, made.content, made.filename)


def splice(wheels: Sequence[tuple[Wheel, Sequence[Placed]]], *, advance: Advance | None = None) -> Spliced:
    with Hasher(2) as hasher:
        return splicing.splice(wheels, hasher=hasher, advance=advance)


def spliced(*wheels: Wheel) -> Spliced:
    return splice([(it, placed(it)) for it in wheels])


def blob_of(store: Store, made: Spliced) -> bytes:
    """Regenerate the layer from the store, as whoever pushes it does."""
    assert store.put(made.literals) == made.recipe.sources[0]
    keep(store, made.recipe)
    return b"".join(pieces(store, made.recipe.layer.blob))


def contents(it: Wheel) -> dict[str, bytes]:
    with zipfile.ZipFile(it.path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def check(store: Store, made: Spliced, *wheels: Wheel) -> bytes:
    """Assert that the layer is the placed files of `wheels` to readers that are not ours; return its blob."""
    blob = blob_of(store, made)
    layer = made.recipe.layer
    assert (layer.blob.digest, layer.blob.size) == (f"sha256:{hashlib.sha256(blob).hexdigest()}", len(blob))
    content = gzip.decompress(blob)
    assert layer.diff_id == f"sha256:{hashlib.sha256(content).hexdigest()}"
    expected = {}
    for it in wheels:
        inside = contents(it)
        for file in placed(it):
            assert (file.member is None) != (file.content is None)
            text = inside[file.member.path] if file.member else file.content
            expected[file.path] = (file.mode, text)
    found: dict[str, tuple[int, bytes | None]] = {}
    directories: set[str] = set()
    end = 0
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        for entry in archive:
            assert (entry.uid, entry.gid, entry.mtime, entry.uname, entry.gname) == (0, 0, TIME, "", "")
            assert entry.name not in {*found, *directories}
            parent = str(PurePosixPath(entry.name).parent)
            assert parent in {".", *directories}, "a directory comes before what is in it"
            if entry.isdir():
                directories.add(entry.name)
                assert entry.mode == (0o755 if entry.name == "opt" else 0o775)
            else:
                assert entry.isreg()
                stream = archive.extractfile(entry)
                assert stream is not None
                found[entry.name] = (entry.mode, stream.read())
            end = entry.offset_data + entry.size + -entry.size % 512
    assert found == expected
    assert list(found) == sorted(found)
    assert directories == {str(up) for path in found for up in PurePosixPath(path).parents} - {"."}
    assert content[end:] == bytes(1024)
    return blob


def places(made: Spliced) -> dict[tuple[int, int, int], int]:
    """Return where in the blob each segment starts."""
    starts = itertools.accumulate((length for _, _, length in made.recipe.segments), initial=0)
    return dict(zip(made.recipe.segments, starts, strict=False))


def is_kept(it: Wheel, member: Member, made: Spliced, blob: bytes, *, source: int = 1) -> bool:
    """Tell whether a member's raw stream stands in the blob, as a gzip member of its own."""
    at = places(made).get((source, member.offset, member.compressed_size))
    if at is None or member.method == 0:
        return False
    raw = b"".join(it.raw(member))
    assert blob[at : at + len(raw)] == raw
    assert blob[at - 10 : at] == bytes.fromhex("1f8b08000000000000ff")
    assert blob[at + len(raw) : at + len(raw) + 8] == struct.pack("<II", member.crc, member.size)
    assert gzip.decompress(blob[at - 10 : at + len(raw) + 8]) == contents(it)[member.path]
    return True


def stored(parts: Sequence[Part]) -> list[Part]:
    return [replace(part, method=0) for part in parts]


# --------------------------------------------------------------------------- sound layers

ANY = [
    wheel("Some.Project", "1.0+local.2"),
    wheel("stored", "1.0", compression=zipfile.ZIP_STORED, files={"stored/big.bin": noise(300_000)}),
    torch_wheel("2.8.0", reports="2.8.0+cu128", cuda="12.8"),
    nccl_wheel("nvidia-nccl-cu12", "2.27.3"),
    wheel("naïve", "1!2.0rc1", files={"naïve/ä b.txt": b"x", "naïve/empty": b"", "naïve/big": words(100_000)}),
]


@pytest.mark.parametrize("sound", ANY, ids=lambda sound: sound.filename)
def test_a_layer_holds_what_is_placed_and_nothing_else(store: Store, sound: FakeWheel) -> None:
    it = fake(store, sound)
    check(store, spliced(it), it)


def test_wheels_may_share_a_layer(store: Store) -> None:
    wheels = [fake(store, sound) for sound in ANY]
    made = spliced(*wheels)
    blob = check(store, made, *wheels)
    assert made.recipe.sources[1:] == tuple(it.sha256 for it in wheels)
    assert is_kept(wheels[4], wheels[4].members["naïve/big"], made, blob, source=5)


@pytest.mark.parametrize("size", [0, 1, INLINE - 1, INLINE, INLINE + 1, 65_535, 65_536, 200_000])
@pytest.mark.parametrize("method", [0, 8])
def test_streams_of_large_members_are_kept_as_they_are(store: Store, size: int, method: int) -> None:
    it = opened(store, pack(wheel_parts(MODULE_PART, Part(name="evil/x.bin", content=words(size), method=method))))
    made = spliced(it)
    blob = check(store, made, it)
    member = it.members["evil/x.bin"]
    if method == 8:
        assert is_kept(it, member, made, blob) == (size >= INLINE)
    taken = sum(length for source, _, length in made.recipe.segments if source == 1)
    assert taken == (member.compressed_size if size >= INLINE else 0)
    assert len(made.literals) < 4000 + (size if size < INLINE else size // 1000)


def test_stored_members_lie_in_blocks_of_the_longest_size(store: Store) -> None:
    it = opened(store, pack(wheel_parts(Part(name="evil/x.bin", content=noise(200_000), method=0))))
    at = it.members["evil/x.bin"].offset
    made = spliced(it)
    assert [segment for segment in made.recipe.segments if segment[0] == 1] == [
        (1, at + start, min(65_535, 200_000 - start)) for start in range(0, 200_000, 65_535)
    ]


@pytest.mark.parametrize("content", [bytes((15 << 20) + 4321), words(5 << 20)], ids=["zeros", "words"])
def test_a_member_that_grows_while_it_is_inflated_is_worked_through_in_parts(store: Store, content: bytes) -> None:
    it = opened(store, pack(wheel_parts(Part(name="evil/x.bin", content=content, raw=quickly_deflated(content)))))
    made = spliced(it)
    assert is_kept(it, it.members["evil/x.bin"], made, check(store, made, it))


def test_memory_is_bounded_however_much_comes_out(store: Store) -> None:
    content = noise(1_600_000) + bytes(120 << 20)
    it = opened(store, pack(wheel_parts(Part(name="evil/x.bin", content=content))))
    files = placed(it)
    tracemalloc.start()
    try:
        made = splice([(it, files)])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert it.members["evil/x.bin"].compressed_size < 2_000_000
    assert peak < 70 << 20
    assert f"{SITE}/evil/x.bin" in made.paths[FILENAME]


def test_memory_is_bounded_however_much_goes_in(store: Store) -> None:
    """Deflate allows blocks that hold nothing, any number of them."""
    raw = b"\0\0\0\xff\xff" * (24 << 20) + deflated(TEXT)
    it = opened(store, pack(wheel_parts(replace(MODULE_PART, raw=raw))))
    files = placed(it)
    tracemalloc.start()
    try:
        made = splice([(it, files)])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 70 << 20
    assert TEXT in gzip.decompress(blob_of(store, made))


def test_small_members_are_closed_now_and_then(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [Part(name=f"evil/{n:04}.py", content=words(3000)) for n in range(60)]
    it = opened(store, pack(wheel_parts(*parts)))
    whole = spliced(it)
    monkeypatch.setattr(splicing, "_FLUSH", 10_000)
    cut = spliced(it)
    check(store, cut, it)
    assert cut.recipe.layer.diff_id == whole.recipe.layer.diff_id
    assert cut.recipe.layer.blob != whole.recipe.layer.blob


LONG = [
    "evil/" + "d" * 200 + "/" + "f" * 200,
    "evil/" + "/".join("deep" for _ in range(40)) + "/x.py",
    "evil/" + "ä" * 100,
    "evil/snow \N{SNOWMAN} man.txt",
]


@pytest.mark.parametrize("name", LONG)
def test_long_and_foreign_paths_come_through(store: Store, name: str) -> None:
    it = opened(store, pack(wheel_parts(Part(name=name, content=words(5000)), MODULE_PART)))
    check(store, spliced(it), it)


def test_executable_bits_come_through(store: Store) -> None:
    it = opened(store, pack(wheel_parts(MODULE_PART, Part(name="evil/run.so", content=noise(9000), mode=0o100755))))
    check(store, spliced(it), it)
    modes = {file.path: file.mode for file in placed(it)}
    assert (modes[f"{SITE}/evil/run.so"], modes[f"{SITE}/{MODULE}"]) == (0o775, 0o664)


@pytest.mark.parametrize("shape", ["isal", "zlib"])
def test_the_layer_does_not_depend_on_what_inflates_it(
    store: Store, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    it = opened(store, pack(wheel_parts(MODULE_PART, Part(name="evil/x.bin", content=words(900_000)))))
    usual = spliced(it)
    if shape == "zlib":
        monkeypatch.setattr(splicing, "inflater", zlib)
    made = spliced(it)
    check(store, made, it)
    assert made == usual


def test_progress_is_the_compressed_bytes_of_the_members(store: Store) -> None:
    parts = [Part(name=f"evil/{method}", content=noise(700_000), method=method) for method in (0, 8)]
    it = opened(store, pack(wheel_parts(MODULE_PART, *parts)))
    seen: list[int] = []
    splice([(it, placed(it))], advance=seen.append)
    assert sum(seen) == sum(file.member.compressed_size for file in placed(it) if file.member)
    assert max(seen) <= 256 << 10


def test_a_run_can_be_stopped_between_two_parts_and_leaves_no_file_open(store: Store) -> None:
    class StopError(Exception):
        pass

    def stop(_: int) -> None:
        raise StopError

    it = opened(store, pack(wheel_parts(Part(name="evil/x", content=noise(700_000)))))
    before = open_files()
    with pytest.raises(StopError):
        splice([(it, placed(it))], advance=stop)
    assert open_files() == before


def test_a_wheel_that_is_gone_leaves_no_file_open(store: Store, tmp_path: Path) -> None:
    kept = fake(store, wheel("kept", "1.0"))
    path = tmp_path / "gone"
    path.write_bytes(pack(wheel_parts(MODULE_PART)))
    gone = open_wheel(path, filename=FILENAME, sha256="0" * 64)
    wheels = [(kept, placed(kept)), (gone, placed(gone))]
    path.unlink()
    before = open_files()
    with pytest.raises(FileNotFoundError):
        splice(wheels)
    assert open_files() == before


def test_paths_and_contents_are_known_by_wheel(store: Store) -> None:
    it, other = opened(store, pack(wheel_parts(MODULE_PART))), fake(store, wheel("other", "1.0"))
    made = spliced(it, other)
    assert made.paths.keys() == {it.filename, other.filename}
    assert made.paths[FILENAME].keys() == {file.path for file in placed(it)}
    assert made.paths[FILENAME][f"{SITE}/{MODULE}"] == f"sha256={hashlib.sha256(TEXT).hexdigest()}:664"
    requested = f"{SITE}/{it.dist_info}/REQUESTED"
    assert made.paths[FILENAME][requested] == f"sha256={hashlib.sha256(b'').hexdigest()}:664"


def test_facts_are_read_while_bytes_pass_by(store: Store) -> None:
    wheels = [
        torch_wheel("2.8.0", reports="2.8.0+cu128", cuda="12.8", architectures=("sm_90", "sm_80")),
        nccl_wheel("nvidia-nccl-cu12", "2.27.3"),
        cudnn_wheel("nvidia-cudnn-cu12", "9.10.2.21", tag="py3-none-manylinux_2_27_x86_64"),
        wheel("other", "1.0", files={"other/torch/version.py": b"__version__ = 'no'\n"}),
    ]
    assert spliced(*(fake(store, it) for it in wheels)).facts == {
        "torch": "2.8.0+cu128",
        "cuda": "12.8",
        "architectures": ["sm_80", "sm_90"],
        "nccl": "2.27.3",
        "cudnn_number": 91002,
    }


# --------------------------------------------------------------------------- the same bytes, always


def test_the_order_of_an_archive_does_not_matter(store: Store) -> None:
    parts = wheel_parts(*(Part(name=f"evil/{n}.py", content=words(n * 900)) for n in range(12)))
    shuffled = random.Random(3).sample(parts, len(parts))
    one, other = opened(store, pack(parts)), opened(store, pack(shuffled))
    assert one.sha256 != other.sha256
    assert spliced(one).recipe.layer == spliced(other).recipe.layer
    assert blob_of(store, spliced(one)) == blob_of(store, spliced(other))


def test_the_order_of_the_wheels_does_not_matter(store: Store) -> None:
    wheels = [fake(store, sound) for sound in ANY]
    made = spliced(*wheels)
    for order in itertools.islice(itertools.permutations(wheels), 1, 120, 17):
        again = spliced(*order)
        assert again.recipe.layer == made.recipe.layer
        assert (again.literals, again.paths, again.facts) == (made.literals, made.paths, made.facts)


def test_small_members_do_not_depend_on_how_the_wheel_packed_them(store: Store) -> None:
    parts = wheel_parts(MODULE_PART, Part(name="evil/x.py", content=words(INLINE - 1)))
    assert spliced(opened(store, pack(parts))).recipe.layer == spliced(opened(store, pack(stored(parts)))).recipe.layer


FIXED_LAYER = "sha256:a6603eb2ad1a59ce2a0776b5a1c9d392eef1d41d58bf7a10e3e3354eb43abc7f"
FIXED_DIFF_ID = "sha256:20807e580fd2e44a063d7268ee0c9e9d5f69b5f7bf45405041acd7cb88742977"


def test_a_known_wheel_gives_known_bytes(store: Store) -> None:
    """If this fails the bytes of all layers have changed: raise RECIPE, or remembered layers mix with new ones.

    Nothing in the wheel is compressed, so that no zlib has a part in it. What is compressed here is so by the pinned
    libdeflate, which has a test of its own; the script of the entry point, and how RECORD is written, are installer's.
    """
    text = b"[console_scripts]\nanswer = evil:answer\n"
    listed = stored(
        [
            MODULE_PART,
            Part(name="evil/data.bin", content=bytes(range(256)) * 400, mode=0o100755),
            Part(name="evil/" + "long" * 40, content=b"x" * INLINE),
            Part(name="evil-1.0.data/scripts/tool", content=b"#!python\nprint(1)\n"),
            Part(name="evil-1.0.dist-info/entry_points.txt", content=text),
            METADATA,
            WHEEL,
        ]
    )
    record = Part(name="evil-1.0.dist-info/RECORD", content=record_of(listed), method=0)
    it = opened(store, pack([*listed, record]))
    made = spliced(it)
    check(store, made, it)
    assert (made.recipe.layer.blob.digest, made.recipe.layer.diff_id) == (FIXED_LAYER, FIXED_DIFF_ID)


# --------------------------------------------------------------------------- two wheels, one path


def sharing(store: Store, *texts: bytes, compression: int = zipfile.ZIP_DEFLATED) -> list[Wheel]:
    return [
        fake(store, wheel(name, "1.0", files={"shared/x.py": text, f"{name}.py": b""}, compression=compression))
        for name, text in zip(("one", "two"), texts, strict=True)
    ]


@pytest.mark.parametrize("size", [100, 10_000])
def test_equal_files_of_two_wheels_are_there_once(store: Store, size: int) -> None:
    wheels = sharing(store, words(size), words(size))
    made = spliced(*wheels)
    check(store, made, *wheels)
    assert all(f"{SITE}/shared/x.py" in made.paths[it.filename] for it in wheels)


def test_equal_files_that_were_packed_differently_give_the_same_tar_in_any_order(store: Store) -> None:
    one, _ = sharing(store, words(10_000), b"")
    _, two = sharing(store, b"", words(10_000), compression=zipfile.ZIP_STORED)
    assert spliced(one, two).recipe.layer.diff_id == spliced(two, one).recipe.layer.diff_id
    check(store, spliced(one, two), one, two)
    check(store, spliced(two, one), two, one)


@pytest.mark.parametrize("size", [100, 10_000])
def test_different_files_of_two_wheels_are_refused(store: Store, size: int) -> None:
    wheels = sharing(store, words(size), words(size - 1) + b"!")
    for order in (wheels, wheels[::-1]):
        with pytest.raises(WheelError) as caught:
            spliced(*order)
        assert str(caught.value) == (
            f"{order[0].filename} and {order[1].filename} both install /{SITE}/shared/x.py, with different content"
        )


def test_different_modes_of_two_wheels_are_refused(store: Store) -> None:
    one = opened(store, pack(wheel_parts(Part(name="shared/x", content=TEXT, mode=0o100755))))
    two = fake(store, wheel("two", "1.0", files={"shared/x": TEXT}))
    with pytest.raises(WheelError, match="both install"):
        spliced(one, two)


# --------------------------------------------------------------------------- evil wheels

# Members as small as these are inlined; with INLINE 0 they take the way of the large ones. Tiny pieces reach every
# state in which a stream can be cut.
WAYS: dict[str, dict[str, int]] = {
    "inlined": {},
    "inlined in tiny pieces": {"_PIECE": 3, "_OUT": 5},
    "kept": {"INLINE": 0},
    "kept in tiny pieces": {"INLINE": 0, "_PIECE": 3, "_OUT": 5},
    "kept, byte by byte": {"INLINE": 0, "_PIECE": 1, "_OUT": 1},
}


@pytest.fixture(params=[*WAYS.values()], ids=[*WAYS])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in request.param.items():
        monkeypatch.setattr(splicing, name, value)


@pytest.fixture(params=["isal", "zlib"])
def inflater(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "zlib":
        monkeypatch.setattr(splicing, "inflater", zlib)


@pytest.mark.usefixtures("way", "inflater")
def test_sound_wheels_pass_every_way(store: Store) -> None:
    parts = wheel_parts(MODULE_PART, Part(name="evil/empty"), Part(name="evil/x", content=noise(999), method=0))
    it = opened(store, pack(parts))
    check(store, spliced(it), it)


@pytest.mark.usefixtures("way", "inflater")
@pytest.mark.parametrize("evil", [one for one in EVIL if one.stage == "inflate"], ids=lambda evil: evil.title)
def test_evil_wheels_are_refused_every_way(store: Store, evil: EvilWheel) -> None:
    it = opened(store, evil.content, evil.filename)
    with pytest.raises(WheelError, match=evil.message) as caught:
        spliced(it)
    (problem,) = caught.value.problems
    assert problem.what.startswith(f"{FILENAME}: {MODULE}: ")
    assert problem.why
    assert problem.tries


@pytest.mark.usefixtures("inflater")
@pytest.mark.parametrize("inline", [0, INLINE])
def test_nothing_hides_after_a_stream_whatever_was_taken_in_already(
    store: Store, monkeypatch: pytest.MonkeyPatch, inline: int
) -> None:
    """An inflater that stops because enough came out may have swallowed the stream's end, and what follows it."""
    monkeypatch.setattr(splicing, "INLINE", inline)
    text = TEXT[:100]
    for out, size in itertools.product((1, 7, 99, 100, 101), (1, 2, 7, 8, 9)):
        monkeypatch.setattr(splicing, "_OUT", out)
        it = opened(store, pack(wheel_parts(Part(name="evil/x", content=text, raw=deflated(text) + b"U" * size))))
        with pytest.raises(WheelError, match="goes on after its end"):
            spliced(it)


def test_nothing_hides_after_a_stream_that_ends_where_a_part_does(store: Store) -> None:
    for more in (0, 1, 258, 1000, 4000):
        content = bytes(splicing._OUT + more)
        it = opened(store, pack(wheel_parts(Part(name="evil/x", content=content, raw=deflated(content) + b"U"))))
        with pytest.raises(WheelError, match="goes on after its end"):
            spliced(it)


@pytest.mark.parametrize("method", [0, 8])
@pytest.mark.parametrize("size", [100, 600_000])
def test_a_wheel_that_is_cut_after_it_was_opened_is_refused(
    store: Store, tmp_path: Path, size: int, method: int
) -> None:
    content = pack(wheel_parts(Part(name="evil/x.bin", content=noise(size), method=method)))
    path = tmp_path / "wheel"
    path.write_bytes(content)
    it = open_wheel(path, filename=FILENAME, sha256=hashlib.sha256(content).hexdigest())
    files = placed(it)
    member = it.members["evil/x.bin"]
    # The last byte of a deflate stream holds its end, sometimes nothing else.
    for length in (0, 1, 50, member.compressed_size // 2, member.compressed_size - 1):
        path.write_bytes(content)
        os.truncate(path, member.offset + length)
        with pytest.raises(WheelError, match=r"ends too early|not as large|damaged"):
            splice([(it, files)])


@pytest.mark.parametrize("method", [0, 8])
@pytest.mark.parametrize("size", [100, 600_000])
def test_a_bit_that_flips_after_the_wheel_was_opened_is_noticed(
    store: Store, tmp_path: Path, size: int, method: int
) -> None:
    content = pack(wheel_parts(Part(name="evil/x.bin", content=words(size), method=method)))
    path = tmp_path / "wheel"
    path.write_bytes(content)
    it = open_wheel(path, filename=FILENAME, sha256=hashlib.sha256(content).hexdigest())
    files = placed(it)
    member = it.members["evil/x.bin"]
    for at in random.Random(1).sample(range(member.compressed_size - 1), 20):
        damaged = bytearray(content)
        damaged[member.offset + at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(WheelError, match=r"evil/x\.bin"):
            splice([(it, files)])


# --------------------------------------------------------------------------- any wheel

SIZES = st.one_of(
    st.integers(0, 1200),
    st.sampled_from([511, 512, 513, INLINE - 1, INLINE, INLINE + 1, 65_535, 65_536, 65_537, 131_070, 200_000]),
)
CONTENTS = st.builds(lambda make, size: make(size), st.sampled_from([bytes, noise, words]), SIZES)
NAMES = st.lists(st.text("abc.-_ äßñ中", min_size=1, max_size=60), min_size=1, max_size=4).map(
    lambda names: "/".join(f"{n}{name}" for n, name in enumerate(names))
)


@st.composite
def parts_of_wheels(draw: st.DrawFn) -> list[Part]:
    parts = []
    for number, name in enumerate(draw(st.lists(NAMES, max_size=6))):
        content = draw(CONTENTS)
        level = draw(st.integers(0, 9))
        packer = draw(st.sampled_from(["stored", "zlib", "libdeflate"]))
        if packer == "zlib":
            compressor = zlib.compressobj(level, zlib.DEFLATED, -15, draw(st.sampled_from([1, 9])))
            raw = compressor.compress(content) + compressor.flush()
        else:
            raw = bytes(deflate.deflate_compress(content, max(1, level)))
        path = unicodedata.normalize("NFC", f"evil/{number}/{name}")
        mode = draw(st.sampled_from([0o100644, 0o100755, 0]))
        if packer == "stored":
            parts.append(Part(name=path, content=content, method=0, mode=mode))
        else:
            parts.append(Part(name=path, content=content, raw=raw, mode=mode))
    return draw(st.permutations(wheel_parts(*parts)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts_of_wheels())
def test_any_wheel_comes_through(store: Store, parts: list[Part]) -> None:
    it = opened(store, pack(parts))
    made = spliced(it)
    blob = check(store, made, it)
    kept = [member for member in it.members.values() if is_kept(it, member, made, blob)]
    large = {part.name for part in parts if len(part.content) >= INLINE and part.method == 8}
    assert {member.path for member in kept} >= large - {f"{it.dist_info}/RECORD"}
