"""Debian's archive: mirrors, addresses and control files, as apt says them."""

from __future__ import annotations

from builder import debian
from builder.debian import Mirrors


def printed(*addresses: str) -> str:
    return "".join(f"'{address}' some_file 0 \n" for address in addresses)


def test_mirrors_are_read_from_what_apt_prints() -> None:
    text = printed(
        "http://other.invalid/repo/dists/nodistro/InRelease",
        "http://m.invalid/debian/dists/bookworm/InRelease",
        "http://m.invalid/debian/dists/bookworm-updates/InRelease",
        "http://m.invalid/debian/dists/bookworm/main/binary-amd64/Packages.xz",
        "http://s.invalid/debian-security/dists/bookworm-security/InRelease",
        "http://b.invalid/debian/dists/bookworm-backports/InRelease",
    )
    mirrors = Mirrors.printed(text)
    assert mirrors.archives == ("http://m.invalid/debian", "http://other.invalid/repo")
    assert mirrors.securities == ("http://s.invalid/debian-security",)
    assert Mirrors.printed("") == Mirrors(archives=(), securities=())


def test_security_updates_are_looked_for_in_both_archives() -> None:
    mirrors = Mirrors(archives=("a:",), securities=("s:",))
    tried = [address("pool/updates/main/o/x_1+2.deb") for address in mirrors.addresses()]
    assert tried == ["s:/pool/updates/main/o/x_1+2.deb", "a:/pool/main/o/x_1+2.deb"]


def test_each_archive_is_tried_with_each_security_archive() -> None:
    mirrors = Mirrors(archives=("a:", "b:"), securities=())
    assert [address("pool/x+1.deb") for address in mirrors.addresses()] == [
        *("a:/pool/x+1.deb",) * 3,
        *("b:/pool/x+1.deb",) * 3,
    ]


def test_control_fields_are_parsed() -> None:
    text = "Package: a\nDescription: x\n more: y\n\nPackage: b\nVersion: 1:2\n"
    assert list(debian.parse_stanzas(text)) == [
        {"Package": "a", "Description": "x"},
        {"Package": "b", "Version": "1:2"},
    ]


def test_downloads_come_in_batches_a_kill_may_lose() -> None:
    one = debian.Deb(name="a", version="1", architecture="all", filename="pool/a.deb", sha256="0" * 64, size=6 << 20)
    assert [len(batch) for batch in debian._batches([one] * 7)] == [3, 3, 1]
