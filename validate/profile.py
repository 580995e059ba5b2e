"""Profiles: which checks a use of an environment needs, and the numbers they are held to."""

from __future__ import annotations

import fnmatch
import json
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Mapping, Sequence, Set, Tuple

from validate.check import Check


@dataclass(frozen=True)
class Profile:
    """A named selection: what is run, and of that what must have run and passed."""

    name: str
    title: str
    required_tiers: Tuple[int, ...]
    """Every check of these must run."""
    tiers: Tuple[int, ...] = (1, 2, 3)
    """Checks of these are run where they can be."""
    patterns: Tuple[str, ...] = ("*",)
    """Only checks with such an id."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Over DEFAULTS."""

    @property
    def numbers(self) -> Dict[str, Any]:
        """Return the options with the defaults below them."""
        return {**DEFAULTS, **self.options}


DEFAULTS: Mapping[str, Any] = {
    "gpus": "auto",
    "compile": True,
    "workers": 0,
    "foreign_user": "warn",
    "price_per_hour": None,
    "mbu_floor": 0.85,
    "mbu_warn": 0.90,
}
"""gpus: how many must be there, "all" for at least one, "auto" for those that are. compile: torch.compile must work.
workers: of a DataLoader, decides how much shared memory is enough. foreign_user: "fail" or "warn" if a user without an
entry in /etc/passwd cannot work. price_per_hour: of the machine, for the cost of 1000 tokens. mbu_floor, mbu_warn:
fraction of the measured bandwidth that wide decoding must reach."""


def _is_number(value: object) -> bool:
    # NaN, infinity and integers that no float can hold are none of use.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e15


def _is_fraction(value: Any) -> bool:  # noqa: ANN401 (whatever JSON can hold)
    return _is_number(value) and value <= 1


_OPTIONS: Mapping[str, Tuple[str, Callable[[Any], bool]]] = {
    "compile": ("true or false", lambda value: isinstance(value, bool)),
    "workers": ("a whole number, 0 or more", lambda value: _is_number(value) and isinstance(value, int)),
    "foreign_user": ("fail or warn", lambda value: value in ("fail", "warn")),
    "price_per_hour": ("a number, 0 or more, or null", lambda value: value is None or _is_number(value)),
    "mbu_floor": ("a number from 0 to 1", _is_fraction),
    "mbu_warn": ("a number from 0 to 1", _is_fraction),
}
"""What the command line may change, and to what; gpus has an option of its own there."""


def option(text: str) -> Tuple[str, Any]:
    """Read NAME=VALUE; raises ValueError for a name that no profile has, or a value that it cannot have."""
    name, equals, value = text.partition("=")
    if not equals or name not in _OPTIONS:
        raise ValueError(f"no such option: {text}; there are {', '.join(sorted(_OPTIONS))}")
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = value
    what, is_right = _OPTIONS[name]
    if not is_right(found):
        raise ValueError(f"--option {text}: {name} is {what}")
    return name, found


PROFILES: Mapping[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile("runtime", "an environment to run PyTorch in; on a GPU where there is one", required_tiers=(1,)),
        Profile("cpu", "without a GPU, also where there is one", required_tiers=(1,), tiers=(1,)),
        Profile("gpu", "a machine with a GPU: everything but several GPUs together", required_tiers=(1, 2)),
        Profile("multi-gpu", "a machine with several GPUs: everything", required_tiers=(1, 2, 3)),
        Profile("training", "as runtime, with shared memory for eight data loaders", (1,), options={"workers": 8}),
        Profile("kubernetes", "as runtime, for any user id", (1,), options={"foreign_user": "fail"}),
        Profile(
            "quick",
            "seconds: what it is, that it imports, that the driver and the GPU answer",
            required_tiers=(1,),
            patterns=("run.identity", "run.import", "drv.*", "dev.available"),
        ),
    )
}
DEFAULT = "runtime"


def select(
    checks: Mapping[str, Check], profile: Profile, *, only: Sequence[str] = (), gpus: str = "auto"
) -> Tuple[List[Check], Set[str]]:
    """Return the checks to run, with all that they need, and the ids of those that are required.

    `only` are shell-style patterns of ids that narrow the profile. `gpus` other than "auto" and "none" makes the checks
    of a GPU required, of several GPUs if it is a number above one; "none" leaves them out.
    """
    tiers = set(profile.tiers)
    required_tiers = set(profile.required_tiers)
    if gpus == "none":
        tiers &= {1}
    elif gpus != "auto":
        required_tiers.add(2)
        if gpus.isdigit() and int(gpus) > 1:
            required_tiers.add(3)

    def chosen(one: Check, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(one.id, pattern) for pattern in patterns)

    wanted = [one for one in checks.values() if one.tier in tiers | required_tiers and chosen(one, profile.patterns)]
    if only:
        wanted = [one for one in wanted if chosen(one, only)]
    names = {one.id for one in wanted}
    # Who asks for nothing else wants to know of these.
    required = {one.id for one in wanted if one.tier in required_tiers} or {one.id for one in wanted}
    todo = list(wanted)
    while todo:
        for need in todo.pop().needs:
            if need not in names:
                names.add(need)
                todo.append(checks[need])
    return [one for one in checks.values() if one.id in names], required
