"""matrix.yaml as people write it: every field typed, described, and closed to anything but its own pattern."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar, Union

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

AXES = ("torch", "cuda", "cudnn", "base", "variant", "platform")

# Every value that can reach a Dockerfile, a shell or a file name has an anchored pattern of its own, so nothing
# in the file can inject into either: no field admits a quote, `$`, backtick, brace, backslash or line break.


def _matching(pattern: str, *, max_length: int = 200) -> StringConstraints:
    return StringConstraints(pattern=rf"^(?:{pattern})$", max_length=max_length, strict=True)


def _requirement(value: str) -> str:
    try:
        requirement = Requirement(value)
    except InvalidRequirement as error:
        raise ValueError(f"not a requirement: {error}".splitlines()[0]) from None
    if requirement.url or requirement.marker:
        raise ValueError("a requirement here is a name with an optional version range: no URL and no marker")
    return value


def _range(value: str) -> str:
    if value[0] in "<>=!~":
        try:
            SpecifierSet(value)
        except InvalidSpecifier:
            raise ValueError("not a version or a range of versions such as '>=2.9,<2.12'") from None
    return value


_N = r"(?:0|[1-9][0-9]{0,5})"
_PATH = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"

Name = Annotated[str, _matching(r"[a-z][a-z0-9]{0,30}")]
IndexName = Annotated[str, _matching(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*", max_length=60)]
TorchVersion = Annotated[str, _matching(rf"{_N}\.{_N}\.{_N}")]
TorchRange = Annotated[str, _matching(rf"{_N}\.{_N}\.{_N}|[<>=!~][0-9A-Za-z.*<>=!~, ]+"), AfterValidator(_range)]
CudaVersion = Annotated[str, _matching(rf"cpu|{_N}\.{_N}")]
CudaRange = Annotated[str, _matching(rf"cpu|{_N}\.{_N}|[<>=!~][0-9.*<>=!~, ]+"), AfterValidator(_range)]
CudnnChoice = Annotated[str, _matching(rf"stock|{_N}(?:\.{_N}){{3}}")]
PythonVersion = Annotated[str, _matching(rf"3\.{_N}")]
PlatformName = Literal["linux/amd64", "linux/arm64"]
DebName = Annotated[str, _matching(r"[a-z0-9][a-z0-9+.-]+")]
PackageName = Annotated[str, _matching(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")]
PackageRequirement = Annotated[
    str,
    _matching(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:\[[A-Za-z0-9._,-]+\])?(?:[<>=!~]=?[A-Za-z0-9.*+!<>=~,_-]+)?"),
    AfterValidator(_requirement),
]
Sentence = Annotated[str, _matching(r"[^\x00-\x1f\x7f\"`$\\{}]{1,400}", max_length=400)]
EnvName = Annotated[str, _matching(r"[A-Z_][A-Z0-9_]*")]
EnvValue = Annotated[str, _matching(r"[A-Za-z0-9 _.,:;/@%+=~-]*", max_length=1000)]
AbsolutePath = Annotated[str, _matching(r"/[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)*")]
IndexUrl = Annotated[str, _matching(r"https?://[A-Za-z0-9.-]+(?::[0-9]+)?(?:/[A-Za-z0-9._~+-]+)*/?", max_length=400)]
Repository = Annotated[str, _matching(rf"{_PATH}(?:/{_PATH})*")]
ImageReference = Annotated[
    str,
    _matching(
        rf"(?:[A-Za-z0-9.-]+(?::[0-9]+)?/)?{_PATH}(?:/{_PATH})*(?::[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?"
        r"@sha256:[0-9a-f]{64}",
        max_length=400,
    ),
]
Moment = Annotated[str, _matching(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")]

_T = TypeVar("_T")
Axis = Annotated[tuple[_T, ...], Field(min_length=1)]
Some = Union[_T, Annotated[tuple[_T, ...], Field(min_length=1)]]  # noqa: UP007 (`|` of a type variable is no alias)
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


class Variant(_Model):
    """What an image is for."""

    description: Sentence
    packages: tuple[PackageRequirement, ...] = Field(default=(), description="Python packages besides torch")
    env: Mapping[EnvName, EnvValue] = Field(default_factory=dict)


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


class Matrix(_Model):
    """The image family."""

    version: Literal[1] = Field(description="version of this file's format")
    repository: Repository = Field(description="what stands before the tag: repository name, without registry")
    exclude_newer: Moment = Field(description="packages uploaded later are not considered when locking")
    bases: Mapping[Name, Annotated[BootstrapBase | ImageBase, Field(discriminator="kind")]] = Field(min_length=1)
    variants: Mapping[Name, Variant] = Field(min_length=1)
    indexes: tuple[Index, ...] = ()
    axes: Axes
    exclude: tuple[Exclude, ...] = ()
    include: tuple[Include, ...] = ()
