"""Wheel → where each of its files belongs in the image: what an installer would write, as values.

The places are the same for every Python version: packages lie in `lib/python3/site-packages` of the environment, to
which `lib/python3.Y` is a symbolic link, and scripts start `PREFIX/bin/python`. So a wheel that is not tied to one
Python, as NVIDIA's libraries are not, gives the same layer under each.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from installer.records import Hash, RecordEntry
from installer.scripts import Script
from installer.utils import Scheme, construct_record_file, fix_shebang

from builder.engines.oci.wheel import Member, RecordHash, Wheel
from builder.errors import WheelError
from builder.render import LIBRARY, PREFIX

INSTALLER = b"torchyard\n"
PYTHON = f"{PREFIX}/bin/python"
ROOT = PREFIX.lstrip("/")
SITE = f"{ROOT}/{LIBRARY}/site-packages"

FILE = 0o664
EXECUTABLE = 0o775
DIRECTORY = 0o775
"""Group 0 may write, so that `pip install` works for any user id with that group."""

# Files an installer writes itself, or that signed the record it replaces.
_NOT_INSTALLED = ("RECORD", "RECORD.jws", "RECORD.p7s", "INSTALLER", "REQUESTED", "direct_url.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """One file of the image: a member of the wheel as it is, or content made of the wheel's."""

    path: str
    """Relative to the root of the image."""
    mode: int
    member: Member | None = None
    promised: RecordHash | None = None
    """What the wheel's record says of the member's content."""
    content: bytes | None = None


def placed(wheel: Wheel) -> tuple[Placed, ...]:
    """Return every file the wheel brings into an image, sorted by path; raises WheelError for what has no place."""
    files = [*_members(wheel), *_scripts(wheel)]
    files += [
        Placed(path=f"{SITE}/{wheel.dist_info}/INSTALLER", mode=FILE, content=INSTALLER),
        Placed(path=f"{SITE}/{wheel.dist_info}/REQUESTED", mode=FILE, content=b""),
    ]
    record = Placed(path=f"{SITE}/{wheel.dist_info}/RECORD", mode=FILE, content=_record(wheel, files))
    found = sorted([*files, record], key=lambda file: file.path)
    for one, other in itertools.pairwise(found):
        if one.path == other.path:
            raise WheelError(f"{wheel.filename}: two of its files would be installed as /{one.path}")
    return tuple(found)


def _members(wheel: Wheel) -> Iterator[Placed]:
    for path, member in wheel.members.items():
        parts = path.split("/")
        if parts[0] == wheel.dist_info and len(parts) == 2 and parts[1] in _NOT_INSTALLED:
            continue
        if "__pycache__" in parts:
            # Compiled for whoever built the wheel; ours are made of the sources.
            continue
        promised, _ = wheel.record[path]
        if parts[0] != wheel.data:
            yield Placed(path=f"{SITE}/{path}", mode=_mode(member), member=member, promised=promised)
        elif len(parts) > 2:
            yield from _data(wheel, member, promised, scheme=parts[1], rest="/".join(parts[2:]))
        else:
            raise WheelError(f"{wheel.filename}: a file lies in no scheme of its data directory", where=path)


def _data(wheel: Wheel, member: Member, promised: RecordHash | None, *, scheme: str, rest: str) -> Iterator[Placed]:
    """Place a file of the data directory by its scheme, as the binary distribution format defines them."""
    places = {
        "purelib": SITE,
        "platlib": SITE,
        "headers": f"{ROOT}/include/site/python3/{wheel.name}",
        "data": ROOT,
        "scripts": f"{ROOT}/bin",
    }
    if scheme not in places:
        raise WheelError(
            f"{wheel.filename}: its data directory has an unknown scheme: {scheme}",
            where=member.path,
            why=f"known are {', '.join(sorted(places))}",
        )
    path = f"{places[scheme]}/{rest}"
    if scheme != "scripts":
        yield Placed(path=path, mode=_mode(member), member=member, promised=promised)
    elif wheel.head(member, 8) == b"#!python":
        with fix_shebang(io.BytesIO(wheel.read(member.path)), PYTHON) as fixed:
            yield Placed(path=path, mode=EXECUTABLE, content=fixed.read())
    else:
        yield Placed(path=path, mode=EXECUTABLE, member=member, promised=promised)


def _mode(member: Member) -> int:
    return EXECUTABLE if member.executable else FILE


def _scripts(wheel: Wheel) -> Iterator[Placed]:
    """Yield the programs that the wheel's entry points ask for."""
    for name, module, attribute, section in wheel.entry_points:
        script = Script(name, module, attribute, "gui" if section == "gui" else "console")
        filename, content = script.generate(PYTHON, "posix")
        yield Placed(path=f"{ROOT}/bin/{filename}", mode=EXECUTABLE, content=content)


def _record(wheel: Wheel, files: list[Placed]) -> bytes:
    """Return the record of what is installed, with paths relative to site-packages, as `pip uninstall` reads it."""
    rows: list[RecordEntry] = []
    for file in files:
        path = file.path.removeprefix(f"{SITE}/")
        if path == file.path:
            path = f"../../../{path.removeprefix(f'{ROOT}/')}"
        rows.append(RecordEntry(path, _hash(file), _size(file)))
    rows.append(RecordEntry(f"{wheel.dist_info}/RECORD", None, None))
    scheme = Scheme("purelib")
    with construct_record_file([(scheme, row) for row in rows], lambda _: None) as stream:
        return stream.read()


def _hash(file: Placed) -> Hash | None:
    if file.content is not None:
        return Hash("sha256", _text(hashlib.sha256(file.content).digest()))
    return Hash(file.promised.algorithm, _text(file.promised.digest)) if file.promised else None


def _size(file: Placed) -> int:
    return len(file.content) if file.content is not None else file.member.size if file.member else 0


def _text(digest: bytes) -> str:
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
