"""The JSON Schema for editors: as the models are, valid for the shipped matrix, and no laxer than the reader."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from builder.schema import WORDS, json_schema

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "matrix.schema.json"


def check(matrix: Path) -> subprocess.CompletedProcess[str]:
    # Reads patterns as editors do, in JavaScript's dialect.
    command = [sys.executable, "-m", "check_jsonschema", "--schemafile", str(FILE), str(matrix)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_file_is_fresh() -> None:
    fresh = json.dumps(json_schema(), indent=2) + "\n"
    assert FILE.read_text("utf-8") == fresh, "make render"


def test_the_shipped_matrix_is_valid() -> None:
    done = check(ROOT / "matrix.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("repository: torchyard", "repository: torch$yard"),
        ("kind: bootstrap", "kind: bootstap"),
        ("description: PyTorch", "description: $(id) PyTorch"),
        ("variants:", "variantz: {}\nvariants:"),
        ('cuda: ["12.6", ', "cuda: [12.6, "),
    ],
)
def test_an_editor_shows_mistakes(tmp_path: Path, old: str, new: str) -> None:
    text = (ROOT / "matrix.yaml").read_text("utf-8")
    assert old in text
    path = tmp_path / "matrix.yaml"
    path.write_text(text.replace(old, new, 1), "utf-8")
    assert check(path).returncode == 1


def test_every_pattern_is_explained() -> None:
    def patterns(value: Any) -> list[dict[str, Any]]:
        if isinstance(value, list):
            return [found for item in value for found in patterns(item)]
        if not isinstance(value, dict):
            return []
        return [*([value] if "pattern" in value else []), *patterns(list(value.values()))]

    found = patterns(json_schema())
    assert found
    assert all(item.get("description") for item in found)
    assert all(pattern.startswith("^(?:") and pattern.endswith(")$") for pattern in WORDS)
