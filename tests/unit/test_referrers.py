"""What lies beside an image: the same with the referrers API and with its stand-in, and nothing of others' is lost."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder import push, referrers, transfer
from builder.credentials import Configuration
from builder.errors import HashMismatchError, SourceError
from builder.layout import MEDIA_INDEX, MEDIA_MANIFEST, Descriptor
from builder.referrers import Artifact
from builder.upload import Target
from tests.support.registry_server import Fault, PushServer, text_of

REPOSITORY = "team/app"
IMAGE = b'{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json"}'
BILL = Artifact(artifact_type="application/vnd.cyclonedx+json", content=b'{"bill": 1}')


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BACKOFF_S", 0.001)
    monkeypatch.setattr(transfer, "BACKOFF_MAX_S", 0.01)
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(params=["api", "stand-in"])
def server(request: pytest.FixtureRequest) -> Iterator[PushServer]:
    with PushServer() as running:
        running.lists_referrers = request.param == "api"
        yield running


@pytest.fixture
def target(server: PushServer) -> Iterator[Target]:
    with push.opened(f"{server.host}/{REPOSITORY}", Configuration()) as opened:
        yield opened


@pytest.fixture
def image(server: PushServer) -> Descriptor:
    digest = server.tag(REPOSITORY, "1.0", IMAGE)
    return Descriptor(media_type=MEDIA_MANIFEST, digest=digest, size=len(IMAGE))


def documents(target: Target, image: Descriptor) -> dict[str, bytes]:
    """Return what lies beside the image by type."""
    found = {}
    for one in referrers.referrers(target, image.digest):
        assert one.blob is not None
        found[one.artifact_type] = referrers.document(target, one.blob, limit=1 << 20)
    return found


def test_what_is_attached_is_found(target: Target, image: Descriptor) -> None:
    assert referrers.referrers(target, image.digest) == ()
    other = Artifact(artifact_type="application/x-other", content=b"2", annotations={"a": "b"})
    first, second = (referrers.attach(target, image, one) for one in (BILL, other))
    found = {one.digest: one for one in referrers.referrers(target, image.digest)}
    assert set(found) == {first, second}
    assert found[second].annotations == {"a": "b"}
    assert documents(target, image) == {BILL.artifact_type: BILL.content, other.artifact_type: b"2"}


def test_attaching_again_changes_nothing(server: PushServer, target: Target, image: Descriptor) -> None:
    first = referrers.attach(target, image, BILL)
    before = len(server.of_kind("manifest", "tag", "begin"))
    assert referrers.attach(target, image, BILL) == first
    assert len(server.of_kind("manifest", "tag", "begin")) == before
    assert len(referrers.referrers(target, image.digest)) == 1


def test_pages_are_followed(server: PushServer, target: Target, image: Descriptor) -> None:
    server.page = 2
    for number in range(5):
        referrers.attach(target, image, Artifact(artifact_type=f"application/x-{number}", content=b"{}"))
    assert len(referrers.referrers(target, image.digest)) == 5


def test_answers_that_fail_are_asked_for_again(server: PushServer, target: Target, image: Descriptor) -> None:
    server.fault("list", 503, 429)
    server.fault("manifest", 502, Fault(lost=True))
    server.fault("begin", 500)
    referrers.attach(target, image, BILL)
    assert documents(target, image) == {BILL.artifact_type: BILL.content}


def test_other_bytes_are_refused(server: PushServer, target: Target, image: Descriptor) -> None:
    digest = referrers.attach(target, image, BILL)
    kind, content = server.manifests[REPOSITORY][digest]
    server.manifests[REPOSITORY][digest] = (kind, content.replace(b"cyclonedx", b"cyclonedy"))
    with pytest.raises(HashMismatchError, match="other bytes than it listed"):
        referrers.referrers(target, image.digest)


def test_a_document_that_was_altered_is_refused(server: PushServer, target: Target, image: Descriptor) -> None:
    referrers.attach(target, image, BILL)
    server.blobs[REPOSITORY][BILL.blob.digest] = b'{"bill": 2}'
    with pytest.raises(HashMismatchError, match="other bytes than it listed"):
        documents(target, image)


def test_a_document_that_is_too_large_is_not_fetched(server: PushServer, target: Target, image: Descriptor) -> None:
    referrers.attach(target, image, BILL)
    (found,) = referrers.referrers(target, image.digest)
    assert found.blob is not None
    with pytest.raises(SourceError, match="too large"):
        referrers.document(target, found.blob, limit=4)
    assert not server.of_kind("fetch")


def test_what_is_about_another_image_is_left_out(server: PushServer, target: Target, image: Descriptor) -> None:
    other = Descriptor(media_type=MEDIA_MANIFEST, digest=server.tag(REPOSITORY, "2", IMAGE + b" "), size=len(IMAGE) + 1)
    content = BILL.manifest(other)
    server.store(REPOSITORY, b"{}")
    server.store(REPOSITORY, BILL.content)
    digest = server.tag(REPOSITORY, "liar", content)
    index = {"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": [
        {"mediaType": MEDIA_MANIFEST, "digest": digest, "size": len(content)},
    ]}  # fmt: skip
    server.tag(REPOSITORY, image.digest.replace(":", "-"), json.dumps(index).encode())
    assert referrers.referrers(target, image.digest) == ()


# ----------------------------------------------------------------------------------------------------
# The stand-in


@pytest.fixture
def old() -> Iterator[PushServer]:
    with PushServer() as running:
        yield running


def test_an_api_that_does_not_list_what_it_took(old: PushServer) -> None:
    old.lists_referrers = True
    digest = old.tag(REPOSITORY, "1.0", IMAGE)
    image = Descriptor(media_type=MEDIA_MANIFEST, digest=digest, size=len(IMAGE))
    empty = json.dumps({"schemaVersion": 2, "manifests": []}).encode()
    old.fault("list", Fault(body=empty, headers={"Content-Length": str(len(empty))}))
    with (
        push.opened(f"{old.host}/{REPOSITORY}", Configuration()) as target,
        pytest.raises(SourceError, match="does not list it"),
    ):
        referrers.attach(target, image, BILL)


def test_entries_of_others_stay_as_they_are(old: PushServer) -> None:
    digest = old.tag(REPOSITORY, "1.0", IMAGE)
    image = Descriptor(media_type=MEDIA_MANIFEST, digest=digest, size=len(IMAGE))
    strange = [
        {"mediaType": "x", "digest": "sha512:" + "0" * 128, "size": 1, "unknown": {"a": [1]}},
        {"mediaType": MEDIA_MANIFEST, "digest": "sha256:" + "1" * 64, "size": 1},
    ]
    index = {"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": strange}
    old.tag(REPOSITORY, digest.replace(":", "-"), json.dumps(index).encode())
    with push.opened(f"{old.host}/{REPOSITORY}", Configuration()) as target:
        referrers.attach(target, image, BILL)
        # What is listed and not there was deleted.
        assert [one.artifact_type for one in referrers.referrers(target, digest)] == [BILL.artifact_type]
    written = old.manifests[REPOSITORY][old.tags[REPOSITORY][digest.replace(":", "-")]][1]
    assert json.loads(written)["manifests"][:2] == strange
    assert json.loads(written)["manifests"][2]["artifactType"] == BILL.artifact_type


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"manifests": 1}', b'{"manifests": [1]}', b"\xff"])
def test_a_stand_in_that_is_none_is_not_overwritten(old: PushServer, content: bytes) -> None:
    digest = old.tag(REPOSITORY, "1.0", IMAGE)
    image = Descriptor(media_type=MEDIA_MANIFEST, digest=digest, size=len(IMAGE))
    old.tag(REPOSITORY, digest.replace(":", "-"), content)
    with push.opened(f"{old.host}/{REPOSITORY}", Configuration()) as target:
        with pytest.raises(SourceError, match="is none"):
            referrers.referrers(target, digest)
        with pytest.raises(SourceError, match="is none"):
            referrers.attach(target, image, BILL)
    assert old.manifests[REPOSITORY][old.tags[REPOSITORY][digest.replace(":", "-")]][1] == content


def test_many_attach_at_once(old: PushServer) -> None:
    """Where a registry heeds conditions, nobody's entry is lost."""
    old.conditional = True
    digest = old.tag(REPOSITORY, "1.0", IMAGE)
    image = Descriptor(media_type=MEDIA_MANIFEST, digest=digest, size=len(IMAGE))
    failures: list[str] = []

    def attach(number: int) -> None:
        with push.opened(f"{old.host}/{REPOSITORY}", Configuration()) as target:
            try:
                referrers.attach(target, image, Artifact(artifact_type=f"application/x-{number}", content=b"{}"))
            except SourceError as error:
                failures.append(text_of(error))

    threads = [threading.Thread(target=attach, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with push.opened(f"{old.host}/{REPOSITORY}", Configuration()) as target:
        found = {one.artifact_type for one in referrers.referrers(target, digest)}
    assert not failures, failures
    assert found == {f"application/x-{number}" for number in range(3)}


def test_somebody_who_overwrites_the_stand_in_is_noticed(old: PushServer) -> None:
    digest = old.tag(REPOSITORY, "1.0", IMAGE)
    image = Descriptor(media_type=MEDIA_MANIFEST, digest=digest, size=len(IMAGE))
    tag = digest.replace(":", "-")
    empty = json.dumps({"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": []}).encode()
    undone: list[str] = []

    def overwrite() -> None:
        if tag in old.tags[REPOSITORY] and not undone:
            undone.append(old.tag(REPOSITORY, tag, empty))

    old.fault("read", *(Fault(before=overwrite) for _ in range(3)))
    with push.opened(f"{old.host}/{REPOSITORY}", Configuration()) as target:
        referrers.attach(target, image, BILL)
        assert undone, "it was overwritten once"
        assert len(referrers.referrers(target, digest)) == 1


def test_a_manifest_is_one_however_it_is_made(tmp_path: Path) -> None:
    image = Descriptor(media_type=MEDIA_MANIFEST, digest="sha256:" + "0" * 64, size=3)
    one = Artifact(artifact_type="t", content=b"c", annotations={"b": "2", "a": "1"})
    other = Artifact(artifact_type="t", content=b"c", annotations={"a": "1", "b": "2"})
    assert one.manifest(image) == other.manifest(image)
    document = json.loads(one.manifest(image))
    assert document["subject"] == {"mediaType": MEDIA_MANIFEST, "digest": image.digest, "size": 3}
    assert document["config"]["mediaType"] == "application/vnd.oci.empty.v1+json"
