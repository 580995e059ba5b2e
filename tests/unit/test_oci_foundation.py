"""Foundations: where a base has its Python and what its directories are like, and no damaged base gets further."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zstandard

from builder import layout, registry, tar
from builder.base import BaseImage
from builder.engines.oci import foundation as foundations
from builder.engines.oci.foundation import Foundation, foundation_of, open_tar
from builder.errors import CellFailedError, HashMismatchError, SourceError
from builder.layout import MEDIA_LAYER_GZIP, MEDIA_LAYER_TAR, MEDIA_LAYER_ZSTD, Descriptor, Layer
from builder.registry import PulledImage
from builder.render import Plan
from builder.store import Store
from tests.support import cells
from tests.support.bases import (
    EPOCH,
    base_entries,
    bootstrap_cell,
    damage,
    directory,
    fake_base,
    layer_of,
    noise,
    plan_of,
    wheels_of,
)


@pytest.fixture(scope="module")
def plan() -> Plan:
    cell = bootstrap_cell()
    return plan_of(cell, wheels_of(cell))


@pytest.fixture(scope="module")
def on_image() -> Plan:
    cell = cells.cell()
    return plan_of(cell, wheels_of(cell))


def put_layer(store: Store, raw: bytes, media_type: str = MEDIA_LAYER_GZIP, content: bytes = b"") -> Layer:
    store.put(raw)
    blob = Descriptor(media_type=media_type, digest=f"sha256:{hashlib.sha256(raw).hexdigest()}", size=len(raw))
    return Layer(blob=blob, diff_id=f"sha256:{hashlib.sha256(content or raw).hexdigest()}")


def pulled(
    monkeypatch: pytest.MonkeyPatch, plan: Plan, layers: Sequence[Layer], document: Mapping[str, Any] | None = None
) -> None:
    """Have the registry give an image of these layers."""

    def pull(reference: str, *, platform: str, store: Store) -> PulledImage:
        assert reference == plan.cell.base.image
        assert platform == "linux/amd64"
        nothing = Descriptor(media_type="x", digest="sha256:" + "0" * 64, size=0)
        return PulledImage(
            manifest=nothing,
            config=nothing,
            document=document or {"config": {"Env": ["PATH=/usr/local/bin:/usr/bin"]}},
            layers=tuple(layers),
            architecture="amd64",
        )

    monkeypatch.setattr(registry, "pull", pull)


def python_at(*places: str) -> list[tar.Entry]:
    return [tar.file_entry(f"{place}/python3.11", b"", mode=0o755) for place in places]


# --------------------------------------------------------------------------- a bootstrap base


def test_a_bootstrap_base(plan: Plan, store: Store) -> None:
    base = fake_base(store)
    found = foundation_of(plan, base, store)
    assert [layer.blob for layer in found.layers] == [base.layer]
    assert found.home == "/usr/bin"
    assert found.config["Cmd"] == ["/bin/bash"]
    assert [line.created_by for line in found.history] == ["a base"]
    assert found.search[-2:] == ("/sbin", "/bin")
    assert found.directories == {
        **dict.fromkeys(("etc", "home", "opt", "usr", "usr/local", "usr/local/share"), (493, 0, 0, EPOCH)),
        **dict.fromkeys(("home/torch", "workspace"), (509, 1000, 0, EPOCH)),
    }


def test_it_is_looked_at_once(plan: Plan, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    base = fake_base(store)
    first = foundation_of(plan, base, store)
    monkeypatch.setattr(foundations, "open_tar", lambda *_: pytest.fail("read again"))
    assert foundation_of(plan, base, store) == first


@pytest.mark.parametrize("rubbish", [b"", b"[]", b"{}", b'{"home": "/usr/bin"}', b"\xff"])
def test_what_is_remembered_may_be_rubbish(plan: Plan, store: Store, rubbish: bytes) -> None:
    base = fake_base(store)
    first = foundation_of(plan, base, store)
    (path,) = (store.root / "foundations").iterdir()
    path.write_bytes(rubbish)
    assert foundation_of(plan, base, store) == first


def test_the_digest_is_that_of_the_files(plan: Plan, store: Store) -> None:
    first = foundation_of(plan, fake_base(store), store)
    other = replace(first, config={"Env": ["A=b"]}, history=())
    assert other.digest == first.digest
    changed = replace(first, layers=(layer_of(store, base_entries("3.12")),))
    assert changed.digest != first.digest


# --------------------------------------------------------------------------- directories and system packages


def with_directories(*directories: str) -> Plan:
    cell = bootstrap_cell()
    cell = replace(cell, variant=cell.variant.model_copy(update={"directories": directories}))
    return plan_of(cell, wheels_of(cell))


def test_what_lies_above_the_plan_s_directories_is_looked_at(store: Store) -> None:
    base = fake_base(store, entries=[*base_entries(), directory("srv", 0o700), directory("srv/models", 0o750, uid=5)])
    found = foundation_of(with_directories("/srv/models/large", "/cache"), base, store).directories
    assert found["srv"] == (0o700, 0, 0, EPOCH)
    assert found["srv/models"] == (0o750, 5, 0, EPOCH)
    assert "cache" not in found
    assert "srv" not in foundation_of(with_directories("/cache"), base, store).directories


LINK = tar.Entry(path="lib", kind=tar.Kind.SYMLINK, mode=0o777, target="usr/lib")


@pytest.mark.parametrize("path", ["/lib", "/lib/models", "/usr/bin/python3.11", "/usr/bin/python3.11/x"])
def test_a_directory_takes_the_place_of_no_link_and_no_file(store: Store, path: str) -> None:
    base = fake_base(store, entries=[*base_entries(), LINK])
    with pytest.raises(CellFailedError, match=r"/(lib|usr/bin/python3\.11) is no directory in the base") as caught:
        foundation_of(with_directories(path), base, store)
    assert caught.value.problems[0].tries
    assert foundation_of(with_directories("/models"), base, store).home == "/usr/bin"


def test_a_link_that_became_a_directory(on_image: Plan, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    link = replace(LINK, path="opt")
    below = layer_of(store, [*python_at("usr/bin"), link])
    pulled(monkeypatch, on_image, [below, layer_of(store, [directory("opt")])])
    assert foundation_of(on_image, None, store).directories["opt"] == (0o755, 0, 0, EPOCH)
    pulled(monkeypatch, on_image, [below, layer_of(store, [tar.file_entry(".wh.opt", b"")])])
    assert "opt" not in foundation_of(on_image, None, store).directories
    pulled(monkeypatch, on_image, [layer_of(store, [*python_at("usr/bin"), directory("opt")]), layer_of(store, [link])])
    with pytest.raises(CellFailedError, match="/opt is no directory"):
        foundation_of(on_image, None, store)


def with_system(store: Store, *entries: tar.Entry) -> BaseImage:
    return fake_base(store, system=entries)


def test_system_packages_are_a_layer_apart(plan: Plan, store: Store) -> None:
    plain = foundation_of(plan, fake_base(store), store)
    assert plain.system is None
    base = with_system(store, directory("usr/local", 0o700), directory("opt"), *python_at("usr/local/bin"))
    found = foundation_of(plan, base, store)
    assert found.system == base.system
    assert found.layers == plain.layers
    assert found.digest == plain.digest, "bytecode is shared with whoever has no such packages"
    assert found.home == "/usr/bin", "packages are compiled by the base's own Python"
    assert found.directories == {**plain.directories, "usr/local": (0o700, 0, 0, EPOCH)}


@pytest.mark.parametrize(
    "path",
    [
        "opt/venv", "opt/venv/bin/x", "opt/.wh.venv", ".wh.opt", "opt/venv/.wh.lib", "opt/.wh..wh..opq",
        ".wh..wh..opq", "opt/venv/lib/.wh..wh..opq",
    ],
)  # fmt: skip
def test_system_packages_leave_the_environment_alone(plan: Plan, store: Store, path: str) -> None:
    base = with_system(store, directory("opt"), tar.file_entry("usr/x", b""), tar.file_entry(path, b""))
    for _ in range(2):  # seen, and then remembered
        with pytest.raises(CellFailedError, match="would change what lies below /opt/venv") as caught:
            foundation_of(plan, base, store)
        assert caught.value.problems[0].where == f"/{path}"


@pytest.mark.parametrize("path", ["opt/venv2", "opt/.wh.venv2", "usr/.wh..wh..opq", "usr/opt/venv/x", "opt/o/.wh.x"])
def test_system_packages_may_do_the_rest(plan: Plan, store: Store, path: str) -> None:
    base = with_system(store, tar.file_entry(path, b""))
    assert foundation_of(plan, base, store).system == base.system


def test_system_packages_that_replace_a_directory(plan: Plan, store: Store) -> None:
    with pytest.raises(CellFailedError, match="/opt is no directory"):
        foundation_of(plan, with_system(store, replace(LINK, path="opt")), store)


# --------------------------------------------------------------------------- an image of a registry


def test_the_first_python_on_the_path_counts(on_image: Plan, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [layer_of(store, python_at("usr/bin")), layer_of(store, python_at("usr/local/bin", "opt/bin"))]
    pulled(monkeypatch, on_image, layers)
    assert foundation_of(on_image, None, store).home == "/usr/local/bin"
    pulled(monkeypatch, on_image, layers, {"config": {"Env": ["PATH=/opt/bin/:/usr/bin"]}})
    assert foundation_of(on_image, None, store).home == "/opt/bin"
    pulled(monkeypatch, on_image, layers, {})
    assert foundation_of(on_image, None, store).home == "/usr/local/bin", "the system's own path"


def test_a_link_is_a_python_too(on_image: Plan, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    link = tar.Entry(path="usr/bin/python3.11", kind=tar.Kind.SYMLINK, mode=0o777, target="/opt/p/bin/python3.11")
    pulled(monkeypatch, on_image, [layer_of(store, [link])])
    assert foundation_of(on_image, None, store).home == "/usr/bin"


def test_a_python_that_was_removed(on_image: Plan, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = layer_of(store, [tar.file_entry("usr/local/bin/.wh.python3.11", b"")])
    both = layer_of(store, python_at("usr/local/bin", "usr/bin"))
    pulled(monkeypatch, on_image, [both, gone])
    assert foundation_of(on_image, None, store).home == "/usr/bin"
    pulled(monkeypatch, on_image, [both, gone, both])
    assert foundation_of(on_image, None, store).home == "/usr/local/bin", "and came back"


def test_no_python(on_image: Plan, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    pulled(monkeypatch, on_image, [layer_of(store, base_entries("3.12"))])
    with pytest.raises(CellFailedError, match=r"the base has no python3\.11") as caught:
        foundation_of(on_image, None, store)
    (problem,) = caught.value.problems
    assert "/usr/local/bin, /usr/bin" in problem.why
    assert problem.where == on_image.cell.base_name
    assert problem.tries


def test_a_later_layer_changes_a_directory(on_image: Plan, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [layer_of(store, base_entries()), layer_of(store, [directory("opt", 0o700, uid=7, mtime=9)])]
    pulled(monkeypatch, on_image, layers)
    found = foundation_of(on_image, None, store)
    assert found.directories["opt"] == (0o700, 7, 0, 9)
    assert found.directories["usr"] == (0o755, 0, 0, EPOCH)


HISTORY = [
    {"created_by": "one", "comment": "c"},
    {"created_by": "nothing", "empty_layer": True},
    {"created_by": "two"},
]


def test_the_history_is_kept_where_it_fits(on_image: Plan, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    two = [layer_of(store, base_entries()), layer_of(store, python_at("opt"))]
    pulled(monkeypatch, on_image, two, {"history": HISTORY})
    lines = foundation_of(on_image, None, store).history
    assert [(line.created_by, line.comment, line.empty) for line in lines] == [
        ("one", "c", False),
        ("nothing", "", True),
        ("two", "", False),
    ]
    for history in (HISTORY[:2], [*HISTORY, {}], None, []):
        pulled(monkeypatch, on_image, two, {"history": history})
        lines = foundation_of(on_image, None, store).history
        assert [line.created_by for line in lines] == ["base", "base"]


@pytest.mark.parametrize("media_type", [MEDIA_LAYER_TAR, MEDIA_LAYER_GZIP, MEDIA_LAYER_ZSTD])
def test_every_compression_is_read(
    on_image: Plan, store: Store, monkeypatch: pytest.MonkeyPatch, media_type: str
) -> None:
    content = b"".join(tar.stream([*base_entries(), tar.file_entry("ballast", noise(3 << 20))]))
    # Several members and frames, as other tools write them too.
    half = len(content) // 2
    by_type: Mapping[str, Callable[[bytes], bytes]] = {
        MEDIA_LAYER_TAR: bytes,
        MEDIA_LAYER_GZIP: gzip.compress,
        MEDIA_LAYER_ZSTD: zstandard.ZstdCompressor().compress,
    }
    compress = by_type[media_type]
    layer = put_layer(store, compress(content[:half]) + compress(content[half:]), media_type, content)
    pulled(monkeypatch, on_image, [layer])
    assert foundation_of(on_image, None, store).home == "/usr/bin"
    with open_tar(store, layer) as file:
        assert file.read() == content


# --------------------------------------------------------------------------- damage


def a_layer(store: Store, media_type: str) -> Layer:
    content = b"".join(tar.stream([*base_entries(), tar.file_entry("ballast", noise(300_000))]))
    if media_type == MEDIA_LAYER_TAR:
        return put_layer(store, content, media_type)
    if media_type == MEDIA_LAYER_ZSTD:
        return put_layer(store, zstandard.ZstdCompressor().compress(content), media_type, content)
    return put_layer(store, gzip.compress(content), media_type, content)


@pytest.mark.parametrize("media_type", [MEDIA_LAYER_TAR, MEDIA_LAYER_GZIP, MEDIA_LAYER_ZSTD])
@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.9, 1.0])
def test_a_damaged_layer_is_found_and_removed(
    on_image: Plan, store: Store, monkeypatch: pytest.MonkeyPatch, media_type: str, part: float
) -> None:
    layer = a_layer(store, media_type)
    path = store.path(layer.blob.sha256)
    damage(path, min(int(layer.blob.size * part), layer.blob.size - 1))
    pulled(monkeypatch, on_image, [layer])
    with pytest.raises(HashMismatchError, match="came out with other bytes"):
        foundation_of(on_image, None, store)
    assert not path.exists()
    assert not (store.root / "foundations").exists(), "nothing of it is remembered"


def test_a_layer_that_is_cut_short(on_image: Plan, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = a_layer(store, MEDIA_LAYER_GZIP)
    path = store.path(layer.blob.sha256)
    path.chmod(0o644)
    os.truncate(path, layer.blob.size // 2)
    pulled(monkeypatch, on_image, [layer])
    with pytest.raises(HashMismatchError):
        foundation_of(on_image, None, store)
    assert not path.exists()


def test_a_layer_that_is_gone(on_image: Plan, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = a_layer(store, MEDIA_LAYER_GZIP)
    store.path(layer.blob.sha256).unlink()
    pulled(monkeypatch, on_image, [layer])
    with pytest.raises(SourceError):
        foundation_of(on_image, None, store)


def strange_time() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        entry = tarfile.TarInfo("opt")
        entry.type, entry.pax_headers = tarfile.DIRTYPE, {"mtime": "inf"}
        archive.addfile(entry)
    return buffer.getvalue()


HOSTILE = {
    "no gzip": (b"no gzip at all, and longer than any header of one", MEDIA_LAYER_GZIP),
    "nothing": (b"", MEDIA_LAYER_GZIP),
    "half a gzip": (gzip.compress(noise(50_000))[:9000], MEDIA_LAYER_GZIP),
    "gzip of no tar": (gzip.compress(noise(50_000)), MEDIA_LAYER_GZIP),
    "gzip with rubbish behind it": (gzip.compress(noise(9)) + b"rubbish", MEDIA_LAYER_GZIP),
    "no zstd": (noise(50_000), MEDIA_LAYER_ZSTD),
    "zstd of no tar": (zstandard.ZstdCompressor().compress(noise(50_000)), MEDIA_LAYER_ZSTD),
    "no tar": (noise(50_000), MEDIA_LAYER_TAR),
    "half a tar": (b"".join(tar.stream([tar.file_entry("x", noise(5000))]))[:3000], MEDIA_LAYER_TAR),
    "endless time": (strange_time(), MEDIA_LAYER_TAR),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_layer_that_is_none(on_image: Plan, store: Store, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It has the digest that was asked for: whoever made it is to blame, not this disk."""
    raw, media_type = HOSTILE[name]
    layer = put_layer(store, raw, media_type)
    pulled(monkeypatch, on_image, [layer])
    with pytest.raises(CellFailedError) as caught:
        foundation_of(on_image, None, store)
    assert caught.value.problems[0].tries
    assert store.verify(layer.blob.sha256), "and it stays"


@pytest.mark.parametrize("mtime", ["-5", "1e30"])
def test_a_time_that_no_header_can_say(
    on_image: Plan, store: Store, monkeypatch: pytest.MonkeyPatch, mtime: str
) -> None:
    raw = strange_time().replace(b"mtime=inf", f"mtime={mtime}".ljust(9).encode()[:9])
    raw = raw.replace(b"mtime=-5 ", b"mtime=-05")
    python = b"".join(tar.stream(python_at("usr/bin")))
    pulled(monkeypatch, on_image, [put_layer(store, raw, MEDIA_LAYER_TAR), put_layer(store, python, MEDIA_LAYER_TAR)])
    found: Foundation = foundation_of(on_image, None, store)
    entry = directory("opt", mtime=found.directories["opt"][3])
    assert tarfile.TarInfo.frombuf(tar.header(entry), "utf-8", "strict").mtime == entry.mtime >= 0


def test_the_reader_s_own_error_stays_its_own(store: Store) -> None:
    layer = a_layer(store, MEDIA_LAYER_GZIP)
    with pytest.raises(LookupError), open_tar(store, layer):
        raise LookupError


def test_damage_outranks_what_a_reader_made_of_it(store: Store, tmp_path: Path) -> None:
    layer = a_layer(store, MEDIA_LAYER_GZIP)
    damage(store.path(layer.blob.sha256), layer.blob.size - 1)
    with pytest.raises(HashMismatchError), open_tar(store, layer):
        raise LookupError


def test_layouts_of_bases_are_where_the_store_has_them(plan: Plan, store: Store) -> None:
    base = fake_base(store)
    image = layout.read(base.layout)
    assert image is not None
    assert image.manifest.digest == base.digest
