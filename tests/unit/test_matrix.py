"""What people write in matrix.yaml: the cells it gives, and that everything wrong with it is said clearly, at once."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.version import Version
from pydantic import BaseModel

from builder import matrix as matrices
from builder.errors import ImpossibleError, MatrixError, Problem
from builder.facts import Facts
from builder.matrix import Cell, select
from builder.reading import MAX_DEPTH, MAX_FILE_BYTES, judge, text_of
from builder.schema import AXES, BootstrapBase, ImageBase, Matrix, Variant

FACTS = Facts.load()
SHIPPED = Path(matrices.__file__).parents[1] / "matrix.yaml"
DIGEST = "@sha256:" + "0123456789abcdef" * 4

# Every key that the schema has, so that each can be made wrong by itself.
FULL: Mapping[str, Any] = {
    "version": 1,
    "repository": "team/torchyard",
    "exclude_newer": "2026-11-15T00:00:00Z",
    "bases": {
        "bookworm": {
            "kind": "bootstrap",
            "suite": "bookworm",
            "python": "3.11",
            "packages": ["python3", "g++"],
            "image": f"debian:bookworm-slim{DIGEST}",
        },
        "plain": {
            "kind": "image",
            "image": f"registry.example:5000/python:3.11-slim{DIGEST}",
            "python": "3.11",
            "init": "/usr/bin/tini",
            "toolkit": "12.8",
        },
    },
    "variants": {
        "runtime": {
            "description": "PyTorch's own, and NumPy",
            "extends": "least",
            "packages": ["numpy>=2,<3"],
            "env": {"NAME": "one, two"},
            "directories": ["/cache"],
            "toolkit": False,
            "program": "notebook",
            "port": 8888,
        },
        "least": {"description": "nothing"},
        "devel": {"description": "for building"},
    },
    "indexes": [
        {
            "name": "pytorch-cpu",
            "url": "https://index.example/whl/cpu",
            "packages": ["torch"],
            "when": {
                "torch": ["2.13.0", ">=2.14"],
                "cuda": "cpu",
                "cudnn": "stock",
                "base": "bookworm",
                "variant": ["runtime"],
                "platform": "linux/amd64",
            },
        }
    ],
    "axes": {
        "torch": ["2.7.1", "2.8.0"],
        "cuda": ["12.6", "12.8"],
        "cudnn": ["stock"],
        "base": ["bookworm"],
        "variant": ["runtime"],
        "platform": ["linux/amd64"],
    },
    "exclude": [
        {"torch": ">=2.8", "cuda": "12.6", "reason": "the default index carries it for CUDA 12.8"},
        {
            "torch": "2.7.1",
            "cuda": ["12.8"],
            "cudnn": "stock",
            "base": ["bookworm"],
            "variant": "runtime",
            "platform": "linux/amd64",
            "reason": "the default index carries it for CUDA 12.6",
        },
    ],
    "include": [
        {
            "torch": "2.8.0",
            "cuda": "12.8",
            "cudnn": "9.16.0.29",
            "base": "plain",
            "variant": ["devel"],
            "platform": "linux/amd64",
            "reason": "a newer cuDNN",
        },
        {"torch": "2.13.0", "cuda": "cpu"},
    ],
    # But `latest`, which names a cell, and most documents here have other cells.
    "publish": {
        "tiers": [1, 2],
        "signed": False,
        "runners": [
            {
                "name": "h100",
                "labels": ["self-hosted", "gpu"],
                "gpu": "H100",
                "driver": "580.65.06",
                "gpus": 8,
                "platform": "linux/amd64",
            }
        ],
    },
}


def full() -> dict[str, Any]:
    return copy.deepcopy(dict(FULL))


def changed(*steps: str | int, to: object) -> dict[str, Any]:
    document = full()
    holder: Any = document
    for step in steps[:-1]:
        holder = holder[step]
    holder[steps[-1]] = to
    return document


def cells_of(document: object) -> tuple[Cell, ...]:
    text = document if isinstance(document, str) else yaml.safe_dump(document, sort_keys=False, width=10_000)
    return matrices.cells(text, FACTS)


def refusal(document: object) -> tuple[Problem, ...]:
    with pytest.raises(MatrixError) as caught:
        cells_of(document)
    return caught.value.problems


def only(document: object) -> Problem:
    problems = refusal(document)
    assert len(problems) == 1, "\n".join(map(str, problems))
    return problems[0]


def where(document: object) -> list[str]:
    return [problem.where.removeprefix("matrix.yaml: ") for problem in refusal(document)]


# --------------------------------------------------------------------------- expansion


def test_axes_excludes_and_includes() -> None:
    assert [(str(cell.torch), cell.cuda, cell.base_name, cell.variant_name) for cell in cells_of(full())] == [
        ("2.7.1", "12.6", "bookworm", "runtime"),
        ("2.8.0", "12.8", "bookworm", "runtime"),
        ("2.8.0", "12.8", "plain", "devel"),
        ("2.13.0", "cpu", "bookworm", "runtime"),
    ]


def test_ids_and_tags_are_composed_from_the_fields() -> None:
    stock27, stock, override, cpu = cells_of(full())
    assert stock27.id == "torch2.7.1-cu126-cudnn9.5.1.17-py3.11-bookworm-runtime"
    assert stock.id == "torch2.8.0-cu128-cudnn9.10.2.21-py3.11-bookworm-runtime"
    assert stock.tags == ("team/torchyard:2.8.0-cuda12.8-cudnn9-runtime", f"team/torchyard:{stock.id}")
    assert override.id == "torch2.8.0-cu128-cudnn9.16.0.29-py3.11-plain-devel"
    assert override.tags[0] == "team/torchyard:2.8.0-cuda12.8-cudnn9.16.0.29-devel-plain"
    assert cpu.id == "torch2.13.0-cpu-py3.11-bookworm-runtime"
    assert cpu.tags[0] == "team/torchyard:2.13.0-cpu-runtime"


def test_another_platform_is_named_at_the_end() -> None:
    document = full()
    document["include"] = [{"torch": "2.8.0", "cuda": "cpu", "platform": "linux/arm64"}]
    cell = cells_of(document)[-1]
    assert cell.id == "torch2.8.0-cpu-py3.11-bookworm-runtime-arm64"
    assert cell.tags[0] == "team/torchyard:2.8.0-cpu-runtime-arm64"


def test_a_cell_knows_what_torch_pins() -> None:
    _, stock, override, cpu = cells_of(full())
    assert (stock.cudnn, stock.cudnn_is_stock) == (Version("9.10.2.21"), True)
    assert (override.cudnn, override.cudnn_is_stock) == (Version("9.16.0.29"), False)
    assert (cpu.cudnn, cpu.cudnn_is_stock, cpu.nccl) == (None, True, None)
    assert stock.nccl == Version("2.27.3")
    assert "sm_90" in stock.architectures
    assert (stock.torch_local, cpu.torch_local) == ("2.8.0+cu128", "2.13.0+cpu")
    assert stock.exclude_newer.isoformat() == "2026-11-15T00:00:00+00:00"


def test_an_index_serves_only_the_cells_it_is_meant_for() -> None:
    assert [[index.name for index in cell.indexes] for cell in cells_of(full())] == [[], [], [], ["pytorch-cpu"]]


def test_an_include_takes_the_first_value_of_an_axis_it_does_not_name() -> None:
    document = full()
    document["include"] = [{"cuda": "12.6", "base": "plain"}]
    assert [cell.id for cell in cells_of(document)][-1] == "torch2.7.1-cu126-cudnn9.5.1.17-py3.11-plain-runtime"


def test_an_include_with_lists_is_a_product() -> None:
    document = full()
    document["include"] = [{"torch": "2.8.0", "cuda": "12.8", "base": "plain", "variant": ["runtime", "devel"]}]
    assert [cell.variant_name for cell in cells_of(document)][-2:] == ["runtime", "devel"]


@pytest.mark.parametrize(
    ("text", "torch", "admitted"),
    [
        (">=2.9", "2.10.0", True),  # not as text
        ("<2.9", "2.10.0", False),
        ("==2.8.*", "2.8.0", True),
        (">=2.7,<2.9", "2.8.0", True),
        ("2.8.0", "2.8.0", True),
        ("2.8.0", "2.8.1", False),
    ],
)
def test_ranges_compare_as_versions(text: str, torch: str, *, admitted: bool) -> None:
    exclude = Matrix.model_validate(matrices_tuples(changed("exclude", 0, "torch", to=text))).exclude[0]
    point = matrices.Point(
        torch=torch, cuda="12.6", cudnn="stock", base="bookworm", variant="runtime", platform="linux/amd64"
    )
    assert matrices.matches(exclude, point) is admitted


def test_a_range_of_cuda_never_means_the_cpu() -> None:
    document = full()
    document["axes"]["cuda"] = ["12.8", "cpu"]
    document["axes"]["torch"] = ["2.13.0"]
    document["exclude"] = [{"cuda": ">=1", "reason": "every CUDA"}]
    assert [cell.cuda for cell in cells_of(document | {"include": []})] == ["cpu"]


def matrices_tuples(value: object) -> Any:
    if isinstance(value, dict):
        return {key: matrices_tuples(item) for key, item in value.items()}
    return tuple(map(matrices_tuples, value)) if isinstance(value, list) else value


def test_the_shipped_matrix_has_what_the_product_promises() -> None:
    found = {
        (str(cell.torch), cell.cuda, cell.cudnn_is_stock, cell.python)
        for cell in matrices.cells(text_of(SHIPPED), FACTS)
    }
    assert found >= {
        ("2.7.1", "12.6", True, "3.11"),
        ("2.8.0", "12.8", True, "3.11"),
        ("2.8.0", "12.8", False, "3.11"),
        ("2.9.1", "12.8", True, "3.11"),
        ("2.15.0", "13.2", True, "3.11"),
        ("2.15.0", "13.2", True, "3.13"),
        ("2.13.0", "cpu", True, "3.11"),
    }


# --------------------------------------------------------------------------- selection


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        ([], [0, 1, 2, 3]),
        (["torch2.8*"], [1, 2]),
        (["*-cpu-*", "torch2.7*"], [0, 3]),  # in the order of the file
        (["torch2.13.0-cpu-py3.11-bookworm-runtime"], [3]),
        (["2.8.0-cuda12.8-cudnn9-runtime"], [1]),
        (["team/torchyard:2.13.0-cpu-runtime"], [3]),
        (["*-runtime", "torch2.8*"], [0, 1, 2, 3]),
    ],
)
def test_patterns_select_by_id_and_tag(patterns: Sequence[str], chosen: Sequence[int]) -> None:
    cells = cells_of(full())
    assert select(cells, patterns) == tuple(cells[number] for number in chosen)


def test_patterns_that_match_nothing_are_all_named_with_what_is_near() -> None:
    with pytest.raises(ImpossibleError) as caught:
        select(cells_of(full()), ["torch2.8*", "2.8.0-cuda12.8-cudnn9-runtim", "zzz"])
    first, second = caught.value.problems
    assert "'2.8.0-cuda12.8-cudnn9-runtim'" in first.what
    assert "2.8.0-cuda12.8-cudnn9-runtime" in first.tries
    assert "'zzz'" in second.what
    assert "torchyard matrix" in second.tries[0]


# --------------------------------------------------------------------------- injection: every field of the schema

EVIL = ("\n", "\r", "\x00", '"', "`id`", "$(id)", "${HOME}", "{{ 1 }}", "{% x %}", "\\", "\x1b[31m", "\u2028", "\u202e")
SAMPLE_KEYS: Mapping[object, str] = {BootstrapBase: "bookworm", ImageBase: "plain", Variant: "runtime"}

Place = tuple[tuple[str | int, ...], bool]
"""A path in the file, and whether the key at its end (and not a value) is meant."""


def places(kind: Any, at: tuple[str | int, ...] = ()) -> Iterator[Place]:
    """Walk the schema to every place where the file may hold text."""
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        for name, info in kind.model_fields.items():
            yield from places(info.annotation, (*at, name))
    elif origin is Annotated:
        yield from places(arguments[0], at)
    elif origin in (Union, UnionType):
        for argument in arguments:
            yield from places(argument, at)
    elif origin is tuple:
        yield from places(arguments[0], (*at, 0))
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        models = [model for model in SAMPLE_KEYS if model in _models_in(arguments[1])]
        yield (*at, "anything"), True
        for model in models:
            yield from places(model, (*at, SAMPLE_KEYS[model]))
        if not models:
            yield from places(arguments[1], (*at, "NAME"))
    elif kind in (str, int, bool) or origin is Literal:
        yield at, False
    else:
        assert kind is NoneType, f"a kind of value this test does not know: {kind}"


def _models_in(kind: Any) -> list[Any]:
    return [kind] if isinstance(kind, type) else [found for part in get_args(kind) for found in _models_in(part)]


PLACES = sorted(set(places(Matrix)), key=str)


def spell(steps: Sequence[str | int]) -> str:
    return re.sub(r"\.(?=\[)", "", ".".join(f"[{step}]" if isinstance(step, int) else step for step in steps))


def holding(steps: Sequence[str | int], make: Callable[[object], object]) -> dict[str, Any]:
    """Put a value at the place in a full document; `make` is given what is there now."""
    document = full()
    holder: Any = document
    for step, following in pairwise(steps):
        if isinstance(holder, dict):
            holder.setdefault(step, [] if isinstance(following, int) else {})
        if isinstance(following, int) and not isinstance(holder[step], list):
            holder[step] = [holder[step]]
        holder = holder[step]
    last: Any = steps[-1]
    if isinstance(holder, list):
        holder[:] = [make(holder[0] if holder else None), *holder[1:]]
    else:
        present = holder.get(last)
        holder[last] = make(present[0] if isinstance(present, list) else present)
    return document


def test_the_walk_reaches_every_kind_of_field() -> None:
    spelt = {spell(steps) for steps, key in PLACES if not key}
    assert spelt >= {
        "repository",
        "exclude_newer",
        "bases.bookworm.packages[0]",
        "bases.plain.init",
        "variants.runtime.env.NAME",
        "indexes[0].when.torch",
        "indexes[0].when.torch[0]",
        "axes.platform[0]",
        "exclude[0].reason",
        "include[0].cudnn[0]",
        "publish.runners[0].labels[0]",
    }
    assert {spell(steps) for steps, key in PLACES if key} == {
        "bases.anything",
        "variants.anything",
        "variants.runtime.env.anything",
    }


@pytest.mark.parametrize(("steps", "key"), PLACES, ids=lambda value: spell(value) if isinstance(value, tuple) else "")
def test_no_field_admits_what_could_inject(steps: tuple[str | int, ...], *, key: bool) -> None:
    for evil in EVIL:
        for text in (evil, f"a{evil}b"):
            if key:
                holder = steps[:-1]
                entry = FULL["variants"]["devel"] if holder == ("variants",) else FULL["bases"]["bookworm"]
                document = holding((*holder, text), lambda _: "x" if "env" in holder else entry)  # noqa: B023
                expected = f"{spell(holder)}.{text!r}"
            else:
                document = holding(steps, lambda now: text if now is None else f"{now}{text}")  # noqa: B023
                expected = spell(steps)
            found = {problem.where: problem for problem in judge(document)[2]}
            assert expected in found, (text, list(found))
            problem = found[expected]
            assert "\n" not in problem.what
            assert problem.why


@pytest.mark.parametrize(
    "steps", [steps for steps, key in PLACES if not key and steps[-1] not in ("description", "reason")], ids=spell
)
def test_only_prose_admits_an_apostrophe(steps: tuple[str | int, ...]) -> None:
    document = holding(steps, lambda now: f"{now or 'a'}'")
    assert spell(steps) in {problem.where for problem in judge(document)[2]}


@pytest.mark.parametrize("steps", [steps for steps, key in PLACES if not key], ids=spell)
@pytest.mark.parametrize("value", [2.1, True, {"a": "b"}], ids=str)
def test_no_field_admits_another_type(steps: tuple[str | int, ...], value: object) -> None:
    if value is True and steps in (("variants", "runtime", "toolkit"), ("publish", "signed")):
        value = "yes"
    document = holding(steps, lambda _: value)
    found = {problem.where: problem for problem in refusal(document)}
    at = spell((*steps, "kind") if value == {"a": "b"} and steps[-1] in SAMPLE_KEYS.values() else steps)
    assert f"matrix.yaml: {at}" in found, list(found)


# --------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("document", "at", "what", "why"),
    [
        (changed("axes", "torch", 1, to=2.1), "axes.torch[1]", "here is the number 2.1", "reads 2.10 as the number"),
        (changed("bases", "bookworm", "python", to=3.11), "bases.bookworm.python", "the number 3.11", "YAML reads"),
        (changed("exclude_newer", to="2026-13-01T00:00:00Z"), "exclude_newer", "not allowed", "no such day"),
        (changed("axes", "base", to="bookworm"), "axes.base", "the text 'bookworm', where a list is needed", ""),
        (changed("axes", "cuda", to=[]), "axes.cuda", "is empty", ""),
        (changed("axes", "cuda", to=None), "axes.cuda", "is empty", ""),
        (changed("exclude", 0, "cuda", to=[]), "exclude[0].cuda", "is empty", ""),
        (changed("exclude", 1, "cuda", to=["12.6", 12.8]), "exclude[1].cuda[1]", "the number 12.8", ""),
        (changed("exclude", 0, "torch", to=">=a"), "exclude[0].torch", "'>=a'", "a range of versions is written like"),
        (changed("exclude", 0, "torch", to="2.8"), "exclude[0].torch", "'2.8'", "'==2.8.*'"),
        (changed("exclude", 0, to={"torch": "2.8.0"}), "exclude[0].reason", "'reason' is missing", "says why"),
        (changed("exclude", 0, to="2.8.0"), "exclude[0]", "the text '2.8.0', where keys", ""),
        (changed("variantz", to={}), "variantz", "unknown key 'variantz'. Did you mean 'variants'?", "known here"),
        (changed("axes", "cudda", to=[]), "axes.cudda", "Did you mean 'cuda'?", "known here: torch, cuda"),
        (changed("exclude", 0, "resaon", to="x"), "exclude[0].resaon", "Did you mean 'reason'?", "known here"),
        (changed("indexes", 0, "when", "tourch", to="x"), "indexes[0].when.tourch", "Did you mean 'torch'?", ""),
        (changed("bases", "plain", "suite", to="x"), "bases.plain.suite", "unknown key 'suite'", "kind, image"),
        (changed("variants", "runtime", "pakages", to=[]), "variants.runtime.pakages", "mean 'packages'", ""),
        (changed("bases", "plain", "kind", to="imag"), "bases.plain.kind", "'imag' is not known. Did you", "bootstrap"),
        (changed("bases", "plain", to={"python": "3.11"}), "bases.plain.kind", "'kind' is missing", "registry"),
        (changed("bases", "plain", "image", to="python:3.11"), "bases.plain.image", "'python:3.11'", "digest"),
        (changed("bases", 12, to=FULL["bases"]["plain"]), "bases.12", "the key '12'", "need quotes"),
        (changed("bases", "Book Worm", to=FULL["bases"]["plain"]), "bases.'Book Worm'", "'Book Worm'", "small letters"),
        (changed("axes", "platform", to=["linux/x86_64"]), "axes.platform[0]", "'linux/x86_64'", "'linux/amd64'"),
        (changed("version", to=2), "version", "the number 2 is not allowed", "this torchyard knows 1"),
        (changed("variants", "devel", "description", to='a "b"'), "variants.devel.description", "", "a double quote"),
        (changed("variants", "devel", "description", to="a\nb"), "variants.devel.description", "", "a line break"),
        (changed("variants", "devel", "env", to={"a": "b"}), "variants.devel.env.a", "the key 'a'", "capital"),
        (changed("variants", "devel", "packages", to=["x @ https://y"]), "variants.devel.packages[0]", "", "URL"),
        (changed("variants", "devel", "packages", to=["x>=y"]), "variants.devel.packages[0]", "'x>=y'", "numpy>=2,<3"),
        (changed("indexes", 0, "url", to="https://u:p@h/x"), "indexes[0].url", "", "without user, password"),
        (changed("axes", "torch", to=["2.7.1", "2.8.0", "2.7.1"]), "axes.torch[2]", "'2.7.1' stands here twice", ""),
        (changed("axes", "base", to=["bookwurm"]), "axes.base", "Did you mean 'bookworm'?", "bookworm, plain"),
        (changed("include", 0, "variant", to="devil"), "include[0].variant", "Did you mean 'devel'?", ""),
        (changed("exclude", 1, "base", to="x"), "exclude[1].base", "base 'x' is not defined", ""),
        (changed("indexes", 0, "when", "base", to="x"), "indexes[0].when.base", "base 'x' is not defined", ""),
        (changed("include", 0, to={}), "include[0] (2.7.1 · 12.6 · stock", "", ""),
    ],
)
def test_a_mistake_is_said_where_it_is(document: object, at: str, what: str, why: str) -> None:
    if at.startswith("include[0] ("):  # the default point exists already
        assert [problem.where for problem in refusal(document)] == ["matrix.yaml: axes and include[0]"]
        return
    problem = next(it for it in refusal(document) if it.where == f"matrix.yaml: {at}")
    assert what in problem.what
    assert why in problem.why


def test_people_are_never_shown_patterns_or_pydantic() -> None:
    wrong: list[object] = [2.5, True, None, [], {}, "", "\n", "$(x)", "UPPER lower", ["ok", 3], {"a": 1}]
    internal = r"function-|constrained|tuple|union|[Ii]nput|discriminat|\(\?:|\[A-Z|<one>|<several>|\[key\]|None"
    for steps in [steps for steps, key in PLACES if not key]:
        for value in wrong:
            for problem in judge(holding(steps, lambda _: value))[2]:  # noqa: B023
                said = " ".join([problem.what, problem.where, problem.why, *problem.tries])
                assert not re.search(internal, said), said
                assert len(said) < 1000


def test_two_cells_with_one_tag() -> None:
    document = full()
    document["include"] = [{"torch": "2.8.0", "cuda": "12.8"}]
    problem = only(document)
    assert problem.what == "two cells would have the tag team/torchyard:2.8.0-cuda12.8-cudnn9-runtime"
    assert problem.where == "matrix.yaml: axes and include[0]"
    assert "the same cell" in problem.why


def test_two_different_cells_with_one_tag() -> None:
    document = full()
    document["variants"]["plain"] = {"description": "called like a base"}
    document["variants"]["plainx"] = {"description": "x"}
    document["bases"]["other"] = {**FULL["bases"]["plain"], "python": "3.12"}
    document["axes"]["base"] = ["bookworm"]
    document["variants"]["arm64"] = {"description": "called like an architecture"}
    document["bases"]["arm64"] = FULL["bases"]["plain"]
    document["include"] = [
        {"torch": "2.8.0", "cuda": "cpu", "platform": "linux/arm64"},
        {"torch": "2.8.0", "cuda": "cpu", "base": "arm64"},
    ]
    document["indexes"][0]["when"] = {"cuda": "cpu"}
    problem = only(document)
    assert problem.what == "two cells would have the tag team/torchyard:2.8.0-cpu-runtime-arm64"
    assert problem.where == "matrix.yaml: include[0] and include[1]"
    assert "py3.11-bookworm-runtime-arm64 and torch2.8.0-cpu-py3.11-arm64-runtime" in problem.why


def test_an_exclude_that_matches_nothing() -> None:
    document = full()
    document["exclude"].append({"torch": "2.99.0", "cuda": ["12.6", "12.8"], "reason": "never"})
    problem = only(document)
    assert problem.what == "excludes nothing (torch: 2.99.0, cuda: 12.6 or 12.8)"
    assert problem.where == "matrix.yaml: exclude[2]"


def test_an_exclude_that_earlier_ones_leave_nothing_is_one_too() -> None:
    document = full()
    document["exclude"].append(document["exclude"][0])
    assert where(document) == ["exclude[2]"]


def test_excluding_everything() -> None:
    document = full()
    document["exclude"] = [{"reason": "all of it"}]
    assert "no cell is left" in [problem.what for problem in refusal(document)]


def test_an_impossible_combination_says_why_and_what_to_try() -> None:
    problem = only(changed("include", 1, to={"torch": "2.8.0", "cuda": "12.1"}))
    assert problem.what == "torch 2.8.0 was never built for CUDA 12.1"
    assert problem.where.startswith("matrix.yaml: include[1] (2.8.0 · 12.1 · stock · bookworm · runtime")
    assert "12.6, 12.8 and 12.9" in problem.why
    assert problem.tries == ("torch 2.8.0 + CUDA 12.6 (driver >= 525.60.13)", "torch 2.5.1 + CUDA 12.1")


def test_an_impossible_point_of_the_axes_may_be_left_out() -> None:
    document = full()
    del document["exclude"][1]
    document["axes"]["cuda"] = ["12.6", "12.8", "11.8"]
    tries = [problem.tries[-1] for problem in refusal(document) if "11.8" in problem.what]
    assert tries
    assert all("exclude" in text and not text.startswith("or ") for text in tries)


def test_a_build_of_another_index_needs_that_index() -> None:
    problem = only(changed("include", 1, to={"torch": "2.7.1", "cuda": "11.8"}))
    assert "not on the default package index" in problem.what
    assert "whl/cu118" in problem.tries[0]
    document = changed("include", 1, to={"torch": "2.7.1", "cuda": "11.8"})
    document["indexes"][0]["when"] = {"cuda": "11.8"}
    assert cells_of(document)[-1].id.startswith("torch2.7.1-cu118-cudnn9.1.0.70-")


def test_a_product_without_end_is_refused_before_it_is_made() -> None:
    document = full()
    document["axes"]["torch"] = [f"{number}.0.0" for number in range(300)]
    document["axes"]["cuda"] = [f"{number}.0" for number in range(300)]
    document["include"] = [{"torch": [f"{n}.0.0" for n in range(300)], "cuda": [f"{n}.0" for n in range(300)]}]
    problem = refusal(document)[0]
    assert problem.what == "90000 cells are more than the 10000 that a matrix may have"
    assert problem.where == "matrix.yaml: axes"
    document["axes"]["cuda"] = ["12.6"]
    assert "include[0]" in where(document)


# --------------------------------------------------------------------------- YAML


def shipped(old: str, new: str) -> str:
    text = SHIPPED.read_text("utf-8")
    assert old in text
    return text.replace(old, new, 1)


@pytest.mark.parametrize(
    ("text", "at", "said"),
    [
        ("", "", "the file is empty"),
        ("# nothing\n", "", "the file is empty"),
        ("- a\n", "", "a list"),
        ("torch\n", "", "the text 'torch'"),
        (shipped("[stock]", "[stock"), "line ", "expected ',' or ']'"),
        (shipped("repository:", "\trepository:"), "line ", "cannot start any token"),
        (shipped("repository: torchyard", "repository: torch\x07yard"), "line ", "U+0007"),
        (shipped("repository: torchyard", "repository: torchyard\nrepository: x"), "repository", "stands here twice"),
        (shipped("    suite: bookworm\n", "    suite: a\n    suite: b\n"), "bases.bookworm.suite", "twice"),
        (shipped("{cuda: cpu}", "{cuda: cpu, cuda: cpu}"), "indexes[0].when.cuda", "twice"),
        (
            shipped("repository: torchyard", "repository: !!python/object/apply:os.system [id]"),
            "repository",
            "!!python",
        ),
        (shipped("repository: torchyard", "repository: !x y"), "repository", "the YAML tag '!x'"),
        (shipped("repository: torchyard", "repository: !!binary aGk="), "repository", "!!binary"),
        (shipped("[stock]", "!!set {stock}"), "axes.cudnn", "!!set"),
        (shipped("    kind: boot", "    <<: {python: '3.1'}\n    kind: boot"), "bases.bookworm.'<<'", "merge key"),
        (shipped("repository: torchyard", "? [a, b]\n: c\nrepository: torchyard"), "'?'", "a key is a text"),
        (shipped("version: 1", "version: 1\n---\nb: 2"), "line ", "a single document"),
        ("[" * 3000, "line 1, column 21", "nested more than 20"),
        ("a: " * 2 + "{b: " * 30, "line 1", ""),
        (shipped("repository: torchyard", "repository: 2026-02-31"), "", "day is out of range"),
        ("a: !!int x", "", ""),
        ('repository: "\\ud800"', "repository", ""),
    ],
)
def test_yaml_that_is_refused(text: str, at: str, said: str) -> None:
    found = [problem for problem in refusal(text) if problem.where.startswith(f"matrix.yaml: {at}" if at else "matrix")]
    assert any(said in f"{problem.what} {problem.why}" for problem in found), [str(it) for it in refusal(text)]


def test_aliases_are_refused_where_they_are_used_and_never_expanded() -> None:
    text = shipped("[stock]", "&one [stock]").replace("base: [bookworm]", "base: *one")
    problem = only(text)
    assert (problem.where, problem.what) == ("matrix.yaml: axes.base", "alias *one is not allowed")
    laughs = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 15))
    assert sum("alias" in problem.what for problem in refusal(laughs)) == 9 * 14


def test_nesting_up_to_the_limit_is_not_a_matter_of_yaml() -> None:
    inner = "x"
    for _ in range(MAX_DEPTH - 2):
        inner = f"[{inner}]"
    assert "repository" in where(f"repository: {inner}")


@pytest.mark.parametrize(
    ("content", "what", "at"),
    [
        (b"#" * (MAX_FILE_BYTES + 1), f"larger than {MAX_FILE_BYTES} bytes", "matrix.yaml"),
        (b"a: 1\nb: \xff\n", "not UTF-8 text", "matrix.yaml: line 2"),
        ("version: 1".encode("utf-16"), "not UTF-8 text", "matrix.yaml: line 1"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, content: bytes, what: str, at: str) -> None:
    path = tmp_path / "matrix.yaml"
    path.write_bytes(content)
    with pytest.raises(MatrixError) as caught:
        text_of(path)
    assert [(problem.what, problem.where) for problem in caught.value.problems] == [(what, at)]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MatrixError, match="does not exist"):
        text_of(tmp_path / "matrix.yaml")
    with pytest.raises(MatrixError, match="cannot be read"):
        text_of(tmp_path)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "matrix.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + SHIPPED.read_bytes())
    assert matrices.cells(text_of(path), FACTS) == matrices.cells(text_of(SHIPPED), FACTS)


# --------------------------------------------------------------------------- all together


def test_every_planted_mistake_is_reported_in_one_run() -> None:
    text = """\
version: 1
repository: torchyard
repository: torch yard
exclude_newer: 2026-11-15
bases:
  bookworm:
    kind: bootstrap
    suite: bookworm
    python: 3.11
    packages: [python3]
    image: debian:bookworm-slim@sha256:96e378d7e6531ac9a15ad505478fcc2e69f371b10f5cdf87857c4b8188404716
  plain: {kind: image, python: "3.11", image: "python@sha256:0000", init: "/bin/$(id)"}
variants:
  runtime:
    description: "two\\nlines"
    packages: ["numpy`id`"]
    enf: {}
indexes:
  - {name: cpu, url: "https://index.example/'", packages: [], when: {cuda: cpu}}
axes:
  torch: ["2.8.0", 2.10]
  cuda: ["12.8"]
  base: [bookworm, bookwurm]
  variant: [runtime]
  cudnn: []
exclude:
  - {cuda: "12.8"}
  - {variant: runtime, reason: "{{ x }}"}
  - !!set {a}
include:
  - {torch: "2.8.0", cuda: *here}
"""
    assert sorted(set(where(text))) == sorted(
        {
            "repository",
            "exclude_newer",
            "bases.bookworm.python",
            "bases.plain.image",
            "bases.plain.init",
            "variants.runtime.description",
            "variants.runtime.packages[0]",
            "variants.runtime.enf",
            "indexes[0].url",
            "indexes[0].packages",
            "axes.torch[1]",
            "axes.cudnn",
            "exclude[0].reason",
            "exclude[1].reason",
            "exclude[2]",
            "exclude[2].reason",
            "exclude[2].a",
            "include[0].cuda",
        }
    )


def test_what_is_sound_is_judged_beside_what_is_not() -> None:
    document = full()
    document["variants"]["devel"]["description"] = "$(id)"
    document["repository"] = "UPPER"
    document["axes"]["base"] = ["bookworm", "bookwurm"]
    document["exclude"].append({"torch": "2.99.0", "reason": "never"})
    document["include"].append({"torch": "2.8.0", "cuda": "12.1"})
    document["include"].append({"torch": "2.8.0", "cuda": "12.8"})
    assert [place.partition(" (")[0] for place in where(document)] == [
        "repository",
        "variants.devel.description",
        "axes.base",
        "exclude[2]",
        "include[2]",
        "axes and include[3]",
    ]


def test_the_only_base_and_variant_may_be_what_is_wrong() -> None:
    document = full()
    document["bases"] = {"bookworm": {**FULL["bases"]["bookworm"], "suite": "$(id)"}}
    document["variants"] = {"runtime": {"description": "$(id)"}}
    document["include"] = [{"torch": "2.8.0", "cuda": "12.1"}, {"torch": "2.8.0", "cuda": "12.8", "base": "boookworm"}]
    assert [place.partition(" (")[0] for place in where(document)] == [
        "bases.bookworm.suite",
        "variants.runtime.description",
        "include[1].base",
        "include[0]",
    ]


def test_an_override_that_cannot_be_is_refused_with_the_stock_one() -> None:
    problem = only(changed("include", 0, to={"torch": "2.8.0", "cuda": "12.8", "cudnn": "8.9.2.26"}))
    assert "cuDNN 8.9.2.26 cannot replace it" in problem.what
    assert problem.tries[0].startswith("torch 2.8.0 + CUDA 12.8 + cuDNN 9.10.2.21")


def test_entries_keep_their_numbers_beside_bad_ones() -> None:
    document = full()
    document["exclude"] = [{"torch": 5, "reason": "x"}, *document["exclude"], {"torch": "2.99.0", "reason": "never"}]
    document["include"] = [{"torch": 5}, {"torch": "2.8.0", "cuda": "12.1"}]
    assert [place.partition(" (")[0] for place in where(document)] == [
        "exclude[0].torch",
        "include[0].torch",
        "exclude[3]",
        "include[1]",
    ]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        # What is not excluded because the entry is wrong is no mistake of its own,
        (changed("exclude", 0, "torch", to=5), ["exclude[0].torch"]),
        # nor what is not excluded because the key is.
        ({("exclud" if key == "exclude" else key): value for key, value in FULL.items()}, ["exclud"]),
        # A base that is wrong is defined all the same,
        (changed("bases", "bookworm", "python", to=3.11), ["bases.bookworm.python"]),
        # and under a wrong key it might be.
        (
            changed("bases", to={"Bookworm": FULL["bases"]["bookworm"], "plain": FULL["bases"]["plain"]}),
            ["bases.Bookworm"],
        ),
        # A bad index may be the one that a cell needs.
        (changed("indexes", 0, "name", to="A"), ["indexes[0].name"]),
        # A bad value may be the one that an exclude is meant for, or that an include takes.
        (changed("axes", "torch", 0, to=2.7), ["axes.torch[0]"]),
        (changed("axes", "torch", 0, to=2.7) | {"include": [{"cuda": "11.8"}]}, ["axes.torch[0]"]),
        # Of values that are all wrong, none is left, but the axis is not empty.
        (changed("axes", "platform", to=["linux/x86_64"]), ["axes.platform[0]"]),
    ],
)
def test_a_mistake_is_not_reported_by_its_consequences(document: object, expected: Sequence[str]) -> None:
    assert where(document) == list(expected)


# --------------------------------------------------------------------------- anything at all

SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
WORDS = [*Matrix.model_fields, *AXES, "kind", "bootstrap", "image", "suite", "reason", "2.8.0", "12.8", "cpu", "stock"]

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.dates()
    | st.sampled_from(WORDS),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=8) | st.integers(), inner, max_size=5)
    ),
    max_leaves=20,
)


def survives(text: str) -> None:
    problems: tuple[Problem, ...] = ()
    try:
        matrices.cells(text, FACTS)
    except MatrixError as error:
        problems = error.problems
    assert all(problem.what and problem.where.startswith("matrix.yaml") for problem in problems)


@SETTINGS
@given(st.text(max_size=300))
def test_any_text_is_answered(text: str) -> None:
    survives(text)


@SETTINGS
@given(st.text(alphabet="[]{}:,-&*!|>?'\"%@` \n\tab012.<~=", max_size=120))
def test_any_punctuation_is_answered(text: str) -> None:
    survives(text)


@SETTINGS
@given(values)
def test_any_structure_is_answered(value: object) -> None:
    survives(yaml.safe_dump(value, allow_unicode=True))


@SETTINGS
@given(st.sampled_from(PLACES), values)
def test_any_value_anywhere_is_answered(place: Place, value: object) -> None:
    steps, _ = place
    survives(yaml.safe_dump(holding(steps, lambda _: value), allow_unicode=True))


@SETTINGS
@given(st.data())
def test_any_damage_to_the_shipped_file_is_answered(data: st.DataObject) -> None:
    text = SHIPPED.read_text("utf-8")
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(len(text), start + 80)))
    survives(text[:start] + data.draw(st.text(max_size=10)) + text[stop:])


def with_variants(**variants: Mapping[str, Any]) -> dict[str, Any]:
    document = full()
    document["variants"] |= variants
    return document


def test_a_variant_has_what_those_have_that_it_extends() -> None:
    document = with_variants(
        runtime={"description": "least", "packages": ["numpy"], "env": {"A": "1", "B": "1"}, "directories": ["/a"]},
        service={"description": "a", "extends": "runtime", "packages": ["fastapi"], "env": {"B": "2"}, "port": 8000},
        last={"description": "b", "extends": "service", "program": "serve", "system": ["git"], "toolkit": False},
    )
    document["include"] = [{"torch": "2.8.0", "cuda": "12.8", "variant": "last"}]
    variant = cells_of(document)[-1].variant
    assert variant.description == "b"
    assert variant.packages == ("numpy", "fastapi")
    assert variant.env == {"A": "1", "B": "2"}
    assert (variant.directories, variant.system) == (("/a",), ("git",))
    assert (variant.program, variant.port) == ("serve", 8000)


@pytest.mark.parametrize(
    ("extends", "what", "why"),
    [
        ("runtimes", "variant 'runtimes' is not defined. Did you mean 'runtime'?", "`variants` defines runtime"),
        ("devel", "devel extends itself", "devel → devel"),
    ],
)
def test_what_a_variant_extends_must_be_another_one(extends: str, what: str, why: str) -> None:
    problem = only(changed("variants", "devel", "extends", to=extends))
    assert problem.where == "matrix.yaml: variants.devel.extends"
    assert problem.what == what
    assert why in problem.why


def test_variants_that_extend_each_other_in_a_circle() -> None:
    document = with_variants(
        one={"description": "1", "extends": "two"},
        two={"description": "2", "extends": "three"},
        three={"description": "3", "extends": "one"},
    )
    assert {problem.what for problem in refusal(document)} == {f"{n} extends itself" for n in ("one", "two", "three")}


def test_debian_packages_cannot_be_installed_in_an_image() -> None:
    document = with_variants(devel={"description": "for building", "system": ["git"]})
    problem = only(document)
    assert "include[0]" in problem.where
    assert problem.what == "variant devel needs Debian packages, and base plain is an image"


@pytest.mark.parametrize(("name", "why"), [("start", "torchyard-start is in every image"), ("a_b", "single hyphens")])
def test_names_of_programs(name: str, why: str) -> None:
    problem = only(changed("variants", "devel", "program", to=name))
    assert problem.where == "matrix.yaml: variants.devel.program"
    assert why in problem.why


@pytest.mark.parametrize("port", [80, 65536, "8888", True])
def test_ports_that_no_user_can_listen_on(port: object) -> None:
    problem = only(changed("variants", "devel", "port", to=port))
    assert problem.where == "matrix.yaml: variants.devel.port"
    assert "1024" in problem.why


@pytest.mark.parametrize("path", ["/etc", "/opt/venv/bin", "/cache/../etc", "/..", "/home/torch"])
def test_directories_that_are_not_a_variant_s_to_open(path: str) -> None:
    problem = only(changed("variants", "devel", "directories", to=[path]))
    assert problem.where == "matrix.yaml: variants.devel.directories[0]"
    assert "apart from the system's" in problem.why


def test_companions_are_named_in_the_id_and_the_tag() -> None:
    document = full()
    document["include"] = [{"torch": "2.8.0", "cuda": "12.8", "companions": ["torchvision", "torchaudio"]}]
    cell = cells_of(document)[-1]
    assert cell.companions == ("torchvision", "torchaudio")
    assert cell.id == "torch2.8.0-cu128-cudnn9.10.2.21-py3.11-bookworm-runtime-vision-audio"
    assert cell.tag_names[0] == "2.8.0-cuda12.8-cudnn9-runtime-vision-audio"


@pytest.mark.parametrize("name", ["HOME", "LOGNAME", "PATH", "VIRTUAL_ENV"])
def test_a_variant_cannot_take_what_images_stand_on(name: str) -> None:
    problem = only(changed("variants", "runtime", "env", to={name: "elsewhere"}))
    assert problem.where.startswith("matrix.yaml: variants.runtime.env")
    assert name in problem.what
