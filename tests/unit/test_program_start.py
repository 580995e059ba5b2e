"""torchyard-start: one line of what is wrong with the driver, then the program; on machines made of files."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from builder.matrix import Cell
from builder.render import programs_of, templates_of
from tests.support.cells import cell
from validate.explain import catalogue

ROOT = Path(__file__).parents[2]
SHELLS = [shell for shell in ("dash", "bash") if shutil.which(shell)]
REFUSED = 69
KERNEL = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Sep 23 10:11:12 UTC 2025\nGCC version: gcc 12.2.0\n"
OPEN_KERNEL = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs-builder@U22)\n"


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    said: str


@dataclass
class Machine:
    """A /dev, /proc, /usr and /etc, and the program for a cell that looks at them."""

    root: Path
    shell: str
    cuda: str = "12.8"
    driver: str | None = "525.60.13"
    command: Sequence[str] = ("echo", "the image's own")
    env: dict[str, str] = field(default_factory=lambda: {"NVIDIA_VISIBLE_DEVICES": "all"})

    def file(self, path: str, content: str = "") -> Path:
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)
        return target

    def gpu(
        self, version: str = "580.95.05", *, libraries: str = "/usr/lib/x86_64-linux-gnu", kernel: str = KERNEL
    ) -> None:
        """Put in what NVIDIA's container runtime does."""
        for device in ("nvidia0", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools"):
            self.file(f"/dev/{device}")
        self.file("/proc/driver/nvidia/version", kernel.format(version))
        self.libcuda(version, libraries)

    def libcuda(self, version: str, directory: str = "/usr/lib/x86_64-linux-gnu") -> None:
        library = self.file(f"{directory}/libcuda.so.{version}")
        (library.parent / "libcuda.so.1").symlink_to(library.name)

    @property
    def program(self) -> str:
        return _program(self.cuda, self.driver, tuple(self.command), str(self.root))

    def run(self, *arguments: str, **env: str) -> Ran:
        return self.run_as(None, *arguments, **env)

    def run_as(self, user: int | None, *arguments: str, **env: str) -> Ran:
        script = self.root / "torchyard-start"
        script.write_text(self.program)
        done = subprocess.run(
            [self.shell, str(script), *arguments],
            env={"PATH": os.environ["PATH"], **self.env, **env},
            user=user,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    def complains(self, mode: str, **env: str) -> str:
        """Return the one line that is said, of a mode of failure, around a program that runs all the same."""
        ran = self.run("echo", "ran", **env)
        assert (ran.code, ran.out) == (0, "ran\n")
        assert ran.said.startswith("torchyard: ")
        assert ran.said.endswith(f" (torchyard-validate --explain {mode})\n")
        assert ran.said.count("\n") == 1
        assert mode in catalogue()
        required = self.run("echo", "ran", TORCHYARD_REQUIRE_GPU="1", TORCHYARD_QUIET="1", **env)
        assert (required.code, required.out) == (REFUSED, "")
        assert "TORCHYARD_REQUIRE_GPU is set" in required.said
        assert self.run("echo", "ran", TORCHYARD_QUIET="1", **env) == Ran(0, "ran\n", "")
        return ran.said

    def is_silent(self, **env: str) -> None:
        """Say that all is well, also where a GPU is required."""
        assert self.run("echo", "ran", **env) == Ran(0, "ran\n", "")
        assert self.run("echo", "ran", TORCHYARD_REQUIRE_GPU="1", **env) == Ran(0, "ran\n", "")


@dataclass(frozen=True)
class _Config:
    cmd: tuple[str, ...]


@functools.cache
def _cell(cuda: str) -> Cell:
    if cuda == "cpu":
        return cell(torch="2.13.0", cuda="cpu", index_url="https://download.pytorch.org/whl/cpu")
    return cell(torch="2.8.0", cuda=cuda)


@functools.cache
def _program(cuda: str, driver: str | None, command: tuple[str, ...], root: str) -> str:
    made = programs_of(
        _cell(cuda),
        templates=templates_of(ROOT),
        config=_Config(command),
        driver=driver,
        prefix="/opt/venv",
        home="/home/torch",
        image_json="/image.json",
        root=root,
    )
    return made["torchyard-start"].decode()


@pytest.fixture(params=SHELLS)
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Machine:
    return Machine(root=tmp_path, shell=str(request.param))


# --------------------------------------------------------------------------- what is run


def test_the_program_gets_its_arguments_and_its_environment(machine: Machine) -> None:
    machine.gpu()
    ran = machine.run("sh", "-c", 'printf "<%s>" "$0" "$@" "$library" "$module" "$HERE"', "a b", "", "*", HERE="x")
    assert ran == Ran(0, "<a b><><*><><><x>", "")


def test_its_exit_code_is_that_of_the_program(machine: Machine) -> None:
    machine.gpu()
    assert machine.run("sh", "-c", "exit 7").code == 7
    assert machine.run("sh", "-c", "kill -TERM $$").code == -15, "the program took the shell's place"


def test_without_arguments_the_image_s_own_command_is_run(machine: Machine) -> None:
    machine.gpu()
    assert machine.run() == Ran(0, "the image's own\n", "")


@pytest.mark.parametrize("name", ["no-such-program", "-c", "--version", "/nowhere/python", "a b", "", "$(touch x)"])
def test_what_is_no_program_is_said_and_ends_like_in_a_shell(machine: Machine, name: str) -> None:
    machine.gpu()
    ran = machine.run(name)
    assert ran.code == 127
    assert ran.said.startswith(f"torchyard: {name}: no such program in this image")


def test_what_may_not_be_run_is_said(machine: Machine) -> None:
    machine.gpu()
    ran = machine.run(str(machine.file("/plain.py", "print()\n")))
    assert ran.code == 126
    assert "ermission denied" in ran.said


# --------------------------------------------------------------------------- a GPU


@pytest.mark.parametrize("kernel", [KERNEL, OPEN_KERNEL])
@pytest.mark.parametrize("version", ["525.60.13", "525.60.14", "525.105.17", "530.30", "580.95.05", "1000.1.1"])
def test_a_driver_that_is_new_enough_is_not_spoken_of(machine: Machine, version: str, kernel: str) -> None:
    machine.gpu(version, kernel=kernel)
    machine.is_silent()


@pytest.mark.parametrize("version", ["470.82.01", "525.60.12", "525.60", "525.9.13", "525.060.012", "450.80.02"])
def test_one_that_is_too_old_is_named_with_what_is_needed(machine: Machine, version: str) -> None:
    machine.gpu(version, kernel=OPEN_KERNEL)
    said = machine.complains("F26")
    assert f"driver {version} is too old for CUDA 12.8, which needs 525.60.13: upgrade it on the host" in said


@pytest.mark.parametrize(
    "text",
    [
        "", "\n", "NVRM version:", "NVRM version: 5.1 -1.2 470 470. 470.x 470..82", "NVRM $(touch x) `id`; rm -rf *",
        "NVRM version: 470.82.01;reboot", f"NVRM version: {'9' * 500}.1", f"NVRM version: 470.{'8' * 500}",
        "\x1b[31m \xff * ?",
    ],
)  # fmt: skip
def test_a_version_that_is_none_is_left_alone(machine: Machine, text: str) -> None:
    machine.gpu()
    machine.file("/proc/driver/nvidia/version", text)
    machine.is_silent()


def test_the_driver_s_library_tells_where_the_kernel_does_not(machine: Machine) -> None:
    machine.gpu("470.82.01")
    (machine.root / "proc/driver/nvidia/version").unlink()
    assert "driver 470.82.01 is too old" in machine.complains("F26")


def test_a_driver_that_was_updated_under_the_kernel_s_feet(machine: Machine) -> None:
    machine.gpu("550.54.15")
    machine.file("/proc/driver/nvidia/version", KERNEL.format("535.183.01"))
    said = machine.complains("F29")
    assert "kernel module is 535.183.01, its libcuda.so.1 550.54.15" in said
    assert "restart the host" in said


def test_two_libraries_in_one_directory_tell_nothing(machine: Machine) -> None:
    machine.gpu("550.54.15")
    machine.file("/usr/lib/x86_64-linux-gnu/libcuda.so.470.82.01")
    machine.is_silent()


@pytest.mark.parametrize("by", ["LD_LIBRARY_PATH", "ld.so.conf.d"])
def test_forward_compatibility_makes_an_old_driver_do(machine: Machine, by: str) -> None:
    machine.gpu("470.82.01")
    machine.libcuda("570.26", "/usr/local/cuda/compat")
    if by == "LD_LIBRARY_PATH":
        machine.is_silent(LD_LIBRARY_PATH="/usr/local/cuda/compat")
    else:
        machine.file("/etc/ld.so.conf.d/00-compat-123.conf")
        machine.is_silent()


def test_a_cuda_whose_driver_is_not_known_is_not_judged(machine: Machine) -> None:
    machine.driver = None
    machine.gpu("450.80.02")
    machine.is_silent()


def test_cdi_says_void_and_gives_a_gpu(machine: Machine) -> None:
    machine.gpu("470.82.01")
    machine.complains("F26", NVIDIA_VISIBLE_DEVICES="void")


@pytest.mark.parametrize("directory", ["/usr/lib64", "/usr/lib/aarch64-linux-gnu", "/usr/lib/wsl/lib", "/odd/dir"])
def test_the_library_is_found_where_the_loader_finds_it(machine: Machine, directory: str) -> None:
    machine.gpu(libraries=directory)
    machine.is_silent(**({"LD_LIBRARY_PATH": "/some/*:/odd/dir:"} if directory == "/odd/dir" else {}))


def test_the_loader_s_cache_knows_other_directories(machine: Machine) -> None:
    machine.gpu(libraries="/nix/store/driver/lib")
    machine.complains("F32")
    machine.file("/etc/ld.so.cache", "glibc-ld.so.cache1.1\0libcuda.so.1\0/nix/store/driver/lib/libcuda.so.1\0")
    machine.is_silent()


def test_wsl_has_a_device_of_its_own_and_no_version(machine: Machine) -> None:
    machine.file("/dev/dxg")
    assert "libcuda.so.1" in machine.complains("F32")
    machine.file("/usr/lib/wsl/lib/libcuda.so.1")
    machine.is_silent()


# --------------------------------------------------------------------------- no GPU


@pytest.mark.parametrize("asked", ["", "void", "none", None])
def test_who_wants_no_gpu_hears_nothing(machine: Machine, asked: str | None) -> None:
    del machine.env["NVIDIA_VISIBLE_DEVICES"]
    env = {} if asked is None else {"NVIDIA_VISIBLE_DEVICES": asked}
    machine.file("/dev/nvidiactl")  # which `none` has
    assert machine.run("echo", "ran", **env) == Ran(0, "ran\n", "")
    required = machine.run("echo", "ran", TORCHYARD_REQUIRE_GPU="1", **env)
    assert (required.code, required.out) == (REFUSED, "")
    assert "NVIDIA_VISIBLE_DEVICES asks for no GPU" in required.said


@pytest.mark.parametrize("value", ["", "-1"])
def test_who_hides_it_from_cuda_hears_nothing(machine: Machine, value: str) -> None:
    machine.gpu("470.82.01")
    assert machine.run("echo", "ran", CUDA_VISIBLE_DEVICES=value) == Ran(0, "ran\n", "")
    required = machine.run("echo", "ran", CUDA_VISIBLE_DEVICES=value, TORCHYARD_REQUIRE_GPU="1")
    assert required.code == REFUSED
    assert "CUDA_VISIBLE_DEVICES hides every GPU" in required.said


@pytest.mark.parametrize(
    ("env", "how"),
    [
        ({}, "docker run --gpus all"),
        ({"container": "podman"}, "podman run --device nvidia.com/gpu=all"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "resources.limits: nvidia.com/gpu: 1"),
    ],
)
def test_a_forgotten_option_is_named(machine: Machine, env: dict[str, str], how: str) -> None:
    said = machine.complains("F31", **env)
    assert "no GPU is here, torch will use the CPU" in said
    assert how in said
    machine.file("/proc/driver/nvidia/version", KERNEL.format("580.95.05"))
    said = machine.complains("F31", **env)
    assert "no GPU was given to this container, though the host has NVIDIA's driver" in said
    assert how in said


@pytest.mark.parametrize("value", ["0", "false", "no", ""])
def test_switches_can_be_off(machine: Machine, value: str) -> None:
    ran = machine.run("echo", "ran", TORCHYARD_QUIET=value, TORCHYARD_REQUIRE_GPU=value)
    assert ran.code == 0
    assert "F31" in ran.said


# --------------------------------------------------------------------------- half a GPU


def test_a_device_that_is_missing(machine: Machine) -> None:
    machine.gpu()
    (machine.root / "dev/nvidia-uvm").unlink()
    assert "nvidia-modprobe -u -c=0" in machine.complains("F34")
    machine.file("/dev/nvidia-uvm")
    (machine.root / "dev/nvidiactl").unlink()
    assert "/dev/nvidiactl is missing" in machine.complains("F31")
    assert not (machine.root / "dev/nvidiactl").exists(), "looking made a file"


def test_a_device_that_the_cgroup_forbids(machine: Machine) -> None:
    machine.gpu()
    (machine.root / "dev/nvidiactl").unlink()
    (machine.root / "dev/nvidiactl").mkdir()  # has every permission and cannot be opened for writing
    assert "/dev/nvidiactl is here but may not be opened" in machine.complains("F33")


@pytest.fixture
def public(machine: Machine) -> Iterator[Machine]:
    """A machine that other users can see."""
    with tempfile.TemporaryDirectory() as root:
        Path(root).chmod(0o755)
        machine.root = Path(root)
        yield machine


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("device", ["nvidiactl", "nvidia0", "nvidia-uvm"])
def test_a_device_of_another_user(public: Machine, device: str) -> None:
    public.gpu()
    for path in (public.root / "dev").iterdir():
        path.chmod(0o666)
    os.chown(public.root / "dev" / device, 0, 44)
    (public.root / "dev" / device).chmod(0o660)
    ran = public.run_as(12345, "echo", "ran")
    assert (ran.code, ran.out) == (0, "ran\n")
    assert f"uid 12345 may not open /dev/{device}: add its group by --group-add 44" in ran.said


@pytest.mark.parametrize(
    ("capabilities", "remedy"),
    [
        ("graphics,utility", "set NVIDIA_DRIVER_CAPABILITIES=compute,utility"),
        ("", "set NVIDIA_DRIVER_CAPABILITIES=compute,utility"),
        ("computer", "set NVIDIA_DRIVER_CAPABILITIES=compute,utility"),
        ("compute,utility", "do not give the devices one by one, but docker run --gpus all"),
        ("all", "do not give the devices one by one, but docker run --gpus all"),
    ],
)
def test_devices_without_the_driver_s_library(machine: Machine, capabilities: str, remedy: str) -> None:
    machine.gpu(libraries="/hidden")
    assert remedy in machine.complains("F32", NVIDIA_DRIVER_CAPABILITIES=capabilities)


def test_a_device_plugin_that_leaves_the_path_to_the_user(machine: Machine) -> None:
    machine.gpu(libraries="/usr/local/nvidia/lib64")
    assert "set LD_LIBRARY_PATH=/usr/local/nvidia/lib64" in machine.complains("F32")
    machine.is_silent(LD_LIBRARY_PATH="/usr/local/nvidia/lib64")


# --------------------------------------------------------------------------- an image for the CPU


def test_an_image_for_the_cpu_just_runs(machine: Machine) -> None:
    machine.cuda, machine.driver = "cpu", None
    assert machine.run("echo", "ran") == Ran(0, "ran\n", "")
    assert machine.run() == Ran(0, "the image's own\n", "")
    machine.gpu("470.82.01")
    assert machine.run("echo", "ran") == Ran(0, "ran\n", "")


def test_it_never_has_a_gpu(machine: Machine) -> None:
    machine.cuda, machine.driver = "cpu", None
    required = machine.run("echo", "ran", TORCHYARD_REQUIRE_GPU="1")
    assert (required.code, required.out) == (REFUSED, "")
    assert "this image is for the CPU" in required.said


# --------------------------------------------------------------------------- the program itself


@pytest.mark.parametrize("cuda", ["12.8", "cpu"])
def test_it_is_sound_shell(tmp_path: Path, cuda: str) -> None:
    machine = Machine(root=tmp_path, shell="sh", cuda=cuda)
    script = machine.file("/script", machine.program)
    command = [str(Path(sys.executable).with_name("shellcheck")), str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert machine.program.startswith("#!/bin/sh\n")


def test_the_image_s_command_is_quoted(machine: Machine) -> None:
    machine.command = ("printf", "%s", "'$HOME' \"a\" `b`")
    assert machine.run(NVIDIA_VISIBLE_DEVICES="void").out == "'$HOME' \"a\" `b`"
