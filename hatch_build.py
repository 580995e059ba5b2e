"""Compiles builder/native when torchyard is installed.

Without a compiler it is installed all the same, as it is for processors that the code is not for: what is compiled is
faster, not different. Only a C compiler is needed, no headers of Python.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = "builder/native/sha256.c"
LIBRARY = "builder/native/sha256.so"
FLAGS = ("-std=c11", "-O3", "-shared", "-fPIC", "-fvisibility=hidden")


class NativeBuildHook(BuildHookInterface):
    """Adds the library to the wheel; an editable install finds it beside its source."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and say what was made; a wheel with it is for one platform and any Python."""
        if self.target_name != "wheel" or not (sys.platform == "linux" and platform.machine() == "x86_64"):
            return
        why = self._compile()
        if why:
            # One of an older source would be worse than none.
            (Path(self.root) / LIBRARY).unlink(missing_ok=True)
            self.app.display_warning(f"SHA-256 is hashed one stream at a time, which may be slower: {why}")
            return
        build_data["artifacts"].append(LIBRARY)
        if version != "editable":
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def _compile(self) -> str:
        """Return why it cannot be compiled; empty if it was."""
        root = Path(self.root)
        compiler = (
            shlex.split(os.environ.get("CC", "")) or [name for name in ("cc", "gcc", "clang") if shutil.which(name)][:1]
        )
        if not compiler:
            return "there is no C compiler"
        with tempfile.TemporaryDirectory(dir=root / "builder" / "native") as directory:
            made = Path(directory) / "library"
            try:
                done = subprocess.run(
                    [*compiler, *FLAGS, str(root / SOURCE), "-o", str(made)],
                    capture_output=True,
                    text=True,
                    check=False,
                )
            except OSError as error:
                return f"{compiler[0]}: {error.strerror}"
            if done.returncode:
                return f"{compiler[0]}: {done.stderr.strip()[-500:]}"
            # In one step, and not into the file: another process may have it mapped.
            made.replace(root / LIBRARY)
        return ""
