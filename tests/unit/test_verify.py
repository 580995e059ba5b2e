"""From push to verify: evidence is attached once, before any tag; what is altered is refused in words of its own."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from builder import __version__, attestation, cosign, gate, layout, provenance, push, referrers, tar, transfer, verify
from builder import report as reports
from builder.cosign import Signer, Trust
from builder.credentials import Configuration
from builder.engines.oci.install import SITE
from builder.errors import CellFailedError, ImpossibleError, MatrixError, SourceError, ToolError, TorchyardError
from builder.fetching import Silent
from builder.layout import Image
from builder.project import Project
from builder.push import Evidence, Pushed, Tags
from builder.referrers import Artifact
from builder.render import Plan
from builder.statement import Predicate, Statement
from builder.store import Store
from builder.verify import Verified
from tests.support.cosign import PASSWORD, SECRET, Cosign
from tests.support.registry_server import Fault, PushServer, text_of
from tests.support.reports import document, result

REPOSITORY = "team/app"
TAGS = Tags(fixed=("1.0",), moving=("1",))
PROJECT = Project(Path(__file__).parents[2] / "matrix.yaml")
(CELL,) = PROJECT.select(["torch2.13.0-cpu-*-runtime"])
PLAN = PROJECT.plan(CELL)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BACKOFF_S", 0.001)
    monkeypatch.setattr(transfer, "BACKOFF_MAX_S", 0.01)
    monkeypatch.setattr(os, "fsync", lambda _: None)


def bill(plan: Plan = PLAN) -> dict[str, Any]:
    """Return a bill of materials that has what the locks have, and nothing else of a real one."""
    assert plan.base_lock is not None
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "components": [
            *(
                {
                    "name": wheel.name,
                    "version": str(wheel.version),
                    "purl": f"pkg:pypi/{wheel.name}@{wheel.version}",
                    "hashes": [{"alg": "SHA-256", "content": wheel.sha256}],
                    "properties": [
                        {"name": "torchyard:path", "value": f"/{SITE}/{wheel.name}-{wheel.version}.dist-info"}
                    ],
                }
                for wheel in plan.lock.wheels
            ),
            *({"name": deb.name, "hashes": [{"alg": "SHA-256", "content": deb.sha256}]} for deb in plan.base_lock.debs),
        ],
    }


def report(digest: str, *, started: str = "2026-11-20T10:00:00+00:00", status: str = "pass", **facts: Any) -> bytes:
    """Return what a validation of the image would have written."""
    expected = PLAN.expectation
    observed = {
        "torch": expected.torch,
        "cuda": expected.cuda,
        "cudnn_number": expected.cudnn_number,
        "nccl": expected.nccl,
        "python": expected.python,
        "architectures": [],
        "packages": dict(expected.packages),
        **facts,
    }
    about = document([result("run.import", status)], facts=observed, name=CELL.id, tiers={"1": status == "pass"})
    about["subject"]["digest"] = digest
    about["volatile"]["started"] = started
    return json.dumps(about).encode()


@dataclass
class Shop:
    """A store with an image, a registry, and a publisher with a key."""

    server: PushServer
    store: Store
    cosign: Cosign
    image: Image
    key: Path
    public: Path
    bill: bytes = field(default_factory=lambda: layout.canonical_json(bill()))
    vex: bytes | None = None
    signed: bool = True

    @property
    def digest(self) -> str:
        return self.image.manifest.digest

    @property
    def name(self) -> str:
        return f"{self.server.host}/{REPOSITORY}"

    def validated(self, **more: Any) -> None:
        gate.keep(self.store, self.digest, reports.loads(report(self.digest, **more), where="test"))

    def evidence(self, project: Project = PROJECT) -> Evidence:
        found = gate.require(self.store, self.digest, name=CELL.id)
        about = attestation.attestations(
            project, PLAN, self.digest, bill=self.bill, verdicts=found, vex=self.vex, builder="https://ci.example/1"
        )
        signer = Signer(key=str(self.key)) if self.signed else None
        return Evidence(bill=self.bill, attestations=about, signer=signer)

    def push(self, evidence: Evidence | None = None) -> Pushed:
        with push.opened(self.name, Configuration()) as target:
            said = evidence or self.evidence()
            return push.push(target, self.store, self.image, TAGS, evidence=said, progress=Silent())

    def verify(self, name: str = "1.0", *, trust: Trust | None = None, content: bool = False, **more: Any) -> Verified:
        whose = trust or Trust(key=str(self.public))
        with verify.opened(f"{self.name}:{name}", Configuration()) as (target, tag):
            return verify.verify(
                target, tag, whose if self.signed else None, content=content, progress=Silent(), **more
            )

    def refused(self, kind: type[TorchyardError] = CellFailedError, **more: Any) -> str:
        with pytest.raises(kind) as caught:
            self.verify(**more)
        return text_of(caught.value)

    def rewrite(self, predicate_type: str, change: Callable[[dict[str, Any]], None], *, signer: Signer | None) -> None:
        """Let somebody replace a statement beside the image by a changed one, which `signer` signs, or nobody."""
        with push.opened(self.name, Configuration()) as target:
            (found,) = attestation.beside(target, self.digest).of(predicate_type, signed=self.signed)
            predicate = json.loads(layout.canonical_json(found.statement.predicate))
            change(predicate)
            made = Statement(digest=self.digest, predicate_type=predicate_type, predicate=predicate)
            content = made.dumps()
            if self.signed and signer is None:
                assert found.bundle is not None
                envelope = json.loads(found.bundle)
                envelope["dsseEnvelope"]["payload"] = base64.b64encode(content).decode()
                content = json.dumps(envelope).encode()
            elif signer is not None:
                content = signer.sign(content)
            self.drop(found.referrer)
            kind = cosign.BUNDLE if self.signed else "application/vnd.in-toto+json"
            referrers.attach(target, self.image.manifest, Artifact(artifact_type=kind, content=content))

    def drop(self, referrer: str) -> None:
        del self.server.manifests[REPOSITORY][referrer]

    def of(self, predicate_type: str) -> list[str]:
        """Return the statements of a type that lie beside the image, by their manifests' digests."""
        with push.opened(self.name, Configuration()) as target:
            beside = attestation.beside(target, self.digest)
            return [one.referrer for one in beside.of(predicate_type, signed=False)]

    @property
    def theirs(self) -> Signer:
        """Whoever has stolen the key, or is the publisher."""
        return Signer(key=str(self.key))


@pytest.fixture
def server() -> Iterator[PushServer]:
    with PushServer() as running:
        yield running


@pytest.fixture
def shop(server: PushServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    program = Cosign(tmp_path / "cosign", monkeypatch)
    key, public = program.pair()
    store = Store.open(tmp_path / "store")
    made = Shop(server, store, program, assembled(store), key, public)
    made.validated()
    return made


def assembled(store: Store, labels: Mapping[str, str] = PLAN.config.labels) -> Image:
    with store.scratch("made") as scratch:
        layers = [
            layout.gzip_layer(store, tar.stream([tar.file_entry(name, name.encode() * 1000)]), scratch=scratch)
            for name in ("one", "two")
        ]
    return layout.assemble(store, architecture="amd64", config={"Labels": dict(labels)}, epoch=0, layers=layers)


# ----------------------------------------------------------------------------------------------------
# What is published, and found again


@pytest.mark.parametrize("api", [True, False])
def test_what_is_published_is_verified(shop: Shop, *, api: bool) -> None:
    shop.server.lists_referrers = api
    done = shop.push()
    assert done.attached == 5  # bill, provenance, attested bill, verdict, signature
    found = shop.verify()
    assert found.digest == shop.digest
    known = {one.what: one.detail for one in found.known}
    assert known["observed = declared"] == f"torch {PLAN.expectation.torch} · Python {CELL.python}"
    assert known["T1"] == "proven 2026-11-20 by 1 checks"
    assert CELL.id in known["provenance"]
    assert "builder https://ci.example/1" in known["provenance"]
    assert str(shop.public) in known["signature"]
    assert "--content" in known["content"]
    assert not found.notes
    assert "all fetched and hashed" in {one.what: one.detail for one in shop.verify(content=True).known}["content"]


def test_the_second_push_signs_and_attaches_nothing(shop: Shop) -> None:
    shop.push()
    signed, before = shop.cosign.times("attest-blob"), len(shop.server.requests)
    assert signed == 4
    again = shop.push()
    assert (again.attached, again.bytes_sent) == (0, 0)
    assert shop.cosign.times("attest-blob") == signed
    assert not {"PUT", "POST", "PATCH"} & {one.method for one in shop.server.requests[before:]}


def forgotten(shop: Shop) -> None:
    """Let the store not know what it attached, as one does not that was made anew."""
    shutil.rmtree(shop.store.root / "pushes")


def test_what_another_store_signed_with_the_key_is_not_signed_again(shop: Shop) -> None:
    shop.push()
    signed = shop.cosign.times("attest-blob")
    forgotten(shop)
    for _ in range(2):
        assert shop.push().attached == 0
        assert shop.cosign.times("verify-blob-attestation") == signed, "each is judged once, and that is noted"
    assert shop.cosign.times("attest-blob") == signed


def test_the_key_is_opened_once_for_several_images(shop: Shop) -> None:
    evidence, before = shop.evidence(), shop.cosign.times("public-key")
    for _ in range(3):
        shop.push(evidence)
    assert shop.cosign.times("public-key") == before + 1


def test_a_signature_that_only_looks_like_the_keys_is_none(shop: Shop) -> None:
    shop.push()
    with push.opened(shop.name, Configuration()) as target:
        (genuine,) = attestation.beside(target, shop.digest).of(Predicate.SIGNATURE, signed=True)
        assert genuine.bundle is not None
        bundle = json.loads(genuine.bundle)
        bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(bytes(32)).decode()
        shop.drop(genuine.referrer)
        forged = Artifact(artifact_type=cosign.BUNDLE, content=json.dumps(bundle).encode())
        referrers.attach(target, shop.image.manifest, forged)
    assert shop.push().attached == 1
    forgotten(shop)
    assert shop.push().attached == 0
    shop.verify()


def test_a_statement_under_the_name_of_another_is_not_taken_for_it(shop: Shop) -> None:
    """Annotations are nobody's word: what a signed statement says is read."""
    shop.push()
    with push.opened(shop.name, Configuration()) as target:
        there = attestation.beside(target, shop.digest)
        (old,) = there.of(Predicate.VERDICT, signed=True)
        assert old.bundle is not None
        shop.validated(started="2026-11-21T10:00:00+00:00")
        (newer,) = [one for one in shop.evidence().attestations if one.statement.predicate_type == Predicate.VERDICT]
        annotations = {"torchyard.identity": newer.identity}
        renamed = Artifact(artifact_type=cosign.BUNDLE, content=old.bundle, annotations=annotations)
        referrers.attach(target, shop.image.manifest, renamed)
    forgotten(shop)
    assert shop.push().attached == 1
    assert {one.what: one.detail for one in shop.verify().known}["T1"].startswith("proven 2026-11-21")


def test_a_newer_verdict_is_attached_besides(shop: Shop) -> None:
    shop.push()
    shop.validated(started="2026-11-21T10:00:00+00:00")
    assert shop.push().attached == 1
    assert len(shop.of(Predicate.VERDICT)) == 2
    assert {one.what: one.detail for one in shop.verify().known}["T1"].startswith("proven 2026-11-21")


def test_a_newer_verdict_that_failed_counts(shop: Shop) -> None:
    shop.push()
    late = reports.loads(report(shop.digest, started="2026-11-21T10:00:00+00:00", status="fail"), where="test")
    predicate = {"result": "FAILED", "report": json.loads(reports.dumps(late))}
    made = Statement(digest=shop.digest, predicate_type=Predicate.VERDICT, predicate=predicate)
    with push.opened(shop.name, Configuration()) as target:
        artifact = Artifact(artifact_type=cosign.BUNDLE, content=shop.theirs.sign(made.dumps()))
        referrers.attach(target, shop.image.manifest, artifact)
    assert "last verdict at T1 does not prove it" in shop.refused()


def test_another_key_signs_anew(shop: Shop) -> None:
    shop.push()
    shop.key, shop.public = shop.cosign.pair("other")
    assert shop.push().attached == 4
    shop.verify()


def test_a_matrix_that_changed_elsewhere_is_no_new_provenance(shop: Shop, tmp_path: Path) -> None:
    shop.push()
    root = tmp_path / "project"
    for path, content in provenance.inputs(PROJECT, PLAN).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content + (b"\n# more\n" if path == "matrix.yaml" else b""))
    assert shop.push(shop.evidence(Project(root / "matrix.yaml"))).attached == 0


def test_without_a_key_the_same_is_attached_unsigned(shop: Shop) -> None:
    shop.signed = False
    assert shop.push().attached == 4
    assert shop.cosign.times("attest-blob") == 0
    assert shop.push().attached == 0
    found = shop.verify()
    assert any("nobody's signature was asked for" in note for note in found.notes)
    shop.signed = True
    assert "there is one that nobody signed" in shop.refused()
    assert shop.push().attached == 4
    shop.verify()


def test_what_a_stranger_said_unsigned_does_not_take_the_place_of_ones_own(shop: Shop) -> None:
    shop.signed = False
    shop.push()
    forgotten(shop)
    assert shop.push().attached == 0, "it is the same, byte for byte"
    shop.rewrite(Predicate.PROVENANCE, lambda it: it["buildDefinition"]["resolvedDependencies"].clear(), signer=None)
    assert shop.push().attached == 1
    assert len(shop.of(Predicate.PROVENANCE)) == 2


def test_a_vex_document_is_attached(shop: Shop) -> None:
    shop.vex = json.dumps({"@context": "https://openvex.dev/ns/v0.2.0", "statements": []}).encode()
    shop.push()
    assert len(shop.of(Predicate.VEX)) == 1
    shop.verify()


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"@context": "https://example.org"}', b"\xff"])
def test_what_is_no_vex_document_is_refused(shop: Shop, content: bytes) -> None:
    shop.vex = content
    with pytest.raises(MatrixError, match="no OpenVEX document"):
        shop.evidence()


def test_statements_are_as_in_toto_has_them(shop: Shop) -> None:
    about = {one.statement.predicate_type: json.loads(one.statement.dumps()) for one in shop.evidence().attestations}
    assert set(about) == {Predicate.PROVENANCE, Predicate.BILL, Predicate.VERDICT, Predicate.SIGNATURE}
    for one in about.values():
        assert one["_type"] == "https://in-toto.io/Statement/v1"
        assert [subject["digest"] for subject in one["subject"]] == [{"sha256": shop.digest.removeprefix("sha256:")}]
    made = about[Predicate.PROVENANCE]["predicate"]["buildDefinition"]
    names = {one["name"] for one in made["resolvedDependencies"]}
    assert {wheel.filename for wheel in PLAN.lock.wheels} <= names
    assert all(len(one["digest"]["sha256"]) == 64 for one in made["resolvedDependencies"])
    assert made["internalParameters"]["torchyard"] == __version__
    verdict = about[Predicate.VERDICT]["predicate"]
    assert (verdict["result"], verdict["passedTests"], verdict["failedTests"]) == ("PASSED", ["run.import"], [])


def test_statements_are_the_same_each_time(shop: Shop) -> None:
    first, second = ([one.statement.dumps() for one in shop.evidence().attestations] for _ in range(2))
    assert first == second


# ----------------------------------------------------------------------------------------------------
# Faults


@pytest.mark.parametrize("why", ["no key", "wrong password", "no cosign", "cosign breaks"])
def test_what_cannot_be_signed_gets_no_tag(shop: Shop, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "no key":
        shop.key.unlink()
    elif why == "wrong password":
        monkeypatch.setenv("COSIGN_PASSWORD", "wrong")
    elif why == "no cosign":
        monkeypatch.setenv("PATH", "/nonexistent")
    else:
        monkeypatch.setattr(cosign, "_NO_ROOTS", "no JSON")
    with pytest.raises((ToolError, MatrixError)) as caught:
        shop.push()
    said = text_of(caught.value)
    assert {"no key": "no such key", "wrong password": "COSIGN_PASSWORD", "no cosign": "cosign is missing",
            "cosign breaks": "could not sign"}[why] in said  # fmt: skip
    assert PASSWORD not in said
    assert SECRET not in said
    assert not shop.server.tags.get(REPOSITORY)
    assert shop.digest in shop.server.manifests[REPOSITORY], "it is there by its digest"
    monkeypatch.undo()
    if why not in ("no key", "no cosign", "wrong password"):
        return
    received = shop.server.received
    if why == "no key":
        shop.signed = False
    else:
        shop.cosign = Cosign(shop.store.root / "again", monkeypatch)
    shop.push()
    assert shop.server.received - received < 1_000_000
    assert shop.server.tags[REPOSITORY]["1.0"] == shop.digest


@pytest.mark.parametrize("kind", ["begin", "manifest", "list", "read"])
def test_a_registry_that_fails_in_between_gets_no_tag(shop: Shop, kind: str) -> None:
    shop.server.lists_referrers = True
    shop.push()
    shop.server.tags.clear()
    for one in shop.of(Predicate.SIGNATURE):
        shop.drop(one)
    shop.server.fault(kind, *(403 for _ in range(8)))
    with pytest.raises(SourceError):
        shop.push()
    assert not shop.server.tags.get(REPOSITORY)
    shop.server._faults.clear()
    shop.push()
    shop.verify()


def test_an_answer_that_is_lost_is_no_second_document(shop: Shop) -> None:
    shop.server.fault("manifest", Fault(), Fault(lost=True), Fault(lost=True))
    shop.push()
    assert len(shop.of(Predicate.PROVENANCE)) == 1


def test_what_does_not_come_back_gets_no_tag(shop: Shop) -> None:
    """The registry takes everything, and lists nothing."""
    shop.server.lists_referrers = True
    empty = json.dumps({"schemaVersion": 2, "manifests": []}).encode()
    shop.server.fault("list", *(Fault(body=empty, headers={"Content-Length": str(len(empty))}) for _ in range(20)))
    with pytest.raises(SourceError, match="does not list it"):
        shop.push()
    assert not shop.server.tags.get(REPOSITORY)


# ----------------------------------------------------------------------------------------------------
# Lies


def test_another_key_is_refused(shop: Shop) -> None:
    shop.push()
    _, other = shop.cosign.pair("other")
    said = shop.refused(trust=Trust(key=str(other)))
    assert "no signature of the publisher's" in said
    assert "do not match threshold" in said


def test_a_copy_without_its_evidence_is_refused(shop: Shop) -> None:
    shop.push()
    for digest in [one for one in shop.server.manifests[REPOSITORY] if one != shop.digest]:
        shop.drop(digest)
    said = shop.refused()
    assert "the image has no signature" in said
    assert "it may be a copy" in said


def test_another_image_under_the_tag_is_refused(shop: Shop) -> None:
    shop.push()
    other = assembled(shop.store, {**PLAN.config.labels, "x": "y"})
    with push.opened(shop.name, Configuration()) as target:
        push.push(target, shop.store, other, Tags(moving=("1",)), progress=Silent())
        # With the first one's evidence beside it.
        for one in attestation.beside(target, shop.digest).statements:
            assert one.bundle is not None
            referrers.attach(target, other.manifest, Artifact(artifact_type=cosign.BUNDLE, content=one.bundle))
    said = shop.refused(name="1")
    assert "the image has no signature" in said
    assert f"it is about {shop.digest}, and not about {other.manifest.digest}" in said


def test_an_unproven_image_is_refused(shop: Shop) -> None:
    marked = gate.marked(shop.store, shop.image)
    with push.opened(shop.name, Configuration()) as target:
        push.push(target, shop.store, marked, Tags(moving=("x-unproven",)), progress=Silent())
    assert "marked as unproven" in shop.refused(name="x-unproven")


def test_a_layer_that_was_altered(shop: Shop) -> None:
    shop.push()
    layer = shop.image.layers[0].blob.digest
    content = shop.server.blobs[REPOSITORY][layer]
    shop.server.blobs[REPOSITORY][layer] = content[:-1] + bytes([content[-1] ^ 1])
    shop.verify()
    assert "a layer has been altered" in shop.refused(content=True)
    shop.server.blobs[REPOSITORY][layer] = content + b"x"
    assert "more than" in shop.refused(content=True)
    del shop.server.blobs[REPOSITORY][layer]
    assert "lacks layers of the image" in shop.refused()


def test_a_bill_that_was_altered(shop: Shop) -> None:
    shop.push()
    with push.opened(shop.name, Configuration()) as target:
        (copy,) = [one for one in referrers.referrers(target, shop.digest) if one.artifact_type == attestation.BILL]
        shop.drop(copy.digest)
        altered = shop.bill.replace(b"CycloneDX", b"CycloneDY")
        referrers.attach(target, shop.image.manifest, Artifact(artifact_type=attestation.BILL, content=altered))
    assert "the bill of materials was altered" in shop.refused()


def test_a_bill_that_lacks_something(shop: Shop) -> None:
    short = bill()
    lost = short["components"].pop(0)
    shop.bill = layout.canonical_json(short)
    shop.push()
    said = shop.refused()
    assert "lacks what the lock has" in said
    assert next(wheel.filename for wheel in PLAN.lock.wheels if wheel.sha256 == lost["hashes"][0]["content"]) in said


def test_a_bill_that_lists_other_packages_than_a_container_reported(shop: Shop) -> None:
    document, version = bill(), CELL.torch_local
    (torch,) = (one for one in document["components"] if one["name"] == "torch")
    torch["version"] = "0.0.1"
    document["components"].append(torch | {"name": "more", "hashes": []})
    shop.bill = layout.canonical_json(document)
    shop.push()
    said = shop.refused()
    assert "a container of the image reported other packages than its bill of materials lists" in said
    assert f"torch is {version}" in said
    assert "the bill says 0.0.1" in said
    assert "more 0.0.1 is in the bill, and not in the image" in said


def test_a_bill_that_lists_nothing_readable(shop: Shop) -> None:
    document = bill()
    for one in document["components"]:
        del one["name"]
    shop.bill = layout.canonical_json(document)
    shop.push()
    assert "not a bill of materials of ours" in shop.refused()


@pytest.mark.parametrize("kind", [Predicate.SIGNATURE, Predicate.PROVENANCE, Predicate.BILL, Predicate.VERDICT])
@pytest.mark.parametrize("how", ["altered", "removed", "unsigned"])
def test_each_statement_counts(shop: Shop, kind: str, how: str) -> None:
    shop.push()
    if how == "altered":
        shop.rewrite(kind, lambda predicate: predicate.update(x=1), signer=None)
        expected = "do not match threshold"
    else:
        (found,) = shop.of(kind)
        shop.drop(found)
        expected = "nothing of the kind lies beside it"
        if how == "unsigned":
            with push.opened(shop.name, Configuration()) as target:
                content = Statement(digest=shop.digest, predicate_type=kind, predicate={}).dumps()
                plain = Artifact(artifact_type="application/vnd.in-toto+json", content=content)
                referrers.attach(target, shop.image.manifest, plain)
            expected = "there is one that nobody signed"
    said = shop.refused()
    assert f"the image has no {verify._KINDS[kind]}" in said
    assert expected in said


def other_wheel(predicate: dict[str, Any]) -> None:
    predicate["buildDefinition"]["resolvedDependencies"][-1]["digest"]["sha256"] = "0" * 64


def other_input(predicate: dict[str, Any]) -> None:
    inputs = predicate["buildDefinition"]["externalParameters"]["inputs"]
    inputs["matrix.yaml"] = inputs["matrix.yaml"].replace("PyTorch with NumPy", "PyTorch without NumPy")


def no_cell(predicate: dict[str, Any]) -> None:
    predicate["buildDefinition"]["externalParameters"]["cell"] = "torch1.0-cpu"


def other_cell(predicate: dict[str, Any]) -> None:
    inputs = predicate["buildDefinition"]["externalParameters"]["inputs"]
    name, text = next((name, text) for name, text in inputs.items() if name.endswith("pylock.toml"))
    inputs[name] = text.replace("sha256", "sha257")


def climbing(predicate: dict[str, Any]) -> None:
    predicate["buildDefinition"]["externalParameters"]["inputs"]["images/../../evil.toml"] = "x"


def elsewhere(predicate: dict[str, Any]) -> None:
    predicate["buildDefinition"]["externalParameters"]["inputs"]["/etc/evil.toml"] = "x"


def huge(predicate: dict[str, Any]) -> None:
    predicate["buildDefinition"]["externalParameters"]["inputs"]["matrix.yaml"] = "#" * (provenance.INPUT_MAX + 1)


def empty(predicate: dict[str, Any]) -> None:
    predicate.clear()


def not_ours(predicate: dict[str, Any]) -> None:
    predicate["buildDefinition"]["buildType"] = "https://example.org/other"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (other_wheel, "lists other materials than its locks"),
        (other_input, "not of the inputs that it has"),
        (no_cell, "a cell that its matrix does not have"),
        (other_cell, "lock"),
        (climbing, "an input where none belongs"),
        (elsewhere, "an input where none belongs"),
        (huge, "bytes"),
        (empty, "it lacks something"),
        (not_ours, "a build of type 'https://example.org/other'"),
    ],
)
def test_a_provenance_that_its_signer_made_up(
    shop: Shop, change: Callable[[dict[str, Any]], None], expected: str, tmp_path: Path
) -> None:
    shop.push()
    shop.rewrite(Predicate.PROVENANCE, change, signer=shop.theirs)
    assert expected in shop.refused()
    assert not list(tmp_path.rglob("evil.toml"))


def other_torch(document: dict[str, Any]) -> None:
    document["report"]["environment"]["facts"]["torch"] = "2.12.0+cpu"


def other_package(document: dict[str, Any]) -> None:
    document["report"]["environment"]["facts"]["packages"]["numpy"] = "1.0"


def other_image(document: dict[str, Any]) -> None:
    document["report"]["subject"]["digest"] = "sha256:" + "1" * 64


def no_tier(document: dict[str, Any]) -> None:
    document["report"]["verdict"]["tiers"] = {}


def no_report(document: dict[str, Any]) -> None:
    del document["report"]


def green(document: dict[str, Any]) -> None:
    document["report"]["results"][0]["status"] = "fail"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (other_torch, "torch.__version__ is 2.12.0+cpu"),
        (other_package, "numpy is 1.0"),
        (other_image, "report is about another image"),
        (no_tier, "nobody validated the image at T1"),
        (no_report, "a verdict holds no report"),
        (green, "a verdict holds no report"),
    ],
)
def test_a_verdict_that_does_not_prove_the_image(
    shop: Shop, change: Callable[[dict[str, Any]], None], expected: str
) -> None:
    shop.push()
    shop.rewrite(Predicate.VERDICT, change, signer=shop.theirs)
    assert expected in shop.refused()


def test_labels_that_declare_something_else(shop: Shop) -> None:
    shop.image = assembled(shop.store, {**PLAN.config.labels, "torchyard.cuda": "12.8"})
    shop.validated()
    shop.push()
    said = shop.refused()
    assert "label torchyard.cuda is not what its inputs declare" in said


def test_a_tier_that_nobody_tried(shop: Shop) -> None:
    shop.push()
    assert "nobody validated the image at T2" in shop.refused(tiers=(1, 2))


def test_another_torchyard_made_it(shop: Shop) -> None:
    def older(predicate: dict[str, Any]) -> None:
        predicate["buildDefinition"]["internalParameters"] |= {"torchyard": "0.0.1", "plan": "0" * 64}

    shop.push()
    shop.rewrite(Predicate.PROVENANCE, older, signer=shop.theirs)
    assert "made by torchyard 0.0.1" in {one.what: one.detail for one in shop.verify().known}["provenance"]


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b'{"dsseEnvelope": 1}', b'{"dsseEnvelope": {"payloadType": "x", "payload": ""}}']
)
def test_what_strangers_attach_is_told_and_harmless(shop: Shop, content: bytes) -> None:
    shop.push()
    with push.opened(shop.name, Configuration()) as target:
        referrers.attach(target, shop.image.manifest, Artifact(artifact_type=cosign.BUNDLE, content=content))
        referrers.attach(target, shop.image.manifest, Artifact(artifact_type="application/x-other", content=content))
    assert len(shop.verify().notes) == 1


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("none", None, "there is no such image"),
        ("list", b'{"schemaVersion": 2, "manifests": []}', "a list of images"),
        ("text", b"hello", "no container image"),
        ("odd", b'{"config": 1, "layers": []}', "no container image"),
    ],
)
def test_what_is_no_image(shop: Shop, name: str, content: bytes | None, expected: str) -> None:
    if content is not None:
        shop.server.tag(REPOSITORY, name, content)
    assert expected in shop.refused(ImpossibleError, name=name)


def test_a_repository_is_no_image(shop: Shop) -> None:
    with pytest.raises(MatrixError, match="names no image"), verify.opened(shop.name, Configuration()):
        pass
