"""Which licence every package of an image is under, as its own metadata says, and where the text lies in the image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from packaging.metadata import RawMetadata, parse_email

from builder import __version__
from builder.engines.oci.wheel import Wheel, open_wheel
from builder.lock import Wheel as LockedWheel
from builder.render import LIBRARY, PREFIX, Plan
from builder.store import Store

SITE = f"{PREFIX}/{LIBRARY}/site-packages"
COPYRIGHT = "/usr/share/doc/{}/copyright"
"""Where Debian's policy has a package's copyright and licence."""
OWN = "Apache-2.0"
"""Of torchyard's programs in an image."""
SHORT = 80
"""Characters of a licence's name; what is longer is a text."""

_TEXT = re.compile(r"(?:.*[^a-z])?(?:licen[cs]es?|copying|copyright|notices?|authors)(?:[^a-z].*)?", re.IGNORECASE)
_CLASSIFIER = "License :: "
_NO_CLASSIFIER = frozenset({"OSI Approved", "Other/Proprietary License"})
_PROPRIETARY = "Other/Proprietary License"


class Kind(StrEnum):
    """What a package came as."""

    WHEEL = "wheel"
    DEBIAN = "debian"
    TORCHYARD = "torchyard"


@dataclass(frozen=True, kw_only=True)
class Licence:
    """What one package says of its licence; nobody here has checked whether that is so."""

    kind: Kind
    package: str
    version: str
    licence: str | None
    """As it names it, None if it does not, or says it in its copyright file only."""
    proprietary: bool
    """Whether it calls itself proprietary anywhere."""
    texts: tuple[str, ...]
    """Paths in the image."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The licences of a cell's image."""

    id: str
    licences: tuple[Licence, ...]
    base: str | None
    """A base of somebody else's, whose packages are not known."""

    @property
    def unknown(self) -> tuple[Licence, ...]:
        """The packages that name no licence and bring no text of one."""
        return tuple(one for one in self.licences if one.licence is None and not one.texts)

    @property
    def proprietary(self) -> tuple[Licence, ...]:
        """The packages that call themselves proprietary."""
        return tuple(one for one in self.licences if one.proprietary)

    def as_json(self) -> dict[str, Any]:
        """Return what machines read."""
        return {
            "id": self.id,
            "base": self.base,
            "packages": [asdict(one) for one in self.licences],
            "unknown": [one.package for one in self.unknown],
            "proprietary": [one.package for one in self.proprietary],
        }


def missing(plan: Plan, store: Store) -> tuple[LockedWheel, ...]:
    """Return the wheels of a cell that are not in the store, where their metadata would be read."""
    return tuple(wheel for wheel in plan.lock.wheels if not store.has(wheel.sha256, size=wheel.size))


def cell_of(plan: Plan, store: Store) -> Cell:
    """Return the licences of a cell, whose wheels must be in the store; raises WheelError for one that is not sound."""
    debian = plan.system_lock or plan.base_lock
    wheels = [
        open_wheel(store.path(wheel.sha256), filename=wheel.filename, sha256=wheel.sha256) for wheel in plan.lock.wheels
    ]
    own = Licence(
        kind=Kind.TORCHYARD, package="torchyard", version=__version__, licence=OWN, proprietary=False, texts=()
    )
    return Cell(
        id=plan.cell.id,
        licences=(
            *map(of_wheel, wheels),
            *(
                Licence(
                    kind=Kind.DEBIAN,
                    package=deb.name,
                    version=deb.version,
                    licence=None,
                    proprietary=False,
                    texts=(COPYRIGHT.format(deb.name),),
                )
                for deb in (debian.debs if debian else ())
            ),
            own,
        ),
        base=None if debian else plan.cell.base.image,
    )


def of_wheel(wheel: Wheel) -> Licence:
    """Return what a wheel's metadata says, and which of its files are texts of licences."""
    metadata, _ = parse_email(wheel.read(f"{wheel.dist_info}/METADATA"))
    name, proprietary = named(metadata)
    return Licence(
        kind=Kind.WHEEL,
        package=wheel.name,
        version=str(wheel.version),
        licence=name,
        proprietary=proprietary,
        texts=tuple(f"{SITE}/{path}" for path in _texts(wheel)),
    )


def _texts(wheel: Wheel) -> Sequence[str]:
    """Return the texts beside the metadata, where they belong; if there are none, those among the wheel's files."""
    beside, elsewhere = f"{wheel.dist_info}/", f"{wheel.data}/"
    named_so = [path for path in wheel.members if _TEXT.fullmatch(path.rpartition("/")[2])]
    proper = [
        path
        for path in wheel.members
        if path.startswith(f"{beside}licenses/") or (path.startswith(beside) and path in named_so)
    ]
    return proper or [path for path in named_so if not path.startswith(elsewhere)]


def named(metadata: RawMetadata) -> tuple[str | None, bool]:
    """Return the licence that metadata names, None if it names none, and whether it says that it is proprietary.

    A licence expression is exact; the older field holds a name or a whole text; classifiers are coarse. Where the
    field and the classifiers contradict each other, both are told.
    """
    field = " ".join(metadata.get("license", "").split())
    classifiers = [
        classifier.removeprefix(_CLASSIFIER).removeprefix("OSI Approved :: ").strip()
        for classifier in metadata.get("classifiers", ())
        if classifier.startswith(_CLASSIFIER)
    ]
    exact = [one for one in classifiers if one not in _NO_CLASSIFIER]
    claims = _PROPRIETARY in classifiers
    name: str | None
    if expression := metadata.get("license_expression"):
        name = " ".join(expression.split())
    elif field and field.upper() != "UNKNOWN" and len(field) <= SHORT:
        name = field
    elif exact:
        name = ", ".join(exact)
    elif claims:
        name = _PROPRIETARY
    elif field and field.upper() != "UNKNOWN":
        name = f"{field[:SHORT]}..."
    else:
        name = None
    said = "proprietary" in (name or "").lower()
    if claims and not said:
        name = f"{name} (but its classifier: {_PROPRIETARY})"
    return name, said or claims


def rows(cell: Cell) -> Sequence[Sequence[str]]:
    """Return the table of a cell for people: package, version, licence, text."""
    return [
        [
            one.package,
            one.version,
            (one.licence or ("see its text" if one.texts else "unknown")),
            (one.texts[0] if one.texts else "-") + (f" and {len(one.texts) - 1} more" if len(one.texts) > 1 else ""),
        ]
        for one in cell.licences
    ]


def summary(cell: Cell) -> str:
    """Say in a few lines what to look at."""
    lines = [f"{cell.id}: {len(cell.licences)} packages"]
    if cell.proprietary:
        lines.append(f"  proprietary  {', '.join(one.package for one in cell.proprietary)}")
    if cell.unknown:
        lines.append(f"  unknown      {', '.join(one.package for one in cell.unknown)}")
    if cell.base:
        lines.append(f"  not listed   what is in the base {cell.base}")
    return "\n".join(lines)
