"""A headless Chromium driven through its debugging pipe: open a page, ask it things, take its picture."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_ANSWER_S = 60.0


def found() -> str | None:
    """Return the path of a Chromium; None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab, and what it complained about."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.complaints: list[str] = []
        """Errors and warnings of the console, and exceptions."""
        self.requests: list[str] = []
        """Every address that was asked for, the page's own first."""

    def ask(self, method: str, **parameters: Any) -> Mapping[str, Any]:
        return self._browser.ask(method, parameters, self._session)

    def open(self, page: Path | str, *, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Open a file, or an address."""
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", features=features)
        self.ask("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        self._browser.wait_for("Page.loadEventFired", self._session)

    def value(self, expression: str) -> Any:
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self, *, whole: bool = True) -> bytes:
        return base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def paper(self) -> bytes:
        return base64.b64decode(self.ask("Page.printToPDF", preferCSSPageSize=True, printBackground=True)["data"])

    def noticed(self, event: Mapping[str, Any]) -> None:
        name, told = event["method"], event["params"]
        if name == "Runtime.exceptionThrown":
            self.complaints.append(str(told["exceptionDetails"]))
        elif name == "Log.entryAdded":
            self.complaints.append(f"{told['entry']['level']}: {told['entry']['text']}")
        elif name == "Runtime.consoleAPICalled":
            self.complaints.append(str(told["args"]))
        elif name == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])


class Browser:
    """The process; messages are JSON that end with a zero byte, over descriptors 3 (to it) and 4 (from it)."""

    def __init__(self, program: str, home: Path) -> None:
        its_input, self._to = os.pipe()
        self._from, its_output = os.pipe()
        # Out of the way of 3 and 4, which Chromium takes them for; bash, for dash knows no descriptor above 9.
        pipes = [fcntl.fcntl(one, fcntl.F_DUPFD, 10) for one in (its_input, its_output)]
        self._process = subprocess.Popen(
            [
                "bash", "-c", f'exec "$@" 3<&{pipes[0]} 4>&{pipes[1]}', "bash", program,
                "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                "--disable-background-networking", "--remote-debugging-pipe", f"--user-data-dir={home}", "about:blank",
            ],
            pass_fds=pipes, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for one in (its_input, its_output, *pipes):
            os.close(one)
        self._rest = b""
        self._number = 0
        self._pages: dict[str, Page] = {}
        self._events: list[tuple[str, str]] = []

    def page(self) -> Page:
        target = self.ask("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.ask("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        self._pages[session] = Page(self, session)
        return self._pages[session]

    def ask(self, method: str, parameters: Mapping[str, Any], session: str | None = None) -> Mapping[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        content = json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0"
        while content:
            content = content[os.write(self._to, content) :]
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, (method, answer)
        result: Mapping[str, Any] = answer["result"]
        return result

    def wait_for(self, event: str, session: str) -> None:
        while (event, session) not in self._events:
            self._next()
        self._events.remove((event, session))

    def _next(self) -> Mapping[str, Any]:
        end = time.monotonic() + _ANSWER_S
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
            assert ready, "Chromium does not answer"
            content = os.read(self._from, 1 << 20)
            assert content, "Chromium has ended"
            self._rest += content
        first, _, self._rest = self._rest.partition(b"\0")
        message: Mapping[str, Any] = json.loads(first)
        if "method" in message:
            self._events.append((message["method"], message.get("sessionId", "")))
            if (page := self._pages.get(message.get("sessionId", ""))) is not None:
                page.noticed(message)
        return message

    def close(self) -> None:
        with contextlib.suppress(OSError, AssertionError):
            self.ask("Browser.close", {})
        os.close(self._to)
        os.close(self._from)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Start a Chromium that knows nothing of the user's; gone afterwards."""
    program = found()
    assert program is not None
    with tempfile.TemporaryDirectory(prefix="torchyard-browser-", ignore_cleanup_errors=True) as home:
        running = Browser(program, Path(home))
        try:
            yield running
        finally:
            running.close()
