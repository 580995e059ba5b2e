"""The suite as one file: a zip that Python starts, the same bytes wherever it is made.

So it travels into a container over any connection, and a report can say by digest what it was made by.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from typing import Iterator, Tuple

SHEBANG = b"#!/opt/venv/bin/python\n"
"""For our own images, which carry the file as a command; Python itself skips the line."""
MAIN = b"""import sys

if sys.version_info < (3, 9):
    sys.stderr.write("torchyard-validate needs Python 3.9 or newer; this is " + sys.version.split()[0] + "\\n")
    sys.exit(3)

from validate.__main__ import main

main()
"""
_TIME = (1980, 1, 2, 0, 0, 0)


def root() -> str:
    """Return where `validate` was imported from: a directory, or the bundle itself."""
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120 (inside a zip)


def _sources() -> Iterator[Tuple[str, bytes]]:
    package = os.path.join(root(), "validate")  # noqa: PTH118
    for directory, folders, files in os.walk(package):
        folders.sort()
        for name in sorted(files):
            if name.endswith((".py", ".json")):
                path = os.path.join(directory, name)  # noqa: PTH118
                with open(path, "rb") as file:  # noqa: PTH123
                    yield os.path.relpath(path, root()).replace(os.sep, "/"), file.read()


def bundle() -> bytes:
    """Return the bundle; of a bundle, itself."""
    if os.path.isfile(root()):  # noqa: PTH113
        with open(root(), "rb") as file:  # noqa: PTH123
            return file.read()
    content = io.BytesIO()
    # Not compressed: zlib's versions compress differently.
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for name, source in sorted([("__main__.py", MAIN), *_sources()]):
            entry = zipfile.ZipInfo(name, _TIME)
            entry.create_system = 3  # Unix, wherever it is made
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, source)
    # A zip is read from its end, and offsets that count from its own beginning are allowed.
    return SHEBANG + content.getvalue()


def digest() -> str:
    """Return the hex SHA-256 of the bundle."""
    return hashlib.sha256(bundle()).hexdigest()
