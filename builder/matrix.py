"""matrix.yaml → cells: what people decide, checked completely before anything is done with it."""

from __future__ import annotations

import difflib
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from pydantic import BaseModel, ValidationError

from builder.compat import check_cell
from builder.errors import ImpossibleError, MatrixError, Problem
from builder.facts import CPU, Build, Cuda, Facts
from builder.facts import Index as Published
from builder.facts import Platform as KnownPlatform
from builder.schema import (
    AXES,
    Axes,
    BootstrapBase,
    Exclude,
    ImageBase,
    Include,
    Index,
    Matrix,
    Selector,
    Variant,
    listed,
)

MAX_FILE_BYTES = 1 << 20
PYTORCH_INDEX = "https://download.pytorch.org/whl"

# --------------------------------------------------------------------------- cells


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of the axes, still in the words of the file."""

    torch: str
    cuda: str
    cudnn: str
    base: str
    variant: str
    platform: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One image to be: a point of the matrix, completed with what is known of its combination.

    `id` and `tags` are composed from the fields and never taken apart again.
    """

    id: str
    torch: Version
    cuda: str
    """CUDA that torch was built for, "12.8", or "cpu"."""
    cudnn: Version | None
    cudnn_is_stock: bool
    """Whether torch's own metadata pins this cuDNN; any other is an override."""
    nccl: Version | None
    """NCCL that torch's metadata pins, where known before locking."""
    architectures: tuple[str, ...]
    """GPU architectures of torch's own kernels ("sm_90", "compute_120"), where measured."""
    base_name: str
    base: BootstrapBase | ImageBase
    variant_name: str
    variant: Variant
    platform: str
    indexes: tuple[Index, ...]
    """Explicit indexes that apply; packages not named there come from the user's default index."""
    tags: tuple[str, ...]
    """Full references without registry, the primary one first."""
    exclude_newer: datetime

    @property
    def python(self) -> str:
        """Python's major and minor version."""
        return self.base.python

    @property
    def torch_local(self) -> str:
        """Return torch's version as torch itself reports it: 2.8.0+cu128."""
        return f"{self.torch}+{cuda_label(self.cuda)}"


def _architectures(build: Build) -> tuple[str, ...]:
    """Return the GPU architectures of a build in torch's spelling; none unless they were measured."""
    if build.gpus is None or build.gpus_by != "measured" or build.unverified & {"gpus", "ptx"}:
        return ()
    binaries = [f"sm_{sm.major}{sm.minor}" for sm in build.gpus]
    return tuple(sorted([*binaries, *(f"compute_{sm.major}{sm.minor}" for sm in build.ptx or ())]))


def cuda_label(cuda: str) -> str:
    """Return the label wheels and indexes use: "12.8" → "cu128", "cpu" → "cpu"."""
    return "cpu" if cuda == "cpu" else "cu" + cuda.replace(".", "")


def _admits(wanted: str, value: str) -> bool:
    if wanted[0] in "<>=!~":
        return value != "cpu" and SpecifierSet(wanted).contains(Version(value))
    return wanted == value


def matches(selector: Selector, point: Point) -> bool:
    """Tell whether every axis that the selector names admits the point's value."""
    return all(
        values is None or any(_admits(value, getattr(point, axis)) for value in listed(values))
        for axis in AXES
        for values in (getattr(selector, axis),)
    )


def _product(values: Mapping[str, Sequence[str]]) -> Iterator[Point]:
    for combination in itertools.product(*(values[axis] for axis in AXES)):
        yield Point(**dict(zip(AXES, combination, strict=True)))


def _points(matrix: Matrix) -> tuple[list[tuple[str, Point]], list[Problem]]:
    """Expand axes, exclude and include to points with the path they come from."""
    problems: list[Problem] = []
    axes = {axis: listed(getattr(matrix.axes, axis)) for axis in AXES}
    points = [("axes", point) for point in _product(axes)]
    for number, exclude in enumerate(matrix.exclude):
        kept = [(where, point) for where, point in points if not matches(exclude, point)]
        if len(kept) == len(points):
            wanted = ", ".join(
                f"{axis}: {' or '.join(listed(value))}"
                for axis in AXES
                if (value := getattr(exclude, axis)) is not None
            )
            problems.append(
                Problem(
                    what=f"excludes nothing ({wanted or 'no axis named'})",
                    where=f"exclude[{number}]",
                    why="no point of `axes` that earlier entries have left matches it",
                    tries=("remove the entry, or correct its values",),
                )
            )
        points = kept
    for number, include in enumerate(matrix.include):
        values = {
            axis: listed(given) if (given := getattr(include, axis)) is not None else axes[axis][:1] for axis in AXES
        }
        points += [(f"include[{number}]", point) for point in _product(values)]
    return points, problems


def _unknown_names(matrix: Matrix) -> Iterator[Problem]:
    """Report every base and variant that is used but not defined."""
    users: list[tuple[str, BaseModel]] = [("axes", matrix.axes)]
    users += [(f"exclude[{number}]", entry) for number, entry in enumerate(matrix.exclude)]
    users += [(f"include[{number}]", entry) for number, entry in enumerate(matrix.include)]
    users += [(f"indexes[{number}].when", entry.when) for number, entry in enumerate(matrix.indexes)]
    for where, entry in users:
        for axis, known in (("base", matrix.bases), ("variant", matrix.variants)):
            value = getattr(entry, axis)
            for name in () if value is None else listed(value):
                if name not in known:
                    yield Problem(
                        what=f"{axis} {name!r} is not defined{_did_you_mean(name, known)}",
                        where=f"{where}.{axis}",
                        why=f"`{axis}s` defines {', '.join(known)}",
                    )


def _duplicates(matrix: Matrix) -> Iterator[Problem]:
    for axis in AXES:
        values = listed(getattr(matrix.axes, axis))
        for number, value in enumerate(values):
            if value in values[:number]:
                yield Problem(what=f"{value!r} stands here twice", where=f"axes.{axis}[{number}]")
    names = [index.name for index in matrix.indexes]
    for number, name in enumerate(names):
        if name in names[:number]:
            yield Problem(what=f"a second index named {name!r}", where=f"indexes[{number}].name")


def _complete(matrix: Matrix, where: str, point: Point, facts: Facts) -> Cell | list[Problem]:
    """Turn a point into a cell, or say why there can be no such image."""
    base = matrix.bases[point.base]
    torch = Version(point.torch)
    override = None if point.cudnn == "stock" else Version(point.cudnn)
    label = " · ".join(getattr(point, axis) for axis in AXES)
    problems = [
        Problem(
            what=problem.what,
            where=f"{where} ({label})",
            why=problem.why,
            tries=(*problem.tries, *(("or leave it out with an `exclude` entry",) if where == "axes" else ())),
        )
        for problem in check_cell(
            facts,
            torch=torch,
            cuda=point.cuda,
            cudnn=override,
            python=base.python,
            platform=point.platform,
        )
    ]
    if problems:
        return problems
    cuda: Cuda = CPU if point.cuda == CPU else Version(point.cuda)
    build = facts.build(torch, cuda, KnownPlatform(point.platform))
    assert build is not None, "check_cell accepts known builds only"
    stock = build.cudnn
    cudnn = override or stock
    indexes = tuple(index for index in matrix.indexes if matches(index.when, point))
    if build.index is not Published.DEFAULT and not any("torch" in index.packages for index in indexes):
        label = cuda_label(point.cuda)
        problems.append(
            Problem(
                what=f"torch {torch} for CUDA {point.cuda} is not on the default package index"
                if point.cuda != "cpu"
                else f"the CPU build of torch {torch} is not on the default package index",
                where=f"{where} ({' · '.join(getattr(point, axis) for axis in AXES)})",
                why="only PyTorch's own index carries it",
                tries=(
                    f"add {PYTORCH_INDEX}/{label} to `indexes`, with packages: [torch], when: {{cuda: '{point.cuda}'}}",
                ),
            )
        )
    if point.cuda != "cpu" and cudnn is None:
        problems.append(
            Problem(
                what=f"the stock cuDNN of torch {torch} for CUDA {point.cuda} is not known",
                where=f"{where} ({label})",
                why="the image's id and tag name its cuDNN, so it must be known before it is built",
                tries=("run `torchyard update`", "or name the cuDNN on the cudnn axis"),
            )
        )
    if problems:
        return problems
    python = f"py{base.python}"
    arch = () if point.platform == "linux/amd64" else (point.platform.split("/")[1],)
    gpu = () if cudnn is None else (f"cudnn{cudnn}",)
    identity = "-".join(
        (f"torch{torch}", cuda_label(point.cuda), *gpu, python, point.base, point.variant, *arch),
    )
    short_gpu = () if cudnn is None else (f"cudnn{cudnn if override else cudnn.major}",)
    default_base = listed(matrix.axes.base)[0]
    short = "-".join(
        (
            str(torch),
            "cpu" if point.cuda == "cpu" else f"cuda{point.cuda}",
            *short_gpu,
            point.variant,
            *(() if point.base == default_base else (point.base,)),
            *arch,
        )
    )
    return Cell(
        id=identity,
        torch=torch,
        cuda=point.cuda,
        cudnn=cudnn,
        cudnn_is_stock=override is None,
        nccl=build.nccl,
        architectures=_architectures(build),
        base_name=point.base,
        base=base,
        variant_name=point.variant,
        variant=matrix.variants[point.variant],
        platform=point.platform,
        indexes=indexes,
        tags=(f"{matrix.repository}:{short}", f"{matrix.repository}:{identity}"),
        exclude_newer=datetime.fromisoformat(matrix.exclude_newer),
    )


def expand(matrix: Matrix, facts: Facts, *, file: str = "matrix.yaml") -> tuple[Cell, ...]:
    """Return the matrix' cells in the order of the file.

    Raises MatrixError with every problem at once: undefined names, impossible combinations, excludes that match
    nothing, two cells with one id or tag.
    """
    problems = [*_unknown_names(matrix), *_duplicates(matrix)]
    points, found = _points(matrix)
    problems += found
    cells: list[tuple[str, Cell]] = []
    for where, point in points:
        if point.base not in matrix.bases or point.variant not in matrix.variants:
            continue
        cell = _complete(matrix, where, point, facts)
        if isinstance(cell, Cell):
            cells.append((where, cell))
        else:
            problems += cell
    if not points:
        problems.append(Problem(what="no cell is left", where="exclude", why="the entries exclude every point"))
    owners: dict[str, list[tuple[str, Cell]]] = defaultdict(list)
    for where, cell in cells:
        for tag in cell.tags:
            owners[tag].append((where, cell))
    reported: set[tuple[str, ...]] = set()
    for tag, holders in owners.items():
        places = tuple(where for where, _ in holders)
        if len(holders) > 1 and places not in reported:
            reported.add(places)
            problems.append(
                Problem(
                    what=f"two cells would have the tag {tag}",
                    where=" and ".join(places),
                    why=" and ".join(cell.id for _, cell in holders),
                    tries=("remove one of them",),
                )
            )
    if problems:
        raise MatrixError(
            problems=tuple(
                Problem(what=p.what, where=f"{file}: {p.where}" if p.where else file, why=p.why, tries=p.tries)
                for p in problems
            )
        )
    return tuple(cell for _, cell in cells)


def select(cells: Iterable[Cell], patterns: Sequence[str]) -> tuple[Cell, ...]:
    """Return the cells whose id, or a tag of whose, matches one of the shell-style patterns; all if there is none.

    Raises ImpossibleError naming every pattern that matches nothing.
    """
    cells = tuple(cells)
    if not patterns:
        return cells
    names = {cell.id: (cell.id, *cell.tags, *(tag.split(":", 1)[1] for tag in cell.tags)) for cell in cells}
    chosen = {
        pattern: {i for i, known in names.items() if any(fnmatchcase(n, pattern) for n in known)}
        for pattern in patterns
    }
    lost = [pattern for pattern, found in chosen.items() if not found]
    if lost:
        raise ImpossibleError(
            problems=tuple(
                Problem(
                    what=f"no cell matches {pattern!r}",
                    why=f"the matrix has {len(cells)} cells",
                    tries=tuple(difflib.get_close_matches(pattern, names, 3, 0.4))
                    or ("`torchyard matrix` lists them; quote patterns: 'torch2.8*'",),
                )
                for pattern in lost
            )
        )
    wanted = set().union(*chosen.values())
    return tuple(cell for cell in cells if cell.id in wanted)


# --------------------------------------------------------------------------- reading


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses what YAML lets pass: repeated keys, aliases and deep nesting."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.problems: list[Problem] = []
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401 (PyYAML's)
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            self.problems.append(
                Problem(
                    what=f"alias *{event.anchor} is not allowed",
                    where=f"line {event.start_mark.line + 1}",
                    why="aliases can blow a small file up to gigabytes, and hide what a cell is made of",
                    tries=("write the value out",),
                )
            )
        self._depth += 1
        if self._depth > 20:
            raise yaml.YAMLError("nested more than 20 levels deep")
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def find_duplicates(self, node: yaml.Node | None, path: str = "") -> None:
        """Report repeated keys below `node`; aliases were reported, so no node is visited twice for long."""
        if isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                name = str(key.value)
                where = f"{path}.{name}" if path else name
                line = key.start_mark.line + 1
                if name in seen:
                    self.problems.append(
                        Problem(
                            what=f"the key {name!r} stands here twice",
                            where=where,
                            why=f"lines {seen[name]} and {line}; YAML would silently keep the last",
                        )
                    )
                seen.setdefault(name, line)
                self.find_duplicates(value, where)
        elif isinstance(node, yaml.SequenceNode):
            for number, value in enumerate(node.value):
                self.find_duplicates(value, f"{path}[{number}]")


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f". Did you mean {close[0]!r}?" if close else ""


def _known_keys(location: Sequence[str | int]) -> list[str]:
    """Return the keys allowed in the mapping that holds the last item of `location`."""
    model: type[BaseModel] = Matrix
    steps: Mapping[str, type[BaseModel]] = {
        "axes": Axes,
        "exclude": Exclude,
        "include": Include,
        "indexes": Index,
        "when": Selector,
        "variants": Variant,
        "bootstrap": BootstrapBase,
        "image": ImageBase,
    }
    for step in location[:-1]:
        model = steps.get(str(step), model)
    return list(model.model_fields)


def _path(location: Sequence[str | int]) -> str:
    """Spell pydantic's location as a path in the file; the names of union branches are not in the file."""
    text = ""
    for step in location:
        if isinstance(step, int):
            text += f"[{step}]"
        elif not re.match(r"(function-|constrained-|tuple\[|str$|literal\[)", step) and step != "[key]":
            text += f".{step}" if text else step
    return text


def _problems_of(error: ValidationError) -> Iterator[Problem]:
    seen: set[str] = set()
    for item in error.errors(include_url=False):
        location = list(item["loc"])
        if len(location) > 2 and location[0] == "bases" and location[2] in ("bootstrap", "image"):
            shown = [*location[:2], *location[3:]]
        else:
            shown = location
        where, kind, value = _path(shown), item["type"], item.get("input")
        why = ""
        tries: tuple[str, ...] = ()
        if kind == "extra_forbidden":
            name = str(location[-1])
            what = f"unknown key {name!r}{_did_you_mean(name, _known_keys(location))}"
            why = f"known here: {', '.join(_known_keys(location))}"
        elif kind == "missing":
            what = "is missing"
        elif kind == "too_short":
            what = "is empty: at least one value is needed"
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and kind.startswith("string"):
            what = f"{value!r} is a number, not a version"
            why, tries = "YAML reads 2.10 as the number 2.1", ("write it in quotes",)
        elif kind == "string_pattern_mismatch":
            what = f"{str(value)!r} is not allowed here"
            why = f"it must match {item['ctx']['pattern']}"
        else:
            what = f"{item['msg'].removeprefix('Value error, ')} (found {_short(value)})"
        if "reason" in where.rsplit(".", 1)[-1] and kind == "missing":
            why = "every exclusion says why it is made"
        # A value that fits no branch of a union (one value, or a list) is reported once per branch: once is enough.
        if kind != "extra_forbidden" and where in seen:
            continue
        seen.add(where)
        yield Problem(what=what, where=where, why=why, tries=tries)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def parse(text: str, *, file: str = "matrix.yaml") -> Matrix:
    """Read the file's text; raises MatrixError with every problem at once."""

    def refuse(problems: Iterable[Problem]) -> MatrixError:
        return MatrixError(
            problems=tuple(
                Problem(what=p.what, where=f"{file}: {p.where}" if p.where else file, why=p.why, tries=p.tries)
                for p in problems
            )
        )

    if len(text.encode()) > MAX_FILE_BYTES:
        raise refuse([Problem(what=f"larger than {MAX_FILE_BYTES} bytes")])
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            loader.find_duplicates(node)
            if any(problem.what.startswith("alias") for problem in loader.problems):
                raise refuse(loader.problems)
            raw = loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise refuse([Problem(what="not valid YAML", where=where, why=str(getattr(error, "problem", error)))]) from None
    except (ValueError, RecursionError, OverflowError) as error:  # such as an impossible date, or !!int of a word
        raise refuse([Problem(what="not valid YAML", why=str(error).splitlines()[0])]) from None
    try:
        if not isinstance(raw, dict):
            raise refuse([*loader.problems, Problem(what="not a mapping", why="the file is empty or a single value")])
        matrix = Matrix.model_validate(_tuples(raw))
    except ValidationError as error:
        raise refuse([*loader.problems, *_problems_of(error)]) from None
    if loader.problems:
        raise refuse(loader.problems)
    return matrix


def _tuples(value: object) -> object:
    """Make lists tuples: the models are frozen and strict, and a strict tuple is not a list."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def load(path: Path) -> Matrix:
    """Read the file; raises MatrixError if it is missing, unreadable or wrong."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise MatrixError(
            f"{path} does not exist",
            tries=("run torchyard where matrix.yaml lies, or name it with --matrix",),
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise MatrixError(f"{path} cannot be read", why=str(error)) from None
    return parse(text, file=path.name)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the file, for editors."""
    schema = Matrix.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "torchyard matrix"}
