"""Blobs and manifests brought to a registry that refuses, breaks off, forgets, and points elsewhere."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from builder import transfer, upload
from builder.credentials import Configuration
from builder.errors import HashMismatchError, SourceError
from builder.fetching import Silent
from builder.layout import MEDIA_LAYER_GZIP, MEDIA_MANIFEST, Descriptor
from builder.registry import Registry
from builder.upload import Arrived, Target, Way, push_blob, put_manifest, read_manifest, resolve
from tests.support import proxy
from tests.support.registry_server import Fault, PushServer, TokenService, Upload, text_of

REPOSITORY = "team/app"
CONTENT = random.Random(3).randbytes(3_000_000)
LITTLE = b"little"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for milliseconds."""
    monkeypatch.setattr(transfer, "BACKOFF_S", 0.001)
    monkeypatch.setattr(transfer, "BACKOFF_MAX_S", 0.01)
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[PushServer]:
    with PushServer() as running:
        yield running


@pytest.fixture
def target(server: PushServer) -> Iterator[Target]:
    with Registry(server.host, configuration=Configuration()) as registry:
        yield Target(registry=registry, repository=REPOSITORY)


@dataclass
class Blob:
    """A blob that counts how often it was read from its beginning."""

    content: bytes
    piece: int = 100_000
    opened: int = 0

    @property
    def descriptor(self) -> Descriptor:
        digest = f"sha256:{hashlib.sha256(self.content).hexdigest()}"
        return Descriptor(media_type=MEDIA_LAYER_GZIP, digest=digest, size=len(self.content))

    def pieces(self) -> Iterator[bytes]:
        self.opened += 1
        for start in range(0, len(self.content), self.piece):
            yield self.content[start : start + self.piece]


@dataclass
class Told:
    """Progress that adds up."""

    at: int = 0
    finished: list[str] = field(default_factory=list)

    def start(self, name: str, size: int | None, done: int) -> None:
        self.at += done

    def advance(self, name: str, size: int) -> None:
        self.at += size

    def finish(self, name: str) -> None:
        self.finished.append(name)


def pushed(
    target: Target, blob: Blob, *, sources: tuple[str, ...] = (), stop: threading.Event | None = None
) -> Arrived:
    told = Told()
    arrived = push_blob(target, blob.descriptor, blob.pieces, name="layer", sources=sources, progress=told, stop=stop)
    is_sent = arrived.way is Way.SENT
    assert told.at == (len(blob.content) if is_sent else 0)
    assert told.finished == (["layer"] if is_sent else [])
    return arrived


def assert_there(server: PushServer, blob: Blob) -> None:
    assert server.blobs[REPOSITORY] == {blob.descriptor.digest: blob.content}
    assert not server.uploads


def assert_there_too(server: PushServer, blob: Blob) -> None:
    assert server.blobs[REPOSITORY][blob.descriptor.digest] == blob.content


def kinds(server: PushServer) -> list[str]:
    return [one.kind for one in server.requests]


# --------------------------------------------------------------------------- when all is well


def test_a_large_blob_goes_in_one_request(server: PushServer, target: Target) -> None:
    blob = Blob(CONTENT)
    assert pushed(target, blob) == Arrived(way=Way.SENT, bytes_sent=len(CONTENT))
    assert_there(server, blob)
    assert kinds(server) == ["blob", "begin", "patch", "commit"]
    (patch,) = server.of_kind("patch")
    assert "content-range" not in patch.headers, "some registries know no chunks"
    assert blob.opened == 1


def test_a_small_blob_goes_with_the_request_that_ends_it(server: PushServer, target: Target) -> None:
    blob = Blob(LITTLE)
    assert pushed(target, blob) == Arrived(way=Way.SENT, bytes_sent=len(LITTLE))
    assert_there(server, blob)
    assert kinds(server) == ["blob", "begin", "commit"]


def test_a_blob_of_nothing(server: PushServer, target: Target) -> None:
    blob = Blob(b"")
    assert pushed(target, blob) == Arrived(way=Way.SENT)
    assert_there(server, blob)


def test_what_is_there_is_not_sent(server: PushServer, target: Target) -> None:
    blob = Blob(CONTENT)
    server.store(REPOSITORY, CONTENT)
    assert pushed(target, blob, sources=("team/other",)) == Arrived(way=Way.THERE)
    assert kinds(server) == ["blob"]
    assert blob.opened == 0


def test_other_bytes_under_a_digest_are_said(server: PushServer, target: Target) -> None:
    blob = Blob(CONTENT)
    server.blobs[REPOSITORY] = {blob.descriptor.digest: b"others"}
    with pytest.raises(HashMismatchError, match="other bytes under the digest") as caught:
        pushed(target, blob)
    assert "they are 6; the blob has 3000000" in text_of(caught.value)


def test_memory_is_bounded(server: PushServer, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a blob, one piece is held, and a part of one goes to the socket at a time."""
    blob, longest = Blob(CONTENT, piece=1 << 20), 0
    read = upload._Reader.read

    def seen(self: upload._Reader, start: int, length: int) -> Iterator[memoryview]:
        nonlocal longest
        for piece in read(self, start, length):
            longest = max(longest, len(piece))
            yield piece

    monkeypatch.setattr(upload._Reader, "read", seen)
    pushed(target, blob)
    assert 0 < longest <= 128 << 10


# --------------------------------------------------------------------------- mounting


def test_a_blob_is_mounted_from_where_it_lies(server: PushServer, target: Target) -> None:
    blob = Blob(CONTENT)
    server.store("team/other", CONTENT)
    assert pushed(target, blob, sources=("team/other",)) == Arrived(way=Way.MOUNTED)
    assert_there_too(server, blob)
    assert kinds(server) == ["blob", "mount"]
    assert blob.opened == 0


def test_a_mount_that_begins_an_upload_is_that_upload(server: PushServer, target: Target) -> None:
    blob = Blob(CONTENT)
    assert pushed(target, blob, sources=("team/gone", "team/never-asked")).way is Way.SENT
    assert_there(server, blob)
    assert kinds(server) == ["blob", "mount", "patch", "commit"]


@pytest.mark.parametrize("fault", [401, 403, 404, 405, 500, 503, Fault(lost=True), Fault(cut=0)], ids=str)
def test_what_cannot_be_mounted_is_sent(server: PushServer, target: Target, fault: Fault | int) -> None:
    blob = Blob(CONTENT)
    server.store("team/other", CONTENT)
    server.fault("mount", fault, fault)
    assert pushed(target, blob, sources=("team/other",)).way is Way.SENT
    assert_there_too(server, blob)
    assert len(server.of_kind("mount")) == 1, "a mount is not worth waiting for"


def test_a_mount_is_asked_for_with_a_log_in_for_both(server: PushServer, target: Target) -> None:
    server.tokens = TokenService()
    server.store("team/other", CONTENT)
    assert pushed(target, Blob(CONTENT), sources=("team/other",)).way is Way.MOUNTED
    both = ["repository:team/app:pull,push", "repository:team/other:pull"]
    assert list(server.tokens.scopes.values()) == [both[:1], both]


# --------------------------------------------------------------------------- what passes


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
@pytest.mark.parametrize("kind", ["begin", "patch", "commit"])
def test_what_passes_is_waited_for(server: PushServer, target: Target, kind: str, status: int) -> None:
    blob = Blob(CONTENT)
    server.fault(kind, status, status)
    assert pushed(target, blob).way is Way.SENT
    assert_there(server, blob)
    assert len(server.of_kind(kind)) == 3
    if kind == "commit":
        assert server.received == len(CONTENT), "what arrived is not sent again"


@pytest.mark.parametrize("kind", ["begin", "patch", "commit"])
def test_as_long_as_the_registry_says(server: PushServer, target: Target, kind: str) -> None:
    server.fault(kind, Fault(status=429, headers={"Retry-After": "1"}))
    started = time.monotonic()
    pushed(target, Blob(LITTLE if kind == "begin" else CONTENT))
    assert 1.0 <= time.monotonic() - started < 5


def test_but_not_for_a_day(server: PushServer, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "RETRY_AFTER_MAX_S", 0.2)
    for said in ("86400", "soon", "-1"):
        server.fault("begin", Fault(status=503, headers={"Retry-After": said}))
    pushed(target, Blob(LITTLE))


@pytest.mark.parametrize("kind", ["begin", "patch", "commit"])
def test_what_does_not_pass_is_given_up(server: PushServer, target: Target, kind: str) -> None:
    server.fault(kind, *[503] * 6)
    with pytest.raises(SourceError, match="gave up after 6 attempts") as caught:
        pushed(target, Blob(CONTENT))
    assert "HTTP 503" in text_of(caught.value)
    assert len(server.of_kind(kind)) == 6


@pytest.mark.parametrize("status", [403, 405, 409, 422, 507])
@pytest.mark.parametrize("kind", ["begin", "patch", "commit"])
def test_what_is_refused_is_not_repeated(server: PushServer, target: Target, kind: str, status: int) -> None:
    server.fault(kind, status)
    with pytest.raises(SourceError) as caught:
        pushed(target, Blob(CONTENT))
    text = text_of(caught.value)
    assert f"HTTP {status} (UNKNOWN)" in text
    assert "canary" not in text
    assert len(server.of_kind(kind)) == 1


# --------------------------------------------------------------------------- what breaks off


@pytest.mark.parametrize("after", [0, 1_000_000, 2_999_999])
def test_a_broken_upload_goes_on_where_it_was(server: PushServer, target: Target, after: int) -> None:
    blob = Blob(CONTENT)
    server.fault("patch", Fault(cut=after))
    pushed(target, blob)
    assert_there(server, blob)
    assert server.received == len(CONTENT), "nothing arrives twice"
    assert len(server.of_kind("begin")) == 1
    assert len(server.of_kind("state")) == 1
    if after == 1_000_000:
        assert server.of_kind("patch")[1].headers["content-range"] == "1000000-2999999"


def test_a_link_that_breaks_often_but_brings_something(server: PushServer, target: Target) -> None:
    blob = Blob(CONTENT)
    server.fault("patch", *[Fault(cut=150_000)] * 13)
    pushed(target, blob)
    assert_there(server, blob)
    assert server.received == len(CONTENT)


def test_a_link_that_brings_nothing_is_given_up(server: PushServer, target: Target) -> None:
    server.fault("patch", *[Fault(cut=0)] * 6)
    with pytest.raises(SourceError, match="gave up after 6 attempts"):
        pushed(target, Blob(CONTENT))
    assert len(server.of_kind("patch")) == 6


def test_a_registry_that_forgets_what_broke_off_gets_it_anew(server: PushServer, target: Target) -> None:
    blob = Blob(CONTENT)
    server.forgets_broken = True
    server.fault("patch", Fault(cut=1_000_000), Fault(cut=2_000_000))
    arrived = pushed(target, blob)
    assert blob.descriptor.digest in server.blobs[REPOSITORY]
    assert server.received == 6_000_000
    assert arrived.bytes_sent >= 6_000_000
    assert blob.opened == 3


def test_a_registry_that_forgets_each_time_is_given_up(server: PushServer, target: Target) -> None:
    server.fault("patch", *[404] * 6)
    with pytest.raises(SourceError, match="could not be pushed") as caught:
        pushed(target, Blob(CONTENT))
    assert "lost each upload of it: HTTP 404" in text_of(caught.value)
    assert len(server.of_kind("begin")) == 6


@pytest.mark.parametrize("kind", ["patch", "commit"])
@pytest.mark.parametrize("forgets", [False, True])
def test_an_answer_that_is_lost(server: PushServer, target: Target, kind: str, *, forgets: bool) -> None:
    blob = Blob(CONTENT)
    server.forgets_broken = forgets
    server.fault(kind, Fault(lost=True))
    pushed(target, blob)
    assert blob.descriptor.digest in server.blobs[REPOSITORY]
    twice = kind == "patch" and forgets
    assert server.received == len(CONTENT) * (2 if twice else 1)


def test_a_lost_answer_to_the_beginning(server: PushServer, target: Target) -> None:
    blob = Blob(LITTLE)
    server.fault("begin", Fault(lost=True))
    pushed(target, blob)
    assert_there_too(server, blob)


@pytest.mark.parametrize("kind", ["blob", "begin", "patch", "commit"])
@pytest.mark.parametrize("short", [12, 40, 60])
def test_an_answer_that_is_cut_within_its_head(server: PushServer, kind: str, short: int) -> None:
    """The head may have lost its Location, or only a part of it, which is an address as well."""
    blob = Blob(CONTENT)
    with (
        proxy.Proxy(int(server.host.rpartition(":")[2])) as between,
        Registry(between.host, configuration=Configuration()) as registry,
    ):
        # What these were to do the registry has done: it is asked, and they are not sent again.
        between.fault(kind, *[proxy.Fault(short=short)] * (1 if kind in ("patch", "commit") else 3))
        pushed(Target(registry=registry, repository=REPOSITORY), blob)
        assert not between.pending
    assert_there_too(server, blob)
    assert server.received == len(CONTENT)


@pytest.mark.parametrize("short", [12, 200])
def test_a_manifest_that_breaks_off_is_read_again(server: PushServer, short: int) -> None:
    content = b"{%s}" % (b" " * 1000)
    server.tag(REPOSITORY, "latest", content)
    with (
        proxy.Proxy(int(server.host.rpartition(":")[2])) as between,
        Registry(between.host, configuration=Configuration()) as registry,
    ):
        target = Target(registry=registry, repository=REPOSITORY)
        between.fault("read", proxy.Fault(short=short), proxy.Fault(short=short))
        assert read_manifest(target, "latest") == content
        assert not between.pending
        between.fault("read", *[proxy.Fault(short=short)] * 40)
        with pytest.raises(SourceError):
            read_manifest(target, "latest")


@pytest.mark.parametrize("kind", ["patch", "commit", "state"])
def test_an_upload_that_expires(server: PushServer, target: Target, kind: str) -> None:
    blob = Blob(CONTENT)
    if kind == "state":
        server.fault("patch", Fault(cut=1_000_000))
    server.fault(kind, Fault(before=server.forget))
    pushed(target, blob)
    assert_there(server, blob)
    assert len(server.of_kind("begin")) == 2


def test_a_registry_that_took_less_than_was_sent(server: PushServer, target: Target) -> None:
    blob = Blob(CONTENT)

    def shorten() -> None:
        (one,) = server.uploads.values()
        del one.content[1_000_000:]

    server.fault("commit", Fault(before=shorten))  # then its range does not fit, and the rest is sent
    pushed(target, blob)
    assert_there(server, blob)


def test_bytes_that_change_on_the_way_are_sent_again(server: PushServer, target: Target) -> None:
    blob = Blob(CONTENT)

    def damage() -> None:
        (one,) = server.uploads.values()
        one.content[5] ^= 1

    server.fault("commit", Fault(before=damage))
    pushed(target, blob)
    assert_there(server, blob)


def test_a_registry_that_says_it_took_another_blob(server: PushServer, target: Target) -> None:
    server.fault("commit", Fault(headers={"Docker-Content-Digest": f"sha256:{'0' * 64}"}))
    with pytest.raises(HashMismatchError, match="took the layer for another"):
        pushed(target, Blob(LITTLE))


@pytest.mark.parametrize("said", ["0-99999999", "5-9", "", "-", "0-x"])
def test_a_state_that_is_none(server: PushServer, target: Target, said: str) -> None:
    blob = Blob(CONTENT)
    server.fault("patch", Fault(cut=1_000_000))
    server.fault("state", Fault(headers={"Range": said}))
    pushed(target, blob)
    assert blob.descriptor.digest in server.blobs[REPOSITORY]
    assert len(server.of_kind("begin")) == 2


def test_what_is_wrong_in_the_store_never_arrives_whole(server: PushServer, target: Target) -> None:
    blob = Blob(CONTENT)

    def wrong() -> Iterator[bytes]:
        yield from Blob(CONTENT[:-1] + b"!").pieces()
        raise HashMismatchError("the layer came out with other bytes")

    with pytest.raises(HashMismatchError, match="other bytes"):
        push_blob(target, blob.descriptor, wrong, name="layer", sources=(), progress=Silent())
    assert not server.blobs
    assert not server.of_kind("commit")
    assert server.received < len(CONTENT)


def test_another_failure_stops_it(server: PushServer, target: Target) -> None:
    stop = threading.Event()
    server.fault("patch", Fault(cut=500_000, before=stop.set))
    with pytest.raises(SourceError, match="another transfer failed"):
        pushed(target, Blob(CONTENT), stop=stop)
    deadline = time.monotonic() + 10
    while not server.of_kind("patch") and time.monotonic() < deadline:
        time.sleep(0.01)  # the server notes a request when it is over, which we did not wait for
    assert len(server.of_kind("patch")) == 1


@pytest.mark.parametrize("kind", ["blob", "begin", "patch", "commit"])
def test_nobody_waits_for_an_answer_after_the_stop(server: PushServer, target: Target, kind: str) -> None:
    """A registry may take minutes over a large blob; whoever presses Ctrl-C does not have to."""
    stop, over = threading.Event(), threading.Event()

    def think() -> None:
        stop.set()
        over.wait(20)

    server.fault(kind, Fault(before=think))
    started = time.monotonic()
    try:
        with pytest.raises(SourceError, match="another transfer failed"):
            pushed(target, Blob(CONTENT), stop=stop)
        assert time.monotonic() - started < 5
    finally:
        over.set()


# --------------------------------------------------------------------------- chunks


def test_chunks_where_a_request_may_not_be_that_long(
    server: PushServer, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "CHUNKS", (2_000_000, 800_000))
    monkeypatch.setattr(upload, "SMALL", 500_000)
    server.largest = 1_000_000
    blob = Blob(CONTENT)
    pushed(target, blob)
    assert_there(server, blob)
    taken = [one for one in server.of_kind("patch", "commit") if one.status in (201, 202)]
    assert [one.headers.get("content-range") for one in taken] == [
        "0-799999", "800000-1599999", "1600000-2399999", "2400000-2999999", None,
    ]  # fmt: skip
    assert blob.opened <= 3, "from chunk to chunk it is read on"


def test_chunks_are_as_long_as_the_registry_wants(
    server: PushServer, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "CHUNKS", (400_000,))
    monkeypatch.setattr(upload, "SMALL", 100_000)
    server.largest, server.begin_headers = 1_500_000, {"OCI-Chunk-Min-Length": "1400000"}
    pushed(target, Blob(CONTENT))
    taken = [one.received for one in server.of_kind("patch", "commit") if one.status in (201, 202)]
    assert taken == [1_400_000, 1_400_000, 200_000, 0]


def test_what_is_too_long_even_in_chunks(server: PushServer, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "CHUNKS", (2_000_000,))
    server.largest = 1000
    with pytest.raises(SourceError) as caught:
        pushed(target, Blob(CONTENT))
    assert "HTTP 413" in text_of(caught.value)
    assert "allow larger requests" in text_of(caught.value)


# --------------------------------------------------------------------------- where it goes on


@pytest.mark.parametrize(
    "place",
    [
        "http://127.0.0.1:1/upload", "http://10.0.0.1/upload", "https://10.0.0.1/upload", "https://169.254.169.254/x",
        "https://[::1]/upload", "https://[fd00::1]/upload", "https://localhost/upload", "https://intranet/upload",
        "https://api.internal/upload", "http://registry.example/upload", "ftp://registry.example/x", "http://[", "https:///x",
    ],
)  # fmt: skip
def test_an_upload_does_not_go_on_where_it_must_not(server: PushServer, target: Target, place: str) -> None:
    server.tokens = TokenService()
    server.begin_headers = {"Location": place}
    with pytest.raises(SourceError, match="points to an address that is not safe") as caught:
        pushed(target, Blob(CONTENT))
    assert "canary" not in text_of(caught.value)
    assert server.received == 0


def test_what_goes_on_elsewhere_is_not_told_who_asks(server: PushServer) -> None:
    server.tokens = TokenService()
    with PushServer() as other:
        other.uploads["elsewhere"] = Upload(repository=REPOSITORY)
        server.begin_headers = {"Location": f"{other.origin}/v2/{REPOSITORY}/blobs/uploads/elsewhere?state=hidden"}
        configuration = Configuration(plain=frozenset({other.host}))
        with Registry(server.host, configuration=configuration) as registry:
            blob = Blob(LITTLE)
            pushed(Target(registry=registry, repository=REPOSITORY), blob)
        assert other.blobs[REPOSITORY] == {blob.descriptor.digest: LITTLE}
        assert all(one.authorization is None for one in other.requests)
    assert any(one.authorization for one in server.requests)


def test_a_registry_that_does_not_say_where_to_go_on(server: PushServer, target: Target) -> None:
    server.fault("begin", Fault(headers={"Location": ""}))
    with pytest.raises(SourceError):
        pushed(target, Blob(LITTLE))


# --------------------------------------------------------------------------- who asks


def test_one_token_for_reading_and_writing(server: PushServer, target: Target) -> None:
    server.tokens = TokenService()
    for content in (CONTENT, LITTLE):
        pushed(target, Blob(content))
    assert list(server.tokens.scopes.values()) == [["repository:team/app:pull,push"]]
    assert [one.status for one in server.requests].count(401) == 1


@pytest.mark.parametrize("kind", ["begin", "patch", "commit", "state"])
def test_a_token_that_ends_during_an_upload(server: PushServer, target: Target, kind: str) -> None:
    blob = Blob(CONTENT)
    server.tokens = tokens = TokenService()

    def end() -> None:
        tokens.given.update(dict.fromkeys(tokens.given, 0.0))

    if kind == "state":
        server.fault("patch", Fault(cut=1_000_000))
    server.fault(kind, Fault(before=end))
    started = time.monotonic()
    pushed(target, blob)
    assert blob.descriptor.digest in server.blobs[REPOSITORY]
    assert len(tokens.given) == 2
    assert time.monotonic() - started < 5


def test_a_token_that_does_not_open_it(server: PushServer, target: Target) -> None:
    server.tokens = TokenService(lifetime_s=0)
    with pytest.raises(SourceError, match="does not open team/app to you") as caught:
        pushed(target, Blob(LITTLE))
    assert "canary" not in text_of(caught.value)


def test_who_may_read_but_not_write(server: PushServer, target: Target) -> None:
    server.fault("begin", *[401] * 9)
    server.basic = None
    with pytest.raises(SourceError, match="does not open team/app to you"):
        pushed(target, Blob(LITTLE))


# --------------------------------------------------------------------------- manifests


def test_a_manifest_is_stored_once(server: PushServer, target: Target) -> None:
    content = b'{"config": {"digest": "a"}, "layers": []}'
    server.blobs[REPOSITORY] = {"a": b""}
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert resolve(target, digest) is None
    server.fault("manifest", 503, Fault(lost=True))

    def stored() -> bool:
        return put_manifest(target, digest, content, MEDIA_MANIFEST, needed=lambda: resolve(target, digest) is None)

    stored()
    assert len(server.of_kind("manifest")) == 2, "only the answer was lost, and it was looked for"
    assert not stored()
    assert resolve(target, digest) == digest
    assert read_manifest(target, digest) == content


@pytest.mark.parametrize("status", [400, 403, 404, 413])
def test_a_manifest_that_is_refused(server: PushServer, target: Target, status: int) -> None:
    server.fault("tag", status)
    with pytest.raises(SourceError) as caught:
        put_manifest(target, "tag", b"{}", MEDIA_MANIFEST, needed=lambda: True)
    assert f"HTTP {status}" in text_of(caught.value)
    assert len(server.of_kind("tag")) == 1


def test_a_registry_without_the_digest_header_is_read(server: PushServer, target: Target) -> None:
    digest = server.tag(REPOSITORY, "v1", b"{}")
    server.fault("look", Fault(headers={"Docker-Content-Digest": ""}))
    assert resolve(target, "v1") == digest
    assert [one.kind for one in server.requests] == ["look", "read"]


@pytest.mark.parametrize("kind", ["look", "read"])
def test_what_cannot_be_said_is_not_absent(server: PushServer, target: Target, kind: str) -> None:
    ask: Callable[[Target, str], object] = resolve if kind == "look" else read_manifest
    server.fault(kind, 400)
    with pytest.raises(SourceError, match="whether it has the manifest"):
        ask(target, "v1")
    assert ask(target, "v1") is None


# --------------------------------------------------------------------------- nothing is told


def test_no_secret_is_shown(server: PushServer, target: Target, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server.tokens = TokenService()
    server.fault("patch", *[503] * 6)
    with pytest.raises(SourceError) as caught:
        pushed(target, Blob(CONTENT))
    server.fault("begin", 422)
    with pytest.raises(SourceError) as refused:
        pushed(target, Blob(LITTLE))
    for error in (caught.value, refused.value):
        shown = text_of(error) + str(error) + repr(error)
        assert "canary" not in shown
        assert "hidden" not in shown


def test_files_are_not_needed(tmp_path: Path, server: PushServer, target: Target) -> None:
    """What is sent comes from the pieces alone, and a piece may be of any length."""
    blob = Blob(CONTENT, piece=7_919)
    pushed(target, blob)
    assert_there(server, blob)
    assert not list(tmp_path.iterdir())
