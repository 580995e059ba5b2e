"""Real torch through real engines: the CPU cell every time, one CUDA cell where the disk allows."""

from __future__ import annotations

import json

import docker
import pytest

from tests.integration.conftest import CPU, PROOF, REAL_REPOSITORY, ROOT, Built, Real

pytestmark = [
    pytest.mark.engine,
    pytest.mark.debian,
    pytest.mark.network,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]


@pytest.fixture(params=["oci", "docker"])
def cpu(request: pytest.FixtureRequest) -> Built:
    built: Built = request.getfixturevalue(f"cpu_{request.param}")
    return built


def run(client: docker.DockerClient, image: str, code: str, *, user: str | None = None) -> str:
    output: bytes = client.containers.run(image, ["python", "-c", code], remove=True, network_mode="none", user=user)
    return output.decode().strip()


def test_the_cpu_cell_runs_and_is_what_it_says(client: docker.DockerClient, real: Real, cpu: Built) -> None:
    image = client.images.get(cpu.name)
    assert image.id == cpu.document["digest"]
    declared = json.loads((real.root / "images" / CPU / "image.json").read_text("utf-8"))
    configuration = image.attrs["Config"]
    assert configuration["User"] == declared["config"]["user"]
    assert configuration["Labels"].items() >= declared["config"]["labels"].items()
    assert dict(entry.split("=", 1) for entry in configuration["Env"]).items() >= declared["config"]["env"].items()
    assert run(client, cpu.name, "import torch; print(torch.__version__, torch.version.cuda)") == "2.13.0+cpu None"
    inside = run(client, cpu.name, f"print(open({'/usr/local/share/torchyard/image.json'!r}).read())")
    assert json.loads(inside) == declared


def test_the_copy_is_the_project_but_for_the_repository(real: Real) -> None:
    shipped, copied = ((root / "images" / CPU / "image.json").read_text("utf-8") for root in (ROOT, real.root))
    assert copied == shipped.replace('"torchyard:', f'"{REAL_REPOSITORY}:')


# What follows is asked of the OCI engine's image alone: test_parity shows that the other one has the same files.


def test_compile_works_for_an_arbitrary_user(client: docker.DockerClient, cpu_oci: Built) -> None:
    code = "import torch; print(torch.compile(lambda x: (x + 1).sum())(torch.ones(8)).item())"
    assert run(client, cpu_oci.name, code, user="12345:0") == "16.0"


def test_no_source_is_compiled_at_start(client: docker.DockerClient, cpu_oci: Built) -> None:
    """Bytecode that Python did not accept would be made again in every container."""
    loud: bytes = client.containers.run(
        cpu_oci.name,
        ["python", "-v", "-c", "import torch"],
        remove=True,
        network_mode="none",
        stdout=False,
        stderr=True,
    )
    lines = loud.decode().splitlines()
    assert sum("/__pycache__/" in line and " matches /opt/venv/" in line for line in lines) > 500
    assert not [line for line in lines if line.startswith("# code object from /opt/venv/")]


@pytest.mark.parametrize("user", [None, "12345:0"])
def test_pip_can_install_and_uninstall(client: docker.DockerClient, cpu_oci: Built, user: str | None) -> None:
    """pip calls the files of packages by lib/python3.11, which is a link; those of the image it removes whole."""
    code = (
        "import importlib, pathlib, subprocess, sys; d = pathlib.Path('/tmp/p'); d.mkdir();"
        "(d / 'pyproject.toml').write_text('[project]\\nname=\"more\"\\nversion=\"1\"\\n');"
        "(d / 'more.py').write_text('x = 1\\n');"
        "pip = lambda *rest: subprocess.run([sys.executable, '-m', 'pip', *rest], check=True, stdout=sys.stderr);"
        "pip('check');"
        "pip('install', '-q', '--no-build-isolation', '--no-index', '/tmp/p');"
        "importlib.invalidate_caches(); import more; print(more.x);"
        "pip('uninstall', '-q', '-y', 'more', 'sympy');"
        "venv = pathlib.Path('/opt/venv'); site = venv / 'lib/python3.11/site-packages';"
        "names = ('more*', '__pycache__/more*', 'sympy*', 'isympy*', '__pycache__/isympy*');"
        "print([p.name for name in names for p in site.glob(name)], (venv / 'bin/isympy').exists())"
    )
    assert run(client, cpu_oci.name, code, user=user).splitlines() == ["1", "[] False"]


@pytest.mark.timeout(1800)
def test_a_cuda_cell(client: docker.DockerClient, cuda_oci: Built) -> None:
    assert cuda_oci.document["proof"] == PROOF["oci"]
    code = "import torch; print(torch.__version__, torch.version.cuda, torch.backends.cudnn.version())"
    assert run(client, cuda_oci.document["digest"], code) == "2.15.0+cu132 13.2 92600"
