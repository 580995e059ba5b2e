"""matrix.yaml → cells: what people decide, checked completely before anything is done with it."""

from __future__ import annotations

import difflib
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from fnmatch import fnmatchcase

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from pydantic import BaseModel

from builder import toolkit
from builder.compat import check_cell, check_gpu
from builder.errors import ImpossibleError, MatrixError, Problem
from builder.facts import CPU, Build, Cuda, Driver, Facts
from builder.facts import Index as Published
from builder.facts import Platform as KnownPlatform
from builder.reading import UNDAMAGED, Damage, did_you_mean, read
from builder.schema import (
    AXES,
    BootstrapBase,
    ImageBase,
    Index,
    Matrix,
    Runner,
    Selector,
    Variant,
    listed,
)

MAX_POINTS = 10_000
"""More is a slip of the pen; six axes multiply fast."""
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
    companions: tuple[str, ...] = ()


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
    base_is_default: bool
    """Whether it is the first base of the matrix, which tags do not name."""
    base: BootstrapBase | ImageBase
    variant_name: str
    variant: Variant
    """With all that it has from the variants it extends."""
    companions: tuple[str, ...]
    """Libraries that are released for one torch each: torchvision, torchaudio."""
    driver: Driver | None
    """Lowest NVIDIA driver that runs its CUDA, by minor-version compatibility; None for a CPU build, or if unknown."""
    platform: str
    indexes: tuple[Index, ...]
    """Explicit indexes that apply; packages not named there come from the user's default index."""
    repository: str
    """What stands before a tag, without registry."""
    tag_names: tuple[str, ...]
    """Tags alone, the primary one first."""
    exclude_newer: datetime

    @property
    def tags(self) -> tuple[str, ...]:
        """Full references without registry, the primary one first."""
        return tuple(f"{self.repository}:{name}" for name in self.tag_names)

    @property
    def python(self) -> str:
        """Python's major and minor version."""
        return self.base.python

    @property
    def torch_local(self) -> str:
        """Return torch's version as torch itself reports it: 2.8.0+cu128."""
        return f"{self.torch}+{cuda_label(self.cuda)}"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What must hold before a cell is published, and where it is proven.

    It is in no lock, plan or image: how images are published can change, and they stay what they are.
    """

    tiers: tuple[int, ...] = (1,)
    latest: str | None = None
    """Id of the cell that bears the tag `latest`."""
    signed: bool = False
    """Whether nothing is pushed without a signature."""
    runners: tuple[Runner, ...] = ()

    def tiers_of(self, cell: Cell) -> tuple[int, ...]:
        """Return the tiers that must be proven of a cell; nothing about GPUs can be proven of one without CUDA."""
        return tuple(tier for tier in self.tiers if tier == 1 or cell.cuda != CPU)


@dataclass(frozen=True, kw_only=True)
class Family:
    """All that a matrix says: the images, and how they are published."""

    cells: tuple[Cell, ...]
    policy: Policy


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


def _product(values: Mapping[str, Sequence[str]], *, companions: tuple[str, ...] = ()) -> Iterator[Point]:
    for combination in itertools.product(*(values[axis] for axis in AXES)):
        torch, cuda, cudnn, base, variant, platform = combination
        yield Point(
            torch=torch,
            cuda=cuda,
            cudnn=cudnn,
            base=base,
            variant=variant,
            platform=platform,
            companions=companions,
        )


def _too_many(values: Mapping[str, Sequence[str]], where: str) -> Problem | None:
    count = math.prod(len(values[axis]) for axis in AXES)
    if count <= MAX_POINTS:
        return None
    return Problem(
        what=f"{count} cells are more than the {MAX_POINTS} that a matrix may have",
        where=where,
        why=" x ".join(f"{len(values[axis])} {axis}" for axis in AXES),
    )


def _points(matrix: Matrix, damage: Damage) -> tuple[list[tuple[str, Point]], list[Problem]]:
    """Expand axes, exclude and include to points with the path they come from."""
    axes = {axis: listed(getattr(matrix.axes, axis)) for axis in AXES}
    if problem := _too_many(axes, "axes"):
        return [], [problem]
    problems: list[Problem] = []
    points = [("axes", point) for point in _product(axes)]
    for number, exclude in enumerate(matrix.exclude):
        # What is wrong on an axis may be just what the entry means.
        certain = exclude.model_copy(update=dict.fromkeys(damage.axes))
        kept = [(where, point) for where, point in points if not matches(exclude, point)]
        if len(kept) == len(points) and not any(matches(certain, point) for _, point in points):
            wanted = ", ".join(
                f"{axis}: {' or '.join(listed(value))}"
                for axis in AXES
                if (value := getattr(exclude, axis)) is not None
            )
            problems.append(
                Problem(
                    what=f"excludes nothing ({wanted or 'no axis named'})",
                    where=damage.place("exclude", number),
                    why="no point of `axes` that earlier entries have left matches it",
                    tries=("remove the entry, or correct its values",),
                )
            )
        points = kept
    if not points:
        problems.append(Problem(what="no cell is left", where="exclude", why="the entries exclude every point"))
    if damage.hides("exclude"):
        points = []  # An entry that is wrong would have excluded some of them.
    for number, include in enumerate(matrix.include):
        values = {
            axis: listed(given) if (given := getattr(include, axis)) is not None else axes[axis][:1] for axis in AXES
        }
        where = damage.place("include", number)
        if problem := _too_many(values, where):
            problems.append(problem)
        elif not damage.axes:
            points += [(where, point) for point in _product(values, companions=include.companions)]
    return points, problems


def _unknown_names(matrix: Matrix, damage: Damage) -> Iterator[Problem]:
    """Report every base and variant that is used but not defined."""
    users: list[tuple[str, BaseModel]] = [("axes", matrix.axes)]
    users += [(damage.place("exclude", number), entry) for number, entry in enumerate(matrix.exclude)]
    users += [(damage.place("include", number), entry) for number, entry in enumerate(matrix.include)]
    users += [(f"{damage.place('indexes', number)}.when", entry.when) for number, entry in enumerate(matrix.indexes)]
    for axis, defined in (("base", matrix.bases), ("variant", matrix.variants)):
        if damage.hides() or (f"{axis}s" in damage.sections and not damage.names):
            continue
        for where, entry in users:
            value = getattr(entry, axis)
            for name in () if value is None else listed(value):
                if name not in defined and name not in damage.names:
                    yield Problem(
                        what=f"{axis} {name!r} is not defined{did_you_mean(name, defined)}",
                        where=f"{where}.{axis}",
                        why=f"`{axis}s` defines {', '.join(defined)}",
                    )


def whole_variant(variants: Mapping[str, Variant], name: str) -> Variant:
    """Return a variant with all that it has from those it extends; its own values come last, and win."""
    variant = variants[name]
    if variant.extends is None:
        return variant
    below = whole_variant(variants, variant.extends)
    own = variant.model_fields_set
    return variant.model_copy(
        update={
            "packages": tuple(dict.fromkeys((*below.packages, *variant.packages))),
            "system": tuple(dict.fromkeys((*below.system, *variant.system))),
            "directories": tuple(dict.fromkeys((*below.directories, *variant.directories))),
            "env": {**below.env, **variant.env},
            **{key: getattr(below, key) for key in ("toolkit", "program", "port") if key not in own},
        }
    )


def _unsound_variants(variants: Mapping[str, Variant]) -> Iterator[Problem]:
    """Report variants that extend what is not defined, or, in the end, themselves."""
    for name, variant in variants.items():
        if variant.extends is not None and variant.extends not in variants:
            yield Problem(
                what=f"variant {variant.extends!r} is not defined{did_you_mean(variant.extends, variants)}",
                where=f"variants.{name}.extends",
                why=f"`variants` defines {', '.join(variants)}",
            )
        line, at = [name], variant.extends
        while at is not None and at in variants and at not in line:
            line.append(at)
            at = variants[at].extends
        if at == name:
            yield Problem(what=f"{name} extends itself", where=f"variants.{name}.extends", why=" → ".join([*line, at]))


def _unfit(variant: Variant, base: BootstrapBase | ImageBase, point: Point) -> Iterator[Problem]:
    """Report what keeps a variant from standing on a base."""
    if variant.system and isinstance(base, ImageBase):
        yield Problem(
            what=f"variant {point.variant} needs Debian packages, and base {point.base} is an image",
            why=f"nothing of an image is run, so nothing can be installed in it: {', '.join(variant.system)}",
            tries=("use a bootstrap base", "use an image that has them, and a variant without `system`"),
        )
    if variant.toolkit:
        problem = toolkit.refusal(variant=point.variant, cuda=point.cuda, base_name=point.base, base=base)
        if problem is not None:
            yield problem


def _duplicates(matrix: Matrix, damage: Damage) -> Iterator[Problem]:
    for axis in AXES:
        values = listed(getattr(matrix.axes, axis))
        seen: set[str] = set()
        for number, value in enumerate(values):
            if value in seen:
                where = f"axes.{axis}" if axis in damage.axes else f"axes.{axis}[{number}]"
                yield Problem(what=f"{value!r} stands here twice", where=where)
            seen.add(value)
    names = [index.name for index in matrix.indexes]
    for number, name in enumerate(names):
        if name in names[:number]:
            yield Problem(what=f"a second index named {name!r}", where=f"{damage.place('indexes', number)}.name")


def _complete(matrix: Matrix, where: str, point: Point, facts: Facts, *, judge: bool) -> Cell | list[Problem]:
    """Turn a point into a cell, or say why there can be no such image.

    Whether variant and base go together is judged only if both are as they were written.
    """
    base = matrix.bases[point.base]
    torch = Version(point.torch)
    override = None if point.cudnn == "stock" else Version(point.cudnn)
    label = " · ".join(getattr(point, axis) for axis in AXES)
    leave = ("leave it out with an `exclude` entry",) if where == "axes" else ()
    problems = [
        Problem(
            what=problem.what,
            where=f"{where} ({label})",
            why=problem.why,
            tries=(*problem.tries, *leave),
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
    variant = whole_variant(matrix.variants, point.variant)
    problems += [
        Problem(what=problem.what, where=f"{where} ({label})", why=problem.why, tries=(*problem.tries, *leave))
        for problem in (_unfit(variant, base, point) if judge else ())
    ]
    cuda: Cuda = CPU if point.cuda == CPU else Version(point.cuda)
    build = facts.build(torch, cuda, KnownPlatform(point.platform))
    assert build is not None, "check_cell accepts known builds only"
    stock = build.cudnn
    cudnn = override or stock
    indexes = tuple(index for index in matrix.indexes if matches(index.when, point))
    if build.index is not Published.DEFAULT and not any("torch" in index.packages for index in indexes):
        what = f"torch {torch} for CUDA {point.cuda}" if point.cuda != "cpu" else f"the CPU build of torch {torch}"
        address = f"{PYTORCH_INDEX}/{cuda_label(point.cuda)}"
        problems.append(
            Problem(
                what=f"{what} is not on the default package index",
                where=f"{where} ({label})",
                why="only PyTorch's own index carries it",
                tries=(f"add {address} to `indexes`, with packages: [torch], when: {{cuda: '{point.cuda}'}}", *leave),
            )
        )
    if point.cuda != "cpu" and cudnn is None:
        problems.append(
            Problem(
                what=f"the stock cuDNN of torch {torch} for CUDA {point.cuda} is not known",
                where=f"{where} ({label})",
                why="the image's id and tag name its cuDNN, so it must be known before it is built",
                tries=("run `torchyard update`", "name the cuDNN on the cudnn axis", *leave),
            )
        )
    if problems:
        return problems
    python = f"py{base.python}"
    arch = () if point.platform == "linux/amd64" else (point.platform.split("/")[1],)
    gpu = () if cudnn is None else (f"cudnn{cudnn}",)
    companions = tuple(name.removeprefix("torch") for name in point.companions)
    identity = "-".join(
        (f"torch{torch}", cuda_label(point.cuda), *gpu, python, point.base, point.variant, *companions, *arch),
    )
    short_gpu = () if cudnn is None else (f"cudnn{cudnn if override else cudnn.major}",)
    default_base = listed(matrix.axes.base)[0]
    short = "-".join(
        (
            str(torch),
            "cpu" if point.cuda == "cpu" else f"cuda{point.cuda}",
            *short_gpu,
            point.variant,
            *companions,
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
        base_is_default=point.base == default_base,
        base=base,
        variant_name=point.variant,
        variant=variant,
        companions=point.companions,
        driver=facts.driver_floor(cuda),
        platform=point.platform,
        indexes=indexes,
        repository=matrix.repository,
        tag_names=(short, identity),
        exclude_newer=datetime.fromisoformat(matrix.exclude_newer),
    )


def expand(matrix: Matrix, facts: Facts, *, file: str = "matrix.yaml", damage: Damage = UNDAMAGED) -> Family:
    """Return the matrix' cells in the order of the file, and how they are published.

    Raises MatrixError with every problem at once: undefined names, impossible combinations, excludes that match
    nothing, two cells with one id or tag, a `latest` that is no cell. Of a damaged matrix, only what the damage cannot
    have caused is reported.
    """
    points, found = _points(matrix, damage)
    problems = [*_unknown_names(matrix, damage), *_duplicates(matrix, damage), *found]
    if damage.hides("variants"):  # What a variant extends may be just what is wrong.
        alone = {name: variant.model_copy(update={"extends": None}) for name, variant in matrix.variants.items()}
        matrix = matrix.model_copy(update={"variants": alone})
    elif unsound := list(_unsound_variants(matrix.variants)):
        raise _refusal([*problems, *unsound], file)
    cells: list[tuple[str, Cell]] = []
    for where, point in points if not damage.hides("indexes") else ():
        if point.base not in matrix.bases or point.variant not in matrix.variants:
            continue
        cell = _complete(matrix, where, point, facts, judge=not damage.hides("bases", "variants"))
        if isinstance(cell, Cell):
            cells.append((where, cell))
        else:
            problems += cell
    if "base" not in damage.axes:  # The first base is the one that tags do not name.
        problems += _shared_tags(cells)
    problems += _unsound_runners(matrix, facts)
    whole = len(cells) == len(points) and not damage.hides("axes", "bases", "variants", "indexes", "exclude", "include")
    latest = _latest(matrix, [cell for _, cell in cells]) if whole else None
    if isinstance(latest, Problem):
        problems.append(latest)
    if problems:
        raise _refusal(problems, file)
    about = matrix.publish
    assert not isinstance(latest, Problem)
    policy = Policy(tiers=tuple(sorted(about.tiers)), latest=latest, signed=about.signed, runners=about.runners)
    return Family(cells=tuple(cell for _, cell in cells), policy=policy)


def _latest(matrix: Matrix, cells: Sequence[Cell]) -> str | Problem | None:
    """Return the id of the cell that is to be `latest`, or say that there is none of that name."""
    name = matrix.publish.latest
    if name is None:
        return None
    known = {known: cell.id for cell in cells for known in cell.tag_names}
    if name in known:
        return known[name]
    return Problem(
        what=f"no cell has the tag {name!r}{did_you_mean(name, known)}",
        where="publish.latest",
        why="`latest` is one cell of this matrix, by its tag or its id",
        tries=("torchyard matrix lists them",),
    )


def _unsound_runners(matrix: Matrix, facts: Facts) -> Iterator[Problem]:
    """Report runner classes with one name, and GPUs that nobody knows."""
    names = [runner.name for runner in matrix.publish.runners]
    for number, runner in enumerate(matrix.publish.runners):
        where = f"publish.runners[{number}]"
        if runner.name in names[:number]:
            yield Problem(what=f"a second runner class named {runner.name!r}", where=f"{where}.name")
        for problem in check_gpu(facts, runner.gpu):
            yield replace(problem, where=f"{where}.gpu")


def _shared_tags(cells: Iterable[tuple[str, Cell]]) -> Iterator[Problem]:
    """Report each set of cells that would have one tag, once."""
    owners: dict[str, list[tuple[str, Cell]]] = defaultdict(list)
    for where, cell in cells:
        for tag in cell.tags:
            owners[tag].append((where, cell))
    reported: set[tuple[int, ...]] = set()
    for tag, holders in owners.items():
        same = tuple(id(cell) for _, cell in holders)
        if len(holders) == 1 or same in reported:
            continue
        reported.add(same)
        ids = list(dict.fromkeys(cell.id for _, cell in holders))
        yield Problem(
            what=f"{len(holders) if len(holders) > 2 else 'two'} cells would have the tag {tag}",
            where=" and ".join(where for where, _ in holders),
            why=f"they are the same cell, {ids[0]}" if len(ids) == 1 else " and ".join(ids),
            tries=("remove one of them",),
        )


def select(cells: Iterable[Cell], patterns: Sequence[str]) -> tuple[Cell, ...]:
    """Return the cells whose id, or a tag of whose, matches one of the shell-style patterns; all if there is none.

    Raises ImpossibleError naming every pattern that matches nothing.
    """
    cells = tuple(cells)
    if not patterns:
        return cells
    names = {cell.id: (cell.id, *cell.tags, *cell.tag_names) for cell in cells}
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
                    tries=tuple(
                        difflib.get_close_matches(pattern[:200], [n for known in names.values() for n in known], 3, 0.4)
                    )
                    or ("`torchyard matrix` lists them; quote patterns: 'torch2.8*'",),
                )
                for pattern in lost
            )
        )
    wanted = set().union(*chosen.values())
    return tuple(cell for cell in cells if cell.id in wanted)


# --------------------------------------------------------------------------- the file


def _refusal(problems: Iterable[Problem], file: str) -> MatrixError:
    return MatrixError(
        problems=tuple(
            replace(problem, where=f"{file}: {problem.where}" if problem.where else file) for problem in problems
        )
    )


def family(text: str, facts: Facts, *, file: str = "matrix.yaml") -> Family:
    """Read the file's text and expand it; raises MatrixError with every problem at once."""
    matrix, damage, problems = read(text)
    found: Family | None = None
    refusals = [_refusal(problems, file)] if problems else []
    if matrix is not None:
        try:
            found = expand(matrix, facts, file=file, damage=damage)
        except MatrixError as error:
            refusals.append(error)
    if refusals:
        raise MatrixError(problems=tuple(problem for error in refusals for problem in error.problems))
    assert found is not None, "what cannot be read is refused"
    return found


def cells(text: str, facts: Facts, *, file: str = "matrix.yaml") -> tuple[Cell, ...]:
    """Return the cells of the file's text; raises MatrixError with every problem at once."""
    return family(text, facts, file=file).cells
