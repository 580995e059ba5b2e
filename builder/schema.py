"""matrix.yaml as people write it: every field typed, described, and closed to anything but its own pattern."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar, Union

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
)

AXES = ("torch", "cuda", "cudnn", "base", "variant", "platform")

# Every value that can reach a Dockerfile, a shell or a file name has an anchored pattern of its own, so nothing
# in the file can inject into either: no field admits a quote, `$`, backtick, brace, backslash or line break.

WORDS: dict[str, str] = {}
"""What a pattern admits, in words, by pattern: people are told this and not the pattern."""


def _matching(pattern: str, words: str, *, max_length: int = 200) -> StringConstraints:
    anchored = rf"^(?:{pattern})$"
    WORDS[anchored] = words
    return StringConstraints(pattern=anchored, max_length=max_length, strict=True)


def _requirement(value: str) -> str:
    try:
        requirement = Requirement(value)
    except InvalidRequirement:
        raise ValueError(_REQUIREMENT) from None
    if requirement.url or requirement.marker:
        raise ValueError(_REQUIREMENT)
    return value


def _range(value: str) -> str:
    if value[0] in "<>=!~":
        try:
            SpecifierSet(value)
        except InvalidSpecifier:
            raise ValueError("a range of versions is written like '>=2.9,<2.12' or '==2.8.*'") from None
    return value


def _visible(value: str) -> str:
    if not value.isprintable():
        raise ValueError(_SENTENCE)
    return value


def _free(name: str) -> str:
    if name in ("HOME", "LOGNAME", "PATH", "VIRTUAL_ENV"):
        raise ValueError(f"{name} is set by torchyard: images would not find their own Python or home without it")
    return name


_SYSTEM = re.compile(r"bin|boot|dev|etc|home|lib|lib32|lib64|opt|proc|root|run|sbin|sys|tmp|usr|workspace")


def _apart(path: str) -> str:
    parts = path.split("/")[1:]
    if _SYSTEM.fullmatch(parts[0]) or {".", ".."} & set(parts):
        raise ValueError("it is a directory apart from the system's and torchyard's own: /cache, /data/models")
    return path


def _unreserved(name: str) -> str:
    if name in ("start", "validate"):
        raise ValueError(f"torchyard-{name} is in every image; choose another name")
    return name


def _number(value: object) -> object:
    if isinstance(value, bool):  # which equals 1, in Python
        raise ValueError("it is a number")  # noqa: TRY004 (pydantic's way)
    return value


def _moment(value: str) -> str:
    try:
        datetime.fromisoformat(value)
    except ValueError as error:
        raise ValueError(f"there is no such day or time: {error}") from None
    return value


_N = r"(?:0|[1-9][0-9]{0,5})"
_PATH = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_REQUIREMENT = "a package is a name with an optional version, without spaces, URL or marker: numpy, numpy>=2,<3"

Name = Annotated[str, _matching(r"[a-z][a-z0-9]{0,30}", "a name is at most 31 small letters and digits: bookworm")]
IndexName = Annotated[
    str,
    _matching(
        r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*",
        "an index is named by small letters and digits with single hyphens: pytorch-cpu",
        max_length=60,
    ),
]
TorchVersion = Annotated[str, _matching(rf"{_N}\.{_N}\.{_N}", "a torch release is three numbers joined by dots: 2.8.0")]
TorchRange = Annotated[
    str,
    _matching(
        rf"{_N}\.{_N}\.{_N}|[<>=!~][0-9A-Za-z.*<>=!~, ]+",
        "it is a torch release such as 2.8.0, or a range such as '>=2.9,<2.12' or '==2.8.*'",
    ),
    AfterValidator(_range),
]
CudaVersion = Annotated[str, _matching(rf"cpu|{_N}\.{_N}", "it is CUDA's major and minor version such as 12.8, or cpu")]
CudaRange = Annotated[
    str,
    _matching(
        rf"cpu|{_N}\.{_N}|[<>=!~][0-9.*<>=!~, ]+",
        "it is CUDA's major and minor version such as 12.8, a range such as '>=12.6,<13', or cpu",
    ),
    AfterValidator(_range),
]
CudnnChoice = Annotated[
    str,
    _matching(
        rf"stock|{_N}(?:\.{_N}){{3}}",
        "it is stock (the cuDNN that torch itself pins), or a full version such as 9.16.0.29",
    ),
]
PythonVersion = Annotated[str, _matching(rf"3\.{_N}", "it is Python's major and minor version: 3.11")]
PlatformName = Literal["linux/amd64", "linux/arm64"]
DebName = Annotated[str, _matching(r"[a-z0-9][a-z0-9+.-]+", "a Debian package is a name without a version: libc6-dev")]
PackageName = Annotated[
    str, _matching(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?", "a package is a name without a version: torch")
]
PackageRequirement = Annotated[
    str,
    _matching(
        r"[A-Za-z0-9][A-Za-z0-9._-]*(?:\[[A-Za-z0-9._,-]+\])?(?:[<>=!~]=?[A-Za-z0-9.*+!<>=~,_-]+)?", _REQUIREMENT
    ),
    AfterValidator(_requirement),
]
_SENTENCE = (
    "it is one line of 1 to 400 visible characters, without double quotes, backticks, dollar signs, backslashes "
    "and braces"
)
# Prose may hold an apostrophe; it only ever stands between double quotes. What cannot be seen (or turns the direction
# of writing) would let a reviewer read something else than what is there.
Sentence = Annotated[
    str,
    _matching(r'[^\x00-\x1f\x7f-\x9f"`$\\{}]{1,400}', _SENTENCE, max_length=400),
    AfterValidator(_visible),
]
EnvName = Annotated[
    str,
    _matching(r"[A-Z_][A-Z0-9_]*", "an environment variable is capital letters, digits and underscores: MY_VAR"),
    AfterValidator(_free),
]
EnvValue = Annotated[
    str,
    _matching(
        r"[A-Za-z0-9 _.,:;/@%+=~-]*",
        "a value is letters, digits, spaces and any of _ . , : ; / @ % + = ~ -",
        max_length=1000,
    ),
]
AbsolutePath = Annotated[
    str, _matching(r"/[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)*", "it is an absolute path: /usr/bin/tini")
]
WritableDirectory = Annotated[AbsolutePath, AfterValidator(_apart)]
ProgramName = Annotated[
    str,
    _matching(
        r"[a-z](?:-?[a-z0-9])*",
        "a program is named by small letters and digits with single hyphens: notebook",
        max_length=30,
    ),
    AfterValidator(_unreserved),
]
Port = Annotated[int, Field(ge=1024, le=65535)]
"""Below 1024 a user without privileges may not listen."""
CompanionName = Literal["torchvision", "torchaudio"]
IndexUrl = Annotated[
    str,
    _matching(
        r"https?://[A-Za-z0-9.-]+(?::[0-9]+)?(?:/[A-Za-z0-9._~+-]+)*/?",
        "it is an http or https address without user, password, query or fragment",
        max_length=400,
    ),
]
Repository = Annotated[
    str,
    _matching(
        rf"{_PATH}(?:/{_PATH})*",
        "a repository is small letters and digits, joined by single . _ / or hyphens, without registry and tag: "
        "team/torchyard",
    ),
]
TagName = Annotated[
    str,
    _matching(
        r"[a-z0-9]+(?:[._-][a-z0-9]+)*",
        "it is the tag or the id of a cell, without repository: 2.8.0-cuda12.8-cudnn9-runtime",
        max_length=128,
    ),
]
RunnerName = Annotated[
    str,
    _matching(
        r"[a-z0-9]+(?:-[a-z0-9]+)*",
        "a runner class is named by small letters and digits with single hyphens: h100",
        max_length=40,
    ),
]
RunnerLabel = Annotated[
    str,
    _matching(
        r"[A-Za-z0-9][A-Za-z0-9._-]*",
        "a label of a runner is letters, digits, dots, underscores and hyphens: self-hosted",
        max_length=100,
    ),
]
GpuName = Annotated[
    str,
    _matching(
        r"[A-Za-z0-9]+(?:[ ._-][A-Za-z0-9]+)*",
        "a GPU is named by its product or its compute capability: H100, RTX 5090, 9.0",
        max_length=60,
    ),
]
DriverVersion = Annotated[
    str,
    _matching(
        r"[0-9]{3,4}(?:\.[0-9]{1,4}){0,2}",
        "a driver is a version as nvidia-smi shows it, or its branch: 580.65.06, 580",
    ),
]
ImageReference = Annotated[
    str,
    _matching(
        rf"(?:[A-Za-z0-9.-]+(?::[0-9]+)?/)?{_PATH}(?:/{_PATH})*(?::[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?"
        r"@sha256:[0-9a-f]{64}",
        "an image is named with its digest, because tags move: name:tag@sha256: and 64 hexadecimal digits",
        max_length=400,
    ),
]
Moment = Annotated[
    str,
    _matching(
        r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z",
        "it is a moment of universal time: 2026-11-15T00:00:00Z",
    ),
    AfterValidator(_moment),
]


def _proven_first(tiers: tuple[int, ...]) -> tuple[int, ...]:
    if 1 not in tiers:
        raise ValueError("1 is always among them: what does not work without a GPU is never published")
    if len(set(tiers)) != len(tiers):
        raise ValueError("a tier stands here twice")
    return tiers


TierNumber = Annotated[Literal[1, 2, 3], BeforeValidator(_number)]

ONE, SEVERAL = "<one>", "<several>"
"""Names of the branches of `Some`; nothing in the file can be called so."""


def _branch(value: object) -> str:
    return SEVERAL if isinstance(value, tuple) else ONE


_T = TypeVar("_T")
Axis = Annotated[tuple[_T, ...], Field(min_length=1)]
Some = Annotated[
    Union[Annotated[_T, Tag(ONE)], Annotated[tuple[_T, ...], Field(min_length=1), Tag(SEVERAL)]],  # noqa: UP007 (`|` of a type variable is no alias)
    Discriminator(_branch),
]
"""One value or a list of them."""


def listed(values: object) -> tuple[str, ...]:
    """Return one value or several as several."""
    return values if isinstance(values, tuple) else (str(values),)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class BootstrapBase(_Model):
    """Debian with Python, made from locked packages: needs no registry and no daemon."""

    kind: Literal["bootstrap"]
    suite: Name = Field(description="Debian release, by code name")
    python: PythonVersion = Field(description="the release's own Python")
    packages: Axis[DebName] = Field(description="Debian packages, besides those apt needs")
    image: ImageReference = Field(
        description="the plain image of the same release that `docker build images/<cell>` starts from, by digest"
    )


class ImageBase(_Model):
    """Any registry image that has Python, by digest."""

    kind: Literal["image"]
    image: ImageReference
    python: PythonVersion = Field(description="version of the image's `python3`")
    init: AbsolutePath | None = Field(
        default=None, description="an init in the image to run as process 1, such as /usr/bin/tini"
    )
    toolkit: CudaVersion | None = Field(
        default=None, description="the CUDA toolkit that the image has in /usr/local/cuda, if any: 12.8"
    )


class Variant(_Model):
    """What an image is for."""

    description: Sentence
    extends: Name | None = Field(default=None, description="a variant whose packages, env and directories it has too")
    packages: tuple[PackageRequirement, ...] = Field(default=(), description="Python packages besides torch")
    system: tuple[DebName, ...] = Field(default=(), description="Debian packages on top of a bootstrap base")
    env: Mapping[EnvName, EnvValue] = Field(default_factory=dict)
    directories: tuple[WritableDirectory, ...] = Field(
        default=(), description="directories that the user and any user of group 0 can write"
    )
    toolkit: bool = Field(default=False, description="whether it has nvcc of the CUDA that torch was built for")
    program: ProgramName | None = Field(
        default=None, description="what the image runs: torchyard-<program>, made from templates/programs/<program>.*"
    )
    port: Port | None = Field(default=None, description="where the program listens: a port from 1024 to 65535")


class Selector(_Model):
    """Points of the matrix by some of their axes; an axis not named matches every value."""

    torch: Some[TorchRange] | None = None
    cuda: Some[CudaRange] | None = None
    cudnn: Some[CudnnChoice] | None = None
    base: Some[Name] | None = None
    variant: Some[Name] | None = None
    platform: Some[PlatformName] | None = None


class Exclude(Selector):
    """Points of the cross product that are left out, and why."""

    reason: Sentence


class Include(_Model):
    """Points besides the cross product; an axis not named takes the first value of `axes`."""

    torch: Some[TorchVersion] | None = None
    cuda: Some[CudaVersion] | None = None
    cudnn: Some[CudnnChoice] | None = None
    base: Some[Name] | None = None
    variant: Some[Name] | None = None
    platform: Some[PlatformName] | None = None
    companions: tuple[CompanionName, ...] = Field(
        default=(), description="libraries that are released for one torch each, in the version that fits"
    )
    reason: Sentence | None = None


class Index(_Model):
    """A package index that serves the named packages, and only those, for the cells that `when` selects."""

    name: IndexName
    url: IndexUrl
    packages: Axis[PackageName]
    when: Selector


class Axes(_Model):
    """The cross product; the first value of an axis is its default."""

    torch: Axis[TorchVersion]
    cuda: Axis[CudaVersion]
    cudnn: Axis[CudnnChoice] = ("stock",)
    base: Axis[Name]
    variant: Axis[Name]
    platform: Axis[PlatformName] = ("linux/amd64",)


class Runner(_Model):
    """Machines of a CI that are alike: they have the same GPU and driver, and jobs find them by the same labels."""

    name: RunnerName
    labels: Axis[RunnerLabel] = Field(description="labels that a machine must have for a job to go there")
    gpu: GpuName = Field(description="the GPU: H100, RTX 5090, sm_90 or 9.0")
    driver: DriverVersion = Field(
        description="the NVIDIA driver, or the branch that is kept up to date: 580.65.06, 580"
    )
    gpus: Annotated[int, Field(ge=1, le=64)] = Field(default=1, description="how many GPUs a machine has: 1 to 64")
    platform: PlatformName = "linux/amd64"


class Publish(_Model):
    """Under which conditions images are published, and where they are proven; nothing of it is in an image."""

    tiers: Annotated[Axis[TierNumber], AfterValidator(_proven_first)] = Field(
        default=(1,),
        description="tiers of validation that must be proven before a push; cells without CUDA need T1 only",
    )
    latest: TagName | None = Field(default=None, description="the cell that bears the tag `latest`, by its tag or id")
    signed: bool = Field(default=False, description="whether nothing is pushed without a signature")
    runners: tuple[Runner, ...] = Field(default=(), description="machines with GPUs that validate")


class Matrix(_Model):
    """The image family."""

    version: Annotated[Literal[1], BeforeValidator(_number)] = Field(description="version of this file's format")
    repository: Repository = Field(description="what stands before the tag: repository name, without registry")
    exclude_newer: Moment = Field(description="packages uploaded later are not considered when locking")
    bases: Mapping[Name, Annotated[BootstrapBase | ImageBase, Field(discriminator="kind")]] = Field(min_length=1)
    variants: Mapping[Name, Variant] = Field(min_length=1)
    indexes: tuple[Index, ...] = ()
    axes: Axes
    exclude: tuple[Exclude, ...] = ()
    include: tuple[Include, ...] = ()
    publish: Publish = Publish()


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the file, for editors; what a pattern means is said in words."""

    def described(value: Any) -> Any:  # noqa: ANN401 (any JSON)
        if isinstance(value, list):
            return [described(item) for item in value]
        if not isinstance(value, dict):
            return value
        words = WORDS.get(str(value.get("pattern")))
        return {key: described(item) for key, item in value.items()} | (
            {"description": words} if words and "description" not in value else {}
        )

    schema: dict[str, Any] = described(Matrix.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "torchyard matrix"}
