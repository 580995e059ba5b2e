"""An image of the store → a repository: blobs, config, manifest by digest, read back, and only then its tags.

Each step may be repeated, and asks the registry first what is done: a push that broke off goes on where it was. What
is said of the image is attached before any tag leads to it. Tags that mean one image for ever come first, and are never
overwritten; those that move come last.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from builder import aliases, attestation, bills, export, gate, referrers
from builder.attestation import Attestation
from builder.cosign import Signer
from builder.credentials import Configuration
from builder.engines.oci import recipe
from builder.errors import CellFailedError, HashMismatchError, MatrixError, Problem, SourceError
from builder.fetching import PARALLEL, Progress
from builder.foreign import quoted
from builder.gate import Verdict
from builder.journal import Journal
from builder.layout import Descriptor, Image
from builder.matrix import Family
from builder.project import Project
from builder.provenance import SOMEBODY
from builder.reference import Reference
from builder.registry import CONFIG_MAX, Registry
from builder.render import Plan
from builder.store import Store
from builder.upload import Arrived, Target, Way, has_blob, push_blob, put_manifest, read_manifest, resolve

MOST_OF_A_DAY = 100
"""Images of one cell with the same day's packages; a registry is asked for each."""
MOST_SOURCES = 2
"""Repositories that are asked for a blob before it is sent."""
_CELL = "torchyard.cell"
"""Label of an image: the cell's id."""


@dataclass(frozen=True, kw_only=True)
class Tags:
    """Names of an image in a repository."""

    fixed: tuple[str, ...] = ()
    """These mean one image for ever."""
    own: tuple[str, ...] = ()
    """These go from one image of a cell to the next."""
    moving: tuple[str, ...] = ()
    """These go from image to image, and from cell to cell."""
    cell: str = ""
    """Id of the cell whose own they are."""

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, in the order in which they are set."""
        return (*self.fixed, *self.own, *self.moving)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An image that may be pushed, and under which names."""

    image: Image
    tags: Tags
    verdicts: tuple[Verdict, ...]
    """On whose word; none for an image that is marked as unproven."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is attached to an image."""

    bill: bytes
    """Its bill of materials, CycloneDX, which agrees with the image."""
    attestations: tuple[Attestation, ...]
    signer: Signer | None
    """Who signs them; None if nobody does."""


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """An image that is in a repository, or, of a dry run, would be."""

    blobs: Mapping[Way, int]
    """How many of its blobs were there, were mounted and were sent."""
    bytes_sent: int
    tags: Mapping[str, str | None]
    """What each tag meant before, None for a new one."""
    attached: int = 0
    """How many documents about it were attached; those that were there already do not count."""

    def as_json(self) -> dict[str, Any]:
        """Return it as it is shown to machines."""
        return {
            "blobs": {way.value: self.blobs.get(way, 0) for way in Way},
            "bytes_sent": self.bytes_sent,
            "attached": self.attached,
            "tags": [{"name": name, "before": before} for name, before in self.tags.items()],
        }


# ----------------------------------------------------------------------------------------------------
# What, and where to


def candidate(
    store: Store,
    plan: Plan,
    family: Family,
    digest: str,
    *,
    now: Callable[[str], str | None],
    unproven: bool,
) -> Candidate:
    """Return what is to be pushed of a cell of a family whose image has `digest`, and under which names.

    `now` says what a tag means in the repository: the dated one is the first that is free, or the image's already.
    Raises CellFailedError if the image lacks a passing verdict on a tier that the policy asks for, unless `unproven`
    things are pushed, too: then the image is marked, which gives it another digest, and its tags say so, so that it can
    never be taken for a proven one.
    """
    cell, policy = plan.cell, family.policy
    image = export.stored_image(store, digest)
    try:
        verdicts = gate.require(store, digest, name=cell.id, tiers=policy.tiers_of(cell))
    except CellFailedError:
        if not unproven:
            raise
        names = tuple(f"{name}{gate.SUFFIX}" for name in cell.tag_names)
        return Candidate(image=gate.marked(store, image), tags=Tags(own=names, cell=cell.id), verdicts=())
    serials = itertools.islice(aliases.serials(aliases.dated_tag(cell, plan.epoch)), MOST_OF_A_DAY)
    dated = next((name for name in serials if now(name) in (None, digest)), None)
    if dated is None:
        raise CellFailedError(
            f"{cell.id}: more than {MOST_OF_A_DAY} images have this day's tags",
            why="the same packages gave another image each time",
            tries=("have tags that nobody needs deleted there", "torchyard lock --bases, for those of a later day"),
        )
    moving = aliases.moving_tags(cell, family.cells, latest=policy.latest)
    tags = Tags(fixed=(dated,), own=cell.tag_names, moving=moving, cell=cell.id)
    return Candidate(image=image, tags=tags, verdicts=verdicts)


def evidence(
    project: Project,
    plan: Plan,
    store: Store,
    found: Candidate,
    *,
    signer: Signer | None,
    vex: bytes | None = None,
    builder: str = SOMEBODY,
) -> Evidence | None:
    """Return what is attached to a cell's image; None if it is unproven: of such an image nothing is said.

    Raises CellFailedError if the image holds something else than its bill says, or a container was seen to have other
    packages.
    """
    if not found.verdicts:
        return None
    bill = bills.checked(plan, store, found.image, _bill)
    for verdict in found.verdicts:
        bills.check_reported(bill, verdict.report.environment.packages, name=plan.cell.id)
    about = attestation.attestations(
        project, plan, found.image.manifest.digest, bill=bill, verdicts=found.verdicts, vex=vex, builder=builder
    )
    return Evidence(bill=bill, attestations=about, signer=signer)


def _bill(plan: Plan, store: Store, image: Image) -> bytes:
    from builder import sbom  # noqa: PLC0415 (CycloneDX takes long to import, and most bills are made already)

    return sbom.bill(plan, store, image)


@contextlib.contextmanager
def opened(destination: str, configuration: Configuration | None = None) -> Iterator[Target]:
    """Yield the repository that `registry/repository` names; raises MatrixError if it is none."""
    configuration = configuration or Configuration.of_user()
    named = Reference.parse(destination, configuration)
    if named.tag or named.digest:
        raise MatrixError(
            f"{quoted(destination)} is an image, not a repository",
            why="the matrix says under which tags a cell is published",
            tries=(f"{named.registry}/{named.repository}",),
        )
    place = configuration.locate(named)
    with Registry(place.registry, configuration=configuration, named=named.registry) as registry:
        yield Target(registry=registry, repository=place.repository)


# ----------------------------------------------------------------------------------------------------
# Pushing


def look(target: Target, image: Image, tags: Tags) -> Pushed:
    """Return what `push` would do, raising what it would raise at once; what could be mounted counts as sent."""
    before = _before(target, image, tags)
    with ThreadPoolExecutor(PARALLEL) as pool:
        blobs = _content(image)
        there = list(pool.map(functools.partial(has_blob, target), blobs))
    missing = [blob.size for blob, is_there in zip(blobs, there, strict=True) if not is_there]
    return Pushed(
        blobs={Way.THERE: len(blobs) - len(missing), Way.SENT: len(missing)}, bytes_sent=sum(missing), tags=before
    )


def push(
    target: Target, store: Store, image: Image, tags: Tags, *, evidence: Evidence | None = None, progress: Progress
) -> Pushed:
    """Bring an image into a repository, attach what is said of it, and then set its tags.

    Nothing is sent that the registry has or can mount. Raises CellFailedError if a fixed tag is another image's, or one
    of the cell's own another cell's, before anything is sent, or if somebody else moves a tag meanwhile; SourceError if
    the registry fails or refuses, HashMismatchError if it gives back something else, or bytes of the store were wrong;
    ToolError if it cannot be signed. Then no tag is set that was not set before the error.
    """
    with Journal.opened(store, target.registry.host, target.repository) as journal:
        before = _before(target, image, tags)
        arrived = _bring(target, store, image, journal, progress)
        content = b"".join(recipe.pieces(store, image.manifest))
        _store_manifest(target, image.manifest, content, journal)
        attached = 0
        if evidence is not None:
            attached = attestation.attach(
                target,
                image.manifest,
                evidence.attestations,
                bill=evidence.bill,
                signer=evidence.signer,
                journal=journal,
            )
        for name in tags.names:
            if before[name] != image.manifest.digest:
                _set(target, name, image.manifest, content, before[name])
        # Those that mean it already are only looked at again, which can be done at once.
        still = [name for name in tags.names if before[name] == image.manifest.digest]
        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(lambda name: _set(target, name, image.manifest, content, before[name]), still))
    return Pushed(
        blobs=Counter(one.way for one in arrived),
        bytes_sent=sum(one.bytes_sent for one in arrived),
        tags=before,
        attached=attached,
    )


def _before(target: Target, image: Image, tags: Tags) -> dict[str, str | None]:
    """Return what each tag means now; raises CellFailedError naming every one that may not become this image's."""
    with ThreadPoolExecutor(PARALLEL) as pool:
        before = dict(zip(tags.names, pool.map(functools.partial(resolve, target), tags.names), strict=True))
    mine = image.manifest.digest
    others = {name: digest for name, digest in before.items() if digest is not None and digest != mine}
    problems = [
        Problem(
            what=f"the tag {name} exists, and is another image's",
            where=f"{target}:{name}",
            why=f"it is {others[name]}; this image is {mine}",
            tries=(
                "push to another repository: a tag that somebody may have pinned is never overwritten",
                "torchyard build --rebuild, if both should be the same image",
            ),
        )
        for name in tags.fixed
        if name in others
    ]
    problems += [
        Problem(
            what=f"the tag {name} is another cell's",
            where=f"{target}:{name}",
            why=f"it is an image of {quoted(cell)}; who pinned it would get one of {tags.cell}",
            tries=(
                "push to another repository: two matrices share this one, or the default base was changed",
                "have the tag deleted there, if it shall go to another cell",
            ),
        )
        for name in tags.own
        if name in others and (cell := _cell_of(target, others[name])) not in (None, tags.cell)
    ]
    if problems:
        raise CellFailedError(problems=tuple(problems))
    return before


def _cell_of(target: Target, digest: str) -> str | None:
    """Return which cell's an image in the repository is, as its label says; None if it is none of torchyard's."""
    try:
        config = Descriptor.from_json(json.loads(read_manifest(target, digest) or b"")["config"])
        about = json.loads(referrers.document(target, config, limit=CONFIG_MAX))
        return str(about["config"]["Labels"][_CELL])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _content(image: Image) -> tuple[Descriptor, ...]:
    """Return the image's blobs once each: layers, the largest first so that the tail is short, and then the config."""
    layers = {layer.blob.digest: layer.blob for layer in image.layers}
    return (*sorted(layers.values(), key=lambda blob: (-blob.size, blob.digest)), image.config)


def _bring(target: Target, store: Store, image: Image, journal: Journal, progress: Progress) -> Sequence[Arrived]:
    """Bring every blob there, several at a time, the config last; the first failure stops the others."""
    stop = threading.Event()

    def bring(blob: Descriptor) -> Arrived:
        arrived = push_blob(
            target,
            blob,
            functools.partial(recipe.pieces, store, blob),
            name="config" if blob is image.config else f"layer {blob.sha256[:12]}",
            sources=journal.elsewhere(blob.digest)[:MOST_SOURCES],
            progress=progress,
            stop=stop,
        )
        journal.note_blob(blob.digest)
        return arrived

    *layers, config = _content(image)
    with ThreadPoolExecutor(PARALLEL, thread_name_prefix="push") as pool:
        futures = [pool.submit(bring, layer) for layer in layers]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            arrived = [future.result() for future in done]
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    stop.clear()
    return [*arrived, bring(config)]


def _store_manifest(target: Target, manifest: Descriptor, content: bytes, journal: Journal) -> None:
    """Store a manifest under its digest, and read it back unless that was done before."""

    def needed() -> bool:
        found = resolve(target, manifest.digest)
        if found not in (None, manifest.digest):
            raise _other(target, manifest, f"asked for it, the registry answers {found}")
        return found is None

    sent = put_manifest(target, manifest.digest, content, manifest.media_type, needed=needed)
    if sent or not journal.has_read_back(manifest.digest):
        found = read_manifest(target, manifest.digest)
        if found is None:
            raise SourceError(
                "the registry took the manifest, and does not have it",
                where=f"{target}@{manifest.digest}",
                tries=("run again: what arrived is not sent again",),
            )
        if found != content:
            raise _other(target, manifest, "read back, it has other bytes")
        journal.note_read_back(manifest.digest)


def _other(target: Target, manifest: Descriptor, why: str) -> HashMismatchError:
    return HashMismatchError(
        "the registry does not give the manifest that was pushed, and no tag was set",
        where=f"{target}@{manifest.digest}",
        why=why,
        tries=("run again: a proxy may have changed it on the way", "do not use this registry if it stays"),
    )


def _set(target: Target, name: str, manifest: Descriptor, content: bytes, before: str | None) -> None:
    """Let a tag mean the image, if it still means what it meant `before`.

    Registries know no compare-and-set. The conditions are sent for those that heed them; elsewhere somebody who moves
    the tag between the last look and the request is overwritten unnoticed. Who moves it afterwards is noticed.
    """

    def needed() -> bool:
        now = resolve(target, name)
        if now not in (before, manifest.digest):
            raise _moved(target, name, manifest, before, now)
        return now != manifest.digest

    conditions = {"If-None-Match": "*"} if before is None else {"If-Match": f'"{before}"'}
    if put_manifest(target, name, content, manifest.media_type, needed=needed, conditions=conditions):
        now = resolve(target, name)
        if now != manifest.digest:
            raise _moved(target, name, manifest, before, now)


def _moved(target: Target, name: str, manifest: Descriptor, before: str | None, now: str | None) -> CellFailedError:
    return CellFailedError(
        f"the tag {name} was moved by somebody else during the push",
        where=f"{target}:{name}",
        why=f"it was {before or 'not there'}, is {now or 'not there'} now, and this image is {manifest.digest}",
        tries=("find out who else pushes there, and run again: the image is there by its digest",),
    )
