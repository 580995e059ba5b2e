"""The toolkit of a variant: which packages make it, where it lies, and what is refused."""

import pytest
from packaging.requirements import Requirement

from builder import toolkit
from builder.schema import BootstrapBase, ImageBase
from tests.support.cells import FACTS

DIGEST = "0" * 64
DEBIAN = BootstrapBase(
    kind="bootstrap",
    suite="bookworm",
    python="3.11",
    packages=("python3",),
    image=f"debian:bookworm-slim@sha256:{DIGEST}",
)
PACKAGES = "/opt/venv/lib/python3/site-packages"


def image(cuda: str | None = None) -> ImageBase:
    return ImageBase(kind="image", image=f"cuda@sha256:{DIGEST}", python="3.11", toolkit=cuda)


def refusal(cuda: str, base: BootstrapBase | ImageBase) -> str:
    problem = toolkit.refusal(variant="devel", cuda=cuda, base_name="plain", base=base)
    return "" if problem is None else "\n".join([problem.what, problem.why, *problem.tries])


@pytest.mark.parametrize(
    ("wants", "cuda", "declared"), [(True, "13.2", "13.2"), (True, "cpu", None), (False, "13.2", None)]
)
def test_what_is_declared(wants: bool, cuda: str, declared: str | None) -> None:  # noqa: FBT001 (pytest's)
    assert toolkit.wanted(toolkit=wants, cuda=cuda) == declared


@pytest.mark.parametrize(
    ("cuda", "base"),
    [
        ("cpu", DEBIAN),
        ("cpu", image("12.8")),
        ("13.0", DEBIAN),
        ("13.2", DEBIAN),
        ("13.2", image()),
        ("12.8", image("12.8")),
        ("13.2", image("13.2")),
    ],
)
def test_bases_that_can_have_one(cuda: str, base: BootstrapBase | ImageBase) -> None:
    assert refusal(cuda, base) == ""


@pytest.mark.parametrize("base", [DEBIAN, image()])
def test_cuda_12_needs_a_base_that_has_it(base: BootstrapBase | ImageBase) -> None:
    told = refusal("12.8", base)
    assert "variant devel needs nvcc of CUDA 12.8, which base plain does not have" in told
    assert "those of CUDA 12 only ptxas" in told
    assert "toolkit: '12.8'" in told


@pytest.mark.parametrize(("cuda", "has"), [("12.8", "12.6"), ("13.2", "12.8"), ("13.2", "13.0")])
def test_another_toolkit_in_the_base_is_refused(cuda: str, has: str) -> None:
    told = refusal(cuda, image(has))
    assert f"needs nvcc of CUDA {cuda}, and base plain has the toolkit of CUDA {has}" in told
    assert f"toolkit: '{cuda}'" in told


def test_of_packages() -> None:
    (line,) = toolkit.requirements(cuda="13.2", base=DEBIAN)
    wanted = Requirement(line)
    assert wanted.name == "cuda-toolkit"
    assert {"nvcc", "cccl"} <= wanted.extras
    assert [wanted.specifier.contains(version) for version in ("13.2.0", "13.2.2", "13.1.9", "13.3.0")] == [
        True, True, False, False,
    ]  # fmt: skip
    assert toolkit.home(cuda="13.2", base=DEBIAN, packages=PACKAGES) == f"{PACKAGES}/nvidia/cu13"
    links = toolkit.links(cuda="13.2", base=DEBIAN)
    assert links["nvidia/cu13/lib64"] == "lib"
    assert links["nvidia/cu13/lib/libcudart.so"] == "libcudart.so.13"


def test_of_an_image() -> None:
    base = image("12.8")
    assert toolkit.requirements(cuda="12.8", base=base) == ()
    assert toolkit.home(cuda="12.8", base=base, packages=PACKAGES) == "/usr/local/cuda"
    assert toolkit.links(cuda="12.8", base=base) == {}


def test_links_stay_in_the_toolkits_directory() -> None:
    for path, target in toolkit.links(cuda="13.0", base=DEBIAN).items():
        assert path.startswith("nvidia/cu13/")
        assert "/" not in target


def test_every_cuda_since_13_comes_as_packages() -> None:
    known = [str(row.version) for row in FACTS.toolkits if row.exists]
    assert {cuda for cuda in known if not refusal(cuda, DEBIAN)} == {cuda for cuda in known if int(cuda[:2]) >= 13}
