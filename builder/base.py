"""The bootstrap base: Debian packages by hash → one reproducible root file system."""

from __future__ import annotations

import contextlib
import email.utils
import fcntl
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import tarfile
import tempfile
import tomllib
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from builder import layout
from builder.errors import CellFailedError, LockError, Problem, SourceError, ToolError
from builder.layout import Descriptor, Entry, Kind
from builder.store import Store

SCHEMA = 1

# Raise it with every change of what `make` puts into an image: it is part of the cache's key.
RECIPE = 1

USER, UID, GID = "torch", 1000, 0
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENV = (f"PATH={PATH}", "LANG=C.UTF-8")

Progress = Callable[[str, int, int], None]
"""Called with what was just done, how much is done and how much there is (`fetch`: bytes, `make`: steps)."""

_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_SUITE = re.compile(r"[a-z][a-z0-9-]*")
_VERSION = re.compile(r"(?:[0-9]+:)?[0-9][A-Za-z0-9.+~-]*")
_FILENAME = re.compile(r"pool/(?:[A-Za-z0-9][A-Za-z0-9+.~_-]*/)+[A-Za-z0-9][A-Za-z0-9+.~_%-]*\.deb")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ARCHITECTURES = ("amd64", "arm64")

_RELOCK = "torchyard lock --base makes a new lock from what the mirror has now"


# ----------------------------------------------------------------------------------------------------
# The lock


@dataclass(frozen=True, kw_only=True)
class Deb:
    """One Debian package file: `filename` is its path in the archive's pool, `size` is in bytes."""

    name: str
    version: str
    architecture: str
    filename: str
    sha256: str
    size: int


@dataclass(frozen=True, kw_only=True)
class BaseLock:
    """Everything a base is made from: `packages` as people asked for them, `debs` as apt resolved them.

    `epoch` (seconds) dates every file of the image. It is the newest `Date:` of the signed Release files that
    the packages were resolved from: an input like the packages themselves, and newer than any of them.
    """

    suite: str
    architecture: str
    packages: tuple[str, ...]
    epoch: int
    debs: tuple[Deb, ...]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the lock's content, whatever its spelling."""
        return hashlib.sha256(layout.canonical_json({"schema": SCHEMA, **_content(self)})).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all packages together."""
        return sum(deb.size for deb in self.debs)

    @property
    def python(self) -> str | None:
        """The minor version of the `python3` package ("3.11"), or None where it is not among the packages."""
        for deb in self.debs:
            if deb.name == "python3":
                return ".".join(deb.version.split(":")[-1].split(".")[:2])
        return None


def _content(lock: BaseLock) -> dict[str, Any]:
    return {
        "suite": lock.suite,
        "architecture": lock.architecture,
        "packages": list(lock.packages),
        "epoch": lock.epoch,
        "deb": [
            {"name": deb.name, "version": deb.version, "architecture": deb.architecture,
             "filename": deb.filename, "sha256": deb.sha256, "size": deb.size}
            for deb in lock.debs
        ],
    }


def dumps(lock: BaseLock) -> str:
    """Return `lock` as TOML, closed by a digest over its content."""
    content = _content(lock)
    debs = content.pop("deb")
    document = {"schema": SCHEMA, "digest": f"sha256:{lock.digest}", **content, "deb": debs}
    head = "# Made by `torchyard lock --base`. It is checked against its own digest: do not edit.\n"
    return head + tomli_w.dumps(document)


class _Reader:
    """Takes fields out of a parsed lock and gathers every problem with them, so that all are told at once."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.problems: list[Problem] = []

    def problem(self, field: str, what: str, why: str = "") -> None:
        self.problems.append(
            Problem(what=f"{field}: {what}", where=self.where, why=why,
                    tries=("restore the file from version control", _RELOCK))
        )

    def text(self, table: Mapping[str, Any], key: str, pattern: re.Pattern[str], *, at: str = "") -> str:
        value = table.get(key)
        if not isinstance(value, str) or not pattern.fullmatch(value):
            self.problem(f"{at}{key}", "missing" if value is None else f"not valid: {value!r}")
            return ""
        return value

    def number(self, table: Mapping[str, Any], key: str, *, at: str = "") -> int:
        value = table.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            self.problem(f"{at}{key}", "missing" if value is None else f"not a positive number: {value!r}")
            return 0
        return value

    def only(self, table: Mapping[str, Any], known: Iterable[str], *, at: str = "") -> None:
        for key in sorted(set(table) - set(known)):
            self.problem(f"{at}{key}", "not a field of this schema")

    def stop_if_any(self) -> None:
        if self.problems:
            raise LockError(problems=tuple(self.problems))


def loads(text: str, *, where: str) -> BaseLock:
    """Read a lock; raises LockError, naming `where` and each bad field, if it is damaged or edited."""
    read = _Reader(where)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        read.problem("syntax", "not a TOML document, or cut off", why=str(error))
        read.stop_if_any()
        raise
    if document.get("schema") != SCHEMA:
        read.problem(
            "schema",
            "missing" if "schema" not in document else f"unknown: {document['schema']!r}",
            why=f"this version of torchyard reads schema {SCHEMA}",
        )
        read.stop_if_any()
    lock = _read_content(document, read)
    read.stop_if_any()
    if document["digest"] != f"sha256:{lock.digest}":
        read.problem(
            "digest", "the content is not what was locked: the file was edited, or damaged",
            why=f"it says {document['digest']}, its content has sha256:{lock.digest}",
        )
        read.stop_if_any()
    return lock


def _read_content(document: Mapping[str, Any], read: _Reader) -> BaseLock:
    read.only(document, ("schema", "digest", "suite", "architecture", "packages", "epoch", "deb"))
    read.text(document, "digest", re.compile(r"sha256:[0-9a-f]{64}"))
    suite = read.text(document, "suite", _SUITE)
    architecture = read.text(document, "architecture", re.compile("|".join(_ARCHITECTURES)))
    epoch = read.number(document, "epoch")
    packages = document.get("packages")
    if not isinstance(packages, list) or not packages:
        read.problem("packages", "missing, or not a list of names")
        packages = []
    for n, name in enumerate(packages):
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            read.problem(f"packages[{n}]", f"not a package name: {name!r}")
    tables = document.get("deb")
    if not isinstance(tables, list) or not tables:
        read.problem("deb", "missing, or not a list of tables")
        tables = []
    debs = []
    for n, table in enumerate(tables):
        at = f"deb[{n}]."
        if not isinstance(table, dict):
            read.problem(at.rstrip("."), "not a table")
            continue
        read.only(table, ("name", "version", "architecture", "filename", "sha256", "size"), at=at)
        debs.append(
            Deb(
                name=read.text(table, "name", _NAME, at=at),
                version=read.text(table, "version", _VERSION, at=at),
                architecture=read.text(table, "architecture", re.compile(f"all|{architecture}"), at=at),
                filename=read.text(table, "filename", _FILENAME, at=at),
                sha256=read.text(table, "sha256", _SHA256, at=at),
                size=read.number(table, "size", at=at),
            )
        )
    for field in ("name", "filename", "sha256"):
        seen: dict[str, int] = {}
        for n, deb in enumerate(debs):
            value = getattr(deb, field)
            if value and value in seen:
                read.problem(f"deb[{n}].{field}", f"{value} is there twice, first in deb[{seen[value]}]")
            seen.setdefault(value, n)
    for name in sorted({name for name in packages if isinstance(name, str)} - {deb.name for deb in debs}):
        read.problem("packages", f"{name} was asked for and is not among the packages locked")
    return BaseLock(
        suite=suite, architecture=architecture, epoch=epoch, debs=tuple(debs),
        packages=tuple(name for name in packages if isinstance(name, str)),
    )


# ----------------------------------------------------------------------------------------------------
# Running other programs


def _tool(name: str, *, package: str, purpose: str) -> str:
    """Return where the program `name` is; raises ToolError, saying which package has it, if it is missing."""
    # Debian leaves the sbin directories out of an ordinary user's PATH.
    path = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if path is None:
        raise ToolError(
            f"the program {name} is missing", why=f"torchyard needs it to {purpose}",
            tries=(f"apt-get install {package}",
                   "or use a base of kind `image` (any registry image, by digest)"),
        )
    return path


def _tail(text: str, *, lines: int = 8) -> str:
    """Return the last lines of what a program said, without progress noise and blank ones."""
    said = [line.rstrip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return "\n".join(said[-lines:])


def _run(
    argv: Sequence[str | Path],
    *,
    purpose: str,
    env: Mapping[str, str] | None = None,
    inherit: tuple[int, ...] = (),
    tries: tuple[str, ...] = (),
    error: type[ToolError | SourceError] = ToolError,
) -> str:
    """Run a program to its end and return its output; raises `error` with its last lines if it fails.

    Interrupted, it ends the program and all it started first: a group of its own makes them reachable.
    """
    with subprocess.Popen(
        [os.fspath(part) for part in argv],
        env=dict(env) if env is not None else None,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors="replace", umask=0o022, process_group=0, pass_fds=inherit,
    ) as process:
        try:
            said, complained = process.communicate()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            raise
    if process.returncode != 0:
        raise error(
            f"could not {purpose}: {Path(argv[0]).name} ended with status {process.returncode}",
            why=_tail(complained + said) or "it said nothing", tries=tries,
        )
    return said


# ----------------------------------------------------------------------------------------------------
# apt, with a state of its own


@dataclass(frozen=True, kw_only=True)
class Mirrors:
    """Where this machine's own apt finds Debian's archive and its security archive."""

    archive: str
    security: str


_PRINTED_URI = re.compile(r"^'(?P<site>[^']+)/dists/(?P<suite>[^']+)/(?:In)?Release' ", re.MULTILINE)
_SECURITY_SUITE = re.compile(r".+(?:-security|/updates)")
_OTHER_SUITE = re.compile(r".+-(?:updates|backports|backports-sloppy|proposed-updates|debug)")


def mirror_candidates(printed: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Read `apt-get update --print-uris`: the sites that may be the archive and the security archive.

    apt itself has parsed its sources then, in either format, with comments and disabled entries left out. A
    site is only a candidate: that it is Debian's is proved later, by the signature on what it serves. A site
    that serves a suite together with its updates comes first, because few third-party ones do.
    """
    sites: dict[str, set[str]] = {}
    for match in _PRINTED_URI.finditer(printed):
        sites.setdefault(match["site"], set()).add(match["suite"])
    security = [site for site, suites in sites.items() if any(map(_SECURITY_SUITE.fullmatch, suites))]
    archive = [
        site for site, suites in sites.items()
        if any(not _SECURITY_SUITE.fullmatch(suite) and not _OTHER_SUITE.fullmatch(suite) for suite in suites)
    ]
    archive.sort(key=lambda site: not any(_OTHER_SUITE.fullmatch(suite) for suite in sites[site]))
    return tuple(archive), tuple(security)


class _Apt:
    """apt with a private state under `directory`: what the host installed or fetched is not read nor changed.

    Of the host's configuration only `Acquire` is taken over (mirrors' proxies, certificates, retries). The
    rest stays out: hooks that notify desktops, pins for third-party packages, recommendations.
    """

    def __init__(self, directory: Path, *, architecture: str) -> None:
        self.directory = directory
        for name in ("state/lists/partial", "cache/archives/partial", "empty"):
            (directory / name).mkdir(parents=True)
        (directory / "status").touch()
        self.sources = directory / "sources.list"
        self.sources.touch()
        self._environment = dict(os.environ) | {"LC_ALL": "C.UTF-8"}
        self._tries = ("check the network, and the mirrors in this machine's apt sources",)
        state = {
            "Dir::State": f"{directory}/state/",
            "Dir::State::status": f"{directory}/status",
            "Dir::Cache": f"{directory}/cache/",
        }
        apt_get = _tool("apt-get", package="apt", purpose="resolve and fetch Debian packages")
        self.printed_sources = _run(
            [apt_get, "update", "--print-uris", "-o", "Debug::NoLocking=true",
             *(part for key, value in state.items() for part in ("-o", f"{key}={value}"))],
            purpose="read this machine's apt sources", env=self._environment,
        )
        acquire = _run(
            ["apt-config", "dump", "--no-empty", "--format", '%F "%v";%n', "Acquire"],
            purpose="read this machine's apt configuration", env=self._environment,
        )
        # Preferences: with `usrmerge` the base would grow by the tools that convert an old file system.
        (directory / "preferences").write_text("Package: usrmerge\nPin: release *\nPin-Priority: -1\n")
        settings = state | {
            "Dir::Etc::main": "/dev/null",
            "Dir::Etc::parts": f"{directory}/empty",
            "Dir::Etc::sourcelist": str(self.sources),
            "Dir::Etc::sourceparts": f"{directory}/empty",
            "Dir::Etc::preferences": f"{directory}/preferences",
            "Dir::Etc::preferencesparts": f"{directory}/empty",
            "APT::Architecture": architecture,
            "APT::Architectures": architecture,
            "APT::Install-Recommends": "false",
            "APT::Install-Suggests": "false",
            # apt's own unprivileged user cannot enter a directory that is the caller's alone.
            "APT::Sandbox::User": "root",
        }
        config = directory / "apt.conf"
        config.write_text(
            acquire
            + "#clear Acquire::Languages;\n#clear APT::Architectures;\nAcquire::Languages none;\n"
            + "".join(f'{key} "{value}";\n' for key, value in settings.items())
        )
        self._environment["APT_CONFIG"] = str(config)

    def run(self, *argv: str, purpose: str, error: type[ToolError | SourceError] = ToolError) -> str:
        """Run one of apt's programs with the private state."""
        return _run(
            argv, purpose=purpose, env=self._environment, error=error,
            tries=self._tries if error is SourceError else (),
        )

    def download(self, uris: Mapping[str, Path]) -> str:
        """Fetch each address into its file through apt's own transports; returns what apt said.

        Hashes are not handed over: the store checks them, once, for every source. Fetching goes on after a
        failure; the caller sees by the files what is missing.
        """
        helper = self.run(
            "apt-config", "shell", "BIN", "Dir::Bin::apt-helper/f", purpose="find apt's download helper",
        )
        found = re.search(r"BIN='([^']+)'", helper)
        program = found[1] if found else "/usr/lib/apt/apt-helper"
        triples = [part for uri, path in uris.items() for part in (uri, str(path), "")]
        done = subprocess.run(
            [program, "download-file", *triples],
            env=self._environment,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
        )
        return done.stderr + done.stdout

    def mirrors(self, suite: str, *, keyring: Path) -> Mirrors:
        """Return the first of the configured sites that serve `suite` under Debian's own signature.

        Afterwards the private state holds the package lists of the suite, its updates and security updates.
        """
        archive, security = mirror_candidates(self.printed_sources)
        said = ""
        for one in archive:
            for other in security:
                served = ((one, suite), (one, f"{suite}-updates"), (other, f"{suite}-security"))
                self.sources.write_text(
                    "".join(f"deb [signed-by={keyring}] {site} {name} main\n" for site, name in served)
                )
                try:
                    self.run(
                        "apt-get", "update", "--error-on=any", purpose=f"read the lists of {suite}",
                        error=SourceError,
                    )
                except SourceError as error:
                    said = error.problems[0].why
                    continue
                return Mirrors(archive=one, security=other)
        tries = (
            "check the network, and that the name of the suite is right",
            "let this machine's apt sources name Debian's archive and its security archive",
        )
        if not archive or not security:
            raise SourceError(
                f"this machine's apt sources do not name Debian's {'security ' if archive else ''}archive",
                why="the bootstrap base takes its mirrors from there", tries=tries,
            )
        raise SourceError(
            f"no mirror in this machine's apt sources serves {suite} with its updates and security updates",
            why=said, tries=tries,
        )


def _keyring() -> Path:
    path = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    if not path.exists():
        raise ToolError(
            "Debian's archive keys are missing", where=str(path),
            why="without them nothing a mirror serves can be trusted",
            tries=("apt-get install debian-archive-keyring",),
        )
    return path


_INSTALL = re.compile(
    r"^Inst (?P<name>\S+) \((?P<version>\S+) .*\[(?P<architecture>[a-z0-9]+)\]\)", re.MULTILINE,
)


def parse_stanzas(text: str) -> Iterator[dict[str, str]]:
    """Yield the stanzas of a Debian control file; continued lines are left out."""
    for paragraph in re.split(r"\n(?:[ \t]*\n)+", text):
        stanza = {}
        for line in paragraph.splitlines():
            key, colon, value = line.partition(":")
            if colon and not line[0].isspace():
                stanza[key] = value.strip()
        if stanza:
            yield stanza


def lock(
    *, suite: str, architecture: str, packages: Iterable[str], previous: BaseLock | None = None,
) -> BaseLock:
    """Resolve what a minimal Debian with apt and `packages` consists of now, with updates and security fixes.

    Nothing is downloaded but the signed package lists. Where the packages come out as in `previous`, that
    lock is returned as it was: mirrors are re-signed several times a day, and a new date alone is no reason
    for a new image. Raises SourceError if no mirror serves the suite, ToolError if apt cannot resolve it.
    """
    asked = tuple(sorted(set(packages)))
    for value, pattern, what in (
        (suite, _SUITE, "suite"), *((name, _NAME, "package name") for name in asked),
    ):
        if not pattern.fullmatch(value):
            raise LockError(f"not a {what}: {value!r}", tries=("correct it in matrix.yaml",))
    if architecture not in _ARCHITECTURES:
        raise LockError(
            f"no base for {architecture!r}", tries=(f"one of: {', '.join(_ARCHITECTURES)}",),
        )
    with tempfile.TemporaryDirectory(prefix="torchyard-apt-") as directory:
        apt = _Apt(Path(directory), architecture=architecture)
        apt.mirrors(suite, keyring=_keyring())
        plan = apt.run(
            "apt-get", "--simulate", "--quiet=2", "install", "?essential", "apt", *asked,
            purpose=f"resolve the packages of {suite}",
        )
        chosen = {match["name"]: match for match in _INSTALL.finditer(plan)}
        shown = apt.run(
            "apt-cache", "show",
            *(f"{name}:{match['architecture']}={match['version']}".replace(":all=", "=")
              for name, match in chosen.items()),
            purpose=f"read the packages of {suite}",
        )
        debs = {
            stanza["Package"]: Deb(
                name=stanza["Package"], version=stanza["Version"], architecture=stanza["Architecture"],
                filename=stanza["Filename"], sha256=stanza["SHA256"], size=int(stanza["Size"]),
            )
            for stanza in parse_stanzas(shown)
            if stanza["Version"] == chosen[stanza["Package"]]["version"]
        }
        dates = [
            int(email.utils.parsedate_to_datetime(stanza["Date"]).timestamp())
            for path in (apt.directory / "state/lists").glob("*Release")
            for stanza in parse_stanzas(path.read_text())
            if "Date" in stanza
        ]
    if lost := sorted(set(chosen) - set(debs)):
        raise ToolError(
            f"apt chose packages it then could not describe: {', '.join(lost)}",
            tries=("run it again: the mirror may have been updated meanwhile",),
        )
    made = BaseLock(
        suite=suite, architecture=architecture, packages=asked, epoch=max(dates),
        debs=tuple(debs[name] for name in sorted(debs)),
    )
    if previous is not None and replace(previous, epoch=made.epoch) == made:
        return previous
    return made


def fetch(lock: BaseLock, store: Store, progress: Progress | None = None) -> None:
    """Bring every package of `lock` into the store, by its hash; those already there cost nothing.

    Raises HashMismatchError if a mirror serves other bytes, SourceError, naming them, if some cannot be had.
    """
    missing = [deb for deb in lock.debs if not store.has(deb.sha256, size=deb.size)]
    done = lock.size - sum(deb.size for deb in missing)
    if not missing:
        return
    with store.scratch(f"fetch-{lock.digest}") as scratch:
        apt = _Apt(scratch / "apt", architecture=lock.architecture)
        archives, securities = mirror_candidates(apt.printed_sources)
        lost: list[Deb] = []
        said = ""
        # A few at a time: apt opens one connection a host and pipelines; a batch is what a kill can lose.
        for batch in _batches(missing, size_bytes=16 << 20):
            left = batch
            for addresses in _addresses(archives, securities):
                paths = {deb: scratch / f"{deb.sha256}.deb" for deb in left}
                said = apt.download({addresses(deb.filename): path for deb, path in paths.items()}) or said
                for deb, path in paths.items():
                    if path.exists():
                        _enter(store, deb, path)
                        done += deb.size
                        if progress:
                            progress(f"{deb.name} {deb.version}", done, lock.size)
                left = [deb for deb in left if not store.has(deb.sha256)]
                if not left:
                    break
            lost += left
    if lost:
        raise SourceError(
            f"{len(lost)} of {len(lock.debs)} packages could not be fetched: "
            + ", ".join(f"{deb.name} {deb.version}" for deb in lost[:5]) + (", …" if len(lost) > 5 else ""),
            where=f"base {lock.suite}-{lock.architecture}",
            why=_tail(said, lines=4) or "this machine's apt sources name no Debian mirror",
            tries=(
                "if the network or the mirror is at fault, run it again: what was fetched is kept",
                f"if the mirror no longer has these versions, they were superseded: {_RELOCK}",
            ),
        )


def _batches(debs: Sequence[Deb], *, size_bytes: int) -> Iterator[list[Deb]]:
    batch: list[Deb] = []
    for deb in debs:
        batch.append(deb)
        if sum(one.size for one in batch) >= size_bytes:
            yield batch
            batch = []
    if batch:
        yield batch


def _addresses(archives: Sequence[str], securities: Sequence[str]) -> Iterator[Callable[[str], str]]:
    """Yield, in the order to try them, functions from a pool path to an address.

    Security updates live under `pool/updates` of their own archive
    and move to the main one at a point release.
    """

    def direct(archive: str, security: str) -> Callable[[str], str]:
        return lambda name: f"{security if name.startswith('pool/updates/') else archive}/{_quoted(name)}"

    def moved(archive: str) -> Callable[[str], str]:
        return lambda name: f"{archive}/{_quoted(name.replace('pool/updates/', 'pool/', 1))}"

    for archive in archives:
        for security in securities or archives:
            yield direct(archive, security)
        yield moved(archive)


def _quoted(name: str) -> str:
    return urllib.parse.quote(name, safe="/+~%")


def _enter(store: Store, deb: Deb, path: Path) -> None:
    with store.writer(deb.sha256, deb.filename.rpartition("/")[2]) as writer:
        writer.restart()
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                writer.write(chunk)
        writer.commit()
    path.unlink()


# ----------------------------------------------------------------------------------------------------
# From packages to a file system, offline


@dataclass(frozen=True, kw_only=True)
class BaseImage:
    """A base as an OCI layout: `digest` names its manifest, `epoch` dates its files."""

    layout: Path
    digest: str
    config_digest: str
    layer: Descriptor
    diff_id: str
    architecture: str
    epoch: int
    env: tuple[str, ...] = ENV
    user: str = USER
    uid: int = UID
    gid: int = GID


def make(lock: BaseLock, store: Store, progress: Progress | None = None) -> BaseImage:
    """Make the base of `lock` from packages in the store, without network; a second call returns the first's.

    Raises ToolError if mmdebstrap is missing or fails, or if this machine cannot run the architecture's
    programs; SourceError if packages were not fetched.
    """
    key = hashlib.sha256(layout.canonical_json({"lock": lock.digest, "recipe": RECIPE})).hexdigest()
    directory = store.root / "layouts" / f"base-{lock.suite}-{lock.architecture}-{key[:16]}"
    image = layout.read(directory)
    if image is None:
        tell = progress or (lambda *_: None)
        name = f"base-{key[:16]}"
        with _outlived(store, f"bootstrap-{name}") as descriptor, store.scratch(name) as scratch:
            # Whoever held the lock before may have made it.
            image = layout.read(directory)
            if image is None:
                image = _make(lock, store, scratch, tell, descriptor=descriptor)
                layout.write(directory, store, image, tag=f"{lock.suite}-{lock.architecture}")
    for blob in image.blobs:
        if not store.has(blob.sha256, size=blob.size):
            store.path(blob.sha256).hardlink_to(directory / "blobs" / "sha256" / blob.sha256)
    (layer,) = image.layers
    return BaseImage(
        layout=directory, digest=image.manifest.digest, config_digest=image.config.digest, layer=layer.blob,
        diff_id=layer.diff_id, architecture=lock.architecture, epoch=lock.epoch,
    )


@contextlib.contextmanager
def _outlived(store: Store, name: str) -> Iterator[int]:
    """Hold a lock that processes which inherit its descriptor hold as well.

    After a kill -9 of torchyard alone its programs may work on, and whoever cleared their directory meanwhile
    would find files coming back. So the next run waits until the last of them has ended.
    """
    with (store.root / "locks" / name).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _make(
    lock: BaseLock, store: Store, scratch: Path, tell: Progress, *, descriptor: int,
) -> layout.Image:
    _require_architecture(lock.architecture)
    program = _tool("mmdebstrap", package="mmdebstrap", purpose="make a base from Debian packages")
    if lost := [deb for deb in lock.debs if not store.has(deb.sha256, size=deb.size)]:
        raise SourceError(
            f"{len(lost)} packages of the base are not in the store: {lost[0].name} {lost[0].version}, …",
            where=f"base {lock.suite}-{lock.architecture}", tries=("torchyard fetch brings them",),
        )
    with _repository(lock, store, scratch) as repository:
        tell("package index", 1, 4)
        raw = scratch / "raw.tar"
        _bootstrap(program, lock, repository, scratch, raw, descriptor=descriptor)
    tell("mmdebstrap", 2, 4)
    with raw.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        found = _entries(tar, file.fileno())
        _require_locked(lock, found)
        entries = canonical(found, suite=lock.suite, epoch=lock.epoch)
        layer = layout.gzip_layer(store, layout.tar_stream(entries), scratch=scratch)
    tell("layer", 3, 4)
    made_by = f"torchyard base, recipe {RECIPE}, lock sha256:{lock.digest}"
    image = layout.assemble(
        store, architecture=lock.architecture, epoch=lock.epoch, layers=(layer,),
        config={"Env": list(ENV), "Cmd": ["/bin/bash"]},
        history=(layout.History(created_by=made_by),),
    )
    tell("image", 4, 4)
    return image


def _require_architecture(architecture: str) -> None:
    native = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    if architecture == native:
        return
    machine = {"amd64": "x86_64", "arm64": "aarch64"}[architecture]
    handler = Path(f"/proc/sys/fs/binfmt_misc/qemu-{machine}")
    with contextlib.suppress(OSError):
        if handler.read_text().startswith("enabled"):
            return
    raise ToolError(
        f"this machine cannot make a base for {architecture}",
        why=f"it is {native}, and packages' set-up scripts must run; no emulator is registered ({handler})",
        tries=(f"make it on a machine that is {architecture}",
               "apt-get install qemu-user-static binfmt-support"),
    )


@contextlib.contextmanager
def _repository(lock: BaseLock, store: Store, scratch: Path) -> Iterator[Path]:
    """Yield a flat apt repository of exactly the locked packages."""
    with contextlib.ExitStack() as stack:
        directory = scratch / "repository"
        names = {f"{deb.sha256}.deb": deb.sha256 for deb in lock.debs}
        if os.geteuid() == 0:
            store.link(directory, names)
        else:
            # Without root mmdebstrap works as another user, who may not enter our store: lend it a copy.
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="torchyard-debs-")))
            directory.chmod(0o755)
            for name, sha256 in names.items():
                shutil.copyfile(store.path(sha256), directory / name)
                (directory / name).chmod(0o644)
        with ThreadPoolExecutor() as pool:
            stanzas = list(pool.map(lambda deb: _stanza(deb, directory / f"{deb.sha256}.deb"), lock.debs))
        index = "\n".join(stanzas).encode()
        (directory / "Packages").write_bytes(index)
        (directory / "Release").write_text(
            f"Origin: torchyard\nSuite: {lock.suite}\nCodename: {lock.suite}\n"
            f"Architectures: {lock.architecture} all\n"
            f"Date: {email.utils.formatdate(lock.epoch, usegmt=True)}\n"
            f"SHA256:\n {hashlib.sha256(index).hexdigest()} {len(index)} Packages\n"
        )
        yield directory


def _stanza(deb: Deb, path: Path) -> str:
    """Return the package's own fields with those an index adds; raises LockError if it is another package."""
    control = _run(["dpkg-deb", "--field", path], purpose=f"read {deb.name} {deb.version}")
    (fields,) = parse_stanzas(control)
    got = (fields.get("Package"), fields.get("Version"), fields.get("Architecture"))
    if got != (deb.name, deb.version, deb.architecture):
        raise LockError(
            f"what was locked as {deb.name} {deb.version} {deb.architecture} is {' '.join(map(str, got))}",
            why=f"its sha256 is as locked: {deb.sha256}", tries=(_RELOCK,),
        )
    return f"{control.rstrip()}\nFilename: ./{path.name}\nSize: {deb.size}\nSHA256: {deb.sha256}\n"


def _bootstrap(
    program: str, lock: BaseLock, repository: Path, scratch: Path, raw: Path, *, descriptor: int,
) -> None:
    """Run mmdebstrap on `repository` into the tar `raw`; all its processes keep `descriptor` open."""
    root = os.geteuid() == 0
    # The links that newer suites' base-files ships; with them in place `usrmerge` has nothing to convert.
    libraries = "lib lib64" if lock.architecture == "amd64" else "lib"
    merged = f'for d in bin sbin {libraries}; do mkdir -p "$1/usr/$d"; ln -s "usr/$d" "$1/$d"; done'
    # As root mmdebstrap mounts /proc and /sys where everybody sees them, and a kill leaves them mounted:
    # whoever then clears its directory walks through the machine's own. In namespaces of their own, mounts
    # and processes go with the process that made them, which goes with us.
    fence = [
        "setpriv", "--pdeathsig", "KILL",
        "unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child=KILL",
        "--mount-proc",
    ] if root else []
    environment = {
        "PATH": PATH, "HOME": os.environ.get("HOME", "/"), "LC_ALL": "C.UTF-8", "TZ": "UTC",
        "DEBIAN_FRONTEND": "noninteractive", "PYTHONHASHSEED": "0", "SOURCE_DATE_EPOCH": str(lock.epoch),
    }
    if root:
        environment["TMPDIR"] = str(scratch)
    _run(
        [
            *fence, program, "--quiet", f"--mode={'root' if root else 'unshare'}", "--variant=apt",
            "--format=tar",
            f"--architectures={lock.architecture}",
            # Every name: apt has nothing left to choose, and what it installs is compared with the lock.
            f"--include={','.join(deb.name for deb in lock.debs)}",
            f"--setup-hook={merged}",
            lock.suite, raw,
            f"deb [trusted=yes] copy:{urllib.parse.quote(str(repository))} ./",
        ],
        purpose="make a file system of the locked packages",
        env=environment,
        inherit=(descriptor,),
        tries=(
            ("as root it needs to mount and to make namespaces: a plain container may forbid that",)
            if root else
            (
                "without root it needs user namespaces: apt-get install uidmap",
                "give this user lines in /etc/subuid and /etc/subgid",
                "or run it as root",
            )
        ),
    )


def _entries(tar: tarfile.TarFile, descriptor: int) -> dict[str, Entry]:
    """Read mmdebstrap's tar into entries by path; a hard link's target is the path it links to."""
    kinds = {
        tarfile.REGTYPE: Kind.FILE, tarfile.AREGTYPE: Kind.FILE, tarfile.DIRTYPE: Kind.DIRECTORY,
        tarfile.SYMTYPE: Kind.SYMLINK, tarfile.LNKTYPE: Kind.HARDLINK, tarfile.CHRTYPE: Kind.CHARACTER_DEVICE,
        tarfile.BLKTYPE: Kind.BLOCK_DEVICE, tarfile.FIFOTYPE: Kind.FIFO,
    }
    entries = {}
    for member in tar:
        path = member.name.removeprefix("./").strip("/")
        if path in ("", "."):
            continue
        kind = kinds[member.type]
        entries[path] = Entry(
            path=path, kind=kind, mode=member.mode & 0o7777, uid=member.uid, gid=member.gid,
            mtime=int(member.mtime), size=member.size if kind is Kind.FILE else 0,
            target=member.linkname.removeprefix("./") if kind is Kind.HARDLINK else member.linkname,
            xattrs={
                key.removeprefix("SCHILY.xattr."): value.encode("utf-8", "surrogateescape")
                for key, value in member.pax_headers.items() if key.startswith("SCHILY.xattr.")
            },
            content=_slice(descriptor, member.offset_data, member.size) if kind is Kind.FILE else None,
        )
    return entries


def _slice(descriptor: int, offset: int, size: int) -> Callable[[], Iterator[bytes]]:
    def pieces() -> Iterator[bytes]:
        at, end = offset, offset + size
        while at < end:
            piece = os.pread(descriptor, min(layout.CHUNK, end - at), at)
            if not piece:
                return
            at += len(piece)
            yield piece

    return pieces


def _text(entries: Mapping[str, Entry], path: str) -> str:
    content = entries[path].content
    assert content is not None, path
    return b"".join(content()).decode()


def _require_locked(lock: BaseLock, entries: Mapping[str, Entry]) -> None:
    """Compare what dpkg says is installed with the lock: observed = declared."""
    installed = {
        (stanza["Package"], stanza["Version"], stanza["Architecture"])
        for stanza in parse_stanzas(_text(entries, "var/lib/dpkg/status"))
        if stanza["Status"] == "install ok installed"
    }
    locked = {(deb.name, deb.version, deb.architecture) for deb in lock.debs}
    if installed != locked:
        more = ", ".join(" ".join(one) for one in sorted(installed - locked))
        less = ", ".join(" ".join(one) for one in sorted(locked - installed))
        raise CellFailedError(
            "what was installed is not what is locked", where=f"base {lock.suite}-{lock.architecture}",
            why=f"not locked: {more or 'none'}; not installed: {less or 'none'}", tries=(_RELOCK,),
        )


# What is left out of an image, and why it would otherwise make two builds differ or say where it was built.
_DROPPED: tuple[tuple[str, str], ...] = (
    (r"(dev|proc|sys|run|tmp|var/tmp)/.+", "the runtime mounts or fills these"),
    (r"etc/(resolv\.conf|hostname|hosts)", "copied from the building machine; the runtime writes its own"),
    (r"etc/(passwd|shadow|group|gshadow|subuid|subgid)-", "backups"),
    (r"etc/ssh/ssh_host_.*", "keys every image would share"),
    (r"(etc/\.pwd\.lock|var/lib/dpkg/(lock|lock-frontend|triggers/Lock))", "lock files"),
    (r"var/lib/dpkg/(.*-old|available)", "backups, and a file only dselect reads"),
    (r"var/cache/debconf/.*-old", "backups"),
    (r"var/cache/ldconfig/.+", "inode numbers and times"),
    (r"var/cache/(apt|man|fontconfig)/.+\.(bin|gz|cache-[0-9]+|uuid)", "indexes made from other files"),
    (r"var/lib/apt/(extended_states|periodic/.*)", "in the base every package was asked for, by the lock"),
    (r"var/lib/dbus/machine-id", "one per machine"),
    (r"var/lib/systemd/catalog/database", "made from other files, not reproducible"),
    (r"etc/udev/hwdb\.bin|usr/lib/udev/hwdb\.bin", "made from other files"),
    (r"root/\.(cache|gnupg|wget-hsts|bash_history|python_history|launchpadlib)(/.*)?", "traces of the build"),
    (r"etc/apt/(sources\.list|sources\.list\.d/.+)", "the bootstrap's own repository; replaced below"),
    (r"etc/(apt/apt\.conf\.d|dpkg/dpkg\.cfg\.d)/99mmdebstrap", "the bootstrap's own options"),
    (r"etc/apt/apt\.conf\.d/(00mmdebstrap|01autoremove-kernels)", "about the building machine"),
    (r"usr/share/(doc-base|bug|lintian|linda|groff|info)/.+", "documentation"),
    (r"usr/bin/([^/]+-)?lto-dump(-[0-9]+)?", "32 MB that only compiler developers run"),
    (r"usr/lib/python3[^/]*/config-[^/]+/libpython[^/]*\.a", "25 MB, for embedding Python statically"),
)
# Of these, directories stay: apt wants its own, and some packages' scripts put alternatives into man/man1.
_DROPPED_FILES: tuple[tuple[str, str], ...] = (
    (r"var/log/.+", "logs: dates of the build"),
    (r"var/(cache/apt/archives|lib/apt/lists)/.+", "those of the bootstrap's own repository"),
    (r"usr/share/man/.+", "documentation"),
    (r"usr/share/locale/.+/LC_(MESSAGES|TIME)/.+", "translations; C.UTF-8 needs none"),
)
_DROP = re.compile("|".join(f"(?:{pattern})" for pattern, _ in _DROPPED))
_DROP_FILE = re.compile("|".join(f"(?:{pattern})" for pattern, _ in _DROPPED_FILES))
_DROP_DIRECTORY = re.compile(
    r"usr/share/(man/(?!man[1-9]$).+|locale/.+|doc/[^/]+/.+|doc-base|bug|lintian|linda)"
)
_LICENCE = re.compile(r"usr/share/doc/[^/]+(/copyright)?")

# Packages installed later skip what the base left out, as in Debian's own slim images.
_DPKG_OPTIONS = """\
# Made by torchyard: containers need no documentation and no translations. Licences stay.
path-exclude=/usr/share/doc/*
path-include=/usr/share/doc/*/copyright
path-exclude=/usr/share/man/*
path-exclude=/usr/share/info/*
path-exclude=/usr/share/locale/*/LC_MESSAGES/*
path-exclude=/usr/share/lintian/*
"""


def is_dropped(path: str, kind: Kind) -> bool:
    """Tell whether `path` is left out of an image."""
    if _DROP.fullmatch(path):
        return True
    if path.startswith("usr/share/doc/") and not _LICENCE.fullmatch(path):
        return True
    if kind is Kind.DIRECTORY:
        return _DROP_DIRECTORY.fullmatch(path) is not None
    return _DROP_FILE.fullmatch(path) is not None


def apt_sources(examples: Mapping[str, str], suite: str) -> tuple[str, str]:
    """Return path and content of the image's apt sources, made from the examples that its own apt ships.

    So the mirrors are Debian's word, not ours. Only the component `main` stays, as in Debian's own images.
    """
    for name in ("debian.sources", "sources.list"):
        lines = [line.split() for line in examples.get(name, "").splitlines() if not line.startswith("#")]
        # A one-line entry's suite is its third word: the examples carry no options.
        suites = [
            word for words in lines if words
            for word in (words[1:] if words[0] == "Suites:" else words[2:3] if words[0] == "deb" else [])
        ]
        if suites:
            break
    else:
        raise ToolError("the apt of this suite ships no example of its sources", why="looked in its examples")
    shown = min(suites, key=len)

    def adapted(word: str) -> str:
        return suite + word.removeprefix(shown) if word.startswith(shown) else word

    if name == "sources.list":
        kept = [f"deb {words[1]} {adapted(words[2])} main" for words in lines if words and words[0] == "deb"]
        return "etc/apt/sources.list", "".join(f"{line}\n" for line in kept)
    kept = []
    for words in lines:
        match words:
            case ["Suites:", *names]:
                kept.append(" ".join(("Suites:", *map(adapted, names))))
            case ["Components:", *_]:
                kept.append("Components: main")
            case _:
                kept.append(" ".join(words))
    return "etc/apt/sources.list.d/debian.sources", "\n".join(kept).strip() + "\n"


def canonical(entries: Mapping[str, Entry], *, suite: str, epoch: int) -> list[Entry]:
    """Turn a freshly made file system into the one that is published: the same on every machine.

    Noise is left out, the user and the apt sources are added, hard links point at the first of their names,
    every entry bears `epoch`, and paths are in order. One time for all, instead of a limit from above: a
    machine whose clock is behind would otherwise leave its own times below the limit.
    """
    kept = {path: entry for path, entry in entries.items() if not is_dropped(path, entry.kind)}
    kept = _relinked(entries, kept)
    kept = {path: one for path, entry in kept.items() if (one := _trusted_bytecode(entry)) is not None}
    examples = {
        path.rpartition("/")[2]: _text(entries, path)
        for path, entry in entries.items()
        if path.startswith("usr/share/doc/apt/examples/") and entry.kind is Kind.FILE
    }
    sources, text = apt_sources(examples, suite)
    added = [
        layout.file_entry(sources, text.encode()),
        layout.file_entry("etc/dpkg/dpkg.cfg.d/torchyard", _DPKG_OPTIONS.encode()),
        *_user(kept, epoch=epoch),
    ]
    if "etc/machine-id" in kept:
        added.append(layout.file_entry("etc/machine-id", b"", mode=0o444))
    # apt gives these to its unprivileged user, or not, by whether that user could enter the building directory;
    # in the image it does so again at its first run.
    added += [
        replace(kept[path], uid=0, gid=0)
        for path in ("var/cache/apt/archives/partial", "var/lib/apt/lists/partial") if path in kept
    ]
    kept.update({entry.path: entry for entry in added})
    return [replace(kept[path], mtime=epoch) for path in sorted(kept, key=os.fsencode)]


def _relinked(entries: Mapping[str, Entry], kept: Mapping[str, Entry]) -> dict[str, Entry]:
    """Give each group of hard links that is kept its content at the first of its names."""
    groups: dict[str, list[str]] = {}
    for path, entry in kept.items():
        if entry.kind is Kind.HARDLINK:
            groups.setdefault(entry.target, []).append(path)
    done = dict(kept)
    for target, names in groups.items():
        first, *others = sorted([*names, target] if target in kept else names, key=os.fsencode)
        done[first] = replace(entries[target], path=first)
        for path in others:
            done[path] = replace(
                done[first], path=path, kind=Kind.HARDLINK, target=first, size=0, content=None,
            )
    return done


def _trusted_bytecode(entry: Entry) -> Entry | None:
    """Return `entry`, Python bytecode with its flag changed; None for bytecode that would never be used.

    Under SOURCE_DATE_EPOCH Debian's py3compile makes "checked hash" files: the same in every build, but
    Python reads and hashes the source at each import. Bit 1 of the flags, cleared, tells it not to: right for
    files that change together, under dpkg. The few made earlier hold the time of a source that is given
    another time here. Leaving all bytecode out, as slim images do, was measured to cost a program that
    imports 40 modules of the standard library 0.28 s at every start, for ever if its user is not root.
    """
    if not entry.path.endswith(".pyc") or entry.kind is not Kind.FILE:
        return entry
    assert entry.content is not None
    code = b"".join(entry.content())
    flags = int.from_bytes(code[4:8], "little")
    if not flags & 1:
        return None
    unchecked = code[:4] + (flags & ~2).to_bytes(4, "little") + code[8:]
    return replace(entry, content=lambda: (unchecked,))


def _user(kept: Mapping[str, Entry], *, epoch: int) -> Iterator[Entry]:
    """Yield the user's entries: account, home, and the directory for work.

    All of it belongs to group 0 and is the group's to write, so that it also serves platforms which run
    containers under an arbitrary user of group 0.
    """
    accounts = _text(kept, "etc/passwd")
    for line in accounts.splitlines():
        name, _, number = line.split(":")[:3]
        if name == USER or number == str(UID):
            raise ToolError(f"the packages already make the user {name} ({number})", why=f"{USER} is {UID}")
    # "*": no password, yet not locked: sshd refuses locked accounts even with a key. Without the package
    # `passwd` (newer suites leave it out) there is no shadow file, and the mark stands in the account itself.
    mark = "x" if "etc/shadow" in kept else "*"
    account = f"{USER}:{mark}:{UID}:{GID}:torchyard:/home/{USER}:/bin/bash\n"
    yield _edited(kept, "etc/passwd", accounts + account)
    if "etc/shadow" in kept:
        days = str(epoch // 86400)
        shadow = [line.split(":") for line in _text(kept, "etc/shadow").splitlines()]
        shadow.append([USER, "*", "", "0", "99999", "7", "", "", ""])
        lines = [":".join((name, password, days, *rest)) for name, password, _, *rest in shadow]
        yield _edited(kept, "etc/shadow", "".join(f"{line}\n" for line in lines))
    for path, mode in ((f"home/{USER}", 0o775), ("workspace", 0o775)):
        yield Entry(path=path, kind=Kind.DIRECTORY, mode=mode, uid=UID, gid=GID)
    for path, entry in kept.items():
        if path.startswith("etc/skel/") and entry.kind is Kind.FILE:
            yield replace(
                entry, path=f"home/{USER}/{path.removeprefix('etc/skel/')}", uid=UID, gid=GID, mode=0o664,
            )


def _edited(kept: Mapping[str, Entry], path: str, text: str) -> Entry:
    content = text.encode()
    return replace(kept[path], size=len(content), content=lambda: (content,))


