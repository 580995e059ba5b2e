"""The NVIDIA driver: there, whole, of one version, and new enough for this torch: T2, without importing torch."""

from __future__ import annotations

import importlib.util
import json
import os
import pkgutil
import runpy
from typing import Any, Dict, Mapping, Optional, Tuple

from validate import bundle, driver
from validate.check import Probe, check
from validate.driver import Driver
from validate.verdict import Blame, Skip

_SETTINGS = (
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES",
    "NVIDIA_REQUIRE_CUDA",
    "NVIDIA_DISABLE_REQUIRE",
    "CUDA_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",
)
_GIVE = "start the container with --gpus all, or --device nvidia.com/gpu=all (CDI), or a nvidia.com/gpu limit"
_COMPUTE = "set NVIDIA_DRIVER_CAPABILITIES=compute,utility in the image or at its start"
_NOT_IN_IMAGE = (
    "the driver belongs to the host: remove its libraries (libnvidia-compute-*, libcuda.so.*) from the image"
)

# What cuInit returns when the machine is at fault, and what mends it.
_CAUSES: Mapping[int, Tuple[str, str, str, Blame]] = {
    34: (
        "libcuda is a stub, made for linking only",
        "remove */stubs from LD_LIBRARY_PATH and /etc/ld.so.conf.d",
        "F21",
        Blame.IMAGE,
    ),
    802: (
        "the GPUs' fabric is not up",
        "start nvidia-fabricmanager on the host, of exactly the driver's version",
        "F30",
        Blame.HOST,
    ),
    804: (
        "the forward-compatibility libcuda (cuda-compat) was loaded, and it does not support this GPU",
        "remove cuda-compat from LD_LIBRARY_PATH and /etc/ld.so.conf.d: it is for data-centre GPUs with old drivers",
        "F28",
        Blame.IMAGE,
    ),
    805: (
        "the MPS daemon does not answer",
        "restart nvidia-cuda-mps-control, or unset CUDA_MPS_PIPE_DIRECTORY",
        "",
        Blame.HOST,
    ),
}


@check(
    "drv.visible",
    title="the NVIDIA driver is there and answers",
    tier=2,
    modes=("F21", "F22", "F28", "F29", "F30", "F31", "F32", "F33", "F34"),
)
def visible(probe: Probe) -> None:
    """Look in a process of its own, so that a driver that hangs is a finding with a cause."""
    seen = driver.seen(bundle.root())
    settings = {name: os.environ[name] for name in _SETTINGS if name in os.environ}
    probe.saw(driver=seen.as_json(), settings=settings)
    judge_visible(seen, settings, probe)


def judge_visible(seen: Driver, settings: Mapping[str, str], probe: Probe) -> None:
    """Judge what was seen of the driver, given the variables of the environment that decide what is seen."""
    if seen.error:
        probe.stop(
            "the NVIDIA driver does not answer",
            why=seen.error,
            remedy="look for NVRM and Xid lines in the host's kernel log; if nvidia-smi hangs there, too, restart it",
            mode="F41",
            blame=Blame.HOST,
        )
    if seen.library is None:
        _no_libcuda(seen, settings, probe)
    if seen.init != 0:
        _no_init(seen, settings, probe)
    if seen.count == 0:
        _no_device(seen, settings, probe, why="cuInit succeeds, and counts no device")
    _versions(seen, probe)
    _nvml(seen, settings, probe)
    devices = ", ".join(f"{name} ({capability})" for name, capability in zip(seen.names, seen.capabilities))
    probe.detail(f"driver {seen.module or seen.library_version or 'of unknown version'}, CUDA {seen.cuda}: {devices}")


def _no_libcuda(seen: Driver, settings: Mapping[str, str], probe: Probe) -> None:
    if not seen.nodes:
        probe.skip(Skip.NO_GPU, seen.why_absent)
    if "cannot open shared object file: No such file" not in seen.library_error:
        probe.stop("libcuda.so.1 cannot be loaded", why=seen.library_error, remedy=_NOT_IN_IMAGE, mode="F22")
    capabilities = settings.get("NVIDIA_DRIVER_CAPABILITIES")
    probe.stop(
        "the GPU's device files are there, but not the driver's libcuda.so.1",
        why=f"NVIDIA_DRIVER_CAPABILITIES is {capabilities or 'not set'}; devices: {', '.join(seen.nodes)}",
        remedy=f"{_COMPUTE}; start it by the NVIDIA container toolkit (--gpus all), not with --device /dev/nvidia0",
        mode="F32",
        blame=Blame.HOST if capabilities and {"compute", "all"} & set(capabilities.split(",")) else Blame.IMAGE,
    )


def _no_init(seen: Driver, settings: Mapping[str, str], probe: Probe) -> None:
    assert seen.init is not None
    assert seen.library is not None
    name = driver.ERRORS.get(seen.init, "an unknown error")
    why = f"cuInit returns {seen.init}, {name}, from {seen.library}"
    own, versions = (
        seen.library_version,
        f"libcuda is of driver {seen.library_version}, the kernel module {seen.module}",
    )
    if not seen.nodes and seen.module is None:
        # A libcuda of the image's own: whether it is in the driver's way can only be seen where there is a driver.
        probe.warn("libcuda.so.1 is in the image", why=why, remedy=_NOT_IN_IMAGE, mode="F22", blame=Blame.IMAGE)
        probe.skip(Skip.NO_GPU, seen.why_absent)
    if seen.init == 34 or "/stubs/" in seen.library:
        _stop_with(34, why, probe)
    if seen.init in _CAUSES:
        _stop_with(seen.init, why, probe)
    if seen.init == 803 or (own and seen.module and own != seen.module and "compat" not in seen.library):
        _mismatch(seen, f"{why}; {versions}", probe)
    if not seen.nodes:
        probe.stop("no GPU was given to this container", why=why, remedy=_GIVE, mode="F31", blame=Blame.HOST)
    if seen.denied:
        probe.stop(
            "the GPU's device files are there but may not be opened",
            why=f"{why}; {'; '.join(seen.denied)}",
            remedy="restart the container; if it comes back after `systemctl daemon-reload` on the host, use CDI or "
            "the cgroupfs driver, or give the devices with --device as well",
            mode="F33",
            blame=Blame.HOST,
        )
    if "nvidia-uvm" not in seen.nodes and "dxg" not in seen.nodes:
        probe.stop(
            "/dev/nvidia-uvm is missing",
            why=why,
            remedy="run `nvidia-modprobe -u -c=0` on the host and start the container again",
            mode="F34",
            blame=Blame.HOST,
        )
    if seen.init == 100:
        _no_device(seen, settings, probe, why=why)
    probe.stop(
        "the driver cannot be initialised",
        why=why,
        remedy="try nvidia-smi on the host; reload the nvidia_uvm module or restart the host",
        mode="F34",
        blame=Blame.HOST,
    )


def _stop_with(code: int, why: str, probe: Probe) -> None:
    what, remedy, mode, blame = _CAUSES[code]
    probe.stop(what, why=why, remedy=remedy, mode=mode, blame=blame)


def _mismatch(seen: Driver, why: str, probe: Probe) -> None:
    if seen.injected:
        probe.stop(
            "the container's libcuda and the host's kernel module are of different drivers",
            why=why,
            remedy="the host's driver was updated: restart the host, then the container",
            mode="F29",
            blame=Blame.HOST,
        )
    probe.stop(
        "a libcuda that is not the host driver's was loaded",
        why=why,
        remedy=f"{_NOT_IN_IMAGE}; outside a container: restart after a driver update",
        mode="F22",
        blame=Blame.UNKNOWN,
    )


def _no_device(seen: Driver, settings: Mapping[str, str], probe: Probe, *, why: str) -> None:
    chosen = settings.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        probe.stop(
            f"CUDA_VISIBLE_DEVICES={chosen} hides every GPU",
            why=why,
            remedy="unset it, or name devices that are there",
            mode="F31",
            blame=Blame.HOST,
        )
    probe.stop(
        "no GPU was given to this container",
        why=f"{why}; devices: {', '.join(seen.nodes) or 'none'}; "
        f"NVIDIA_VISIBLE_DEVICES is {settings.get('NVIDIA_VISIBLE_DEVICES', 'not set')}",
        remedy=_GIVE,
        mode="F31",
        blame=Blame.HOST,
    )


def _versions(seen: Driver, probe: Probe) -> None:
    """Judge a driver that works: by luck, if its halves are of different versions."""
    own = seen.library_version
    if not own or not seen.module or own == seen.module or "compat" in (seen.library or ""):
        return
    probe.warn(
        "libcuda and the kernel module are of different drivers, although it works",
        why=f"{seen.library}; kernel module {seen.module}",
        remedy="restart the host after a driver update" if seen.injected else _NOT_IN_IMAGE,
        mode="F29" if seen.injected else "F22",
        blame=Blame.HOST if seen.injected else Blame.IMAGE,
    )


def _nvml(seen: Driver, settings: Mapping[str, str], probe: Probe) -> None:
    if seen.nvml is None:
        probe.warn(
            "NVML (libnvidia-ml.so.1) is missing: neither nvidia-smi nor health checks work",
            why=f"NVIDIA_DRIVER_CAPABILITIES is {settings.get('NVIDIA_DRIVER_CAPABILITIES', 'not set')}",
            remedy=_COMPUTE,
            mode="F32",
            blame=Blame.IMAGE,
        )
    elif seen.nvml_init != 0:
        assert seen.nvml_init is not None
        name = driver.NVML_ERRORS.get(seen.nvml_init, "an unknown error")
        mismatch = seen.nvml_init == 18
        probe.warn(
            "NVML does not start",
            why=f"nvmlInit returns {seen.nvml_init}, {name}, from {seen.nvml}; kernel module {seen.module}",
            remedy=_NOT_IN_IMAGE if mismatch else "restart the container; see whether nvidia-smi works on the host",
            mode="F22" if mismatch else "F33",
            blame=Blame.UNKNOWN if mismatch else Blame.HOST,
        )


# ----------------------------------------------------------------------------------------------------
# Is the driver new enough?


def _floors() -> Mapping[str, Any]:
    content = pkgutil.get_data("validate", "floors.json")
    assert content is not None, "floors.json lies in validate/"
    floors: Dict[str, Any] = json.loads(content)
    return floors


def torch_cuda() -> Optional[str]:
    """Return the CUDA that torch was built for, without importing it; None for a CPU build.

    Raises ImportError if there is no torch.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("there is no torch")
    path = os.path.join(next(iter(spec.submodule_search_locations)), "version.py")  # noqa: PTH118
    cuda = runpy.run_path(path).get("cuda")
    return None if cuda is None else str(cuda)


@check(
    "drv.floor",
    title="the driver is new enough for this torch's CUDA",
    tier=2,
    needs=("drv.visible",),
    modes=("F26", "F28", "F46"),
)
def floor(probe: Probe) -> None:
    """Compare the driver with the floors that NVIDIA publishes."""
    cuda = torch_cuda()
    if cuda is None:
        probe.skip(Skip.CPU_BUILD, "this torch was built without CUDA: any driver will do")
    seen, floors = driver.seen(bundle.root()), _floors()
    probe.saw(cuda=cuda, driver=seen.module, driver_cuda=seen.cuda, floors_date=floors["date"])
    judge_floor(cuda, seen, floors, os.environ, probe)


def judge_floor(cuda: str, seen: Driver, floors: Mapping[str, Any], settings: Mapping[str, str], probe: Probe) -> None:
    """Judge a working driver against the CUDA that torch was built for."""
    version = seen.module or seen.library_version
    said = f"driver {version or 'of unknown version'} knows CUDA {seen.cuda}; torch was built for CUDA {cuda}"
    probe.detail(said)
    _compat(seen, probe)
    wanted = driver.number(cuda)
    if seen.cuda is not None and driver.number(seen.cuda) >= wanted:
        return
    least, full = floors["majors"].get(str(wanted[0])), floors["toolkits"].get(cuda)
    below = bool(least and version and driver.number(version) < driver.number(least))
    if below or (seen.cuda is not None and driver.number(seen.cuda)[0] < wanted[0]):
        disabled = settings.get("NVIDIA_DISABLE_REQUIRE")
        probe.stop(
            "the NVIDIA driver is too old for this torch",
            why=said + (f"; NVIDIA_DISABLE_REQUIRE={disabled} let the container start" if disabled else ""),
            remedy=f"install driver {least or 'for CUDA ' + cuda} or newer on the host"
            + (f" ({full} for all of CUDA {cuda})" if full and full != least else "")
            + ", or use a torch built for an older CUDA",
            mode="F26",
            blame=Blame.HOST,
        )
    probe.warn(
        f"the driver is older than the one that came with CUDA {cuda}",
        why=f"{said}: machine code runs, PTX of CUDA {cuda} does not",
        remedy=f"install driver {full} or newer on the host" if full else "update the host's driver",
        mode="F46",
        blame=Blame.HOST,
    )


def _compat(seen: Driver, probe: Probe) -> None:
    own = seen.library_version
    if "compat" not in (seen.library or "") or own is None or seen.module is None:
        return
    if driver.number(own) <= driver.number(seen.module):
        probe.warn(
            "cuda-compat's libcuda was loaded instead of the host driver's, which is as new",
            why=f"{seen.library}; kernel module {seen.module}",
            remedy="put cuda-compat on LD_LIBRARY_PATH only where the driver is older than it",
            mode="F28",
            blame=Blame.IMAGE,
        )
