"""The generation service without a model: its program as a module, and a model made of characters in its place.

As a script it runs the service with that model, so that tests can send signals to it: python serving.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

PROGRAM = Path(__file__).parents[2] / "templates" / "programs" / "serve.py"
END = 0x10FFFF
"""The token that ends an answer: the last character there is."""


def load_program() -> ModuleType:
    """Return the program as a module of its own."""
    spec = importlib.util.spec_from_file_location("torchyard_serve", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Pydantic and FastAPI look for names in the module that a class or a function says it is from.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@dataclass
class Characters:
    """A model whose tokens are characters: it says what it was asked, backwards, again and again."""

    context: int | None = None
    ends: frozenset[int] = frozenset({END})
    pause_s: float = 0.0
    """Before each token."""
    gate: threading.Event | None = None
    """What each token waits for."""
    before: Callable[[Any], None] = lambda _: None
    """Called with what is asked before anything is generated."""
    asked: list[Any] = field(default_factory=list)
    steps: int = 0

    def encode(self, prompt: str) -> list[int]:
        return [ord(character) for character in prompt]

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))

    def generate(self, prompts: list[list[int]], asked: Any, step: Callable[[list[int]], Sequence[bool]]) -> None:
        self.asked.append(asked)
        self.before(asked)
        for number in range(asked.max_new_tokens):
            if self.gate is not None:
                self.gate.wait(30)
            time.sleep(self.pause_s)
            self.steps += 1
            if all(step([prompt[-1 - number % len(prompt)] for prompt in prompts])):
                return


def model_folder(folder: Path) -> Path:
    """Return a directory that looks like a model's, with one small tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    header = json.dumps({"tensor": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    return folder


def main() -> int:
    """Run the service; TEST_LOAD_S is how long the model takes to load, TEST_PAUSE_S how long a token."""
    program = load_program()

    def load(_: Path) -> Characters:
        time.sleep(float(os.environ.get("TEST_LOAD_S", "0")))
        if "TEST_CORRUPT" in os.environ:
            raise program.ConfigError("cannot load /models: it is corrupt")

        def broken(asked: Any) -> None:
            if asked.prompt == ["break"]:
                raise program.BrokenError("the GPU failed")
            if asked.prompt == ["hang"]:
                time.sleep(60)

        return Characters(pause_s=float(os.environ.get("TEST_PAUSE_S", "0")), before=broken)

    return int(program.main([], load=load))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
