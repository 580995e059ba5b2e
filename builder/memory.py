"""What was worked out once, kept in the store by all that it was worked out from; damaged, it counts as forgotten."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

from builder.layout import canonical_json
from builder.store import Store, write_atomically

_LEVEL = 6


def remember(store: Store, kind: str, key: object, content: bytes) -> None:
    """Keep what `key` gave; `key` is JSON, and names the version of the way there besides all that went into it."""
    seal = _hash(canonical_json(key) + content)
    write_atomically(_path(store, kind, key), seal.encode() + b"\n" + zlib.compress(content, _LEVEL))


def recall(store: Store, kind: str, key: object) -> bytes | None:
    """Return what `key` gave before, byte for byte; None if it is not known."""
    try:
        seal, _, packed = _path(store, kind, key).read_bytes().partition(b"\n")
        content = zlib.decompress(packed)
    except (FileNotFoundError, zlib.error):
        return None
    return content if seal.decode("ascii", "replace") == _hash(canonical_json(key) + content) else None


def _path(store: Store, kind: str, key: object) -> Path:
    return store.root / kind / _hash(canonical_json(key))


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
