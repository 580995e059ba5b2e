"""One transfer over HTTP, as whoever fetches something sees it: what its source is asked for, and told."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

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


def test_foreign_text_is_shown_without_what_is_secret() -> None:
    assert without_credentials("https://user:secret@host.example/a?signature=x#y") == "https://host.example/a"
    assert reason(ValueError("no /a?signature=x here\nnor here")) == "no /a?… here"
    assert reason(ValueError()) == "ValueError"
    assert quoted("a\nb\x1b") == r"'a\nb\x1b'"
    assert len(quoted("x" * 1000)) <= 120
