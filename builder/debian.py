"""Debian's archive as this machine's own apt sees it: resolved and fetched, without touching the machine's state."""

from __future__ import annotations

import contextlib
import email.utils
import os
import re
import subprocess
import tempfile
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from builder import program
from builder.errors import SourceError, ToolError
from builder.store import Store

ARCHITECTURES = ("amd64", "arm64")

# What names and versions may be; nothing that matches can be an option of apt, or leave a directory.
NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")
SUITE = re.compile(r"[a-z][a-z0-9-]*")
VERSION = re.compile(r"(?:[0-9]+:)?[0-9][A-Za-z0-9.+~-]*")
FILENAME = re.compile(r"pool/(?:[A-Za-z0-9][A-Za-z0-9+.~_-]*/)+[A-Za-z0-9][A-Za-z0-9+.~_%-]*\.deb")

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

INSTEAD = ("use a base of kind `image` (any registry image, by digest)",)
"""What can be done where Debian's own programs are missing."""
_BATCH_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Deb:
    """One Debian package file: `filename` is its path in the archive's pool, `size` is in bytes."""

    name: str
    version: str
    architecture: str
    filename: str
    sha256: str
    size: int


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


# ----------------------------------------------------------------------------------------------------
# Mirrors, taken from what the machine's apt is configured with

_PRINTED_URI = re.compile(r"^'(?P<site>[^']+)/dists/(?P<suite>[^']+)/(?:In)?Release' ", re.MULTILINE)
_SECURITY_SUITE = re.compile(r".+(?:-security|/updates)")
_OTHER_SUITE = re.compile(r".+-(?:updates|backports|backports-sloppy|proposed-updates|debug)")


@dataclass(frozen=True, kw_only=True)
class Mirrors:
    """The sites that may be Debian's archive and its security archive, in the order to try them.

    Only candidates: that a site is Debian's is proved later, by the signature on what it serves.
    """

    archives: tuple[str, ...]
    securities: tuple[str, ...]

    @classmethod
    def printed(cls, text: str) -> Mirrors:
        """Read `apt-get update --print-uris`.

        apt itself has parsed its sources then, in either format, with comments and disabled entries left out. A site
        that serves a suite together with its updates comes first, because few third-party ones do.
        """
        sites: dict[str, set[str]] = {}
        for match in _PRINTED_URI.finditer(text):
            sites.setdefault(match["site"], set()).add(match["suite"])
        securities = [site for site, suites in sites.items() if any(map(_SECURITY_SUITE.fullmatch, suites))]
        archives = [
            site
            for site, suites in sites.items()
            if any(not _SECURITY_SUITE.fullmatch(suite) and not _OTHER_SUITE.fullmatch(suite) for suite in suites)
        ]
        archives.sort(key=lambda site: not any(_OTHER_SUITE.fullmatch(suite) for suite in sites[site]))
        return cls(archives=tuple(archives), securities=tuple(securities))

    def addresses(self) -> Iterator[Callable[[str], str]]:
        """Yield, in the order to try them, functions from a pool path to an address.

        Security updates live under `pool/updates` of their own archive and move to the main one at a point release.
        """

        def direct(archive: str, security: str) -> Callable[[str], str]:
            return lambda name: f"{security if name.startswith('pool/updates/') else archive}/{_quoted(name)}"

        def moved(archive: str) -> Callable[[str], str]:
            return lambda name: f"{archive}/{_quoted(name.replace('pool/updates/', 'pool/', 1))}"

        for archive in self.archives:
            for security in self.securities or self.archives:
                yield direct(archive, security)
            yield moved(archive)


def _quoted(name: str) -> str:
    return urllib.parse.quote(name, safe="/+~%")


# ----------------------------------------------------------------------------------------------------
# apt


class Apt:
    """apt with a private state under `directory`: what the host installed or fetched is not read nor changed.

    Of the host's configuration only `Acquire` is taken over (mirrors' proxies, certificates, retries). The
    rest stays out: hooks that notify desktops, pins for third-party packages, recommendations.
    """

    mirrors: Mirrors

    def __init__(self, directory: Path, *, architecture: str) -> None:
        for name in ("state/lists/partial", "cache/archives/partial", "empty"):
            (directory / name).mkdir(parents=True)
        (directory / "status").touch()
        self._sources = directory / "sources.list"
        self._sources.touch()
        self._lists = directory / "state/lists"
        self._environment = dict(os.environ) | {"LC_ALL": "C.UTF-8"}
        state = {
            "Dir::State": f"{directory}/state/",
            "Dir::State::status": f"{directory}/status",
            "Dir::Cache": f"{directory}/cache/",
        }
        options = [part for key, value in state.items() for part in ("-o", f"{key}={value}")]
        apt_get = program.find("apt-get", package="apt", purpose="resolve and fetch Debian packages", tries=INSTEAD)
        sources = program.run(
            [apt_get, "update", "--print-uris", "-o", "Debug::NoLocking=true", *options],
            purpose="read this machine's apt sources",
            env=self._environment,
        )
        self.mirrors = Mirrors.printed(sources)
        acquire = program.run(
            ["apt-config", "dump", "--no-empty", "--format", '%F "%v";%n', "Acquire"],
            purpose="read this machine's apt configuration",
            env=self._environment,
        )
        # Preferences: with `usrmerge` the base would grow by the tools that convert an old file system.
        (directory / "preferences").write_text("Package: usrmerge\nPin: release *\nPin-Priority: -1\n")
        settings = state | {
            "Dir::Etc::main": "/dev/null",
            "Dir::Etc::parts": f"{directory}/empty",
            "Dir::Etc::sourcelist": str(self._sources),
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

    def run(self, *argv: str, purpose: str) -> str:
        """Run one of apt's programs with the private state."""
        return program.run(argv, purpose=purpose, env=self._environment)

    def read_lists(self, suite: str) -> None:
        """Read the package lists of the suite, its updates and security updates into the private state.

        They come from the first of the machine's mirrors that serve them under Debian's own signature; raises
        SourceError if none does.
        """
        keyring = _keyring()
        said = ""
        for archive in self.mirrors.archives:
            for security in self.mirrors.securities:
                served = ((archive, suite), (archive, f"{suite}-updates"), (security, f"{suite}-security"))
                self._sources.write_text(
                    "".join(f"deb [signed-by={keyring}] {site} {name} main\n" for site, name in served)
                )
                try:
                    self.run("apt-get", "update", "--error-on=any", purpose=f"read the lists of {suite}")
                except ToolError as error:
                    said = error.problems[0].why
                else:
                    return
        tries = (
            "check the network, and that the name of the suite is right",
            "let this machine's apt sources name Debian's archive and its security archive",
        )
        if not self.mirrors.archives or not self.mirrors.securities:
            missing = "security archive" if self.mirrors.archives else "archive"
            raise SourceError(
                f"this machine's apt sources do not name Debian's {missing}",
                why="the bootstrap base takes its mirrors from there",
                tries=tries,
            )
        raise SourceError(
            f"no mirror in this machine's apt sources serves {suite} with its updates and security updates",
            why=said,
            tries=tries,
        )

    def newest_list(self) -> int:
        """Return when the newest of the signed lists was made, in seconds since 1970."""
        return max(
            int(email.utils.parsedate_to_datetime(stanza["Date"]).timestamp())
            for path in self._lists.glob("*Release")
            for stanza in parse_stanzas(path.read_text())
            if "Date" in stanza
        )

    def download(self, uris: Mapping[str, Path]) -> str:
        """Fetch each address into its file through apt's own transports; returns what apt said.

        Hashes are not handed over: the store checks them, once, for every source. Fetching goes on after a
        failure; the caller sees by the files what is missing.
        """
        helper = self.run("apt-config", "shell", "BIN", "Dir::Bin::apt-helper/f", purpose="find apt's download helper")
        found = re.search(r"BIN='([^']+)'", helper)
        command = [found[1] if found else "/usr/lib/apt/apt-helper", "download-file"]
        for uri, path in uris.items():
            command += [uri, str(path), ""]
        done = subprocess.run(
            command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        return done.stderr + done.stdout


def _keyring() -> Path:
    if not KEYRING.exists():
        raise ToolError(
            "Debian's archive keys are missing",
            where=str(KEYRING),
            why="without them nothing a mirror serves can be trusted",
            tries=("apt-get install debian-archive-keyring",),
        )
    return KEYRING


# ----------------------------------------------------------------------------------------------------
# Resolving

_INSTALL = re.compile(r"^Inst (?P<name>\S+) \((?P<version>\S+) .*\[(?P<architecture>[a-z0-9]+)\]\)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """What apt chose, by name, and the date (seconds) of the newest list it chose from."""

    debs: tuple[Deb, ...]
    epoch: int


class Archive:
    """A suite's package lists, with updates and security fixes, as they were when they were read: once."""

    def __init__(self, apt: Apt, suite: str) -> None:
        apt.read_lists(suite)
        self._apt, self._suite = apt, suite
        self._epoch = apt.newest_list()

    def resolve(self, packages: Iterable[str]) -> Resolution:
        """Return what a minimal Debian with apt and `packages` consists of; raises ToolError if apt cannot say."""
        return self._resolve("?essential", "apt", *packages)

    def extend(self, debs: Sequence[Deb], packages: Iterable[str]) -> Resolution:
        """Return `debs` and what `packages` need besides; raises ToolError if the lists no longer have just these."""
        found = self._resolve(*map(_exactly, debs), *packages)
        # A security update moves within the pool when a point release takes it over: the file is the same.
        locked = {(deb.name, deb.version, deb.architecture, deb.sha256): deb for deb in debs}
        every = tuple(locked.get((deb.name, deb.version, deb.architecture, deb.sha256), deb) for deb in found.debs)
        if lost := sorted(deb.name for deb in set(debs) - set(every)):
            raise ToolError(
                f"the archive has other packages than were locked: {', '.join(lost)}",
                why="their names and versions are the same, their bytes are not",
            )
        return replace(found, debs=every)

    def _resolve(self, *asked: str) -> Resolution:
        run, suite = self._apt.run, self._suite
        plan = run("apt-get", "--simulate", "--quiet=2", "install", *asked, purpose=f"resolve the packages of {suite}")
        chosen = {match["name"]: match for match in _INSTALL.finditer(plan)}
        exact = (f"{name}:{one['architecture']}={one['version']}".replace(":all=", "=") for name, one in chosen.items())
        shown = run("apt-cache", "show", *exact, purpose=f"read the packages of {suite}")
        debs = {
            stanza["Package"]: Deb(
                name=stanza["Package"],
                version=stanza["Version"],
                architecture=stanza["Architecture"],
                filename=stanza["Filename"],
                sha256=stanza["SHA256"],
                size=int(stanza["Size"]),
            )
            for stanza in parse_stanzas(shown)
            if stanza["Version"] == chosen[stanza["Package"]]["version"]
        }
        if lost := sorted(set(chosen) - set(debs)):
            raise ToolError(
                f"apt chose packages it then could not describe: {', '.join(lost)}",
                tries=("run it again: the mirror may have been updated meanwhile",),
            )
        return Resolution(debs=tuple(debs[name] for name in sorted(debs)), epoch=self._epoch)


def _exactly(deb: Deb) -> str:
    """Return what apt calls the package in just this version."""
    return f"{deb.name}={deb.version}" if deb.architecture == "all" else f"{deb.name}:{deb.architecture}={deb.version}"


@contextlib.contextmanager
def archive(*, suite: str, architecture: str) -> Iterator[Archive]:
    """Read the suite's package lists, and nothing else; raises SourceError if no mirror serves it."""
    with tempfile.TemporaryDirectory(prefix="torchyard-apt-") as directory:
        yield Archive(Apt(Path(directory), architecture=architecture), suite)


# ----------------------------------------------------------------------------------------------------
# Fetching


@dataclass(frozen=True, kw_only=True)
class Lost:
    """Packages that no mirror gave, and what apt said last."""

    debs: tuple[Deb, ...]
    why: str


def fetch(
    debs: Sequence[Deb], store: Store, scratch: Path, *, architecture: str, arrived: Callable[[Deb], None]
) -> Lost | None:
    """Bring `debs` into the store, by their hashes; returns what could not be had, None if nothing is lost.

    `arrived` is called with each. Raises HashMismatchError if a mirror serves other bytes.
    """
    apt = Apt(scratch / "apt", architecture=architecture)
    lost: list[Deb] = []
    said = ""
    # A few at a time: apt opens one connection a host and pipelines; a batch is what a kill can lose.
    for batch in _batches(debs):
        left = batch
        for address in apt.mirrors.addresses():
            paths = {deb: scratch / f"{deb.sha256}.deb" for deb in left}
            said = apt.download({address(deb.filename): path for deb, path in paths.items()}) or said
            for deb, path in paths.items():
                if path.exists():
                    _enter(store, deb, path)
                    arrived(deb)
            left = [deb for deb in left if not store.has(deb.sha256)]
            if not left:
                break
        lost += left
    return Lost(debs=tuple(lost), why=program.tail(said, lines=4)) if lost else None


def _batches(debs: Sequence[Deb]) -> Iterator[list[Deb]]:
    batch: list[Deb] = []
    for deb in debs:
        batch.append(deb)
        if sum(one.size for one in batch) >= _BATCH_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def _enter(store: Store, deb: Deb, path: Path) -> None:
    with store.writer(deb.sha256, deb.filename.rpartition("/")[2]) as writer:
        writer.restart()
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                writer.write(chunk)
        writer.commit()
    path.unlink()
