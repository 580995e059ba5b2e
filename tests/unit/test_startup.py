"""What a command costs before it does anything: it starts without what only other commands need."""

from __future__ import annotations

import subprocess
import sys

import pytest

# What speaks to indexes and registries, reads their pages, drives a container engine, or reads wheels.
OF_OTHERS = ("requests", "urllib3", "docker", "pypi_simple", "bs4", "installer", "cyclonedx")
# What nearly every command needs, and one that only prints does not.
OF_MOST = ("pydantic", "jinja2", "rich", "yaml", "packaging.pylock", "concurrent.futures")


def loaded(code: str, *modules: str) -> list[str]:
    """Return those of the modules that are there after the code has run."""
    code = f"import sys\n{code}\nprint(*(name for name in {modules!r} if name in sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr.split()


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_who_only_asks_loads_next_to_nothing(option: str) -> None:
    code = (
        f"from builder import cli\ntry:\n    cli.main([{option!r}])\nexcept SystemExit as end:\n    assert not end.code"
    )
    assert loaded(code, *OF_OTHERS, *OF_MOST) == []


def test_a_build_that_finds_its_image_complete_loads_nothing_that_makes_one() -> None:
    code = "import builder.project, builder.console, builder.build, builder.index, builder.engines.oci"
    assert loaded(code, *OF_OTHERS, "builder.engines.oci.image", "builder.registry", "builder.runners") == []
    assert loaded(f"{code}\nfrom builder.engines.oci import image", "installer") == ["installer"]
