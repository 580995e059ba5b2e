"""What a bill of materials lists, held to what is in the image; a bill that was found right is kept.

The two come from different places on purpose. The bill says what was locked; the check reads the layers. So neither can
leave something out without the other's telling.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packageurl import PackageURL
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from builder import __version__, memory
from builder.engines.oci.install import SITE
from builder.engines.oci.installed import SCHEMA, Installed, installed
from builder.engines.oci.inventory import titled
from builder.errors import CellFailedError, Problem
from builder.foreign import quoted
from builder.layout import Image
from builder.render import Plan
from builder.store import Store

VERSION = 1
"""Raise it with every change of what bills say: of several with one serial number, tools take the highest version."""
CHECK = 1
"""Raise it with every change of what a bill is held to: what was found right before is held to it again."""

OURS = "torchyard:"
"""How the names of properties begin that are torchyard's own: of the layer, path and file of a component."""
SHOWN = 300
"""Characters of foreign text in a bill: licences' names, names and versions of vendored packages."""
LONGEST_PATH = 5000

_KIND = "bills"
"""What is remembered of bills, as the store calls it."""
_LIBRARIES = ("cyclonedx-python-lib", "py-serializable", "packageurl-python", "packaging")
"""Whose version may change how a bill is written."""
_NAMELESS = "unknown"
_AGAIN = ("torchyard build CELL --rebuild", "if it stays, torchyard or a package is at fault: do not publish the image")


def one_line(text: str, most: int = SHOWN) -> str:
    """Return foreign text as it may stand in a bill: one line, printable, not long."""
    line = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in " ".join(text.split()))
    return line if len(line) <= most else f"{line[: most - 3]}..."


def shown(name: str, version: str) -> tuple[str, str]:
    """Return name and version of a distribution, which may be any text, as they stand in a bill."""
    return one_line(name) or _NAMELESS, one_line(version)


# ----------------------------------------------------------------------------------------------------
# Bills that are right


def checked(plan: Plan, store: Store, image: Image, make: Callable[[Plan, Store, Image], bytes]) -> bytes:
    """Return the bill of the plan's image that `make` makes, held to the image; one that was right is not made again.

    Raises what `make` and `check` raise.
    """
    key = _key(plan, image)
    known = memory.recall(store, _KIND, key)
    if known is not None:
        return known
    bill = make(plan, store, image)
    check(bill, plan, store, image)
    if all(fact.layer is not None for fact in _listed(_read(bill)).values()):
        # Without recipes nobody knows which layer a wheel lies in. They may be back the next time.
        memory.remember(store, _KIND, key, bill)
    return bill


def _key(plan: Plan, image: Image) -> Mapping[str, Any]:
    """Return all that a bill and its check depend on; the image's digest stands for its layers."""
    cell = plan.cell
    return {
        "version": VERSION,
        "check": [CHECK, SCHEMA],
        "torchyard": __version__,
        "libraries": [sys.version, *(importlib.metadata.version(name) for name in _LIBRARIES)],
        "image": image.manifest.digest,
        "plan": plan.digest,
        "epoch": plan.epoch,
        "cell": [cell.id, cell.repository, *cell.tag_names],
        "indexes": [[index.name, index.url] for index in cell.indexes],
        "base": cell.base.image,
    }


# ----------------------------------------------------------------------------------------------------
# The check


@dataclass(frozen=True, kw_only=True)
class _Fact:
    """One thing that is installed, or listed."""

    name: str
    version: str
    layer: str | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.version}".rstrip()


_Facts = Mapping[str, _Fact]
"""What is installed, or listed, by what it can be only once: a package in a directory, a program at a path."""


def check(bill_bytes: bytes, plan: Plan, store: Store, image: Image) -> None:
    """Hold a bill to what the image's bytes say is installed; raises CellFailedError with every disagreement.

    Also raises HashMismatchError or SourceError if something was damaged in the store or lost.
    """
    document = _read(bill_bytes)
    about = list(_about(document, image))
    # What is in an image of somebody else's is not known, and the bill says so.
    layers = [layer for layer, _, of_base in titled(store, image) if plan.base_lock is not None or not of_base]
    found = list(disagreements(document, installed(store, layers)))
    if found:
        # What is remembered of a layer may be from when its recipe was damaged.
        found = list(disagreements(document, installed(store, layers, anew=True)))
    _require([*about, *found], plan.cell.id, image.manifest.digest)


def check_reported(bill_bytes: bytes, packages: Mapping[str, str], *, name: str) -> None:
    """Hold a bill to the packages that a container reported, by name and version; raises CellFailedError.

    `name` is what the image is called.
    """
    _require(list(unreported(_read(bill_bytes), packages)), name, "what a container reported")


def unreported(document: Mapping[str, Any], packages: Mapping[str, str]) -> Iterator[Problem]:
    """Yield every way in which a bill is not what a container reported; raises CellFailedError if it is no bill."""
    beside = f"/{SITE}: "
    listed = {key: fact for key, fact in _listed(document).items() if key.startswith(beside)}
    found: dict[str, _Fact] = {}
    for package, version in packages.items():
        name, _ = shown(canonicalize_name(package), version)
        found[f"{beside}{name}"] = _Fact(name=name, version=_plain(version))
    yield from _differences(found, listed)


def _require(problems: Sequence[Problem], name: str, where: str) -> None:
    if problems:
        raise CellFailedError(
            f"{name}: its bill of materials is not what is in the image",
            where=where,
            why=f"{len(problems)} disagreement{'s' if len(problems) > 1 else ''}",
            problems=tuple(problems),
            tries=_AGAIN,
        )


def disagreements(document: Mapping[str, Any], there: Installed) -> Iterator[Problem]:
    """Yield every way in which a bill is not what is installed; raises CellFailedError if it is no bill."""
    yield from _differences(_found(there), _listed(document))


def _differences(there: _Facts, listed: _Facts) -> Iterator[Problem]:
    for key in sorted({*there, *listed}):
        found, told = there.get(key), listed.get(key)
        where = quoted(key) if not key.isprintable() else key
        if told is None:
            yield Problem(what=f"{found} is in the image, and not in its bill", where=where)
        elif found is None:
            yield Problem(what=f"{told} is in the bill, and not in the image", where=where)
        elif found.version != told.version:
            yield Problem(what=f"{found.name} is {found.version}", where=where, why=f"the bill says {told.version}")
        elif None not in (found.layer, told.layer) and found.layer != told.layer:
            yield Problem(
                what=f"{found} lies in another layer", where=where, why=f"{found.layer}; the bill says {told.layer}"
            )


def _found(there: Installed) -> _Facts:
    facts: dict[str, _Fact] = {}
    for one in there.distributions:
        name, version = shown(one.name, one.version)
        _add(facts, _in_directory(one.path, name), _Fact(name=name, version=version, layer=one.layer))
    for deb in there.debian:
        _add(facts, _of_dpkg(deb.name, deb.architecture), _Fact(name=deb.name, version=deb.version, layer=deb.layer))
    for program in there.programs:
        name = program.path.rpartition("/")[2]
        _add(facts, program.path, _Fact(name=name, version=f"sha256:{program.sha256}", layer=program.layer))
    return facts


def _listed(document: Mapping[str, Any]) -> _Facts:
    facts: dict[str, _Fact] = {}
    try:
        todo = list(document["components"])
        while todo:
            one = todo.pop()
            todo += one.get("components", ())
            properties = {it["name"]: it["value"] for it in one.get("properties", ())}
            layer, path = properties.get(f"{OURS}layer"), properties.get(f"{OURS}path", "")
            name, version, purl = str(one["name"]), str(one.get("version", "")), str(one.get("purl", ""))
            if purl.startswith("pkg:pypi/"):
                _add(facts, _in_directory(path, name), _Fact(name=name, version=version, layer=layer))
            elif purl.startswith("pkg:deb/"):
                architecture = PackageURL.from_string(purl).to_dict()["qualifiers"]["arch"]
                _add(facts, _of_dpkg(name, architecture), _Fact(name=name, version=version, layer=layer))
            elif path:
                (sha256,) = (it["content"] for it in one["hashes"])
                _add(facts, path, _Fact(name=name, version=f"sha256:{sha256}", layer=layer))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _no_bill(error) from error
    return facts


def _add(facts: dict[str, _Fact], key: str, fact: _Fact) -> None:
    """Add a fact; of a thing that is there twice, both versions are told."""
    if (before := facts.get(key)) is not None:
        versions = sorted({*before.version.split(" and "), fact.version})
        fact = _Fact(name=fact.name, version=" and ".join(versions), layer=fact.layer)
    facts[key] = fact


def _in_directory(path: str, name: str) -> str:
    return f"{one_line(path, LONGEST_PATH).rpartition('/')[0]}: {name}"


def _of_dpkg(name: str, architecture: str) -> str:
    return f"dpkg: {name}:{architecture}"


def _plain(version: str) -> str:
    with contextlib.suppress(InvalidVersion):
        return str(Version(version))
    return one_line(version)


def _about(document: Mapping[str, Any], image: Image) -> Iterator[Problem]:
    """Yield a problem if a bill is about another image."""
    try:
        (sha256,) = (it["content"] for it in document["metadata"]["component"]["hashes"])
    except (KeyError, TypeError, ValueError) as error:
        raise _no_bill(error) from error
    if sha256 != image.manifest.sha256:
        yield Problem(what="the bill is about another image", where=image.manifest.digest, why=f"sha256:{sha256}")


def _read(content: bytes) -> Mapping[str, Any]:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _no_bill(error) from error
    if not isinstance(document, dict):
        raise _no_bill(TypeError("not an object"))
    return document


def _no_bill(error: Exception) -> CellFailedError:
    return CellFailedError("not a bill of materials of ours", why=f"{type(error).__name__}: {quoted(error)}")
