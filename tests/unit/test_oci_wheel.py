"""Wheels that are sound are read as they are, and whatever is not is refused by name before anything is written."""

import hashlib
import io
import re
import stat
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.version import Version

from builder.engines.oci import wheel as wheel_module
from builder.engines.oci.wheel import EntryPoint, RecordHash, Wheel, open_wheel
from builder.errors import WheelError
from tests.support.evil import (
    EVIL,
    FILENAME,
    GOOD,
    INFORMATION,
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
from tests.support.wheels import FakeWheel, nccl_wheel, torch_wheel, wheel


def opened(directory: Path, content: bytes, filename: str = FILENAME) -> Wheel:
    path = directory / "blob"
    path.write_bytes(content)
    return open_wheel(path, filename=filename, sha256=hashlib.sha256(content).hexdigest())


def contents(it: Wheel) -> dict[str, bytes]:
    """Inflate every member from its raw bytes, as stated."""
    found = {}
    for path, member in it.members.items():
        raw = b"".join(it.raw(member))
        assert len(raw) == member.compressed_size
        found[path] = zlib.decompress(raw, -15) if member.method else raw
        assert (len(found[path]), zlib.crc32(found[path])) == (member.size, member.crc)
    return found


# --------------------------------------------------------------------------- sound wheels


SOUND = [
    wheel("Some.Project", "1.0+local.2"),
    wheel("stored", "1.0", compression=zipfile.ZIP_STORED),
    wheel("numpy", "2.3.1", tag="cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64"),
    torch_wheel("2.8.0", reports="2.8.0+cu128", cuda="12.8"),
    nccl_wheel("nvidia-nccl-cu12", "2.27.3"),
    wheel("naïve", "1!2.0rc1", files={"naïve/ä b.txt": b"x", "naïve/empty": b""}),
]


@pytest.mark.parametrize("sound", SOUND, ids=lambda sound: sound.filename)
def test_a_sound_wheel_is_read_as_it_is(tmp_path: Path, sound: FakeWheel) -> None:
    it = opened(tmp_path, sound.content, sound.filename)
    assert (it.name, it.version, it.filename, it.sha256) == (
        sound.project, sound.version, sound.filename, sound.sha256
    )  # fmt: skip
    with zipfile.ZipFile(io.BytesIO(sound.content)) as archive:
        assert contents(it) == {name: archive.read(name) for name in archive.namelist()}
        modes = {entry.filename: entry.external_attr >> 16 for entry in archive.infolist()}
    assert list(it.members) == sorted(it.members)
    assert {path for path, member in it.members.items() if member.executable} == {
        path for path, mode in modes.items() if mode & stat.S_IXUSR
    }
    assert it.read(f"{it.dist_info}/METADATA") == sound.metadata
    assert it.is_purelib == sound.filename.endswith("none-any.whl")
    assert it.record.keys() == it.members.keys()
    for path, content in contents(it).items():
        expected = (RecordHash(algorithm="sha256", digest=hashlib.sha256(content).digest()), len(content))
        assert it.record[path] == ((None, None) if path.endswith("/RECORD") else expected)


def test_scripts_and_data_are_known(tmp_path: Path) -> None:
    text = b"[console_scripts]\nrun = evil.main:start.now [extra]\n[gui_scripts]\nshow=evil:show\n[other]\nx = y\n"
    it = opened(tmp_path, pack(wheel_parts(MODULE_PART, Part(name=f"{INFORMATION}/entry_points.txt", content=text))))
    assert it.entry_points == (
        EntryPoint("run", "evil.main", "start.now", "console"),
        EntryPoint("show", "evil", "show", "gui"),
    )
    assert it.data == "evil-1.0.data"
    assert it.dist_info == INFORMATION


def test_other_spellings_of_name_and_version_are_the_same(tmp_path: Path) -> None:
    def spelled(part: Part) -> Part:
        return replace(part, name=part.name.replace(INFORMATION, "Evil-1.0.0.dist-info"))

    parts = [spelled(part) for part in (*wheel_parts(MODULE_PART)[:-1], Part(name="Evil-1.00.data/scripts/x"))]
    record = record_of(parts).replace(INFORMATION.encode(), b"Evil-1.0.0.dist-info")
    it = opened(tmp_path, pack([*parts, Part(name="Evil-1.0.0.dist-info/RECORD", content=record)]))
    assert (it.name, it.version) == ("evil", Version("1.0"))
    assert (it.dist_info, it.data) == ("Evil-1.0.0.dist-info", "Evil-1.00.data")


def test_a_name_may_have_a_comma_and_quotes(tmp_path: Path) -> None:
    part = Part(name='evil/a, "b".txt', content=b"x")
    assert contents(opened(tmp_path, pack(wheel_parts(part))))[part.name] == b"x"


def test_directories_are_no_members(tmp_path: Path) -> None:
    directory = Part(name="evil/", method=0, mode=0o040755, central={"attributes": 0o040755 << 16 | 0x10})
    deflated_directory = Part(name="evil/empty/", mode=0)
    it = opened(tmp_path, pack(wheel_parts(directory, deflated_directory, MODULE_PART)))
    assert MODULE in it.members
    assert not [path for path in it.members if path.endswith("/")]


def test_a_signature_needs_no_row_and_no_hash(tmp_path: Path) -> None:
    parts = [*GOOD, Part(name=f"{INFORMATION}/RECORD.jws", content=b"{}"), Part(name=f"{INFORMATION}/RECORD.p7s")]
    it = opened(tmp_path, pack(parts))
    assert it.record[f"{INFORMATION}/RECORD.jws"] == (None, None)
    assert it.record[f"{INFORMATION}/RECORD.p7s"] == (None, None)


def test_longer_hashes_and_rows_without_a_size_are_taken(tmp_path: Path) -> None:
    import base64

    lines = []
    for part, algorithm in ((MODULE_PART, "sha512"), (METADATA, "sha384"), (WHEEL, "sha256")):
        digest = base64.urlsafe_b64encode(hashlib.new(algorithm, part.content).digest()).rstrip(b"=").decode()
        lines.append(f"{part.name},{algorithm}={digest},\r\n")
    it = opened(tmp_path, pack(wheel_parts(MODULE_PART, record="".join(lines).encode())))
    expected = RecordHash(algorithm="sha512", digest=hashlib.sha512(TEXT).digest())
    assert it.record[MODULE] == (expected, None)
    assert it.record[f"{INFORMATION}/RECORD"] == (None, None)


_PACKED = deflated(TEXT)
_NUMBERS = (zlib.crc32(TEXT), len(_PACKED), len(TEXT))
_NO_SIZES = {"crc": 0, "compressed_size": 0, "size": 0}
_FULL = {"compressed_size": 0xFFFFFFFF, "size": 0xFFFFFFFF}
_BOTH = struct.pack("<2H2Q", 1, 16, len(TEXT), len(_PACKED))
_NONE = struct.pack("<2H2Q", 1, 16, 0, 0)
SHAPES: dict[str, Part] = {
    "descriptor": Part(name=MODULE, content=TEXT, local=_NO_SIZES, descriptor=struct.pack("<3L", *_NUMBERS)),
    "signed descriptor": Part(
        name=MODULE, content=TEXT, local=_NO_SIZES, descriptor=b"PK\7\x08" + struct.pack("<3L", *_NUMBERS)
    ),
    "descriptor though all was known": Part(name=MODULE, content=TEXT, descriptor=struct.pack("<3L", *_NUMBERS)),
    "wide descriptor": Part(
        name=MODULE,
        content=TEXT,
        local={**_FULL, "crc": 0},
        local_extra=_NONE,
        descriptor=b"PK\7\x08" + struct.pack("<L2Q", *_NUMBERS),
    ),
    "zip64 everywhere": Part(
        name=MODULE, content=TEXT, local=_FULL, central=_FULL, local_extra=_BOTH, central_extra=_BOTH
    ),
    "zip64 in its own header only": Part(name=MODULE, content=TEXT, local=_FULL, local_extra=_BOTH),
    "zip64 and plain sizes": Part(name=MODULE, content=TEXT, local_extra=_BOTH),
    "zip64 offset": Part(
        name=MODULE, content=TEXT, central={"offset": 0xFFFFFFFF}, central_extra=struct.pack("<2HQ", 1, 8, 0)
    ),
    "times and owners": Part(
        name=MODULE, content=TEXT, local_extra=b"UT\x05\0\1abcd" + b"ux\x04\0\1\0\1\0" * 1, central_extra=b"UT\1\0\1"
    ),
    "long local extra": Part(name=MODULE, content=TEXT, local_extra=b"XX\x00\x04" + bytes(1024)),
    "compressor's effort": Part(name=MODULE, content=TEXT, central={"flags": 2}, local={"flags": 4}),
    "no mode": Part(name=MODULE, content=TEXT, mode=0),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_honest_shape_of_an_entry_is_taken(tmp_path: Path, shape: Part) -> None:
    content = pack(wheel_parts(shape))
    it = opened(tmp_path, content)
    assert contents(it)[MODULE] == TEXT
    if "offset" not in shape.central:
        assert zipfile.ZipFile(io.BytesIO(content)).read(MODULE) == TEXT


@pytest.mark.parametrize("streamed", [False, True])
def test_what_zipfile_writes_in_its_large_form_is_taken(tmp_path: Path, *, streamed: bool) -> None:
    class Pipe(io.RawIOBase):
        """Cannot seek, so that sizes come late."""

        def __init__(self) -> None:
            self.content = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, piece: Any) -> int:
            self.content += piece
            return len(piece)

    pipe, buffer = Pipe(), io.BytesIO()
    with zipfile.ZipFile(pipe if streamed else buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in GOOD:
            with archive.open(part.name, "w", force_zip64=True) as file:
                file.write(part.content)
    it = opened(tmp_path, bytes(pipe.content) if streamed else buffer.getvalue())
    assert contents(it) == {part.name: part.content for part in GOOD}


def test_zip64_end_records_that_agree_are_taken(tmp_path: Path) -> None:
    for end in ({}, {"here": 0xFFFF, "count": 0xFFFF, "size": 0xFFFFFFFF, "start": 0xFFFFFFFF}):
        assert contents(opened(tmp_path, pack(GOOD, zip64={}, end=end)))[MODULE] == TEXT


def test_entries_may_be_listed_in_any_order(tmp_path: Path) -> None:
    content = pack(GOOD)
    start = struct.unpack("<L", content[-6:-2])[0]
    records, at = [], start
    while at < len(content) - 22:
        size = 46 + struct.unpack_from("<H", content, at + 28)[0]
        records.append(content[at : at + size])
        at += size
    shuffled = content[:start] + b"".join(reversed(records)) + content[-22:]
    assert contents(opened(tmp_path, shuffled)) == contents(opened(tmp_path, content))


def test_execution_needs_a_file_type_and_a_bit_as_for_pip(tmp_path: Path) -> None:
    modes = {"a": 0o100755, "b": 0o100644, "c": 0o755, "d": 0o100601, "e": 0}
    parts = [Part(name=f"evil/{name}", mode=mode) for name, mode in modes.items()]
    it = opened(tmp_path, pack(wheel_parts(*parts)))
    assert [path for path, member in it.members.items() if member.executable] == ["evil/a", "evil/d"]


def test_small_things_may_compress_well(tmp_path: Path) -> None:
    zeros = bytes(wheel_module.RATIO_MATTERS_FROM - (1 << 20))
    assert len(zeros) > 900 * len(deflated(zeros))
    it = opened(tmp_path, pack(wheel_parts(MODULE_PART, Part(name="evil/zeros", content=zeros))))
    assert it.members["evil/zeros"].size == len(zeros)


# --------------------------------------------------------------------------- reading members


def test_content_is_read_only_if_small_and_true(tmp_path: Path) -> None:
    it = opened(tmp_path, pack(GOOD))
    assert it.read(MODULE, len(TEXT)) == TEXT
    assert it.head(it.members[MODULE], 10) == TEXT[:10]
    assert it.head(it.members["evil/data.bin"], 3) == b"\0\1\2"
    with pytest.raises(WheelError, match=rf"{MODULE}: has {len(TEXT)} bytes"):
        it.read(MODULE, len(TEXT) - 1)


@pytest.mark.parametrize("evil", [one for one in EVIL if one.stage == "inflate"], ids=lambda evil: evil.title)
def test_false_content_passes_when_opened_and_not_when_read(tmp_path: Path, evil: EvilWheel) -> None:
    it = opened(tmp_path, evil.content, evil.filename)
    if evil.title == "wrong RECORD hash":
        promised, _ = it.record[MODULE]
        assert promised is not None
        assert promised.digest != hashlib.sha256(it.read(MODULE)).digest()
    else:
        with pytest.raises(WheelError, match=f"{FILENAME}: {MODULE}: "):
            it.read(MODULE)


def test_false_metadata_does_not_pass(tmp_path: Path) -> None:
    lie = {"crc": 1}
    with pytest.raises(WheelError, match="METADATA: has another CRC"):
        opened(tmp_path, pack(wheel_parts(MODULE_PART, metadata=replace(METADATA, central=lie, local=lie))))


def test_a_file_cut_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    it = opened(tmp_path, pack(GOOD))
    it.path.write_bytes(pack(GOOD)[:60])
    with pytest.raises(WheelError, match="ends in the middle"):
        it.read(MODULE)


# --------------------------------------------------------------------------- evil wheels


@pytest.mark.parametrize("evil", [one for one in EVIL if one.stage == "open"], ids=lambda evil: evil.title)
def test_an_evil_wheel_is_refused_by_name(tmp_path: Path, evil: EvilWheel) -> None:
    with pytest.raises(WheelError, match=evil.message) as caught:
        opened(tmp_path, evil.content, evil.filename)
    (problem,) = caught.value.problems
    assert problem.where.startswith(evil.filename)
    assert problem.tries
    assert str(problem).isprintable()


def test_each_evil_wheel_has_its_own_title_and_only_what_they_share_is_sound(tmp_path: Path) -> None:
    assert len({one.title for one in EVIL}) == len(EVIL)
    assert contents(opened(tmp_path, pack(wheel_parts(MODULE_PART))))[MODULE] == TEXT


def test_a_bomb_is_refused_at_once(tmp_path: Path) -> None:
    bomb = next(one for one in EVIL if one.title == "bomb by count")
    content = bomb.content
    before = time.perf_counter()
    with pytest.raises(WheelError):
        opened(tmp_path, content)
    assert time.perf_counter() - before < 2


# --------------------------------------------------------------------------- mutated wheels

_SEEDS = (pack(GOOD), pack(wheel_parts(SHAPES["wide descriptor"]), zip64={}), wheel("evil", "1.0").content)


def _flip(content: bytes, at: int, _: int, value: int) -> bytes:
    return content[:at] + bytes([content[at] ^ (value or 1)]) + content[at + 1 :]


def _cut(content: bytes, at: int, size: int, _: int) -> bytes:
    return content[:at] + content[at + size :]


def _insert(content: bytes, at: int, size: int, value: int) -> bytes:
    return content[:at] + bytes([value]) * size + content[at:]


def _repeat(content: bytes, at: int, size: int, _: int) -> bytes:
    return content[: at + size] + content[at:]


Mutation = tuple[Callable[[bytes, int, int, int], bytes], float, int, int]
MUTATIONS = st.tuples(
    st.sampled_from([_flip, _cut, _insert, _repeat]),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 300),
    st.integers(0, 255),
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(_SEEDS), st.lists(MUTATIONS, min_size=1, max_size=4))
def test_whatever_happens_to_its_bytes_a_wheel_is_refused_or_sound(
    tmp_path: Path, content: bytes, mutations: list[Mutation]
) -> None:
    for mutate, where, size, value in mutations:
        if content:
            content = mutate(content, int(where * len(content)), size, value)
    try:
        it = opened(tmp_path, content)
    except WheelError as error:
        assert str(error).isprintable()  # noqa: PT017 - most mutations end here, not all
        return
    ranges = sorted((one.offset, one.offset + one.compressed_size) for one in it.members.values())
    assert all(0 <= start <= end <= len(content) for start, end in ranges)
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))
    assert all(re.match(r"[^/\\]", path) and ".." not in path.split("/") for path in it.members)


def test_every_byte_of_every_header_counts_or_is_harmless(tmp_path: Path) -> None:
    """Flip bits in each byte of the structure: whatever is still accepted must read exactly as before."""
    content = pack(wheel_parts(MODULE_PART))
    good = contents(opened(tmp_path, content))
    headers = [
        (found.start(), size)
        for mark, size in ((b"PK\1\2", 46), (b"PK\3\4", 30))
        for found in re.finditer(mark, content)
    ]
    places = {at + n for at, size in headers for n in range(size)}
    places |= set(range(len(content) - 22, len(content)))
    accepted = 0
    for place in sorted(places):
        for bit in (0, 3, 7):
            mutated = bytearray(content)
            mutated[place] ^= 1 << bit
            try:
                it = opened(tmp_path, bytes(mutated))
            except WheelError:
                continue
            accepted += 1
            assert contents(it) == good, place
    assert 0 < accepted < len(places)
