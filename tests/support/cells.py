"""Cells as a matrix gives them, without a matrix on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence

from builder import matrix
from builder.facts import Facts
from builder.matrix import Cell, cuda_label

EXCLUDE_NEWER = "2026-11-15T00:00:00Z"
FACTS = Facts.load()


def cell(
    torch: str = "2.8.0",
    cuda: str = "12.8",
    *,
    cudnn: str = "stock",
    python: str = "3.11",
    packages: Sequence[str] = ("numpy",),
    platform: str = "linux/amd64",
    index_url: str | None = None,
    exclude_newer: str = EXCLUDE_NEWER,
) -> Cell:
    """Return one cell; with `index_url`, torch comes from an explicit index there, named like pytorch-cu118."""
    content = {
        "version": 1,
        "repository": "torchyard",
        "exclude_newer": exclude_newer,
        "bases": {"plain": {"kind": "image", "image": f"debian@sha256:{'0' * 64}", "python": python}},
        "variants": {"runtime": {"description": "a small one", "packages": list(packages)}},
        "indexes": [
            {"name": f"pytorch-{cuda_label(cuda)}", "url": index_url, "packages": ["torch"], "when": {"cuda": cuda}}
        ]
        if index_url
        else [],
        "axes": {
            "torch": [torch],
            "cuda": [cuda],
            "cudnn": [cudnn],
            "base": ["plain"],
            "variant": ["runtime"],
            "platform": [platform],
        },
    }
    (only,) = matrix.cells(json.dumps(content), FACTS)  # JSON is YAML
    return only
