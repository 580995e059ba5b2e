"""A report as a text file for Prometheus' node exporter: how a fleet's environments are, and when that was seen.

The exporter refuses files with times of their own at the samples, so the time of the run is a number like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from builder.report import Report, plain

_Sample = tuple[Mapping[str, str], float]


def prometheus(report: Report) -> str:
    """Return the report in Prometheus' text format.

    Every name begins with `torchyard_`, and every sample names its subject: the files of several environments can lie
    in one directory.
    """
    own = {
        "subject": report.name,
        "digest": report.subject.digest or "",
        "profile": report.profile.name,
    }
    lines = []
    for name, (text, samples) in _families(report).items():
        if not samples:
            continue
        lines += [f"# HELP torchyard_{name} {text}", f"# TYPE torchyard_{name} gauge"]
        lines += [f"torchyard_{name}{{{_labels({**own, **labels})}}} {_number(value)}" for labels, value in samples]
    return "\n".join(lines) + "\n"


def _families(report: Report) -> Mapping[str, tuple[str, Sequence[_Sample]]]:
    verdict, facts = report.verdict, report.environment.facts
    info = {
        "torch": str(facts.get("torch") or ""),
        "cuda": str(facts.get("cuda") or ""),
        "python": str(facts.get("python_full") or ""),
        "driver": report.driver.module or "",
        "devices": report.driver.devices,
        "fingerprint": report.environment.fingerprint or "",
        "suite": report.suite.digest,
    }
    return {
        "passed": ("Whether every required check ran and passed.", [({}, verdict.passed)]),
        "exit_code": ("How the validation ended; 0 is passed.", [({}, verdict.exit_code)]),
        "info": ("What was validated; always 1.", [(info, 1)]),
        "tier_proven": (
            "Whether a tier is proven: 1 without a GPU, 2 on one, 3 on several.",
            [({"tier": tier}, proven) for tier, proven in verdict.tiers.items()],
        ),
        "checks": (
            "How many checks ended so.",
            [({"status": status}, count) for status, count in sorted(verdict.counts.items())],
        ),
        "check_status": ("How a check ended, as the label status; always 1.", list(_statuses(report))),
        "check_duration_seconds": (
            "How long a check took.",
            [({"check": result.id}, report.duration_s(result)) for result in report.results],
        ),
        "metric": ("What a check measured, in the unit that the label names.", list(_metrics(report))),
        "duration_seconds": ("How long the validation took.", [({}, report.volatile.duration_s)]),
        "timestamp_seconds": ("When the validation began.", [({}, report.started.timestamp())]),
    }


def _statuses(report: Report) -> Iterator[_Sample]:
    for result in report.results:
        yield (
            {
                "check": result.id,
                "tier": str(result.tier),
                "required": "true" if result.required else "false",
                "status": result.status,
                "reason": result.skip or "",
            },
            1,
        )


def _metrics(report: Report) -> Iterator[_Sample]:
    for result in report.results:
        for name, metric in result.metrics.items():
            yield {"check": result.id, "metric": name, "unit": metric.unit, "better": metric.better}, metric.value


def _labels(labels: Mapping[str, str]) -> str:
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())


def _escaped(value: str) -> str:
    return plain(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    """Spell a number as Prometheus does: what is not finite as NaN, +Inf, -Inf."""
    value = float(value)
    return {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}.get(str(value)) or repr(value).removesuffix(".0")
