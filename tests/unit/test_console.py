"""What people see: errors in one style, nothing in them that steers a terminal, and JSON alone on standard output."""

import json

import pytest

from builder.console import Console, printable
from builder.errors import LockError, Problem

EVIL = "a\x1b[31mb\x07c\x9b1md\u202ee\rf"


def test_control_characters_are_neutralised() -> None:
    shown = printable(EVIL)
    assert [char for char in shown if not char.isprintable()] == []
    assert "".join(char for char in shown if char.isascii()) == "a[31mbc1mdef"
    assert printable("lines\n\tand umlauts: äöü 漢 · —") == "lines\n\tand umlauts: äöü 漢 · —"


@pytest.mark.parametrize(
    "line", ["::set-output name=a::b", "  ::error::x", "x\n ::add-mask::y", "##[error]x", "a ##[x]"]
)
def test_lines_that_a_ci_runner_obeys_are_broken(line: str) -> None:
    for shown in printable(line).splitlines():
        assert not shown.strip().startswith("::")
        assert "##[" not in shown


def test_colons_elsewhere_stay() -> None:
    assert printable("a::b, std::vector ::c # [x]") == "a::b, std::vector ::c # [x]"


def test_an_error_is_what_where_why_and_what_to_try(capsys: pytest.CaptureFixture[str]) -> None:
    problems = (Problem(what="two", why="line 1\nline 2"), Problem(what="[bold]three[/bold]"))
    Console().error(LockError("one", where="a: b", why="because", tries=("this", "that"), problems=problems))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "error one",
        "  where a: b",
        "  why   because",
        "  try   this",
        "  or    that",
        "error two",
        "  why   line 1",
        "        line 2",
        "error [bold]three[/bold]",
        "3 problems",
    ]


def test_every_part_of_an_error_is_neutralised(capsys: pytest.CaptureFixture[str]) -> None:
    Console().error(LockError(EVIL, where=EVIL, why=f"x\n{EVIL}", tries=(EVIL,)))
    _, err = capsys.readouterr()
    assert "\x1b" not in err
    assert all(char.isprintable() or char == "\n" for char in err)


def test_an_error_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    Console(as_json=True).error(LockError("one", where="a", why="b", tries=("c",)))
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "error": "LockError",
        "exit_code": 4,
        "problems": [{"what": "one", "where": "a", "why": "b", "tries": ["c"]}],
    }
    assert "error one" in err


def test_for_machines_there_is_one_document_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(as_json=True)
    console.table(("a",), [["b"]])
    console.write("text")
    console.say("progress")
    with console.steps("title") as steps, console.transfers("wheels") as transfers:
        steps.step("a step")
        transfers.start("x", 10, 0)
        transfers.advance("x", 10)
        transfers.finish("x")
    console.result([{"ü": 1}])
    out, err = capsys.readouterr()
    assert json.loads(out) == [{"ü": 1}]
    assert "progress" in err


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)
    console.say("progress")
    with console.steps("title") as steps, console.transfers("wheels") as transfers:
        steps.step("a step")
        steps.output("a line")
        transfers.start("x", 10, 0)
        transfers.advance("x", 10)
    console.write("the result")
    out, err = capsys.readouterr()
    assert (out, err) == ("the result\n", "")


def test_a_table_in_a_file_is_one_line_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    Console().table(("id", "size"), [["x" * 300, "1 GB"], ["y", "10 GB"]])
    out, _ = capsys.readouterr()
    assert [line.split() for line in out.splitlines()] == [["id", "size"], ["x" * 300, "1", "GB"], ["y", "10", "GB"]]
