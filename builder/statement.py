"""in-toto statements: what somebody says of an image, bound to its digest; made here, and read from strangers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from builder.errors import MatrixError
from builder.layout import canonical_json

MEDIA_TYPE = "application/vnd.in-toto+json"
TYPE = "https://in-toto.io/Statement/v1"
MOST_BYTES = 32 << 20
"""Of a statement that is read."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_TYPE_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[!-~]{1,200}")


class Predicate:
    """What a statement is about: the types that are made and understood here."""

    SIGNATURE = "https://sigstore.dev/cosign/sign/v1"
    """Nothing but that somebody stands for the image; what `cosign sign` writes and `cosign verify` asks for."""
    PROVENANCE = "https://slsa.dev/provenance/v1"
    VERDICT = "https://in-toto.io/attestation/test-result/v0.1"
    BILL = "https://cyclonedx.org/bom"
    VEX = "https://openvex.dev/ns"


@dataclass(frozen=True, kw_only=True)
class Statement:
    """What is said of an image."""

    digest: str
    """Of the image's manifest, "sha256:..."."""
    name: str = ""
    """What the image is called by whoever says it; nothing depends on it."""
    predicate_type: str
    predicate: Mapping[str, Any]

    def dumps(self) -> bytes:
        """Return the one spelling of the statement, which is what is signed."""
        subject: dict[str, Any] = {"digest": {"sha256": self.digest.removeprefix("sha256:")}}
        if self.name:
            subject["name"] = self.name
        document = {
            "_type": TYPE,
            "subject": [subject],
            "predicateType": self.predicate_type,
            "predicate": self.predicate,
        }
        return canonical_json(document)

    @classmethod
    def loads(cls, content: bytes, *, digest: str, where: str) -> Self:
        """Read a statement about the image with `digest`; raises MatrixError if it is none, or about another image.

        `where` is where it comes from, for errors.
        """
        document = json_object(content)
        if document is None or document.get("_type") != TYPE:
            raise _no_statement(where, f"it is not JSON of type {TYPE}")
        subjects = document.get("subject")
        named = {
            f"sha256:{one['digest'].get('sha256')}"
            for one in (subjects if isinstance(subjects, list) else ())
            if isinstance(one, dict) and isinstance(one.get("digest"), dict)
        }
        if digest not in named:
            about = ", ".join(sorted(one for one in named if _DIGEST.fullmatch(one))[:3])
            raise _no_statement(where, f"it is about {about or 'no image'}, and not about {digest}")
        kind, predicate = document.get("predicateType"), document.get("predicate")
        if not isinstance(kind, str) or not _TYPE_URI.fullmatch(kind):
            raise _no_statement(where, "it does not say what kind of statement it is")
        if predicate is not None and not isinstance(predicate, dict):
            raise _no_statement(where, "its predicate is not an object")
        return cls(digest=digest, predicate_type=kind, predicate=predicate or {})


def json_object(content: bytes) -> dict[str, Any] | None:
    """Return a JSON object; None if the content is anything else."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _no_statement(where: str, why: str) -> MatrixError:
    return MatrixError("this is no statement about the image", where=where, why=why)
