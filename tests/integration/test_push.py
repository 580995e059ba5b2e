"""Images pushed to a real registry on loopback, over links that break, and fetched from there by other programs."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from builder import gate, push, transfer
from builder.credentials import Configuration
from builder.errors import CellFailedError, SourceError
from builder.fetching import Silent
from builder.layout import Image
from builder.push import Pushed, Tags
from builder.registry import pull
from builder.store import Store
from builder.upload import Way, resolve
from tests.support.docker_registry import PASSWORD, USER, BreakingLink, DockerRegistry, registries
from tests.support.images import made

REPOSITORY = "team/app"
TAGS = Tags(fixed=("1.0-a",), moving=("1-a",))

Start = Callable[..., DockerRegistry]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for less long between attempts."""
    monkeypatch.setattr(transfer, "BACKOFF_S", 0.02)
    monkeypatch.setattr(transfer, "BACKOFF_MAX_S", 0.2)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with registries() as running:

        def one(*, closed: bool = False, tls: tuple[Path, Path] | None = None) -> DockerRegistry:
            registry = DockerRegistry(root=tmp_path, closed=closed, tls=tls)
            running.append(registry)
            registry.start()
            return registry

        yield one


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


@pytest.fixture
def image(store: Store) -> Image:
    return made(store, ("large", 6_000_000), ("middle", 3_000_000), ("small", 10))


def pushed(
    host: str, store: Store, image: Image, *, tags: Tags = TAGS, found: Configuration | None = None,
    repository: str = REPOSITORY,
) -> Pushed:  # fmt: skip
    with push.opened(f"{host}/{repository}", found or Configuration()) as target:
        return push.push(target, store, image, tags, progress=Silent())


def tag_of(host: str, name: str, repository: str = REPOSITORY) -> str | None:
    with push.opened(f"{host}/{repository}", Configuration()) as target:
        return resolve(target, name)


def assert_whole(host: str, store: Store, image: Image, tmp_path: Path, found: Configuration | None = None) -> None:
    """Fetch it into a new store: the hash of every byte is checked on the way."""
    other = Store.open(tmp_path / f"other-{time.monotonic_ns()}")
    reference = f"{host}/{REPOSITORY}@{image.manifest.digest}"
    pulled = pull(reference, platform="linux/amd64", store=other, configuration=found or Configuration())
    assert (pulled.manifest, pulled.config, pulled.layers) == (image.manifest, image.config, image.layers)


def test_an_image_and_what_other_programs_say_of_it(start: Start, store: Store, image: Image, tmp_path: Path) -> None:
    host = start().host
    done = pushed(host, store, image)
    assert done.blobs == {Way.SENT: 4}
    assert done.bytes_sent == sum(blob.size for blob in image.blobs[1:])
    assert_whole(host, store, image, tmp_path)
    assert tag_of(host, "1.0-a") == tag_of(host, "1-a") == image.manifest.digest
    reference, digest = f"{host}/{REPOSITORY}:1-a", image.manifest.digest
    assert ran("skopeo", "inspect", "--tls-verify=false", "--format", "{{.Digest}}", f"docker://{reference}") == digest
    assert ran("crane", "digest", "--insecure", reference) == digest
    ran("crane", "validate", "--insecure", "--remote", reference)
    # It reads every layer, and compares digests and diff ids.
    copy = f"oci:{tmp_path / 'copy'}:1"
    ran("skopeo", "copy", "--insecure-policy", "--src-tls-verify=false", f"docker://{reference}", copy)
    (entry,) = json.loads((tmp_path / "copy" / "index.json").read_bytes())["manifests"]
    assert entry["digest"] == digest
    with tempfile.TemporaryDirectory() as place:  # Podman takes no long paths
        podman = ["podman", "--root", f"{place}/root", "--runroot", f"{place}/run", "--storage-driver", "vfs"]
        ran(*podman, "pull", "--quiet", "--tls-verify=false", reference)
        assert ran(*podman, "image", "inspect", "--format", "{{.Digest}}", reference) == digest


def ran(*command: str) -> str:
    """Run another program and return what it says; where it is missing the test is skipped, but for CI."""
    if shutil.which(command[0]) is None:
        if os.environ.get("CI"):
            pytest.fail(f"needed in CI: {command[0]} is not installed", pytrace=False)
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_is_there_or_can_be_mounted_is_not_sent(start: Start, store: Store, image: Image) -> None:
    registry = start()
    with BreakingLink(registry.port) as link:
        pushed(link.host, store, image)
        before = link.sent
        assert pushed(link.host, store, image).blobs == {Way.THERE: 4}
        assert pushed(link.host, store, image, repository="team/other").blobs == {Way.MOUNTED: 4}
        assert link.sent - before < 20_000
        # Another image on the same large layer.
        other = made(store, ("large", 6_000_000), ("another", 10))
        before = link.sent
        done = pushed(link.host, store, other, tags=Tags(fixed=("2.0-a",), moving=("1-a",)))
        assert done.blobs == {Way.THERE: 1, Way.SENT: 2}
        assert link.sent - before < 20_000
    assert tag_of(registry.host, "1.0-a") == image.manifest.digest
    assert tag_of(registry.host, "1-a") == other.manifest.digest


def test_thirty_layers_that_are_there(start: Start, store: Store) -> None:
    registry = start()
    image = made(store, *((str(number), 1000) for number in range(30)))
    pushed(registry.host, store, image)
    started = time.monotonic()
    assert pushed(registry.host, store, image).blobs == {Way.THERE: 31}
    assert time.monotonic() - started < 2


def test_a_fixed_tag_is_never_overwritten(start: Start, store: Store, image: Image) -> None:
    host = start().host
    pushed(host, store, image)
    other = made(store, ("other", 100))
    with pytest.raises(CellFailedError) as caught:
        pushed(host, store, other)
    assert image.manifest.digest in caught.value.problems[0].why
    assert other.manifest.digest in caught.value.problems[0].why
    assert tag_of(host, "1.0-a") == tag_of(host, "1-a") == image.manifest.digest


def test_a_link_that_breaks(start: Start, store: Store, image: Image, tmp_path: Path) -> None:
    registry = start()
    with BreakingLink(registry.port) as link:
        link.cuts.extend([2_500_000] * 6)
        done = pushed(link.host, store, image)
        assert link.broken >= 2
        assert done.blobs == {Way.SENT: 4}
    assert_whole(registry.host, store, image, tmp_path)
    assert tag_of(registry.host, "1-a") == image.manifest.digest


def test_a_link_that_always_breaks_and_then_does_not(start: Start, store: Store, image: Image, tmp_path: Path) -> None:
    """What arrived before it was given up is not sent again, and no tag is set before all is there."""
    registry = start()
    with BreakingLink(registry.port) as link:
        link.cuts.extend([4_000_000] * 60)
        with pytest.raises(SourceError, match="could not be pushed"):
            pushed(link.host, store, image)
        assert tag_of(registry.host, "1-a") is None
        assert tag_of(registry.host, image.manifest.digest) is None
        link.cuts.clear()
        before = link.sent
        done = pushed(link.host, store, image)
        assert done.blobs[Way.THERE] >= 1
        there = sum(blob.size for blob in image.blobs[1:]) - done.bytes_sent
        assert there > 0
        assert link.sent - before < done.bytes_sent + 20_000
    assert_whole(registry.host, store, image, tmp_path)


def test_a_registry_that_dies_during_a_push(start: Start, store: Store, tmp_path: Path) -> None:
    registry = start()
    image = made(store, *((f"layer {number}", 2_000_000) for number in range(8)))
    with BreakingLink(registry.port) as link:

        def watch() -> None:
            while link.sent < 7_000_000:
                time.sleep(0.005)
            registry.kill()

        watcher = threading.Thread(target=watch)
        watcher.start()
        with pytest.raises(SourceError):
            pushed(link.host, store, image)
        watcher.join()
        registry.start()
        assert tag_of(registry.host, "1-a") is None
        done = pushed(link.host, store, image)
        assert done.blobs[Way.THERE] + done.blobs[Way.SENT] == 9
    assert_whole(registry.host, store, image, tmp_path)


def test_a_closed_registry(start: Start, store: Store, image: Image, tmp_path: Path) -> None:
    host = start(closed=True).host
    with pytest.raises(SourceError, match="does not open team/app to you"):
        pushed(host, store, image)
    file = tmp_path / "auth.json"
    file.write_text(json.dumps({"auths": {host: {"username": USER, "password": PASSWORD}}}))
    found = Configuration(auth_files=(file,))
    assert pushed(host, store, image, found=found).blobs == {Way.SENT: 4}
    assert_whole(host, store, image, tmp_path, found)
    kept = [path.read_bytes() for path in (store.root / "pushes").iterdir()]
    assert kept
    assert not any(b"canary" in content for content in kept)
    file.write_text(json.dumps({"auths": {host: {"username": USER, "password": "wrong-canary"}}}))
    with pytest.raises(SourceError, match="does not open team/app to you") as caught:
        pushed(host, store, image, found=found)
    assert "canary" not in str(caught.value.problems)


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """An authority's certificate that is the registry's, too, and its key."""
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-keyout", "key.pem", "-out", "cert.pem", "-days", "2", "-subj", "/CN=registry.test",
            "-addext", "subjectAltName=DNS:registry.test,IP:127.0.0.1",
        ],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    return tmp_path / "cert.pem", tmp_path / "key.pem"


def test_tls(
    start: Start,
    store: Store,
    image: Image,
    tmp_path: Path,
    certificate: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ask = socket.getaddrinfo

    def answer(host: Any, *rest: Any, **more: Any) -> Any:
        return ask("127.0.0.1" if host == "registry.test" else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    host = f"registry.test:{start(tls=certificate).port}"
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    with pytest.raises(SourceError, match="cannot be reached") as caught:
        pushed(host, store, image)
    assert "certificate" in caught.value.problems[0].why.lower()
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate[0]))
    assert pushed(host, store, image).blobs == {Way.SENT: 4}
    assert_whole(host, store, image, tmp_path)


def test_tls_on_this_machine(
    start: Start,
    store: Store,
    image: Image,
    tmp_path: Path,
    certificate: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This machine may be spoken to in the clear, and is where it wants that."""
    host = start(tls=certificate).host
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    with pytest.raises(SourceError, match="cannot be reached") as caught:
        pushed(host, store, image)
    assert "certificate" in caught.value.problems[0].why.lower()
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate[0]))
    assert pushed(host, store, image).blobs == {Way.SENT: 4}
    assert_whole(host, store, image, tmp_path)


@pytest.mark.engine
def test_docker_pulls_what_was_pushed(start: Start, store: Store, image: Image, client: docker.DockerClient) -> None:
    host = start().host
    marked = gate.marked(store, image)
    pushed(host, store, image)
    pushed(host, store, marked, tags=Tags(moving=("1.0-a-unproven",)))
    for tag, one in (("1-a", image), ("1.0-a-unproven", marked)):
        found = client.images.pull(f"{host}/{REPOSITORY}", tag=tag)
        try:
            assert found.id == one.manifest.digest
            assert found.attrs["RepoDigests"] == [f"{host}/{REPOSITORY}@{one.manifest.digest}"]
            assert found.labels.get(gate.MARK) == ("true" if one is marked else None)
        finally:
            client.images.remove(f"{host}/{REPOSITORY}:{tag}", force=True)
