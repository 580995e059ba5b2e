"""Bills of materials: valid, the same everywhere, and held to what the image's bytes say is installed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

from builder import bills, export, layout, sbom, tar
from builder.build import StoreSession
from builder.cli import cli
from builder.debian import Deb
from builder.engines.oci import OciEngine, recipe
from builder.engines.oci import installed as installing
from builder.errors import CellFailedError, HashMismatchError, ImpossibleError, MatrixError
from builder.layout import Image
from builder.project import Project
from builder.render import Plan
from builder.schema import ImageBase
from builder.store import Store
from tests.support import bases
from tests.support.bases import (
    Ready,
    Said,
    base_entries,
    bootstrap_cell,
    damage,
    fake_base,
    fake_python,
    fixed,
    index_of,
    layer_of,
    mesh,
    plan_of,
    ready,
    wheels_of,
)
from tests.support.wheels import FakeWheel, wheel

ROOT = Path(__file__).parents[2]
SITE = "opt/venv/lib/python3/site-packages"
STATUS = "var/lib/dpkg/status"
DIGEST = "2903c3e1789067d6407079897cd33d5ce5b4b82cfbfb0856219a3714316d7ae1"
"""SHA-256 of the bill of `whole`. Whoever changes what bills say changes it, raises bills.VERSION, and says so in the
changelog: a published image has a bill, and the same version of torchyard must make the same one."""


@pytest.fixture(autouse=True)
def _python(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(sbom, "__version__", "0")
    with fake_python():
        yield


# --------------------------------------------------------------------------- tiny images


def deb(name: str, version: str = "1.0-1", architecture: str = "amd64") -> Deb:
    file = f"pool/main/{name[0]}/{name}/{name}_{version.rpartition(':')[2]}_{architecture}.deb"
    return Deb(
        name=name,
        version=version,
        architecture=architecture,
        filename=file,
        sha256=hashlib.sha256(file.encode()).hexdigest(),
        size=1,
    )


BELOW = (deb("base-files", "12.4+deb12u12"), deb("python3.11", "3.11.2-6+deb12u6"), deb("tzdata", "1:2026a", "all"))
ABOVE = (deb("git", "1:2.39.5-0+deb12u2"),)


def status(*debs: Deb) -> tar.Entry:
    text = "\n".join(
        f"Package: {it.name}\nStatus: install ok installed\nArchitecture: {it.architecture}\nVersion: {it.version}\n"
        for it in debs
    )
    return tar.file_entry(STATUS, text.encode())


@dataclass(frozen=True, kw_only=True)
class Made:
    """A tiny image, complete in a store, and the plan that it was made from."""

    plan: Plan
    store: Store
    image: Image

    def bill(self) -> bytes:
        return sbom.bill(self.plan, self.store, self.image)

    def document(self) -> dict[str, Any]:
        return dict(json.loads(self.bill()))

    def check(self) -> None:
        bills.check(self.bill(), self.plan, self.store, self.image)

    def problems(self) -> list[tuple[str, str]]:
        """Return what a check of its bill finds, and why."""
        with pytest.raises(CellFailedError) as caught:
            self.check()
        first, *others = caught.value.problems
        assert "is not what is in the image" in first.what
        return [(problem.what, problem.why) for problem in others]


def made(
    root: Path,
    *more: FakeWheel,
    base: Sequence[tar.Entry] = (status(*BELOW),),
    system: Sequence[tar.Entry] | None = (status(*BELOW, *ABOVE),),
    index_url: str | None = None,
) -> Made:
    """Make an image of the tiny wheels, and `more`, on a base of three packages and, above the wheels, one more."""
    cell = bootstrap_cell(packages=("numpy", "mesh", *(one.project for one in more)), index_url=index_url)
    wheels = wheels_of(cell, mesh(), *more)
    lock = replace(bases.base_lock(), debs=BELOW)
    above = replace(bases.system_lock(), debs=(*BELOW, *ABOVE))
    plan = replace(plan_of(cell, wheels), base_lock=lock, system_lock=None if system is None else above)
    store = Store.open(root)
    for one in wheels:
        store.put(one.content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bases, "system_lock", lambda: above)
        stands_on = fake_base(store, lock, entries=[*base_entries(), *base], system=system)
    built = Ready(plan=plan, wheels=wheels, store=store, base=stands_on).build()
    return Made(plan=plan, store=store, image=export.stored_image(store, built.digest))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Make one image for all that do not harm it."""
    with fake_python():
        return made(tmp_path_factory.mktemp("whole") / "home")


def with_layer(one: Made, *entries: tar.Entry) -> Made:
    """Return the same image with one more layer on top of the wheels'."""
    *below, system, own = one.image.layers
    layers = [*below, layer_of(one.store, entries), system, own]
    config = json.loads(one.store.path(one.image.config.sha256).read_bytes())
    titles = [line["created_by"] for line in config["history"]]
    titles.insert(len(below), "torchyard: something")
    image = layout.assemble(
        one.store,
        architecture="amd64",
        config={},
        epoch=one.plan.epoch,
        layers=layers,
        history=[layout.History(created_by=title) for title in titles],
    )
    return replace(one, image=image)


def components(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["bom-ref"]: one for one in document["components"]}


def properties(component: Mapping[str, Any]) -> dict[str, str]:
    return {it["name"].removeprefix("torchyard:"): it["value"] for it in component.get("properties", ())}


def needs(document: Mapping[str, Any]) -> dict[str, list[str]]:
    return {one["ref"]: one.get("dependsOn", []) for one in document["dependencies"]}


def compositions(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found = {one["aggregate"]: one for one in document["compositions"]}
    assert len(found) == len(document["compositions"])
    return found


VALIDATOR = JsonStrictValidator(SchemaVersion.V1_6)


def require_valid(bill: bytes) -> None:
    error = VALIDATOR.validate_str(bill.decode())
    assert error is None, error
    document = json.loads(bill)
    refs: list[str] = []

    def walk(value: object) -> None:
        if isinstance(value, dict):
            refs.extend(value[key] for key in ("bom-ref",) if key in value)
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(document)
    assert len(refs) == len(set(refs)), "each is named once"
    pointed = {
        *(ref for one in document["dependencies"] for ref in (one["ref"], *one.get("dependsOn", ()))),
        *(
            ref
            for one in document["compositions"]
            for key in ("assemblies", "dependencies")
            for ref in one.get(key, ())
        ),
    }
    assert pointed <= set(refs)


# --------------------------------------------------------------------------- what is in it


def test_a_bill_is_valid_and_agrees_with_its_image(whole: Made) -> None:
    bill = whole.bill()
    require_valid(bill)
    bills.check(bill, whole.plan, whole.store, whole.image)
    document = json.loads(bill)
    assert set(components(document)) == {
        "base",
        *(f"pypi/{it.name}" for it in whole.plan.lock.wheels),
        *(f"deb/{it.name}" for it in (*BELOW, *ABOVE)),
        "program/torchyard-start",
        "program/torchyard-validate",
    }


def test_its_subject_is_the_image(whole: Made) -> None:
    document, digest = whole.document(), whole.image.manifest.digest
    subject = document["metadata"]["component"]
    assert (subject["type"], subject["name"], subject["version"]) == (
        "container", "torchyard", "2.8.0-cuda12.8-cudnn9-runtime",
    )  # fmt: skip
    assert PackageURL.from_string(subject["purl"]) == PackageURL(
        "oci", None, "torchyard", digest, {"arch": "amd64"}, None
    )
    assert subject["hashes"] == [{"alg": "SHA-256", "content": digest.removeprefix("sha256:")}]
    assert properties(subject)["cell"] == whole.plan.cell.id
    declared = json.loads(whole.plan.files["image.json"])
    assert properties(subject)["lock"] == declared["lock"]
    assert document["metadata"]["timestamp"].startswith(layout.timestamp(whole.plan.epoch).rstrip("Z"))
    other = replace(whole, image=with_layer(whole, tar.file_entry("x", b"")).image).document()
    assert other["serialNumber"] != document["serialNumber"]


def test_packages_are_named_so_that_others_find_them(whole: Made) -> None:
    found = components(whole.document())
    locked = {str(it.name): it for it in whole.plan.lock.wheels}
    torch, files = found["pypi/torch"], found["deb/base-files"]
    assert torch["purl"] == "pkg:pypi/torch@2.8.0"
    assert torch["hashes"] == [{"alg": "SHA-256", "content": locked["torch"].sha256}]
    assert properties(torch)["file"] == locked["torch"].filename
    assert properties(torch)["path"] == f"/{SITE}/torch-2.8.0.dist-info"
    assert files["purl"] == "pkg:deb/debian/base-files@12.4%2Bdeb12u12?arch=amd64&distro=bookworm"
    assert files["hashes"] == [{"alg": "SHA-256", "content": BELOW[0].sha256}]
    assert found["deb/tzdata"]["purl"] == "pkg:deb/debian/tzdata@1:2026a?arch=all&distro=bookworm"
    assert (found["base"]["type"], found["base"]["name"], found["base"]["version"]) == (
        "operating-system", "debian", "12",
    )  # fmt: skip
    start = found["program/torchyard-start"]
    program = whole.plan.programs["torchyard-start"]
    assert start["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(program).hexdigest()}]


def test_an_index_of_its_own_is_named(tmp_path: Path) -> None:
    url = "https://download.pytorch.org/whl/cu128"
    found = components(made(tmp_path / "home", index_url=url).document())
    assert found["pypi/torch"]["purl"] == f"pkg:pypi/torch@2.8.0%2Bcu128?repository_url={url}"
    assert found["pypi/numpy"]["purl"] == "pkg:pypi/numpy@2.3.1"


def test_each_lies_in_a_layer(whole: Made) -> None:
    found = components(whole.document())
    base, *wheels, system, own = (layer.blob.digest for layer in whole.image.layers)
    layers = {ref: properties(component)["layer"] for ref, component in found.items()}
    assert {ref for ref, layer in layers.items() if layer == base} == {"base", *(f"deb/{it.name}" for it in BELOW)}
    assert {ref for ref, layer in layers.items() if layer == system} == {"deb/git"}
    assert {ref for ref, layer in layers.items() if layer == own} == {
        "program/torchyard-start", "program/torchyard-validate",
    }  # fmt: skip
    for name in ("torch", "mesh", "numpy"):
        assert layers[f"pypi/{name}"] in wheels
    assert layers["pypi/torch"] != layers["pypi/mesh"]


@pytest.mark.parametrize(
    ("headers", "licence", "proprietary"),
    [
        (("License-Expression: mit and (apache-2.0 or bsd-2-clause)",), "MIT AND (Apache-2.0 OR BSD-2-Clause)", None),
        (("License: BSD-3-Clause",), "BSD-3-Clause", None),
        (("License-Expression: LicenseRef-NVIDIA-Proprietary",), "LicenseRef-NVIDIA-Proprietary", "true"),
        (("License: NVIDIA Proprietary Software",), ["NVIDIA Proprietary Software"], "true"),
        (("License: BSD",), ["BSD"], None),
        (("License-Expression: MIT AND (whatever",), ["MIT AND (whatever"], None),
        (("License-Expression: MIT OR Unheard-Of-1.0",), ["MIT OR Unheard-Of-1.0"], None),
        ((), None, None),
    ],
)
def test_licences_are_those_of_the_metadata(
    tmp_path: Path, headers: tuple[str, ...], licence: str | list[str] | None, proprietary: str | None
) -> None:
    found = components(made(tmp_path / "home", fixed(wheel("extra", "1.0", headers=headers))).document())["pypi/extra"]
    assert properties(found).get("proprietary") == proprietary
    if licence is None:
        assert "licenses" not in found
        return
    (told,) = found["licenses"]
    if isinstance(licence, str):
        assert told == {"expression": licence, "acknowledgement": "declared"}
    else:
        assert [told["license"]["name"]] == licence


def test_what_runs_at_each_start_and_bills_of_its_own_are_named(tmp_path: Path) -> None:
    files = {
        "kit/__init__.py": b"",
        "kit/inner.pth": b"",
        "kit.pth": b"import os\n",
        "kit-1.0.data/purelib/sitecustomize.py": b"",
        "kit-1.0.data/data/other.pth": b"",
        "kit-1.0.dist-info/sboms/kit.cdx.json": b"{}",
    }
    one = made(tmp_path / "home", fixed(wheel("kit", "1.0", files=files)))
    require_valid(one.bill())
    found = components(one.document())["pypi/kit"]["properties"]
    several = [(it["name"], it["value"]) for it in found if it["name"] in ("torchyard:bill", "torchyard:runs-at-start")]
    assert several == [
        ("torchyard:bill", f"/{SITE}/kit-1.0.dist-info/sboms/kit.cdx.json"),
        ("torchyard:runs-at-start", f"/{SITE}/kit.pth"),
        ("torchyard:runs-at-start", f"/{SITE}/sitecustomize.py"),
    ]


VENDORED = {
    "kit/__init__.py": b"",
    "kit/_vendor/Old_Lib-2.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: Old.Lib\nVersion: 2.0\nLicense: MIT\n",
    "kit/_vendor/bare-1.dist-info/RECORD": b"",
    "kit-1.0.data/platlib/kit/more/other-3.dist-info/METADATA": b"Name: other\nVersion: 3\n",
}


def test_what_a_package_brings_along_is_listed_in_it(tmp_path: Path) -> None:
    one = made(tmp_path / "home", fixed(wheel("kit", "1.0", files=VENDORED)))
    require_valid(one.bill())
    one.check()
    inside = components(one.document())["pypi/kit"]["components"]
    assert [(it["name"], it["version"], properties(it)["path"]) for it in inside] == [
        ("old-lib", "2.0", f"/{SITE}/kit/_vendor/Old_Lib-2.0.dist-info"),
        ("bare", "1", f"/{SITE}/kit/_vendor/bare-1.dist-info"),
        ("other", "3", f"/{SITE}/kit/more/other-3.dist-info"),
    ]
    assert inside[0]["licenses"] == [{"expression": "MIT", "acknowledgement": "declared"}]


# --------------------------------------------------------------------------- who needs whom


def test_the_graph_is_what_wheels_require_here(tmp_path: Path) -> None:
    app = wheel(
        "app", "1.0",
        requires=[
            "lib[fast]>=1", 'numpy; extra == "never"', 'mesh; sys_platform == "win32"',
            'torch; python_full_version >= "3.11.2" and platform_machine == "x86_64"', "App",
        ],
    )  # fmt: skip
    lib = wheel("lib", "1.0", requires=['mesh; extra == "fast"', 'pip; extra == "slow"'])
    one = made(tmp_path / "home", fixed(app), fixed(lib))
    document = one.document()
    graph = needs(document)
    assert graph["pypi/app"] == ["pypi/lib", "pypi/torch"]
    assert graph["pypi/lib"] == ["pypi/mesh"]
    assert {"pypi/triton", "pypi/nvidia-nccl-cu12", "pypi/typing-extensions"} <= set(graph["pypi/torch"])
    assert "pypi/app" in graph["image"]
    assert "pypi/triton" not in graph["image"]
    assert "deb/git" in graph["image"]
    assert graph["base"] == [f"deb/{it.name}" for it in BELOW]
    assert not [ref for ref in graph if ref.startswith("deb/")], "what they depend on is not known"


def test_how_much_is_known_is_said(whole: Made) -> None:
    found = compositions(whole.document())
    debian = [f"deb/{it.name}" for it in (*BELOW, *ABOVE)]
    assert found["complete"] == {"aggregate": "complete", "assemblies": ["image"], "dependencies": ["image"]}
    assert sorted(debian) == found["incomplete"]["dependencies"]
    assert "pypi/torch" in found["unknown"]["assemblies"]
    assert "pypi/torch" in found["unknown"]["dependencies"]


@pytest.mark.parametrize(
    "requirement",
    [
        "not a requirement",
        "elsewhere>=1",
        "a; " + "(" * 3000,
        "x" * 10_000,
        'mesh; python_version >= "x" and "a" ~= "b"',
    ],
)
def test_requirements_that_say_nothing_are_said_to(tmp_path: Path, requirement: str) -> None:
    odd = wheel("odd", "1.0", requires=[requirement, "mesh"])
    one = made(tmp_path / "home", fixed(odd))
    require_valid(one.bill())
    document = one.document()
    assert "pypi/odd" in compositions(document)["incomplete"]["dependencies"]
    assert needs(document)["pypi/odd"] == ["pypi/mesh"]


def test_a_wheel_that_nobody_seems_to_need_is_the_images(tmp_path: Path) -> None:
    one = made(tmp_path / "home")
    variant = one.plan.cell.variant.model_copy(update={"packages": ("numpy",)})
    plan = replace(one.plan, cell=replace(one.plan.cell, variant=variant))
    assert "pypi/mesh" in needs(replace(one, plan=plan).document())["image"]


def on_an_image(one: Made) -> Made:
    """Return it as if its base were an image of somebody else's."""
    base = ImageBase(kind="image", image=f"registry.example/team/python:3.11@sha256:{'a' * 64}", python="3.11")
    cell = replace(one.plan.cell, base=base)
    return replace(one, plan=replace(one.plan, cell=cell, base_lock=None, system_lock=None))


def test_of_a_base_of_somebody_elses_nothing_is_claimed(tmp_path: Path) -> None:
    strange = tar.file_entry("usr/lib/python3/dist-packages/six-1.dist-info/METADATA", b"Name: six\nVersion: 1\n")
    one = on_an_image(made(tmp_path / "home", base=[status(deb("unheard-of")), strange], system=None))
    bill = one.bill()
    require_valid(bill)
    one.check()
    document = json.loads(bill)
    found = components(document)
    assert (found["base"]["type"], found["base"]["name"]) == ("container", "registry.example/team/python")
    assert found["base"]["purl"] == (f"pkg:oci/python@sha256:{'a' * 64}?repository_url=registry.example/team/python")
    assert (found["python"]["name"], found["python"]["version"]) == ("python", "3.11")
    assert not [ref for ref in found if ref.startswith("deb/")]
    assert compositions(document)["incomplete"]["assemblies"] == ["image"]
    assert "base" in compositions(document)["unknown"]["assemblies"]
    assert "base" not in needs(document), "nothing is known of what it needs"


# --------------------------------------------------------------------------- the same everywhere


def test_the_digest_of_a_bill_is_what_it_was(whole: Made) -> None:
    assert hashlib.sha256(whole.bill()).hexdigest() == DIGEST


_ELSEWHERE = """
import hashlib, os, sys
from pathlib import Path
os.fsync = lambda _: None
from builder import sbom
from tests.support.bases import fake_python
from tests.unit.test_sbom import made
sbom.__version__ = "0"
with fake_python():
    print(hashlib.sha256(made(Path(sys.argv[1])).bill()).hexdigest())
"""


def test_a_bill_is_the_same_everywhere(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "4242", "TZ": "Pacific/Auckland", "LC_ALL": "C", "USER": "somebody"}
    done = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, str(tmp_path / "elsewhere")],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == DIGEST, done.stderr


def test_no_order_of_what_comes_in_matters(whole: Made) -> None:
    files = dict(reversed(list(whole.plan.files.items())))
    assert replace(whole, plan=replace(whole.plan, files=files)).bill() == whole.bill()


def test_nothing_of_this_machine_is_in_it(whole: Made) -> None:
    text = whole.bill().decode()
    for hidden in (str(whole.store.root), os.uname().nodename, sys.prefix):
        assert hidden not in text


# --------------------------------------------------------------------------- disagreements

MISSING = replace(BELOW[2], name="missing")
NEWER = replace(BELOW[2], version="1:2026b")


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        (BELOW[:2], ("tzdata 1:2026a is in the bill, and not in the image", "")),
        ((*BELOW, MISSING), ("missing 1:2026a is in the image, and not in its bill", "")),
        ((*BELOW[:2], NEWER), ("tzdata is 1:2026b", "the bill says 1:2026a")),
    ],
    ids=["missing", "extra", "another version"],
)
def test_a_debian_package_that_is_not_as_locked(
    tmp_path: Path, there: tuple[Deb, ...], expected: tuple[str, str]
) -> None:
    assert made(tmp_path / "home", base=[status(*there)], system=None).problems() == [expected]


def test_a_debian_package_in_the_wrong_layer(tmp_path: Path) -> None:
    one = made(tmp_path / "home", base=[status(*BELOW, *ABOVE)])
    ((what, why),) = one.problems()
    assert what == "git 1:2.39.5-0+deb12u2 lies in another layer"
    assert why == f"{one.image.layers[0].blob.digest}; the bill says {one.image.layers[-2].blob.digest}"


def test_the_topmost_list_of_debian_packages_counts(tmp_path: Path) -> None:
    one = made(tmp_path / "home", system=[status(*BELOW[:2], NEWER, *ABOVE)])
    assert one.problems() == [("tzdata is 1:2026b", "the bill says 1:2026a")]


def test_a_distribution_that_nobody_locked(tmp_path: Path) -> None:
    hidden = {
        "kit/__init__.py": b"",
        "kit-1.0.data/purelib/evil-6.6.dist-info/METADATA": b"Name: evil\nVersion: 6.6\n",
    }
    one = made(tmp_path / "home", fixed(wheel("kit", "1.0", files=hidden)))
    assert one.problems() == [("evil 6.6 is in the image, and not in its bill", "")]
    require_valid(one.bill())


def test_a_distribution_in_the_base_that_no_debian_package_brought(tmp_path: Path) -> None:
    path = "usr/lib/python3/dist-packages/six-1.dist-info"
    six = tar.file_entry(f"{path}/METADATA", b"Name: six\nVersion: 1\n")
    listing = tar.file_entry("var/lib/dpkg/info/python3.11.list", f"/{path}\n".encode())
    assert made(tmp_path / "one", base=[status(*BELOW), six]).problems() == [
        ("six 1 is in the image, and not in its bill", "")
    ]
    made(tmp_path / "two", base=[status(*BELOW), six, listing]).check()


def test_what_another_layer_hides_replaces_or_doubles(whole: Made) -> None:
    def layer(name: str, content: bytes = b"") -> Made:
        return with_layer(whole, tar.file_entry(f"{SITE}/{name}", content))

    layer("nothing.txt").check()
    assert layer(".wh.mesh-1.0.dist-info").problems() == [("mesh 1.0 is in the bill, and not in the image", "")]
    assert layer("mesh-1.0.dist-info/METADATA", b"Name: mesh\nVersion: 2.0\n").problems() == [
        ("mesh is 2.0", "the bill says 1.0")
    ]
    assert layer("mesh-2.0.dist-info/METADATA", b"Name: mesh\nVersion: 2.0\n").problems() == [
        ("mesh is 1.0 and 2.0", "the bill says 1.0")
    ]
    extra = with_layer(whole, tar.file_entry("opt/venv/bin/torchyard-extra", b"x"))
    sha256 = hashlib.sha256(b"x").hexdigest()
    assert extra.problems() == [(f"torchyard-extra sha256:{sha256} is in the image, and not in its bill", "")]


def test_another_program_than_the_plans(whole: Made) -> None:
    other = replace(whole, plan=replace(whole.plan, validator=b"another"))
    ((what, why),) = other.problems()
    assert what == f"torchyard-validate is sha256:{hashlib.sha256(whole.plan.validator).hexdigest()}"
    assert why == f"the bill says sha256:{hashlib.sha256(b'another').hexdigest()}"


def test_a_bill_of_another_image(whole: Made) -> None:
    other = with_layer(whole, tar.file_entry("x", b""))
    with pytest.raises(CellFailedError, match="another image"):
        bills.check(whole.bill(), other.plan, other.store, other.image)


def changed(bill: bytes, **fields: object) -> bytes:
    return json.dumps({**json.loads(bill), **fields}).encode()


def test_what_is_no_bill_agrees_with_nothing(whole: Made) -> None:
    bill = whole.bill()
    for content in (
        b"", b"[]", b"{}", b"\xff", b"[" * 100_000, changed(bill, metadata=None), changed(bill, components=None),
        changed(bill, components=[{}]), changed(bill, components=[1]), changed(bill, components=[]),
        changed(bill, components=[{"name": "x", "purl": "pkg:deb/"}]),
    ):  # fmt: skip
        with pytest.raises(CellFailedError):
            bills.check(content, whole.plan, whole.store, whole.image)


# --------------------------------------------------------------------------- what is kept


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return how often a bill was made and checked from now on."""
    counts: Counter[str] = Counter()

    def counting(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*arguments: Any) -> Any:
            counts[name] += 1
            return real(*arguments)

        monkeypatch.setattr(module, name, call)

    counting(sbom, "bill")
    counting(bills, "check")
    return counts


def checked(one: Made) -> bytes:
    return bills.checked(one.plan, one.store, one.image, sbom.bill)


def test_a_bill_that_was_right_is_kept_byte_for_byte(tmp_path: Path, counted: Counter[str]) -> None:
    one = made(tmp_path / "home")
    first = checked(one)
    assert first == one.bill()
    assert counted == {"bill": 2, "check": 1}
    assert checked(one) == first
    assert counted == {"bill": 2, "check": 1}


def test_a_kept_bill_that_is_damaged_is_made_anew(tmp_path: Path, counted: Counter[str]) -> None:
    one = made(tmp_path / "home")
    first = checked(one)
    (kept,) = (one.store.root / "bills").iterdir()
    whole = kept.read_bytes()
    for rubbish in (b"", b"{}", first, whole[:-5], whole[:100] + b"\0" + whole[101:], b"0" * 64 + whole[64:]):
        kept.write_bytes(rubbish)
        counted.clear()
        assert checked(one) == first
        assert counted == {"bill": 1, "check": 1}
        assert kept.read_bytes() == whole


def test_who_has_the_bill_does_not_load_what_makes_it() -> None:
    code = "import sys, builder.push, builder.verify; print([name for name in sys.modules if 'cyclonedx' in name])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("what", ["VERSION", "CHECK", "SCHEMA", "__version__", "_LIBRARIES"])
def test_another_version_makes_and_checks_it_anew(
    tmp_path: Path, counted: Counter[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    one = made(tmp_path / "home")
    checked(one)
    counted.clear()
    monkeypatch.setattr(bills, what, {"__version__": "99", "_LIBRARIES": ("packaging",)}.get(what, 99))
    checked(one)
    assert counted == {"bill": 1, "check": 1}


def test_another_input_makes_and_checks_it_anew(tmp_path: Path, counted: Counter[str]) -> None:
    one = made(tmp_path / "home")
    first, cell = checked(one), one.plan.cell
    system = replace(one.plan.system_lock, debs=(*BELOW, *ABOVE, MISSING)) if one.plan.system_lock else None
    plans = [
        replace(one.plan, epoch=one.plan.epoch + 1),
        replace(one.plan, cell=replace(cell, repository="other/name")),
        replace(one.plan, cell=replace(cell, tag_names=("other", *cell.tag_names))),
        replace(one.plan, validator=b"another"),
        replace(one.plan, system_lock=system),
    ]
    for number, plan in enumerate(plans):
        counted.clear()
        try:
            assert checked(replace(one, plan=plan)) != first
        except CellFailedError:
            assert number >= 3, "these are not what is in the image"
        assert counted == {"bill": 1, "check": 1}
    other = with_layer(one, tar.file_entry(f"{SITE}/.wh.mesh-1.0.dist-info", b""))
    with pytest.raises(CellFailedError, match="is not what is in the image"):
        checked(other)


def test_a_bill_that_was_wrong_is_not_kept(tmp_path: Path) -> None:
    one = made(tmp_path / "home", base=[status(*BELOW[:2])], system=None)
    for _ in range(2):
        with pytest.raises(CellFailedError):
            checked(one)
    assert not (one.store.root / "bills").exists()


def test_a_bill_that_does_not_know_where_wheels_lie_is_not_kept(tmp_path: Path, counted: Counter[str]) -> None:
    one = made(tmp_path / "home")
    known = checked(one)
    (one.store.root / "bills").rename(one.store.root / "away")
    for layer in one.image.layers:  # As a store has them that got the layers themselves.
        content = b"".join(recipe.pieces(one.store, layer.blob))
        one.store.put(content)
    (one.store.root / "recipes").rename(one.store.root / "gone")
    counted.clear()
    for _ in range(2):
        assert properties(components(json.loads(checked(one)))["pypi/torch"]).get("layer") is None
    assert counted == {"bill": 2, "check": 2}
    (one.store.root / "gone").rename(one.store.root / "recipes")
    assert checked(one) == known


def test_what_is_remembered_of_a_layer_wrongly_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = made(tmp_path / "home")
    with monkeypatch.context() as patch:
        patch.setattr(installing, "identity", lambda *_: ("wrong", "0"))
        with pytest.raises(CellFailedError):
            one.check()
    one.check()


def test_a_damaged_wheel_gives_no_bill(tmp_path: Path) -> None:
    one = made(tmp_path / "home")
    lost = next(it for it in one.plan.lock.wheels if it.name == "mesh")
    damage(one.store.path(lost.sha256), 40)
    with pytest.raises(HashMismatchError, match="mesh"):
        one.bill()


def test_what_a_container_reports(whole: Made) -> None:
    bill = whole.bill()
    packages = dict(whole.plan.expectation.packages)
    bills.check_reported(bill, packages, name="tiny")
    bills.check_reported(bill, {**packages, "Torch": packages["torch"]}, name="tiny")
    other = {**packages, "numpy": "9", "surprise": "1"}
    del other["mesh"]
    with pytest.raises(CellFailedError) as caught:
        bills.check_reported(bill, other, name="tiny")
    assert [problem.what for problem in caught.value.problems[1:]] == [
        "mesh 1.0 is in the bill, and not in the image",
        "numpy is 9",
        "surprise 1 is in the image, and not in its bill",
    ]


def test_what_is_vendored_is_not_reported(tmp_path: Path) -> None:
    one = made(tmp_path / "home", fixed(wheel("kit", "1.0", files=VENDORED)))
    bills.check_reported(one.bill(), one.plan.expectation.packages, name="tiny")


# --------------------------------------------------------------------------- hostile metadata

HOSTILE: Mapping[str, tuple[str, ...]] = {
    "controls": ("License: \x1b[31mred\x07\x9b\u202e", "Home-page: javascript:alert(1)"),
    "surrogates": ("License: \udcff\udc80",),
    "long": ("License-Expression: " + "MIT AND " * 50_000 + "MIT",),
    "nested": ("License-Expression: " + "(" * 900 + "MIT" + ")" * 900,),
    "huge": ("License: " + "x" * 5_000_000,),
    "injection": ('License: "}],"components":[{"name":"evil"}',),
    "urls": ("Project-URL: x, http://[::1", "Project-URL: y, \x00", "Home-page: //\\?#", "Download-URL: file:///etc"),
    "requires": ("Requires-Dist: evil @ http://u:p@[::1", "Requires-Dist: \x1b[2J", "Requires-Dist:" + " a" * 9000),
    "twice": ("License-Expression: MIT", "License-Expression: GPL-3.0-only"),
    "empty": ("License-Expression: ", "License: \x00"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_metadata_gives_a_valid_bill(tmp_path: Path, kind: str) -> None:
    headers = tuple(header.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for header in HOSTILE[kind])
    one = made(tmp_path / "home", fixed(wheel("odd", "1.0", headers=headers)))
    bill = one.bill()
    require_valid(bill)
    one.check()
    text = bill.decode()
    assert all(char.isprintable() or char == "\n" for char in text)
    assert len(bill) < 100_000
    assert json.loads(bill)["components"][-1]["name"] != "evil"


def test_hostile_metadata_of_what_is_vendored_gives_a_valid_bill(tmp_path: Path) -> None:
    files = {
        "kit/__init__.py": b"",
        "kit/a/.dist-info/METADATA": b"",
        "kit/b/x.dist-info/METADATA": b"Name: \x1b[31m\xff" + b"n" * 2000 + b"\nVersion: \x07" + b"9" * 5000 + b"\n",
        "kit/c/\u202eevil-1.dist-info/METADATA": b"\0" * 5000,
        "kit/d/x-1.dist-info/METADATA": b"Name: a/b?c#d@e%\nVersion: 1 2/3\n",
        "kit/e/y-1.dist-info": b"a file",
    }
    one = made(tmp_path / "home", fixed(wheel("kit", "1.0", files=files)))
    require_valid(one.bill())
    one.check()
    assert len(components(one.document())["pypi/kit"]["components"]) == 5


# --------------------------------------------------------------------------- the command


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(cli, ["sbom", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ready:
    """Make a project of one cell, which is built, and a second one, which is not."""
    one = ready(tmp_path / "home")
    other = replace(one.plan, cell=replace(one.plan.cell, id="other"), validator=b"other")
    plans = {plan.cell.id: plan for plan in (one.plan, other)}
    monkeypatch.setenv("TORCHYARD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(
        Project, "select", lambda _, names: [plan.cell for id_, plan in plans.items() if not names or id_ in names]
    )
    monkeypatch.setattr(Project, "fresh_plans", lambda _, cells: tuple(plans[cell.id] for cell in cells))
    session = StoreSession(
        builder=OciEngine(), host=None, index=index_of(tmp_path / "links"), store=one.store, report=Said()
    )
    session.build(one.plan)
    return one


def test_one_bill_goes_to_standard_output_or_a_file(project: Ready, tmp_path: Path) -> None:
    name = project.plan.cell.id
    printed = run(name)
    assert printed.exit_code == 0
    require_valid(printed.stdout_bytes)
    assert run(name, "--json").stdout_bytes == printed.stdout_bytes
    path = tmp_path / "made" / "bill.json"
    written = run(name, "--json", "-o", str(path))
    assert path.read_bytes() == printed.stdout_bytes
    (row,) = json.loads(written.stdout)
    assert (row["id"], row["path"], row["size_bytes"]) == (name, str(path), len(printed.stdout_bytes))
    run(name, "-o", str(tmp_path / "made"))
    assert (tmp_path / "made" / f"{name}.cdx.json").read_bytes() == printed.stdout_bytes


def test_several_bills_go_to_a_directory(project: Ready, tmp_path: Path) -> None:
    assert run("--all").exit_code == MatrixError.exit_code
    assert run().exit_code == MatrixError.exit_code
    done = run("--all", "-o", str(tmp_path / "bills"))
    assert done.exit_code == CellFailedError.exit_code
    assert [path.name for path in (tmp_path / "bills").iterdir()] == [f"{project.plan.cell.id}.cdx.json"]
    assert "torchyard build other" in done.stderr
    assert run("other").exit_code == ImpossibleError.exit_code


def test_a_bill_that_does_not_agree_is_not_written(
    project: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sbom.bill
    monkeypatch.setattr(sbom, "bill", lambda *of: real(*of).replace(b'"version": "2.3.1"', b'"version": "2.3.2"'))
    failed = run(project.plan.cell.id, "-o", str(tmp_path / "bill.json"))
    assert failed.exit_code == CellFailedError.exit_code
    assert "numpy is 2.3.1" in failed.stderr
    assert not (tmp_path / "bill.json").exists()
    assert run(project.plan.cell.id).stdout == ""


def test_a_place_that_is_no_file(project: Ready) -> None:
    refused = run(project.plan.cell.id, "-o", "/dev/null")
    assert refused.exit_code == MatrixError.exit_code
    assert Path("/dev/null").is_char_device()
