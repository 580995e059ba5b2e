#!/usr/bin/env python3
"""Say in Markdown which layers images would have that the published ones have not: `AFTER DIRECTORY`.

AFTER is what `torchyard size --json` prints, and DIRECTORY holds the manifests that are published, by the ids of their
cells. For who decides about new Debian packages: what users have to pull, and whether anything of Python is touched.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SYSTEM = ("base ", "system packages", "environment and image.json")
"""How layers are called that hold no Python packages, or change with the base because they name it."""


def changes(sizes: Mapping[str, Any], published: Mapping[str, Sequence[str]]) -> str:
    """Return a table of what is new for users of each image, and a sentence about Python packages above it.

    `published` has the digests of layers by the id of the cell.
    """
    layers = {layer["digest"]: layer for layer in sizes["layers"]}
    others: dict[str, None] = {}
    rows = []
    for cell in sizes["cells"]:
        known = published.get(cell["id"])
        if known is None:
            rows.append(f"| `{cell['tag']}` | - | - | not published |")
            continue
        new = [layers[digest] for digest in cell["layers"] if digest not in known]
        titles = [layer["title"].partition(" of torch")[0] for layer in new]
        others |= dict.fromkeys(layer["title"] for layer in new if not layer["title"].startswith(SYSTEM))
        size = sum(layer["compressed_bytes"] for layer in new) / 1e6
        rows.append(f"| `{cell['tag']}` | {len(new)} of {len(cell['layers'])} | {size:.1f} | {'; '.join(titles)} |")
    lines = ["No layer with Python packages changes."]
    if others:
        lines = ["Layers with Python packages change:", "", *(f"- {title}" for title in others)]
    elif not published:
        lines = ["Nothing is published, so no layers were compared."]
    return "\n".join([*lines, "", "| image | new layers | MB to pull | which |", "|---|---|---|---|", *rows]) + "\n"


def main(after: str, directory: str) -> None:
    """Read the files and print."""
    sizes = json.loads(Path(after).read_text("utf-8"))
    published = {
        path.stem: [layer["digest"] for layer in json.loads(path.read_text("utf-8"))["layers"]]
        for path in Path(directory).glob("*.json")
    }
    sys.stdout.write(changes(sizes, published))


if __name__ == "__main__":
    main(*sys.argv[1:3])
