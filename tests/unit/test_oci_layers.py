"""Layers as cells share them, and wheels of which no layer is ever made."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from packaging.utils import canonicalize_name, parse_wheel_filename

from builder.engines.oci import layers
from builder.engines.oci.stack import Group, Section
from builder.engines.oci.turns import Turns
from builder.errors import WheelError
from builder.export import stored_image
from builder.lock import DEFAULT_INDEX, Wheel
from builder.sha256 import Hasher
from builder.store import Store
from tests.support.bases import base_entries, bootstrap_cell, fake_python, ready
from tests.support.evil import EVIL, EvilWheel


def layers_of(root: Path, python: str) -> dict[str, str]:
    """Build a CUDA cell for a Python; returns the digest of each layer by what the history says of it."""
    with fake_python(f"{python}.2"):
        one = ready(root, bootstrap_cell(python=python), entries=base_entries(python))
        image = stored_image(one.store, one.build().digest)
    history: list[dict[str, Any]] = json.loads(one.store.path(image.config.sha256).read_bytes())["history"]
    return {line["created_by"]: layer.blob.digest for line, layer in zip(history, image.layers, strict=True)}


def test_nvidias_layers_are_the_same_for_every_python(tmp_path: Path) -> None:
    one, other = layers_of(tmp_path / "one", "3.11"), layers_of(tmp_path / "other", "3.13")
    nvidia = {title: digest for title, digest in one.items() if "nvidia-" in title}
    assert any("nvidia-cudnn" in title for title in nvidia)
    assert nvidia.items() <= other.items()
    assert one["torchyard: bytecode of torch"] != other["torchyard: bytecode of torch"]


# No lock can name a file that is not named like a wheel.
LOCKABLE = [evil for evil in EVIL if evil.filename.endswith(".whl") and evil.filename.count("-") >= 4]


@pytest.mark.parametrize("evil", LOCKABLE, ids=lambda evil: evil.title)
def test_of_an_evil_wheel_nothing_is_stored(evil: EvilWheel, tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    sha256 = store.put(evil.content)
    name, version, _, _ = parse_wheel_filename(evil.filename)
    wheel = Wheel(
        name=canonicalize_name(name), version=version, filename=evil.filename, sha256=sha256, size=len(evil.content),
        upload_time=None, index=DEFAULT_INDEX,
    )  # fmt: skip
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "locks")
    group = Group(section=Section.VARIANT, wheels=(wheel,))
    with Hasher(1) as hasher, pytest.raises(WheelError, match=evil.message):
        layers.spliced(group, store, hasher=hasher, turns=Turns(1), stopped=threading.Event())
    after = sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "locks")
    assert after == before
