"""What stays of a freshly bootstrapped file tree, and what is added: the same on every machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from builder.errors import ToolError
from builder.tar import Entry, Kind, file_entry

USER, UID, GID = "torch", 1000, 0

# What is left out of an image, and why it would otherwise make two builds differ or say where it was built.
_DROPPED: tuple[tuple[str, str], ...] = (
    (r"(dev|proc|sys|run|tmp|var/tmp)/.+", "the runtime mounts or fills these"),
    (r"etc/(resolv\.conf|hostname|hosts)", "copied from the building machine; the runtime writes its own"),
    (r"etc/(passwd|shadow|group|gshadow|subuid|subgid)-", "backups"),
    (r"etc/ssh/ssh_host_.*", "keys every image would share"),
    (r"(etc/\.pwd\.lock|var/lib/dpkg/(lock|lock-frontend|triggers/Lock))", "lock files"),
    (r"var/lib/dpkg/(.*-old|available)", "backups, and a file only dselect reads"),
    (r"var/cache/debconf/.*-old", "backups"),
    (r"var/lib/ucf/(hashfile|registry)\.[0-9]+", "backups"),
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
_DROP_DIRECTORY = re.compile(r"usr/share/(man/(?!man[1-9]$).+|locale/.+|doc/[^/]+/.+|doc-base|bug|lintian|linda)")
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
        path.rpartition("/")[2]: entry.read().decode()
        for path, entry in entries.items()
        if path.startswith("usr/share/doc/apt/examples/") and entry.kind is Kind.FILE
    }
    sources, text = apt_sources(examples, suite)
    added = [
        file_entry(sources, text.encode()),
        file_entry("etc/dpkg/dpkg.cfg.d/torchyard", _DPKG_OPTIONS.encode()),
        *_user(kept, epoch=epoch),
    ]
    if "etc/machine-id" in kept:
        added.append(file_entry("etc/machine-id", b"", mode=0o444))
    # apt gives these to its unprivileged user, or not, by whether that user could enter the building directory;
    # in the image it does so again at its first run.
    added += [
        replace(kept[path], uid=0, gid=0)
        for path in ("var/cache/apt/archives/partial", "var/lib/apt/lists/partial")
        if path in kept
    ]
    kept.update({entry.path: entry for entry in added})
    return [replace(kept[path], mtime=epoch) for path in sorted(kept, key=os.fsencode)]


def is_dropped(path: str, kind: Kind) -> bool:
    """Tell whether `path` is left out of an image."""
    if _DROP.fullmatch(path):
        return True
    if path.startswith("usr/share/doc/") and not _LICENCE.fullmatch(path):
        return True
    if kind is Kind.DIRECTORY:
        return _DROP_DIRECTORY.fullmatch(path) is not None
    return _DROP_FILE.fullmatch(path) is not None


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
            done[path] = replace(done[first], path=path, kind=Kind.HARDLINK, target=first, size=0, content=None)
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
    code = entry.read()
    flags = int.from_bytes(code[4:8], "little")
    if not flags & 1:
        return None
    unchecked = code[:4] + (flags & ~2).to_bytes(4, "little") + code[8:]
    return replace(entry, content=lambda: (unchecked,))


# ----------------------------------------------------------------------------------------------------
# Added: the user, and the apt sources


def _user(kept: Mapping[str, Entry], *, epoch: int) -> Iterator[Entry]:
    """Yield the user's entries: account, home, and the directory for work.

    All of it belongs to group 0 and is the group's to write, so that it also serves platforms which run
    containers under an arbitrary user of group 0.
    """
    accounts = kept["etc/passwd"].read().decode()
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
        shadow = [line.split(":") for line in kept["etc/shadow"].read().decode().splitlines()]
        shadow.append([USER, "*", "", "0", "99999", "7", "", "", ""])
        lines = [":".join((name, password, days, *rest)) for name, password, _, *rest in shadow]
        yield _edited(kept, "etc/shadow", "".join(f"{line}\n" for line in lines))
    for path in (f"home/{USER}", "workspace"):
        yield Entry(path=path, kind=Kind.DIRECTORY, mode=0o775, uid=UID, gid=GID)
    for path, entry in kept.items():
        if path.startswith("etc/skel/") and entry.kind is Kind.FILE:
            yield replace(entry, path=f"home/{USER}/{path.removeprefix('etc/skel/')}", uid=UID, gid=GID, mode=0o664)


def _edited(kept: Mapping[str, Entry], path: str, text: str) -> Entry:
    content = text.encode()
    return replace(kept[path], size=len(content), content=lambda: (content,))


def apt_sources(examples: Mapping[str, str], suite: str) -> tuple[str, str]:
    """Return path and content of the image's apt sources, made from the examples that its own apt ships.

    So the mirrors are Debian's word, not ours. Only the component `main` stays, as in Debian's own images.
    """
    for file in ("debian.sources", "sources.list"):
        lines = [line.split() for line in examples.get(file, "").splitlines() if not line.startswith("#")]
        if suites := [name for words in lines for name in _suites(words)]:
            break
    else:
        raise ToolError("the apt of this suite ships no example of its sources", why="looked in its examples")
    shown = min(suites, key=len)

    def adapted(word: str) -> str:
        return suite + word.removeprefix(shown) if word.startswith(shown) else word

    if file == "sources.list":
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


def _suites(words: list[str]) -> list[str]:
    """Return the suites that a line of apt sources names; the examples' one-line entries carry no options."""
    match words:
        case ["Suites:", *names]:
            return names
        case ["deb", _, name, *_]:
            return [name]
        case _:
            return []
