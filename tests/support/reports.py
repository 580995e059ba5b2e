"""Reports as the suite would write them, without a run: of a CPU build, of a GPU, of an environment full of faults."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from builder import report as reports
from builder.report import Report

DIGEST = "sha256:" + "5d" * 32
HOSTILE = (
    "</script><script>alert(1)</script>\"'`$(id)`\x1b[31mred\x1b[0m\x00\x07 ]]> &amp; \u202egnp.exe\u2066 \uffff\n"
    "# not a heading | not a cell\r\n::error::not a command\n<img src=x onerror=alert(1)> {{ 7 * 7 }} \\ %0A"
)
"""Text that breaks out of whatever does not escape it."""


def finding(
    what: str, *, status: str = "fail", why: str = "", remedy: str = "", mode: str = "", blame: str = "image"
) -> dict[str, Any]:
    return {"status": status, "what": what, "why": why, "remedy": remedy, "mode": mode, "blame": blame}


def result(
    name: str,
    status: str = "pass",
    *,
    tier: int = 1,
    required: bool = True,
    title: str = "",
    skip: str | None = None,
    waiver: tuple[str, str] | None = None,
    detail: str = "",
    findings: Sequence[Mapping[str, Any]] = (),
    metrics: Mapping[str, tuple[float | str, str, str]] | None = None,
    evidence: Mapping[str, Any] | None = None,
    output: str = "",
) -> dict[str, Any]:
    return {
        "id": name,
        "title": title or f"{name} holds",
        "group": name.partition(".")[0],
        "tier": tier,
        "required": required,
        "status": status,
        "skip": skip,
        "waiver": {"why": waiver[0], "until": waiver[1]} if waiver else None,
        "detail": detail,
        "findings": list(findings),
        "metrics": {
            key: {"value": value, "unit": unit, "better": better}
            for key, (value, unit, better) in (metrics or {}).items()
        },
        "evidence": dict(evidence or {}),
        "output": output,
    }


NO_GPU: dict[str, Any] = {
    "nodes": [], "module": None, "library": None, "library_error": "", "init": None, "cuda": None, "count": 0,
    "names": [], "capabilities": [], "error": "", "denied": [], "injected": False, "buses": [], "nvml": None,
    "nvml_init": None,
}  # fmt: skip
H200: dict[str, Any] = {
    "nodes": ["nvidia-uvm", "nvidia0", "nvidiactl"], "module": "580.95.05",
    "library": "/usr/lib/x86_64-linux-gnu/libcuda.so.580.95.05", "library_error": "", "init": 0, "cuda": "13.0",
    "count": 1, "names": ["NVIDIA H200"], "capabilities": ["9.0"], "error": "", "denied": [], "injected": True,
    "buses": ["0000:1a:00.0"], "nvml": "/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.580.95.05", "nvml_init": 0,
}  # fmt: skip
FACTS = {
    "python": "3.11",
    "python_full": "3.11.2",
    "executable": "/opt/venv/bin/python",
    "machine": "x86_64",
    "packages": {"numpy": "2.3.1", "torch": "2.8.0+cu128", "triton": "3.4.0", "nvidia-cudnn-cu12": "9.10.2.21"},
    "torch": "2.8.0+cu128",
    "cuda": "12.8",
    "cudnn_number": 91002,
    "nccl": "2.27.3",
    "architectures": ["sm_100", "sm_120", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"],
    "libraries": {"libcudnn": "/opt/venv/lib/python3/site-packages/nvidia/cudnn/lib/libcudnn.so.9"},
}


def document(
    results: Sequence[Mapping[str, Any]],
    *,
    exit_code: int | None = None,
    on_skip: str = "fail",
    driver: Mapping[str, Any] = NO_GPU,
    facts: Mapping[str, Any] = FACTS,
    name: str | None = "torchyard:2.8.0-cuda12.8-cudnn9-runtime",
    tiers: Mapping[str, bool] | None = None,
) -> dict[str, Any]:
    """Return a report as report.json has it; the exit code is what the statuses give, unless it is said."""
    if exit_code is None:
        required = [one["status"] for one in results if one["required"]]
        gap = ("skip" in required and on_skip == "fail") or not {"pass", "warn"} & set(required)
        exit_code = 3 if not results else 1 if {"fail", "error"} & set(required) else 4 if gap else 0
    statuses = ("pass", "warn", "fail", "skip", "error", "waived")
    return {
        "schema": 1,
        "suite": {"version": "1", "digest": "sha256:" + "ab" * 32},
        "subject": {"kind": "image", "name": name, "digest": DIGEST, "declared": None},
        "profile": {
            "name": "gpu",
            "options": {"gpus": "all", "price_per_hour": 3.5},
            "on_skip": on_skip,
            "strict": False,
            "required": sorted(one["id"] for one in results if one["required"]),
            "waivers": [{"check": one["id"], **one["waiver"]} for one in results if one["waiver"]],
        },
        "verdict": {
            "exit_code": exit_code,
            "passed": exit_code == 0,
            "tiers": {"1": exit_code in (0, 4), "2": exit_code == 0} if tiers is None else dict(tiers),
            "counts": {status: sum(one["status"] == status for one in results) for status in statuses},
        },
        "environment": {"facts": dict(facts), "fingerprint": "c0ffee" * 10 + "abcd"},
        "driver": dict(driver),
        "results": list(results),
        "volatile": {
            "started": "2026-11-21T13:09:49+00:00",
            "duration_s": 214.0,
            "durations": {one["id"]: 0.25 + index for index, one in enumerate(results)},
            "host": {"kernel": "6.1.0-37-amd64", "machine": "x86_64", "cpus": 16, "uid": 1000},
        },
    }


def _latencies(median_ms: float) -> list[float]:
    """Return seconds between tokens as a GPU gives them: a narrow bell with a few late ones."""
    made = random.Random(median_ms)
    late = [(made.random() > 0.985) * made.expovariate(4) for _ in range(256)]
    return [round((made.gauss(1, 0.003) * median_ms + one) / 1e3, 7) for one in late]


SHM = finding(
    "/dev/shm holds 64 MiB: data loaders with workers will die", status="warn", mode="F35", blame="host",
    why="8 workers need about 512 MiB", remedy="docker run --shm-size=1g, or --ipc=host",
)  # fmt: skip
AMP: dict[str, dict[str, Any]] = {
    name: {"step_s": 8 / speed, "samples_per_s": speed, "losses": [10.41, 8.2, loss], "memory_bytes": memory}
    for name, speed, loss, memory in (
        ("bf16", 512.0, 5.31, 13 << 30), ("cpu", 0.8, 5.3, None), ("fp16", 498.5, 5.32, 13 << 30),
        ("fp32", 131.0, 5.3, 19 << 30), ("tf32", 287.3, 5.3, 19 << 30),
    )
}  # fmt: skip
LADDER = {
    geometry: {
        f"R{number}": {"title": title, "tokens_per_s": speed * scale, "mbu": speed / 300, "compile_s": seconds}
        for number, (title, speed, seconds) in enumerate((
            ("eager", 131.2, 0.0), ("eager, one graph", 218.0, 0.0), ("reduce-overhead", 231.5, 41.0),
            ("reduce-overhead, coordinate descent", 262.4, 63.0), ("compiled blocks, one graph", 268.8, 9.7),
            ("and norms folded, logits summed in fp32", 274.9, 9.9), ("and dependent launch", 280.2, 11.0),
        ))
    }
    for geometry, scale in (("narrow", 4.1), ("wide", 1.0))
}  # fmt: skip


def _decoding(median_ms: float, bandwidth: float) -> dict[str, Any]:
    times = {"count": 1280, "mean": median_ms / 1e3, "median": median_ms / 1e3, "spread": 0.004, "p90": 3.55e-3}
    return {
        "itl_s": times | {"p99": median_ms * 1.07e-3, "longest": 4.1e-3},
        "host_itl_s": times | {"p99": median_ms * 1.2e-3, "longest": 5e-3},
        "tokens_per_s": 1e3 / median_ms,
        "bytes_per_step": int(bandwidth * median_ms / 1e3),
        "bandwidth": bandwidth,
        "layers": 8,
        "compile_s": 9.9,
        "ttft_s": 0.0123,
        "prefill_utilisation": 0.71,
        "memory_bytes": 31 << 30,
        "series_s": [_latencies(median_ms) for _ in range(5)],
    }


def read(document: Mapping[str, Any]) -> Report:
    """Return the report of a document."""
    return reports.loads(json.dumps(document).encode(), where="report.json")


def good() -> dict[str, Any]:
    """Return a document of a CPU build in which all is well."""
    return document(
        [result("run.identity", detail="torch 2.13.0+cpu"), result("cpu.numerics", metrics={"error": (1e-7, "", "")})],
        tiers={"1": True},
    )


def gpu() -> dict[str, Any]:
    """Return a document of a GPU with everything measured."""
    return document(
        [
            result("run.identity", detail="torch 2.8.0+cu128, Python 3.11.2", evidence={"facts": FACTS}),
            result("run.limits", "warn", findings=[SHM]),
            result("cpu.numerics", detail="fp32 to 2.9e-07", metrics={"fp32": (2.9e-7, "relative", "lower")}),
            result("dev.available", tier=2, detail="NVIDIA H200, 139.8 GiB"),
            result("lib.cudnn", tier=2, detail="9.10.2: six convolutions within tolerance"),
            result("lib.nccl", tier=2, detail="2.27.3: all_reduce of one rank is exact"),
            result(
                "perf.roofline", tier=2, title="bandwidth, matrix products and launches are those of such a device",
                metrics={
                    "copy": (4187.3, "GB/s", "higher"), "read": (4411.9, "GB/s", "higher"),
                    "upload": (55.2, "GB/s", "higher"), "download": (54.1, "GB/s", "higher"),
                    "promised": (4813.0, "GB/s", "higher"),
                    "gemm_bf16": (768.4, "TFLOP/s", "higher"), "gemm_fp16": (742.0, "TFLOP/s", "higher"),
                    "gemm_fp32": (51.7, "TFLOP/s", "higher"), "gemm_tf32": (391.7, "TFLOP/s", "higher"),
                    "launch": (2.31, "us", "lower"), "graph_launch": (1.08, "us", "lower"),
                },
            ),
            result(
                "perf.amp", tier=2, title="smaller types train faster, and as well", evidence={"rows": AMP},
                metrics={f"samples_per_s_{name}": (row["samples_per_s"], "1/s", "higher") for name, row in AMP.items()},
            ),
            result(
                "perf.compile", tier=2, title="torch.compile makes decoding faster, step by step",
                evidence={"ladder": LADDER},
            ),
            result(
                "perf.generate", tier=2, title="decoding is as fast as the memory lets it be",
                metrics={
                    "tokens_per_s": (283.1, "1/s", "higher"), "itl": (3.53, "ms", "lower"),
                    "mbu": (0.93, "ratio", "higher"),
                    "tokens_per_s_narrow": (1103.0, "1/s", "higher"), "mbu_narrow": (0.53, "ratio", "higher"),
                    "gap_per_layer": (21.0, "us", "lower"), "cost_per_1000_tokens": (0.00343, "price", "lower"),
                },
                evidence={
                    "rung": "and dependent launch",
                    "before": {"copy": 4.19e12, "read": 4.41e12},
                    "after": {"copy": 4.18e12, "read": 4.4e12},
                    "wide": _decoding(3.53, 4.1e12)
                    | {"batches": {size: {"tokens_per_s": 270.0 * int(size)} for size in ("1", "8", "32")}},
                    "narrow": _decoding(0.906, 2.33e12),
                },
            ),
        ],
        driver=H200,
    )  # fmt: skip


def no_gpu() -> dict[str, Any]:
    """Return a document of a run that was to have a GPU and had none."""
    return document([
        result("run.identity"),
        result("dev.available", "skip", tier=2, skip="no_gpu", detail="this machine shows no GPU"),
        result("perf.generate", "skip", tier=2, skip="dependency_failed", detail="dev.available was skipped"),
    ])  # fmt: skip


def bad() -> dict[str, Any]:
    """Return a document of an environment in which much is wrong."""
    compiler = finding(
        "torch.compile cannot compile: there is no C compiler", mode="F48",
        why="Triton compiles its launcher with a C compiler while the program runs, and there is none",
        remedy="apt-get install gcc libc6-dev, or set CC to a compiler",
    )  # fmt: skip
    return document(
        [
            result("run.identity"),
            result("run.limits", "warn", findings=[SHM]),
            result("cpu.compile", "fail", findings=[compiler], output="RuntimeError: Failed to find C compiler\n"),
            result("dist.gloo", "error", required=False, detail="it did not end within 60 s"),
            result("dev.available", "skip", tier=2, skip="no_gpu", detail="this machine shows no GPU"),
        ],
        tiers={"1": False, "2": False},
    )


def waived() -> dict[str, Any]:
    """Return a document of an environment that is green, but for what somebody has given leave to fail."""
    slow = finding("decoding draws 71 % of the bandwidth", remedy="nvidia-smi -q -d CLOCK", mode="F01", blame="host")
    return document(
        [
            result("run.identity"),
            result(
                "perf.generate", "waived", tier=2, waiver=("clocks are capped until the new PSU", "2026-12-31"),
                findings=[slow, SHM], output="slow\n",
            ),
        ],
        tiers={"1": True, "2": False},
    )  # fmt: skip


def notebook() -> dict[str, Any]:
    """Return a document of an image that serves notebooks: what is for other services was not looked at."""
    return document(
        [
            result("run.identity"),
            result("svc.jupyter"),
            result("svc.sshd", "skip", skip="not_this_kind", detail="the image runs no SSH server"),
            result("sec.sshd", "skip", skip="not_this_kind", detail="the image runs no SSH server"),
            result("run.locks", "skip", skip="not_declared", detail="there is no image.json"),
        ],
        exit_code=0,
        tiers={"1": True},
    )


def hostile() -> dict[str, Any]:
    """Return a document that tries to break out of every form."""
    there = finding(HOSTILE, why=HOSTILE, remedy=HOSTILE, mode="F01")
    return document(
        [
            result("run.identity", "fail", title=HOSTILE, detail=HOSTILE, findings=[there], output=HOSTILE * 3),
            result("perf.roofline", "skip", title=HOSTILE, skip="no_gpu", detail=HOSTILE),
            result("perf.generate", metrics={HOSTILE: (math.pi, HOSTILE, "")}, evidence={HOSTILE: [HOSTILE]}),
            result("run.import", "error", detail=HOSTILE),
            result("run.limits", "waived", waiver=(HOSTILE, "9999-12-31"), detail=HOSTILE, findings=[there]),
        ],
        name=HOSTILE,
        facts={**FACTS, "torch": HOSTILE, "packages": {HOSTILE: HOSTILE}},
        driver={**H200, "names": [HOSTILE], "module": HOSTILE},
    )
