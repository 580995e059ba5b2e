"""Exports for real: engines, registries and other tools take them, and what a full or broken one leaves is nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import docker
import docker.errors
import pytest

from builder import base, compress, export, layout, tar
from builder.engines.docker import DockerEngine
from builder.engines.oci import recipe
from builder.errors import DiskError, HashMismatchError
from builder.layout import Descriptor, Image, Layer
from builder.store import Store

TEXT = b"spliced from two parts of a file\n"


@dataclass(frozen=True, kw_only=True)
class Made:
    """A store with an image of a base and one layer that is a recipe; `mark` is in no other run's."""

    store: Store
    base: Layer
    mark: bytes
    text: Layer

    @property
    def image(self) -> Image:
        return self.on_base(self.text)

    def on_base(self, *layers: Layer, cmd: str = "true") -> Image:
        return layout.assemble(
            self.store,
            architecture="amd64",
            config={"Env": list(base.ENV), "Cmd": [cmd]},
            epoch=1_700_000_000,
            layers=(self.base, *layers),
        )


def spliced(store: Store, path: str, content: bytes) -> Layer:
    """Keep a layer as a recipe of segments of two files, as wheels are spliced."""
    entry = tar.file_entry(path, content, mtime=1_700_000_000)
    whole = b"".join(tar.stream([entry]))
    members = [compress.member(part) for part in (whole[:512], content, whole[512 + len(content) :])]
    blob = b"".join(members)
    layer = Layer(
        blob=Descriptor(
            media_type=layout.MEDIA_LAYER_GZIP, digest=f"sha256:{hashlib.sha256(blob).hexdigest()}", size=len(blob)
        ),
        diff_id=f"sha256:{hashlib.sha256(whole).hexdigest()}",
    )
    sources = (store.put(members[0] + members[2]), store.put(b"a wheel " + members[1] + b" ends"))
    segments = ((0, 0, len(members[0])), (1, 8, len(members[1])), (0, len(members[0]), len(members[2])))
    recipe.keep(store, recipe.Recipe(layer=layer, sources=sources, segments=segments))
    return layer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, small_base: base.BaseImage) -> Made:
    store = Store.open(tmp_path_factory.mktemp("home"))
    shutil.copy(small_base.layout / "blobs" / "sha256" / small_base.layer.sha256, store.path(small_base.layer.sha256))
    # Unique: an engine that still has the bytes of an earlier run would not look at those that it is sent.
    mark = os.urandom(32)
    content = TEXT + mark + random.Random(1).randbytes(9 << 20)
    lower = Layer(blob=small_base.layer, diff_id=small_base.diff_id)
    return Made(store=store, base=lower, mark=mark, text=spliced(store, "srv/text", content))


@pytest.fixture
def engine() -> Iterator[DockerEngine]:
    """An engine that loses, after the test, what the test loaded into it."""
    engine = DockerEngine()
    before = {image.id for image in engine.client.images.list(all=True)}
    yield engine
    for image in engine.client.images.list(all=True):
        ours = any(tag.startswith("torchyard-export-test") for tag in image.tags)
        if image.id is not None and image.id not in before and ours:
            with contextlib.suppress(docker.errors.APIError):
                engine.client.images.remove(image.id, force=True)
    engine.client.close()


def need(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")


def call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


pytestmark = [pytest.mark.debian, pytest.mark.network, pytest.mark.slow]


# --- engines


@pytest.mark.engine
@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_an_engine_runs_what_it_was_sent(made: Made, engine: DockerEngine, compression: str) -> None:
    image = made.image if compression == "gzip" else export.recompressed(made.store, made.image)
    tags = (f"torchyard-export-test:{compression}", f"localhost:5000/torchyard-export-test:{compression}")
    assert not engine.holds(image.manifest.digest)
    sent: list[int] = []
    engine.load(export.archive(made.store, image, tags=tags), progress=sent.append)
    assert sum(sent) == export.archive_size(made.store, image, tags=tags)
    assert engine.has(image.manifest.digest)
    assert engine.holds(image.manifest.digest)
    assert set(engine.client.images.get(image.manifest.digest).tags) == set(tags)
    for name in (image.manifest.digest, tags[0]):
        ran = engine.run(name, ["head", "-n1", "/srv/text"], files={}, collect=["/srv/text"], timeout_s=60)
        assert (ran.exit_code, ran.log.encode()) == (0, TEXT)
    assert ran.files["/srv/text"].startswith(TEXT + made.mark)
    for tag in tags:
        engine.client.images.remove(tag)
    assert not engine.holds(image.manifest.digest)


@pytest.mark.engine
def test_an_engine_keeps_nothing_of_a_stream_that_broke_off(made: Made, engine: DockerEngine) -> None:
    image = made.on_base(spliced(made.store, "srv/broken", os.urandom(9 << 20)))
    wheel = recipe.find(made.store, image.layers[1].blob.sha256)
    assert wheel is not None
    path = made.store.path(wheel.sources[1])
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    with pytest.raises(HashMismatchError):
        engine.load(export.archive(made.store, image, tags=["torchyard-export-test:broken"]))
    assert not engine.has(image.manifest.digest)


@pytest.mark.engine
def test_holds_sees_through_an_image_with_wrong_bytes(made: Made, engine: DockerEngine) -> None:
    """Docker 28.5 takes it without a word, and `has` would be content; a later, whole archive mends it."""
    image = made.on_base(spliced(made.store, "srv/wrong", os.urandom(9 << 20)))

    def wrong(pieces: Iterable[bytes]) -> Iterator[bytes]:
        every = list(pieces)
        last = max(at for at, piece in enumerate(every) if len(piece) > 100_000)
        every[last] = bytes(len(every[last]))
        yield from every

    tags = ["torchyard-export-test:wrong"]
    engine.load(wrong(export.archive(made.store, image, tags=tags)))
    assert not engine.holds(image.manifest.digest)
    engine.load(export.archive(made.store, image, tags=tags))
    assert engine.holds(image.manifest.digest)


@pytest.mark.engine
def test_layers_that_the_engine_holds_need_not_be_sent(made: Made, engine: DockerEngine) -> None:
    common = spliced(made.store, "srv/common", os.urandom(9 << 20))
    first, second = made.on_base(common), made.on_base(common, cmd="false")
    omit = {layer.blob.digest for layer in first.layers}
    engine.load(export.archive(made.store, second, tags=["torchyard-export-test:2"], omit=omit))
    assert not engine.holds(second.manifest.digest), "nobody had sent the layer"
    assert second.manifest.digest not in engine.whole()
    engine.load(export.archive(made.store, first, tags=["torchyard-export-test:1"]))
    assert first.manifest.digest in engine.whole()
    assert export.layers_of(made.store, first.manifest.digest) == tuple(layer.blob.digest for layer in first.layers)
    engine.load(export.archive(made.store, second, tags=["torchyard-export-test:2"], omit=omit))
    assert engine.holds(second.manifest.digest)
    engine.client.images.remove("torchyard-export-test:1")
    ran = engine.run(second.manifest.digest, ["test", "-s", "/srv/common"], files={}, collect=(), timeout_s=60)
    assert ran.exit_code == 0


# --- other tools


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_skopeo_reads_archives_and_layouts(made: Made, tmp_path: Path, compression: str) -> None:
    need("skopeo")
    image = made.image if compression == "gzip" else export.recompressed(made.store, made.image)
    tag = "team/torchyard-export-test:1"
    export.write_archive(tmp_path / "image.tar", made.store, image, tags=[tag])
    export.write_layout(tmp_path / "layout", made.store, image, tag=tag)
    for number, source in enumerate((f"oci-archive:{tmp_path}/image.tar", f"oci:{tmp_path}/layout:1")):
        call("skopeo", "copy", "-q", source, f"dir:{tmp_path}/{number}")
        assert sha256(tmp_path / str(number) / "manifest.json") == image.manifest.sha256
        for blob in image.blobs[1:]:
            assert sha256(tmp_path / str(number) / blob.sha256) == blob.sha256
    call("skopeo", "copy", "-q", f"docker-archive:{tmp_path}/image.tar:{tag}", f"dir:{tmp_path}/legacy")
    assert (tmp_path / "legacy" / image.config.sha256).exists()


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    need("docker-registry")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(tmp_path / "registry")}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    (tmp_path / "registry.yml").write_text(json.dumps(settings))
    with (
        (tmp_path / "registry.log").open("wb") as log,
        subprocess.Popen(["docker-registry", "serve", tmp_path / "registry.yml"], stdout=log, stderr=log) as process,
    ):
        try:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                time.sleep(0.1)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


def test_a_registry_keeps_the_digest(made: Made, tmp_path: Path, registry: str) -> None:
    need("skopeo")
    export.write_layout(tmp_path / "out", made.store, made.image, tag="team/test:1")
    there = f"docker://{registry}/team/test:1"
    call("skopeo", "copy", "-q", "--dest-tls-verify=false", f"oci:{tmp_path}/out:1", there)
    call("skopeo", "copy", "-q", "--src-tls-verify=false", there, f"oci:{tmp_path}/back:1")
    assert layout.read(tmp_path / "back") == made.image
    layout.verify(tmp_path / "back", made.image)


# --- full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(directory)]
    if subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system takes root")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk_keeps_nothing_half_written(
    made: Made, small_disk: Path, monkeypatch: pytest.MonkeyPatch, *, foreseen: bool
) -> None:
    if not foreseen:  # somebody else fills it meanwhile
        monkeypatch.setattr(export, "_require_free", lambda *_: None)
    target = small_disk / "image.tar"
    target.write_bytes(b"old")
    with pytest.raises(DiskError) as caught:
        export.write_archive(target, made.store, made.image)
    assert caught.value.problems[0].where == str(small_disk)
    assert target.read_bytes() == b"old"
    assert [path.name for path in small_disk.iterdir()] == ["image.tar"]
    with pytest.raises(DiskError):
        export.write_layout(small_disk / "layout", made.store, made.image)
    assert not (small_disk / "layout" / "index.json").exists()
    assert not list(small_disk.rglob("*.tmp"))


def test_a_layout_on_another_disk_holds_copies(made: Made, small_disk: Path) -> None:
    image = layout.assemble(made.store, architecture="amd64", config={}, epoch=1, layers=made.image.layers[1:])
    export.write_layout(small_disk / "layout", made.store, image)
    assert layout.read(small_disk / "layout") == image
    layout.verify(small_disk / "layout", image)
    assert made.store.path(image.config.sha256).stat().st_nlink == 1
