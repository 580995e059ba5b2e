"""A container that runs, seen through the engine's own client."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def docker(*arguments: str, timeout_s: float = 180) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=timeout_s, check=False)


@dataclass(frozen=True)
class Container:
    id: str

    def published(self, port: int) -> int:
        """Return where this machine answers for a port of the container."""
        return int(docker("port", self.id, f"{port}/tcp").stdout.splitlines()[0].rpartition(":")[2])

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return docker("exec", self.id, *command)

    @property
    def log(self) -> str:
        done = docker("logs", self.id)
        return done.stdout + done.stderr

    @property
    def state(self) -> Mapping[str, Any]:
        state: Mapping[str, Any] = json.loads(docker("inspect", "-f", "{{json .State}}", self.id).stdout)
        return state
