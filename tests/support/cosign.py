"""A program that is called as cosign is and answers like it, with a signature that is none: fast, and always there.

What cosign itself does with what we make is for the integration tests.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

SECRET = "canary-secret"
PASSWORD = "canary-password"
_PROGRAM = """#!{python} -IS
import base64, hashlib, json, os, sys

asked = sys.argv[1]
options = dict(word[2:].split("=", 1) for word in sys.argv[2:] if word.startswith("--") and "=" in word)
flags = [word for word in sys.argv[2:] if word.startswith("--") and "=" not in word]
with open({log!r}, "a") as log:
    log.write(json.dumps([asked, *sys.argv[2:]]) + "\\n")

def fail(text):
    sys.exit(f"WARNING: something else\\nError: {{text}}\\nerror during command execution: {{text}}")

def pem(content):
    return f"-----BEGIN PUBLIC KEY-----\\n{{base64.b64encode(content).decode()}}\\n-----END PUBLIC KEY-----\\n"

def public(key):
    text = open(key).read()
    if text.startswith("private "):
        if os.environ.get("COSIGN_PASSWORD") != {password!r}:
            fail("reading key: decrypt: encrypted: decryption failed")
        return hashlib.sha256(text.encode()).digest()
    return base64.b64decode(text.splitlines()[1])

def signature(key, payload):
    return base64.b64encode(hashlib.sha256(key + payload).digest()).decode()

if asked == "public-key":
    print(pem(public(options["key"])), end="")
elif asked == "attest-blob":
    for needed in ("signing-config", "trusted-root"):
        json.load(open(options[needed]))
    assert flags == ["--yes"], flags
    key, payload = public(options["key"]), open(options["statement"], "rb").read()
    document = {{
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {{"publicKey": {{"hint": base64.b64encode(hashlib.sha256(key).digest()).decode()}}}},
        "dsseEnvelope": {{
            "payload": base64.b64encode(payload).decode(),
            "payloadType": "application/vnd.in-toto+json",
            # Like a real one, it differs each time.
            "signatures": [{{"sig": signature(key, payload), "nonce": os.urandom(8).hex()}}],
        }},
    }}
    open(options["bundle"], "w").write(json.dumps(document))
elif asked == "verify-blob-attestation":
    assert flags == ["--insecure-ignore-tlog"], flags
    envelope = json.load(open(options["bundle"]))["dsseEnvelope"]
    payload = base64.b64decode(envelope["payload"])
    if envelope["signatures"][0]["sig"] != signature(public(options["key"]), payload):
        fail("failed to verify signature: could not verify envelope: accepted signatures do not match threshold")
    statement = json.loads(payload)
    if options["digest"] not in [one["digest"]["sha256"] for one in statement["subject"]]:
        fail("failed to verify signature: provided artifact digest does not match any digest in statement")
    if statement["predicateType"] != options["type"]:
        fail("invalid predicate type")
else:
    fail("unknown command " + asked)
"""


class Cosign:
    """The stand-in on PATH, pairs of keys for it, and what it was asked."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self._log = directory / "asked.jsonl"
        programs = directory / "bin"
        programs.mkdir(parents=True)
        program = programs / "cosign"
        program.write_text(_PROGRAM.format(python=sys.executable, log=str(self._log), password=PASSWORD))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        monkeypatch.setenv("COSIGN_PASSWORD", PASSWORD)

    def pair(self, name: str = "cosign") -> tuple[Path, Path]:
        """Return a new private key and its public one."""
        private, public = self.directory / f"{name}.key", self.directory / f"{name}.pub"
        private.write_text(f"private {SECRET} {name}")
        before = len(self.asked)
        from builder.cosign import Signer

        public.write_text(Signer(key=str(private)).public_key())
        assert len(self.asked) == before + 1
        return private, public

    @property
    def asked(self) -> list[list[str]]:
        """The arguments of each call."""
        return [json.loads(line) for line in self._log.read_text().splitlines()] if self._log.exists() else []

    def times(self, command: str) -> int:
        """Return how often a command was called."""
        return sum(one[0] == command for one in self.asked)
