"""The checks of users and secrets in real images: as the image's user, and as root, from whom nothing is hidden."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [
    pytest.mark.engine,
    pytest.mark.variant,
    pytest.mark.debian,
    pytest.mark.network,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]

CHECKS = ("sec.user", "sec.secrets")


def results(image: str, *options: str) -> dict[str, Any]:
    """Run the checks by the suite that the image carries; returns their results by check."""
    command = [
        "docker",
        "run",
        "--rm",
        "--network=none",
        *options,
        image,
        "torchyard-validate",
        "--json",
        "--only=sec.*",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = {event["id"]: event for event in events if event["event"] == "result"}
    assert set(CHECKS) <= set(found), done.stdout + done.stderr
    return found


@pytest.mark.parametrize("variant", ["runtime", "devel", "notebook", "ssh", "llm"])
def test_an_image_gives_nobody_more_than_it_should(variant_image: Callable[[str], str], variant: str) -> None:
    image = variant_image(variant)
    own = results(image, "--read-only", "--tmpfs=/tmp", "--cap-drop=ALL")
    assert {name: (own[name]["status"], own[name]["findings"]) for name in CHECKS} == {
        name: ("pass", []) for name in CHECKS
    }
    root = results(image, "--user=0:0")
    assert [finding["what"] for finding in root["sec.user"]["findings"]] == [
        "this container runs as root, though the image's user is 1000:0"
    ]
    assert (root["sec.secrets"]["status"], root["sec.secrets"]["findings"]) == ("pass", [])
    for name in CHECKS:
        assert root[name]["evidence"]["closed"] == [], "root looked everywhere"
        assert root[name]["evidence"]["files"] > 10_000
        assert root[name]["seconds"] < 30
