"""Images of layers that hold one file each."""

from __future__ import annotations

import random

from builder import layout, tar
from builder.layout import Image
from builder.store import Store


def made(store: Store, *layers: tuple[str, int]) -> Image:
    """Make an image of layers, each of so many bytes that depend on its name."""
    with store.scratch("image") as scratch:
        found = [
            layout.gzip_layer(
                store, tar.stream([tar.file_entry(name, random.Random(name).randbytes(size))]), scratch=scratch
            )
            for name, size in layers
        ]
    return layout.assemble(store, architecture="amd64", config={"Env": ["A=1"]}, epoch=0, layers=found)
