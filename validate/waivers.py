"""Waivers: checks that may fail until a day, with the reason; a file that somebody wrote, read strictly.

What is read leniently waives what nobody meant to waive: a key that is not known, a check that does not exist, a date
that is none are errors.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Collection, Dict, List, Mapping, NoReturn, Tuple

SCHEMA = 1
MOST_BYTES = 1 << 20
"""Of the file."""
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
"""Newer Pythons read more forms of a date than older ones."""


@dataclass(frozen=True)
class Waiver:
    """One check that may fail, why, and until when: the last day, in universal time."""

    check: str
    why: str
    until: dt.date

    def as_json(self) -> Dict[str, str]:
        """Return the waiver as the file has it."""
        return {"check": self.check, "why": self.why, "until": self.until.isoformat()}


def read(content: bytes, checks: Collection[str]) -> Dict[str, Waiver]:
    """Read a file of waivers, by check; raises ValueError, in one line, for whatever is wrong in it.

    `checks` are the ids of all checks that there are, whether they run or not.
    """
    fields = _fields(_json(content), "", ("schema", "waivers"))
    # 1 is True and 1.0.
    if type(fields["schema"]) is not int or fields["schema"] != SCHEMA:
        _refuse("schema", f"{_spelt(fields['schema'])} is not known, only {SCHEMA}")
    if not isinstance(fields["waivers"], list):
        _refuse("waivers", f"{_spelt(fields['waivers'])} is no list")
    found: Dict[str, Waiver] = {}
    for number, document in enumerate(fields["waivers"]):
        where = f"waivers[{number}]"
        waiver = _waiver(document, where, checks)
        if waiver.check in found:
            _refuse(f"{where}.check", f"{waiver.check} has a waiver already")
        found[waiver.check] = waiver
    return found


def _waiver(document: object, where: str, checks: Collection[str]) -> Waiver:
    fields = _fields(document, where, ("check", "why", "until"))
    name, why, until = (fields[key] for key in ("check", "why", "until"))
    if not (isinstance(name, str) and name in checks):
        _refuse(f"{where}.check", f"there is no check {_spelt(name)}; --list names them")
    if not (isinstance(why, str) and why.strip()):
        _refuse(f"{where}.why", f"{_spelt(why)} is no reason")
    if not why.isprintable():
        _refuse(f"{where}.why", f"{_spelt(why)} is not one line of printable text")
    if not (isinstance(until, str) and _DAY.fullmatch(until)):
        _refuse(f"{where}.until", f"{_spelt(until)} is no date like 2026-12-31")
    try:
        day = dt.date.fromisoformat(until)
    except ValueError:
        _refuse(f"{where}.until", f"there is no day {until}")
    return Waiver(name, why.strip(), day)


def _json(content: bytes) -> object:
    if len(content) > MOST_BYTES:
        raise ValueError(f"the file is larger than {MOST_BYTES} bytes")
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise ValueError(f"the file is not UTF-8 text, from byte {error.start} on") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"the file is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError("the file is nested too deeply") from None


def _once(pairs: List[Tuple[str, Any]]) -> Mapping[str, Any]:
    """Make an object of its pairs; JSON itself lets a key stand twice and the last one win."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {_spelt(twice)} stands twice in one object")
    return found


def _fields(document: object, where: str, names: Tuple[str, ...]) -> Mapping[str, Any]:
    """Return an object that has exactly these keys."""
    if not isinstance(document, dict):
        _refuse(where, f"{_spelt(document)} is no object with {', '.join(names)}")
    unknown = [name for name in document if name not in names]
    missing = [name for name in names if name not in document]
    if unknown:
        _refuse(where, f"{_spelt(unknown[0])} is not known, only {', '.join(names)}")
    if missing:
        _refuse(where, f"{missing[0]} is missing")
    return document


def _spelt(value: object) -> str:
    """Spell a value on one line in ASCII, whatever it is."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse(where: str, what: str) -> NoReturn:
    raise ValueError(f"{where}: {what}" if where else what)
