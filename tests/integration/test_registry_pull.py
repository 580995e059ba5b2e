"""An image pulled from a real registry on loopback, open or behind a password; no engine takes part."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urljoin

import pytest
import requests

from builder import layout, tar
from builder.credentials import Configuration
from builder.errors import SourceError
from builder.layout import Image
from builder.registry import pull
from builder.store import Store
from tests.support.docker_registry import PASSWORD, USER, DockerRegistry, registries

REPOSITORY = "team/app"

Start = Callable[..., str]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start Debian's docker-registry on a free loopback port; returns its host and port."""
    with registries() as running:

        def one(*, closed: bool = False) -> str:
            registry = DockerRegistry(root=tmp_path, closed=closed)
            running.append(registry)
            return registry.start()

        yield one


@pytest.fixture
def made(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "made")


@pytest.fixture
def image(made: Store) -> Image:
    with made.scratch("image") as scratch:
        layers = [
            layout.gzip_layer(made, tar.stream([tar.file_entry(name, content)]), scratch=scratch)
            for name, content in (("large", random.Random(2).randbytes(3_000_000)), ("small", b"small"))
        ]
    return layout.assemble(made, architecture="amd64", config={"Env": ["A=1"]}, epoch=0, layers=layers)


def push(host: str, made: Store, image: Image) -> str:
    """Put the image and an index of it into the registry, by the plain protocol; returns the index' reference."""
    base = f"http://{host}/v2/{REPOSITORY}"
    with requests.Session() as session:
        session.auth = (USER, PASSWORD)
        for blob in (image.config, *(layer.blob for layer in image.layers)):
            begun = session.post(f"{base}/blobs/uploads/", timeout=20)
            assert begun.status_code == 202, begun.text
            place = urljoin(base, begun.headers["Location"])
            content = made.path(blob.sha256).read_bytes()
            done = session.put(place, params={"digest": blob.digest}, data=content, timeout=20)
            assert done.status_code == 201, done.text
        entry = image.manifest.as_json() | {"platform": {"os": "linux", "architecture": "amd64"}}
        document = {"schemaVersion": 2, "mediaType": layout.MEDIA_INDEX, "manifests": [entry]}
        index = layout.put_json(made, document, layout.MEDIA_INDEX)
        for one in (image.manifest, index):
            put = session.put(
                f"{base}/manifests/{one.digest}",
                data=made.path(one.sha256).read_bytes(),
                headers={"Content-Type": one.media_type},
                timeout=20,
            )
            assert put.status_code == 201, put.text
    return f"{host}/{REPOSITORY}@{index.digest}"


def configuration(tmp_path: Path, *hosts: str) -> Configuration:
    file = tmp_path / "auth.json"
    file.write_text(json.dumps({"auths": {host: {"username": USER, "password": PASSWORD} for host in hosts}}))
    return Configuration(auth_files=(file,))


def assert_pulled(store: Store, made: Store, image: Image, reference: str, found: Configuration) -> None:
    pulled = pull(reference, platform="linux/amd64", store=store, configuration=found)
    assert (pulled.manifest, pulled.config, pulled.layers) == (image.manifest, image.config, image.layers)
    for blob in image.blobs:
        assert store.path(blob.sha256).read_bytes() == made.path(blob.sha256).read_bytes()


def test_from_an_open_registry(start: Start, made: Store, image: Image, tmp_path: Path) -> None:
    host = start()
    reference = push(host, made, image)
    store = Store.open(tmp_path / "store")
    layer = image.layers[0].blob
    (store.root / "partial" / layer.sha256).write_bytes(made.path(layer.sha256).read_bytes()[:1_000_000])
    assert_pulled(store, made, image, reference, Configuration())
    # All of it is there now, and the manifest by itself as well.
    by_manifest = f"127.0.0.1:9/{REPOSITORY}@{image.manifest.digest}"
    for one in (reference, by_manifest):
        assert_pulled(store, made, image, one.replace(host, "127.0.0.1:9"), Configuration())


def test_from_a_closed_registry(start: Start, made: Store, image: Image, tmp_path: Path) -> None:
    host = start(closed=True)
    reference = push(host, made, image)
    store = Store.open(tmp_path / "store")
    with pytest.raises(SourceError, match="does not open team/app to you"):
        pull(reference, platform="linux/amd64", store=store, configuration=Configuration())
    assert not list((store.root / "blobs").iterdir())
    assert_pulled(store, made, image, reference, configuration(tmp_path, host))


def test_what_the_registry_does_not_have(start: Start, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    missing = f"{start()}/{REPOSITORY}@sha256:{'0' * 64}"
    with pytest.raises(SourceError, match="no such manifest") as caught:
        pull(missing, platform="linux/amd64", store=store, configuration=Configuration())
    assert "HTTP 404" in caught.value.problems[0].why
