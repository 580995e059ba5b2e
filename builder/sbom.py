"""The bill of materials of an image: CycloneDX, made from its lock and from the metadata of its wheels.

It says what was locked. `bills` holds it to what the image's bytes say is installed.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense, License, LicenseAcknowledgement, LicenseExpression
from cyclonedx.model.lifecycle import LifecyclePhase, PredefinedLifecycle
from cyclonedx.model.tool import ToolRepository
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from packaging.metadata import parse_email
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from builder import __version__, licences
from builder import lock as locks
from builder.bills import LONGEST_PATH, OURS, VERSION, one_line, shown
from builder.debian import Deb
from builder.engines.oci import recipe
from builder.engines.oci.contents import DEB, WHEEL
from builder.engines.oci.install import ROOT, SITE
from builder.engines.oci.installed import METADATA, dist_info, identity
from builder.engines.oci.inventory import titled
from builder.engines.oci.layers import opened
from builder.engines.oci.wheel import Wheel
from builder.layout import Image, canonical_json
from builder.licences import OWN
from builder.reference import split_host
from builder.render import VALIDATOR, Plan
from builder.store import Store

IMAGE, BASE, PYTHON, TOOL = "image", "base", "python", "tool"
"""What components are called inside a bill; names of the others begin with what they came as: "pypi/torch", "deb/git",
"program/torchyard-start"."""
PROGRAM = "program"

_MACHINES = {"linux/amd64": "x86_64", "linux/arm64": "aarch64"}
_CUSTOMIZE = ("sitecustomize.py", "usercustomize.py")
_LONGEST = 2000
"""Characters of a licence expression or a requirement that are read; 300 and 200 were seen."""
_LIBRARIES = ("purelib", "platlib")
"""Schemes of a wheel's data directory whose files lie among the packages."""


# ----------------------------------------------------------------------------------------------------
# The bill


def bill(plan: Plan, store: Store, image: Image) -> bytes:
    """Return the bill of the plan's image; the same plan and image give the same bytes.

    Raises WheelError for a wheel that is not sound, HashMismatchError for one that was damaged in the store or is gone.
    """
    wheels = [opened(wheel, store) for wheel in plan.lock.wheels]
    places = _places(plan, store, image)
    packages = list(_python_packages(plan, wheels, places))
    base = list(_base(plan, places))
    below, above = _debian_packages(plan, places)
    programs = list(_programs(plan, places))
    components = {str(it.bom_ref.value): it for it in (*packages, *base, *below, *above, *programs)}
    subject = _subject(plan, image)
    bom = Bom(
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, image.manifest.digest),
        version=VERSION,
        metadata=BomMetaData(
            component=subject,
            timestamp=dt.datetime.fromtimestamp(plan.epoch, tz=dt.UTC),
            lifecycles=[PredefinedLifecycle(LifecyclePhase.BUILD)],
            tools=ToolRepository(components=[_component(TOOL, ComponentType.APPLICATION, "torchyard", __version__)]),
        ),
        components=components.values(),
    )
    graph = _graph(plan, wheels)
    for name, needs in graph.needs.items():
        bom.register_dependency(components[_ref(WHEEL, name)], [components[_ref(WHEEL, need)] for need in needs])
    for component in base:
        bom.register_dependency(component, below)
    asked = [components[_ref(WHEEL, name)] for name in graph.asked]
    bom.register_dependency(subject, [*base, *above, *programs, *asked])
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    return _spelled(_with_compositions(document, plan, graph))


def _ref(kind: str, name: str) -> str:
    return f"{kind}/{name}"


def _component(
    ref: str,
    kind: ComponentType,
    name: str,
    version: str,
    *,
    purl: PackageURL | None = None,
    sha256: str | None = None,
    licence: str | None = None,
    components: Iterable[Component] = (),
    **properties: str | Sequence[str] | None,
) -> Component:
    """Make a component; the properties are torchyard's own, of several values if need be."""
    return Component(
        bom_ref=ref,
        type=kind,
        name=name,
        version=version,
        purl=purl,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256)] if sha256 else (),
        licenses=list(_licences(licence)),
        components=components,
        properties=[
            Property(name=f"{OURS}{name.replace('_', '-')}", value=value)
            for name, values in properties.items()
            for value in ((values,) if isinstance(values, str) else values or ())
        ],
    )


def _licences(name: str | None) -> Iterator[License]:
    """Yield the licence that a package declares: as an expression if it is one in SPDX's words, else by its name."""
    declared = LicenseAcknowledgement.DECLARED
    if name is not None and len(name) <= _LONGEST:
        with contextlib.suppress(InvalidLicenseExpression):
            yield LicenseExpression(canonicalize_license_expression(name), acknowledgement=declared)
            return
    if text := one_line(name or ""):
        yield DisjunctiveLicense(name=text, acknowledgement=declared)


def _subject(plan: Plan, image: Image) -> Component:
    cell = plan.cell
    return _component(
        IMAGE,
        ComponentType.CONTAINER,
        cell.repository,
        cell.tag_names[0],
        purl=PackageURL(
            "oci",
            name=cell.repository.rpartition("/")[2],
            version=image.manifest.digest,
            qualifiers={"arch": image.architecture},
        ),
        sha256=image.manifest.sha256,
        cell=cell.id,
        lock=f"sha256:{locks.digest_of(locks.dumps(plan.lock))}",
        base_lock=f"sha256:{plan.base_lock.digest}" if plan.base_lock else None,
        system_lock=f"sha256:{plan.system_lock.digest}" if plan.system_lock else None,
    )


@dataclass(frozen=True, kw_only=True)
class _Places:
    """In which layers of an image components lie, by digest."""

    wheels: Mapping[str, str]
    """By the SHA-256 of the wheel."""
    base: tuple[str, ...]
    """One, unless the base is an image of somebody else's."""
    system: str | None
    own: str


def _places(plan: Plan, store: Store, image: Image) -> _Places:
    """Return where things lie: wheels by the recipes of their layers, all else by the order of the layers."""
    wheels: dict[str, str] = {}
    for layer in image.layers:
        made = recipe.find(store, layer.blob.sha256)
        if made is not None:
            wheels |= dict.fromkeys(made.sources[1:], layer.blob.digest)
    return _Places(
        wheels=wheels,
        base=tuple(layer.blob.digest for layer, _, of_base in titled(store, image) if of_base),
        system=image.layers[-2].blob.digest if plan.system_lock else None,
        own=image.layers[-1].blob.digest,
    )


# ----------------------------------------------------------------------------------------------------
# Components


def _python_packages(plan: Plan, wheels: Iterable[Wheel], places: _Places) -> Iterator[Component]:
    urls = {index.name: index.url for index in plan.cell.indexes}
    for locked, wheel in zip(plan.lock.wheels, wheels, strict=True):
        licence, ref, version = licences.of_wheel(wheel), _ref(WHEEL, locked.name), str(locked.version)
        layer, url = places.wheels.get(locked.sha256), urls.get(locked.index)
        yield _component(
            ref,
            ComponentType.LIBRARY,
            locked.name,
            version,
            # A package URL without a repository means the Python Package Index.
            purl=PackageURL("pypi", None, locked.name, version, {"repository_url": url} if url else None),
            sha256=locked.sha256,
            licence=licence.licence,
            proprietary="true" if licence.proprietary else None,
            components=list(_vendored(wheel, ref, layer)),
            file=locked.filename,
            layer=layer,
            path=f"/{SITE}/{wheel.dist_info}",
            bill=[f"/{SITE}/{one_line(path, LONGEST_PATH)}" for path in _own_bills(wheel)],
            runs_at_start=[f"/{SITE}/{one_line(path, LONGEST_PATH)}" for path in _started(wheel)],
        )


def _among_packages(wheel: Wheel) -> Iterator[tuple[str, str]]:
    """Yield the members that come to lie among the packages, each with its path there."""
    for member in wheel.members:
        if not member.startswith(f"{wheel.data}/"):
            yield member, member
            continue
        _, scheme, *rest = member.split("/")
        if scheme in _LIBRARIES:
            yield member, "/".join(rest)


def _own_bills(wheel: Wheel) -> Iterator[str]:
    """Yield the bills of materials that a wheel brings itself, where PEP 770 has them."""
    yield from (path for path in wheel.members if path.startswith(f"{wheel.dist_info}/sboms/"))


def _started(wheel: Wheel) -> Iterator[str]:
    """Yield what Python runs, or reads lines to run from, whenever it starts, whoever is imported."""
    for _, path in _among_packages(wheel):
        if "/" not in path and (path.endswith(".pth") or path in _CUSTOMIZE):
            yield path


def _vendored(wheel: Wheel, ref: str, layer: str | None) -> Iterator[Component]:
    """Yield the distributions that a wheel brings inside its own package, with metadata of their own."""
    inside: dict[str, str] = {}
    for member, path in _among_packages(wheel):
        directory = dist_info(path)
        # What lies beside the wheel's own is no part of its package: nobody locked it.
        if directory and "/" in directory:
            inside.setdefault(directory, member[: len(member) - len(path) + len(directory)])
    for number, (directory, place) in enumerate(sorted(inside.items()), 1):
        content = wheel.read(f"{place}/{METADATA}") if f"{place}/{METADATA}" in wheel.members else b""
        name, version = shown(*identity(directory, content))
        licence, proprietary = licences.named(parse_email(content)[0])
        yield _component(
            f"{ref}#{number}",
            ComponentType.LIBRARY,
            name,
            version,
            purl=PackageURL("pypi", None, name, version or None),
            licence=licence,
            proprietary="true" if proprietary else None,
            layer=layer,
            path=f"/{SITE}/{one_line(directory, LONGEST_PATH)}",
        )


def _base(plan: Plan, places: _Places) -> Iterator[Component]:
    """Yield what the packages stand on: Debian, or an image of somebody else's and the Python in it."""
    if plan.base_lock is not None:
        files = next((deb.version for deb in plan.base_lock.debs if deb.name == "base-files"), "")
        # Its version begins with that of the release: 12.4+deb12u12.
        release = re.match(r"[0-9]+", files)
        suite = plan.base_lock.suite
        kind = ComponentType.OPERATING_SYSTEM
        yield _component(BASE, kind, "debian", release[0] if release else suite, suite=suite, layer=places.base)
        return
    name, _, digest = plan.cell.base.image.partition("@")
    path, colon, tag = name.rpartition(":")
    path = path if colon and "/" not in tag else name
    host, repository = split_host(path)
    yield _component(
        BASE,
        ComponentType.CONTAINER,
        path,
        digest,
        purl=PackageURL("oci", None, repository.rpartition("/")[2], digest, {"repository_url": path} if host else None),
        sha256=digest.removeprefix("sha256:"),
        layer=places.base,
    )
    yield _component(PYTHON, ComponentType.APPLICATION, "python", plan.cell.python)


def _debian_packages(plan: Plan, places: _Places) -> tuple[list[Component], list[Component]]:
    """Return the Debian packages of the base, and those of the variant."""
    if plan.base_lock is None:
        return [], []
    base = set(plan.base_lock.debs)
    above = [deb for deb in (plan.system_lock.debs if plan.system_lock else ()) if deb not in base]
    suite = plan.base_lock.suite
    return (
        [_debian_package(deb, suite, places.base) for deb in plan.base_lock.debs],
        [_debian_package(deb, suite, places.system) for deb in above],
    )


def _debian_package(deb: Deb, suite: str, layer: str | Sequence[str] | None) -> Component:
    return _component(
        _ref(DEB, deb.name),
        ComponentType.LIBRARY,
        deb.name,
        deb.version,
        purl=PackageURL("deb", "debian", deb.name, deb.version, {"arch": deb.architecture, "distro": suite}),
        sha256=deb.sha256,
        file=deb.filename,
        layer=layer,
    )


def _programs(plan: Plan, places: _Places) -> Iterator[Component]:
    for name, content in sorted({VALIDATOR: plan.validator, **plan.programs}.items()):
        yield _component(
            _ref(PROGRAM, name),
            ComponentType.APPLICATION,
            name,
            __version__,
            sha256=hashlib.sha256(content).hexdigest(),
            licence=OWN,
            layer=places.own,
            path=f"/{ROOT}/bin/{name}",
        )


# ----------------------------------------------------------------------------------------------------
# Who needs whom, and how much of that is known


@dataclass(frozen=True, kw_only=True)
class _Graph:
    """Which wheels need which, as their metadata says it."""

    asked: tuple[str, ...]
    """Those that the cell asks for, and any that nothing else needs."""
    needs: Mapping[str, tuple[str, ...]]
    """By name, for each wheel."""
    unclear: frozenset[str]
    """Those that say it in a way that nobody can read, or need what is not locked."""


def _graph(plan: Plan, wheels: Iterable[Wheel]) -> _Graph:
    stated = {wheel.name: parse_email(wheel.read(f"{wheel.dist_info}/{METADATA}"))[0] for wheel in wheels}
    environment = _environment(plan)
    needs: dict[str, set[str]] = {name: set() for name in stated}
    unclear: set[str] = set()
    done: set[tuple[str, str]] = set()

    def follow(requirement: Requirement) -> None:
        todo = [requirement]
        while todo:
            one = todo.pop()
            name = canonicalize_name(one.name)
            for extra in ("", *one.extras):
                if (name, extra) in done:
                    continue
                done.add((name, extra))
                found, readable = _applying(stated[name].get("requires_dist", ()), environment, extra)
                within = [it for it in found if canonicalize_name(it.name) in stated]
                needs[name] |= {canonicalize_name(it.name) for it in within}
                if not readable or len(within) < len(found):
                    unclear.add(name)
                todo += within

    asked = [Requirement(text) for text in locks.request_of(plan.cell).requirements]
    roots = {canonicalize_name(it.name): it for it in asked if canonicalize_name(it.name) in stated}
    for requirement in roots.values():
        follow(requirement)
    reached = set(roots).union(*needs.values())
    for name in sorted(stated.keys() - reached):
        # Somebody needs it, and said so in a way that could not be read.
        roots[name] = Requirement(name)
        follow(roots[name])
    return _Graph(
        asked=tuple(sorted(roots)),
        needs={name: tuple(sorted(needs[name] - {name})) for name in sorted(needs)},
        unclear=frozenset(unclear),
    )


def _applying(stated: Iterable[str], environment: Mapping[str, str], extra: str) -> tuple[Sequence[Requirement], bool]:
    """Return the requirements that hold in an environment with an extra, and whether all could be read."""
    found, readable = [], True
    for text in stated:
        try:
            if len(text) > _LONGEST:
                raise InvalidRequirement("too long")
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({**environment, "extra": extra}):
                found.append(requirement)
        except (ValueError, KeyError, RecursionError):  # an invalid requirement, marker or version is a ValueError
            readable = False
    return found, readable


def _environment(plan: Plan) -> Mapping[str, str]:
    """Return what markers are held against: all of it, or that of this machine would fill the gaps."""
    python = plan.cell.python
    full = next(
        (deb.version for deb in (plan.base_lock.debs if plan.base_lock else ()) if deb.name == f"python{python}"), ""
    )
    full = full.rpartition(":")[2].partition("-")[0] or python
    return {
        "implementation_name": "cpython",
        "implementation_version": full,
        "os_name": "posix",
        "platform_machine": _MACHINES[plan.cell.platform],
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": full,
        "python_version": python,
        "sys_platform": "linux",
    }


def _with_compositions(document: Mapping[str, Any], plan: Plan, graph: _Graph) -> dict[str, Any]:
    """Say how much of it is known; only what is known at all stays in the graph.

    - Every package that is installed is listed, unless the base is an image of somebody else's.
    - What was compiled or copied into a package is not, but for what says so by metadata of its own.
    - What wheels require of each other is what they declare; which libraries of the system they load is not looked for.
    - What Debian packages depend on is in no lock.
    """
    known = plan.base_lock is not None
    whole = "complete" if known else "incomplete"
    wheels = [_ref(WHEEL, name) for name in graph.needs]
    clear = {_ref(WHEEL, name) for name in graph.needs.keys() - graph.unclear}
    debian = [one["bom-ref"] for one in document["components"] if one["bom-ref"].startswith(_ref(DEB, ""))]
    without = {*debian, *([] if known else [BASE, PYTHON])}
    programs = [one["bom-ref"] for one in document["components"] if one["bom-ref"].startswith(_ref(PROGRAM, ""))]
    unclear = sorted({*wheels, *debian} - clear)
    compositions = [
        {"aggregate": whole, "assemblies": [IMAGE], "dependencies": [IMAGE]},
        {
            "aggregate": "unknown",
            "assemblies": [*wheels, *debian, *programs, *([] if known else [BASE])],
            "dependencies": [*clear, *programs, *([] if known else [BASE, PYTHON])],
        },
        *([{"aggregate": "incomplete", "dependencies": unclear}] if unclear else []),
    ]
    return {
        **document,
        "compositions": compositions,
        "dependencies": [one for one in document["dependencies"] if one["ref"] not in without],
    }


def _spelled(document: object) -> bytes:
    """Return the one spelling of a bill: no list of it has an order that means anything."""

    def ordered(value: object) -> object:
        if isinstance(value, dict):
            return {name: ordered(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return sorted(map(ordered, value), key=_rank)
        return value

    return (json.dumps(ordered(document), indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _rank(value: object) -> tuple[str, bytes]:
    name = (value.get("bom-ref") or value.get("ref") or "") if isinstance(value, dict) else ""
    return str(name), canonical_json(value)
