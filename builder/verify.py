"""A reference and a public key → what can be known of the image: who stands for it, what is in it, who saw it work.

Only the registry is asked, and nothing is believed that the key does not cover: the matrix and the locks are those of
the signed provenance, from which the cell is rendered anew and compared with the image, its bill and what was observed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder import __version__, attestation, bills, proof, provenance, referrers
from builder import report as reports
from builder.attestation import Beside, Found
from builder.cosign import Trust
from builder.credentials import Configuration
from builder.errors import CellFailedError, ImpossibleError, MatrixError, Problem, SourceError, TorchyardError
from builder.fetching import PARALLEL, Progress
from builder.foreign import quoted
from builder.gate import MARK, TIERS, Verdict
from builder.layout import MEDIA_INDEX, Descriptor, canonical_json
from builder.provenance import Made
from builder.reference import Reference
from builder.registry import CONFIG_MAX, Registry
from builder.render import Plan
from builder.statement import Predicate
from builder.transfer import FAILURES, chunks
from builder.upload import Target, has_blob, manifest_of

_KINDS = {
    Predicate.SIGNATURE: "signature",
    Predicate.PROVENANCE: "provenance",
    Predicate.BILL: "bill of materials",
    Predicate.VERDICT: "verdict",
}
"""What must be signed, and what it is called."""
_VERSIONS = ("cell", "torch", "cuda", "cudnn", "nccl", "python")
"""What labels of an image declare, whichever torchyard made it."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """One thing that is known of the image."""

    what: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Verified:
    """An image that is what its publisher says."""

    reference: str
    digest: str
    known: tuple[Known, ...]
    notes: tuple[str, ...]
    """What whoever relies on it should know besides."""

    def as_json(self) -> dict[str, Any]:
        """Return it as it is shown to machines."""
        return {
            "reference": self.reference,
            "digest": self.digest,
            "verified": [{"what": one.what, "detail": one.detail} for one in self.known],
            "notes": list(self.notes),
        }


@dataclass(frozen=True, kw_only=True)
class _Published:
    """An image in a registry: its manifest's digest, its configuration, its layers."""

    digest: str
    config: Mapping[str, Any]
    blobs: tuple[Descriptor, ...]
    """Configuration and layers."""

    @property
    def labels(self) -> Mapping[str, str]:
        found = self.config.get("config")
        labels = found.get("Labels") if isinstance(found, dict) else None
        return {str(key): str(value) for key, value in labels.items()} if isinstance(labels, dict) else {}


@contextlib.contextmanager
def opened(reference: str, configuration: Configuration | None = None) -> Iterator[tuple[Target, str]]:
    """Yield the repository of an image, to be read, and the tag or digest; raises MatrixError if it names no image."""
    configuration = configuration or Configuration.of_user()
    named = Reference.parse(reference, configuration)
    name = named.digest or named.tag
    if name is None:
        raise MatrixError(
            f"{quoted(reference)} names no image",
            why="which one of the repository is meant is not said",
            tries=(f"{reference}:TAG", f"{reference}@sha256:..."),
        )
    place = configuration.locate(named)
    with Registry(place.registry, configuration=configuration, named=named.registry) as registry:
        yield Target(registry=registry, repository=place.repository, actions="pull"), name


def verify(
    target: Target, name: str, trust: Trust | None, *, tiers: Sequence[int] = TIERS, content: bool, progress: Progress
) -> Verified:
    """Verify the image that a tag or digest names; raises CellFailedError with everything that does not hold.

    Without `trust` what nobody signed counts as well: then it is known what somebody says, not who. `tiers` must be
    proven. With `content` every byte of the image is fetched and hashed; otherwise only whether all blobs are there.
    Raises ImpossibleError if there is no such image, SourceError if the registry does not answer.
    """
    published = _published(target, name)
    where = f"{target}@{published.digest}"
    if published.labels.get(MARK):
        raise CellFailedError(
            "the image is marked as unproven by whoever published it", where=where,
            why=f"its label {MARK} says so", tries=("use a tag that does not end in -unproven",),
        )  # fmt: skip
    beside = attestation.beside(target, published.digest)
    believed, problems = _believed(beside, trust, published.digest, where)
    notes = list(beside.strange)
    known: list[Known] = []
    if not problems:
        known, found = _judged(published, beside, believed, tiers, where)
        problems += found
    if not problems:
        known.append(_content(target, published, content=content, progress=progress))
    if problems:
        raise CellFailedError(problems=tuple(problems))
    if trust is None:
        notes.append("nobody's signature was asked for: anybody who can write there could have said all this")
    return Verified(
        reference=f"{target}:{name}" if not name.startswith("sha256:") else where,
        digest=published.digest,
        known=(_whose(trust), *known),
        notes=tuple(notes),
    )


def _whose(trust: Trust | None) -> Known:
    if trust is None:
        return Known(what="signature", detail="not asked for")
    return Known(what="signature", detail=f"by {trust.key or f'{trust.identity} of {trust.issuer}'}")


# ----------------------------------------------------------------------------------------------------
# The image


def _published(target: Target, name: str) -> _Published:
    """Read manifest and configuration; raises ImpossibleError if it is no image of one platform."""
    where = f"{target}:{name}" if not name.startswith("sha256:") else f"{target}@{name}"
    digest, manifest = manifest_of(target, name)
    try:
        document = json.loads(manifest)
        if document.get("mediaType") == MEDIA_INDEX or "manifests" in document:
            raise ImpossibleError(
                "this is a list of images for several platforms", where=where,
                tries=("verify the one that is used, by its digest",),
            )  # fmt: skip
        config = Descriptor.from_json(document["config"])
        blobs = (config, *(Descriptor.from_json(layer) for layer in document["layers"]))
        about = json.loads(referrers.document(target, config, limit=CONFIG_MAX))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        about = None
    if not isinstance(about, dict):
        raise ImpossibleError("this is no container image", where=where, tries=("check the repository and the tag",))
    return _Published(digest=digest, config=about, blobs=tuple({blob.digest: blob for blob in blobs}.values()))


def _content(target: Target, published: _Published, *, content: bool, progress: Progress) -> Known:
    """Look whether the registry has the image's blobs, and with `content` whether their bytes are right."""
    with ThreadPoolExecutor(PARALLEL) as pool:
        if content:
            list(pool.map(functools.partial(_hashed, target, progress), published.blobs))
        else:
            there = list(pool.map(functools.partial(has_blob, target), published.blobs))
            lost = [blob.digest for blob, is_there in zip(published.blobs, there, strict=True) if not is_there]
            if lost:
                raise CellFailedError(
                    "the registry lacks layers of the image", where=f"{target}@{published.digest}",
                    why=", ".join(lost[:3]), tries=("have it pushed again",),
                )  # fmt: skip
    size = sum(blob.size for blob in published.blobs) / 1e6
    done = "all fetched and hashed" if content else "all there; --content hashes their bytes"
    return Known(what="content", detail=f"{len(published.blobs)} blobs, {size:.1f} MB: {done}")


def _hashed(target: Target, progress: Progress, blob: Descriptor) -> None:
    """Fetch a blob and throw it away; raises CellFailedError if it has other bytes than the image names."""
    name = f"layer {blob.sha256[:12]}"
    response = target.registry.request(
        "GET",
        f"blobs/{blob.digest}",
        repository=target.repository,
        actions=target.actions,
        headers={"Accept": "*/*", "Accept-Encoding": "identity"},
    )
    if response.status_code != 200:
        raise target.registry.refusal(response, target.repository, name)
    progress.start(name, blob.size, 0)
    found, size = hashlib.sha256(), 0
    with response:
        try:
            for piece in chunks(response):
                found.update(piece)
                size += len(piece)
                progress.advance(name, len(piece))
                if size > blob.size:
                    break
        except FAILURES as error:
            raise SourceError(
                f"the {name} broke off", where=f"{target}@{blob.digest}", why=type(error).__name__, tries=("run again",)
            ) from error
    if f"sha256:{found.hexdigest()}" != blob.digest:
        raise CellFailedError(
            "a layer has been altered", where=f"{target}@{blob.digest}",
            why=f"its bytes have the digest sha256:{found.hexdigest()}" if size == blob.size
            else f"it has {'more than ' if size > blob.size else ''}{min(size, blob.size)} bytes, and not {blob.size}",
            tries=("do not use the image, and tell whoever runs the registry",),
        )  # fmt: skip
    progress.finish(name)


# ----------------------------------------------------------------------------------------------------
# Whom to believe


def _believed(
    beside: Beside, trust: Trust | None, digest: str, where: str
) -> tuple[Mapping[str, tuple[Found, ...]], list[Problem]]:
    """Return the statements of each kind that count, and a problem for each kind without any."""
    candidates = {kind: beside.of(kind, signed=trust is not None) for kind in _KINDS}
    if trust is None:
        del candidates[Predicate.SIGNATURE]
        verdicts: Mapping[str, Sequence[str]] = dict.fromkeys(candidates, ())
        believed = dict(candidates)
    else:
        every = [found for group in candidates.values() for found in group]
        with ThreadPoolExecutor(PARALLEL) as pool:
            refusals = dict(
                zip(
                    (one.referrer for one in every),
                    pool.map(functools.partial(_refusal, trust, digest), every),
                    strict=True,
                )
            )
        believed = {
            kind: tuple(one for one in group if not refusals[one.referrer]) for kind, group in candidates.items()
        }
        verdicts = {kind: [refusals[one.referrer] for one in group] for kind, group in candidates.items()}
    problems = []
    for kind, group in believed.items():
        if group:
            continue
        reasons = list(dict.fromkeys(verdicts[kind]))
        is_alone = not candidates[kind]
        problems.append(
            Problem(
                what=f"the image has no {_KINDS[kind]}" + ("" if is_alone or trust is None else " of the publisher's"),
                where=where,
                why=_nothing(beside, kind, trust) if is_alone else "; ".join(reasons[:3]),
                tries=(
                    ("it may be a copy: evidence stays behind when an image is copied without it",)
                    if is_alone
                    else ("check that this is the publisher's public key", "do not use the image if it is")
                ),
            )
        )
    return believed, problems


def _refusal(trust: Trust, digest: str, found: Found) -> str:
    """Return why a statement does not count; empty if it does. What is missing here is not the image's fault."""
    assert found.bundle is not None
    try:
        trust.check(found.bundle, digest=digest, predicate_type=found.statement.predicate_type)
    except CellFailedError as error:
        return error.problems[0].why
    return ""


def _nothing(beside: Beside, kind: str, trust: Trust | None) -> str:
    plain = beside.of(kind, signed=False)
    if trust is not None and plain:
        return "there is one that nobody signed"
    if beside.strange:
        return f"what lies beside it cannot be read: {beside.strange[0]}"
    return "nothing of the kind lies beside it in the repository"


# ----------------------------------------------------------------------------------------------------
# What is said, compared with the image and with itself


def _judged(
    published: _Published, beside: Beside, believed: Mapping[str, tuple[Found, ...]], tiers: Sequence[int], where: str
) -> tuple[list[Known], list[Problem]]:
    """Return what is known, and what contradicts what."""
    known: list[Known] = []
    problems: list[Problem] = []
    try:
        made, plan, facts = _rendered(believed[Predicate.PROVENANCE], where)
    except TorchyardError as error:
        return [], list(error.problems)
    known.append(facts)
    problems += _declared(published, made, plan, where)
    bill = believed[Predicate.BILL][-1].statement.predicate
    found, contradictions = _bill(beside, believed[Predicate.BILL], bill, plan, where)
    known.append(found)
    problems += contradictions
    for tier in tiers:
        try:
            known += _verdict(believed[Predicate.VERDICT], tier, published.digest, plan, bill=bill, where=where)
        except TorchyardError as error:
            problems += error.problems
    return known, problems


def _rendered(candidates: Sequence[Found], where: str) -> tuple[Made, Plan, Known]:
    """Return the provenance, and the cell as its inputs render it; raises MatrixError or LockError if they do not."""
    made = Made.read(candidates[0].statement, where=where)
    with tempfile.TemporaryDirectory(prefix="torchyard-verify-") as directory:
        project = made.restore(Path(directory))
        cells = [cell for cell in project.cells if cell.id == made.cell_id]
        if not cells:
            raise MatrixError(
                "the provenance names a cell that its matrix does not have", where=where, why=made.cell_id
            )
        plan = project.plan(cells[0])
    detail = (
        f"{made.cell_id}, made by torchyard {made.torchyard} from {len(plan.lock.wheels)} wheels"
        f" and {len(plan.base_lock.debs) if plan.base_lock else 'a base image with its'} Debian packages"
        f"; builder {made.builder}"
    )
    return made, plan, Known(what="provenance", detail=detail)


def _declared(published: _Published, made: Made, plan: Plan, where: str) -> Iterator[Problem]:
    """Yield how the image's labels, its materials and its inputs contradict each other."""
    is_same = made.torchyard == __version__
    if is_same and made.plan != plan.digest:
        yield Problem(
            what="the provenance is not of the inputs that it has", where=where,
            why=f"they render the plan {plan.digest[:12]}, and it says {made.plan[:12]}",
        )  # fmt: skip
    expected = provenance.named(provenance.materials(plan, made.inputs))
    # The program that validates an image is this torchyard's own.
    differing = {one for one in expected ^ made.materials if is_same or one[0] != "validator"}
    if differing:
        yield Problem(
            what="the provenance lists other materials than its locks", where=where,
            why=", ".join(sorted(name for name, _ in differing)[:5]),
        )  # fmt: skip
    for name in _VERSIONS:
        label = f"torchyard.{name}"
        declared, found = plan.config.labels.get(label), published.labels.get(label)
        if declared != found:
            yield Problem(
                what=f"the image's label {label} is not what its inputs declare", where=where,
                why=f"it is {found or 'missing'}; declared: {declared or 'none'}",
            )  # fmt: skip


def _bill(
    beside: Beside, candidates: Sequence[Found], bill: Mapping[str, Any], plan: Plan, where: str
) -> tuple[Known, list[Problem]]:
    """Compare the bill of materials with the lock, and the unsigned copies that scanners read with the candidates."""
    problems = []
    signed = {canonical_json(one.statement.predicate) for one in candidates}
    for copy in beside.bills:
        try:
            is_known = canonical_json(json.loads(copy)) in signed
        except (ValueError, RecursionError):
            is_known = False
        if not is_known:
            problems.append(
                Problem(
                    what="the bill of materials was altered", where=where,
                    why="a copy beside the image is not the one that was signed",
                    tries=("use the signed one; tell whoever publishes the image",),
                )
            )  # fmt: skip
    components = bill.get("components")
    listed = [one for one in components if isinstance(one, dict)] if isinstance(components, list) else []
    hashes = {
        str(entry.get("content"))
        for one in listed
        for entry in (one.get("hashes") or ())
        if isinstance(entry, dict) and entry.get("alg") == "SHA-256"
    }
    debs = plan.system_lock or plan.base_lock
    expected = {wheel.sha256: wheel.filename for wheel in plan.lock.wheels} | {
        deb.sha256: deb.filename.rpartition("/")[2] for deb in (debs.debs if debs else ())
    }
    lacking = [name for digest, name in expected.items() if digest not in hashes]
    if lacking:
        problems.append(
            Problem(
                what="the bill of materials lacks what the lock has", where=where,
                why=", ".join(lacking[:5]) + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""),
            )
        )  # fmt: skip
    return Known(what="bill of materials", detail=f"{len(listed)} components, those of the locks among them"), problems


def _verdict(
    candidates: Sequence[Found], tier: int, digest: str, plan: Plan, *, bill: Mapping[str, Any], where: str
) -> list[Known]:
    """Return what the last validation that tried a tier saw.

    Raises CellFailedError if that does not prove the cell, or is not what its bill of materials lists.
    """
    tried = []
    for found in candidates:
        document = found.statement.predicate.get("report")
        try:
            report = reports.loads(json.dumps(document).encode(), where=where)
        except MatrixError as error:
            raise CellFailedError(
                "a verdict holds no report", where=where, why=error.problems[0].why or error.problems[0].what
            ) from error
        if report.subject.digest != digest:
            raise CellFailedError(
                "a verdict's report is about another image", where=where, why=str(report.subject.digest)
            )
        if str(tier) in report.verdict.tiers:
            tried.append(Verdict(tier=tier, report=report))
    if not tried:
        raise CellFailedError(
            f"nobody validated the image at T{tier}",
            where=where,
            tries=(f"ask for less: --tier {tier - 1}",) if tier > 1 else (),
        )
    last = max(tried, key=lambda verdict: verdict.report.started)
    if last.refusal:
        raise CellFailedError(f"the image's last verdict at T{tier} does not prove it", where=where, why=last.refusal)
    facts = last.report.environment.facts
    contradictions = tuple(proof.differences(plan, {"facts": facts, "errors": {}}))
    if contradictions:
        raise CellFailedError("what was observed is not what is declared", where=where, problems=contradictions)
    if unlisted := tuple(bills.unreported(bill, last.report.environment.packages)):
        raise CellFailedError(
            "a container of the image reported other packages than its bill of materials lists",
            where=where,
            problems=unlisted,
            tries=("do not rely on the bill; tell whoever publishes the image",),
        )
    shown = (
        f"torch {facts['torch']}",
        f"CUDA {facts['cuda']}",
        f"cuDNN {facts['cudnn_number']}",
        f"NCCL {facts['nccl']}",
    )
    observed = " · ".join(one for one in (*shown, f"Python {facts['python']}") if not one.endswith(" None"))
    counts = last.report.verdict.counts
    return [
        Known(
            what=f"T{tier}",
            detail=f"proven {last.report.started:%Y-%m-%d} by {counts.get(reports.Status.PASS, 0)} checks",
        ),
        *([Known(what="observed = declared", detail=observed)] if tier == 1 else []),
    ]
