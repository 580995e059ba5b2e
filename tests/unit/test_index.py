"""Finding files by name and hash where the user's pip looks, and fetching them over lines that break."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pypi_simple import PYPI_SIMPLE_ENDPOINT

from builder import fetching, transfer
from builder.errors import HashMismatchError, SourceError, TorchyardError
from builder.fetching import Silent
from builder.foreign import without_credentials
from builder.index import Configuration, Index, Wanted, local_path
from builder.store import Store
from tests.support.index_server import Answer, IndexServer, reset
from tests.support.wheels import FakeWheel, wheel

PAYLOAD = random.Random(0).randbytes(100_000)
BIG = wheel("big", "1.0", files={"big/data.bin": PAYLOAD})
OTHER = wheel("big", "1.0", files={"big/data.bin": PAYLOAD[::-1]})
assert BIG.filename == OTHER.filename
NOWHERE = "http://127.0.0.1:9/simple"
"""Nothing listens on the discard port."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BACKOFF_S", 0.001)
    monkeypatch.setattr(transfer, "BACKOFF_MAX_S", 0.01)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def index(url: str, **rest: Any) -> Index:
    return Index(configuration=Configuration(default_index=url, **rest))


def wanted(made: FakeWheel, *, size: bool = True, index_url: str | None = None) -> Wanted:
    return Wanted(
        project=made.project,
        filename=made.filename,
        sha256=made.sha256,
        size=len(made.content) if size else None,
        index_url=index_url,
    )


def assert_fetched(store: Store, made: FakeWheel) -> None:
    assert store.path(made.sha256).read_bytes() == made.content
    assert not list((store.root / "partial").iterdir())


def assert_nothing(store: Store) -> None:
    assert not list((store.root / "blobs").iterdir())
    assert not list((store.root / "partial").iterdir())


def text_of(error: TorchyardError) -> str:
    return "\n".join(
        "\n".join([problem.what, problem.where, problem.why, *problem.tries]) for problem in error.problems
    )


class Counting:
    """Progress that adds up what is reported."""

    def __init__(self) -> None:
        self.started: list[tuple[str, int | None, int]] = []
        self.bytes = 0
        self.finished: list[str] = []

    def start(self, name: str, size: int | None, done: int) -> None:
        if name not in [one for one, _, _ in self.started]:
            self.started.append((name, size, done))
            self.bytes += done

    def advance(self, name: str, size: int) -> None:
        self.bytes += size

    def finish(self, name: str) -> None:
        self.finished.append(name)


# --- pip's configuration


SCOPES = r"""
:env:.cert='/env/ca.pem'
:env:.disable-pip-version-check='1'
download.trusted-host='a.example'
global.cert='/global/ca.pem'
global.extra-index-url='\nhttps://one.example/simple\nhttps://two.example/simple'
global.find-links='/wheels  /more'
global.index-url='https://global.example/simple'
global.proxy='http://proxy.example:3128'
install.client-cert='/client.pem'
install.index-url='https://install.example/simple'
wheel.index-url='https://wheel.example/simple'
a line that is none
"""


def test_configuration_of_several_scopes() -> None:
    found = Configuration.parse(
        SCOPES,
        {},
    )
    assert found == Configuration(
        default_index="https://install.example/simple",
        extra_indexes=("https://one.example/simple", "https://two.example/simple"),
        find_links=("/wheels", "/more"),
        certificates="/env/ca.pem",
        client_certificate="/client.pem",
        proxy="http://proxy.example:3128",
        trusted_hosts=("a.example",),
    )


@pytest.mark.parametrize(
    ("value", "expected"), [("1", True), ("true", True), ("Yes", True), ("on", True), ("0", False), ("", False)]
)
def test_configuration_no_index(value: str, expected: bool) -> None:  # noqa: FBT001 (pytest's)
    assert Configuration.parse(f"global.no-index={value!r}", {}).no_index is expected


def test_configuration_default_index() -> None:
    uv = {"UV_DEFAULT_INDEX": "https://uv.example/simple"}
    assert Configuration.parse("", {}).default_index == PYPI_SIMPLE_ENDPOINT
    assert Configuration.parse("", uv).default_index == "https://uv.example/simple"
    assert Configuration.parse("", {"UV_INDEX_URL": "https://old.example"}).default_index == "https://old.example"
    assert Configuration.parse("global.index-url='https://pip.example'", uv).default_index == "https://pip.example"


def test_configuration_as_pip_itself_reports_it(tmp_path: Path) -> None:
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = https://file.example/simple\nfind-links =\n    /one\n    /two\n"
        "[install]\nextra-index-url = https://extra.example/simple\n"
    )
    environ = {"PIP_CONFIG_FILE": str(file), "PIP_INDEX_URL": "https://env.example/simple", "HOME": str(tmp_path)}
    found = Configuration.of_user(environ)
    assert found.default_index == "https://env.example/simple"
    assert found.find_links == ("/one", "/two")
    assert found.extra_indexes == ("https://extra.example/simple",)


def test_configuration_that_pip_cannot_read(tmp_path: Path) -> None:
    file = tmp_path / "pip.conf"
    file.write_text("index-url = outside of any section\n")
    with pytest.raises(TorchyardError, match="pip's configuration cannot be read"):
        Configuration.of_user({"PIP_CONFIG_FILE": str(file), "HOME": str(tmp_path)})


@pytest.mark.parametrize(
    ("location", "path"),
    [
        ("/wheels", Path("/wheels")),
        ("file:///wheels/with%20space", Path("/wheels/with space")),
        ("~/wheels", Path("~/wheels").expanduser()),
        ("https://one.example/wheels", None),
        ("http://one.example/wheels", None),
    ],
)
def test_local_path(location: str, path: Path | None) -> None:
    assert local_path(location) == path


def test_without_credentials() -> None:
    shown = without_credentials("https://user:secret@one.example:8443/simple?token=secret#secret")
    assert shown == "https://one.example:8443/simple"


# --- where a file is found


@pytest.mark.parametrize("as_url", [False, True])
def test_in_a_find_links_directory(tmp_path: Path, store: Store, as_url: bool) -> None:  # noqa: FBT001 (pytest's)
    directory = BIG.write(tmp_path / "wheels").parent
    place = directory.as_uri() if as_url else str(directory)
    found = index(NOWHERE, find_links=(str(tmp_path / "missing"), place)).fetch(wanted(BIG), store, Silent())
    assert found == store.path(BIG.sha256)
    assert_fetched(store, BIG)


def test_in_a_page_of_links(server: IndexServer, store: Store, tmp_path: Path) -> None:
    server.add("links", BIG)
    index(NOWHERE, find_links=(server.links("links"),)).fetch(wanted(BIG), store, Silent())
    assert_fetched(store, BIG)


def test_in_a_local_page_of_links(store: Store, tmp_path: Path) -> None:
    BIG.write(tmp_path / "files")
    page = tmp_path / "page.html"
    page.write_text(f'<a href="files/{BIG.filename}">{BIG.filename}</a>')
    index(NOWHERE, find_links=(str(page),)).fetch(wanted(BIG), store, Silent())
    assert_fetched(store, BIG)


def test_in_a_local_index(tmp_path: Path, store: Store) -> None:
    BIG.write(tmp_path / "files")
    (tmp_path / "simple" / "big").mkdir(parents=True)
    page = f'<a href="../../files/{BIG.filename}#sha256={BIG.sha256}">{BIG.filename}</a>'
    (tmp_path / "simple" / "big" / "index.html").write_text(page)
    index((tmp_path / "simple").as_uri()).fetch(wanted(BIG), store, Silent())
    assert_fetched(store, BIG)


@pytest.mark.parametrize("json", [False, True])
@pytest.mark.parametrize("hashes", [False, True])
def test_in_an_index(server: IndexServer, store: Store, json: bool, hashes: bool) -> None:  # noqa: FBT001 (pytest's)
    url = server.add("default", BIG, json=json, hashes=hashes)
    found = index(url)
    found.fetch(wanted(BIG), store, Silent())
    assert_fetched(store, BIG)
    assert found.page(url, "Big")[0].size == (len(BIG.content) if json else None)
    assert len(server.asked(server.page("big"))) == 1  # a page is read once
    found.fetch(wanted(BIG), store, Silent())
    assert len(server.asked(server.file(BIG))) == 1  # a file as well


def test_a_local_version_in_an_index(server: IndexServer, store: Store) -> None:
    built = wheel("torch", "2.7.1+cu118")
    index(server.add("default", built)).fetch(wanted(built), store, Silent())
    assert_fetched(store, built)


def test_in_an_extra_index_or_its_own(server: IndexServer, store: Store) -> None:
    server.add("default", wheel("unrelated", "1.0"))
    server.add("extra", BIG)
    small = wheel("small", "1.0")
    server.add("own", small)
    looking = index(server.url(), extra_indexes=(server.url("extra"),))
    looking.fetch(wanted(BIG), store, Silent())
    looking.fetch(wanted(small, index_url=server.url("own")), store, Silent())
    assert_fetched(store, BIG)
    assert_fetched(store, small)


def test_find_links_come_first(server: IndexServer, store: Store, tmp_path: Path) -> None:
    url = server.add("default", BIG)
    BIG.write(tmp_path)
    index(url, find_links=(str(tmp_path),)).fetch(wanted(BIG), store, Silent())
    assert not server.requests


def test_another_file_of_the_same_name_is_passed_over(server: IndexServer, store: Store, tmp_path: Path) -> None:
    OTHER.write(tmp_path)
    server.add("links", OTHER)
    server.add("default", OTHER)
    server.add("extra", BIG)
    found = index(server.url(), extra_indexes=(server.url("extra"),), find_links=(str(tmp_path), server.links("links")))
    found.fetch(wanted(BIG), store, Silent())
    assert_fetched(store, BIG)
    assert not server.asked("/links/files/*")
    assert not server.asked("/default/files/*")


def test_nowhere_to_be_found_says_where_was_looked(server: IndexServer, store: Store, tmp_path: Path) -> None:
    OTHER.write(tmp_path)
    server.add("default", OTHER)
    looking = index(
        server.url().replace("//", "//user:secret@"), extra_indexes=(server.url("extra"),), find_links=(str(tmp_path),)
    )
    with pytest.raises(SourceError) as caught:
        looking.fetch(wanted(BIG), store, Silent())
    text = text_of(caught.value)
    for part in (BIG.filename, BIG.sha256, server.url(), server.url("extra"), str(tmp_path), "nowhere"):
        assert part in text
    assert "secret" not in text
    assert_nothing(store)


def test_no_index_is_obeyed(server: IndexServer, store: Store) -> None:
    server.add("default", BIG)
    with pytest.raises(SourceError, match="nowhere") as caught:
        index(server.url(), no_index=True).fetch(wanted(BIG), store, Silent())
    assert "no-index" in text_of(caught.value)
    assert not server.requests


@pytest.mark.parametrize("status", [401, 403, 410, 500, 503])
def test_a_refusal_is_not_absence(server: IndexServer, store: Store, status: int) -> None:
    server.script(server.page("big"), then=itertools.repeat(status))
    with pytest.raises(SourceError, match="cannot be read") as caught:
        index(server.url()).page(server.url(), "big")
    assert f"HTTP {status}" in text_of(caught.value)
    with pytest.raises(SourceError) as caught:
        index(server.url()).fetch(wanted(BIG), store, Silent())
    assert f"HTTP {status}" in text_of(caught.value)
    assert index(server.add("empty")).page(server.url("empty"), "big") == ()


def test_a_broken_index_does_not_hide_another(server: IndexServer, store: Store) -> None:
    server.script(server.page("big", "default"), then=itertools.repeat(403))
    server.add("extra", BIG)
    index(server.url(), extra_indexes=(server.url("extra"),)).fetch(wanted(BIG), store, Silent())
    assert_fetched(store, BIG)


def test_broken_places_are_named_when_another_has_the_wrong_file(
    server: IndexServer, store: Store, tmp_path: Path
) -> None:
    OTHER.write(tmp_path)
    server.script("/pages/links/", then=itertools.repeat(403))
    server.script(server.page("big"), then=itertools.repeat(500))
    with pytest.raises(SourceError) as caught:
        index(server.url(), find_links=(str(tmp_path), server.links("pages"))).fetch(wanted(BIG), store, Silent())
    text = text_of(caught.value)
    assert "HTTP 403" in text
    assert "HTTP 500" in text


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/vnd.pypi.simple.v1+json", b"{"),
        ("application/vnd.pypi.simple.v1+json", b"[]"),
        ("application/vnd.pypi.simple.v1+json", b'{"files": 3}'),
        ("application/vnd.pypi.simple.v1+json", b'{"meta": {"api-version": "9.0"}, "name": "big", "files": []}'),
        ("image/png", b"\x89PNG"),
    ],
)
def test_a_page_that_is_none(server: IndexServer, kind: str, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_content", lambda *_: (kind, body))
    with pytest.raises(SourceError, match="cannot be read"):
        index(server.url()).page(server.url(), "big")


def test_an_index_that_does_not_answer(store: Store) -> None:
    with pytest.raises(SourceError) as caught:
        index("http://user:secret@127.0.0.1:9/simple").fetch(wanted(BIG), store, Silent())
    text = text_of(caught.value)
    assert "Connection refused" in text
    assert "secret" not in text


# --- wrong bytes


@pytest.mark.parametrize("size", [False, True])
def test_wrong_bytes_are_named_and_not_kept(server: IndexServer, store: Store, size: bool) -> None:  # noqa: FBT001
    url = server.add("default", BIG)
    server.script(server.file(BIG), then=itertools.repeat(Answer(body=OTHER.content)))
    with pytest.raises(HashMismatchError) as caught:
        index(url).fetch(wanted(BIG, size=size), store, Silent())
    text = text_of(caught.value)
    for part in (BIG.filename, BIG.sha256, OTHER.sha256):
        assert part in text
    assert_nothing(store)
    assert len(server.asked(server.file(BIG))) == 1


def test_wrong_bytes_in_one_place_are_no_obstacle_if_another_has_the_right_ones(
    server: IndexServer, store: Store
) -> None:
    server.add("default", BIG)
    server.add("extra", BIG)
    server.script(server.file(BIG), Answer(body=OTHER.content))
    progress = Counting()
    index(server.url(), extra_indexes=(server.url("extra"),)).fetch(wanted(BIG), store, progress)
    assert_fetched(store, BIG)
    assert progress.bytes == len(BIG.content)


def test_more_bytes_than_locked(server: IndexServer, store: Store) -> None:
    url = server.add("default", BIG)
    endless = Answer(body=BIG.content + bytes(10_000_000), length=False)
    server.script(server.file(BIG), then=itertools.repeat(endless))
    progress = Counting()
    with pytest.raises(HashMismatchError) as caught:
        index(url).fetch(wanted(BIG), store, progress)
    assert f"expected {len(BIG.content)} bytes" in text_of(caught.value)
    assert progress.bytes == 0
    assert_nothing(store)


def test_a_damaged_start_is_fetched_again_once(server: IndexServer, store: Store) -> None:
    url = server.add("default", BIG)
    (store.root / "partial" / BIG.sha256).write_bytes(bytes(5000))
    progress = Counting()
    index(url).fetch(wanted(BIG), store, progress)
    assert_fetched(store, BIG)
    assert [one.range for one in server.asked(server.file(BIG))] == ["bytes=5000-", None]
    assert progress.bytes == len(BIG.content)


# --- lines that break


def test_passing_refusals_are_waited_out(server: IndexServer, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BACKOFF_S", 0.03)
    monkeypatch.setattr(transfer, "BACKOFF_MAX_S", 1.0)
    url = server.add("default", BIG)
    server.script(server.page("big"), 503, 503)
    server.script(server.file(BIG), 503, 503, 200)
    index(url).fetch(wanted(BIG), store, Silent())
    assert_fetched(store, BIG)
    tried = server.asked(server.file(BIG))
    assert [one.status for one in tried] == [503, 503, 200]
    assert len(server.asked(server.page("big"))) == 3
    # urllib3 repeats the first time at once, with jitter only, and doubles from then on.
    assert tried[2].at_s - tried[1].at_s >= 0.06


def test_retry_after_is_obeyed(server: IndexServer, store: Store) -> None:
    url = server.add("default", BIG)
    server.script(server.file(BIG), Answer(status=429, headers={"Retry-After": "1"}))
    index(url).fetch(wanted(BIG), store, Silent())
    first, second = server.asked(server.file(BIG))
    assert (first.status, second.status) == (429, 200)
    assert second.at_s - first.at_s >= 1
    assert_fetched(store, BIG)


def test_retry_after_is_not_obeyed_for_days(server: IndexServer, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "RETRY_AFTER_MAX_S", 0.01)
    url = server.add("default", BIG)
    server.script(server.file(BIG), Answer(status=503, headers={"Retry-After": "86400"}))
    index(url).fetch(wanted(BIG), store, Silent())
    assert_fetched(store, BIG)


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_final_refusal_is_not_repeated(server: IndexServer, store: Store, status: int) -> None:
    url = server.add("default", BIG)
    server.script(server.file(BIG), then=itertools.repeat(status))
    with pytest.raises(SourceError) as caught:
        index(url.replace("//", "//user:secret@")).fetch(wanted(BIG), store, Silent())
    assert f"HTTP {status}" in text_of(caught.value)
    assert "secret" not in text_of(caught.value)
    assert len(server.asked(server.file(BIG))) == 1


def test_a_server_that_never_recovers_is_given_up(server: IndexServer, store: Store) -> None:
    url = server.add("default", BIG)
    server.script(server.file(BIG), then=itertools.repeat(503))
    with pytest.raises(SourceError, match="could not be fetched"):
        index(url).fetch(wanted(BIG), store, Silent())
    assert len(server.asked(server.file(BIG))) == transfer.ATTEMPTS


@pytest.mark.parametrize(
    "how", [reset(1000), Answer(cut=1000, reset=False), Answer(cut=1000, reset=False, length=False)]
)
def test_a_broken_transfer_is_resumed(server: IndexServer, store: Store, how: Answer) -> None:
    url = server.add("default", BIG)
    server.script(server.file(BIG), how)
    progress = Counting()
    index(url).fetch(wanted(BIG), store, progress)
    assert_fetched(store, BIG)
    first, second = server.asked(server.file(BIG))
    assert first.range is None
    if not (how.reset and second.range is None):  # a reset may overtake what was sent before it
        assert (second.range, second.status) == ("bytes=1000-", 206)
    assert progress.bytes == len(BIG.content)
    assert progress.finished == [BIG.filename]


def test_a_broken_transfer_starts_over_where_ranges_are_ignored(server: IndexServer, store: Store) -> None:
    url = server.add("default", BIG)
    server.script(server.file(BIG), reset(1000), Answer(ranges=False))
    progress = Counting()
    index(url).fetch(wanted(BIG), store, progress)
    assert_fetched(store, BIG)
    assert [one.status for one in server.asked(server.file(BIG))] == [200, 200]
    assert progress.bytes == len(BIG.content)


def test_a_transfer_that_always_breaks_is_given_up_and_kept(server: IndexServer, store: Store) -> None:
    url = server.add("default", BIG)
    server.script(server.file(BIG), then=itertools.repeat(Answer(cut=1000, reset=False)))
    with pytest.raises(SourceError, match="gave up after") as caught:
        index(url).fetch(wanted(BIG), store, Silent())
    assert len(server.asked(server.file(BIG))) == transfer.ATTEMPTS
    kept = (store.root / "partial" / BIG.sha256).read_bytes()
    assert BIG.content.startswith(kept)
    assert len(kept) == 1000 * transfer.ATTEMPTS
    assert "what arrived is kept" in text_of(caught.value)
    server.script(server.file(BIG))
    index(url).fetch(wanted(BIG), store, Silent())
    assert_fetched(store, BIG)
    assert server.asked(server.file(BIG))[-1].range == f"bytes={len(kept)}-"


def test_progress_earns_attempts(server: IndexServer, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "STALL_BYTES", 10)
    url = server.add("default", BIG)
    server.script(server.file(BIG), *[reset(1000)] * (3 * transfer.ATTEMPTS))
    index(url).fetch(wanted(BIG), store, Silent())
    assert_fetched(store, BIG)


@pytest.mark.parametrize("size", [False, True])
def test_a_file_that_was_whole_but_not_committed(server: IndexServer, store: Store, size: bool) -> None:  # noqa: FBT001
    url = server.add("default", BIG)
    (store.root / "partial" / BIG.sha256).write_bytes(BIG.content)
    index(url).fetch(wanted(BIG, size=size), store, Silent())
    assert_fetched(store, BIG)
    if size:
        assert not server.asked(server.file(BIG))


def test_more_left_over_than_the_file_has(server: IndexServer, store: Store) -> None:
    url = server.add("default", BIG)
    for known in (True, False):
        (store.root / "partial" / BIG.sha256).write_bytes(BIG.content + b"more")
        index(url).fetch(wanted(BIG, size=known), store, Silent())
        assert_fetched(store, BIG)
        store.path(BIG.sha256).unlink()


def test_a_stalled_transfer_is_broken_off(server: IndexServer, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "STALL_S", 0.1)
    url = server.add("default", BIG)
    server.script(server.file(BIG), Answer(pace=(1, 0.02)))
    begun = time.monotonic()
    index(url).fetch(wanted(BIG), store, Silent())
    assert time.monotonic() - begun < 5  # at that pace: half an hour
    assert_fetched(store, BIG)
    first, second = server.asked(server.file(BIG))
    assert first.range is None
    assert second.range is not None
    assert 0 < int(second.range.removeprefix("bytes=").removesuffix("-")) < 100


def test_a_slow_but_steady_transfer_is_let_be(
    server: IndexServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "STALL_S", 0.1)
    monkeypatch.setattr(transfer, "STALL_BYTES", 1000)
    url = server.add("default", BIG)
    server.script(server.file(BIG), Answer(pace=(5000, 0.02)))
    index(url).fetch(wanted(BIG), store, Silent())
    assert len(server.asked(server.file(BIG))) == 1


# --- sizes and pages


def test_size(server: IndexServer, tmp_path: Path) -> None:
    server.add("default", BIG)
    asking = index(server.url())
    assert asking.size(server.origin + server.file(BIG)) == len(BIG.content)
    assert [one.method for one in server.requests] == ["HEAD"]
    assert asking.size(str(BIG.write(tmp_path))) == len(BIG.content)
    with pytest.raises(SourceError, match=r"the size of gone\.whl is not known"):
        asking.size(f"{server.origin}/default/files/gone.whl")
    with pytest.raises(SourceError):
        asking.size(str(tmp_path / "gone.whl"))


def test_get(server: IndexServer) -> None:
    server.script("/text", 404, Answer(body="grüezi".encode(), headers={"Content-Type": "text/plain; charset=utf-8"}))
    asking = index(server.url())
    assert asking.get(f"{server.origin}/text")[0] == 404
    assert asking.get(f"{server.origin}/text")[0] == 200
    with pytest.raises(SourceError, match="does not answer"):
        asking.get("http://127.0.0.1:9/text")


# --- many files


def many(count: int = 12) -> list[FakeWheel]:
    return [wheel("part", f"{number}.0", files={"part/data.bin": PAYLOAD[: 1000 * number]}) for number in range(count)]


def test_fetch_all(server: IndexServer, store: Store) -> None:
    made = many()
    url = server.add("default", *made)
    store.put(made[3].content)
    progress = Counting()
    index(url).fetch_all([*map(wanted, made), wanted(made[0])], store, progress)
    for one in made:
        assert_fetched(store, one)
    assert len(server.asked("/default/files/*")) == len(made) - 1
    assert progress.bytes == sum(len(one.content) for one in made) - len(made[3].content)
    assert len(progress.finished) == len(made) - 1


def test_a_failure_stops_the_others_and_a_rerun_goes_on(
    server: IndexServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "PARALLEL", 3)
    made = many(40)
    url = server.add("default", *made)
    big, slow, bad = made[39], made[38], made[37]
    for one in made[:39]:
        server.script(server.file(one), Answer(pace=(1000, 0.05)))
    server.script(server.file(bad), Answer(body=bytes(len(bad.content)), pace=(10_000, 0.05)))
    begun = time.monotonic()
    with pytest.raises(HashMismatchError) as caught:
        index(url).fetch_all(map(wanted, made), store, Silent())
    assert time.monotonic() - begun < 1.5  # the slow one alone would take two seconds
    assert bad.filename in text_of(caught.value)
    whole = [one for one in made if store.has(one.sha256)]
    assert big in whole
    assert slow not in whole
    assert len(whole) < 20
    before = len(server.requests)
    for one in made:
        server.script(server.file(one))
    index(url).fetch_all(map(wanted, made), store, Silent())
    for one in made:
        assert_fetched(store, one)
    refetched = {one.path for one in server.requests[before:]} & {server.file(one) for one in whole}
    assert not refetched
    assert server.asked(server.file(slow))[-1].range is not None


def test_a_failure_does_not_wait_for_patience(
    server: IndexServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "BACKOFF_S", 30.0)
    patient, bad = wheel("patient", "1.0", files={"data": PAYLOAD}), wheel("bad", "1.0")
    url = server.add("default", patient, bad)
    server.script(server.file(patient), reset(1000))
    server.script(server.file(bad), Answer(pace=(100, 0.02), body=bytes(len(bad.content))))
    begun = time.monotonic()
    with pytest.raises(HashMismatchError):
        index(url).fetch_all(map(wanted, (patient, bad)), store, Silent())
    assert time.monotonic() - begun < 10


def in_threads(work: Callable[[], object], count: int) -> None:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_one_file_wanted_by_many_is_fetched_once(server: IndexServer, store: Store) -> None:
    url = server.add("default", BIG)
    in_threads(lambda: index(url).fetch(wanted(BIG), store, Silent()), 6)
    assert_fetched(store, BIG)
    assert len(server.asked(server.file(BIG))) == 1


def test_a_killed_fetch_is_resumed(server: IndexServer, store: Store) -> None:
    url = server.add("default", BIG)
    server.script(server.file(BIG), Answer(pace=(10_000, 0.2)))
    code = f"""
import sys
from pathlib import Path
from builder.fetching import Silent
from builder.index import Configuration, Index, Wanted
from builder.store import Store
wanted = Wanted(project="big", filename={BIG.filename!r}, sha256={BIG.sha256!r}, size={len(BIG.content)})
index = Index(configuration=Configuration(default_index={url!r}))
index.fetch(wanted, Store.open(Path(sys.argv[1])), Silent())
"""
    partial = store.root / "partial" / BIG.sha256
    with subprocess.Popen([sys.executable, "-c", code, str(store.root)]) as process:
        while not (partial.exists() and partial.stat().st_size >= 20_000):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert not store.has(BIG.sha256)
    index(url).fetch(wanted(BIG), store, Silent())
    assert_fetched(store, BIG)
    last = server.asked(server.file(BIG))[-1].range
    assert last is not None
    assert int(last.removeprefix("bytes=").removesuffix("-")) >= 20_000
