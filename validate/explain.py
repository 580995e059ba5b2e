"""Error messages → cause and remedy: the failure catalogue, as data in `failures.json`, each entry with its source.

A regular expression of the catalogue begins with plain text and repeats nothing without a bound: a log of a megabyte,
whoever wrote it, is read in a moment. Its named groups stand in cause and remedy as `{name|what to say without it}`.
"""

from __future__ import annotations

import functools
import json
import pkgutil
import re
import sys
import textwrap
from dataclasses import dataclass, replace
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Match, Optional, Pattern, Tuple

from validate import check
from validate.verdict import USAGE

_MOST = 3
"""Failures told for one text: more do not help."""
_TYPED = 2000
"""Characters up to which a text may be typed by hand, upper and lower case as it comes."""
_WIDTH = 110

_PLACEHOLDER = re.compile(r"\{(\w+)\|([^{}]*)\}")
_MODE = re.compile(r"[Ff]\d{1,3}")
# Colours, titles and links of terminals.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\^_])")
# What engines, Compose, Kubernetes, torchrun and mail put before a line.
_PREFIX = re.compile(
    r"^(?:[\w.-]{1,60} {1,20}\| ?|\[?\d{4}-\d\d-\d\d[T ][\d:.,]{5,20}(?:Z|[+-]\d\d:?\d\d)?\]? |(?:stdout|stderr) [FP] "
    r"|\[rank\d{1,6}\]: ?|> ?)+",
    re.MULTILINE,
)
# Text inside JSON, once or several times over.
_QUOTED = re.compile(r"\\{1,8}([\"nrt])")
_SAME: Dict[int, Optional[str]] = {
    **dict.fromkeys(range(32)),
    **dict.fromkeys(map(ord, "\t\n\v\f\r\x1c\x1d\x1e\x1f│┃║╭╮╰╯┌┐└┘─━═❱"), " "),
    **dict.fromkeys(map(ord, "\u2018\u2019\u201a\u201b\u00b4"), "'"),
    **dict.fromkeys(map(ord, "\u201c\u201d\u201e"), '"'),
    0x7F: None,
}


@dataclass(frozen=True)
class Failure:
    """One way in which an environment fails."""

    mode: str
    """"F01"."""
    title: str
    cause: str
    remedy: str
    """Steps, one a line: commands with a note behind #, or what to do in words."""
    blame: str
    sources: Tuple[str, ...]
    """Issues as owner/repository#number, or addresses of documentation."""
    messages: Tuple[Pattern[str], ...]
    """What people see; any of these."""
    symptoms: Tuple[Pattern[str], ...]
    """What people see, too, but what has other causes: it counts where no message is known."""

    def as_json(self) -> Dict[str, Any]:
        """Return it for machines."""
        return {
            "mode": self.mode,
            "title": self.title,
            "cause": self.cause,
            "remedy": self.remedy.splitlines(),
            "blame": self.blame,
            "sources": list(self.sources),
        }

    @classmethod
    def from_json(cls, mode: str, document: Mapping[str, Any]) -> Failure:
        """Read one entry of the catalogue."""
        return cls(
            mode=mode,
            title=document["title"],
            cause=document["cause"],
            remedy="\n".join(document["remedy"]),
            blame=document["blame"],
            sources=tuple(document["sources"]),
            messages=tuple(re.compile(message, re.ASCII) for message in document["messages"]),
            symptoms=tuple(re.compile(message, re.ASCII) for message in document.get("symptoms", ())),
        )


@functools.cache
def catalogue() -> Mapping[str, Failure]:
    """Return every failure by its mode, with its placeholders."""
    content = pkgutil.get_data("validate", "failures.json")
    assert content is not None, "failures.json lies beside this module"
    return {mode: Failure.from_json(mode, entry) for mode, entry in json.loads(content).items()}


def named(mode: str) -> Failure:
    """Return a failure of the catalogue as it reads without a message; raises KeyError."""
    return _filled(catalogue()[mode], {})


def matches(text: str) -> Iterator[Failure]:
    """Yield the failures whose messages stand in `text`, three at most, with the names and numbers found in it.

    The one that stands first comes first: in a traceback that is the cause of the others.
    """
    plain = _plain(text)
    found = _found(plain, 0)
    if not found and len(plain) <= _TYPED:
        found = _found(plain, re.IGNORECASE)
    for failure, match in found[:_MOST]:
        yield _filled(failure, match.groupdict())


def _found(plain: str, flags: int) -> List[Tuple[Failure, Match[str]]]:
    """Return the failures of a text with what was found of them, messages before mere symptoms."""
    return _ranked(_first(plain, flags, symptoms=False)) or _ranked(_first(plain, flags, symptoms=True))


def _first(plain: str, flags: int, *, symptoms: bool) -> Iterator[Tuple[Failure, Match[str]]]:
    """Yield each failure with the first place where the text shows it."""
    for failure in catalogue().values():
        patterns = failure.symptoms if symptoms else failure.messages
        if flags:
            patterns = tuple(_compiled(pattern.pattern, flags) for pattern in patterns)
        hits = [hit for hit in (pattern.search(plain) for pattern in patterns) if hit]
        if hits:
            # Of two that begin alike the longer one tells more.
            yield failure, min(hits, key=lambda hit: (hit.start(), -hit.end()))


@functools.cache
def _compiled(pattern: str, flags: int) -> Pattern[str]:
    return re.compile(pattern, re.ASCII | flags)


def _ranked(found: Iterable[Tuple[Failure, Match[str]]]) -> List[Tuple[Failure, Match[str]]]:
    """Sort by place; a message that stands inside another one is the more general and is left out."""
    known = sorted(found, key=lambda it: (it[1].start(), it[0].mode))
    spans = [match.span() for _, match in known]

    def is_inside(span: Tuple[int, int]) -> bool:
        return any(start <= span[0] and span[1] <= end and (start, end) != span for start, end in spans)

    return [it for it in known if not is_inside(it[1].span())]


def _plain(text: str) -> str:
    """Return the text in one line without what terminals, engines and pasting add."""
    text = _PREFIX.sub("", _ESCAPES.sub("", text).replace("\r\n", "\n").replace("\r", "\n"))
    text = _QUOTED.sub(lambda it: '"' if it.group(1) == '"' else " ", text)
    return " ".join(text.replace("%20", " ").translate(_SAME).split())


def _filled(failure: Failure, groups: Mapping[str, str]) -> Failure:
    """Return the failure with its placeholders filled from `groups`, or with what they say without."""

    def fill(text: str) -> str:
        return _PLACEHOLDER.sub(lambda it: groups.get(it.group(1)) or it.group(2), text)

    return replace(failure, cause=fill(failure.cause), remedy=fill(failure.remedy))


# ----------------------------------------------------------------------------------------------------
# For people


def known(text: str) -> List[Failure]:
    """Return what the catalogue knows of an error message, or of a mode ("F48")."""
    asked = text.strip()
    if not _MODE.fullmatch(asked):
        return list(matches(asked))
    mode = f"F{int(asked[1:]):02}"
    return [named(mode)] if mode in catalogue() else []


def tell(text: str) -> int:
    """Print what the catalogue knows of an error message or of a mode; return the exit code.

    0 if something is known, 1 if nothing, USAGE if there is no text.
    """
    asked = text.strip()
    if not asked:
        sys.stdout.write(
            'there is no message\n  try   torchyard explain "the message"\n  try   torchyard explain F48\n'
        )
        return USAGE
    found = known(asked)
    for failure in found:
        sys.stdout.write("\n".join(_lines(failure)) + "\n")
    if not found:
        sys.stdout.write("\n".join(_unknown(asked)) + "\n")
    return 0 if found else 1


def _lines(failure: Failure) -> Iterator[str]:
    whose = {"image": "the image", "host": "the machine or how the container is started"}
    yield f"{failure.mode}  {failure.title}"
    yield from _labelled("why", failure.cause)
    # A terminal that wraps a command lets it be copied whole; lines of ours would not.
    yield from (f"  try   {step}" for step in failure.remedy.splitlines())
    if failure.blame in whose:
        yield from _labelled("where", whose[failure.blame])
    found_by = [one.id for one in check.load().values() if failure.mode in one.modes]
    if found_by:
        yield from _labelled("check", f"torchyard validate {' '.join(f'--only {name}' for name in found_by)} IMAGE")
    yield from _labelled("see", ", ".join(failure.sources))


def _unknown(asked: str) -> Iterator[str]:
    if _MODE.fullmatch(asked):
        modes = sorted(catalogue())
        yield f"the catalogue has no {asked.upper()}: it goes from {modes[0]} to {modes[-1]}"
        return
    yield "the catalogue does not know this message"
    yield from _labelled("try", "torchyard validate IMAGE  # or --local: finds faults that give no message, too")
    yield from _labelled("try", "paste more of it: the first error of a log is the cause, the last one what came of it")
    yield from _labelled("try", "python -m torch.utils.collect_env  # what to add when you ask others")


def _labelled(label: str, text: str) -> List[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=f"  {label:<6}",
        subsequent_indent=" " * 8,
        break_long_words=False,
        break_on_hyphens=False,
    )


def page() -> str:
    """Return the catalogue as the Markdown of docs/failures.md."""
    lines = [
        "# Known failures",
        "",
        "How environments of PyTorch and CUDA fail, from `validate/failures.json`. `torchyard explain` finds an entry",
        "by a pasted error message, `torchyard validate` by looking. Written by `validate.explain.page()`.",
        "",
    ]
    whose: Dict[str, str] = {"image": "the image", "host": "the host", "unknown": "either"}
    for failure in (named(mode) for mode in catalogue()):
        lines += [f"## {failure.mode} {failure.title}", "", f"{failure.cause}.", ""]
        lines += ["```text", *failure.remedy.splitlines(), "```", ""]
        lines += [f"To change: {whose[failure.blame]}. Sources: {', '.join(failure.sources)}.", ""]
    return "\n".join(lines[:-1]) + "\n"
