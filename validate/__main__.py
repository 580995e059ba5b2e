"""The command line of the suite: `python -m validate` on a machine, `torchyard-validate` in our images."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime as dt
import fnmatch
import json
import os
import shutil
import sys
import tempfile
import time
from typing import Any, Callable, Mapping, Optional, Sequence, Set, Tuple

from validate import bundle, check, document, explain, profile, runner, terminal, waivers
from validate.driver import Driver, seen
from validate.verdict import HARNESS, ON_SKIP, Blame, Finding, Result, Status, result_of

VERSION = "1"
"""Of the suite; the bundle's digest says more."""
IMAGE_JSON = "/usr/local/share/torchyard/image.json"

Emit = Callable[[Mapping[str, Any]], None]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchyard-validate",
        description="Say whether this PyTorch environment is what it claims to be, and works.",
        epilog="exit codes: 0 every required check passed; 1 a check failed; 2 usage; 3 nothing could be checked; "
        "4 a required check did not run, or nothing was proven; 5 warnings, with --strict",
    )
    parser.add_argument("--local", action="store_true", help="this machine; the default, and all there is here")
    parser.add_argument("--profile", choices=sorted(profile.PROFILES), default=profile.DEFAULT)
    parser.add_argument(
        "--gpus",
        default="auto",
        metavar="auto|all|N|none",
        help="GPUs that must be there; with any the T2 checks must run",
    )
    parser.add_argument("--on-skip", choices=ON_SKIP, default="fail", help="if a required check did not run")
    parser.add_argument("--strict", action="store_true", help="warnings fail the run")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="only checks with such an id")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="a number of the profile")
    parser.add_argument("--budget", type=_seconds, metavar="SECONDS", help="start no check after this time")
    parser.add_argument("--waivers", metavar="PATH", help="checks that may fail until a day, with reasons: a JSON file")
    parser.add_argument("--report", metavar="PATH", help="write report.json")
    parser.add_argument("--json", action="store_true", help="print events, a JSON document a line")
    parser.add_argument("--list", action="store_true", help="list the checks and stop")
    parser.add_argument("--explain", metavar="TEXT", help="explain an error message, or a failure mode, and stop")
    parser.add_argument("--image-json", default=IMAGE_JSON, help=argparse.SUPPRESS)
    parser.add_argument("--subject", default="{}", help=argparse.SUPPRESS)
    parser.add_argument("--elsewhere", help=argparse.SUPPRESS)
    parser.add_argument("--foreign-user", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda:0", help=argparse.SUPPRESS)
    parser.add_argument("--prelude", default="", help=argparse.SUPPRESS)
    return parser


def _seconds(text: str) -> float:
    """Read a time above 0; raises ValueError for any other text."""
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError(text)
    return seconds


def _elsewhere(path: Optional[str], checks: Sequence[check.Check], options: Mapping[str, Any]) -> Mapping[str, Result]:
    """Read the result that another container of the image gave for a check, or why it gave none."""
    if path is None:
        return {}
    with open(path, encoding="utf-8") as file:  # noqa: PTH123
        found = json.load(file)
    if "result" in found:
        result = result_of(found["result"])
        return {result.id: result}
    one = next(it for it in checks if it.id == found["id"])
    status = Status.FAIL if options["foreign_user"] == "fail" else Status.WARN
    what = f"the suite does not run there as uid {runner.FOREIGN_UID}"
    remedy = "let everybody read and enter Python's directories, all of them from the root on: chmod a+rX"
    finding = Finding(status, what, why=found["broke"], remedy=remedy, blame=Blame.IMAGE)
    return {one.id: Result(one.id, one.title, one.tier, status, findings=[finding], output=found["broke"])}


def _waivers(path: Optional[str], checks: Mapping[str, check.Check]) -> Mapping[str, waivers.Waiver]:
    """Read the file of waivers; raises ValueError in one line if there is none, or it is none."""
    if path is None:
        return {}
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            content = file.read(waivers.MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"--waivers: {path!a} cannot be read: {error.strerror}") from None
    try:
        return waivers.read(content, checks)
    except ValueError as error:
        raise ValueError(f"--waivers: {error}") from None


def _declared(path: str) -> Optional[Mapping[str, Any]]:
    with contextlib.suppress(OSError, ValueError):
        with open(path, encoding="utf-8") as file:  # noqa: PTH123
            found = json.load(file)
        if isinstance(found, dict):
            return found
    return None


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Run the command line and exit."""
    sys.exit(_main(_parser(), arguments))


def _main(parser: argparse.ArgumentParser, arguments: Optional[Sequence[str]]) -> int:
    asked = parser.parse_args(arguments)
    chosen = profile.PROFILES[asked.profile]
    checks = check.load()
    if asked.explain is not None:
        return explain.tell(asked.explain)
    if not (asked.gpus in ("auto", "all", "none") or (asked.gpus.isdigit() and int(asked.gpus) > 0)):
        parser.error(f"--gpus {asked.gpus}: auto, all, none or a number above 0")
    for pattern in asked.only:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in checks):
            parser.error(f"--only {pattern}: no check has such an id; --list names them")
    try:
        options = dict(profile.option(text) for text in asked.option)
        subject = json.loads(asked.subject)
        waived = _waivers(asked.waivers, checks)
    except ValueError as error:
        parser.error(str(error))
    if asked.report and not os.path.isdir(os.path.dirname(asked.report) or "."):  # noqa: PTH112, PTH120
        parser.error(f"--report {asked.report}: there is no such directory")
    wanted, required = profile.select(checks, chosen, only=asked.only, gpus=asked.gpus)
    if asked.foreign_user:
        # What these need is looked at by the image's own user; here they tell themselves what is missing.
        wanted = [dataclasses.replace(one, needs=()) for one in wanted if one.foreign_user]
    if not wanted:
        parser.error(f"--only: none of these is in the profile {chosen.name}")
    if asked.list:
        for one in wanted:
            sys.stdout.write(f"T{one.tier} {one.id:<22} {'required' if one.id in required else '':<9} {one.title}\n")
        return 0
    return _run(asked, chosen, (wanted, required), waived=waived, options=options, subject=subject)


def _run(
    asked: argparse.Namespace,
    chosen: profile.Profile,
    selected: Tuple[Sequence[check.Check], Set[str]],
    *,
    waived: Mapping[str, waivers.Waiver],
    options: Mapping[str, Any],
    subject: Mapping[str, Any],
) -> int:
    wanted, required = selected
    numbers = {**chosen.numbers, "gpus": asked.gpus, **options}
    started = dt.datetime.now(dt.timezone.utc)
    begun = time.monotonic()

    def emit(event: Mapping[str, Any]) -> None:
        if asked.json:
            sys.stdout.write(json.dumps(event) + "\n")
            sys.stdout.flush()

    def tell(result: Result) -> None:
        text = list(terminal.lines(result))
        emit({"event": "result", "seconds": round(result.duration_s, 3), "text": text, **result.as_json()})
        if text and not asked.json:
            sys.stdout.write("\n".join(text) + "\n")
            sys.stdout.flush()

    narrowed = bool(asked.only) or chosen.patterns != ("*",)
    declared = _declared(asked.image_json)
    driver = seen(bundle.root()) if any(one.gpus for one in wanted) else Driver()
    emit({"event": "start", "checks": [one.id for one in wanted], "driver": driver.as_json()})
    try:
        scratch = tempfile.mkdtemp(prefix="torchyard-")
    except OSError as error:
        sys.stderr.write(f"there is no place for temporary files: {error}\ntry --tmpfs /tmp:exec\n")
        return HARNESS
    try:
        # A check may run as another user; what it leaves there may stay.
        os.chmod(scratch, 0o777)  # noqa: S103, PTH101
        results = runner.run(
            wanted,
            check.Request(
                declared=declared,
                image=subject.get("kind") == "image",
                options=numbers,
                device=asked.device,
                scratch=scratch,
            ),
            root=bundle.root(),
            driver=driver,
            required=required,
            on_result=tell,
            budget_s=asked.budget,
            foreign_user=asked.foreign_user,
            elsewhere=_elsewhere(asked.elsewhere, wanted, numbers),
            waivers=waived,
            today=started.date(),
            prelude=asked.prelude,
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    report = document.document(
        results,
        subject={"kind": "environment", "name": None, "digest": None, **subject, "declared": declared},
        suite={"version": VERSION, "digest": f"sha256:{bundle.digest()}"},
        profile={"name": chosen.name, "options": numbers},
        waivers=list(waived.values()),
        driver=driver,
        started=started.isoformat(timespec="seconds"),
        duration_s=time.monotonic() - begun,
        on_skip=asked.on_skip,
        strict=asked.strict,
        narrowed=narrowed,
    )
    if asked.report:
        temporary = f"{asked.report}.new"
        try:
            with open(temporary, "w", encoding="utf-8") as file:  # noqa: PTH123
                file.write(document.dumps(report))
            os.replace(temporary, asked.report)  # noqa: PTH105
        except OSError as error:
            sys.stderr.write(f"the report could not be written: {error}\n")
            return HARNESS
    code: int = report["verdict"]["exit_code"]
    text = list(terminal.summary(results, on_skip=asked.on_skip, strict=asked.strict, narrowed=narrowed))
    emit({"event": "end", "exit_code": code, "text": text, "report": report})
    if not asked.json:
        sys.stdout.write("\n".join(["", *text]) + "\n")
    return code


if __name__ == "__main__":
    main()
