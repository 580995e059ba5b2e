"""The oci engine: the image is what the wheels say, the same bytes everywhere, and no damage gets into it."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from builder import export, proof, tar
from builder.engines.oci import OciEngine, bytecode, install, layers, recipe
from builder.engines.oci.bytecode import Interpreter, cache_path
from builder.engines.oci.foundation import foundation_of
from builder.engines.oci.image import run_config
from builder.engines.oci.install import SITE
from builder.engines.oci.splice import TIME
from builder.engines.oci.stack import Group
from builder.errors import CellFailedError, HashMismatchError, SourceError, ToolError, TorchyardError, WheelError
from builder.layout import Descriptor
from builder.render import IMAGE_JSON, PREFIX, PROFILE, Healthcheck, ImageConfig, profile_of
from builder.store import Store
from tests.support import cells
from tests.support.bases import (
    DOES_NOT_COMPILE,
    EPOCH,
    ROOT,
    Ready,
    Said,
    base_entries,
    bootstrap_cell,
    compiled,
    damage,
    directory,
    fake_python,
    fixed,
    mesh,
    ready,
    wheels_of,
)
from tests.support.wheels import FakeWheel, cudnn_wheel, torch_wheel, wheel

ENV = PREFIX.lstrip("/")
REAL_COMPILE = bytecode.compile_sources


pytestmark = pytest.mark.usefixtures("compiled_sources")


# --------------------------------------------------------------------------- reading an image


@dataclass(frozen=True, kw_only=True)
class Member:
    info: tarfile.TarInfo
    content: bytes | None


def blob(store: Store, one: Descriptor) -> bytes:
    return b"".join(recipe.pieces(store, one))


def layers_of(store: Store, digest: str) -> list[dict[str, Member]]:
    """Return the entries of each layer, every digest on the way compared."""
    image = export.stored_image(store, digest)
    found = []
    for layer in image.layers:
        raw = blob(store, layer.blob)
        content = gzip.decompress(raw)
        assert f"sha256:{hashlib.sha256(content).hexdigest()}" == layer.diff_id
        members: dict[str, Member] = {}
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for info in archive:
                assert info.name not in members, "one entry for a path"
                file = archive.extractfile(info) if info.isreg() else None
                members[info.name] = Member(info=info, content=file.read() if file else None)
        found.append(members)
    return found


def unpacked(store: Store, digest: str) -> dict[str, Member]:
    """Return what lies where when all layers are unpacked, one over the other."""
    return {name: member for layer in layers_of(store, digest) for name, member in layer.items()}


def documents(store: Store, digest: str) -> tuple[dict[str, Any], dict[str, Any]]:
    manifest = json.loads(store.path(digest.removeprefix("sha256:")).read_bytes())
    config = json.loads(store.path(manifest["config"]["digest"].removeprefix("sha256:")).read_bytes())
    return manifest, config


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ready, str]:
    """Build the cell once for all tests that only look."""
    one = ready(tmp_path_factory.mktemp("made"))
    with fake_python():
        return one, one.build().digest


# --------------------------------------------------------------------------- what is in it


def test_manifest_and_configuration(made: tuple[Ready, str]) -> None:
    one, digest = made
    manifest, config = documents(one.store, digest)
    assert manifest["layers"][0]["digest"] == one.base.layer.digest, "the base comes first"
    assert {layer["mediaType"] for layer in manifest["layers"]} == {"application/vnd.oci.image.layer.v1.tar+gzip"}
    assert config["architecture"] == "amd64"
    assert config["os"] == "linux"
    assert config["created"] == "2026-01-02T03:04:05Z", "the newest of what is locked, not the clock"
    assert len(config["rootfs"]["diff_ids"]) == len(manifest["layers"])
    lines = [line["created_by"] for line in config["history"]]
    assert lines[0] == "a base"
    assert lines[-1] == f"torchyard: environment and image.json of {one.plan.cell.id}"
    places = [
        next(number for number, line in enumerate(lines) if line.startswith(f"torchyard: {what}"))
        for what in (
            "nvidia-cuda-runtime", "triton", "torch 2.8.0", "bytecode of torch", "numpy",
            "bytecode of what torch needs", "mesh", "bytecode of the variant's own packages", "environment",
        )
    ]  # fmt: skip
    assert places == sorted(places), "what many cells share lies below"
    run = config["config"]
    assert run["User"] == "1000:0"
    assert run["WorkingDir"] == "/workspace"
    assert run["Entrypoint"] == ["/usr/bin/tini", "--", "/opt/venv/bin/torchyard-start"]
    assert run["Cmd"] == ["bash"]
    assert "Healthcheck" not in run
    assert run["Env"][0].startswith(f"PATH={PREFIX}/bin:")
    assert run["Labels"] == dict(sorted(one.plan.config.labels.items()))


def test_the_size_is_that_of_all_blobs(tmp_path: Path) -> None:
    one = ready(tmp_path / "home")
    built = one.build()
    image = export.stored_image(one.store, built.digest)
    assert built.size_bytes == sum(len(blob(one.store, each)) for each in image.blobs)


def test_layers_of_wheels_are_not_kept(made: tuple[Ready, str]) -> None:
    one, digest = made
    found = [recipe.find(one.store, layer.blob.sha256) for layer in export.stored_image(one.store, digest).layers]
    recipes = [each for each in found if each is not None]
    assert len(recipes) == 6
    for each in recipes:
        of_wheels = any(source for source, _, _ in each.segments)
        # One that is all small files has nothing that is elsewhere.
        assert one.store.has(each.layer.blob.sha256) is not of_wheels
    assert {source for each in recipes for source in each.sources[1:]} == {each.sha256 for each in one.wheels}


def test_every_file_of_every_wheel_is_there(made: tuple[Ready, str]) -> None:
    one, digest = made
    files = unpacked(one.store, digest)
    for each in one.wheels:
        stem = "-".join(each.filename.split("-")[:2])
        with zipfile.ZipFile(io.BytesIO(each.content)) as archive:
            for entry in archive.infolist():
                if entry.filename.startswith(f"{stem}.data/") or "__pycache__" in entry.filename:
                    continue
                member = files[f"{SITE}/{entry.filename}"]
                if entry.filename != f"{stem}.dist-info/RECORD":
                    assert member.content == archive.read(entry)
                assert member.info.mode == (0o775 if ".so" in entry.filename else 0o664)
        assert files[f"{SITE}/{stem}.dist-info/INSTALLER"].content == b"torchyard\n"
        assert files[f"{SITE}/{stem}.dist-info/REQUESTED"].content == b""


def test_what_an_installer_writes(made: tuple[Ready, str]) -> None:
    one, digest = made
    files = unpacked(one.store, digest)

    def content(path: str) -> bytes:
        return files[f"{ENV}/{path}"].content or b""

    assert content("bin/mesh-run") == f"#!{PREFIX}/bin/python\nimport mesh\n".encode()
    assert content("bin/mesh").startswith(f"#!{PREFIX}/bin/python\n".encode())
    assert b"from mesh.big import main" in content("bin/mesh")
    assert content("share/mesh/notes.txt") == b"notes\n"
    assert content("include/site/python3/mesh/mesh.h") == b"int mesh;\n"
    assert content("lib/python3/site-packages/mesh_extra.py") == b"extra = 1\n"
    assert files[f"{ENV}/bin/mesh-run"].info.mode == files[f"{ENV}/bin/mesh"].info.mode == 0o775
    rows = content("lib/python3/site-packages/mesh-1.0.dist-info/RECORD").decode().splitlines()
    listed = {row.split(",")[0] for row in rows}
    assert "../../../bin/mesh" in listed
    for name in listed:
        assert os.path.normpath(f"{SITE}/{name}") in files, "what pip would remove is there"
    assert not [name for name in files if "cpython-39" in name], "bytecode that a wheel brings"


def test_the_environment(made: tuple[Ready, str]) -> None:
    one, digest = made
    files = unpacked(one.store, digest)
    links = {name.removeprefix(f"{ENV}/"): it.info.linkname for name, it in files.items() if it.info.issym()}
    assert links == {
        "bin/python": "/usr/bin/python3.11",
        "bin/python3": "python",
        "bin/python3.11": "python",
        "include/site/python3.11": "python3",
        "lib/python3.11": "python3",
        "lib64": "lib",
    }
    settings = (files[f"{ENV}/pyvenv.cfg"].content or b"").decode().splitlines()
    assert settings == ["home = /usr/bin", "include-system-site-packages = false", "version = 3.11"]
    assert files[IMAGE_JSON.lstrip("/")].content == one.plan.files["image.json"]
    assert files[IMAGE_JSON.lstrip("/")].info.mode == 0o644
    profile = files[PROFILE.lstrip("/")]
    assert (profile.content, profile.info.mode) == (profile_of(one.plan.config).encode(), 0o644)


def test_group_0_may_install_more(made: tuple[Ready, str]) -> None:
    one, digest = made
    for name, member in unpacked(one.store, digest).items():
        if name == ENV or name.startswith(f"{ENV}/"):
            assert (member.info.uid, member.info.gid) == (0, 0), name
            if not member.info.issym():
                assert member.info.mode & 0o020, name
                assert not member.info.mode & 0o002, name
            if member.info.isdir():
                assert member.info.mode == 0o775, name


def test_what_the_base_has_stays_as_it_is(made: tuple[Ready, str]) -> None:
    one, digest = made
    stack = layers_of(one.store, digest)
    files = unpacked(one.store, digest)
    for name, member in stack[0].items():
        now = files[name].info
        assert (now.mode, now.uid, now.gid, now.mtime) == (
            member.info.mode, member.info.uid, member.info.gid, member.info.mtime
        ), name  # fmt: skip
    assert files["usr/local/share/torchyard"].info.mode == 0o755


def test_nothing_is_there_twice_with_different_content(made: tuple[Ready, str]) -> None:
    one, digest = made
    seen: dict[str, Member] = {}
    for layer in layers_of(one.store, digest):
        names = list(layer)
        for name, member in layer.items():
            parent = name.rpartition("/")[0]
            assert not parent or names.index(parent) < names.index(name), "a directory comes before what is in it"
            former = seen.setdefault(name, member)
            assert (former.info.type, former.content) == (member.info.type, member.content), name
            if not member.info.isdir():
                assert former is member, f"{name} is in two layers"


def test_bytecode_of_what_is_imported(made: tuple[Ready, str]) -> None:
    one, digest = made
    files = unpacked(one.store, digest)
    seen = f"{PREFIX}/lib/python3.11/site-packages"
    sources = {
        name: it.content
        for name, it in files.items()
        if name.startswith(f"{SITE}/") and name.endswith(".py") and it.content is not None
    }
    expected = {}
    for name, content in sources.items():
        path = seen + name.removeprefix(SITE)
        made_of_it = compiled(path, content)
        if made_of_it is not None and "/tests/" not in name:
            expected[SITE + cache_path(path, "cpython-311").removeprefix(seen)] = made_of_it
    assert {name: it.content for name, it in files.items() if name.endswith(".pyc")} == expected
    assert f"{SITE}/mesh/__pycache__/big.cpython-311.pyc" in expected
    assert sources[f"{SITE}/mesh/broken.py"] == DOES_NOT_COMPILE


def test_bytecode_by_a_real_python(tmp_path: Path) -> None:
    """Whatever Python runs this test: what it compiles is what lies in the layer."""
    one = ready(tmp_path / "home")
    here = replace(Interpreter.of([sys.executable]), version="3.11.99")

    @contextlib.contextmanager
    def interpreter(*_: object, **__: object) -> Iterator[Interpreter]:
        yield here

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bytecode, "interpreter", interpreter)
        patch.setattr(bytecode, "compile_sources", REAL_COMPILE)
        built = one.build()
    files = unpacked(one.store, built.digest)
    place = f"{SITE}/" + cache_path("mesh_extra.py", here.tag)
    path = f"{PREFIX}/lib/python3.11/site-packages/mesh_extra.py"
    (expected,) = REAL_COMPILE(here, [(path, b"extra = 1\n")], workers=1)
    assert files[place].content == expected[1]
    assert built.observed is not None
    assert built.observed["facts"]["python_full"] == "3.11.99"


def test_what_was_observed(tmp_path: Path) -> None:
    one = ready(tmp_path / "home")
    observed = one.build().observed
    assert observed == {
        "schema": 1,
        "errors": {},
        "facts": {
            "torch": "2.8.0+cu128",
            "cuda": "12.8",
            "cudnn_number": 91002,
            "nccl": "2.27.3",
            "architectures": sorted(one.plan.cell.architectures),
            "python": "3.11",
            "python_full": "3.11.2",
            "packages": {each.project: str(each.version) for each in one.wheels},
        },
    }
    assert proof.judge(one.plan, "sha256:x", observed) == observed["facts"]


def test_a_cpu_build_has_no_cuda(tmp_path: Path) -> None:
    cell = bootstrap_cell(torch="2.13.0", cuda="cpu", index_url="https://index.invalid/cpu")
    one = ready(tmp_path / "home", cell)
    observed = one.build().observed
    assert observed is not None
    facts = proof.judge(one.plan, "sha256:x", observed)
    assert (facts["cuda"], facts["cudnn_number"], facts["nccl"], facts["architectures"]) == (None, None, None, [])


def test_on_a_registry_image_home_and_work_are_made(tmp_path: Path) -> None:
    cell = cells.cell()
    one = ready(tmp_path / "home", cell, entries=base_entries()[-1:])
    files = unpacked(one.store, one.build().digest)
    for name in ("home/torch", "workspace"):
        info = files[name].info
        assert (info.mode, info.uid, info.gid) == (0o775, 1000, 0)
    assert files["opt"].info.mode == 0o755


def variant_of(root: Path, *, layer: Sequence[tar.Entry] | None = None, **fields: Any) -> Ready:
    """Prepare the default cell with more in its variant, and with a layer of system packages."""
    cell = bootstrap_cell(packages=("numpy", "mesh"))
    cell = replace(cell, variant=cell.variant.model_copy(update=fields))
    return ready(root, cell, wheels_of(cell, mesh()), system=layer)


def test_programs_lie_beside_the_python(made: tuple[Ready, str]) -> None:
    one, digest = made
    files = unpacked(one.store, digest)
    assert "torchyard-start" in one.plan.programs
    for name, content in {**one.plan.programs, "torchyard-validate": one.plan.validator}.items():
        member = files[f"{ENV}/bin/{name}"]
        assert (member.content, member.info.mode, member.info.mtime) == (content, 0o775, TIME)


def test_directories_of_the_variant(tmp_path: Path) -> None:
    paths = ("/cache/huggingface", "/home/torch/work", "/srv/models", "/usr/local/share/torchyard/more", "/workspace")
    one = variant_of(tmp_path / "home", directories=paths)
    files = unpacked(one.store, one.build().digest)

    def about(name: str) -> tuple[int, int, int, int]:
        info = files[name].info
        assert info.isdir()
        return info.mode, info.uid, info.gid, int(info.mtime)

    for path in paths:
        assert about(path.lstrip("/")) == (0o775, 1000, 0, one.plan.epoch)
    for parent in ("cache", "srv", "usr/local/share/torchyard"):
        assert about(parent) == (0o755, 0, 0, one.plan.epoch)
    assert about("home/torch") == (0o775, 1000, 0, EPOCH), "as the base has it"


def test_system_packages_lie_above_what_variants_share(tmp_path: Path) -> None:
    system = [directory("usr"), directory("usr/local", 0o711), tar.file_entry("usr/bin/sshd", b"sshd", mode=0o755)]
    one = variant_of(tmp_path / "one")
    other = variant_of(tmp_path / "other", layer=system, system=("git", "sshd"))
    layers, above = ([each.blob.digest for each in export.stored_image(it.store, it.build().digest).layers]
                     for it in (one, other))  # fmt: skip
    assert other.base.system is not None
    assert above == [*layers[:-1], other.base.system.blob.digest, above[-1]]
    digest = other.build().digest
    assert documents(other.store, digest)[1]["history"][-2]["created_by"] == "torchyard: system packages: git, sshd"
    files = unpacked(other.store, digest)
    assert files["usr/bin/sshd"].content == b"sshd"
    assert files["usr/local"].info.mode == 0o711, "the cell's own layer, on top, leaves it as it is"


def test_variants_of_one_torch_share_all_below_their_own_packages(tmp_path: Path) -> None:
    """By digest; and whoever has both in one store works through what they share once."""
    runtime, more = bootstrap_cell(packages=("numpy",)), bootstrap_cell(packages=("numpy", "mesh"))
    one = ready(tmp_path / "home", runtime)
    other = ready(tmp_path / "home", more, wheels_of(more, mesh()))
    first, second = (export.stored_image(it.store, it.build().digest).layers for it in (one, other))
    assert second[: len(first) - 1] == first[:-1]
    assert len(second) == len(first) + 2, "its packages and their bytecode"


def test_packages_without_a_source_have_no_layer_of_bytecode(tmp_path: Path) -> None:
    cell = bootstrap_cell(packages=("numpy", "alpha"))
    alpha = wheel("alpha", "1.0", files={"alpha/data.bin": b"1"})
    one = ready(tmp_path / "home", cell, wheels_of(cell, alpha))
    lines = [line["created_by"] for line in documents(one.store, one.build().digest)[1]["history"]]
    assert any("alpha" in line for line in lines)
    assert [line for line in lines if "bytecode" in line] == [
        "torchyard: bytecode of torch", "torchyard: bytecode of what torch needs",
    ]  # fmt: skip


# --------------------------------------------------------------------------- the run part of the configuration


def config(**more: Any) -> ImageConfig:
    given: dict[str, Any] = {
        "env": {},
        "labels": {},
        "user": "1000:0",
        "workdir": "/w",
        "entrypoint": (),
        "cmd": ("c",),
    }
    return ImageConfig(**{**given, **more})


BASE = {
    "Env": ["PATH=/base", "KEPT=a=b", "LANG=C"],
    "Labels": {"vendor": "x", "title": "base"},
    "Entrypoint": ["/entry"],
    "Cmd": ["base"],
    "ExposedPorts": {"80/tcp": {}},
    "Volumes": {"/data": {}},
    "StopSignal": "SIGINT",
    "Healthcheck": {"Test": ["CMD", "of-the-base"]},
    "User": "nobody",
    "WorkingDir": "/base",
}


def test_the_plan_goes_over_the_base_as_a_dockerfile_would() -> None:
    plan = config(env={"LANG": "C.UTF-8", "NEW": "1"}, labels={"title": "mine", "a": "b"}, exposed_ports=("8888/tcp",))
    merged = run_config(BASE, plan)
    assert merged == {
        "Env": ["PATH=/base", "KEPT=a=b", "LANG=C.UTF-8", "NEW=1"],
        "Labels": {"a": "b", "title": "mine", "vendor": "x"},
        "Entrypoint": ["/entry"],
        "Cmd": ["c"],
        "ExposedPorts": {"80/tcp": {}, "8888/tcp": {}},
        "Volumes": {"/data": {}},
        "StopSignal": "SIGINT",
        "Healthcheck": {"Test": ["CMD", "of-the-base"]},
        "User": "1000:0",
        "WorkingDir": "/w",
    }
    assert list(merged["Labels"]) == sorted(merged["Labels"])
    check = Healthcheck(command=("x", "--health"), interval_s=30, timeout_s=10, start_period_s=60, retries=3)
    assert run_config({"Healthcheck": {"Test": ["NONE"]}}, config(healthcheck=check))["Healthcheck"] == {
        "Test": ["CMD", "x", "--health"],
        "Interval": 30_000_000_000,
        "Timeout": 10_000_000_000,
        "StartPeriod": 60_000_000_000,
        "Retries": 3,
    }
    assert run_config(BASE, config(entrypoint=("/init", "--")))["Entrypoint"] == ["/init", "--"]


@pytest.mark.parametrize("base", [{}, dict.fromkeys(("Env", "Labels", "ExposedPorts", "Entrypoint"))])
def test_a_base_that_says_nothing(base: Mapping[str, Any]) -> None:
    merged = run_config(base, config(env={"A": "b"}))
    assert merged["Env"] == ["A=b"]
    assert merged["Labels"] == {}
    assert not merged.get("ExposedPorts")
    assert not merged.get("Entrypoint")


def test_the_base_s_configuration_is_in_the_image(tmp_path: Path) -> None:
    one = ready(tmp_path / "home", config={**BASE, "Env": ["PATH=/usr/bin", "KEPT=1"]})
    run = documents(one.store, one.build().digest)[1]["config"]
    assert "KEPT=1" in run["Env"]
    assert run["Volumes"] == {"/data": {}}
    assert run["Labels"]["vendor"] == "x"
    assert run["Entrypoint"][0] == "/usr/bin/tini"


# --------------------------------------------------------------------------- the same bytes everywhere

DIGEST = "sha256:5aab28189071b7544ce42aa5d5772f66f7f308486112f7a6cffb356d62d0ac81"
"""The manifest of the cell that `ready` makes, on every machine and under every Python.

Its wheels and its base are compressed by the pinned compressor and its bytecode is a stand-in, so nothing that differs
between machines is in it. If this test fails, the bytes of images changed. By mistake: find out why, and undo it; on
purpose (another layout, another label, a field of image.json): write the new digest here, say so in the changelog, and
raise RECIPE in `splice` (or in `bytecode`) if layers of wheels changed, or else stores will go on giving the old ones.
Data about torch 2.8.0 in `builder/data` is in the image too: its architectures and its NCCL.
"""


def test_the_digest_is_the_known_one(made: tuple[Ready, str]) -> None:
    assert made[1] == DIGEST


def test_building_again_gives_the_same(tmp_path: Path) -> None:
    one = ready(tmp_path / "home")
    assert one.build().digest == one.build().digest == DIGEST


def test_what_is_remembered_is_what_is_made(tmp_path: Path) -> None:
    one = ready(tmp_path / "home")
    first = one.build()
    with pytest.MonkeyPatch.context() as patch:
        # Nothing is worked through a second time, and the observation is the same.
        patch.setattr(layers, "splice", lambda *_, **__: pytest.fail("spliced again"))
        patch.setattr(bytecode, "compile_sources", lambda *_, **__: pytest.fail("compiled again"))
        patch.setattr(bytecode, "interpreter", lambda *_, **__: pytest.fail("unpacked again"))
        assert one.build() == first
    for path in (*(one.store.root / "layers").iterdir(), *(one.store.root / "interpreters").iterdir()):
        path.write_bytes(b"rubbish")
    assert one.build() == first


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_do_not_show(tmp_path: Path, workers: int) -> None:
    assert ready(tmp_path / "home").build(workers=workers).digest == DIGEST


def test_the_store_s_place_does_not_show(tmp_path: Path) -> None:
    assert ready(tmp_path / "another directory" / "ü").build().digest == DIGEST


def test_the_order_in_the_lock_does_not_show(tmp_path: Path) -> None:
    one = ready(tmp_path / "home")
    shuffled = list(one.plan.lock.wheels)
    random.Random(1).shuffle(shuffled)
    assert shuffled != list(one.plan.lock.wheels)
    plan = replace(one.plan, lock=replace(one.plan.lock, wheels=tuple(shuffled)))
    assert one.build(plan=plan).digest == DIGEST


def test_the_umask_does_not_show(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        assert ready(tmp_path / "home").build().digest == DIGEST
    finally:
        os.umask(before)


def test_one_processor_does_not_show(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        one = ready(tmp_path / "home")
        assert OciEngine().build(one.plan, one.base, store=one.store, steps=Said()).digest == DIGEST
    finally:
        os.sched_setaffinity(0, before)


def test_another_process_with_another_environment(tmp_path: Path) -> None:
    """Time zone, locale, hash seed, home and directory at once. Of a host's name: see the integration tests."""
    code = (
        "import sys; from pathlib import Path; from tests.support.bases import fake_python, ready\n"
        "with fake_python(): print(ready(Path(sys.argv[1])).build().digest)"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONHASHSEED": "7",
        "TZ": "Pacific/Kiritimati",
        "LANG": "tr_TR.UTF-8",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "HOME": str(tmp_path),
        "SOURCE_DATE_EPOCH": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "home"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == DIGEST, done.stderr


def test_another_input_is_another_image(tmp_path: Path) -> None:
    cell = bootstrap_cell(packages=("numpy", "mesh"))
    other = ready(tmp_path / "wheel", cell, wheels_of(cell, mesh(more={"mesh/one_more.txt": b""})))
    assert other.build().digest != DIGEST
    with fake_python("3.11.3", compile_one=lambda path, source: b"another" + source):
        assert ready(tmp_path / "python").build().digest != DIGEST


# --------------------------------------------------------------------------- wheels that do not go together


def with_others(root: Path, *others: FakeWheel) -> Ready:
    cell = bootstrap_cell(packages=tuple(dict.fromkeys(("numpy", *(one.project for one in others)))))
    return ready(root, cell, wheels_of(cell, *others))


@pytest.fixture(params=["in one layer", "in two"])
def in_layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in two":
        monkeypatch.setattr(sys.modules[Group.__module__], "ALONE_BYTES", 0)


@pytest.mark.usefixtures("in_layers")
def test_two_wheels_want_one_path(tmp_path: Path) -> None:
    alpha, beta = (wheel(name, "1.0", files={"both/x.py": name.encode()}) for name in ("alpha", "beta"))
    one = with_others(tmp_path / "home", alpha, beta)
    with pytest.raises(WheelError, match=r"both install /opt/venv/.*/both/x\.py") as caught:
        one.build()
    assert "alpha-1.0-py3-none-any.whl" in str(caught.value)
    assert "beta-1.0-py3-none-any.whl" in str(caught.value)
    assert all(one.store.verify(each.sha256) for each in one.wheels), "no wheel is blamed"


def test_the_same_file_in_two_wheels_is_no_conflict(tmp_path: Path) -> None:
    files = {"both/x.py": b"1\n"}
    one = with_others(tmp_path / "home", wheel("alpha", "1.0", files=files), wheel("beta", "1.0", files=files))
    assert unpacked(one.store, one.build().digest)[f"{SITE}/both/x.py"].content == b"1\n"


@pytest.mark.usefixtures("in_layers")
def test_a_file_that_is_another_s_directory(tmp_path: Path) -> None:
    alpha, beta = (
        wheel(name, "1.0", files={path: b"1\n"}) for name, path in (("alpha", "both"), ("beta", "both/x.py"))
    )
    one = with_others(tmp_path / "home", alpha, beta)
    with pytest.raises(WheelError, match=r"alpha.*as a file, beta.*as a directory"):
        one.build()


@pytest.mark.parametrize(
    "path", ["pyvenv.cfg", "bin/python", "lib64", "lib64/x.so", "lib/python3.11/site-packages/x.py", "bin/activate"]
)
def test_a_wheel_that_wants_the_environment_itself(tmp_path: Path, path: str) -> None:
    """A link of the environment would hide what the wheel put there, or be hidden."""
    one = with_others(tmp_path / "home", wheel("alpha", "1.0", files={f"alpha-1.0.data/data/{path}": b"x"}))
    with pytest.raises(WheelError, match=r"the environment itself.*alpha-1\.0"):
        one.build()


def test_a_wheel_that_its_publisher_broke(tmp_path: Path) -> None:
    """Its bytes are those that were locked: no fault of the disk, so nothing is removed or fetched again."""
    broken = fixed(wheel("alpha", "1.0", files={"alpha/__init__.py": b"x = 1\n"}))
    content = bytearray(broken.content)
    content[content.index(b"PK\1\2") + 16] ^= 1
    cell = bootstrap_cell(packages=("numpy", "alpha"))
    wheels = (*(one for one in wheels_of(cell) if one.project != "alpha"), replace(broken, content=bytes(content)))
    one = ready(tmp_path / "home", cell, wheels)
    with pytest.raises(WheelError):
        one.build()
    assert one.store.verify(one.wheel("alpha").sha256)


# --------------------------------------------------------------------------- wheels that lie

LIES: Mapping[str, tuple[Callable[[], FakeWheel], str]] = {
    "CUDA": (lambda: torch_wheel("2.8.0", reports="2.8.0+cu128", cuda="12.6"), "torch.version.cuda is 12.6"),
    "torch": (lambda: torch_wheel("2.8.0", reports="2.8.1+cu128", cuda="12.8"), "torch.__version__ is 2.8.1"),
    "no CUDA": (lambda: torch_wheel("2.8.0", reports="2.8.0+cu128", cuda=None), "torch.version.cuda is none"),
    "GPUs": (
        lambda: torch_wheel("2.8.0", reports="2.8.0+cu128", cuda="12.8", architectures=["sm_50"]),
        "GPU architectures torch was compiled for is sm_50",
    ),
    "cuDNN": (
        lambda: wheel("nvidia-cudnn-cu12", "9.10.2.21", files=header_of("9.9.0")),
        "the loaded cuDNN is 90900",
    ),
    "cuDNN says nothing": (
        lambda: wheel("nvidia-cudnn-cu12", "9.10.2.21", files={"nvidia/cudnn/x": b""}),
        "the loaded cuDNN could not be found out",
    ),
    "NCCL": (
        lambda: wheel("nvidia-nccl-cu12", "2.27.3", files={NCCL: b"\0NCCL version 2.26.1+cuda12.8\0"}),
        "the loaded NCCL is 2.26.1",
    ),
    "NCCL says two things": (
        lambda: wheel(
            "nvidia-nccl-cu12", "2.27.3", files={NCCL: b"NCCL version 2.27.3+cuda12.8\0NCCL version 2.26.1+cuda12.8"}
        ),
        "the loaded NCCL could not be found out",
    ),
}
NCCL = "nvidia/nccl/lib/libnccl.so.2"


def header_of(version: str) -> dict[str, bytes]:
    honest = cudnn_wheel("nvidia-cudnn-cu12", version, tag="py3-none-any")
    with zipfile.ZipFile(io.BytesIO(honest.content)) as archive:
        name = "nvidia/cudnn/include/cudnn_version.h"
        return {name: archive.read(name)}


@pytest.mark.parametrize("lie", LIES)
def test_an_image_that_is_not_what_its_cell_declares(tmp_path: Path, lie: str) -> None:
    make, what = LIES[lie]
    cell = bootstrap_cell()
    one = ready(tmp_path / "home", cell, wheels_of(cell, make()))
    built = one.build()
    assert built.observed is not None
    with pytest.raises(CellFailedError) as caught:
        proof.judge(one.plan, built.digest, built.observed)
    assert any(what in problem.what for problem in caught.value.problems), str(caught.value)


def test_a_base_with_another_python(tmp_path: Path) -> None:
    one = ready(tmp_path / "home")
    with fake_python("3.12.1"):
        built = one.build()
    assert built.observed is not None
    with pytest.raises(CellFailedError, match=r"Python is 3\.12"):
        proof.judge(one.plan, built.digest, built.observed)


# --------------------------------------------------------------------------- damage


def places(one: FakeWheel) -> dict[str, int]:
    """Return offsets in a wheel of every kind of byte that says something."""
    with zipfile.ZipFile(io.BytesIO(one.content)) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        start = archive.start_dir

    def data(name: str) -> int:
        entry = entries[name]
        return entry.header_offset + 30 + len(entry.filename.encode())

    first = next(iter(entries.values()))
    return {
        "a large stream": data("mesh/big.py") + entries["mesh/big.py"].compress_size // 2,
        "the start of a stream": data("mesh/big.py"),
        "the end of a stream": data("mesh/big.py") + entries["mesh/big.py"].compress_size - 1,
        "a stored member": data("mesh/_core.so") + 1000,
        "a large member": data("mesh/data.bin") + 10_000,
        "a small source": data("mesh/__init__.py") + 3,
        "a script": data("mesh-1.0.data/scripts/mesh-run") + 2,
        "RECORD": data("mesh-1.0.dist-info/RECORD") + 40,
        "METADATA": data("mesh-1.0.dist-info/METADATA") + 3,
        "a local header's signature": first.header_offset + 1,
        "a local header's CRC": first.header_offset + 14,
        "a local header's name": first.header_offset + 31,
        "the directory's CRC": start + 16,
        "the directory's size": start + 24,
        "the directory's offset": start + 42,
        "the directory's name": start + 47,
        "the end record": len(one.content) - 10,
    }


PLACES = tuple(places(fixed(mesh())))


@pytest.mark.parametrize("place", PLACES)
def test_a_flipped_bit_is_found_and_the_wheel_removed(tmp_path: Path, place: str) -> None:
    one = ready(tmp_path / "home")
    damage(one.path("mesh"), places(one.wheel("mesh"))[place])
    with pytest.raises(HashMismatchError, match=r"damaged in the store, and removed from it: mesh-1\.0") as caught:
        one.build()
    assert caught.value.problems[0].tries
    assert not one.path("mesh").exists()
    assert all(one.store.verify(each.sha256) for each in one.wheels if each.project != "mesh"), "no other one"
    one.store.put(one.wheel("mesh").content)
    assert one.build().digest == DIGEST


@pytest.mark.parametrize("place", PLACES)
def test_whoever_finds_the_damage_first_says_the_same(tmp_path: Path, place: str) -> None:
    """Sources are read by another thread than layers are made: which of them is first is chance."""
    one = ready(tmp_path / "home")
    locked = next(each for each in one.plan.lock.wheels if each.name == "mesh")
    read = [content for _, content in layers.sources(locked, one.store, python="3.11")]
    damage(one.path("mesh"), places(one.wheel("mesh"))[place])
    try:
        assert list(layers.sources(locked, one.store, python="3.11"))
    except HashMismatchError:
        assert not one.path("mesh").exists()
    else:
        assert place in ("a stored member", "a large member"), "no source, so it is not read here"
    assert read


def test_a_wheel_that_is_cut_short(tmp_path: Path) -> None:
    one = ready(tmp_path / "home")
    path = one.path("mesh")
    path.chmod(0o644)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(HashMismatchError):
        one.build()
    assert not path.exists()


@pytest.mark.parametrize("project", ["torch", "numpy", "mesh"])
def test_a_wheel_that_is_not_there(tmp_path: Path, project: str) -> None:
    one = ready(tmp_path / "home")
    one.path(project).unlink()
    with pytest.raises(HashMismatchError, match=project):
        one.build()


def test_a_wheel_that_goes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when another run finds that it was damaged."""
    one = ready(tmp_path / "home")
    real = install.placed

    def gone(opened: Any) -> Any:
        if opened.name == "mesh":
            one.path("mesh").unlink(missing_ok=True)
        return real(opened)

    monkeypatch.setattr(layers, "placed", gone)
    with pytest.raises(HashMismatchError, match="mesh"):
        one.build()


def test_damage_behind_a_remembered_layer_shows_when_its_bytes_are_wanted(tmp_path: Path) -> None:
    one = ready(tmp_path / "home")
    digest = one.build().digest
    damage(one.path("mesh"), places(one.wheel("mesh"))["a large stream"])
    image = export.stored_image(one.store, digest)
    with pytest.raises(HashMismatchError):
        for _ in export.archive(one.store, image):
            pass
    assert not one.path("mesh").exists()
    with pytest.raises(SourceError):
        export.stored_image(one.store, digest)
    one.store.put(one.wheel("mesh").content)
    assert one.build().digest == digest
    assert b"".join(export.archive(one.store, image))


def test_a_failure_leaves_no_scratch(tmp_path: Path) -> None:
    one = ready(tmp_path / "home")
    damage(one.path("torch"), 100)
    with pytest.raises(TorchyardError):
        one.build()
    assert list((one.store.root / "work").iterdir()) == []
    assert list((one.store.root / "partial").iterdir()) == []


# --------------------------------------------------------------------------- stopping, and others at work


def test_a_failed_layer_stops_the_compiling(tmp_path: Path) -> None:
    """The rest of it would be minutes for nothing."""
    one = ready(tmp_path / "home")
    damage(one.path("triton"), 3)  # its bad signature is found at once

    def slow(path: str, source: bytes) -> bytes:
        time.sleep(0.5)
        return source

    started = time.monotonic()
    with fake_python(compile_one=slow) as seen, pytest.raises(HashMismatchError):
        one.build()
    assert time.monotonic() - started < 2.5
    assert len(seen) < 6


def test_a_python_that_fails_stops_the_layers(tmp_path: Path) -> None:
    one = ready(tmp_path / "home")

    def fails(path: str, source: bytes) -> bytes:
        raise ToolError("the Python of the base does not work")

    with fake_python(compile_one=fails), pytest.raises(ToolError):
        one.build()
    assert list((one.store.root / "work").iterdir()) == []


def test_who_waits_for_the_python_holds_nothing(tmp_path: Path) -> None:
    """Else two runs wait for ever: one has the Python and wants the layer, one has the layer's and wants Python."""
    one = ready(tmp_path / "home")
    foundation = foundation_of(one.plan, one.base, one.store)
    one.build()  # so that the Python's identity is known without starting it
    for path in (one.store.root / "layers").iterdir():
        path.unlink()
    taken: list[str] = []
    real = Store.scratch

    def scratch(store: Store, name: str) -> Any:
        taken.append(name.partition("-")[0])
        return real(store, name)

    compiler = layers.Compiler(foundation, one.store, python="3.11", workers=1, stopped=threading.Event())
    with pytest.MonkeyPatch.context() as patch, compiler:
        patch.setattr(Store, "scratch", scratch)
        compiler.layer(one.plan.lock.wheels, title="all")
    assert taken == ["python", "bytecode"]


def test_two_at_once_in_one_store(tmp_path: Path) -> None:
    one = ready(tmp_path / "home")
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(one.build().digest)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [DIGEST] * 3
