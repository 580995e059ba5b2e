"""Tags besides a cell's own: which day an image bears, and what moves."""

import datetime as dt
import itertools
import json
from pathlib import Path

import pytest

from builder import aliases
from builder.project import Project
from tests.support import cells

ROOT = Path(__file__).parents[2]


def moment(text: str) -> int:
    return int(dt.datetime.fromisoformat(text).timestamp())


@pytest.mark.parametrize(
    ("epoch", "exclude_newer", "day"),
    [
        ("2026-11-19T02:12:54+00:00", "2026-11-15T00:00:00Z", "20261119"),  # the base was locked later
        ("2026-11-19T02:12:54+00:00", "2026-11-20T00:00:00Z", "20261120"),  # packages were looked at later
        ("2026-11-19T23:59:59+00:00", "2026-11-15T00:00:00Z", "20261119"),  # in universal time, whatever the machine's
        ("1999-01-01T00:00:00+00:00", "2026-11-15T23:59:59Z", "20261115"),
    ],
)
def test_the_day_is_that_of_the_locks(
    epoch: str, exclude_newer: str, day: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    cell = cells.cell(exclude_newer=exclude_newer)
    assert aliases.dated_tag(cell, moment(epoch)) == f"2.8.0-cuda12.8-cudnn9-runtime-{day}"


def test_images_of_one_day_are_counted() -> None:
    assert list(itertools.islice(aliases.serials("x-20261115"), 3)) == ["x-20261115", "x-20261115.1", "x-20261115.2"]


def test_no_two_tags_of_the_family_are_one() -> None:
    project = Project(ROOT / "matrix.yaml")
    every: list[str] = []
    for cell in project.cells:
        epoch = json.loads((project.directory(cell) / "image.json").read_bytes())["epoch"]
        every += itertools.islice(aliases.serials(aliases.dated_tag(cell, epoch)), 3)
        every += [*cell.tag_names, *aliases.moving_tags(cell, project.cells, latest=project.policy.latest)]
    assert len(set(every)) == len(every)
    assert max(map(len, every)) <= 128, "longer ones are no tags"
    assert every.count("latest") == 1


def test_latest_is_the_cell_that_is_named_and_no_other() -> None:
    family = Project(ROOT / "matrix.yaml").cells
    for one in family:
        bearing = [cell.id for cell in family if "latest" in aliases.moving_tags(cell, family, latest=one.id)]
        assert bearing == [one.id]
    assert not any("latest" in aliases.moving_tags(cell, family) for cell in family)
