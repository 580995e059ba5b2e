"""What lies beside an image in a repository and speaks about it: attached, listed and read, with or without the API.

A registry without the referrers API of OCI 1.1 gets the specification's stand-in: an index under the tag
`sha256-<digest>`, which every tool that attaches something has to read, extend and write again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from builder.errors import HashMismatchError, SourceError
from builder.fetching import PARALLEL, Silent
from builder.layout import MEDIA_INDEX, MEDIA_MANIFEST, Descriptor, canonical_json
from builder.registry import MANIFEST_MAX
from builder.upload import Target, push_blob, put_manifest, read_manifest, resolve

EMPTY = Descriptor(
    media_type="application/vnd.oci.empty.v1+json",
    digest=f"sha256:{hashlib.sha256(b'{}').hexdigest()}",
    size=2,
)
"""The configuration of what is no image."""
MOST = 500
"""Things beside one image that are looked at: each costs a request, and strangers may attach, too."""
PAGES = 50
_RACES = 5
"""Times that somebody else's writing of the stand-in is made up for."""
_ACCEPT = {"Accept": MEDIA_INDEX, "Accept-Encoding": "identity"}


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One document about an image, as it is attached."""

    artifact_type: str
    content: bytes
    annotations: Mapping[str, str] = field(default_factory=dict)

    def manifest(self, subject: Descriptor) -> bytes:
        """Return the manifest that ties the document to an image: equal ones are one, however often they are sent."""
        document: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": MEDIA_MANIFEST,
            "artifactType": self.artifact_type,
            "config": EMPTY.as_json(),
            "layers": [self.blob.as_json()],
            "subject": {"mediaType": subject.media_type, "digest": subject.digest, "size": subject.size},
        }
        if self.annotations:
            document["annotations"] = dict(self.annotations)
        return canonical_json(document)

    @property
    def blob(self) -> Descriptor:
        """The document as a blob."""
        return Descriptor(media_type=self.artifact_type, digest=_digest(self.content), size=len(self.content))


@dataclass(frozen=True, kw_only=True)
class Referrer:
    """Something that lies beside an image: what it says it is, and where its document is."""

    digest: str
    """Of its manifest."""
    artifact_type: str
    annotations: Mapping[str, str]
    blobs: tuple[Descriptor, ...]

    @property
    def blob(self) -> Descriptor | None:
        """Its document; None if it has none, or several."""
        return self.blobs[0] if len(self.blobs) == 1 else None


# ----------------------------------------------------------------------------------------------------
# Listing and reading


def referrers(target: Target, digest: str) -> tuple[Referrer, ...]:
    """Return what lies beside the image with `digest` in its repository, in the registry's order.

    Raises SourceError if the registry does not say, and HashMismatchError if it gives other bytes than it listed.
    """
    listed = _listed(target, digest)
    if listed is None:
        listed = _of_index(_stand_in(target, digest), f"{target}:{_tag(digest)}")
    named = tuple(dict.fromkeys(entry.digest for entry in listed))
    if len(named) > MOST:
        raise SourceError(
            f"there are more than {MOST} things beside the image", where=f"{target}@{digest}",
            tries=("have old ones deleted there",),
        )  # fmt: skip
    with ThreadPoolExecutor(PARALLEL) as pool:
        contents = list(pool.map(lambda name: _checked(target, name, read_manifest(target, name)), named))
    # An entry may linger in the index after its manifest was deleted.
    there = [(name, content) for name, content in zip(named, contents, strict=True) if content is not None]
    return tuple(one for name, content in there if (one := _referrer(content, name, digest)) is not None)


def document(target: Target, blob: Descriptor, *, limit: int) -> bytes:
    """Return a document that lies beside an image; raises SourceError or HashMismatchError if it cannot be had."""
    where = f"{target}@{blob.digest}"
    if blob.size > limit:
        raise SourceError("a document beside the image is too large", where=where, why=f"{blob.size} bytes")
    response = target.registry.request(
        "GET", f"blobs/{blob.digest}", repository=target.repository, actions=target.actions, headers=_ACCEPT_ANY
    )
    if response.status_code != 200:
        raise target.registry.refusal(response, target.repository, "document")
    content = target.registry.small_body(response, limit)
    if content is None:
        raise SourceError("a document beside the image broke off", where=where, tries=("run again",))
    _checked(target, blob.digest, content)
    return content


_ACCEPT_ANY = {"Accept": "*/*", "Accept-Encoding": "identity"}


def _checked(target: Target, digest: str, content: bytes | None) -> bytes | None:
    if content is not None and _digest(content) != digest:
        raise HashMismatchError(
            "the registry gives other bytes than it listed",
            where=f"{target}@{digest}",
            why=f"they have the digest {_digest(content)}",
            tries=("run again: a proxy may have changed them on the way", "do not use this registry if it stays"),
        )
    return content


def _listed(target: Target, digest: str) -> list[Descriptor] | None:
    """Return what the referrers API lists; None if the registry does not have it."""
    found: list[Descriptor] = []
    path = f"referrers/{digest}"
    for _ in range(PAGES):
        response = target.registry.request(
            "GET", path, repository=target.repository, actions=target.actions, headers=_ACCEPT
        )
        if response.status_code in (400, 404, 405, 406, 410, 501):  # each seen of registries without it
            response.close()
            return None
        if response.status_code != 200:
            raise target.registry.refusal(response, target.repository, "list of what lies beside the image")
        following = _next_page(response.headers.get("Link", ""), f"/v2/{target.repository}/")
        is_index = response.headers.get("Content-Type", "").partition(";")[0].strip() == MEDIA_INDEX
        content = target.registry.small_body(response, MANIFEST_MAX)
        if not is_index:  # a page for people, from what stands before the registry
            return None
        found += _of_index(content, f"{target}: referrers of {digest}")
        if following is None:
            return found
        path = following
    raise SourceError("the registry's list of what lies beside the image has no end", where=f"{target}@{digest}")


def _next_page(link: str, prefix: str) -> str | None:
    """Return the path below the repository to which a Link header points; None without one, or to elsewhere."""
    named = re.match(r'\s*<([^>]*)>\s*;\s*rel="?next"?', link)
    if named is None:
        return None
    parts = urlsplit(named[1])
    if not parts.path.startswith(f"{prefix}referrers/"):
        return None
    return parts.path.removeprefix(prefix) + (f"?{parts.query}" if parts.query else "")


def _tag(digest: str) -> str:
    """Return the tag of the stand-in for the API."""
    return digest.replace(":", "-", 1)


def _stand_in(target: Target, digest: str) -> bytes | None:
    """Return the index under the stand-in's tag; None if there is none yet."""
    return read_manifest(target, _tag(digest))


def _of_index(content: bytes | None, where: str) -> list[Descriptor]:
    """Return what an index lists, but for entries of unknown kinds; raises SourceError if it is no index."""
    if content is None:
        return []
    found = []
    for entry in _entries(content, where):
        with contextlib.suppress(KeyError, ValueError, TypeError, AttributeError):
            found.append(Descriptor.from_json(entry))
    return found


def _entries(content: bytes, where: str) -> list[dict[str, Any]]:
    """Return the entries of an index as they stand there: what is not understood is not lost."""
    try:
        entries = json.loads(content)["manifests"]
    except (ValueError, KeyError, TypeError, RecursionError):
        entries = None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SourceError("the list of what lies beside the image is none", where=where)
    return entries


def _referrer(content: bytes, digest: str, subject: str) -> Referrer | None:
    """Read a manifest; None if it is not about the image: an index may list anything."""
    try:
        document = json.loads(content)
        if document["subject"]["digest"] != subject:
            return None
        # Older manifests name their type in the configuration. An index is no authority: cosign 3.1 lists its own
        # bundles there under the type of their configuration.
        artifact_type = document.get("artifactType") or document["config"]["mediaType"]
        annotations = document.get("annotations") or {}
        return Referrer(
            digest=digest,
            artifact_type=str(artifact_type),
            annotations={str(key): str(value) for key, value in annotations.items()},
            blobs=tuple(Descriptor.from_json(layer) for layer in document["layers"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


# ----------------------------------------------------------------------------------------------------
# Attaching


def attach(target: Target, subject: Descriptor, artifact: Artifact) -> str:
    """Attach a document to an image that is in the repository; returns the digest of what ties it there.

    May be repeated. Raises SourceError if the registry refuses or breaks off, or if others keep writing the stand-in.
    """
    content = artifact.manifest(subject)
    digest = _digest(content)
    for blob, data in ((EMPTY, b"{}"), (artifact.blob, artifact.content)):
        _send(target, blob, data, name=artifact.artifact_type)
    put_manifest(target, digest, content, MEDIA_MANIFEST, needed=lambda: resolve(target, digest) is None)
    listed = _listed(target, subject.digest)
    if listed is None:
        _enter(target, subject, artifact, Descriptor(media_type=MEDIA_MANIFEST, digest=digest, size=len(content)))
    elif digest not in {entry.digest for entry in listed}:
        raise SourceError(
            "the registry took a document, and does not list it beside the image",
            where=f"{target}@{subject.digest}",
            why=f"its referrers API does not name {digest}",
            tries=("run again: some registries need a moment",),
        )
    return digest


def _send(target: Target, blob: Descriptor, content: bytes, *, name: str) -> None:
    push_blob(target, blob, lambda: iter((content,)), name=name, sources=(), progress=Silent())


def _enter(target: Target, subject: Descriptor, artifact: Artifact, entry: Descriptor) -> None:
    """Enter a manifest in the index that stands in for the API, without losing what others enter meanwhile."""
    tag = _tag(subject.digest)
    for _ in range(_RACES):
        before = _stand_in(target, subject.digest)
        entries = _entries(before, f"{target}:{tag}") if before is not None else []
        if any(one.get("digest") == entry.digest for one in entries):
            return
        mine = entry.as_json() | {"artifactType": artifact.artifact_type}
        if artifact.annotations:
            mine["annotations"] = dict(artifact.annotations)
        content = canonical_json({"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": [*entries, mine]})
        conditions = {"If-None-Match": "*"} if before is None else {"If-Match": f'"{_digest(before)}"'}

        def needed(expected: str | None = None if before is None else _digest(before)) -> bool:
            return resolve(target, tag) == expected

        put_manifest(target, tag, content, MEDIA_INDEX, needed=needed, conditions=conditions)
    raise SourceError(
        "somebody else keeps changing what lies beside the image",
        where=f"{target}:{tag}",
        tries=("run again when the other one has ended",),
    )


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
