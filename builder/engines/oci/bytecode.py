"""Sources → .pyc files, made by the Python of the image itself, on this machine: no container, no root, no install.

Without them each start compiles all that it imports. Only the image's own Python writes what it will read, so that
is unpacked from the layers of the base, as far as it is needed to compile, and started through the base's own loader.

A .pyc here is a function of (interpreter, path, source) and of nothing else. Compiling many files in one process does
not give that (python/cpython#129724): strings stay interned, and `marshal` writes interned ones differently. One
`from x import *` is enough to make "*" such a string for files that follow. Of the 5617 sources of one image 18 to 20
came out differently in another order on Python 3.11.2; on 3.13.0 4 were not what they are when compiled alone. So files
are compiled by forks of a process that has compiled nothing, each until one leaves such a trace: a fork for every file
cost 2 ms beside the 3 ms of compiling it, and traces are rare.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import shutil
import signal
import struct
import subprocess
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from queue import SimpleQueue
from typing import IO, BinaryIO, Self

from builder.errors import ToolError
from builder.program import tail

RECIPE = 1
"""Raise it with every change of what the same interpreter gives for the same source; part of a layer's key."""

DEADLINE_S = 120.0
"""For one file; the slowest of 5627 takes half a second."""
MAX_FILE = 128 << 20
"""Bytes of one file of the base; a larger library is none that Python needs (a CUDA base has such)."""
MAX_UNPACKED = 2 << 30
_MAX_ANSWER = 1 << 30
_MAX_LINKS = 40
"""Links followed for one path: the kernel's limit."""
_PIECE = 1 << 20
_MOST_TOGETHER = 32
"""Sources in one request: 200 took no less time, and a process can tell fewer than 255 by its status."""
_IDENTITY = re.compile(rb"(\d+\.\d+\.\d+\S{0,20})\n([a-z]+-\d+)\n([0-9a-f]{8})\n(.*)", re.DOTALL)
_NONSENSE = "it does not answer as it should"
_UNUSABLE = "the Python of the base does not work"

# Everything that could make one machine's run another's: hashes, locale and paths of the user.
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "PYTHONCOERCECLOCALE": "0"}
_FLAGS = ("-S", "-s", "-B", "-W", "ignore")

# What runs in the base's Python, 3.9 or newer. It imports next to nothing: what a module brings in is interned, and
# some of it is in no interpreter but the official builds. A frame is a length of four bytes and the content. A request
# is a number in four bytes and as many pairs of frames, path and source; an answer is a frame for each, empty if the
# source does not compile. No pairs ask who answers. The alarm, later than our deadline, ends a child that hangs when
# nobody is left to end it.
#
# What one file leaves behind for the next: strings of one character are shared by all, so one that was interned stays
# so; after it the next file is compiled by another fork. Letters and digits do not matter, for they are interned in
# every file that has them. And since Python 3.12 all interned strings stay: a frozenset of such is made anew, and no
# longer the same as its equals in the file. So a file with a constant that is not simple is compiled as a fork's first.
_CHILD = """
import sys
sys.path.pop(0)
import _imp, gc, marshal, posix
from _frozen_importlib_external import MAGIC_NUMBER
from _signal import alarm

LIMIT = int(sys.argv[1])
HEADER = MAGIC_NUMBER + (1).to_bytes(4, "little")
KEY = int.from_bytes(MAGIC_NUMBER, "little")

def read(descriptor, size):
    parts = []
    while size:
        piece = posix.read(descriptor, min(size, 1 << 20))
        if not piece:
            break
        parts.append(piece)
        size -= len(piece)
    return b"".join(parts)

def receive():
    return read(0, int.from_bytes(read(0, 4), "little"))

def send(content):
    rest = memoryview(len(content).to_bytes(4, "little") + content)
    while rest:
        rest = rest[posix.write(1, rest):]

def identity():
    descriptor = posix.open("/proc/self/maps", posix.O_RDONLY)
    text = "\\n".join((sys.version.split()[0], sys.implementation.cache_tag, MAGIC_NUMBER.hex(), ""))
    return text.encode() + read(descriptor, 1 << 30)

def is_simple(value):
    if type(value) is CODE:
        return all(map(is_simple, value.co_consts))
    return all(map(is_simple, value)) if type(value) is tuple else type(value) in SIMPLE

def compiled(path, source, first=True):
    # No answer at all if it could be another than that of a process in which the file is the first.
    alarm(LIMIT)
    # Held until the end, as by the standard library: marshal writes an object with one owner differently.
    name = path.decode("utf-8", "surrogateescape")
    try:
        code = compile(source, name, "exec", dont_inherit=True, optimize=0)
        if not first and not is_simple(code):
            return None
        return HEADER + _imp.source_hash(KEY, source) + marshal.dumps(code)
    except Exception:
        return b""
    finally:
        alarm(0)

CODE = type(compiled.__code__)
SIMPLE = (str, bytes, int, float, complex, bool, type(None), type(Ellipsis))
CHARACTERS = tuple(map(chr, range(256)))
TRACES = tuple(one for one in CHARACTERS if not ("a" + one).isidentifier() or ord(one) > 127)
FAILED = 255

def isolated(pairs):
    # Compile the first of them in a fork, as many as leave no trace and one more, and return how many that were.
    child = posix.fork()
    if child:
        status = posix.waitpid(child, 0)[1]
        if status & 255 or status >> 8 == FAILED:
            posix._exit(1)
        return status >> 8
    status = FAILED
    try:
        clean = marshal.dumps(TRACES)
        done = 0
        for path, source in pairs:
            answer = compiled(path, source, not done)
            if answer is None:
                break
            send(answer)
            done += 1
            if marshal.dumps(TRACES) != clean:
                break
        status = done
    finally:
        posix._exit(status)

# What the first compilation sets up, each fork would set up again: 1 ms.
compiled(b"warm", b"def f(a): return a")
# Interned where the standard library was loaded from .pyc files, as usual, and not where it was compiled just now.
# With it all of Debian's own 637 files are what its `compileall` writes, without it all but 47.
star = sys.intern("*")
gc.disable()
gc.freeze()
while True:
    number = read(0, 4)
    if len(number) < 4:
        break
    pairs = [(receive(), receive()) for _ in range(int.from_bytes(number, "little"))]
    if not pairs:
        send(identity())
    while pairs:
        del pairs[:isolated(pairs)]
"""


def cache_path(path: str, tag: str) -> str:
    """Return where Python looks for the compiled form of the source at `path`."""
    source = PurePosixPath(path)
    return str(source.parent / "__pycache__" / f"{source.stem}.{tag}.pyc")


# ----------------------------------------------------------------------------------------------------
# The interpreter


@dataclass(frozen=True, kw_only=True)
class Interpreter:
    """A Python that can be started: `version` in full, and what its .pyc files begin with and are named after."""

    version: str
    magic: bytes
    tag: str
    command: tuple[str, ...]
    environment: Mapping[str, str]

    @classmethod
    def of(
        cls, command: Sequence[str], environment: Mapping[str, str] | None = None, *, inside: Path | None = None
    ) -> Self:
        """Ask the Python that `command` starts who it is; raises ToolError if it does not run or answer.

        With `inside`, it is refused if a shared library of it comes from elsewhere: the loader falls back to this
        machine's own where the base has none.
        """
        variables = {**_ENVIRONMENT, **(environment or {})}
        with contextlib.closing(_Child(command, variables)) as child:
            child.ask(())
            answer = child.answer()
        known = _IDENTITY.fullmatch(answer)
        if known is None:
            raise _broken(_NONSENSE, what=_UNUSABLE)
        version, tag, magic, maps = map(os.fsdecode, known.groups())
        if inside is not None:
            _require_inside(maps.splitlines(), inside)
        return cls(version=version, magic=bytes.fromhex(magic), tag=tag, command=tuple(command), environment=variables)


def _require_inside(maps: Sequence[str], root: Path) -> None:
    paths = {line.split(maxsplit=5)[-1] for line in maps if "/" in line}
    foreign = sorted(path for path in paths if ".so" in Path(path).name and not Path(path).is_relative_to(root))
    if foreign:
        raise ToolError(
            "the Python of the base needs libraries that were not found in it",
            why=f"this machine's were used instead: {', '.join(foreign)}",
            tries=("use a base whose Python has its libraries in /lib, /usr/lib, /usr/local/lib or beside it",),
        )


@contextlib.contextmanager
def interpreter(
    tars: Sequence[Callable[[], AbstractContextManager[BinaryIO]]], *, python: str, search: Sequence[str], scratch: Path
) -> Iterator[Interpreter]:
    """Unpack the Python of a base into a directory of `scratch` and yield it; the directory is gone afterwards.

    `tars` open the base's layers, lowest first, as uncompressed tar streams; `search` is PATH in the image. Raises
    ToolError if `python` ("3.11") is not there, or its programs do not run on this machine.
    """
    with tempfile.TemporaryDirectory(dir=scratch, prefix="python-", ignore_cleanup_errors=True) as directory:
        # The kernel's names of libraries are compared with it.
        root = Path(directory).resolve()
        files = _Files(root / "files", python=python, search=search)
        for number, opened in enumerate(tars):
            with opened() as stream:
                _take(files, stream, number)
        found = Interpreter.of(*_laid_out(files, root / "root"), inside=root)
        if not found.version.startswith(f"{python}."):
            raise ToolError(
                f"the base's python{python} is Python {found.version}",
                tries=("correct `python` of the base in matrix.yaml",),
            )
        yield found


# ----------------------------------------------------------------------------------------------------
# Unpacking


class _Files:
    """What Python needs of a file system made of layers: files under numbers in `directory`, links as values only.

    So no name and no link of a layer can make anything be written elsewhere. Keys of `files` and `links` are paths
    without a link above the last part.
    """

    def __init__(self, directory: Path, *, python: str, search: Sequence[str]) -> None:
        self.python = python
        self.search = [path.strip("/") for path in search]
        self.files: dict[str, Path] = {}
        self.links: dict[str, str] = {}
        self._directory = directory
        directory.mkdir()
        self._size = 0
        self._count = 0
        prefixes = {"", "usr", "usr/local", *(path.rpartition("/")[0] for path in self.search)}
        # Extension modules too: names beyond ASCII need unicodedata, some declared encodings a codec.
        prefix = "|".join(re.escape(f"{one}/" if one else "") for one in sorted(prefixes))
        name = r"[\w.+-]{1,200}"
        self._wanted = re.compile(
            rf"(?:{prefix})(?:bin/python{name}"
            rf"|(?P<library>lib(?:32|64)?/(?:[\w.]+-linux-?{name}/)?{name}\.so[\w.]{{0,40}})"
            rf"|lib(?:64)?/python{re.escape(python)}/(?:lib-dynload/{name}\.so"
            rf"|(?!site-packages/|dist-packages/|test/)(?:{name}/){{0,9}}{name}\.py))",
            re.ASCII,
        )

    def wanted(self, path: str) -> bool:
        """Tell whether Python may need the file."""
        return self._wanted.fullmatch(path) is not None

    def libraries(self, prefix: str) -> list[str]:
        """Return the directories that hold shared libraries, those of `prefix` first.

        Beside a Python of its own in /usr/local an image may have Debian's, with a library of the same name.
        """
        matches = ((path, self._wanted.fullmatch(path)) for path in self.files)
        found = {path.rpartition("/")[0] for path, match in matches if match and match["library"]}
        return sorted(found, key=lambda path: (not PurePosixPath(path).is_relative_to(prefix), path))

    def resolve(self, path: str) -> str:
        """Return where `path` leads, every link followed as in the image; empty if it leads in a circle."""
        todo = list(reversed(PurePosixPath(path).parts))
        at: list[str] = []
        followed = 0
        while todo:
            part = todo.pop()
            if part == "/":
                at = []
            elif part == "..":
                at = at[:-1]
            elif (target := self.links.get("/".join([*at, part]))) is None:
                at.append(part)
            else:
                followed += 1
                if followed > _MAX_LINKS:
                    return ""
                todo.extend(reversed(PurePosixPath(target).parts))
        return "/".join(at)

    def place(self, name: str) -> str:
        """Return the path at which an entry of this name comes to lie; empty for one that has no place."""
        path = PurePosixPath("/", name)
        if path.name in ("", ".."):
            return ""
        return f"{self.resolve(str(path.parent))}/{path.name}".lstrip("/")

    def remove(self, path: str) -> None:
        """Drop what lies at `path` itself."""
        self.files.pop(path, None)
        self.links.pop(path, None)

    def keep(self, path: str, content: IO[bytes], size: int) -> None:
        """Take the content of a file."""
        self._size += size
        if self._size > MAX_UNPACKED:
            raise ToolError(
                "too much would be unpacked to run the Python of the base",
                why=f"its libraries have more than {MAX_UNPACKED >> 20} MB",
                tries=("use a smaller base",),
            )
        self._count += 1
        kept = self._directory / str(self._count)
        with kept.open("xb") as file:
            shutil.copyfileobj(content, file, _PIECE)
        self.files[path] = kept


def _take(files: _Files, stream: BinaryIO, number: int) -> None:
    """Add one layer; whiteouts hide what lies below it, wherever in the layer they stand."""
    fresh: set[str] = set()
    hidden: set[str] = set()
    try:
        with tarfile.open(fileobj=stream, mode="r|") as members:
            for member in members:
                path = files.place(member.name)
                directory, _, name = path.rpartition("/")
                if name == ".wh..wh..opq":
                    hidden.add(f"{directory}/")
                elif name.startswith(".wh."):
                    hidden.add(f"{directory}/{name.removeprefix('.wh.')}".lstrip("/"))
                elif path:
                    fresh.add(path)
                    _put(files, path, member, members)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise ToolError(
            "a layer of the base cannot be read", where=f"layer {number + 1}", why=str(error), tries=("fetch it again",)
        ) from error
    if hidden:
        for path in [path for path in (*files.files, *files.links) if path not in fresh and _is_under(path, hidden)]:
            files.remove(path)


def _is_under(path: str, hidden: set[str]) -> bool:
    """Tell whether `path` is one of these, or below one; those that end in a slash hide only what is below."""
    parents = [str(parent) for parent in PurePosixPath(path).parents][:-1]
    return path in hidden or any(parent in hidden or f"{parent}/" in hidden for parent in parents)


def _put(files: _Files, path: str, member: tarfile.TarInfo, members: tarfile.TarFile) -> None:
    files.remove(path)
    if member.issym():
        files.links[path] = member.linkname
    elif member.islnk():
        target = files.place(member.linkname)
        if target in files.links:
            files.links[path] = files.links[target]
        elif target in files.files and files.wanted(path):
            files.files[path] = files.files[target]
    elif member.isreg() and files.wanted(path) and member.size <= MAX_FILE:
        content = members.extractfile(member)
        assert content is not None, "a regular file has content"
        files.keep(path, content, member.size)


def _laid_out(files: _Files, root: Path) -> tuple[list[str], dict[str, str]]:
    """Give the files their names below `root`, and return the command and the environment that start Python."""
    executable = _executable(files)
    loader = _loader(files, executable)
    for path in list(files.links):
        target = files.resolve(path)
        if files.wanted(path) and target in files.files:
            files.files[path] = files.files[target]
    try:
        for path, kept in files.files.items():
            place = root / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.hardlink_to(kept)
    except (FileExistsError, NotADirectoryError) as error:
        raise ToolError("the layers of the base contradict each other", why=str(error)) from error
    prefix = PurePosixPath(executable).parent.parent
    command = [str(root / executable)]
    (root / executable).chmod(0o755)
    if loader:
        (root / loader).chmod(0o755)
        libraries = ":".join(str(root / directory) for directory in files.libraries(str(prefix)))
        command = [str(root / loader), "--library-path", libraries, *command]
    return command, {"PYTHONHOME": str(root / prefix)}


def _executable(files: _Files) -> str:
    for directory in files.search:
        path = files.resolve(f"{directory}/python{files.python}")
        if path in files.files:
            return path
    raise ToolError(
        f"the base has no python{files.python}",
        why=f"looked for in {', '.join(f'/{path}' for path in files.search)}",
        tries=("correct `python` of the base in matrix.yaml, or use a base that has it",),
    )


def _loader(files: _Files, executable: str) -> str:
    """Return the path of the dynamic loader that the executable names; empty if it needs none."""
    with files.files[executable].open("rb") as file:
        try:
            wanted = _program_interpreter(file)
        except (struct.error, ValueError) as error:
            raise ToolError(
                "the Python of the base is no program of 64-bit Linux",
                where=f"/{executable}",
                why=str(error),
                tries=("use a base whose Python is not a script",),
            ) from error
    path = files.resolve(wanted)
    if wanted and path not in files.files:
        raise ToolError("the base lacks the loader of its Python", where=f"/{executable}", why=f"it names {wanted}")
    return path


def _program_interpreter(file: BinaryIO) -> str:
    """Read PT_INTERP of an ELF file: 64-bit and little-endian, as all of torch's platforms are."""
    header = file.read(64)
    if header[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", header, 32)
    size, count = struct.unpack_from("<HH", header, 54)
    for number in range(count):
        file.seek(min(table, MAX_FILE) + number * size)
        entry = file.read(56)
        (kind,) = struct.unpack_from("<I", entry)
        (offset,) = struct.unpack_from("<Q", entry, 8)
        (length,) = struct.unpack_from("<Q", entry, 32)
        if kind == 3:
            file.seek(min(offset, MAX_FILE))
            return os.fsdecode(file.read(min(length, 4096)).rstrip(b"\0"))
    return ""


# ----------------------------------------------------------------------------------------------------
# Compiling


def compile_sources(
    interpreter: Interpreter, sources: Iterable[tuple[str, bytes]], *, workers: int
) -> Generator[tuple[str, bytes | None], None, None]:
    """Yield (path, .pyc) for each (path in the image, source), in the order given; None where it does not compile.

    The .pyc is what `compileall --invalidation-mode unchecked-hash` writes: never checked against the source. A few
    megabytes a worker are held in memory. Raises ToolError if the interpreter breaks off, hangs or answers nonsense.
    """
    assert workers > 0, workers
    idle: SimpleQueue[_Child] = SimpleQueue()
    header = interpreter.magic + (1).to_bytes(4, "little")

    def compiled(pairs: Sequence[tuple[str, bytes]]) -> list[tuple[str, bytes | None]]:
        child = idle.get()
        try:
            child.ask([(path.encode("utf-8", "surrogateescape"), source) for path, source in pairs])
            return [(path, checked(path, child.answer(path))) for path, _ in pairs]
        finally:
            idle.put(child)

    def checked(path: str, answer: bytes) -> bytes | None:
        if answer and not (answer.startswith(header) and len(answer) > 16):
            raise _broken(_NONSENSE, what=f"the Python of the base did not compile {path}")
        return answer or None

    children: list[_Child] = []
    pool = ThreadPoolExecutor(workers, thread_name_prefix="compile")
    pending: deque[Future[list[tuple[str, bytes | None]]]] = deque()
    try:
        for _ in range(workers):
            children.append(_Child(interpreter.command, interpreter.environment))
            idle.put(children[-1])
        for pairs in _together(sources):
            pending.append(pool.submit(compiled, pairs))
            if len(pending) >= 3 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        # Ended first, so that no thread waits for an answer; closed last, when none uses its pipes.
        for child in children:
            child.kill()
        pool.shutdown(cancel_futures=True)
        for child in children:
            child.close()


def _together(sources: Iterable[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    """Yield the sources, as many at a time as one request has."""
    pairs: list[tuple[str, bytes]] = []
    size = 0
    for path, source in sources:
        assert path, "a source has a path"
        pairs.append((path, source))
        size += len(source)
        if len(pairs) >= _MOST_TOGETHER or size >= _PIECE:
            yield pairs
            pairs, size = [], 0
    if pairs:
        yield pairs


class _Child:
    """One running interpreter: asked and answering through pipes, never waited for beyond the deadline."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        try:
            self._process = subprocess.Popen(
                [*command, *_FLAGS, "-c", _CHILD, f"{DEADLINE_S + 5:.0f}"],
                env=dict(environment),
                cwd="/",
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                bufsize=0,
                process_group=0,
            )
        except OSError as error:
            self._complaints.close()
            raise _cannot_start(error) from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        for pipe in (self._to, self._from):
            os.set_blocking(pipe.fileno(), False)

    def ask(self, pairs: Sequence[tuple[bytes, bytes]]) -> None:
        """Send a request: paths and sources, or none to be told who answers."""
        self._path = os.fsdecode(pairs[0][0]) if pairs else ""
        frames = (_length(content) + content for pair in pairs for content in pair)
        try:
            self._write(b"".join((len(pairs).to_bytes(4, "little"), *frames)), time.monotonic() + DEADLINE_S)
        except BrokenPipeError:
            raise self._failed() from None

    def answer(self, path: str = "") -> bytes:
        """Return the next answer: what the source at `path` compiles to."""
        self._path = path
        deadline = time.monotonic() + DEADLINE_S
        length = int.from_bytes(self._read(4, deadline), "little")
        if length > _MAX_ANSWER:
            raise self._failed(_NONSENSE)
        return self._read(length, deadline)

    def _write(self, content: bytes, deadline: float) -> None:
        rest = memoryview(content)
        while rest:
            self._wait(self._to.fileno(), select.POLLOUT, deadline)
            with contextlib.suppress(BlockingIOError):
                rest = rest[os.write(self._to.fileno(), rest[:_PIECE]) :]

    def _read(self, size: int, deadline: float) -> bytes:
        content = bytearray()
        while len(content) < size:
            self._wait(self._from.fileno(), select.POLLIN, deadline)
            piece = os.read(self._from.fileno(), min(_PIECE, size - len(content)))
            if not piece:
                raise self._failed()
            content += piece
        return bytes(content)

    def _wait(self, descriptor: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
            raise self._failed(f"no answer within {DEADLINE_S:g} s")

    def _failed(self, why: str = "") -> ToolError:
        """Say why it broke off, by its own words if it has left some."""
        if not why:
            # It closed its pipe: its end, with a status of its own, is near.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
        self.kill()
        status = self._process.wait()
        if not why:
            ended = f"by signal {-status}" if status < 0 else f"with status {status}"
            self._complaints.seek(0)
            why = f"it ended {ended}\n{tail(self._complaints.read(1 << 16).decode('utf-8', 'replace'))}".rstrip()
        if self._path:
            return _broken(why, what=f"the Python of the base did not compile {self._path}")
        return _broken(why, what=_UNUSABLE)

    def kill(self) -> None:
        """End it, and what it forked; its pipes stay open."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End it and release everything."""
        self.kill()
        self._process.wait()
        for file in (self._to, self._from, self._complaints):
            file.close()


def _length(content: bytes) -> bytes:
    return len(content).to_bytes(4, "little")


def _broken(why: str, *, what: str) -> ToolError:
    return ToolError(
        what, why=why, tries=("run it again", "if it stays, use another base: this one's Python is damaged")
    )


def _cannot_start(error: OSError) -> ToolError:
    tries: tuple[str, ...] = ()
    if error.errno == errno.ENOEXEC:
        tries = ("build on a machine of the base's architecture", "apt-get install qemu-user-static binfmt-support")
    elif error.errno == errno.EACCES:
        tries = ("set TORCHYARD_HOME to a directory on a file system that is not mounted noexec",)
    return ToolError(
        "the Python of the base does not run on this machine",
        why=error.strerror or str(error),
        tries=tries,
    )
