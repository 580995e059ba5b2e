"""The examples of Compose and Kubernetes: valid by their schemas, of images that exist, and as safe as they say."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from builder.matrix import Cell
from builder.project import Project
from builder.render import HOME, WORKDIR

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
COMPOSE, COMPOSE_GPU = EXAMPLES / "compose.yaml", EXAMPLES / "compose.gpu.yaml"
VARIANTS = ("runtime", "devel", "notebook", "ssh", "llm")
MANIFESTS = sorted((EXAMPLES / "kubernetes").glob("*.yaml"))
CELLS: Mapping[str, Cell] = {tag: cell for cell in Project(ROOT / "matrix.yaml").cells for tag in cell.tags}


def default(text: str) -> str:
    """Return a value of a compose file as it is where no variable is set."""
    return re.sub(r"\$\{\w+:-([^{}]*)\}", r"\1", text)


# --------------------------------------------------------------------------- Compose


@pytest.fixture(scope="module")
def services() -> Mapping[str, Any]:
    document = yaml.safe_load(COMPOSE.read_text("utf-8"))
    found: Mapping[str, Any] = document["services"]
    return found


def test_compose_files_follow_the_specification() -> None:
    command = ["-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE), str(COMPOSE_GPU)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_there_is_a_service_per_variant_under_a_profile_of_its_name(services: Mapping[str, Any]) -> None:
    assert tuple(services) == VARIANTS
    for name, service in services.items():
        assert service["profiles"] == [name]
        assert CELLS[default(service["image"])].variant_name == name


@pytest.mark.parametrize("name", VARIANTS)
def test_a_service_is_closed_to_the_network_and_to_root(services: Mapping[str, Any], name: str) -> None:
    service = services[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices"} & set(service)
    cell = CELLS[default(service["image"])]
    ports = [default(port) for port in service.get("ports", ())]
    assert ports == ([f"127.0.0.1:{cell.variant.port}:{cell.variant.port}"] if cell.variant.port else [])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_service_has_what_people_forget(services: Mapping[str, Any], name: str) -> None:
    service = services[name]
    assert default(service["shm_size"]) == "8gb"
    assert {"mem_limit", "pids_limit", "stop_grace_period", "logging", "volumes"} <= set(service)
    assert ("restart" in service) == bool(CELLS[default(service["image"])].variant.program)
    if "restart" not in service:
        assert service["stdin_open"] is service["tty"] is True, "its shell would end at once"


def test_volumes_lie_where_the_images_can_be_written(services: Mapping[str, Any]) -> None:
    for service in services.values():
        variant = CELLS[default(service["image"])].variant
        writable = (HOME, WORKDIR, *variant.directories)
        for volume in service["volumes"]:
            target = volume["target"] if isinstance(volume, Mapping) else volume.partition(":")[2]
            assert target.startswith(writable), target


def test_no_secret_is_in_them(services: Mapping[str, Any]) -> None:
    for service in services.values():
        assert not [name for name in service.get("environment", {}) if re.search("TOKEN|PASSWORD|SECRET", name)]


def test_gpus_come_on_top(services: Mapping[str, Any]) -> None:
    document = yaml.safe_load(COMPOSE_GPU.read_text("utf-8"))
    assert set(document["services"]) == set(services)
    for service in document["services"].values():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
        assert service["environment"] == {"TORCHYARD_REQUIRE_GPU": "1"}
        assert service["ulimits"]["memlock"] == {"soft": -1, "hard": -1}


# --------------------------------------------------------------------------- Kubernetes


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text("utf-8")))


def pod_of(path: Path) -> dict[str, Any]:
    """Return the one pod that a manifest describes."""
    (found,) = [
        document["spec"] if document["kind"] == "Pod" else document["spec"]["template"]["spec"]
        for document in documents(path)
        if document["kind"] in ("Pod", "Job", "Deployment")
    ]
    pod: dict[str, Any] = found
    return pod


def container_of(path: Path) -> dict[str, Any]:
    (container,) = pod_of(path)["containers"]
    found: dict[str, Any] = container
    return found


def test_there_is_a_manifest_per_variant() -> None:
    assert {path.stem for path in MANIFESTS} == set(VARIANTS)


# Clusters are a few releases behind the newest.
@pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifests_follow_the_schemas(path: Path, version: str) -> None:
    for document in documents(path):
        kubernetes_validate.validate(document, version, strict=True)


def test_the_schemas_know_a_mistake() -> None:
    (job, *_) = documents(EXAMPLES / "kubernetes" / "runtime.yaml")
    job["spec"]["template"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_pod_passes_the_restricted_standard(path: Path) -> None:
    """As https://kubernetes.io/docs/concepts/security/pod-security-standards/ has it, and without the API's token."""
    pod, container = pod_of(path), container_of(path)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert not [port for port in container.get("ports", ()) if "hostPort" in port]
    kinds = {kind for volume in pod["volumes"] for kind in volume if kind != "name"}
    assert kinds <= {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
    assert pod["automountServiceAccountToken"] is False


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_pod_has_what_people_forget(path: Path) -> None:
    pod, container = pod_of(path), container_of(path)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "memory" in container["resources"]["limits"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts.values()) == set(volumes)
    shm = volumes[mounts["/dev/shm"]]["emptyDir"]
    assert shm["medium"] == "Memory"
    assert gibibytes(shm["sizeLimit"]) < gibibytes(container["resources"]["limits"]["memory"])
    if container["securityContext"].get("readOnlyRootFilesystem"):
        assert {"/tmp", HOME} <= set(mounts), "torch.compile writes there"
    assert "command" not in container, "it would replace the entry point"


def gibibytes(text: str) -> int:
    return int(text.removesuffix("Gi"))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_pod_is_of_an_image_of_its_variant_and_asks_its_port(path: Path) -> None:
    container = container_of(path)
    cell = CELLS[container["image"]]
    assert cell.variant_name == path.stem
    ports = {port["name"]: port["containerPort"] for port in container.get("ports", ())}
    assert list(ports.values()) == ([cell.variant.port] if cell.variant.port else [])
    for probe in probes(container):
        if "exec" in probe:
            assert probe["exec"]["command"] == [f"torchyard-{cell.variant.program}", "--health"]
        else:
            assert probe["httpGet"]["port"] in ports
    for service in (document for document in documents(path) if document["kind"] == "Service"):
        assert service["spec"]["type"] == "ClusterIP"
        assert [port["targetPort"] for port in service["spec"]["ports"]] == list(ports)


def probes(container: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        if name in container:
            yield container[name]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_is_whole_but_for_what_its_head_tells_to_make(path: Path) -> None:
    made = {(document["kind"], document["metadata"]["name"]) for document in documents(path)}
    text = path.read_text("utf-8")
    for volume in pod_of(path)["volumes"]:
        if "persistentVolumeClaim" in volume:
            name = volume["persistentVolumeClaim"]["claimName"]
            assert ("PersistentVolumeClaim", name) in made or f"claim `{name}`" in text
        for kind, key in (("secret", "secretName"), ("configMap", "name")):
            if kind in volume:
                assert re.search(rf"# +kubectl create {kind.lower()} (?:generic )?{volume[kind][key]} ", text)
    assert "Secret" not in {kind for kind, _ in made}, "a secret is no part of a file that is committed"
