"""What is said of an image, beside it in its repository: made from what is known here, signed, attached, found again.

Attached is each thing once: the bill of materials as a document that scanners know, and each statement, signed if there
is a key. The same thing is signed differently each time, so what counts is what a statement says, and whose it is.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from builder import cosign, provenance, referrers
from builder import statement as statements
from builder.cosign import Signer
from builder.errors import MatrixError, SourceError
from builder.fetching import PARALLEL
from builder.gate import Verdict
from builder.journal import Journal
from builder.layout import Descriptor, canonical_json
from builder.project import Project
from builder.provenance import Made
from builder.referrers import Artifact, Referrer
from builder.render import Plan
from builder.report import Report, Status, dumps
from builder.statement import Predicate, Statement
from builder.upload import Target

BILL = "application/vnd.cyclonedx+json"
"""Media type of a bill of materials, under which scanners look for it."""
VEX_MAX = 8 << 20
# As cosign annotates what it attaches; `cosign verify-attestation` looks at the second.
_CONTENT, _PREDICATE = "dev.sigstore.bundle.content", "dev.sigstore.bundle.predicateType"
_PLAIN_PREDICATE = "in-toto.io/predicate-type"


@dataclass(frozen=True, kw_only=True)
class Attestation:
    """A statement to be attached."""

    statement: Statement
    identity: str
    """Hex digest of what counts in it: one with the same identity need not be made again."""

    def artifact(self, signer: Signer | None) -> Artifact:
        """Return it as it is attached, signed if there is a signer."""
        content = self.statement.dumps()
        if signer is None:
            annotations = {_PLAIN_PREDICATE: self.statement.predicate_type}
            return Artifact(artifact_type=statements.MEDIA_TYPE, content=content, annotations=annotations)
        annotations = {_CONTENT: "dsse-envelope", _PREDICATE: self.statement.predicate_type}
        return Artifact(artifact_type=cosign.BUNDLE, content=signer.sign(content), annotations=annotations)


@dataclass(frozen=True, kw_only=True)
class Found:
    """Something said of an image that lies beside it: read, and not yet believed."""

    referrer: str
    """Digest of what ties it to the image."""
    statement: Statement
    identity: str
    """As that of what is to be attached; found by reading it."""
    sha256: str
    """In hex, of all of it."""
    bundle: bytes | None
    """The signed form; None if nobody signed it."""


@dataclass(frozen=True, kw_only=True)
class Beside:
    """All that lies beside an image, as far as it is of a kind known here."""

    statements: tuple[Found, ...]
    bills: tuple[bytes, ...]
    strange: tuple[str, ...]
    """Why a thing could not be read, one line each."""

    def of(self, predicate_type: str, *, signed: bool) -> tuple[Found, ...]:
        """Return the statements of a type."""
        return tuple(
            one
            for one in self.statements
            if one.statement.predicate_type == predicate_type and (one.bundle is not None or not signed)
        )


# ----------------------------------------------------------------------------------------------------
# What is said


def attestations(
    project: Project,
    plan: Plan,
    digest: str,
    *,
    bill: bytes,
    verdicts: Iterable[Verdict],
    vex: bytes | None,
    builder: str = provenance.SOMEBODY,
) -> tuple[Attestation, ...]:
    """Return what is said of a cell's image with `digest`, in the order in which it is attached.

    `bill` is the bill of materials and `vex` an OpenVEX document; raises MatrixError if that is none.
    """
    name = plan.cell.id
    about = [
        _attestation(provenance.statement(project, plan, digest, builder=builder)),
        _attestation(Statement(digest=digest, name=name, predicate_type=Predicate.BILL, predicate=_object(bill))),
    ]
    reports = {dumps(verdict.report): verdict.report for verdict in verdicts}  # one may speak for two tiers
    about += [
        _attestation(Statement(digest=digest, name=name, predicate_type=Predicate.VERDICT, predicate=_result(report)))
        for report in reports.values()
    ]
    if vex is not None:
        predicate = _openvex(vex)
        about.append(
            _attestation(Statement(digest=digest, name=name, predicate_type=Predicate.VEX, predicate=predicate))
        )
    signature = Statement(digest=digest, predicate_type=Predicate.SIGNATURE, predicate={})
    return (*about, _attestation(signature))


def _attestation(made: Statement) -> Attestation:
    return Attestation(statement=made, identity=_identity(made, made.dumps()))


def _identity(statement: Statement, content: bytes) -> str:
    """Return the hex digest of what counts in a statement with this content."""
    if statement.predicate_type == Predicate.PROVENANCE:
        # The matrix may have changed elsewhere since: the image's own inputs count.
        with contextlib.suppress(MatrixError):
            made = Made.read(statement, where="")
            return _hash(["provenance", made.plan, made.builder])
    return hashlib.sha256(content).hexdigest()


def _hash(content: object) -> str:
    return hashlib.sha256(canonical_json(content)).hexdigest()


def _object(content: bytes) -> dict[str, Any]:
    found = statements.json_object(content)
    assert found is not None, "a document of our own"
    return found


def _result(report: Report) -> dict[str, Any]:
    """Return a validation's report as the predicate of a test result: its summary for all tools, the whole for ours."""

    def ids(*statuses: Status) -> list[str]:
        return [result.id for result in report.with_status(*statuses)]

    broken = ids(Status.FAIL, Status.ERROR)
    warned = ids(Status.WARN, Status.WAIVED)
    document = _object(dumps(report).encode())
    profile = {"name": f"profile {report.profile.name}", "digest": {"sha256": _hash(document["profile"])}}
    return {
        "result": "FAILED" if broken or not report.verdict.passed else "WARNED" if warned else "PASSED",
        "configuration": [
            {"name": f"torchyard-validate {report.suite.version}", "digest": _digest_set(report.suite.digest)},
            profile,
        ],
        "passedTests": ids(Status.PASS),
        "warnedTests": warned,
        "failedTests": broken,
        "report": document,
    }


def _digest_set(digest: str) -> dict[str, str]:
    algorithm, _, value = digest.partition(":")
    return {algorithm: value}


def _openvex(content: bytes) -> dict[str, Any]:
    document = statements.json_object(content) if len(content) <= VEX_MAX else None
    if document is None or not str(document.get("@context", "")).startswith(Predicate.VEX):
        raise MatrixError(
            "this is no OpenVEX document",
            why="it is not a JSON object, or its @context is another's",
            tries=("vexctl create writes one",),
        )
    return document


# ----------------------------------------------------------------------------------------------------
# Beside the image


def beside(target: Target, digest: str) -> Beside:
    """Return what lies beside an image; what cannot be read is told, and raises nothing: strangers may attach, too.

    Raises SourceError if the registry does not give what it lists.
    """
    known = [one for one in referrers.referrers(target, digest) if one.artifact_type in _LIMITS]
    with ThreadPoolExecutor(PARALLEL) as pool:
        contents = list(pool.map(functools.partial(_content, target), known))
    found, bills, strange = [], [], []
    for referrer, content in zip(known, contents, strict=True):
        where = f"{target}@{referrer.digest}"
        if content is None:
            strange.append(f"{where}: it holds not one document, or a larger one than is read")
        elif referrer.artifact_type == BILL:
            bills.append(content)
        else:
            try:
                found.append(_found(referrer, content, digest, where))
            except MatrixError as error:
                strange.append(f"{where}: {error.problems[0].what}: {error.problems[0].why}")
    return Beside(statements=tuple(found), bills=tuple(bills), strange=tuple(strange))


_LIMITS = {
    BILL: statements.MOST_BYTES,
    statements.MEDIA_TYPE: statements.MOST_BYTES,
    cosign.BUNDLE: cosign.BUNDLE_MAX,
}
"""What is read of what lies beside an image, by its type, and up to how many bytes."""


def _content(target: Target, referrer: Referrer) -> bytes | None:
    limit = _LIMITS[referrer.artifact_type]
    if referrer.blob is None or referrer.blob.size > limit:
        return None
    return referrers.document(target, referrer.blob, limit=limit)


def _found(referrer: Referrer, content: bytes, digest: str, where: str) -> Found:
    is_signed = referrer.artifact_type == cosign.BUNDLE
    payload = cosign.payload(content, where=where) if is_signed else content
    statement = Statement.loads(payload, digest=digest, where=where)
    return Found(
        referrer=referrer.digest,
        statement=statement,
        identity=_identity(statement, payload),
        sha256=hashlib.sha256(payload).hexdigest(),
        bundle=content if is_signed else None,
    )


def attach(
    target: Target,
    subject: Descriptor,
    about: Sequence[Attestation],
    *,
    bill: bytes,
    signer: Signer | None,
    journal: Journal,
) -> int:
    """Attach what is not beside the image yet, and make sure that it is; returns how much was attached.

    Raises SourceError if the registry breaks off or does not give something back, ToolError if it cannot be signed. May
    be repeated: nothing is signed or attached twice.
    """
    there = beside(target, subject.digest)
    wanted = [one for one in about if signer is not None or one.statement.predicate_type != Predicate.SIGNATURE]
    # All are signed before one is attached: a key that does not open leaves nothing behind.
    artifacts = []
    if bill not in there.bills:
        artifacts.append(Artifact(artifact_type=BILL, content=bill))
    artifacts += [
        one.artifact(signer)
        for one in wanted
        if not any(_serves(found, one, signer, journal) for found in there.statements)
    ]
    for artifact in artifacts:
        journal.note_attached(referrers.attach(target, subject, artifact))
    if artifacts:
        _require(target, subject, wanted, bill=bill, signed=signer is not None)
    return len(artifacts)


def _serves(found: Found, wanted: Attestation, signer: Signer | None, journal: Journal) -> bool:
    """Tell whether a statement that is there makes another superfluous: it says the same, and is ours if that is asked.

    Whose a signature is, only cosign knows. It is asked once about what this store did not see signed; a keyless
    signature names whoever was asked for then, so that such a statement is made again.
    """
    if found.identity != wanted.identity or (found.bundle is None) is not (signer is None):
        return False
    if signer is None or found.bundle is None:
        # What nobody signed may be a stranger's, who says something else where it does not count.
        is_same = found.sha256 == hashlib.sha256(wanted.statement.dumps()).hexdigest()
        return is_same or journal.has_attached(found.referrer)
    if journal.has_attached(found.referrer):
        return not signer.key or cosign.is_by(found.bundle, signer.public_key())
    statement = found.statement
    if not signer.has_signed(found.bundle, digest=statement.digest, predicate_type=statement.predicate_type):
        return False
    journal.note_attached(found.referrer)
    return True


def _require(target: Target, subject: Descriptor, wanted: Sequence[Attestation], *, bill: bytes, signed: bool) -> None:
    there = beside(target, subject.digest)
    known = {one.identity for one in there.statements if one.bundle is not None or not signed}
    lacking = [one.statement.predicate_type for one in wanted if one.identity not in known]
    if bill not in there.bills:
        lacking.append(BILL)
    if lacking:
        raise SourceError(
            "the registry does not give back what was attached to the image, and no tag was set",
            where=f"{target}@{subject.digest}",
            why=f"missing: {', '.join(lacking)}",
            tries=("run again: what is there is not attached twice", "do not use this registry if it stays"),
        )
