"""The layers of an image: spliced from wheels, compiled from their sources, and one with the cell's own files.

Each is remembered under the digest of all that it is made from, so a wheel is worked through once, whatever number of
cells hold it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import re
import threading
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from builder import layout, tar
from builder.engines.oci import bytecode, evidence, recipe
from builder.engines.oci.bytecode import Interpreter
from builder.engines.oci.foundation import Foundation, open_tar
from builder.engines.oci.install import DIRECTORY, EXECUTABLE, FILE, SITE, placed
from builder.engines.oci.splice import RECIPE, TIME, parents, require_equal, splice
from builder.engines.oci.stack import Group
from builder.engines.oci.turns import Turns
from builder.engines.oci.wheel import Wheel, open_wheel
from builder.errors import HashMismatchError, TorchyardError, WheelError
from builder.layout import Layer, canonical_json
from builder.lock import Wheel as LockedWheel
from builder.render import (
    HOME,
    HOME_OF_PYTHON,
    IMAGE_JSON,
    PREFIX,
    PROFILE,
    UNCOMPILED,
    VALIDATOR,
    WORKDIR,
    Plan,
    profile_of,
)
from builder.schema import ImageBase
from builder.sha256 import Hasher
from builder.store import Store, write_atomically

_UNCOMPILED = re.compile(UNCOMPILED)


class StoppedError(Exception):
    """Another layer failed, or the user stopped the run: this one is of no use any more."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """One layer, what people read about it, and what is known of its files."""

    layer: Layer
    title: str
    paths: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By wheel (its file name): every path it owns, and what its content is."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What its bytes say, by the names that `validate/facts.py` uses."""


def _key(**parts: object) -> str:
    return hashlib.sha256(canonical_json({"recipe": RECIPE, **parts})).hexdigest()


def opened(wheel: LockedWheel, store: Store) -> Wheel:
    """Open a locked wheel of the store; raises HashMismatchError if it is there no more as it was locked."""
    try:
        return open_wheel(store.path(wheel.sha256), filename=wheel.filename, sha256=wheel.sha256)
    except (WheelError, FileNotFoundError) as error:
        raise blamed(error, [wheel], store) from error


def blamed(error: Exception, wheels: Iterable[LockedWheel], store: Store) -> TorchyardError:
    """Return the error to raise when a wheel was found unsound, which its publisher or this disk may have done."""
    wheels = tuple(wheels)
    damaged = [wheel for wheel in wheels if not store.verify(wheel.sha256)]
    if isinstance(error, WheelError) and not damaged:
        return error
    # A file that was missing may be back already: another run found the damage as well.
    return HashMismatchError(
        f"damaged in the store, and removed from it: {', '.join(wheel.filename for wheel in damaged or wheels)}",
        where=str(store.root),
        why=str(error).partition("\n")[0],
        tries=("run the same command again: what is missing is fetched anew",),
    )


# ----------------------------------------------------------------------------------------------------
# Wheels


def spliced(group: Group, store: Store, *, hasher: Hasher, turns: Turns, stopped: threading.Event) -> Made:
    """Return the layer of a group of wheels.

    Raises WheelError for a wheel that is none, HashMismatchError for one that was damaged in the store.
    """
    key = _key(evidence=evidence.SCHEMA, wheels=[wheel.sha256 for wheel in group.wheels])
    # Whoever else wants this layer waits for it instead of making it as well.
    with store.lock(f"layer-{key[:32]}"):
        known = recipe.recall(store, key)
        if known is not None:
            layer, about = known
            return Made(layer=layer, title=group.title, paths=about["paths"], facts=about["facts"])

        try:
            with turns.turn(group.size) as turn:

                def advance(count: int) -> None:
                    turn.worked(count)
                    if stopped.is_set():
                        raise StoppedError

                wheels = [opened(wheel, store) for wheel in group.wheels]
                made = splice([(wheel, placed(wheel)) for wheel in wheels], hasher=hasher, advance=advance)
        except (WheelError, FileNotFoundError) as error:
            raise blamed(error, group.wheels, store) from error
        store.put(made.literals)
        recipe.keep(store, made.recipe)
        recipe.remember(store, key, made.recipe.layer, {"paths": made.paths, "facts": made.facts})
        return Made(layer=made.recipe.layer, title=group.title, paths=made.paths, facts=made.facts)


def refuse_collisions(layers: Iterable[Made]) -> None:
    """Raise WheelError if two wheels want one path with different content, or one's file is another's directory.

    The cell's own layer is one of them: what lies under the links of its environment would be hidden.
    """
    owners: dict[str, tuple[str, str]] = {}
    for made in layers:
        for filename, paths in made.paths.items():
            for path, digest in paths.items():
                require_equal(path, owners.setdefault(path, (filename, digest)), (filename, digest))
    directories: set[str] = set()
    for path, (filename, _) in owners.items():
        parent = path.rpartition("/")[0]
        while parent and parent not in directories:
            if parent in owners:
                raise WheelError(
                    f"{owners[parent][0]} installs /{parent} as a file, {filename} as a directory",
                    tries=("leave one of the two packages out of the variant",),
                )
            directories.add(parent)
            parent = parent.rpartition("/")[0]


# ----------------------------------------------------------------------------------------------------
# Bytecode


def sources(wheel: LockedWheel, store: Store, *, python: str) -> Iterator[tuple[str, bytes]]:
    """Yield the sources of a wheel that get bytecode, by the path under which the image's Python finds them.

    Raises WheelError for a wheel that is none, HashMismatchError for one that was damaged in the store.
    """
    seen = f"{PREFIX.lstrip('/')}/lib/python{python}/site-packages"
    try:
        whole = opened(wheel, store)
        for file in placed(whole):
            path = f"/{seen}{file.path.removeprefix(SITE)}"
            compiled = file.path.startswith(f"{SITE}/") and path.endswith(".py") and not _UNCOMPILED.search(path)
            if compiled and file.member is not None:
                yield path, whole.read(file.member.path, limit=max(file.member.size, file.member.compressed_size))
    except (WheelError, FileNotFoundError) as error:
        raise blamed(error, [wheel], store) from error


class Compiler:
    """The base's own Python, unpacked and started only when there is something to compile.

    A context manager; what it unpacked is gone afterwards. Until then it holds in memory what it compiled of the
    `shared` wheels (their hashes), which are to be in several layers.
    """

    def __init__(
        self,
        foundation: Foundation,
        store: Store,
        *,
        python: str,
        workers: int,
        stopped: threading.Event,
        shared: Collection[str] = (),
    ) -> None:
        self._foundation, self._store, self._python, self._workers = foundation, store, python, workers
        self._stopped, self._shared = stopped, shared
        self._compiled: dict[str, list[tuple[str, bytes | None]]] = {}
        self._stack = contextlib.ExitStack()
        self._interpreter: Interpreter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def identity(self) -> Mapping[str, str]:
        """What decides its bytecode: full version and magic number; remembered, so that asking again costs nothing."""
        path = self._store.root / "interpreters" / f"{self._foundation.digest}-{self._python}.json"
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError, KeyError):
            found = json.loads(path.read_bytes())
            return {name: str(found[name]) for name in ("version", "magic", "tag")}
        interpreter = self._started()
        identity = {"version": interpreter.version, "magic": interpreter.magic.hex(), "tag": interpreter.tag}
        write_atomically(path, canonical_json(identity))
        return identity

    def _started(self) -> Interpreter:
        if self._interpreter is None:
            scratch = self._stack.enter_context(self._store.scratch(f"python-{self._foundation.digest[:16]}"))
            tars = [functools.partial(open_tar, self._store, layer) for layer in self._foundation.layers]
            self._interpreter = self._stack.enter_context(
                bytecode.interpreter(tars, python=self._python, search=self._foundation.search, scratch=scratch)
            )
        return self._interpreter

    def layer(self, wheels: Sequence[LockedWheel], *, title: str) -> Made:
        """Return the layer with the bytecode of `wheels`."""
        wheels = sorted(wheels, key=lambda wheel: wheel.name)
        about = {**self.identity, "recipe": bytecode.RECIPE}
        key = _key(bytecode=about, wheels=[wheel.sha256 for wheel in wheels])
        known = recipe.recall(self._store, key)
        if known is None:
            # Before the lock of the directory below: two runs that took the two in different order would wait for ever.
            interpreter = self._started()
            # Whoever had the interpreter before may have made this very layer.
            known = recipe.recall(self._store, key)
        if known is None:
            with self._store.scratch(f"bytecode-{key[:16]}") as scratch:
                content = tar.stream(self._entries(interpreter, wheels))
                known = layout.gzip_layer(self._store, content, scratch=scratch), {}
            recipe.remember(self._store, key, *known)
        return Made(layer=known[0], title=title)

    def _entries(self, interpreter: Interpreter, wheels: Sequence[LockedWheel]) -> Iterator[tar.Entry]:
        directories: set[str] = set()
        done: set[str] = set()
        for path, content in self._compiles(interpreter, wheels):
            if self._stopped.is_set():
                raise StoppedError
            place = SITE + bytecode.cache_path(path, interpreter.tag).partition("/site-packages")[2]
            if content is not None and place not in done:
                done.add(place)
                yield from parents(place, directories)
                yield tar.file_entry(place, content, mode=FILE, mtime=TIME)

    def _compiles(self, interpreter: Interpreter, wheels: Sequence[LockedWheel]) -> Iterator[tuple[str, bytes | None]]:
        """Yield each source of the wheels and its bytecode, in order."""
        for known, some in itertools.groupby(wheels, key=lambda wheel: wheel.sha256 in self._compiled):
            if known:
                yield from itertools.chain.from_iterable(self._compiled[wheel.sha256] for wheel in some)
            else:
                yield from self._compiles_anew(interpreter, tuple(some))

    def _compiles_anew(
        self, interpreter: Interpreter, wheels: Sequence[LockedWheel]
    ) -> Iterator[tuple[str, bytes | None]]:
        owners: deque[str] = deque()
        shared: dict[str, list[tuple[str, bytes | None]]] = {
            wheel.sha256: [] for wheel in wheels if wheel.sha256 in self._shared
        }

        def texts() -> Iterator[tuple[str, bytes]]:
            for wheel in wheels:
                for text in sources(wheel, self._store, python=self._python):
                    owners.append(wheel.sha256)
                    yield text

        for done in bytecode.compile_sources(interpreter, texts(), workers=self._workers):
            if (owner := owners.popleft()) in shared:
                shared[owner].append(done)
            yield done
        self._compiled |= shared  # only now: of a part nobody would know that it is one


# ----------------------------------------------------------------------------------------------------
# The cell's own


def cell_layer(plan: Plan, foundation: Foundation, store: Store) -> Made:
    """Return the layer with what no wheel brings: the environment itself, and what the image was declared to be."""
    entries = sorted(_own_files(plan, foundation), key=lambda entry: entry.path)
    with store.scratch(f"cell-{plan.digest[:16]}") as scratch:
        layer = layout.gzip_layer(store, tar.stream(_with_parents(entries, foundation, plan.epoch)), scratch=scratch)
    owned = {entry.path: _what(entry) for entry in entries if entry.kind is not tar.Kind.DIRECTORY}
    return Made(
        layer=layer,
        title=f"environment and image.json of {plan.cell.id}",
        paths={"the environment itself": owned},
    )


def _what(entry: tar.Entry) -> str:
    """Return what an entry of ours is, as the paths of wheels have it; no file of a wheel is equal to a link."""
    if entry.kind is tar.Kind.SYMLINK:
        return f"link={entry.target}"
    return f"sha256={hashlib.sha256(entry.read()).hexdigest()}:{entry.mode:o}"


def _own_files(plan: Plan, foundation: Foundation) -> Iterator[tar.Entry]:
    def text(value: str) -> str:
        return value.replace(HOME_OF_PYTHON, foundation.home)

    root = PREFIX.lstrip("/")
    for path in plan.environment.directories:
        yield tar.Entry(path=f"{root}/{path}", kind=tar.Kind.DIRECTORY, mode=DIRECTORY, mtime=TIME)
    for path, target in plan.environment.links.items():
        yield tar.Entry(path=f"{root}/{path}", kind=tar.Kind.SYMLINK, mode=0o777, mtime=TIME, target=text(target))
    for path, content in plan.environment.files.items():
        yield tar.file_entry(f"{root}/{path}", text(content).encode(), mode=FILE, mtime=TIME)
    for name, program in {VALIDATOR: plan.validator, **plan.programs}.items():
        yield tar.file_entry(f"{root}/bin/{name}", program, mode=EXECUTABLE, mtime=TIME)
    yield tar.file_entry(IMAGE_JSON.lstrip("/"), plan.files["image.json"], mtime=plan.epoch)
    yield tar.file_entry(PROFILE.lstrip("/"), profile_of(plan.config).encode(), mtime=plan.epoch)
    uid, _, gid = plan.config.user.partition(":")
    # A bootstrap base brings the first two.
    places = (HOME, WORKDIR) if isinstance(plan.cell.base, ImageBase) else ()
    for path in dict.fromkeys((*places, *plan.directories)):
        yield tar.Entry(
            path=path.lstrip("/"), kind=tar.Kind.DIRECTORY, mode=0o775, uid=int(uid), gid=int(gid), mtime=plan.epoch
        )


def _with_parents(entries: Iterable[tar.Entry], foundation: Foundation, epoch: int) -> Iterator[tar.Entry]:
    """Yield the entries, each after its directories; those that the base has stay what they are there."""
    seen: set[str] = set()
    for entry in entries:
        for parent in parents(entry.path, seen):
            own = parent.path.startswith(PREFIX.lstrip("/"))
            mode, uid, gid, mtime = foundation.directories.get(
                parent.path, (DIRECTORY, 0, 0, TIME) if own else (0o755, 0, 0, epoch)
            )
            yield dataclasses.replace(parent, mode=mode, uid=uid, gid=gid, mtime=mtime)
        if entry.path not in seen:
            seen.add(entry.path)
            yield entry
