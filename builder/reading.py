"""matrix.yaml's text → what of it is sound, and everything that is wrong with it, in words."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from types import NoneType
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from builder.errors import MatrixError, Problem
from builder.facts import listed
from builder.schema import (
    ONE,
    SEVERAL,
    WORDS,
    Axes,
    BootstrapBase,
    Exclude,
    ImageBase,
    Include,
    Index,
    Matrix,
    Publish,
    Runner,
    Selector,
    Variant,
)

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 20


@dataclass(frozen=True, kw_only=True)
class Damage:
    """What was left out of a matrix because it is wrong, so that what depends on it is not judged."""

    sections: frozenset[str] = frozenset()
    """Top-level keys with something wrong below them; "" if there are keys that nobody knows."""
    axes: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    """Bases and variants that are defined, if wrongly."""
    numbers: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Places in the file of the entries that are left of a list."""

    def place(self, section: str, number: int) -> str:
        """Return the path in the file of an entry that is left."""
        numbers = self.numbers.get(section)
        return f"{section}[{number if numbers is None else numbers[number]}]"

    def hides(self, *sections: str) -> bool:
        """Tell whether one of the sections is damaged, or may stand under an unknown key."""
        return bool(self.sections & {"", *sections})


UNDAMAGED = Damage()


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which reports what YAML would let pass: repeated keys, aliases, tags and deep nesting.

    What is reported is replaced by something harmless, so that the rest of the file can be judged.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._aliases: dict[int, str] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401 (PyYAML's)
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()  # type: ignore[no-untyped-call]
            node = yaml.ScalarNode(f"{_YAML}str", "", event.start_mark, event.end_mark)
            self._aliases[id(node)] = str(event.anchor)
            return node
        self._depth += 1
        if self._depth > MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=f"nested more than {MAX_DEPTH} levels deep", problem_mark=mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def inspect(self, node: yaml.Node, path: str = "") -> Iterator[Problem]:
        """Report what is wrong at or below `node`, and replace it."""
        line = f"line {node.start_mark.line + 1}"
        if id(node) in self._aliases:
            yield Problem(
                what=f"alias *{_short(self._aliases[id(node)], quote='')} is not allowed",
                where=path,
                why=f"{line}; aliases can blow a small file up to gigabytes, and hide what a cell is made of",
                tries=("write the value out",),
            )
        known = next(tags for kind, tags in _TAGS.items() if isinstance(node, kind))
        if node.tag not in known:
            tag = node.tag.replace(_YAML, "!!") if node.tag.startswith(_YAML) else node.tag
            what = f"the YAML tag {_short(tag)} is not allowed"
            if tag == "!!merge":
                what = "the YAML merge key << is not allowed"
            yield Problem(what=what, where=path, why=f"{line}; values here are text, numbers, lists and mappings")
            node.tag = known[0]
        if isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for number, (key, value) in enumerate(node.value):
                name = str(key.value) if isinstance(key, yaml.ScalarNode) else "?"
                where = _path([name], path)
                if not isinstance(key, yaml.ScalarNode):
                    yield Problem(what="a key is a text", where=where, why=f"line {key.start_mark.line + 1}")
                    node.value[number] = (yaml.ScalarNode(f"{_YAML}str", name, key.start_mark, key.end_mark), value)
                    continue
                yield from self.inspect(key, where)
                line_of_key = key.start_mark.line + 1
                if name in seen:
                    yield Problem(
                        what=f"the key {_short(name)} stands here twice",
                        where=where,
                        why=f"lines {seen[name]} and {line_of_key}; YAML would silently keep the last",
                    )
                seen.setdefault(name, line_of_key)
                yield from self.inspect(value, where)
        elif isinstance(node, yaml.SequenceNode):
            for number, value in enumerate(node.value):
                yield from self.inspect(value, _path([number], path))


_YAML = "tag:yaml.org,2002:"
_TAGS: Mapping[type[yaml.Node], Sequence[str]] = {
    yaml.MappingNode: (f"{_YAML}map",),
    yaml.SequenceNode: (f"{_YAML}seq",),
    yaml.ScalarNode: tuple(f"{_YAML}{name}" for name in ("str", "int", "float", "bool", "null", "timestamp", "value")),
}
"""Tags that a plain value can have, explicit or not, by kind of node."""


def _short(value: object, *, quote: str = "'") -> str:
    text = repr(value) if quote or not isinstance(value, str) else value
    return text if len(text) <= 80 else f"{text[:77]}..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a half sentence that offers the known name nearest to `name`; empty if none is near."""
    close = difflib.get_close_matches(name[:80], list(known), 1)
    return f". Did you mean {close[0]!r}?" if close else ""


def _path(steps: Sequence[str | int], path: str = "") -> str:
    """Spell a path in the file: exclude[3].reason; a key that is no plain word is quoted."""
    for step in steps:
        if isinstance(step, int):
            path += f"[{step}]"
        else:
            word = step if re.fullmatch(r"[A-Za-z0-9_-]+", step) and len(step) <= 80 else _short(step)
            path += f".{word}" if path else word
    return path


def _in_file(location: Sequence[str | int]) -> list[str | int]:
    """Return pydantic's location without its names of union branches and keys, which are not in the file."""
    steps = [step for step in location if step not in (ONE, SEVERAL)]
    if steps[-1:] == ["[key]"]:
        steps[-2:] = [str(steps[-2])]
    if len(steps) > 2 and steps[0] == "bases" and steps[2] in _KINDS:
        del steps[2]
    return steps


_KINDS: Mapping[str, type[BaseModel]] = {"bootstrap": BootstrapBase, "image": ImageBase}
_MODELS: Mapping[tuple[str | int, int], type[BaseModel]] = {
    ("axes", 1): Axes,
    ("exclude", 2): Exclude,
    ("include", 2): Include,
    ("indexes", 2): Index,
    ("indexes", 3): Selector,
    ("publish", 1): Publish,
    ("publish", 3): Runner,
    ("variants", 2): Variant,
}
"""Models by the first step and the number of steps of a location."""


def _model_at(location: Sequence[str | int]) -> type[BaseModel]:
    """Return the model of the mapping at `location`, in pydantic's words."""
    if len(location) == 3 and location[0] == "bases":
        return _KINDS[str(location[2])]
    return _MODELS.get((location[0], len(location)), Matrix) if location else Matrix


_DANGEROUS: Mapping[str, str] = {
    "\n": "a line break",
    "\r": "a line break",
    '"': "a double quote",
    "`": "a backtick",
    "$": "a dollar sign",
    "\\": "a backslash",
    "{": "a brace",
    "}": "a brace",
}


def _why_refused(words: str, value: object) -> str:
    """Say what a value must be, and which character of it no value may have."""
    found = dict.fromkeys(name for char, name in _DANGEROUS.items() if isinstance(value, str) and char in value)
    return f"it has {listed(found)}; {words}" if found else words


_CALLED: Mapping[type, str] = {
    NoneType: "no value",
    tuple: "a list",
    dict: "a mapping",
    bool: "the truth value",
    int: "the number",
    float: "the number",
    str: "the text",
    date: "the date",
    datetime: "the date",
}


def _kind_of(value: object) -> str:
    """Call a value as people do."""
    name = _CALLED.get(type(value), "the value")
    if value is None or isinstance(value, (tuple, dict)):
        return name
    shown = str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, date) else _short(value)
    return f"{name} {shown}"


def _problem(item: ErrorDetails) -> Problem | None:  # noqa: PLR0912, PLR0915 (one branch for each kind of finding)
    """Say one of pydantic's findings as people would; None if another one says the same."""
    location, kind, value = list(item["loc"]), item["type"], item.get("input")
    context = item.get("ctx", {})
    steps = _in_file(location)
    name = str(steps[-1]) if steps else ""
    why = ""
    tries: tuple[str, ...] = ()
    if location and location[-1] == "[key]":
        what = f"the key {_short(name)} is not allowed here"
        why = _why_refused(WORDS.get(context.get("pattern", ""), "a key is a short text; numbers need quotes"), name)
    elif kind == "extra_forbidden":
        known = list(_model_at(location[:-1]).model_fields)
        what = f"unknown key {_short(name)}{did_you_mean(name, known)}"
        why = f"known here: {', '.join(known)}"
    elif kind == "missing":
        what = f"the key {name!r} is missing"
        why = _model_at(location[:-1]).model_fields[name].description or ""
        if name == "reason":
            why = "every exclusion says why it is made"
    elif kind in ("union_tag_not_found", "union_tag_invalid"):
        steps.append("kind")
        given = value.get("kind") if isinstance(value, dict) else None
        what = "the key 'kind' is missing"
        if given is not None:
            what = f"{_short(given)} is not known{did_you_mean(str(given), _KINDS)}"
        why = "bootstrap: made of locked Debian packages; image: an image of a registry"
    elif kind == "too_short":
        if value:  # Its values are wrong, which is said of each.
            return None
        what = "is empty: at least one value is needed"
    elif kind == "string_type":
        what = f"here is {_kind_of(value)}, where text is needed"
        if isinstance(value, (bool, int, float, date)):
            why = "YAML reads 2.10 as the number 2.1, yes and no as true and false, and days as dates"
            tries = ("write it in quotes",)
    elif kind == "tuple_type":
        what = f"here is {_kind_of(value)}, where a list is needed"
        if isinstance(value, str) and len(value) <= 80:
            tries = (f"write [{value}]",)
        elif value is None:
            what = "is empty: at least one value is needed"
    elif kind in ("model_type", "model_attributes_type", "dict_type", "mapping_type"):
        what = f"here is {_kind_of(value)}, where keys with values are needed"
    else:
        what = f"{_short(value) if isinstance(value, str) else _kind_of(value)} is not allowed here"
        why = item["msg"]
        if kind == "literal_error":
            why = f"this torchyard knows {context['expected']}"
        elif kind in ("int_type", "greater_than_equal", "less_than_equal"):
            why = _model_at(location[:-1]).model_fields[name].description or ""
        elif kind == "bool_type":
            why = "it is true or false"
        elif kind == "string_pattern_mismatch":
            why = _why_refused(WORDS[context["pattern"]], value)
        elif kind == "value_error":
            why = str(context["error"])
    return Problem(what=what, where=_path(steps), why=why, tries=tries)


def _refuse_yaml(error: Exception, text: str) -> Problem:
    """Say what YAML itself has against the text."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        why = f"the character U+{int(error.character):04X} is not allowed in YAML"
        return Problem(what="not valid YAML", where=f"line {line}", why=why)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        where = f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
        why = ", ".join(part for part in (error.context, error.problem) if part)
        return Problem(what="not valid YAML", where=where, why=why)
    return Problem(what="not valid YAML", why=str(error).partition("\n")[0])


def read(text: str) -> tuple[Matrix | None, Damage, list[Problem]]:
    """Return the sound part of the file, what is not in it, and everything that is wrong."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            problems = [] if node is None else list(loader.inspect(node))
            raw = loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:  # also: a date that does not exist
        return None, UNDAMAGED, [_refuse_yaml(error, text)]
    if not isinstance(raw, dict):
        why = "the file is empty" if raw is None else f"the file holds {_kind_of(_tuples(raw))}"
        return (
            None,
            UNDAMAGED,
            [*problems, Problem(what="not a matrix", why=f"{why}, where keys with values are needed")],
        )
    matrix, damage, found = judge(raw)
    reported = {problem.where for problem in problems}
    return matrix, damage, [*problems, *(problem for problem in found if problem.where not in reported)]


def judge(raw: Mapping[Any, Any]) -> tuple[Matrix | None, Damage, list[Problem]]:
    """Return the sound part of what the file holds, what is not in it, and every way in which it is not a matrix."""
    raw = _tuples(raw)
    try:
        return Matrix.model_validate(raw), UNDAMAGED, []
    except ValidationError as error:
        findings = error.errors(include_url=False)
    problems = [problem for problem in map(_problem, findings) if problem is not None]
    rest, damage = _without(raw, findings)
    with contextlib.suppress(ValidationError):
        return Matrix.model_validate(rest), damage, problems
    return None, damage, problems


# Stand in for what is wrong while the rest is judged.
_STAND_INS: Mapping[str, object] = {"version": 1, "repository": "repository", "exclude_newer": "2000-01-01T00:00:00Z"}


def _variant_like(_: object) -> object:
    """Return what stands in for a variant that is wrong; whether a cell can exist does not hang on it."""
    return {"description": "wrong"}


def _base_like(base: object) -> object:
    """Return what stands in for a base that is wrong: one with the same Python, None if that is not known."""
    python = base.get("python") if isinstance(base, dict) else None
    known = isinstance(python, str) and re.fullmatch(r"3\.[0-9]{1,3}", python)
    return {"kind": "image", "image": f"wrong@sha256:{'0' * 64}", "python": python} if known else None


def _without(raw: Mapping[Any, Any], findings: Iterable[ErrorDetails]) -> tuple[dict[Any, Any], Damage]:
    """Leave out every entry of the matrix in which something was found."""
    lost: dict[str, set[Any]] = defaultdict(set)
    whole: set[str] = set()
    for finding in findings:
        section, *inner = _in_file(finding["loc"])
        # A key that is wrong, on top or of a base or variant: nobody knows what it was to be.
        if str(section) not in Matrix.model_fields or (finding["loc"][-1] == "[key]" and len(inner) == 1):
            whole.add("")
        if str(section) not in Matrix.model_fields:
            continue
        if section == "axes" and len(inner) == 2:
            lost["axes"].add((inner[0], inner[1]))
        elif section in ("bases", "variants", "indexes", "exclude", "include") and inner:
            lost[str(section)].add(inner[0])
        else:
            whole.add(str(section))
    rest = {key: value for key, value in raw.items() if key in Matrix.model_fields and key not in whole}
    rest |= {key: value for key, value in _STAND_INS.items() if key in whole}
    numbers: dict[str, Sequence[int]] = {}
    names: set[str] = set()
    for section, entries in lost.items():
        found = rest.get(section)
        if section == "axes":
            rest["axes"] = {
                axis: tuple(value for number, value in enumerate(values) if (axis, number) not in entries)
                if isinstance(values, tuple)
                else values
                for axis, values in raw["axes"].items()
            }
        elif isinstance(found, dict):
            stand_in = _base_like if section == "bases" else _variant_like
            bad = {str(key) for key in entries}
            sound = {key: stand_in(value) if str(key) in bad else value for key, value in found.items()}
            rest[section] = {key: value for key, value in sound.items() if value is not None}
            names |= {str(key) for key in found}
        elif isinstance(found, tuple):
            numbers[section] = [number for number in range(len(found)) if number not in entries]
            rest[section] = tuple(found[number] for number in numbers[section])
    return rest, Damage(
        sections=frozenset(whole | set(lost)),
        axes=frozenset(axis for axis, _ in lost["axes"]),
        names=frozenset(names),
        numbers=numbers,
    )


def _tuples(value: object) -> Any:  # noqa: ANN401 (what a file holds)
    """Make lists tuples: the models are frozen and strict, and a strict tuple is not a list."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def text_of(path: Path) -> str:
    """Return the file's text; raises MatrixError if it is missing, too large or no text."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise MatrixError(
            f"{path} does not exist",
            tries=("run torchyard where matrix.yaml lies, or name it with --matrix",),
        ) from None
    except OSError as error:
        raise MatrixError(f"{path} cannot be read", why=error.strerror or str(error)) from None
    if len(content) > MAX_FILE_BYTES:
        raise MatrixError(f"larger than {MAX_FILE_BYTES} bytes", where=path.name)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise MatrixError(
            "not UTF-8 text",
            where=f"{path.name}: line {line}",
            why=f"the byte 0x{content[error.start]:02x} cannot stand there",
            tries=("save the file as UTF-8",),
        ) from None
