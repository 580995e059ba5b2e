"""Pushes to a real registry through a proxy that spoils chosen requests, and by programs that are stopped and killed.

Whatever happens: what was whole is not sent again, no tag is set before the image is there and read back, the image
has the digest that it has here, and nobody is told who asked.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from builder import gate, push, transfer, upload
from builder.credentials import Configuration
from builder.errors import CellFailedError, HashMismatchError, SourceError, TorchyardError
from builder.fetching import Silent
from builder.layout import Image
from builder.matrix import Cell
from builder.push import Pushed, Tags
from builder.registry import pull
from builder.reports import loads
from builder.store import Store
from builder.upload import resolve
from tests.integration.conftest import Ran, Tiny, bookworm, environment, new_store, tiny_project
from tests.support.docker_registry import PASSWORD, USER, DockerRegistry, registries
from tests.support.images import made
from tests.support.index_server import IndexServer
from tests.support.proxy import Fault, Proxy
from tests.support.registry_server import TokenService, text_of
from tests.support.reports import document, result

REPOSITORY = "team/app"
TAGS = Tags(fixed=("1.0-a", "long-id"), moving=("1-a",))
LARGE, MIDDLE = 3_000_000, 1_500_000
EVERY = ("blob", "begin", "patch", "commit", "look", "manifest", "read", "tag")
"""Kinds of requests of a push that sends something."""
BEFORE_ANSWER = 1 << 40
"""After the last byte of any body."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for less long between attempts, and speak to this machine as it is."""
    monkeypatch.setattr(transfer, "BACKOFF_S", 0.02)
    monkeypatch.setattr(transfer, "BACKOFF_MAX_S", 0.2)
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@dataclass
class Shipping:
    """A store with an image, a registry, and the proxy by which the image goes there."""

    root: Path
    registry: DockerRegistry
    proxy: Proxy
    store: Store
    image: Image
    repository: str = REPOSITORY
    configuration: Configuration = field(default_factory=Configuration)

    @property
    def digest(self) -> str:
        return self.image.manifest.digest

    @property
    def size(self) -> int:
        return sum(blob.size for blob in self.image.blobs[1:])

    def push(self, image: Image | None = None, tags: Tags = TAGS, *, store: Store | None = None) -> Pushed:
        with push.opened(f"{self.proxy.host}/{self.repository}", self.configuration) as target:
            return push.push(target, store or self.store, image or self.image, tags, progress=Silent())

    def refused(self, kind: type[TorchyardError] = SourceError) -> str:
        with pytest.raises(kind) as caught:
            self.push()
        return text_of(caught.value)

    def tags(self) -> dict[str, str]:
        """Return what the tags mean, asked without the proxy."""
        with push.opened(f"{self.registry.host}/{self.repository}", self.configuration) as target:
            found = {name: resolve(target, name) for name in (*TAGS.fixed, *TAGS.moving)}
        return {name: digest for name, digest in found.items() if digest is not None}

    def knows(self, digest: str) -> bool:
        with push.opened(f"{self.registry.host}/{self.repository}", self.configuration) as target:
            return resolve(target, digest) is not None

    def restart(self) -> None:
        self.registry.kill()
        self.registry.start()

    def assert_published(self, image: Image | None = None, tags: Tags = TAGS) -> None:
        """Fetch the image without the proxy, into a new store: the hash of every byte is checked on the way."""
        image = image or self.image
        self.assert_whole(image)
        found = self.tags()
        assert {name: found.get(name) for name in (*tags.fixed, *tags.moving)} == dict.fromkeys(
            (*tags.fixed, *tags.moving), image.manifest.digest
        )
        self.assert_tags_were_last()

    def assert_whole(self, image: Image) -> None:
        other = Store.open(self.root / f"other-{time.monotonic_ns()}")
        reference = f"{self.registry.host}/{self.repository}@{image.manifest.digest}"
        pulled = pull(reference, platform="linux/amd64", store=other, configuration=self.configuration)
        assert (pulled.manifest, pulled.config, pulled.layers) == (image.manifest, image.config, image.layers)

    def assert_tags_were_last(self) -> None:
        """No tag was even asked for before every blob had arrived, and the manifest had been read back."""
        passed = self.proxy.passed
        names = {*TAGS.fixed, *TAGS.moving}
        first = min(at for at, one in enumerate(passed) if one.kind == "tag" and one.name in names)
        blobs = {blob.digest for blob in self.image.blobs[1:]}
        ends = [at for at, one in enumerate(passed) if one.kind == "commit" and one.query["digest"][0] in blobs]
        read = [at for at, one in enumerate(passed) if one.kind == "read" and one.name == self.digest]
        assert max(ends) < min(read) < first

    def assert_sent_once(self, *, again: int = 0) -> None:
        """Each blob was sent to its end once; `again` bytes at most were of requests that broke off or were refused."""
        for blob in self.image.blobs[1:]:
            assert self.proxy.ended[blob.digest] == 1, blob
        assert 0 <= self.proxy.received - self.size <= again


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    """A registry that nobody ends: each test has a repository of its own."""
    with ExitStack() as stack:
        yield started(stack, tmp_path_factory.mktemp("registry"))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Image]:
    """Make an image once; returns the store that has it, too."""
    root = tmp_path_factory.mktemp("image") / "store"
    return root, made(Store.open(root), ("large", LARGE), ("middle", MIDDLE), ("small", 10))


@pytest.fixture
def shipping(running: DockerRegistry, image: tuple[Path, Image], tmp_path: Path) -> Iterator[Shipping]:
    with shipped(running, image, tmp_path) as shipping:
        yield shipping


@pytest.fixture
def alone(image: tuple[Path, Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shipping]:
    """The same with a registry of its own, which may be ended, and takes its time to begin again."""
    monkeypatch.setattr(transfer, "BACKOFF_S", 0.1)
    monkeypatch.setattr(transfer, "BACKOFF_MAX_S", 2.0)
    with ExitStack() as stack:
        yield stack.enter_context(shipped(started(stack, tmp_path), image, tmp_path))


@contextmanager
def shipped(registry: DockerRegistry, image: tuple[Path, Image], root: Path) -> Iterator[Shipping]:
    shutil.copytree(image[0], root / "store")
    store, repository = Store.open(root / "store"), f"team/{time.monotonic_ns()}"
    with Proxy(registry.port) as proxy:
        yield Shipping(
            root=root, registry=registry, proxy=proxy, store=store, image=image[1], repository=repository
        )  # fmt: skip


def started(stack: ExitStack, root: Path, *, closed: bool = False) -> DockerRegistry:
    root.mkdir(exist_ok=True)
    registry = DockerRegistry(root=root, closed=closed)
    stack.enter_context(registries()).append(registry)
    registry.start()
    return registry


# --------------------------------------------------------------------------- the link


@pytest.mark.parametrize(
    ("kind", "after"),
    [
        ("begin", 0), ("patch", 0), ("patch", 1), ("patch", 1_000_000), ("patch", BEFORE_ANSWER), ("commit", 0),
        ("commit", 5), ("manifest", 100), ("tag", 100), ("look", 0), ("read", 0), ("blob", 0),
    ],
)  # fmt: skip
def test_a_connection_that_is_reset(shipping: Shipping, kind: str, after: int) -> None:
    shipping.proxy.fault(kind, Fault(after=after, reset=True))
    shipping.push()
    assert not shipping.proxy.pending
    # This registry forgets an upload with the request that broke off: what arrived of it is sent again.
    shipping.assert_sent_once(again=min(after, shipping.size) if kind in ("patch", "commit") else 0)
    shipping.assert_published()


def test_a_link_that_breaks_again_and_again(shipping: Shipping) -> None:
    shipping.proxy.fault("patch", *(Fault(after=after, reset=True) for after in (2_000, 900_000, 0, 1_400_000)))
    shipping.proxy.fault("commit", Fault(reset=True), Fault(after=3, reset=True))
    shipping.push()
    assert not shipping.proxy.pending
    shipping.assert_sent_once(again=4 * MIDDLE)
    shipping.assert_published()


@pytest.mark.parametrize("kind", ["begin", "patch", "commit", "manifest", "tag"])
def test_an_answer_that_is_lost(shipping: Shipping, kind: str) -> None:
    """What the registry did is found out by asking; of an upload that it forgot, it gets the bytes once more."""
    shipping.proxy.fault(kind, Fault(lost=True))
    shipping.push()
    assert not shipping.proxy.pending
    if kind == "patch":
        assert shipping.proxy.received - shipping.size <= shipping.image.layers[0].blob.size
    else:
        shipping.assert_sent_once()
    assert all(one.status in (201, 202) for one in shipping.proxy.of_kind("manifest", "tag"))
    assert len({one.name for one in shipping.proxy.of_kind("tag")}) == len(shipping.proxy.of_kind("tag"))
    shipping.assert_published()


@pytest.mark.parametrize(
    ("kind", "short"),
    [*((kind, 12) for kind in EVERY), ("begin", 40), ("commit", 40), ("look", 40), ("read", 300), ("read", 0)],
)
def test_an_answer_that_is_cut_short(shipping: Shipping, kind: str, short: int) -> None:
    shipping.proxy.fault(kind, Fault(short=short))
    shipping.push()
    assert not shipping.proxy.pending
    shipping.assert_published()


def test_connections_that_end_between_requests(shipping: Shipping) -> None:
    for kind in EVERY:
        shipping.proxy.fault(kind, *[Fault(closes=True)] * 20)
    shipping.push()
    shipping.assert_sent_once()
    shipping.assert_published()


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("patch", Fault(after=500_000, stall=True)), ("patch", Fault(stall=True)), ("patch", Fault(mute=True)),
        ("commit", Fault(mute=True)), ("commit", Fault(stall=True)), ("begin", Fault(mute=True)),
        ("manifest", Fault(mute=True)), ("tag", Fault(mute=True)), ("look", Fault(mute=True)),
        ("read", Fault(stall=True)),
    ],
    ids=lambda one: one if isinstance(one, str) else "mute" if one.mute else f"stall {one.after}",
)  # fmt: skip
def test_a_side_that_goes_silent(shipping: Shipping, monkeypatch: pytest.MonkeyPatch, kind: str, fault: Fault) -> None:
    impatient(monkeypatch)
    shipping.proxy.fault(kind, fault)
    started_s = time.monotonic()
    shipping.push()
    assert time.monotonic() - started_s < 8
    shipping.assert_sent_once(again=shipping.image.layers[0].blob.size if kind == "patch" else 0)
    shipping.assert_published()


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait half a second for whatever is waited for half a minute, or minutes."""
    monkeypatch.setattr(transfer, "CONNECT_TIMEOUT_S", 0.5)
    monkeypatch.setattr(upload, "PATIENCE_S", 0.5)
    for function in (upload._asked, transfer.Client.request):
        assert function.__kwdefaults__ is not None
        monkeypatch.setitem(function.__kwdefaults__, "patience_s", 0.5)


# --------------------------------------------------------------------------- what stands before the registry


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_refusal_that_passes(shipping: Shipping, status: int) -> None:
    for kind in EVERY:
        shipping.proxy.fault(kind, Fault(status=status), Fault(status=status))
    shipping.push()
    assert not shipping.proxy.pending
    # A body that was refused has to come again.
    for blob in shipping.image.blobs[1:]:
        assert shipping.proxy.ended[blob.digest] == 1
    assert shipping.proxy.received <= 3 * shipping.size
    shipping.assert_published()


@pytest.mark.parametrize("kind", ["patch", "commit", "tag"])
def test_as_long_as_it_says(shipping: Shipping, kind: str) -> None:
    shipping.proxy.fault(kind, Fault(status=429, headers={"Retry-After": "1"}))
    started_s = time.monotonic()
    shipping.push()
    assert 1 <= time.monotonic() - started_s < 6
    shipping.assert_published()


@pytest.mark.parametrize("status", [429, 503])
def test_a_refusal_before_the_body_was_read(shipping: Shipping, status: int) -> None:
    shipping.proxy.fault("patch", *[Fault(status=status, early=True)] * 3)
    shipping.push()
    shipping.assert_sent_once()
    shipping.assert_published()


@pytest.mark.parametrize("early", [False, True])
def test_requests_that_may_not_be_that_long(
    shipping: Shipping, monkeypatch: pytest.MonkeyPatch, *, early: bool
) -> None:
    """A server before the registry may refuse a length when it is announced, and not read on."""
    monkeypatch.setattr(upload, "CHUNKS", (400_000,))
    monkeypatch.setattr(upload, "SMALL", 200_000)
    shipping.proxy.fault("patch", *[Fault(status=413, early=early)] * 2)
    shipping.push()
    shipping.assert_sent_once(again=0 if early else LARGE + MIDDLE + 100_000)
    lengths = [one.received for one in shipping.proxy.of_kind("patch") if one.status == 202]
    assert len(lengths) > 8
    assert max(lengths) == 400_000
    shipping.assert_published()


# --------------------------------------------------------------------------- the registry


@pytest.mark.parametrize(
    ("kind", "after"), [("patch", 700_000), ("commit", 0), ("manifest", 0), ("read", 0), ("tag", 0)]
)
def test_a_registry_that_dies_and_comes_back(alone: Shipping, kind: str, after: int) -> None:
    """One push gets through; a registry that starts anew knows none of the uploads that were not at their end."""
    alone.proxy.fault(kind, Fault(after=after, call=alone.restart, reset=True))
    alone.push()
    assert not alone.proxy.pending
    # An answer to another blob's end may have been lost as well: then it was asked for, and not sent again.
    assert set(alone.proxy.ended.values()) == {1}
    assert alone.proxy.received - alone.size <= (alone.size if kind in ("patch", "commit") else 0)
    alone.assert_published()


def test_a_registry_that_dies_after_the_blobs(alone: Shipping) -> None:
    """F16: the moving tag means what it meant, and the next push sends no blob."""
    old = made(alone.store, ("old", 100))
    alone.push(old, Tags(moving=("1-a",)))
    alone.proxy.passed.clear()
    alone.proxy.fault("manifest", Fault(call=alone.registry.kill, reset=True))
    assert "cannot be reached" in alone.refused()
    alone.registry.start()
    assert alone.tags() == {"1-a": old.manifest.digest}
    assert not alone.knows(alone.digest)
    sent = alone.proxy.received
    alone.push()
    assert alone.proxy.received == sent
    alone.assert_published()


@pytest.mark.parametrize("name", TAGS.fixed + TAGS.moving)
def test_a_tag_that_fails(shipping: Shipping, name: str) -> None:
    """F17: the image is there by its digest, the old tag is untouched, and the next push sends no blob."""
    old = made(shipping.store, ("old", 100))
    shipping.push(old, Tags(moving=("1-a",)))
    shipping.proxy.passed.clear()
    before = (*TAGS.fixed, *TAGS.moving).index(name)
    shipping.proxy.fault("tag", *[Fault()] * before, *[Fault(status=503)] * transfer.ATTEMPTS)
    assert "HTTP 503" in shipping.refused()
    assert not shipping.proxy.pending
    assert shipping.knows(shipping.digest)
    assert shipping.tags() == {"1-a": old.manifest.digest, **dict.fromkeys(TAGS.fixed[:before], shipping.digest)}
    sent = shipping.proxy.received
    shipping.push()
    assert shipping.proxy.received == sent
    shipping.assert_published()


@pytest.mark.parametrize("content", [b'{"schemaVersion": 2}', b"", b"\xff"])
def test_a_manifest_that_comes_back_otherwise(shipping: Shipping, content: bytes) -> None:
    """F20: no tag is set."""
    shipping.proxy.fault("read", Fault(body=content))
    assert "read back, it has other bytes" in shipping.refused(HashMismatchError)
    assert shipping.tags() == {}
    shipping.push()
    shipping.assert_published()


def test_an_upload_that_always_breaks_is_given_up(shipping: Shipping) -> None:
    shipping.proxy.fault("patch", *[Fault(after=1000, reset=True)] * 99)
    assert "could not be pushed" in shipping.refused()
    assert shipping.tags() == {}
    assert not shipping.knows(shipping.digest)
    shipping.proxy.heal()
    shipping.push()
    for blob in shipping.image.blobs[1:]:
        assert shipping.proxy.ended[blob.digest] == 1
    shipping.assert_published()


# --------------------------------------------------------------------------- others


def test_two_publishers_of_one_image(shipping: Shipping) -> None:
    """From two stores at once: both succeed, and a blob travels twice at most."""
    store = Store.open(shipping.root / "second")
    same = made(store, ("large", LARGE), ("middle", MIDDLE), ("small", 10))
    assert same == shipping.image
    failures: list[BaseException] = []

    def publish(store: Store) -> None:
        try:
            shipping.push(store=store)
        except BaseException as error:  # noqa: BLE001 (of a thread: shown below)
            failures.append(error)

    threads = [threading.Thread(target=publish, args=(one,)) for one in (shipping.store, store)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert max(shipping.proxy.ended.values()) <= 2
    shipping.assert_whole(same)
    assert shipping.tags() == dict.fromkeys((*TAGS.fixed, *TAGS.moving), same.manifest.digest)


@pytest.mark.parametrize("moment", ["commit", "manifest", "tag"])
def test_another_publisher_who_was_faster(shipping: Shipping, moment: str) -> None:
    """F19: another image under the same names, pushed in the middle of this push, keeps them; both are shown."""
    store = Store.open(shipping.root / "second")
    other = made(store, ("other", 1000))

    def interfere() -> None:
        with push.opened(f"{shipping.registry.host}/{shipping.repository}", Configuration()) as target:
            push.push(target, store, other, TAGS, progress=Silent())

    # With "tag" it comes between the last look and the request, for the last of the tags.
    if moment == "tag":
        names = {name: f"{name}-own" for name in TAGS.fixed}
        tags = Tags(fixed=tuple(names.values()), moving=TAGS.moving)
        shipping.push(tags=tags)
        shipping.proxy.fault("look", *[Fault()] * 3, Fault(call=interfere))
        shipping.push(made(shipping.store, ("third", 1000)), Tags(moving=("2-a",)))
        with pytest.raises(CellFailedError) as caught:
            shipping.push()
        text = text_of(caught.value)
    else:
        shipping.proxy.fault(moment, Fault(call=interfere))
        text = shipping.refused(CellFailedError)
    assert other.manifest.digest in text
    assert shipping.digest in text
    assert shipping.tags() == dict.fromkeys((*TAGS.fixed, *TAGS.moving), other.manifest.digest)
    shipping.assert_whole(other)


# --------------------------------------------------------------------------- the program

_QUICK = """\
import sys
from builder import transfer
transfer.BACKOFF_S, transfer.BACKOFF_MAX_S = 0.05, 0.5
from builder.cli import main
main(sys.argv[1:])
"""
"""The command line, but that it waits for less long between attempts."""


@dataclass(frozen=True)
class Published:
    """A project with a cell that is built, and proven as far as its store knows."""

    tiny: Tiny
    cell: Cell
    store: Store

    def command(self, host: str, *arguments: str) -> list[str]:
        return [sys.executable, "-c", _QUICK, "push", self.cell.id, "--to", f"{host}/{REPOSITORY}", *arguments]

    def environment(self, **more: str) -> dict[str, str]:
        names = [name for name in os.environ if not name.lower().endswith("_proxy")]
        kept = {name: value for name, value in environment().items() if name in names or name == "PYTHONPATH"}
        return {**kept, **self.tiny.env, "HOME": str(self.tiny.root / "user"), **more}

    def push(self, host: str, *arguments: str, **more: str) -> Ran:
        done = subprocess.run(
            self.command(host, *arguments), cwd=self.tiny.root, env=self.environment(**more), capture_output=True,
            text=True, timeout=120, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return Ran(done.returncode, done.stdout, done.stderr)

    def begun(self, host: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(host, "--json"), cwd=self.tiny.root, env=self.environment(), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    """A tiny cell on the shipped base, whose 100 MB are a layer to be stopped in."""
    root = tmp_path_factory.mktemp("published")
    new_store(root / "home", bookworm())
    with IndexServer() as server:
        tiny = tiny_project(root, server)
        project = tiny.locked(repository="torchyard-test-push", include=[{"torch": "2.8.0", "cuda": "12.8"}])
        ((cell,), (plan,)) = project.cells, project.plans(project.cells)
        ran = tiny.run("build", cell.id, "--json")
        assert ran.code == 0, ran.err
        (built,) = ran.document
        store = Store.open(root / "home")
        about = document([result("run.import")], name=cell.id)
        about["subject"]["digest"] = built["digest"]
        facts = about["environment"]["facts"]
        about["environment"]["facts"] = {
            **facts,
            "packages": {wheel.name: str(wheel.version) for wheel in plan.lock.wheels},
        }
        gate.keep(store, built["digest"], loads(json.dumps(about).encode(), where="test"))
        yield Published(tiny=tiny, cell=cell, store=store)


def tag_of(host: str, name: str) -> str | None:
    with push.opened(f"{host}/{REPOSITORY}", Configuration()) as target:
        return resolve(target, name)


@pytest.mark.debian
@pytest.mark.parametrize(
    ("kind", "after", "number", "code"),
    [
        ("patch", 5_000_000, signal.SIGINT, 130), ("patch", 50_000_000, signal.SIGKILL, -9),
        ("tag", 0, signal.SIGTERM, 130),
    ],
)  # fmt: skip
def test_a_program_that_is_stopped(
    published: Published, tmp_path: Path, *, kind: str, after: int, number: signal.Signals, code: int
) -> None:
    with ExitStack() as stack:
        registry = started(stack, tmp_path)
        proxy = stack.enter_context(Proxy(registry.port))
        process: subprocess.Popen[str]
        stopped_s = 0.0

        def stop() -> None:
            nonlocal stopped_s
            process.send_signal(number)
            stopped_s = time.monotonic()
            time.sleep(0.2)

        proxy.fault(kind, Fault(after=after, call=stop))
        process = published.begun(proxy.host)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert time.monotonic() - stopped_s < 5
        assert "Traceback" not in err
        assert out == ""
        assert tag_of(registry.host, published.cell.tag_names[-1]) is None
        there = dict(proxy.ended)
        ran = published.push(proxy.host, "--json")
        assert ran.code == 0, ran.err
        (done,) = ran.document
        assert done["proven"] is True
        for digest in there:
            assert proxy.ended[digest] == 1, "what was there was not sent again"
        for one in done["tags"]:
            assert tag_of(registry.host, one["name"]) == done["digest"]


@pytest.mark.debian
def test_a_program_that_is_stopped_while_the_registry_is_silent(published: Published, tmp_path: Path) -> None:
    with ExitStack() as stack:
        registry = started(stack, tmp_path)
        proxy = stack.enter_context(Proxy(registry.port))
        silent = threading.Event()
        proxy.fault("commit", Fault(call=silent.set, stall=True))
        process = published.begun(proxy.host)
        try:
            assert silent.wait(30)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=10)
        finally:
            process.kill()
            process.communicate()
        assert process.returncode == 130, err
        assert published.push(proxy.host).code == 0


@pytest.mark.debian
def test_two_programs_at_once(published: Published, tmp_path: Path) -> None:
    """They share a store: the second waits for the first, and finds everything there."""
    with ExitStack() as stack:
        registry = started(stack, tmp_path)
        proxy = stack.enter_context(Proxy(registry.port))
        running = [published.begun(proxy.host) for _ in range(2)]
        said = [process.communicate(timeout=120) for process in running]
        assert [process.returncode for process in running] == [0, 0], said
        assert max(proxy.ended.values()) == 1
        found = [json.loads(out)[0] for out, _ in said]
        assert found[0]["digest"] == found[1]["digest"] == tag_of(registry.host, published.cell.tag_names[0])
        assert sorted(one["blobs"]["sent"] > 0 for one in found) == [False, True]


# --------------------------------------------------------------------------- nobody is told


def secrets(*more: str) -> Sequence[bytes]:
    """Return what must be nowhere: the password, as it is and as it is sent, and tokens."""
    plain = [PASSWORD, base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode(), *more]
    return [one.encode() for one in plain]


def told(path: Path, names: Sequence[bytes], *, since_ns: int = 0) -> list[Path]:
    """Return the files below `path`, changed since then, in which one of the names stands."""
    changed = [one for one in path.rglob("*") if one.is_file() and one.stat().st_mtime_ns >= since_ns]
    return [one for one in changed if any(name in one.read_bytes() for name in names)]


FAULTS: Mapping[str, Sequence[Fault]] = {
    "begin": [Fault(status=422)],
    "patch": [Fault(after=900_000, reset=True), Fault(status=403)],
    "commit": [Fault(lost=True), Fault(status=507)],
    "manifest": [Fault(status=400), Fault(short=12)],
    "look": [Fault(status=401, headers={"WWW-Authenticate": 'Basic realm="again"'}), Fault(status=418)],
    "read": [Fault(body=b"{}"), Fault(short=60)],
    "tag": [Fault(status=503), Fault(status=409)],
}
"""One push after another fails by the next of these, until none is left."""


def test_a_password_is_told_to_nobody_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    with ExitStack() as stack:
        registry = started(stack, tmp_path / "closed", closed=True)
        proxy = stack.enter_context(Proxy(registry.port))
        secrets_are_nowhere(registry, proxy, tmp_path, caplog, capfd)


def test_a_token_is_told_to_nobody_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    with ExitStack() as stack:
        registry = started(stack, tmp_path / "open")
        tokens = TokenService(user=(USER, PASSWORD), lifetime_s=0.4)
        proxy = stack.enter_context(Proxy(registry.port, tokens=tokens))
        secrets_are_nowhere(registry, proxy, tmp_path, caplog, capfd)
        assert len(tokens.given) > 1


def secrets_are_nowhere(
    registry: DockerRegistry,
    proxy: Proxy,
    root: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Push until nothing fails any more, and look for what may be nowhere in all that was said and kept."""
    login = root / "login" / "auth.json"
    login.parent.mkdir()
    login.write_text(logged_in(proxy.host, registry.host))
    store = Store.open(root / "store")
    shipping = Shipping(
        root=root, registry=registry, proxy=proxy, store=store, configuration=Configuration(auth_files=(login,)),
        image=made(store, ("large", LARGE), ("middle", MIDDLE), ("small", 10)),
    )  # fmt: skip
    for kind, faults in FAULTS.items():
        proxy.fault(kind, *faults)
    said = []
    for _ in range(sum(map(len, FAULTS.values()))):
        try:
            shipping.push()
        except TorchyardError as error:
            said.append("\n".join([text_of(error), repr(error), *traceback.format_exception(error)]))
            assert shipping.tags().get("1-a") is None
        if not proxy.pending:
            break
    assert len(said) > 5
    shipping.push()
    shipping.assert_published()
    said += [caplog.text, *capfd.readouterr()]
    assert "Traceback" in said[0]
    assert caplog.records
    names = secrets("canary")
    assert [text for text in said if any(name in text.encode() for name in names)] == []
    assert told(store.root, names) == []
    assert told(login.parent, names) == [login], "what looks for it finds it"


def logged_in(*hosts: str) -> str:
    return json.dumps({"auths": {host: {"username": USER, "password": PASSWORD} for host in hosts}})


@pytest.mark.debian
def test_the_program_tells_no_password(published: Published, tmp_path: Path) -> None:
    with ExitStack() as stack:
        registry = started(stack, tmp_path, closed=True)
        proxy = stack.enter_context(Proxy(registry.port))
        (tmp_path / "config").mkdir()
        (tmp_path / "config" / "config.json").write_text(logged_in(proxy.host))
        login = {"DOCKER_CONFIG": str(tmp_path / "config")}
        since_ns = time.time_ns()
        proxy.fault("patch", Fault(status=403))
        refused = published.push(proxy.host, "--verbose", **login)
        assert refused.code != 0
        assert "does not open team/app to you" in refused.err
        proxy.fault("tag", Fault(status=503), Fault(lost=True))
        done = published.push(proxy.host, "--json", **login)
        assert done.code == 0, done.err
        said = [refused.out, refused.err, done.out, done.err]
        names = secrets("canary")
        assert [text for text in said if any(name in text.encode() for name in names)] == []
        assert told(published.store.root, names, since_ns=since_ns) == []
        assert published.push(proxy.host).code != 0, "without the log-in it is closed"
