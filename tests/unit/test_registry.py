"""Images fetched by digest from a registry that refuses, breaks off, lies, and wants to know who asks."""

from __future__ import annotations

import base64
import gzip
import hashlib
import itertools
import json
import logging
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder import credentials, layout, registry, tar, transfer
from builder.credentials import Configuration, Credential
from builder.errors import HashMismatchError, ImpossibleError, MatrixError, SourceError, TorchyardError
from builder.layout import Descriptor, Image, Layer
from builder.reference import Platform, Reference
from builder.registry import PulledImage, pull
from builder.store import Store
from tests.support.registry_server import Answer, RegistryServer, TokenService

DIGEST = f"sha256:{'a' * 64}"
PASSWORD = "canary-password"
NONE = Configuration()

DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Wait for milliseconds, and see no configuration of this machine's."""
    monkeypatch.setattr(transfer, "BACKOFF_S", 0.001)
    monkeypatch.setattr(transfer, "BACKOFF_MAX_S", 0.01)
    empty = tmp_path / "registries.conf"
    empty.write_text("")
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith("TORCHYARD_"):
            monkeypatch.delenv(name)
    for name in ("REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "DOCKER_CONFIG", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(empty))


@pytest.fixture
def server() -> Iterator[RegistryServer]:
    with RegistryServer() as running:
        yield running


@pytest.fixture
def other() -> Iterator[RegistryServer]:
    """Another host, as far as clients can tell: another port."""
    with RegistryServer() as running:
        yield running


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An image, and the store where it was made."""

    image: Image
    store: Store

    def content(self, blob: Descriptor) -> bytes:
        return self.store.path(blob.sha256).read_bytes()


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    made = Store.open(tmp_path_factory.mktemp("made"))
    with made.scratch("sample") as scratch:
        layers = [
            layout.gzip_layer(made, tar.stream([tar.file_entry("data", content)]), scratch=scratch)
            for content in (random.Random(1).randbytes(100_000), b"small")
        ]
    image = layout.assemble(made, architecture="amd64", config={"Env": ["A=1"]}, epoch=0, layers=layers)
    return Sample(image=image, store=made)


def pulled(reference: str, store: Store, *, platform: str = "linux/amd64", **more: Any) -> PulledImage:
    return pull(reference, platform=platform, store=store, **more)


def assert_whole(store: Store, sample: Sample, found: PulledImage) -> None:
    assert found.manifest == sample.image.manifest
    assert found.config == sample.image.config
    assert found.layers == sample.image.layers
    assert found.document == json.loads(sample.content(sample.image.config))
    assert found.architecture == "amd64"
    for blob in sample.image.blobs:
        assert store.path(blob.sha256).read_bytes() == sample.content(blob)
    assert not list((store.root / "partial").iterdir())


def text_of(error: TorchyardError) -> str:
    return "\n".join(
        "\n".join([problem.what, problem.where, problem.why, *problem.tries]) for problem in error.problems
    )


def refused(reference: str, store: Store, **more: Any) -> str:
    with pytest.raises(SourceError) as caught:
        pulled(reference, store, **more)
    assert all(problem.what and (problem.why or problem.where) for problem in caught.value.problems)
    return text_of(caught.value)


class Counting:
    """Progress that adds up what is reported."""

    def __init__(self) -> None:
        self.sizes: dict[str, int | None] = {}
        self.bytes = self.peak = 0
        self.finished: list[str] = []

    def start(self, name: str, size: int | None, done: int) -> None:
        if name not in self.sizes:
            self.sizes[name] = size
            self.bytes += done

    def advance(self, name: str, size: int) -> None:
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def finish(self, name: str) -> None:
        self.finished.append(name)


# --- references


TABLE: Sequence[tuple[str, str, str, str | None]] = [
    ("registry.example/python:3.12", "registry.example", "python", "3.12"),
    ("registry.example:5000/a/b-c/d__e", "registry.example:5000", "a/b-c/d__e", None),
    ("Registry.Example/a", "registry.example", "a", None),
    ("localhost/a:1", "localhost", "a", "1"),
    ("localhost:5000/a", "localhost:5000", "a", None),
    ("[::1]:5000/a:v", "[::1]:5000", "a", "v"),
    ("python:3.12-slim", "short.example", "library/python", "3.12-slim"),
    ("team/python", "short.example", "team/python", None),
]


@pytest.mark.parametrize(("text", "host", "repository", "tag"), TABLE)
@pytest.mark.parametrize("digest", [None, DIGEST])
def test_reference(text: str, host: str, repository: str, tag: str | None, digest: str | None) -> None:
    whole = f"{text}@{digest}" if digest else text
    found = Reference.parse(whole, Configuration(default="short.example"))
    assert found == Reference(registry=host, repository=repository, tag=tag, digest=digest)
    assert Reference.parse(str(found), NONE) == found


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "@", "/", "a/", "registry.example/", "registry.example/A", "registry.example/a:", "a..b/c", "-a.b/c",
        "registry.example/a b", "registry.example//a", "registry.example/../a", "registry.example/a:t:t",
        "registry.example/a@sha512:" + "a" * 128, "registry.example/a@sha256:" + "A" * 64, "registry.example/a@",
        f"registry.example/a@{DIGEST}\n", "https://registry.example/a", "user:secret@registry.example/a",
        "registry.example/" + "a" * 300, "registry.example:port/a", "registry.example/a?x=y", "registry.example/a#b",
    ],
)  # fmt: skip
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(MatrixError, match="is not an image reference"):
        Reference.parse(text, Configuration(default="short.example"))


@given(st.text(max_size=80) | st.text(alphabet="ab/:@.-_[]A%0", max_size=40))
def test_any_text_is_a_reference_or_an_error(text: str) -> None:
    try:
        found = Reference.parse(text, Configuration(default="short.example"))
    except MatrixError:
        return
    assert Reference.parse(str(found), NONE) == found
    assert not set(f"{found.registry}{found.repository}") & set("@?#%\\ \n")


def test_a_short_name_without_a_registry_to_ask() -> None:
    with pytest.raises(MatrixError, match="names no registry") as caught:
        Reference.parse("python:3.12", NONE)
    assert "name the registry in the reference" in text_of(caught.value)


def test_a_short_name_with_several_registries_to_ask() -> None:
    with pytest.raises(MatrixError) as caught:
        Reference.parse("python", Configuration(search=("one.example", "two.example")))
    assert "'one.example', 'two.example'" in text_of(caught.value)


@pytest.mark.parametrize("default", ["https://one.example", "no-host", "one.example/UPPER"])
def test_a_default_registry_that_is_none(default: str) -> None:
    with pytest.raises(MatrixError) as caught:
        Reference.parse("python", Configuration(default=default))
    assert "TORCHYARD_REGISTRY" in text_of(caught.value)


def test_a_default_registry_may_have_a_path() -> None:
    found = Reference.parse("python", Configuration(default="one.example/mirror/"))
    assert (found.registry, found.repository) == ("one.example", "mirror/library/python")


REGISTRIES = """
unqualified-search-registries = ["one.example"]
[aliases]
"python" = "two.example/official/python"
[[registry]]
prefix = "named.example"
location = "api.named.example"
[[registry]]
prefix = "named.example/team"
location = "team.example:5000/deep"
[[registry]]
location = "plain.example"
insecure = true
"""


def configured(tmp_path: Path, text: str = REGISTRIES, **environ: str) -> Configuration:
    file = tmp_path / "registries.conf"
    file.write_text(text)
    return Configuration.of_user({"CONTAINERS_REGISTRIES_CONF": str(file), "HOME": str(tmp_path), **environ})


def test_registries_conf(tmp_path: Path) -> None:
    found = configured(tmp_path)
    assert str(Reference.parse("python:3", found)) == "two.example/official/python:3"
    assert str(Reference.parse("ruby", found)) == "one.example/library/ruby"
    preferring = configured(tmp_path, TORCHYARD_REGISTRY="three.example")
    assert str(Reference.parse("ruby", preferring)) == "three.example/library/ruby"
    assert not found.may_be_plain("plain.example")  # sending passwords in the clear is said to torchyard itself


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("named.example/a", "api.named.example/a"),
        ("named.example/team", "team.example:5000/deep"),
        ("named.example/team/a", "team.example:5000/deep/a"),
        ("named.example/teams", "api.named.example/teams"),
        ("named.example.org/a", "named.example.org/a"),
    ],
)
def test_registries_conf_says_where_images_lie(tmp_path: Path, text: str, place: str) -> None:
    found = configured(tmp_path)
    assert str(found.locate(Reference.parse(text, found))) == place


def test_registries_conf_of_the_user_and_its_parts(tmp_path: Path) -> None:
    folder = tmp_path / ".config" / "containers"
    (folder / "registries.conf.d").mkdir(parents=True)
    (folder / "registries.conf").write_text('unqualified-search-registries = ["main.example"]')
    (folder / "registries.conf.d" / "zz.conf").write_text('unqualified-search-registries = ["part.example"]')
    (folder / "registries.conf.d" / "zzz.txt").write_text("not [ read")
    assert Configuration.of_user({"HOME": str(tmp_path)}).search == ("part.example",)


def test_registries_conf_that_is_not_toml(tmp_path: Path) -> None:
    with pytest.raises(MatrixError, match="cannot be read") as caught:
        configured(tmp_path, "[[registry")
    assert "registries.conf" in text_of(caught.value)


@pytest.mark.parametrize(
    "text", ["unqualified-search-registries = 3", "aliases = 3", 'registry = "x"', "[[registry]]\nlocation = 3"]
)
def test_registries_conf_with_other_types_in_it(tmp_path: Path, text: str) -> None:
    assert replace(configured(tmp_path, text), auth_files=()) == NONE


@pytest.mark.parametrize(
    ("netloc", "plain"),
    [
        ("localhost", True), ("localhost:5000", True), ("127.0.0.1:5000", True), ("127.9.9.9", True), ("[::1]:5", True),
        ("registry.example", False), ("localhost.example", False), ("127.0.0.1.example", False), ("10.0.0.1", False),
        ("inside.example:5000", True), ("inside.example", False), ("0.0.0.0", False),
    ],
)  # fmt: skip
def test_who_may_be_spoken_to_without_tls(tmp_path: Path, netloc: str, *, plain: bool) -> None:
    found = configured(tmp_path, TORCHYARD_INSECURE_REGISTRIES="Inside.example:5000,x.example")
    assert found.may_be_plain(netloc) is plain


# --- platforms


@pytest.mark.parametrize(
    ("text", "platform"),
    [
        ("linux/amd64", Platform(os="linux", architecture="amd64")),
        ("linux/amd64/v1", Platform(os="linux", architecture="amd64")),
        ("linux/arm64/v8", Platform(os="linux", architecture="arm64")),
        ("linux/arm", Platform(os="linux", architecture="arm", variant="v7")),
        ("linux/arm/v6", Platform(os="linux", architecture="arm", variant="v6")),
    ],
)
def test_platform(text: str, platform: Platform) -> None:
    assert Platform.parse(text) == platform
    assert Platform.parse(str(platform)) == platform


@pytest.mark.parametrize("text", ["", "linux", "linux/", "linux/amd64/v1/x", "Linux/amd64", "linux/amd64\n"])
def test_what_is_no_platform(text: str, store: Store) -> None:
    with pytest.raises(MatrixError, match="is not a platform"):
        pulled(f"127.0.0.1:9/a@{DIGEST}", store, platform=text)


def listed(server: RegistryServer, sample: Sample, *platforms: str, kind: str = layout.MEDIA_INDEX) -> str:
    """Serve an index that has the sample for the first platform, and nothing behind the others."""
    server.add(sample.image, sample.store)
    entries = []
    for number, text in enumerate(platforms):
        os_, architecture, *variant = text.split("/")
        digest = f"sha256:{number:064x}" if number else sample.image.manifest.digest
        entry = replace(sample.image.manifest, digest=digest).as_json()
        about = {"os": os_, "architecture": architecture} | ({"variant": variant[0]} if variant else {})
        entries.append(entry | {"platform": about})
    document = {"schemaVersion": 2, "mediaType": kind, "manifests": entries}
    return server.reference(server.put_json(document, kind).digest)


@pytest.mark.parametrize("kind", [layout.MEDIA_INDEX, DOCKER_LIST])
def test_an_index_is_searched_for_the_platform(server: RegistryServer, store: Store, sample: Sample, kind: str) -> None:
    reference = listed(server, sample, "linux/amd64", "linux/amd64/v3", "linux/arm64/v8", kind=kind)
    assert_whole(store, sample, pulled(reference, store))


def test_a_platform_that_is_not_listed(server: RegistryServer, store: Store, sample: Sample) -> None:
    reference = listed(server, sample, "linux/amd64", "linux/arm/v7", "linux/arm64/v8", "unknown/unknown")
    with pytest.raises(ImpossibleError, match="no image for linux/s390x") as caught:
        pulled(reference, store, platform="linux/s390x")
    assert "linux/amd64, linux/arm/v7, linux/arm64" in text_of(caught.value)
    assert "unknown" not in text_of(caught.value)


@pytest.mark.parametrize("through_index", [True, False])
def test_an_image_for_another_platform(
    server: RegistryServer, store: Store, sample: Sample, *, through_index: bool
) -> None:
    plain = server.add(sample.image, sample.store)
    reference = listed(server, sample, "linux/arm64") if through_index else plain
    with pytest.raises(ImpossibleError, match="no image for linux/arm64") as caught:
        pulled(reference, store, platform="linux/arm64")
    assert "linux/amd64" in text_of(caught.value)


# --- what is pulled


def test_pull(server: RegistryServer, store: Store, sample: Sample) -> None:
    progress = Counting()
    found = pulled(server.add(sample.image, sample.store), store, progress=progress)
    assert_whole(store, sample, found)
    assert progress.bytes == sum(layer.blob.size for layer in sample.image.layers)
    assert sorted(progress.finished) == sorted(progress.sizes)
    assert len(server.requests) == 4


def test_a_second_pull_asks_nothing(server: RegistryServer, store: Store, sample: Sample) -> None:
    reference = listed(server, sample, "linux/amd64", "linux/arm64")
    pulled(reference, store)
    before = len(server.requests)
    assert_whole(store, sample, pulled(reference, store))
    assert len(server.requests) == before


def test_what_is_in_the_store_needs_no_network(server: RegistryServer, store: Store, sample: Sample) -> None:
    reference = server.add(sample.image, sample.store)
    pulled(reference, store)
    assert_whole(store, sample, pulled(reference.replace(server.host, "127.0.0.1:9"), store))


def test_a_damaged_document_in_the_store_is_fetched_again(server: RegistryServer, store: Store, sample: Sample) -> None:
    reference = server.add(sample.image, sample.store)
    pulled(reference, store)
    path = store.path(sample.image.config.sha256)
    path.chmod(0o644)
    path.write_bytes(bytes(path.stat().st_size))
    assert_whole(store, sample, pulled(reference, store))


def test_a_digest_is_required(store: Store) -> None:
    with pytest.raises(MatrixError, match="has no digest"):
        pulled("127.0.0.1:9/a:latest", store)


def docker_image(server: RegistryServer, *, kinds: Sequence[str], architecture: str = "amd64") -> str:
    """Serve an image with Docker's media types, and a layer of each kind."""
    layers = [server.put(f"layer {number}".encode(), kind) for number, kind in enumerate(kinds)]
    about = {
        "os": "linux",
        "architecture": architecture,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{number:064x}" for number in range(len(kinds))]},
    }
    config = server.put_json(about, DOCKER_CONFIG)
    document = {
        "schemaVersion": 2,
        "mediaType": DOCKER_MANIFEST,
        "config": config.as_json(),
        "layers": [layer.as_json() for layer in layers],
    }
    return server.reference(server.put_json(document, DOCKER_MANIFEST).digest)


def test_docker_media_types_become_those_of_oci(server: RegistryServer, store: Store) -> None:
    kinds = [DOCKER_LAYER, f"{DOCKER_LAYER}.gzip", f"{DOCKER_LAYER}.zstd", layout.MEDIA_LAYER_ZSTD]
    found = pulled(docker_image(server, kinds=kinds), store)
    assert found.manifest.media_type == DOCKER_MANIFEST  # of bytes that are as they are
    assert found.config.media_type == layout.MEDIA_CONFIG
    assert [layer.blob.media_type for layer in found.layers] == [
        layout.MEDIA_LAYER_TAR, layout.MEDIA_LAYER_GZIP, layout.MEDIA_LAYER_ZSTD, layout.MEDIA_LAYER_ZSTD
    ]  # fmt: skip
    assert [layer.diff_id for layer in found.layers] == [f"sha256:{number:064x}" for number in range(4)]


def test_an_image_with_one_layer_twice(server: RegistryServer, store: Store, sample: Sample) -> None:
    layer = sample.image.layers[1]
    image = layout.assemble(sample.store, architecture="amd64", config={}, epoch=0, layers=(layer, layer))
    assert pulled(server.add(image, sample.store), store).layers == (layer, layer)
    assert len(server.asked(server.blob(layer.blob.digest))) == 1


# --- what is refused


def manifest_of(sample: Sample) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(sample.content(sample.image.manifest))
    return document


def served(server: RegistryServer, sample: Sample, document: object, kind: str = layout.MEDIA_MANIFEST) -> str:
    server.add(sample.image, sample.store)
    return server.reference(server.put_json(document, kind).digest)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "foreign"),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "foreign"),
        (f"{layout.MEDIA_LAYER_GZIP}+encrypted", "encrypted"),
        ("application/octet-stream", "unknown type"),
        ("application/\x1b[31m\ud800", "unknown type"),
    ],
)
def test_layers_that_cannot_be_used(server: RegistryServer, store: Store, sample: Sample, kind: str, why: str) -> None:
    document = manifest_of(sample)
    document["layers"][1]["mediaType"] = kind
    text = refused(served(server, sample, document), store)
    assert why in text
    assert text.isprintable() or text.replace("\n", "").isprintable()
    assert not server.asked(server.blob(sample.image.layers[0].blob.digest))


def test_a_layer_with_another_address_is_foreign(server: RegistryServer, store: Store, sample: Sample) -> None:
    document = manifest_of(sample)
    document["layers"][0]["urls"] = ["https://elsewhere.example/layer"]
    assert "foreign" in refused(served(server, sample, document), store)


def test_schema_1(server: RegistryServer, store: Store, sample: Sample) -> None:
    kind = "application/vnd.docker.distribution.manifest.v1+prettyjws"
    document = {"schemaVersion": 1, "name": "a", "fsLayers": [], "history": []}
    assert "schema 1" in refused(served(server, sample, document, kind), store)
    # One that is signed has the digest of what was signed only.
    server.documents[DIGEST] = (kind, b'{"schemaVersion": 1, "signatures": []}')
    assert "schema 1" in refused(server.reference(DIGEST), store)
    assert "schema 1" in refused(served(server, sample, document, "application/json"), store)


def broken_manifests() -> Iterator[tuple[str, Any]]:
    descriptor = {"mediaType": layout.MEDIA_CONFIG, "digest": DIGEST, "size": 1}
    good = {"schemaVersion": 2, "mediaType": layout.MEDIA_MANIFEST, "config": descriptor, "layers": []}
    index = {"schemaVersion": 2, "mediaType": layout.MEDIA_INDEX, "manifests": []}
    yield "a list", []
    yield "empty", {}
    yield "both", {**good, "manifests": []}
    yield "both without type", {"schemaVersion": 2, "config": descriptor, "layers": [], "manifests": []}
    yield "index called manifest", {**index, "mediaType": layout.MEDIA_MANIFEST}
    yield "manifest called index", {**good, "mediaType": layout.MEDIA_INDEX}
    yield "unknown type", {**good, "mediaType": "application/json"}
    yield "type that is a number", {**good, "mediaType": 3}
    yield "no layers", {key: value for key, value in good.items() if key != "layers"}
    yield "layers null", {**good, "layers": None}
    yield "layers of numbers", {**good, "layers": [3]}
    yield "sha512", {**good, "config": {**descriptor, "digest": "sha512:" + "a" * 128}}
    yield "path in digest", {**good, "config": {**descriptor, "digest": "sha256:../../x"}}
    yield "newline in digest", {**good, "config": {**descriptor, "digest": DIGEST + "\n"}}
    yield "negative size", {**good, "config": {**descriptor, "size": -1}}
    yield "size as text", {**good, "config": {**descriptor, "size": "1"}}
    yield "size true", {**good, "config": {**descriptor, "size": True}}
    yield "artifact", {**good, "config": {**descriptor, "mediaType": "application/vnd.example+json"}}
    yield "config too large", {**good, "config": {**descriptor, "size": registry.CONFIG_MAX + 1}}
    yield "manifests of numbers", {**index, "manifests": [3]}
    linux = {"os": "linux", "architecture": "amd64"}
    yield "nested", {**index, "manifests": [{**descriptor, "mediaType": layout.MEDIA_INDEX, "platform": linux}]}
    large = {**descriptor, "mediaType": layout.MEDIA_MANIFEST, "size": registry.MANIFEST_MAX + 1, "platform": linux}
    yield "manifest too large", {**index, "manifests": [large]}


@pytest.mark.parametrize("document", [pytest.param(one, id=name) for name, one in broken_manifests()])
def test_manifests_that_are_none(server: RegistryServer, store: Store, document: object) -> None:
    found = server.put_json(document, layout.MEDIA_MANIFEST)
    assert "cannot be used" in refused(server.reference(found.digest), store)
    assert len(server.requests) == 1  # nothing of what it names was asked for


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b'{"a": ' * 50_000, b"9" * 5000, b'"x"'])
def test_manifests_that_are_not_json(server: RegistryServer, store: Store, content: bytes) -> None:
    assert "is not" in refused(server.reference(server.put(content).digest), store)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([DIGEST, "layers"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "schemaVersion",
                    "mediaType",
                    "config",
                    "layers",
                    "manifests",
                    "digest",
                    "size",
                    "platform",
                    "os",
                    "urls",
                ]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_any_json_is_an_image_or_an_error(document: object) -> None:
    whole = document if isinstance(document, dict) else {"layers": document}
    try:
        kind = registry._kind_of(whole, "place")
        model = registry._Manifest if kind == layout.MEDIA_MANIFEST else registry._Index
        registry._parsed(model, whole, "place")
    except SourceError:
        pass


@pytest.mark.parametrize(
    "change",
    [
        {"rootfs": {"type": "layers", "diff_ids": [DIGEST]}},
        {"rootfs": {"type": "layers", "diff_ids": [DIGEST, "sha256:x"]}},
        {"rootfs": {"type": "other", "diff_ids": [DIGEST, DIGEST]}},
        {"rootfs": None},
        {"architecture": 3},
        {"os": None},
    ],
)
def test_configs_that_are_none(
    server: RegistryServer, store: Store, sample: Sample, change: Mapping[str, object]
) -> None:
    about = json.loads(sample.content(sample.image.config)) | change
    config = server.put_json(about, layout.MEDIA_CONFIG)
    document = manifest_of(sample) | {"config": config.as_json()}
    assert "cannot be used" in refused(served(server, sample, document), store)
    assert not server.asked(server.blob(sample.image.layers[0].blob.digest))


def test_a_manifest_without_end(server: RegistryServer, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MANIFEST_MAX", 2 << 20)
    server.script(server.manifest(DIGEST), Answer(body=bytes(10 << 20), length=False))
    assert "larger than 2 MiB" in refused(server.reference(DIGEST), store)
    assert not list((store.root / "partial").iterdir())


def test_the_digest_of_a_layer_is_not_read_as_a_manifest(
    server: RegistryServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "MANIFEST_MAX", 1 << 20)
    sha256 = store.put(bytes(2 << 20))
    assert "larger than 1 MiB" in refused(server.reference(f"sha256:{sha256}"), store)
    assert not server.requests


# --- wrong bytes


def layer_of(sample: Sample) -> Layer:
    return sample.image.layers[0]


@pytest.mark.parametrize("wrong", [bytes(100_000), b"", b"x" * 10_000_000])
def test_wrong_bytes_are_fetched_again_once_and_not_kept(
    server: RegistryServer, store: Store, sample: Sample, wrong: bytes
) -> None:
    reference = server.add(sample.image, sample.store)
    blob = layer_of(sample).blob
    server.script(server.blob(blob.digest), then=itertools.repeat(Answer(body=wrong)))
    progress = Counting()
    with pytest.raises(HashMismatchError) as caught:
        pulled(reference, store, progress=progress)
    assert blob.digest in text_of(caught.value)
    assert server.host in text_of(caught.value)
    assert len(server.asked(server.blob(blob.digest))) == 2
    assert not store.has(blob.sha256)
    assert not (store.root / "partial" / blob.sha256).exists()
    assert progress.bytes == sum(store.path(one.blob.sha256).exists() * one.blob.size for one in sample.image.layers)
    assert progress.peak <= sum(one.blob.size for one in sample.image.layers)  # however many come


@pytest.mark.parametrize("which", ["manifest", "config", "layer"])
def test_wrong_bytes_once_are_no_obstacle(server: RegistryServer, store: Store, sample: Sample, which: str) -> None:
    reference = server.add(sample.image, sample.store)
    wrong = Answer(body=b"{}")
    paths = {
        "manifest": server.manifest(sample.image.manifest.digest),
        "config": server.blob(sample.image.config.digest),
        "layer": server.blob(layer_of(sample).blob.digest),
    }
    server.script(paths[which], wrong)
    assert_whole(store, sample, pulled(reference, store))
    assert len(server.asked(paths[which])) == 2


def test_a_size_that_is_a_lie(server: RegistryServer, store: Store, sample: Sample) -> None:
    for change in (-1, 1):
        document = manifest_of(sample)
        document["layers"][1]["size"] += change
        reference = served(server, sample, document)
        with pytest.raises(HashMismatchError, match=r"not the one that was asked for"):
            pulled(reference, store)
        assert not store.has(sample.image.layers[1].blob.sha256)


def test_compressed_on_the_way_is_not_taken_apart(server: RegistryServer, store: Store, sample: Sample) -> None:
    reference = server.add(sample.image, sample.store)
    bomb = gzip.compress(bytes(50_000_000))
    bombs = itertools.repeat(Answer(body=bomb, headers={"Content-Encoding": "gzip"}))
    server.script(server.manifest(sample.image.manifest.digest), then=bombs)
    with pytest.raises(HashMismatchError) as caught:
        pulled(reference, store)
    assert hashlib.sha256(bomb).hexdigest() in text_of(caught.value)


# --- lines that break


def test_passing_refusals_are_waited_out(server: RegistryServer, store: Store, sample: Sample) -> None:
    reference = server.add(sample.image, sample.store)
    path = server.blob(layer_of(sample).blob.digest)
    server.script(server.manifest(sample.image.manifest.digest), 503, 500, 408)
    server.script(path, 503, 429, 200)
    assert_whole(store, sample, pulled(reference, store))
    assert [one.status for one in server.asked(path)] == [503, 429, 200]


def test_retry_after_is_obeyed_within_reason(
    server: RegistryServer, store: Store, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = server.add(sample.image, sample.store)
    path = server.manifest(sample.image.manifest.digest)
    server.script(path, Answer(status=429, headers={"Retry-After": "1"}))
    pulled(reference, store)
    first, second = server.asked(path)
    assert second.at_s - first.at_s >= 1
    monkeypatch.setattr(transfer, "RETRY_AFTER_MAX_S", 0.01)
    other = Store.open(store.root / "other")
    server.script(path, Answer(status=503, headers={"Retry-After": "86400"}))
    assert_whole(other, sample, pulled(reference, other))


def test_a_registry_that_never_recovers_is_given_up(server: RegistryServer, store: Store, sample: Sample) -> None:
    reference = server.add(sample.image, sample.store)
    path = server.manifest(sample.image.manifest.digest)
    server.script(path, then=itertools.repeat(503))
    assert "HTTP 503" in refused(reference, store)
    assert len(server.asked(path)) == transfer.ATTEMPTS


@pytest.mark.parametrize("how", [Answer(cut=1000), Answer(cut=1000, reset=False), Answer(cut=1000, length=False)])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_transfer_goes_on(
    server: RegistryServer, store: Store, sample: Sample, how: Answer, *, ranges: bool
) -> None:
    reference = server.add(sample.image, sample.store)
    path = server.blob(layer_of(sample).blob.digest)
    server.script(path, how, Answer(ranges=ranges))
    progress = Counting()
    assert_whole(store, sample, pulled(reference, store, progress=progress))
    first, second = server.asked(path)
    assert first.range is None
    if second.range is not None:  # a reset may overtake what was sent before it
        assert (second.range, second.status) == ("bytes=1000-", 206 if ranges else 200)
    else:
        assert how.reset
    assert progress.bytes == sum(layer.blob.size for layer in sample.image.layers)


def test_a_broken_document_goes_on(server: RegistryServer, store: Store, sample: Sample) -> None:
    reference = server.add(sample.image, sample.store)
    server.script(server.manifest(sample.image.manifest.digest), Answer(cut=50, reset=False))
    server.script(server.blob(sample.image.config.digest), Answer(cut=50))
    assert_whole(store, sample, pulled(reference, store))


def test_a_transfer_that_always_breaks_is_given_up_and_kept(
    server: RegistryServer, store: Store, sample: Sample
) -> None:
    reference = server.add(sample.image, sample.store)
    blob = layer_of(sample).blob
    path = server.blob(blob.digest)
    server.script(path, then=itertools.repeat(Answer(cut=1000, reset=False)))
    assert "gave up after" in refused(reference, store)
    assert len(server.asked(path)) == transfer.ATTEMPTS
    kept = (store.root / "partial" / blob.sha256).read_bytes()
    assert len(kept) == 1000 * transfer.ATTEMPTS
    server.script(path)
    assert_whole(store, sample, pulled(reference, store))
    assert server.asked(path)[-1].range == f"bytes={len(kept)}-"


def test_a_damaged_start_is_fetched_again(server: RegistryServer, store: Store, sample: Sample) -> None:
    reference = server.add(sample.image, sample.store)
    blob = layer_of(sample).blob
    (store.root / "partial" / blob.sha256).write_bytes(bytes(5000))
    progress = Counting()
    assert_whole(store, sample, pulled(reference, store, progress=progress))
    assert [one.range for one in server.asked(server.blob(blob.digest))] == ["bytes=5000-", None]
    assert progress.bytes == sum(layer.blob.size for layer in sample.image.layers)


@pytest.mark.parametrize("extra", [0, 1])
def test_what_was_left_whole_or_longer(server: RegistryServer, store: Store, sample: Sample, extra: int) -> None:
    reference = server.add(sample.image, sample.store)
    for blob in (sample.image.manifest, layer_of(sample).blob):
        (store.root / "partial" / blob.sha256).write_bytes(sample.content(blob) + bytes(extra))
    assert_whole(store, sample, pulled(reference, store))
    assert len(server.asked(server.blob(layer_of(sample).blob.digest))) == extra


def test_a_stalled_transfer_is_broken_off(
    server: RegistryServer, store: Store, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "STALL_S", 0.1)
    reference = server.add(sample.image, sample.store)
    path = server.blob(layer_of(sample).blob.digest)
    server.script(path, Answer(pace=(1, 0.02)))
    begun = time.monotonic()
    assert_whole(store, sample, pulled(reference, store))
    assert time.monotonic() - begun < 5
    assert [one.range is None for one in server.asked(path)] == [True, False]


def test_a_registry_that_does_not_answer(store: Store) -> None:
    text = refused(f"127.0.0.1:9/team/app@{DIGEST}", store)
    assert "127.0.0.1:9 cannot be reached" in text
    assert "Connection refused" in text


def test_what_the_registry_does_not_have(server: RegistryServer, store: Store, sample: Sample) -> None:
    text = refused(server.reference(DIGEST), store)
    assert "no such manifest" in text
    assert "HTTP 404 (NAME_UNKNOWN)" in text
    reference = server.add(sample.image, sample.store)
    del server.documents[layer_of(sample).blob.digest]
    assert "no such layer" in refused(reference, store)


def test_a_failure_stops_the_others(server: RegistryServer, store: Store, sample: Sample) -> None:
    reference = server.add(sample.image, sample.store)
    slow, bad = sample.image.layers
    server.script(server.blob(slow.blob.digest), Answer(pace=(1000, 0.05)))
    server.script(server.blob(bad.blob.digest), 404)
    begun = time.monotonic()
    refused(reference, store)
    assert time.monotonic() - begun < 3  # the slow one alone would take five seconds


def test_one_image_wanted_by_many_is_fetched_once(server: RegistryServer, store: Store, sample: Sample) -> None:
    reference = server.add(sample.image, sample.store)
    threads = [threading.Thread(target=pulled, args=(reference, store)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_whole(store, sample, pulled(reference, store))
    assert len(server.asked(server.blob(layer_of(sample).blob.digest))) == 1


def test_a_killed_pull_is_resumed(server: RegistryServer, store: Store, sample: Sample) -> None:
    reference = server.add(sample.image, sample.store)
    blob = layer_of(sample).blob
    server.script(server.blob(blob.digest), Answer(pace=(10_000, 0.2)))
    code = (
        "import sys; from pathlib import Path; from builder.registry import pull; from builder.store import Store; "
        "pull(sys.argv[1], platform='linux/amd64', store=Store.open(Path(sys.argv[2])))"
    )
    partial = store.root / "partial" / blob.sha256
    with subprocess.Popen([sys.executable, "-c", code, reference, str(store.root)]) as process:
        while not (partial.exists() and partial.stat().st_size >= 20_000):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert not store.has(blob.sha256)
    assert_whole(store, sample, pulled(reference, store))
    last = server.asked(server.blob(blob.digest))[-1].range
    assert last is not None
    assert int(last.removeprefix("bytes=").removesuffix("-")) >= 20_000


def test_a_pull_that_finds_all_in_the_store_does_not_even_import_http(
    server: RegistryServer, store: Store, sample: Sample
) -> None:
    reference = server.add(sample.image, sample.store)
    pulled(reference, store)
    code = (
        "import sys; from pathlib import Path; from builder.registry import pull; from builder.store import Store; "
        "pull(sys.argv[1], platform='linux/amd64', store=Store.open(Path(sys.argv[2]))); "
        "print(*({'requests', 'urllib3'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code, reference, str(store.root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not done.stdout.split()


# --- redirections


def test_blobs_that_lie_elsewhere(server: RegistryServer, other: RegistryServer, store: Store, sample: Sample) -> None:
    reference = server.add(sample.image, sample.store)
    other.add(sample.image, sample.store)
    server.basic = ("user", PASSWORD)
    logged_in(server.host)
    path = server.blob(layer_of(sample).blob.digest)
    there = Answer(status=307, headers={"Location": f"{other.origin}{path}?signature=canary-signature"})
    server.script(path, there, there, there)
    other.script(path, Answer(cut=1000, reset=False))
    assert_whole(store, sample, pulled(reference, store))
    broken, resumed = other.asked(path)
    assert resumed.range == "bytes=1000-"
    assert broken.authorization is None
    assert resumed.authorization is None
    assert "cookie" not in resumed.headers
    assert all(one.authorization for one in server.asked(path))


def test_a_redirection_within_the_registry_keeps_the_login(
    server: RegistryServer, store: Store, sample: Sample
) -> None:
    reference = server.add(sample.image, sample.store)
    server.basic = ("user", PASSWORD)
    logged_in(server.host)
    path = server.blob(layer_of(sample).blob.digest)
    server.script(path, Answer(status=302, headers={"Location": path}))
    assert_whole(store, sample, pulled(reference, store))


def test_no_way_back_to_the_login(server: RegistryServer, other: RegistryServer, store: Store, sample: Sample) -> None:
    reference = server.add(sample.image, sample.store)
    server.basic = ("user", PASSWORD)
    logged_in(server.host)
    path = server.blob(layer_of(sample).blob.digest)
    server.script(path, Answer(status=302, headers={"Location": f"{other.origin}{path}"}))
    other.script(path, Answer(status=302, headers={"Location": f"{server.origin}{path}"}))
    assert "does not open" in refused(reference, store)
    assert server.asked(path)[-1].authorization is None


@pytest.mark.parametrize(
    "location",
    [
        "http://elsewhere.example/blob?signature=canary",
        "http://user:canary@10.0.0.1/blob",
        "ftp://elsewhere.example/blob",
        "file:///etc/passwd",
        "http://[broken/blob?canary",
        "https:///blob",
    ],
)
def test_redirections_that_are_not_safe(
    server: RegistryServer, store: Store, sample: Sample, location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = server.add(sample.image, sample.store)
    server.script(
        server.blob(layer_of(sample).blob.digest),
        then=itertools.repeat(Answer(status=307, headers={"Location": location})),
    )
    text = refused(reference, store)
    assert "not safe" in text
    assert "canary" not in text


def test_the_body_of_a_redirection_is_not_read(server: RegistryServer, store: Store, sample: Sample) -> None:
    reference = server.add(sample.image, sample.store)
    path = server.blob(layer_of(sample).blob.digest)
    headers = {"Location": f"{path}?again"}
    server.script(path, Answer(status=307, headers=headers, body=bytes(1000), pace=(1, 0.02)))
    begun = time.monotonic()
    assert_whole(store, sample, pulled(reference, store))
    assert time.monotonic() - begun < 5  # at that pace: twenty seconds


def test_redirections_without_end(server: RegistryServer, store: Store, sample: Sample) -> None:
    reference = server.add(sample.image, sample.store)
    path = server.blob(layer_of(sample).blob.digest)
    server.script(path, then=itertools.repeat(Answer(status=301, headers={"Location": path})))
    assert "only redirects" in refused(reference, store)
    assert len(server.asked(path)) == registry.REDIRECTS_MAX + 1


def test_a_refusal_elsewhere_is_not_one_of_the_registry(
    server: RegistryServer, other: RegistryServer, store: Store, sample: Sample
) -> None:
    reference = server.add(sample.image, sample.store)
    path = server.blob(layer_of(sample).blob.digest)
    server.script(path, Answer(status=307, headers={"Location": f"{other.origin}{path}?canary"}))
    other.script(path, 403)
    text = refused(reference, store)
    assert "from where" in text
    assert "HTTP 403" in text
    assert "docker login" not in text
    assert "canary" not in text


# --- who asks


def logged_in(key: str, user: str = "user", password: str = PASSWORD, **entry: str) -> Path:
    """Write what `docker login` writes."""
    file = Path(os.environ["HOME"]) / ".docker" / "config.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    auth = base64.b64encode(f"{user}:{password}".encode()).decode()
    file.write_text(json.dumps({"auths": {key: entry or {"auth": auth}}}))
    return file


@pytest.mark.parametrize("key", ["{}", "http://{}", "https://{}/v1/", "https://{}/v2/", "{}/team", "{}/team/app"])
def test_basic(server: RegistryServer, store: Store, sample: Sample, key: str) -> None:
    server.basic = ("user", PASSWORD)
    logged_in(key.format(server.host))
    assert_whole(store, sample, pulled(server.add(sample.image, sample.store), store))
    assert [one.status for one in server.requests] == [401, 200, 200, 200, 200]


@pytest.mark.parametrize("key", ["{}0", "{}/teams", "{}/team/app/deeper", "other.example", "x.{}"])
def test_a_login_elsewhere_is_not_used(server: RegistryServer, store: Store, sample: Sample, key: str) -> None:
    server.basic = ("user", PASSWORD)
    logged_in(key.format(server.host))
    text = refused(server.add(sample.image, sample.store), store)
    assert f"{server.host} does not open team/app to you" in text
    assert f"docker login {server.host}" in text
    assert all(one.authorization is None for one in server.requests)


def test_a_wrong_password(server: RegistryServer, store: Store, sample: Sample) -> None:
    server.basic = ("user", "another")
    logged_in(server.host)
    assert "HTTP 401 (UNAUTHORIZED)" in refused(server.add(sample.image, sample.store), store)
    assert len(server.requests) == 2


def test_where_logins_are_looked_for(tmp_path: Path) -> None:
    auth = {name: {"username": name, "password": "x"} for name in ("named", "runtime", "podman", "docker")}
    places = {
        "named": tmp_path / "named.json",
        "runtime": tmp_path / "run" / "containers" / "auth.json",
        "podman": tmp_path / ".config" / "containers" / "auth.json",
        "docker": tmp_path / ".docker" / "config.json",
    }
    environ = {
        "HOME": str(tmp_path),
        "REGISTRY_AUTH_FILE": str(places["named"]),
        "XDG_RUNTIME_DIR": str(tmp_path / "run"),
        "CONTAINERS_REGISTRIES_CONF": os.environ["CONTAINERS_REGISTRIES_CONF"],
    }
    found = Configuration.of_user(environ)
    for name in reversed(places):
        places[name].parent.mkdir(parents=True, exist_ok=True)
        places[name].write_text(json.dumps({"auths": {"one.example": auth[name]}}))
        assert found.credential(["one.example"], "a", []) == Credential(username=name, password="x")
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "config.json").write_text(json.dumps({"auths": {"two.example": auth["docker"]}}))
    moved = Configuration.of_user({**environ, "DOCKER_CONFIG": str(tmp_path / "docker")})
    assert moved.credential(["two.example"], "a", []) == Credential(username="docker", password="x")


@pytest.mark.parametrize(
    "content",
    [
        b"{", b"[]", b"\xff", b'{"auths": 3}', b'{"auths": {"one.example": 3}}', b'{"auths": {"one.example": {}}}',
        b'{"auths": {"one.example": {"auth": "no base64"}}}', b'{"auths": {"one.example": {"auth": "//8="}}}',
        b'{"credsStore": "../x"}', b'{"credsStore": 3, "credHelpers": []}', b'{"credsStore": "surely-not-there"}',
    ],
)  # fmt: skip
def test_files_of_logins_that_are_none(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    notes: list[str] = []
    assert Configuration(auth_files=(file,)).credential(["one.example"], "a", notes) is None
    assert all(note.isprintable() for note in notes)


def test_nothing_is_printed_of_a_credential() -> None:
    shown = repr(Credential(username="canary", password="canary", identity_token="canary", registry_token="canary"))
    assert "canary" not in shown


def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, **document: object) -> Path:
    """Install a credential helper; returns the file where it writes what it was asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    file = folder / "docker-credential-test"
    file.write_text(f'#!/bin/sh\nread server\necho "$1 $server" >> {tmp_path}/asked\n{script}\n')
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    config = Path(os.environ["HOME"]) / ".docker" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps(document))
    return tmp_path / "asked"


@pytest.mark.parametrize("for_all", [True, False])
def test_a_credential_helper(
    server: RegistryServer,
    store: Store,
    sample: Sample,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    for_all: bool,
) -> None:
    server.basic = ("user", PASSWORD)
    document: dict[str, object] = {"credsStore": "test"} if for_all else {"credHelpers": {server.host: "test"}}
    answer = json.dumps({"ServerURL": server.host, "Username": "user", "Secret": PASSWORD})
    asked = helper(tmp_path, monkeypatch, f"echo '{answer}'", **document)
    assert_whole(store, sample, pulled(server.add(sample.image, sample.store), store))
    assert asked.read_text() == f"get {server.host}\n"


@pytest.mark.parametrize(
    ("script", "note"),
    [
        (f"echo {PASSWORD}; echo {PASSWORD} >&2; exit 3", "docker-credential-test ended with status 3"),
        (f"echo {PASSWORD}", "docker-credential-test failed: JSONDecodeError"),
        ("echo 'credentials not found in native keychain'; exit 1", ""),
        ("sleep 9", "docker-credential-test failed: TimeoutExpired"),
    ],
)
def test_a_credential_helper_that_fails(
    server: RegistryServer,
    store: Store,
    sample: Sample,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    note: str,
) -> None:
    monkeypatch.setattr(credentials, "HELPER_TIMEOUT_S", 0.3)
    helper(tmp_path, monkeypatch, f"exec 3>&-\n{script}", credsStore="test")
    reference = server.add(sample.image, sample.store)
    server.basic = ("user", PASSWORD)
    text = refused(reference, store)
    assert note in text
    assert PASSWORD not in text
    server.basic, server.tokens = None, TokenService()
    assert_whole(store, sample, pulled(reference, store))  # a public image is had all the same


@pytest.mark.parametrize("name", ["token", "access_token"])
def test_tokens(server: RegistryServer, store: Store, sample: Sample, name: str) -> None:
    server.tokens = TokenService(user=("user", PASSWORD), token_name=name)
    logged_in(server.host)
    assert_whole(store, sample, pulled(server.add(sample.image, sample.store), store))
    (asked,) = server.asked("/token")
    assert asked.query == {"scope": ["repository:team/app:pull"], "service": ['a, "quoted" service']}
    assert [one.status for one in server.requests].count(401) == 1


def test_tokens_for_anybody(server: RegistryServer, store: Store, sample: Sample) -> None:
    server.tokens = TokenService()
    assert_whole(store, sample, pulled(server.add(sample.image, sample.store), store))


def test_an_identity_token(server: RegistryServer, store: Store, sample: Sample) -> None:
    server.tokens = TokenService(identity_token="canary-identity", token_name="access_token")
    logged_in(server.host, identitytoken="canary-identity")
    assert_whole(store, sample, pulled(server.add(sample.image, sample.store), store))
    (asked,) = server.asked("/token")
    assert asked.method == "POST"
    assert asked.form["grant_type"] == ["refresh_token"]
    assert asked.query == {}


def test_a_helper_with_an_identity_token(
    server: RegistryServer, store: Store, sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.tokens = TokenService(identity_token="canary-identity")
    helper(tmp_path, monkeypatch, """echo '{"Username": "<token>", "Secret": "canary-identity"}'""", credsStore="test")
    assert_whole(store, sample, pulled(server.add(sample.image, sample.store), store))


def test_a_token_that_was_given_by_hand(server: RegistryServer, store: Store, sample: Sample) -> None:
    server.tokens = TokenService(given={"canary-token": time.monotonic() + 60})
    logged_in(server.host, registrytoken="canary-token")
    assert_whole(store, sample, pulled(server.add(sample.image, sample.store), store))
    assert not server.asked("/token")


def test_an_expired_token_is_renewed_before_it_is_used(server: RegistryServer, store: Store, sample: Sample) -> None:
    server.tokens = TokenService(expires_in=0)
    assert_whole(store, sample, pulled(server.add(sample.image, sample.store), store))
    assert len(server.asked("/token")) == 4
    assert [one.status for one in server.requests].count(401) == 1


def test_a_token_that_ends_early_is_renewed_once_for_all(server: RegistryServer, store: Store, sample: Sample) -> None:
    server.tokens = TokenService(expires_in=None)
    reference = server.add(sample.image, sample.store)
    original, tokens = server._next, server.tokens
    layers = {server.blob(layer.blob.digest) for layer in sample.image.layers}
    both = threading.Barrier(2)

    def expire(path: str) -> Answer:
        if path in layers:
            layers.discard(path)
            both.wait(10)
            tokens.given["canary-token-0"] = 0.0
        return original(path)

    server._next = expire  # type: ignore[method-assign]
    assert_whole(store, sample, pulled(reference, store))
    assert len(server.asked("/token")) == 2
    assert [one.status for one in server.requests].count(401) == 3


def test_a_token_that_opens_nothing_is_not_asked_for_for_ever(
    server: RegistryServer, store: Store, sample: Sample
) -> None:
    server.tokens = TokenService(lifetime_s=0)
    assert "does not open" in refused(server.add(sample.image, sample.store), store)
    assert len(server.requests) == 3


def test_a_token_service_that_refuses_or_breaks(server: RegistryServer, store: Store, sample: Sample) -> None:
    reference = server.add(sample.image, sample.store)
    server.tokens = TokenService(user=("user", "another"))
    logged_in(server.host)
    assert "HTTP 401 from its token service" in refused(reference, store)
    server.tokens = TokenService()
    server.script("/token", 503, 503)
    assert_whole(store, sample, pulled(reference, store))


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"token": 3}', b'{"token": "canary\\r\\nX: y"}', b'{"token": ""}', bytes(2 << 20)]
)
def test_tokens_that_are_none(server: RegistryServer, store: Store, sample: Sample, body: bytes) -> None:
    server.tokens = TokenService()
    server.script("/token", Answer(body=body))
    text = refused(server.add(sample.image, sample.store), store)
    assert "token" in text
    assert "canary" not in text


@pytest.mark.parametrize("realm", ["", "http://elsewhere.example/token", "ftp://elsewhere.example", "http://[x/"])
def test_a_token_service_that_is_not_safe_is_not_told(
    server: RegistryServer, store: Store, sample: Sample, realm: str
) -> None:
    server.tokens, server.realm = TokenService(), realm
    logged_in(server.host)
    if realm:
        assert "not safe" in refused(server.add(sample.image, sample.store), store)
        assert len(server.requests) == 1


def test_a_token_service_elsewhere_that_redirects(
    server: RegistryServer, other: RegistryServer, store: Store, sample: Sample
) -> None:
    server.tokens = TokenService(user=("user", PASSWORD))
    logged_in(server.host)
    server.script("/token", Answer(status=307, headers={"Location": f"{other.origin}/token"}))
    refused(server.add(sample.image, sample.store), store)
    (asked,) = other.asked("/token")
    assert asked.authorization is None


@given(st.text(alphabet='Bearbsic "=\\,rlm-', max_size=60))
def test_any_challenge_is_read(header: str) -> None:
    found = registry._Challenge.best(header)
    assert found is None or found.scheme in ("bearer", "basic")


@pytest.mark.parametrize(
    ("header", "scheme", "parameters"),
    [
        ('Bearer realm="https://a/t",service=s', "bearer", {"realm": "https://a/t", "service": "s"}),
        ('Basic realm="x", bearer Realm="y, basic z"', "bearer", {"realm": "y, basic z"}),
        ('Negotiate, BASIC realm="a \\"b\\""', "basic", {"realm": 'a "b"'}),
        ("Basic", "basic", {}),
    ],
)
def test_challenge(header: str, scheme: str, parameters: Mapping[str, str]) -> None:
    found = registry._Challenge.best(header)
    assert found is not None
    assert (found.scheme, found.parameters) == (scheme, parameters)


def test_netrc_and_proxies_are_not_asked(
    server: RegistryServer, store: Store, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = Path(os.environ["HOME"]) / ".netrc"
    netrc.parent.mkdir(parents=True, exist_ok=True)
    netrc.write_text("machine 127.0.0.1 login user password canary-netrc\n")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert_whole(store, sample, pulled(server.add(sample.image, sample.store), store))
    assert all(one.authorization is None for one in server.requests)


def test_no_secret_is_ever_shown(
    server: RegistryServer, other: RegistryServer, tmp_path: Path, sample: Sample, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    reference = server.add(sample.image, sample.store)
    path = server.manifest(sample.image.manifest.digest)
    echo = {"errors": [{"code": f"canary {PASSWORD}", "message": f"{PASSWORD} canary-token-0"}]}
    body = json.dumps(echo).encode()
    texts = []
    for number, status in enumerate((400, 401, 403, 404, 418, 429, 500)):
        server.tokens = TokenService(user=("user", PASSWORD))
        logged_in(server.host)
        server.script(path, 401, then=itertools.repeat(Answer(status=status, body=body)))
        server.script(path, 200, then=itertools.repeat(Answer(status=status, body=body)))
        texts.append(refused(reference, Store.open(tmp_path / f"errors-{number}")))
    server.basic, server.tokens = ("user", "another"), None
    server.script(path)
    texts.append(refused(reference, Store.open(tmp_path / "basic")))
    server.tokens = TokenService(identity_token="canary-another")
    logged_in(server.host, identitytoken="canary-identity")
    texts.append(refused(reference, Store.open(tmp_path / "identity")))
    assert any(one.form for one in server.requests)
    assert any(one.authorization for one in server.requests)
    encoded = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
    for shown in (*texts, caplog.text):
        assert "canary" not in shown
        assert encoded not in shown
    assert caplog.records


# --- another host for the same registry, and TLS


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for names that the tests below make up; returns it and its key."""
    folder = tmp_path_factory.mktemp("tls")
    names = "subjectAltName=DNS:registry.test,DNS:api.registry.test"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-keyout", "key.pem", "-out", "cert.pem", "-days", "2", "-subj", "/CN=registry.test", "-addext", names,
        ],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the names of the tests be those of this machine."""
    ask = socket.getaddrinfo

    def answer(host: Any, *rest: Any, **more: Any) -> Any:
        return ask("127.0.0.1" if str(host).endswith("registry.test") else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", answer)


def test_tls_that_is_trusted(
    names: None, certificate: tuple[Path, Path], store: Store, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate[0]))
    with RegistryServer(host="registry.test", tls=certificate) as server:
        server.basic = ("user", PASSWORD)
        logged_in(server.host)
        assert_whole(store, sample, pulled(server.add(sample.image, sample.store), store))


def test_tls_that_is_not_trusted(names: None, certificate: tuple[Path, Path], store: Store, sample: Sample) -> None:
    with RegistryServer(host="registry.test", tls=certificate) as server:
        logged_in(server.host)
        text = refused(server.add(sample.image, sample.store), store)
        assert "certificate" in text.lower()
        assert not server.requests


def test_no_way_down_from_tls(
    names: None,
    certificate: tuple[Path, Path],
    other: RegistryServer,
    store: Store,
    sample: Sample,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate[0]))
    with RegistryServer(host="registry.test", tls=certificate) as server:
        reference = server.add(sample.image, sample.store)
        path = server.manifest(sample.image.manifest.digest)
        server.script(path, Answer(status=307, headers={"Location": f"{other.origin}{path}"}))
        assert "is not https" in refused(reference, store)
        server.script(path)
        server.realm = f"{other.origin}/token"
        assert "is not https" in refused(reference, store)
    assert not other.requests


def test_plain_http_is_not_tried_with_strangers(names: None, store: Store, sample: Sample) -> None:
    with RegistryServer(host="registry.test") as server:
        refused(server.add(sample.image, sample.store), store)
        assert not server.requests


def test_plain_http_where_the_user_says_so(
    names: None, store: Store, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RegistryServer(host="registry.test") as server:
        monkeypatch.setenv("TORCHYARD_INSECURE_REGISTRIES", server.host)
        assert_whole(store, sample, pulled(server.add(sample.image, sample.store), store))


@pytest.mark.parametrize("key", ["https://index.registry.test/v1/", "registry.test"])
def test_a_registry_whose_interface_is_at_another_host(
    names: None, store: Store, sample: Sample, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    with RegistryServer(host="api.registry.test") as server:
        monkeypatch.setenv("TORCHYARD_INSECURE_REGISTRIES", server.host)
        conf = f'[[registry]]\nprefix = "registry.test"\nlocation = "{server.host}"\n'
        Path(os.environ["CONTAINERS_REGISTRIES_CONF"]).write_text(conf)
        reference = server.add(sample.image, sample.store).replace(server.host, "registry.test")
        server.basic = ("user", PASSWORD)
        logged_in(key)
        assert_whole(store, sample, pulled(reference, store))


def test_a_mirror_is_not_told_the_password_of_what_it_mirrors(server: RegistryServer, store: Store) -> None:
    conf = f'[[registry]]\nprefix = "mirrored.example"\nlocation = "{server.host}"\n'
    Path(os.environ["CONTAINERS_REGISTRIES_CONF"]).write_text(conf)
    server.basic = ("user", PASSWORD)
    logged_in("mirrored.example")
    refused(f"mirrored.example/team/app@{DIGEST}", store)
    assert all(one.authorization is None for one in server.requests)
