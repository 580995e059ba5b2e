"""The failure catalogue: messages as people paste them, what is told of them, and how long hostile ones take."""

import importlib
import json
import re
import string
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from validate import explain
from validate.explain import Failure, catalogue, matches, named, tell
from validate.verdict import USAGE, Blame

ROOT = Path(__file__).parents[2]

MESSAGES: Sequence[Mapping[str, str]] = json.loads((ROOT / "tests" / "support" / "messages.json").read_text("ascii"))
"""Error lines: the modes to be told of each, in their order, and the issue in which it stands word for word.

Without a source: as CUDA, pip, the loader and torch name it in their own documentation.
"""
ALL = [
    pytest.param(it["modes"], it["message"], id=f"{it['modes']} {it['source'] or number}")
    for number, it in enumerate(MESSAGES)
]

TRACEBACK = """\
Traceback (most recent call last):
  File "/app/train.py", line 3, in <module>
    import torch
  File "/usr/lib/python3.11/site-packages/torch/__init__.py", line 445, in <module>
    from torch._C import *  # noqa: F403
    ^^^^^^^^^^^^^^^^^^^^^^
{}

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "/app/start.py", line 9, in <module>
    main()
RuntimeError: the worker could not be started
"""


def modes(text: str) -> str:
    return " ".join(failure.mode for failure in matches(text))


def only(text: str) -> Failure:
    (failure,) = matches(text)
    return failure


# --------------------------------------------------------------------------- messages


@pytest.mark.parametrize(("expected", "message"), ALL)
def test_messages_are_known(expected: str, message: str) -> None:
    assert modes(message) == expected


@pytest.mark.parametrize(("expected", "message"), ALL)
def test_they_are_known_in_a_traceback(expected: str, message: str) -> None:
    assert modes(TRACEBACK.format(message)) == expected


def test_every_expression_matches_a_message_of_the_tests() -> None:
    plain = [explain._plain(it["message"]) for it in MESSAGES]
    idle = [
        (failure.mode, pattern.pattern)
        for failure in catalogue().values()
        for pattern in (*failure.messages, *failure.symptoms)
        if not any(pattern.search(text) for text in plain)
    ]
    assert idle == []


@pytest.mark.parametrize(
    "text",
    [
        "NCCL INFO NET/Plugin: Plugin load returned 2 : libnccl-net.so: cannot open shared object file",
        "Epoch 0: 100%|##########| 10/10 [00:01<00:00, loss=2.6]",
        "torch 2.12.1 requires sympy>=1.13.3, but you have sympy 1.12 which is incompatible.",
        "ModuleNotFoundError: No module named 'torchvision'",
        "ModuleNotFoundError: No module named 'torch.nn.attention'",
        "PermissionError: [Errno 13] Permission denied: '/data/out.txt'",
        "Error 8040",
        "ValueError: could not convert string to float: 'x'",
    ],
)  # fmt: skip
def test_what_is_no_failure_of_the_environment_is_not_told(text: str) -> None:
    assert modes(text) == ""


# --------------------------------------------------------------------------- pasted text

GLIBC = "/lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.28' not found (required by libtorch_python.so)"


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        ("F17", "\x1b[31;1mImportError\x1b[0m: libc.so.6: version \x1b[1m`GLIBC_2.28'\x1b[0m not found"),
        ("F17", "\x1b]8;;https://example.org\x07ImportError\x1b]8;;\x07: " + GLIBC),
        ("F17", "ImportError: libc.so.6: version \u2018GLIBC_2.28\u2019 not found"),
        ("F17", f"ImportError:\r\n{GLIBC}\r\n"),
        ("F31", "api-1  | Found no NVIDIA driver on\r\napi-1  | your system. Please check\r\n"),
        ("F31", "2026-01-02T10:00:00.123456789Z Found no NVIDIA driver\n2026-01-02T10:00:00.12Z on your system.\n"),
        ("F31", "2026-01-02T10:00:00.123456789Z stderr F Found no NVIDIA driver on your system.\n"),
        ("F31", "> Found no NVIDIA driver\n> on your system.\n"),
        ("F31", "[rank0]: Found no NVIDIA driver\n[rank0]: on your system."),
        ("F31", "│ RuntimeError: Found no NVIDIA driver on your │\n│ system. Please check │"),
        ("F31", '{"log":"RuntimeError: Found no NVIDIA driver\\non your system.\\n","stream":"stderr"}'),
        ("F73", r'error: \\\"could not select device driver \\\\\\\"\\\\\\\" with capabilities: [[gpu]]\\\"'),
        ("F63", "cuda out of memory"),
        ("F48", "failed to find c compiler"),
    ],
)  # fmt: skip
def test_it_may_be_pasted_from_anywhere(expected: str, text: str) -> None:
    assert modes(text) == expected


def test_case_counts_in_long_texts() -> None:
    """A log that speaks of something is not one that reports it."""
    assert modes("cuda out of memory " + "x" * 3000) == ""


def test_the_cause_comes_before_what_follows_from_it() -> None:
    text = (
        "version `GLIBC_2.38' not found\nCUDA out of memory\nno kernel image is available for execution on the device"
    )
    assert modes(text) == "F17 F63 F43"
    assert modes(text + "\nFound no NVIDIA driver on your system") == "F17 F63 F43", "more than three help nobody"


def test_a_symptom_counts_only_where_nothing_better_is_known() -> None:
    assert modes("unhandled cuda error\nCUDA out of memory") == "F63"
    assert modes("CUBLAS_STATUS_NOT_INITIALIZED") == "F74"


def test_a_general_message_inside_a_special_one_is_not_told() -> None:
    text = "torchaudio/lib/libtorchaudio.so: undefined symbol: _ZN3c104cuda20CUDACachingAllocator9allocatorE"
    assert modes(text) == "F14"


# --------------------------------------------------------------------------- names and numbers


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("libtorchaudio.so lies torchaudio/lib/libtorchaudio.so: undefined symbol: _ZN3c10X", "_ZN3c10X"),
        ("failed to open libnvrtc-builtins.so.13.0", "nvidia-cuda-nvrtc==13.0.*"),
        ("version `GLIBC_2.38' not found", "GLIBC_2.38"),
        ("version `GLIBCXX_3.4.30' not found", "GLIBCXX_3.4.30"),
        ("The NVIDIA driver on your system is too old (found version 11040)", "11040"),
        ("nvidia-container-cli: requirement error: unsatisfied condition: cuda>=12.8", "at least 12.8"),
        ("with CUDA capability sm_120 is not compatible with the current PyTorch installation", "sm_120"),
        ("ImportError: libsndfile.so.1: cannot open shared object file", "apt-file search libsndfile.so.1"),
        ("libcudart.so.12: cannot open shared object file", "libcudart.so.12"),
        ("Permission denied: '/root/.cache/huggingface/token'", "/root/.cache/huggingface/token"),
        ("getpwuid(): uid not found: 1000700000", "1000700000"),
        ("Duplicate GPU detected : rank 3 and rank 0 both on CUDA device f000", "3 and rank 0"),
        ("torch 2.12.1 requires triton==3.7.1, but you have triton 3.6.0", "pip install 'triton==3.7.1'"),
        ("libpdbg.so.6: cannot enable executable stack as shared object requires", "--clear-execstack libpdbg.so.6"),
    ],
)  # fmt: skip
def test_what_is_told_names_what_the_message_names(message: str, words: str) -> None:
    failure = only(message)
    assert words in f"{failure.cause}\n{failure.remedy}"


def test_without_a_message_it_reads_well() -> None:
    for mode in catalogue():
        failure = named(mode)
        assert not re.search(r"[{}]", failure.cause + failure.remedy), mode


# --------------------------------------------------------------------------- the catalogue


def entries() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((ROOT / "validate" / "failures.json").read_text(encoding="ascii"))
    return document


def test_the_catalogue_is_whole() -> None:
    document = entries()
    assert list(document) == [f"F{number:02}" for number in range(1, len(document) + 1)]
    assert len(document) >= 62
    titles = [entry["title"] for entry in document.values()]
    assert len(set(titles)) == len(titles)


SOURCE = re.compile(
    r"[\w.-]+/[\w.-]+#\d+"  # an issue
    r"|[\w.-]+/[\w.-]+: \S+"  # a file of a repository
    r"|[a-z0-9-]+(?:\.[a-z0-9-]+)*\.[a-z]{2,}/\S+"  # a page
    r"|\S+ of torch \d.*"  # what lies in a wheel
)


def problems(entry: dict[str, Any]) -> Iterator[str]:
    """Yield what an entry lacks."""
    if set(entry) - {"symptoms"} != {"title", "cause", "remedy", "blame", "sources", "messages"}:
        yield f"has {sorted(entry)}"
    if entry["blame"] not in {Blame.IMAGE.value, Blame.HOST.value, Blame.UNKNOWN.value}:
        yield f"blames {entry['blame']}"
    for text in (entry["title"], entry["cause"], *entry["remedy"]):
        if not text or text.strip() != text or text[-1] in ":;," or "\n" in text:
            yield f"says {text!r}"
    if entry["title"][-1] == "." or entry["cause"][-1] == ".":
        yield "ends with a full stop"
    if not entry["remedy"] or not entry["sources"]:
        yield "has no remedy or no source"
    yield from (f"names {source}" for source in entry["sources"] if not SOURCE.fullmatch(source))


def test_every_entry_is_complete() -> None:
    found = [(mode, problem) for mode, entry in entries().items() for problem in problems(entry)]
    assert found == []


def test_placeholders_are_groups_of_the_expressions() -> None:
    for mode, failure in catalogue().items():
        wanted = {match.group(1) for match in explain._PLACEHOLDER.finditer(failure.cause + failure.remedy)}
        groups = {name for pattern in (*failure.messages, *failure.symptoms) for name in pattern.groupindex}
        assert groups - wanted == set(), f"{mode}: found and told nowhere"
        assert wanted - groups == set(), f"{mode}: told and found nowhere"


def beginning(pattern: str) -> str:
    """Return the plain text that an expression begins with: what makes it work, and what makes it quick."""
    parser = importlib.import_module("re._parser")
    text = ""

    def read(parsed: Any) -> bool:
        nonlocal text
        for operation, argument in parsed:
            if operation is parser.LITERAL:
                text += chr(argument)
            elif operation is not parser.SUBPATTERN or not read(argument[-1]):
                return False
        return True

    read(parser.parse(pattern))
    return text


def operations(parsed: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every operation of a parsed expression with what it works on, however deep."""
    for operation, argument in parsed:
        yield operation, argument
        for inner in argument if isinstance(argument, tuple) else ():
            if hasattr(inner, "data"):
                yield from operations(inner)
            elif isinstance(inner, list):
                for branch in inner:
                    if hasattr(branch, "data"):
                        yield from operations(branch)


def test_an_expression_begins_with_text_and_repeats_with_a_bound() -> None:
    parser = importlib.import_module("re._parser")
    repeats = {parser.MAX_REPEAT, parser.MIN_REPEAT}
    for pattern in (it for entry in entries().values() for it in (*entry["messages"], *entry.get("symptoms", ()))):
        assert len(beginning(pattern)) >= 3, f"{pattern}: begins with too little text"
        for operation, argument in operations(parser.parse(pattern)):
            if operation in repeats:
                _, most, inner = argument
                assert most != parser.MAXREPEAT, f"{pattern}: repeats without a bound"
                nested = [what for it, what in operations(inner) if it in repeats and what[1] > 20]
                assert most <= 3 or not nested, f"{pattern}: repeats what repeats"


def test_every_mode_of_the_checks_is_in_the_catalogue() -> None:
    used = {
        (path.name, mode)
        for path in (ROOT / "validate").rglob("*.py")
        for mode in re.findall(r"[\"'](F\d+)[\"']", path.read_text(encoding="utf-8"))
    }
    assert used, "the checks name no modes: is this test looking in the right place?"
    assert {(path, mode) for path, mode in used if mode not in catalogue()} == set()


def test_the_page_is_the_catalogue() -> None:
    assert (ROOT / "docs" / "failures.md").read_text(encoding="ascii") == explain.page(), (
        "write it anew: python -c 'from validate import explain; print(explain.page(), end=\"\")' > docs/failures.md"
    )


# --------------------------------------------------------------------------- hostile text

MEGABYTE = 1 << 20


PREFIXES = sorted(
    {beginning(pattern) for entry in entries().values() for pattern in (*entry["messages"], *entry.get("symptoms", ()))}
)


def seconds(text: str) -> float:
    started = time.process_time()
    list(matches(text))
    return time.process_time() - started


@pytest.mark.parametrize(
    "unit",
    [
        "a", "\n", "\r\n", "\\", '\\\\"', "\x00", "\x1b[", "\x1b]", "\x1b[0;", "> ", "a | ", "a" * 60 + " " * 20,
        "[rank1]: ", "2026-01-01T10:00:00Z ", "\u2502", "\u0130", "\U0001f600", "Error 80", "lib", "lib" + "a" * 70,
        "undefined symbol: ", "undefined symbol: _ZN3c10", "version `GLIBC_2.", "symbol symbol ",
        "DataLoader worker (pid 1", "Permission denied: '/", "Permission denied: '/" + "huggingfac" * 18,
        "Permission denied: '/" + ".trito" * 30,
        "ould not load library libcudnn_x.so.8 ", "symbol lookup error libcudnn", "torch 2.0 requires nvidia-",
    ],
)  # fmt: skip
def test_a_megabyte_of_anything_takes_no_time(unit: str) -> None:
    assert seconds(unit * (MEGABYTE // len(unit))) < 1


def test_a_megabyte_of_all_beginnings_takes_no_time() -> None:
    beginnings = "".join(f"{prefix}{'a' * 40} " for prefix in PREFIXES)
    assert seconds(beginnings * (MEGABYTE // len(beginnings) + 1)) < 1


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.sampled_from(PREFIXES), min_size=1, max_size=4),
    st.text(string.printable + "\x1b\u2502\u2018", max_size=8),
)
def test_no_repeated_text_takes_long(parts: list[str], filler: str) -> None:
    unit = filler.join(parts) + filler
    assert seconds(unit * (MEGABYTE // len(unit))) < 1


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300))
def test_any_text_is_read(text: str) -> None:
    assert len(list(matches(text))) <= 3


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_what_is_taken_from_a_message_is_harmless_in_a_shell(data: st.DataObject) -> None:
    """A remedy is copied into a shell, and the message it is made of may come from a stranger."""
    patterns = [
        pattern
        for failure in catalogue().values()
        for pattern in failure.messages + failure.symptoms
        if pattern.groupindex
    ]
    text = data.draw(st.from_regex(data.draw(st.sampled_from(patterns))))
    for failure in catalogue().values():
        for pattern in failure.messages + failure.symptoms:
            for match in filter(None, [pattern.search(text)]):
                for name, value in match.groupdict(default="").items():
                    quoted = failure.mode == "F11" and name == "need"
                    allowed = r"[\w.,+@/ <>=!~\[\]-]*" if quoted else r"[\w.+@/ -]*"
                    assert re.fullmatch(allowed, value, re.ASCII), (failure.mode, name, value)


# --------------------------------------------------------------------------- for people


def test_a_message_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert tell("RuntimeError: Failed to find C compiler.") == 0
    told = capsys.readouterr().out
    assert told.startswith("F48  no C compiler for Triton\n  why   ")
    assert "\n  try   apt-get install gcc libc6-dev" in told
    assert "pytorch/pytorch#116696" in told
    assert all(len(line) <= 110 for line in told.splitlines() if not line.startswith("  try "))


@pytest.mark.parametrize("mode", ["F48", " f48\n", "F048"])
def test_a_mode_is_told(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tell(mode) == 0
    assert capsys.readouterr().out.startswith("F48  ")


def test_every_mode_can_be_told_in_any_encoding(capsys: pytest.CaptureFixture[str]) -> None:
    for mode in catalogue():
        assert tell(mode) == 0
    assert capsys.readouterr().out.isascii()


def test_the_checks_that_find_it_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    tell("F31")
    assert re.search(r"\n  check torchyard validate .*--only drv\.", capsys.readouterr().out)


def test_what_is_unknown_is_said_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert tell("no such message") == 1
    told = capsys.readouterr().out
    assert told.startswith("the catalogue does not know this message\n")
    assert "torchyard validate" in told


def test_an_unknown_mode_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert tell("f999") == 1
    assert capsys.readouterr().out.startswith("the catalogue has no F999: it goes from F01 to F")


@pytest.mark.parametrize("text", ["", " \n"])
def test_nothing_is_a_mistake(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tell(text) == USAGE
    assert "torchyard explain" in capsys.readouterr().out
