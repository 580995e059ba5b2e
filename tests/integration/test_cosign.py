"""What cosign itself says of our bundles, and that with a key it needs no network: the unit tests have a stand-in."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from builder import cosign
from builder.cosign import Signer, Trust
from builder.errors import CellFailedError, ToolError
from builder.statement import Predicate, Statement
from tests.integration.conftest import ROOT
from tests.support.registry_server import text_of

DIGEST = "sha256:" + "5d" * 32
KIND = Predicate.PROVENANCE
STATEMENT = Statement(digest=DIGEST, name="a-cell", predicate_type=KIND, predicate={"text": "é \u2028 <>&"})
PASSWORD = "canary-password"


@pytest.fixture(autouse=True)
def program(monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("cosign") is None:
        reason = "cosign 3 is not installed: .ci/unpack-unstable DIRECTORY cosign gets it on Debian"
        if os.environ.get("CI"):
            pytest.fail(f"needed in CI: {reason}", pytrace=False)
        pytest.skip(reason)
    monkeypatch.setenv("COSIGN_PASSWORD", PASSWORD)


def pair(directory: Path, name: str = "cosign") -> tuple[Signer, Trust]:
    subprocess.run(
        ["cosign", "generate-key-pair", "--output-key-prefix", name], cwd=directory, check=True, capture_output=True
    )
    return Signer(key=str(directory / f"{name}.key")), Trust(key=str(directory / f"{name}.pub"))


def refused(trust: Trust, bundle: bytes, *, digest: str = DIGEST, kind: str = KIND) -> str:
    with pytest.raises(CellFailedError, match="a signature does not hold") as caught:
        trust.check(bundle, digest=digest, predicate_type=kind)
    return caught.value.problems[0].why


def test_what_is_signed_is_the_statement_byte_for_byte(tmp_path: Path) -> None:
    signer, trust = pair(tmp_path)
    bundle = signer.sign(STATEMENT.dumps())
    assert cosign.payload(bundle, where="test") == STATEMENT.dumps()
    trust.check(bundle, digest=DIGEST, predicate_type=KIND)
    assert cosign.is_by(bundle, signer.public_key())
    assert json.loads(bundle)["mediaType"] == cosign.BUNDLE


def test_what_does_not_hold_is_refused(tmp_path: Path) -> None:
    signer, trust = pair(tmp_path)
    other, others = pair(tmp_path, "other")
    bundle = signer.sign(STATEMENT.dumps())
    assert not cosign.is_by(bundle, other.public_key())
    assert refused(others, bundle)
    assert "digest" in refused(trust, bundle, digest="sha256:" + "00" * 32)
    assert "predicate type" in refused(trust, bundle, kind=Predicate.VERDICT)
    altered = json.loads(bundle)
    content = STATEMENT.dumps().replace(b"a-cell", b"b-cell")
    altered["dsseEnvelope"]["payload"] = base64.b64encode(content).decode()
    assert refused(trust, json.dumps(altered).encode())
    for garbage in (b"", b"{}", b"[]", bundle[:-20]):
        assert refused(trust, garbage)


def test_whose_signature_it_is_can_be_told_without_a_public_key(tmp_path: Path) -> None:
    signer, _ = pair(tmp_path)
    other, _ = pair(tmp_path, "other")
    bundle = signer.sign(STATEMENT.dumps())
    altered = json.loads(bundle)
    altered["dsseEnvelope"]["payload"] = base64.b64encode(STATEMENT.dumps().replace(b"a-cell", b"b-cell")).decode()
    told = [
        whose.has_signed(content, digest=digest, predicate_type=kind)
        for whose, content, digest, kind in (
            (signer, bundle, DIGEST, KIND),
            (other, bundle, DIGEST, KIND),
            (Signer(), bundle, DIGEST, KIND),
            (signer, bundle, "sha256:" + "00" * 32, KIND),
            (signer, bundle, DIGEST, Predicate.VERDICT),
            (signer, json.dumps(altered).encode(), DIGEST, KIND),
            (signer, b"{}", DIGEST, KIND),
        )
    ]
    assert told == [True, *[False] * 6]


def test_a_wrong_password_is_said_and_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signer, _ = pair(tmp_path)
    monkeypatch.setenv("COSIGN_PASSWORD", "canary-wrong")
    for ask in (signer.public_key, lambda: signer.sign(STATEMENT.dumps())):
        with pytest.raises(ToolError) as caught:
            ask()
        said = text_of(caught.value)
        assert "COSIGN_PASSWORD" in said
        assert "canary" not in said


def test_with_a_key_nobody_is_asked(tmp_path: Path) -> None:
    """In a network namespace without any network, and without what an earlier run may have kept in the home."""
    if subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode != 0:
        reason = "network namespaces cannot be made here"
        if os.environ.get("CI"):
            pytest.fail(f"needed in CI: {reason}", pytrace=False)
        pytest.skip(reason)
    pair(tmp_path)
    code = (
        "import sys; from builder.cosign import Signer, Trust\n"
        f"bundle = Signer(key={str(tmp_path / 'cosign.key')!r}).sign({STATEMENT.dumps()!r})\n"
        f"Trust(key={str(tmp_path / 'cosign.pub')!r}).check(bundle, digest={DIGEST!r}, predicate_type={KIND!r})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "home")}
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
