"""Signatures by cosign: it is given bytes and gives back a bundle, or judges one; it never speaks to a registry.

So log-ins stay with `builder.registry`, which resumes what breaks off, and with a key nothing leaves this machine: no
certificate, no transparency log, no time-stamp. What is signed is the statement itself, byte for byte, in the form in
which `cosign attest` would have written it; `cosign verify` and `cosign verify-attestation` accept what is made here.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from builder import program
from builder.errors import CellFailedError, MatrixError, ToolError
from builder.statement import MEDIA_TYPE, MOST_BYTES

BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
"""Media type of a signed statement."""
BUNDLE_MAX = 2 * MOST_BYTES
"""Bytes of a bundle that is read: a statement in base64, and its signature."""


# Without services: cosign would otherwise look up at which ones to ask for time-stamps and log entries.
_NO_SERVICES = json.dumps({
    "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json", "rekorTlogConfig": {}, "tsaConfig": {},
})  # fmt: skip
_NO_ROOTS = json.dumps({"mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1"})
_INSTALL = "install cosign 3: https://docs.sigstore.dev/cosign/system_config/installation/"
_KEY = "check the key, and COSIGN_PASSWORD, which opens it"
_SCHEME = re.compile(r"[a-z0-9+.-]+://", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Signer:
    """Who signs: the owner of a private key, or, without one, whoever the environment's identity token names."""

    key: str = ""
    """A file, or what cosign knows of keys elsewhere: `awskms://...`, `env://NAME`. Empty for keyless signing."""

    def sign(self, content: bytes) -> bytes:
        """Return a statement as a signed bundle; raises ToolError if cosign is missing or cannot sign."""
        with _place() as place:
            statement, bundle = place / "statement.json", place / "bundle.json"
            statement.write_bytes(content)
            offline = [f"--signing-config={_file(place, 'signing.json', _NO_SERVICES)}",
                       f"--trusted-root={_file(place, 'root.json', _NO_ROOTS)}"] if self.key else []  # fmt: skip
            _cosign(
                ["attest-blob", "--yes", *offline, *_key(self.key), f"--statement={statement}", f"--bundle={bundle}",
                 # What is signed is the statement; the program wants a name nevertheless.
                 statement.name],
                purpose="sign what is said of the image",
                tries=(
                    (_KEY, "run again: nothing is sent twice")
                    if self.key
                    else ("keyless signing needs an identity token and the network: give a --key",)
                ),
            )  # fmt: skip
            return bundle.read_bytes()

    def public_key(self) -> str:
        """Return the public key in PEM, by which bundles are recognised; empty for keyless signing."""
        return self._public_key

    def has_signed(self, bundle: bytes, *, digest: str, predicate_type: str) -> bool:
        """Tell whether a bundle about the image with `digest` bears a signature of the key's; never without a key."""
        if not self.key or not is_by(bundle, self.public_key()):
            return False
        with _place() as place:
            trust = Trust(key=str(place / "public.pem"))
            Path(trust.key).write_text(self.public_key())
            try:
                trust.check(bundle, digest=digest, predicate_type=predicate_type)
            except CellFailedError:
                return False
        return True

    @functools.cached_property
    def _public_key(self) -> str:
        if not self.key:
            return ""
        return _cosign(
            ["public-key", *_key(self.key)],
            purpose="read the signing key",
            tries=(_KEY, "cosign generate-key-pair makes a new one"),
        )


@dataclass(frozen=True, kw_only=True)
class Trust:
    """Whose signatures count: those of a key, or of a certificate's identity as its issuer knows it."""

    key: str = ""
    """A file with a public key, or what cosign knows of keys elsewhere."""
    identity: str = ""
    issuer: str = ""

    def __post_init__(self) -> None:
        assert bool(self.key) is not bool(self.identity and self.issuer)

    def check(self, bundle: bytes, *, digest: str, predicate_type: str) -> None:
        """Judge a bundle; raises CellFailedError, in cosign's words, if it is not signed by whom we trust.

        It must be about the image with `digest`, and of a type.
        """
        with _place() as place:
            path = place / "bundle.json"
            path.write_bytes(bundle)
            whose = (
                [*_key(self.key), "--insecure-ignore-tlog", f"--trusted-root={_file(place, 'root.json', _NO_ROOTS)}"]
                if self.key
                else [f"--certificate-identity={self.identity}", f"--certificate-oidc-issuer={self.issuer}"]
            )
            try:
                _cosign(
                    ["verify-blob-attestation", f"--bundle={path}", *whose, "--digestAlg=sha256",
                     f"--digest={digest.removeprefix('sha256:')}", f"--type={predicate_type}"],
                    purpose="verify a signature",
                )  # fmt: skip
            except ToolError as error:
                said = re.search(r"^Error: (.*)$", error.problems[0].why, re.MULTILINE)
                raise CellFailedError(
                    "a signature does not hold",
                    where=digest,
                    why=said[1] if said else error.problems[0].why,
                    tries=("check that this is the publisher's public key", "do not use the image if it is"),
                ) from error


def require() -> None:
    """Raise ToolError, saying how to get it, if cosign is not there."""
    _program()


def payload(bundle: bytes, *, where: str) -> bytes:
    """Return the statement in a bundle, signed by whomsoever; raises MatrixError if it is none."""
    try:
        envelope = json.loads(bundle)["dsseEnvelope"]
        if envelope["payloadType"] != MEDIA_TYPE:
            raise MatrixError("a signature is of something else than a statement", where=where)
        return base64.b64decode(envelope["payload"], validate=True)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise MatrixError("a signature is not in the form of one", where=where) from None


def is_by(bundle: bytes, public_key: str) -> bool:
    """Tell whether a bundle says that it was signed with a key, given in PEM; only `Trust.check` knows."""
    body = "".join(line for line in public_key.splitlines() if not line.startswith("-----"))
    try:
        expected = base64.b64encode(hashlib.sha256(base64.b64decode(body)).digest()).decode()
        hint = json.loads(bundle)["verificationMaterial"]["publicKey"]["hint"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    return bool(hint == expected)


@contextmanager
def _place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="torchyard-cosign-") as name:
        yield Path(name)


def _file(place: Path, name: str, content: str) -> Path:
    path = place / name
    path.write_text(content)
    return path


def _key(key: str) -> list[str]:
    """Return the option that names a key; raises MatrixError if it is a file and not there."""
    if not key:
        return []
    if not _SCHEME.match(key) and not Path(key).is_file():
        raise MatrixError("there is no such key", where=key, tries=("cosign generate-key-pair makes a pair",))
    return [f"--key={key if _SCHEME.match(key) else os.path.abspath(key)}"]  # noqa: PTH100 (of a str)


def _program() -> str:
    return program.find("cosign", package="cosign", purpose="sign and to verify", tries=(_INSTALL,))


def _cosign(arguments: Sequence[str], *, purpose: str, tries: tuple[str, ...] = ()) -> str:
    return program.run([_program(), *arguments], purpose=purpose, tries=tries)
