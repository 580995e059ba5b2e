"""Bytecode: what the standard library would write, whatever the order and the workers; no base makes it do harm."""

from __future__ import annotations

import importlib.util
import io
import itertools
import os
import re
import stat
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builder.engines.oci import bytecode
from builder.engines.oci.bytecode import Interpreter, cache_path, compile_sources, interpreter
from builder.errors import ToolError

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
SEARCH = ("/usr/local/bin", "/usr/bin")

# What one file leaves interned is a constant of another: compiled by one process, their order shows.
SETS = b"def f(x):\n    return x in {'alpha_q', 'beta_q'}\ndef g(x):\n    return x in {'alpha_q', 'beta_q'}\n"
NAMES = b"alpha_q = beta_q = 'gamma_q', ('delta_q', 1.5)\n"
PLAIN = b"def gamma_q(x):\n    return (('delta_q', 1.5), 'a b', 10**9, b'delta_q', x[1:2])\n"
NAME = "é = 1\n".encode()
CONSTANT = "x = ['é', 'é']\n".encode()
SOURCES = {
    "/p/constant.py": CONSTANT,
    "/p/name.py": NAME,
    "/p/sets.py": SETS,
    "/p/names.py": NAMES,
    "/p/plain.py": PLAIN,
    "/p/empty.py": b"",
}

ODD = {
    "coding": "# coding: latin-1\nx = 'ä'\n".encode("latin-1"),
    "mark": b"\xef\xbb\xbfx = 1\n",
    "lines": b"x = 1\r\ny = 2\r\n",
    "warning": b"x = 1 is 1, '\\d'\n",
    "module": Path(bytecode.__file__).read_bytes(),
}
BAD = {
    "syntax": b"print 'python 2'\n",
    "nul": b"x = 1\0\n",
    "coding": b"# coding: no-such\n",
    "utf8": b"x = '\xff'\n",
    "deep": b"x = " + b"(" * 5000,
}


@pytest.fixture(scope="module")
def here() -> Interpreter:
    return Interpreter.of([sys.executable])


def compiled(here: Interpreter, sources: Mapping[str, bytes], *, workers: int = 1) -> dict[str, bytes | None]:
    return dict(compile_sources(here, sources.items(), workers=workers))


# --------------------------------------------------------------------------- what is written


def test_the_interpreter_says_who_it_is(here: Interpreter) -> None:
    assert here.version == sys.version.split()[0]
    assert here.tag == sys.implementation.cache_tag
    assert here.magic == importlib.util.MAGIC_NUMBER


@pytest.mark.parametrize("path", ["/a/b.py", "/a/b.c.py", "b.py", "/a/__init__.py"])
def test_the_place_is_where_python_looks(here: Interpreter, path: str) -> None:
    assert cache_path(path, here.tag) == importlib.util.cache_from_source(path, optimization="")


@pytest.mark.parametrize("name", ODD)
def test_it_is_what_the_standard_library_writes(here: Interpreter, tmp_path: Path, name: str) -> None:
    source, target = tmp_path / "x.py", tmp_path / "x.pyc"
    source.write_bytes(ODD[name])
    script = (
        "import py_compile, sys; a, b, c = sys.argv[1:]; py_compile.compile(a, b, c, doraise=True,"
        " invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, source, target, "/opt/é/x.py"], check=True)
    assert compiled(here, {"/opt/é/x.py": ODD[name]}) == {"/opt/é/x.py": target.read_bytes()}


def test_what_does_not_compile_is_none_and_harms_no_other(here: Interpreter) -> None:
    sources = {f"/{name}.py": content for name, content in BAD.items()}
    found = compiled(here, {**sources, "/good.py": PLAIN})
    assert {path for path, content in found.items() if content is None} == set(sources)
    assert found["/good.py"] == compiled(here, {"/good.py": PLAIN})["/good.py"]


def test_warnings_are_not_printed(here: Interpreter, capfd: pytest.CaptureFixture[str]) -> None:
    assert compiled(here, {"/x.py": ODD["warning"]})["/x.py"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("workers", [1, 3])
def test_neither_order_nor_company_nor_workers_show(here: Interpreter, workers: int) -> None:
    alone = {path: compiled(here, {path: content})[path] for path, content in SOURCES.items()}
    assert None not in alone.values()
    for order in itertools.islice(itertools.permutations(SOURCES.items()), 0, None, 29):
        found = list(compile_sources(here, order, workers=workers))
        assert [path for path, _ in found] == [path for path, _ in order]
        assert dict(found) == alone


def test_a_trace_of_one_file_does_not_show_in_the_next(here: Interpreter) -> None:
    """A character that one file leaves interned; in one process the next file would show it."""
    stars = {f"/{n}.py": f"from m{n} import *\nx{n} = ['*', '*']\n".encode() for n in range(40)}
    assert compiled(here, stars) == {path: compiled(here, {path: content})[path] for path, content in stars.items()}
    together = "import marshal, sys\nfor path, source in eval(sys.stdin.read()):\n"
    together += "    sys.stdout.buffer.write(marshal.dumps(compile(source, path, 'exec', dont_inherit=True)))\n"
    pairs = [("/name.py", NAME), ("/constant.py", CONSTANT)]
    dumps = [
        subprocess.run([sys.executable, "-c", together], input=repr(order).encode(), stdout=subprocess.PIPE, check=True)
        for order in (pairs, pairs[1:])
    ]
    assert not dumps[0].stdout.endswith(dumps[1].stdout), "one process shows nothing any more: no forks are needed"


def test_the_environment_of_the_user_does_not_show(here: Interpreter, monkeypatch: pytest.MonkeyPatch) -> None:
    before = compiled(here, SOURCES)
    for name, value in (("PYTHONHASHSEED", "7"), ("PYTHONOPTIMIZE", "2"), ("PYTHONWARNINGS", "error"), ("LC_ALL", "C")):
        monkeypatch.setenv(name, value)
    assert compiled(Interpreter.of([sys.executable]), SOURCES | {"/w.py": ODD["warning"]}) | before == {
        **before,
        "/w.py": compiled(here, {"/w.py": ODD["warning"]})["/w.py"],
    }


@settings(max_examples=10, deadline=None)
@given(contents=st.lists(st.binary(max_size=200) | st.sampled_from([*SOURCES.values(), *ODD.values()]), max_size=40))
def test_any_sources_come_back_in_order(contents: list[bytes]) -> None:
    sources = [(f"/{number}.py", content) for number, content in enumerate(contents)]
    found = list(compile_sources(Interpreter.of([sys.executable]), sources, workers=2))
    assert [path for path, _ in found] == [path for path, _ in sources]


def test_sources_are_taken_as_they_are_needed(here: Interpreter) -> None:
    taken = 0

    def sources() -> Iterator[tuple[str, bytes]]:
        nonlocal taken
        while True:
            taken += 1
            yield f"/{taken}.py", b"x = 1\n"

    with_end = compile_sources(here, sources(), workers=2)
    for _ in range(5):
        next(with_end)
    assert taken < 10 * bytecode._MOST_TOGETHER
    with_end.close()


# --------------------------------------------------------------------------- children that fail


def fake(here: Interpreter, script: str) -> Interpreter:
    """Return an interpreter whose child reads one request, less or more, and runs `script`."""
    # What follows is ignored as arguments: the flags and the real child.
    return Interpreter(
        version=here.version,
        magic=here.magic,
        tag=here.tag,
        command=(sys.executable, "-c", f"import os, sys, time\n{script}"),
        environment={},
    )


BREAKS = {
    "at once": ("sys.exit(3)", "status 3"),
    "killed": ("os.kill(os.getpid(), 11)", "signal 11"),
    "in its words": ("os.read(0, 9); sys.exit('no memory left')", "no memory left"),
    "in the middle": ("os.read(0, 99); os.write(1, b'\\x09\\0\\0\\0abc')", "status 0"),
    "garbage": ("os.read(0, 99); os.write(1, b'\\x14\\0\\0\\0' + bytes(20)); time.sleep(60)", "as it should"),
    "truncated": ("os.read(0, 99); os.write(1, b'\\x04\\0\\0\\0' + MAGIC); time.sleep(60)", "as it should"),
    "huge": ("os.read(0, 99); os.write(1, b'\\xff' * 99); time.sleep(60)", "as it should"),
    "silent": ("time.sleep(60)", "no answer within 0.5 s"),
    "a bit of an answer": ("os.write(1, b'\\x04'); time.sleep(60)", "no answer within 0.5 s"),
}


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("size", [10, 1 << 20])
def test_a_child_that_breaks_is_an_error_that_says_so(
    here: Interpreter, monkeypatch: pytest.MonkeyPatch, how: str, size: int
) -> None:
    if size > 1 << 16 or "no answer" in BREAKS[how][1]:
        monkeypatch.setattr(bytecode, "DEADLINE_S", 0.5)
    script, said = BREAKS[how]
    broken = fake(here, script.replace("MAGIC", repr(here.magic)))
    began = time.monotonic()
    with pytest.raises(ToolError) as raised:
        list(compile_sources(broken, [(f"/{n}.py", b" " * size) for n in range(20)], workers=2))
    if size < 1 << 16 or "no answer" in said:
        # A long request may break in the middle of being sent, before the child could say anything.
        assert said in raised.value.problems[0].why
    assert "/0.py" in raised.value.problems[0].what
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("answer", [b"", b"3.11.2\n../../x\na70d0d0a\n", b"\xff" * 60, b"3.11.2\ncpython-311\n00\n"])
def test_whoever_is_no_python_is_refused(answer: bytes) -> None:
    content = len(answer).to_bytes(4, "little") + answer
    with pytest.raises(ToolError, match="does not work"):
        Interpreter.of([sys.executable, "-c", f"import os; os.read(0, 99); os.write(1, {content!r})"])


def test_a_program_that_is_none_is_refused(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_bytes(b"\x7fELF not for this machine")
    program.chmod(0o755)
    with pytest.raises(ToolError, match="does not run on this machine"):
        Interpreter.of([str(program)])


def test_children_end_with_the_reader(here: Interpreter, tmp_path: Path) -> None:
    script = (
        f"open({str(tmp_path)!r} + '/' + str(os.getpid()), 'w').close()\nsys.argv = sys.argv[-2:]; exec(sys.argv[0])"
    )
    reader = compile_sources(fake(here, script), ((f"/{n}.py", b"") for n in range(99)), workers=2)
    next(reader)
    reader.close()
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def child(here: Interpreter, *, limit: str) -> subprocess.Popen[bytes]:
    command = [*here.command, *bytecode._FLAGS, "-c", bytecode._CHILD, limit]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def test_a_child_ends_with_its_parent(here: Interpreter) -> None:
    with child(here, limit="60") as process:
        process.communicate(b"\x01\0\0", timeout=20)
    assert process.returncode == 0


def test_a_child_that_nobody_waits_for_ends_itself(here: Interpreter) -> None:
    source = b"x = 1 + y\n" * 1_000_000
    with child(here, limit="1") as process:
        process.communicate(b"\x01\0\0\0\x01\0\0\0p" + len(source).to_bytes(4, "little") + source, timeout=60)
    assert process.returncode != 0


# --------------------------------------------------------------------------- out of a base


def opens(*layers: bytes) -> list[Callable[[], BinaryIO]]:
    return [lambda content=content: Stream(content) for content in layers]  # type: ignore[misc]


class Stream(io.BytesIO):
    """What a decompressor gives: bytes in one direction."""

    def seekable(self) -> bool:
        return False

    def seek(self, *_: int) -> int:
        raise io.UnsupportedOperation("seek")

    def tell(self) -> int:
        raise io.UnsupportedOperation("tell")


def tar(entries: Mapping[str, bytes | str | tarfile.TarInfo]) -> bytes:
    """Return a layer: files as bytes, symbolic links as text."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as made:
        for name, what in entries.items():
            member = what if isinstance(what, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(what, str):
                member.type, member.linkname = tarfile.SYMTYPE, what
            content = what if isinstance(what, bytes) else b""
            member.size = len(content)
            made.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.fixture(scope="module")
def base() -> dict[str, bytes | str]:
    """The Python that runs this test, laid out as a base with merged /usr has it."""
    executable = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
    with executable.open("rb") as file:
        loader = bytecode._program_interpreter(file)
    if not loader:
        pytest.skip("this Python is linked statically")
    listed = subprocess.run([loader, "--list", executable], capture_output=True, text=True, check=True).stdout
    files: dict[str, bytes | str] = {
        "lib": "usr/lib",
        "lib64": "/usr/lib64",
        f"usr/local/bin/python{PYTHON}": executable.read_bytes(),
    }
    files["usr/local/bin/python3"] = f"python{PYTHON}"
    where = Path(loader).resolve()
    files[f"usr/lib/some-linux-gnu/{where.name}"] = where.read_bytes()
    files[loader.lstrip("/").replace("lib", "usr/lib", 1)] = f"/lib/some-linux-gnu/{where.name}"
    for name, path in re.findall(r"(\S+) => (\S+)", listed):
        files[f"usr/lib/some-linux-gnu/{name}.9"] = Path(path).read_bytes()
        files[f"usr/lib/some-linux-gnu/{name}"] = f"{name}.9"
    stdlib = Path(sysconfig.get_path("stdlib"))
    for pattern in (
        "*.py",
        "encodings/*.py",
        "collections/*.py",
        "importlib/*.py",
        "re/*.py",
        "lib-dynload/unicodedata.*",
    ):
        for path in stdlib.glob(pattern):
            files[f"usr/local/lib/python{PYTHON}/{path.relative_to(stdlib)}"] = path.read_bytes()
    return files


def test_the_python_of_a_base_compiles_as_it_does_where_it_is(
    here: Interpreter, base: dict[str, bytes | str], scratch: Path
) -> None:
    half = len(base) // 2
    layers = [dict(list(base.items())[:half]), dict(list(base.items())[half:])]
    with interpreter(opens(*map(tar, layers)), python=PYTHON, search=SEARCH, scratch=scratch) as found:
        assert (found.version, found.magic, found.tag) == (here.version, here.magic, here.tag)
        assert all(
            str(scratch) in part for part in (found.command[0], found.command[-1], found.environment["PYTHONHOME"])
        )
        assert compiled(found, SOURCES, workers=2) == compiled(here, SOURCES)
    assert list(scratch.iterdir()) == []


def test_a_later_layer_wins(base: dict[str, bytes | str], scratch: Path) -> None:
    stdlib = f"usr/local/lib/python{PYTHON}"
    broken = {**base, f"{stdlib}/encodings/__init__.py": b"1/0"}
    fixed = {f"{stdlib}/encodings/__init__.py": base[f"{stdlib}/encodings/__init__.py"]}
    with interpreter(opens(tar(broken), tar(fixed)), python=PYTHON, search=SEARCH, scratch=scratch) as found:
        assert compiled(found, SOURCES)
    with (
        pytest.raises(ToolError, match="does not work"),
        interpreter(
            opens(tar(base), tar({f"{stdlib}/encodings/__init__.py": b"1/0"})),
            python=PYTHON,
            search=SEARCH,
            scratch=scratch,
        ),
    ):
        pass
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    "whiteout", [f"usr/local/bin/.wh.python{PYTHON}", "usr/local/.wh.bin", "usr/local/bin/.wh..wh..opq"]
)
def test_what_a_later_layer_removed_is_gone(base: dict[str, bytes | str], scratch: Path, whiteout: str) -> None:
    layers = opens(tar(base), tar({whiteout: b""}))
    with (
        pytest.raises(ToolError, match="has no python"),
        interpreter(layers, python=PYTHON, search=SEARCH, scratch=scratch),
    ):
        pass
    program = f"usr/local/bin/python{PYTHON}"
    layers = opens(tar(base), tar({program: base[program], whiteout: b""}))
    with interpreter(layers, python=PYTHON, search=SEARCH, scratch=scratch) as found:
        assert found.version


def test_a_library_of_this_machine_is_not_used(base: dict[str, bytes | str], scratch: Path) -> None:
    name = next((path for path in base if path.endswith("/libm.so.6")), None)
    if name is None:
        pytest.skip("this Python needs no libm")
    lacking = {path: content for path, content in base.items() if not path.startswith(name)}
    with (
        pytest.raises(ToolError) as raised,
        interpreter(opens(tar(lacking)), python=PYTHON, search=SEARCH, scratch=scratch),
    ):
        pass
    assert "libm.so.6" in raised.value.problems[0].why


def test_libraries_beside_python_come_first(base: dict[str, bytes | str], scratch: Path) -> None:
    name = next((path for path in base if path.endswith("/libm.so.6.9")), None)
    if name is None:
        pytest.skip("this Python needs no libm")
    two = {**base, name: b"another Python's", "usr/local/lib/libm.so.6": base[name]}
    with interpreter(opens(tar(two)), python=PYTHON, search=SEARCH, scratch=scratch) as found:
        assert compiled(found, SOURCES)


WITHOUT: Mapping[str, tuple[Mapping[str, bytes | str | tarfile.TarInfo], str]] = {
    "no python": ({}, "has no python"),
    "a script": ({f"usr/bin/python{PYTHON}": b"#!/bin/sh\n"}, "no program of 64-bit Linux"),
    "32 bits": ({f"usr/bin/python{PYTHON}": b"\x7fELF\x01\x01" + bytes(99)}, "no program of 64-bit Linux"),
    "cut short": ({f"usr/bin/python{PYTHON}": b"\x7fELF\x02\x01" + bytes(9)}, "no program of 64-bit Linux"),
    "hollow": ({f"usr/bin/python{PYTHON}": b"\x7fELF\x02\x01" + b"\xff" * 99}, "no program of 64-bit Linux"),
    "a circle": ({"usr/bin": "/a", "a": "/b", "b": "/a"}, "has no python"),
    "to itself": ({f"usr/bin/python{PYTHON}": f"python{PYTHON}"}, "has no python"),
}  # fmt: skip


@pytest.mark.parametrize("how", WITHOUT)
def test_a_base_without_a_python_that_runs_is_refused(scratch: Path, how: str) -> None:
    entries, said = WITHOUT[how]
    layers = opens(tar(entries))
    with (
        pytest.raises(ToolError, match=said),
        interpreter(layers, python=PYTHON, search=SEARCH, scratch=scratch),
    ):
        pass
    assert list(scratch.iterdir()) == []


def test_another_architecture_is_named(base: dict[str, bytes | str], scratch: Path) -> None:
    loader = next(path for path in base if re.search(r"gnu/ld-", path))
    content = base[loader]
    assert isinstance(content, bytes)
    other = {**base, loader: content[:18] + b"\xf3\xf3" + content[20:]}
    with (
        pytest.raises(ToolError, match="does not run on this machine") as raised,
        interpreter(opens(tar(other)), python=PYTHON, search=SEARCH, scratch=scratch),
    ):
        pass
    assert "architecture" in " ".join(raised.value.problems[0].tries)


def test_a_base_of_another_version_is_refused(base: dict[str, bytes | str], scratch: Path) -> None:
    renamed = {path.replace(PYTHON, "3.8"): content for path, content in base.items()}
    renamed["usr/local/bin/python3"] = "python3.8"
    # The library keeps its name: it is where this Python looks for it.
    renamed.update({path: content for path, content in base.items() if "/lib/python" in path})
    with pytest.raises(ToolError), interpreter(opens(tar(renamed)), python="3.8", search=SEARCH, scratch=scratch):
        pass


def test_too_much_is_refused(base: dict[str, bytes | str], scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bytecode, "MAX_UNPACKED", 1 << 20)
    with (
        pytest.raises(ToolError, match="too much"),
        interpreter(opens(tar(base)), python=PYTHON, search=SEARCH, scratch=scratch),
    ):
        pass


PARTS = (
    "usr",
    "lib",
    "bin",
    "local",
    "..",
    ".",
    "",
    f"python{PYTHON}",
    "os.py",
    "libc.so.6",
    ".wh.usr",
    ".wh..wh..opq",
    "out",
    "a\nb",
)
PATHS = st.builds(
    "{}{}".format,
    st.sampled_from(["", "/", "./", "../../"]),
    st.lists(st.sampled_from(PARTS), max_size=6).map("/".join),
)
KINDS = (tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
ENTRIES = st.lists(
    st.tuples(
        PATHS,
        st.binary(max_size=20)
        | PATHS
        | st.builds(special, PATHS, st.sampled_from(KINDS), PATHS),
    ),
    max_size=12,
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layers=st.lists(ENTRIES, min_size=1, max_size=3),
    damage=st.none() | st.tuples(st.integers(0, 4000), st.binary(max_size=9)),
)
def test_no_layer_writes_elsewhere(
    tmp_path_factory: pytest.TempPathFactory,
    layers: list[list[tuple[str, bytes | str | tarfile.TarInfo]]],
    damage: tuple[int, bytes] | None,
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    scratch = outside / "scratch"
    scratch.mkdir()
    contents = [bytearray(tar(dict(entries))) for entries in layers]
    if damage:
        contents[0][damage[0] : damage[0] + len(damage[1])] = damage[1]
    with (
        pytest.raises(ToolError),
        interpreter(opens(*map(bytes, contents)), python=PYTHON, search=SEARCH, scratch=scratch),
    ):
        pass
    assert [path.name for path in outside.iterdir()] == ["scratch"]
    assert list(scratch.iterdir()) == []


def test_links_lead_nowhere_outside(base: dict[str, bytes | str], scratch: Path, tmp_path: Path) -> None:
    target = tmp_path / "outside"
    target.mkdir()
    hostile = {
        **base,
        "usr/local/lib/escape": str(target),
        "usr/local/lib/escape/libevil.so": b"evil",
        f"usr/local/lib/python{PYTHON}/../../../../../../../../../..{target}/libevil.so": b"evil",
        "usr/lib/libup.so": "../" * 30 + "etc/hostname",
        "etc/hostname": b"not this machine's",
    }
    with interpreter(opens(tar(hostile)), python=PYTHON, search=SEARCH, scratch=scratch) as found:
        root = Path(found.environment["PYTHONHOME"]).parents[1]
        assert all(stat.S_ISREG(path.lstat().st_mode) or path.is_dir() for path in root.rglob("*"))
        assert not [path for path in root.rglob("*") if path.is_symlink()]
    assert list(target.iterdir()) == []
