"""Validating real images: one of nobody's, and many that are broken; none is green that must not be.

Ours are validated, wholly and as one types it, by test_walk_through.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
import docker.errors
import pytest
from docker.models.containers import Container

from builder import base as bases
from builder import validate
from builder.engines import Allowance, Found
from builder.engines import docker as docker_engine
from builder.engines.docker import DockerEngine
from builder.errors import ImpossibleError
from builder.fetching import Silent
from builder.index import Index
from builder.lock import Wheel
from builder.store import Store
from builder.validate import Asked, Subject
from tests.integration.conftest import CPU, Built, Real, remove, torchyard
from tests.support.wheels import wheel

pytestmark = [
    pytest.mark.engine,
    pytest.mark.debian,
    pytest.mark.network,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]

REPOSITORY = "torchyard-test-validate"
VALIDATOR = "torchyard-validate"

Make = Callable[..., str]


@dataclass
class Watched(DockerEngine):
    """The engine, remembering what it made for a run, so that a test can see that nothing of it is left."""

    containers: list[str] = field(default_factory=list)
    volumes: list[str] = field(default_factory=list)

    def _confined(self, image: Found, argv: Sequence[str], allowance: Allowance) -> Container:
        container = super()._confined(image, argv, allowance)
        self.containers.append(str(container.id))
        mounts = self.client.api.inspect_container(str(container.id))["Mounts"]
        # Of a volume that nobody named the engine tells only where it lies: in .../NAME/_data.
        self.volumes += [Path(mount["Source"]).parent.name for mount in mounts if mount["Type"] == "volume"]
        return container

    def left(self) -> list[str]:
        """Return what is still there."""
        found = []
        for name in self.containers:
            with contextlib.suppress(docker.errors.NotFound):
                found.append(f"container {self.client.containers.get(name).id}")
        for name in self.volumes:
            with contextlib.suppress(docker.errors.NotFound):
                found.append(f"volume {self.client.volumes.get(name).id}")
        return found


@pytest.fixture
def watched() -> Iterator[Watched]:
    engine = Watched()
    yield engine
    left = engine.left()
    engine.client.close()
    assert engine.volumes or not engine.containers
    assert left == []


@pytest.fixture
def make(tmp_path: Path, client: docker.DockerClient) -> Iterator[Make]:
    """Build a small image from a Dockerfile, without network; what it and its build leave is removed."""
    remove(client, REPOSITORY)
    engine = DockerEngine()
    before = engine.build_cache()
    context = tmp_path / "context"
    context.mkdir()

    def build(
        dockerfile: str, files: Mapping[str, bytes] | None = None, *, platform: str = "linux/amd64", **contexts: object
    ) -> str:
        for name, content in {"Dockerfile": dockerfile.encode(), **(files or {})}.items():
            (context / name).write_bytes(content)
            (context / name).chmod(0o755)
        name = f"{REPOSITORY}:{len(list(tmp_path.iterdir()))}"
        command = ["docker", "buildx", "build", "--builder", "default", "--network", "none", "--platform", platform]
        command += ["--provenance", "false", "--progress", "plain"]
        # Compressing torch would take longer than installing it.
        command += ["--output", f"type=docker,name={name},compression=uncompressed"]
        for option, value in contexts.items():
            command += ["--build-context", f"{option}={value}"]
        done = subprocess.run([*command, str(context)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return name

    yield build
    remove(client, REPOSITORY)
    engine.forget_builds(since=before)
    engine.client.close()


@pytest.fixture(scope="session")
def base(real: Real, cpu_oci: Built) -> str:
    """The cell's own base, which its build has left in the store, as a build context: a system and a Python."""
    lock = real.project.base_lock(real.cell(CPU))
    assert lock is not None
    made = bases.make(lock, Store.open())
    return f"oci-layout://{made.layout}@{made.digest}"


def report_of(engine: DockerEngine, name: str, *only: str, **asked: Any) -> dict[str, Any]:
    found = engine.find(name)
    subject = Subject(kind="image", name=name, digest=found.digest)
    return validate.image(subject, found, Asked(only=only, **asked), engine, lambda _: None)


def result_of(report: Mapping[str, Any], check: str) -> Any:
    return next(it for it in report["results"] if it["id"] == check)


def told(result: Mapping[str, Any]) -> str:
    """Return all that a result says to people."""
    return "\n".join([result["detail"], *(f"{it['what']}\n{it['why']}\n{it['remedy']}" for it in result["findings"])])


def refused(engine: DockerEngine, name: str, **asked: Any) -> str:
    """Validate an image that cannot be, and return what is said of it."""
    started = time.monotonic()
    with pytest.raises(ImpossibleError) as caught:
        report_of(engine, name, "run.identity", **asked)
    assert time.monotonic() - started < 120
    (problem,) = caught.value.problems
    assert problem.tries
    return f"{problem.what}\n{problem.why}\n{' '.join(problem.tries)}"


# --------------------------------------------------------------------------- good ones


@pytest.mark.parametrize(
    "options", [[], ["--user", "12345:0", "--read-only", "--tmpfs", "/tmp:exec"]], ids=["its own user", "any user"]
)
def test_our_images_validate_themselves(cpu_oci: Built, options: Sequence[str]) -> None:
    """As one would type it, under the image's own entrypoint."""
    command = ["docker", "run", "--rm", "--network", "none", *options, cpu_oci.name, VALIDATOR]
    done = subprocess.run([*command, "--only", "run.identity"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[:2] == ["ok", "run.identity"]
    assert "no tier is proven" in done.stdout


def test_without_a_place_to_write_an_image_says_so(cpu_oci: Built) -> None:
    command = ["docker", "run", "--rm", "--network", "none", "--read-only", cpu_oci.name, VALIDATOR]
    done = subprocess.run([*command, "--only", "run.identity"], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "--tmpfs /tmp" in done.stderr


def test_an_image_of_somebody_else(real: Real, base: str, make: Make, watched: Watched, tmp_path: Path) -> None:
    """As most are made: pip on top of a system's Python, by root; nothing in it knows of torchyard."""
    wheels = tmp_path / "wheels"
    locked = real.project.lock(real.cell(CPU)).wheels
    Store.open().link(wheels, {one.filename: one.sha256 for one in locked})
    name = make(
        "FROM base\n"
        "RUN --mount=type=bind,from=wheels,target=/wheels python3.11 -m venv /srv/env && "
        "/srv/env/bin/pip install -q --no-index --no-deps --no-cache-dir --no-compile /wheels/*.whl\n"
        "ENV PATH=/srv/env/bin:/usr/bin:/bin\n",
        base=base,
        wheels=wheels,
    )
    report = report_of(watched, name, "run.*", "cpu.numerics")
    statuses = {it["id"]: it["status"] for it in report["results"]}
    assert report["verdict"]["exit_code"] == 0, [told(it) for it in report["results"] if it["status"] == "fail"]
    assert (statuses["run.identity"], statuses["run.closure"], statuses["cpu.numerics"]) == ("pass", "pass", "pass")
    assert result_of(report, "run.declared")["skip"] == "not_declared"
    assert report["environment"]["facts"]["torch"] == "2.13.0+cpu"
    assert report["subject"]["declared"] is None


# --------------------------------------------------------------------------- wrong ones


def test_a_declaration_that_is_not_true(cpu_oci: Built, real: Real, make: Make, watched: Watched) -> None:
    other = next(path for path in sorted((real.root / "images").iterdir()) if "-cu128-" in path.name)
    name = make(
        f"FROM {cpu_oci.name}\nCOPY image.json /usr/local/share/torchyard/image.json\n",
        {"image.json": (other / "image.json").read_bytes()},
    )
    report = report_of(watched, name, "run.declared")
    assert report["verdict"]["exit_code"] == 1
    text = told(result_of(report, "run.declared"))
    assert "torch is 2.13.0+cpu" in text
    assert "+cu128" in text


def test_two_distributions_that_own_one_file(cpu_oci: Built, make: Make, watched: Watched) -> None:
    imposter = wheel("imposter", "1.0", files={"torch/lib/libshm.so": b"\x7fELF of another torch"})
    name = make(
        f"FROM {cpu_oci.name}\nCOPY {imposter.filename} /tmp/\n"
        f"RUN pip install -q --no-index --no-deps --no-compile /tmp/{imposter.filename}\n",
        {imposter.filename: imposter.content},
    )
    report = report_of(watched, name, "run.closure")
    assert report["verdict"]["exit_code"] == 1
    (finding,) = [it for it in result_of(report, "run.closure")["findings"] if it["status"] == "fail"]
    assert "imposter 1.0" in finding["what"]
    assert "torch/lib/libshm.so" in finding["what"]
    assert "imposter 1.0" in finding["why"], "what lies there is of the later one"
    assert "pip uninstall imposter" in finding["remedy"]


def test_no_torch(cpu_oci: Built, make: Make, watched: Watched) -> None:
    name = make(f"FROM {cpu_oci.name}\nRUN pip uninstall -q -y torch\n")
    report = report_of(watched, name, "run.*")
    assert report["verdict"]["exit_code"] == 1
    statuses = {it["id"]: (it["status"], it["skip"]) for it in report["results"]}
    assert statuses["run.identity"] == ("fail", None)
    assert statuses["run.closure"] == ("fail", None)
    assert statuses["run.versions"] == ("skip", "dependency_failed")


def test_no_python(make: Make, watched: Watched) -> None:
    name = make("FROM scratch\nCOPY nothing /nothing\n", {"nothing": b"nothing"})
    text = refused(watched, name)
    assert "no Python" in text
    assert "python3: cannot be started" in text


def test_another_architecture(make: Make, watched: Watched) -> None:
    """Its Python has the header of a program for arm64, and no more."""
    header = bytearray(64)
    header[:20] = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00" + (183).to_bytes(2, "little")
    header[20:24], header[52:54] = (1).to_bytes(4, "little"), (64).to_bytes(2, "little")
    dockerfile = "FROM scratch\nCOPY python /usr/bin/python\nENV PATH=/usr/bin\n"
    name = make(dockerfile, {"python": bytes(header)}, platform="linux/arm64")
    text = refused(watched, name)
    assert "linux/arm64" in text
    assert "Exec format error" in text or "cannot be started" in text


def test_an_image_that_does_not_exist(tmp_path: Path) -> None:
    ran = torchyard("validate", "127.0.0.1:9/no/such:image", "--report-dir", str(tmp_path), timeout_s=120)
    assert ran.code == 3
    assert "there is no image 127.0.0.1:9/no/such:image" in ran.err
    assert "Traceback" not in ran.err
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_name_of_an_image(tmp_path: Path) -> None:
    ran = torchyard("validate", "UPPER CASE", "--report-dir", str(tmp_path), timeout_s=120)
    assert ran.code == 3
    assert "Traceback" not in ran.err


# --------------------------------------------------------------------------- hostile ones


@pytest.fixture
def hostile(base: str, make: Make) -> Callable[[str], str]:
    """Make images whose Python tells its version as it should, and then does what the script says."""

    def build(script: str) -> str:
        python = f'#!/bin/sh\nif [ "$1" = -c ]; then exec /usr/bin/python3.11 "$@"; fi\n{script}\n'
        return make(
            "FROM base\nCOPY python /usr/local/bin/python\nENV PATH=/usr/local/bin:/usr/bin:/bin\n",
            {"python": python.encode()},
            base=base,
        )

    return build


@pytest.mark.parametrize("script", ["exec yes garbage", "exec cat /dev/zero"], ids=["lines", "one line"])
def test_a_python_that_prints_without_end(
    hostile: Callable[[str], str], watched: Watched, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setattr(docker_engine, "MOST_PRINTED", 16 << 20)
    assert "it printed without end" in refused(watched, hostile(script))


def test_a_python_that_prints_without_end_when_asked_for_its_version(
    base: str, make: Make, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docker_engine, "MOST_PRINTED", 16 << 20)
    files = {"python": b"#!/bin/sh\nexec yes garbage\n"}
    name = make("FROM base\nCOPY python /usr/local/bin/python\nENV PATH=/usr/local/bin:/bin\n", files, base=base)
    assert "prints without end" in refused(watched, name)


def test_a_python_that_never_ends(
    hostile: Callable[[str], str], watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate, "GRACE_S", 1.0)
    text = refused(watched, hostile("trap '' TERM INT; while :; do sleep 1000; done"), budget_s=2.0)
    assert "did not end within 3 s" in text


def test_a_python_that_forks_without_end(
    hostile: Callable[[str], str], watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its processes makes others until it may not, and waits; at the limit of the container all wait."""
    monkeypatch.setattr(validate, "GRACE_S", 1.0)
    bomb = (
        "exec /usr/bin/python3.11 -c 'import os, time\nwhile True:\n try: os.fork()\n except OSError: time.sleep(9999)'"
    )
    assert "did not end within 6 s" in refused(watched, hostile(bomb), budget_s=5.0)


def test_a_python_that_fills_its_disk(
    hostile: Callable[[str], str], watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it can write to is memory of its own, and has a limit."""
    monkeypatch.setattr(docker_engine, "TMP_BYTES", 32 << 20)
    name = hostile("cat /dev/zero > /tmp/full; stat -c 'it wrote %s bytes' /tmp/full; cat /dev/zero > /here; exit 1")
    text = refused(watched, name)
    assert "No space left on device" in text
    assert f"it wrote {32 << 20} bytes" in text
    assert "Read-only file system" in text


def test_a_python_that_says_that_all_is_well(hostile: Callable[[str], str], watched: Watched) -> None:
    """Words are no report, and neither is a report that came from no suite."""
    assert "before its report" in refused(watched, hostile("echo passed; exit 0"))
    assert "before its report" in refused(watched, hostile("""echo '{"event": "end", "report": {}}'"""))


# --------------------------------------------------------------------------- CUDA


def stale_nccl(real: Real) -> Wheel:
    """Return another cell's NCCL, for CUDA 12, fetched if no cell of this machine has it."""
    cell = next(it for it in real.project.cells if "-cu126-" in it.id)
    one = next(it for it in real.project.lock(cell).wheels if it.name == "nvidia-nccl-cu12")
    Index().fetch_all([one.wanted(cell)], Store.open(), Silent())
    return one


@pytest.mark.timeout(2400)
def test_a_stale_nccl_over_that_of_torch(
    real: Real, cuda_oci: Built, make: Make, watched: Watched, tmp_path: Path
) -> None:
    """A package for CUDA 12 in an image of CUDA 13: both have libnccl.so.2 at one path, and the older one is there."""
    one = stale_nccl(real)
    Store.open().link(tmp_path / "wheels", {one.filename: one.sha256})
    name = make(
        f"FROM {cuda_oci.name}\nRUN --mount=type=bind,from=wheels,target=/wheels "
        f"pip install -q --no-index --no-deps --no-cache-dir --no-compile /wheels/{one.filename}\n",
        wheels=tmp_path / "wheels",
    )
    report = report_of(watched, name, "run.import", "run.versions", "run.closure", "run.declared")
    assert report["verdict"]["exit_code"] == 1
    disputed = told(result_of(report, "run.closure"))
    assert f"nvidia-nccl-cu12 {one.version}" in disputed
    assert "nvidia/nccl/lib/libnccl.so.2" in disputed
    assert "pip uninstall nvidia-nccl-cu12" in disputed
    everything = "\n".join(told(it) for it in report["results"])
    assert f"NCCL {one.version}" in everything or "undefined symbol: nccl" in everything
    # torch cannot be imported at all there: what follows from that is not told as a fault of its own.
    assert result_of(report, "run.declared")["skip"] == "dependency_failed"
