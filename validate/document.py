"""Results → the report as JSON, of which every other form is a rendering.

Two runs of one environment differ in `volatile`, in what was measured and in nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from typing import Any, Dict, Mapping, Optional, Sequence

from validate.driver import Driver
from validate.verdict import Result, Status, exit_code, proven_tiers
from validate.waivers import Waiver

SCHEMA = 1
_FINGERPRINTED = ("python_full", "machine", "torch", "cuda", "cudnn_number", "nccl", "architectures", "packages")


def fingerprint(facts: Mapping[str, Any]) -> Optional[str]:
    """Return a digest of what decides which CUDA stack is loaded; None if some of it is unknown.

    Environments with equal fingerprints load the same libraries, whatever image or machine they are on.
    """
    if not all(name in facts for name in _FINGERPRINTED):
        return None
    content = json.dumps({name: facts[name] for name in _FINGERPRINTED}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def document(
    results: Sequence[Result],
    *,
    subject: Mapping[str, Any],
    suite: Mapping[str, str],
    profile: Mapping[str, Any],
    waivers: Sequence[Waiver],
    driver: Driver,
    started: str,
    duration_s: float,
    on_skip: str,
    strict: bool,
    narrowed: bool,
) -> Dict[str, Any]:
    """Return the report. `subject` is what was validated: kind, name, digest, declared; `started` is ISO 8601.

    `waivers` are all that were given, whether they were needed or not. `narrowed` says that not all checks of the tiers
    were asked for, so that no tier can be proven.
    """
    facts: Mapping[str, Any] = next((result.evidence["facts"] for result in results if "facts" in result.evidence), {})
    code = exit_code(results, on_skip=on_skip, strict=strict)
    counts = {status.value: sum(result.status is status for result in results) for status in Status}
    return {
        "schema": SCHEMA,
        "suite": dict(suite),
        "subject": dict(subject),
        "profile": {
            **profile,
            "on_skip": on_skip,
            "strict": strict,
            "required": sorted(result.id for result in results if result.required),
            "waivers": [waiver.as_json() for waiver in sorted(waivers, key=lambda it: it.check)],
        },
        "verdict": {
            "exit_code": code,
            "passed": code == 0,
            "tiers": {} if narrowed else {str(tier): proven for tier, proven in proven_tiers(results).items()},
            "counts": counts,
        },
        "environment": {"facts": dict(facts), "fingerprint": fingerprint(facts)},
        "driver": driver.as_json(),
        "results": [result.as_json() for result in results],
        "volatile": {
            "started": started,
            "duration_s": round(duration_s, 3),
            "durations": {result.id: round(result.duration_s, 3) for result in results},
            "host": {
                "kernel": platform.release(),
                "machine": platform.machine(),
                "cpus": len(os.sched_getaffinity(0)),
                "uid": os.geteuid(),
            },
        },
    }


def dumps(report: Mapping[str, Any]) -> str:
    """Return a report as it is written: sorted, so that two of them can be compared line by line."""
    return json.dumps(report, indent=1, sort_keys=True, allow_nan=False) + "\n"
