"""The lock of a base: it survives its file, and refuses every change to it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder import baselock
from builder.baselock import BaseLock
from builder.debian import Deb
from builder.errors import LockError

EPOCH = 1_700_000_000


def a_deb(name: str, n: int, version: str = "1:2.3-4+deb12u1~x") -> Deb:
    return Deb(
        name=name,
        version=version,
        architecture="amd64",
        sha256=f"{n:064x}",
        size=100 + n,
        filename=f"pool/main/{name[0]}/{name}/{name}_2.3-4+deb12u1~x_amd64.deb",
    )


LOCK = BaseLock(
    suite="bookworm",
    architecture="amd64",
    packages=("g++", "python3"),
    epoch=EPOCH,
    debs=(
        a_deb("g++", 1),
        replace(a_deb("libc6", 2), architecture="all"),
        a_deb("python3", 3, version="3.11.2-1+b1"),
    ),
)


def test_a_lock_survives_its_file() -> None:
    text = baselock.dumps(LOCK)
    assert baselock.loads(text, where="x.toml") == LOCK
    assert baselock.dumps(baselock.loads(text, where="x.toml")) == text
    assert LOCK.name == "bookworm-amd64"
    assert LOCK.python == "3.11"
    assert LOCK.size == 306


@given(st.data())
def test_any_changed_digit_of_a_hash_is_refused(data: st.DataObject) -> None:
    text = baselock.dumps(LOCK)
    digest = LOCK.digest
    hexes = [digest, *(deb.sha256 for deb in LOCK.debs)]
    start = text.index(data.draw(st.sampled_from(hexes)))
    at = start + data.draw(st.integers(min_value=0, max_value=63))
    digit = data.draw(st.sampled_from([c for c in "0123456789abcdefABCDEF" if c != text[at]]))
    with pytest.raises(LockError) as caught:
        baselock.loads(text[:at] + digit + text[at + 1 :], where="bases/x.toml")
    assert {problem.where for problem in caught.value.problems} == {"bases/x.toml"}


@given(st.integers(min_value=0))
def test_any_truncation_is_refused(cut: int) -> None:
    text = baselock.dumps(LOCK).rstrip()
    with pytest.raises(LockError):
        baselock.loads(text[: cut % len(text)], where="x.toml")


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("schema = 1", "schema = 2", "schema"),
        ("schema = 1\n", "", "schema"),
        ('suite = "bookworm"', 'suite = "trixie"', "digest"),
        ('suite = "bookworm"', 'suite = "book worm"', "suite"),
        ('architecture = "amd64"\npackages', 'architecture = "vax"\npackages', "architecture"),
        (f"epoch = {EPOCH}", "epoch = -1", "epoch"),
        (f"epoch = {EPOCH}", "epoch = true", "epoch"),
        (f"epoch = {EPOCH}", f"epoch = {EPOCH}\nextra = 1", "extra"),
        ("size = 102", "size = 103", "digest"),
        ("size = 102\n", "", "deb[1].size"),
        ('name = "libc6"', 'name = "g++"', "deb[1].name"),
        ('name = "libc6"', 'name = "libc6; reboot"', "deb[1].name"),
        ('name = "python3"', 'name = "python4"', "packages"),
        ("pool/main/l/libc6/libc6_", "https://example.invalid/libc6_", "deb[1].filename"),
        ("pool/main/l/libc6/libc6_", "pool/../../etc/libc6_", "deb[1].filename"),
        ("3.11.2-1+b1", "3.11.2-1+b1 || true", "deb[2].version"),
        (f"{2:064x}", f"{2:063x}", "deb[1].sha256"),
        (f"{2:064x}", f"{1:064x}", "deb[1].sha256"),
        ('[[deb]]\nname = "libc6"', '[[deb]]\nweight = 1\nname = "libc6"', "deb[1].weight"),
    ],
)
def test_an_edited_lock_is_refused_by_file_and_field(old: str, new: str, field: str) -> None:
    text = baselock.dumps(LOCK)
    assert old in text
    with pytest.raises(LockError) as caught:
        baselock.loads(text.replace(old, new, 1), where="bases/x.toml")
    said = [str(problem) for problem in caught.value.problems]
    assert any(line.startswith(f"bases/x.toml: {field}: ") for line in said), said


def test_all_problems_are_told_at_once() -> None:
    text = baselock.dumps(LOCK).replace("size = 101", "size = 0").replace('name = "libc6"', 'name = "?"')
    with pytest.raises(LockError) as caught:
        baselock.loads(text, where="x.toml")
    assert len(caught.value.problems) == 2


def test_a_lock_tells_what_it_lacks_of_another() -> None:
    more = replace(LOCK, debs=(*LOCK.debs, a_deb("ssh", 4)))
    assert more.lacking(LOCK) == ()
    assert LOCK.lacking(more) == ("ssh",)
    newer = replace(more, debs=(a_deb("g++", 5), *more.debs[1:]))
    assert newer.lacking(LOCK) == ("g++",)


def test_a_lock_names_no_host() -> None:
    assert "://" not in baselock.dumps(LOCK)
