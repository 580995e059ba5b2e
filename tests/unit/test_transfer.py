"""One transfer over HTTP, as whoever fetches something sees it: what its source is asked for, and told."""

from __future__ import annotations

import contextlib
import hashlib
import random
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import pytest

from builder import transfer
from builder.errors import HashMismatchError, SourceError
from builder.fetching import Silent
from builder.foreign import quoted, reason, without_credentials
from builder.store import Store
from builder.transfer import Client, Response
from tests.support.index_server import Answer, IndexServer

CONTENT = random.Random(3).randbytes(50_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PATH = "/file"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BACKOFF_S", 0.001)
    monkeypatch.setattr(transfer, "BACKOFF_MAX_S", 0.01)
    for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def client() -> Iterator[Client]:
    made = Client()
    yield made
    made.close()


@dataclass(kw_only=True)
class Source:
    """A file at an address, and what was asked of it there."""

    client: Client
    url: str
    size: int | None = None
    limit: int | None = None
    name: str = "the file"
    asked: list[str | None] = field(default_factory=list)

    def ask(self, headers: Mapping[str, str]) -> Response:
        self.asked.append(headers.get("Range"))
        return self.client.request("GET", self.url, headers=headers, stream=True)

    def refused(self, response: Response) -> SourceError:
        response.close()
        return SourceError(f"refused: {response.status_code}")

    def too_long(self, response: Response) -> SourceError:
        return SourceError(f"too long: {response.url}")

    def gave_up(self, attempts: int, why: str) -> SourceError:
        return SourceError(f"gave up after {attempts}", why=why)


def download(source: Source, store: Store) -> Path:
    with store.writer(SHA256, "file") as writer:
        source.client.download(source, writer, Silent())
        return writer.commit()


@pytest.mark.parametrize("status", [204, 304, 404])
def test_only_an_answer_with_the_file_is_one(server: IndexServer, store: Store, client: Client, status: int) -> None:
    server.script(PATH, Answer(status=status, body=b""))
    with pytest.raises(SourceError, match=f"refused: {status}"):
        download(Source(client=client, url=server.origin + PATH), store)


@pytest.mark.parametrize("bounds", [{"size": len(CONTENT) - 1}, {"limit": len(CONTENT) - 1}])
def test_nothing_is_kept_of_what_is_too_long(
    server: IndexServer, store: Store, client: Client, bounds: Mapping[str, int]
) -> None:
    server.script(PATH, Answer(body=CONTENT))
    source = Source(client=client, url=server.origin + PATH, size=bounds.get("size"), limit=bounds.get("limit"))
    with pytest.raises(SourceError, match="too long"):
        download(source, store)
    assert not list((store.root / "partial").iterdir())


def test_a_limit_is_not_a_size(server: IndexServer, store: Store, client: Client) -> None:
    server.script(PATH, Answer(body=CONTENT))
    source = Source(client=client, url=server.origin + PATH, limit=len(CONTENT) + 1)
    assert download(source, store).read_bytes() == CONTENT


def test_a_file_that_came_whole_before_the_line_broke_is_not_asked_for_again(
    server: IndexServer, store: Store, client: Client
) -> None:
    # More is announced than there is, so the connection breaks off after the last byte.
    server.script(PATH, Answer(body=CONTENT + b"more", cut=len(CONTENT), reset=False))
    source = Source(client=client, url=server.origin + PATH, size=len(CONTENT))
    assert download(source, store).read_bytes() == CONTENT
    assert source.asked == [None]


def test_what_always_breaks_off_is_given_up_with_the_reason(server: IndexServer, store: Store, client: Client) -> None:
    server.script(PATH, then=[Answer(body=CONTENT, ranges=False, cut=10, reset=False)] * transfer.ATTEMPTS)
    with pytest.raises(SourceError, match=f"gave up after {transfer.ATTEMPTS}") as caught:
        download(Source(client=client, url=server.origin + PATH), store)
    assert "10" in caught.value.problems[0].why


def test_wrong_bytes_are_the_store_to_judge(server: IndexServer, store: Store, client: Client) -> None:
    server.script(PATH, Answer(body=CONTENT[::-1]))
    with pytest.raises(HashMismatchError):
        download(Source(client=client, url=server.origin + PATH), store)


def test_a_bare_client_follows_nobody_and_logs_in_nowhere(
    server: IndexServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login user password canary\n")
    monkeypatch.setenv("NETRC", str(netrc))
    url = server.origin.replace("//", "//someone:secret@") + PATH
    for bare in (True, False):
        server.script(PATH, Answer(status=302, headers={"Location": "/other"}, body=b""))
        server.script("/other", Answer(body=b"there"))
        client = Client(bare=bare)
        response = client.request("GET", url)
        assert (response.status_code, response.url.endswith(PATH)) == ((302, True) if bare else (200, False))
        first = response if bare else response.history[0]
        assert ("Authorization" in first.request.headers) is not bare
        client.close()


def test_no_answer_is_an_error_of_the_system(client: Client) -> None:
    with pytest.raises(OSError, match="refused") as caught:
        client.request("GET", "http://127.0.0.1:9/file?signature=canary")
    assert "canary" not in reason(caught.value)
    assert "refused" in reason(caught.value)


# --------------------------------------------------------------------------- heads


class Talker:
    """A server that says what it is told to: to each connection one of the answers, in pieces with pauses between."""

    def __init__(self, *answers: Iterable[bytes | float]) -> None:
        self._answers, self.asked = list(answers), 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="talker")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}/"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection, contextlib.suppress(OSError):
                    self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        said = b""
        while not said.endswith(b"\r\n\r\n"):
            said += connection.recv(1)
        answer = self._answers[min(self.asked, len(self._answers) - 1)]
        self.asked += 1
        for one in answer:
            if isinstance(one, bytes):
                connection.sendall(one)
            elif self._over.wait(one):
                return


HEAD = b"HTTP/1.1 200 OK\r\nX-Name: a whole value\r\nContent-Length: 4\r\n\r\n"


@pytest.fixture
def straight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.mark.usefixtures("straight")
@pytest.mark.parametrize("at", [5, 15, 17, 24, 30, len(HEAD) - 2])
def test_a_head_that_is_cut_is_no_answer(at: int) -> None:
    """It would pass for a whole one, with fewer headers or with half of one's value."""
    once = Client(attempts=1)
    with Talker([HEAD[:at]], [HEAD, b"body"]) as talker:
        with pytest.raises(OSError) as caught:  # noqa: PT011 (whatever says that there is none)
            once.request("GET", talker.url)
        assert "the head of the answer" in reason(caught.value) or at == 5
        response = once.request("GET", talker.url)
        assert (response.headers["X-Name"], response.content) == ("a whole value", b"body")
    once.close()


@pytest.mark.usefixtures("straight")
def test_it_is_asked_for_again(client: Client) -> None:
    with Talker([HEAD[:30]], [HEAD[:-2]], [HEAD, b"body"]) as talker:
        assert client.request("GET", talker.url).content == b"body"
        assert talker.asked == 3


@pytest.mark.usefixtures("straight")
def test_a_head_that_comes_byte_by_byte_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte is in time for a socket; all of them together are not."""
    monkeypatch.setattr(transfer, "STALL_S", 0.5)
    once = Client(attempts=1)
    slow = [piece for byte in HEAD for piece in (bytes([byte]), 0.1)]
    with Talker(slow) as talker:
        began = time.monotonic()
        with pytest.raises(OSError) as caught:  # noqa: PT011 (as above)
            once.request("GET", talker.url, patience_s=5)
        assert time.monotonic() - began < 3
    assert "the head of the answer is not there after" in reason(caught.value)
    once.close()


@pytest.mark.usefixtures("straight")
def test_a_silence_within_a_head_has_an_end_before_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "STALL_S", 0.3)
    once = Client(attempts=1)
    with Talker([HEAD[:20], 20.0]) as talker:
        began = time.monotonic()
        with pytest.raises(OSError, match="head of the answer"):
            once.request("GET", talker.url, patience_s=15)
        assert time.monotonic() - began < 5
    once.close()


@pytest.mark.usefixtures("straight")
def test_what_is_thought_about_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is one on heads: not on the time before, nor after a head that only says to go on, nor on the body."""
    monkeypatch.setattr(transfer, "STALL_S", 0.2)
    once = Client(attempts=1)
    with Talker([0.5, b"HTTP/1.1 100 Continue\r\n\r\n", 0.5, HEAD, 0.5, b"body"]) as talker:
        assert once.request("GET", talker.url, patience_s=5).content == b"body"
    once.close()


@pytest.mark.usefixtures("straight")
def test_nobody_waits_for_the_rest_of_a_head_after_the_stop() -> None:
    once, stop = Client(attempts=1), threading.Event()

    def talk() -> Iterator[bytes | float]:
        yield HEAD[:20]
        stop.set()
        for byte in HEAD[20:]:
            yield from (0.1, bytes([byte]))

    with Talker(talk()) as talker, transfer.stopped_by(stop), pytest.raises(SourceError, match="another transfer"):
        once.request("GET", talker.url)
    once.close()


def test_foreign_text_is_shown_without_what_is_secret() -> None:
    assert without_credentials("https://user:secret@host.example/a?signature=x#y") == "https://host.example/a"
    assert reason(ValueError("no /a?signature=x here\nnor here")) == "no /a?… here"
    assert reason(ValueError()) == "ValueError"
    assert quoted("a\nb\x1b") == r"'a\nb\x1b'"
    assert len(quoted("x" * 1000)) <= 120
