"""Debian's archive: mirrors, addresses and control files, as apt says them."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest

from builder import debian
from builder.debian import Apt, Archive, Deb, Mirrors
from builder.errors import ToolError
from tests.support.archive import deb


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


# --------------------------------------------------------------------------- resolving


class SaidBefore:
    """Answers as apt does, of the packages it was given."""

    def __init__(self, *debs: Deb) -> None:
        self.debs = debs
        self.asked: list[str] = []

    def read_lists(self, suite: str) -> None:
        assert suite == "bookworm"

    def newest_list(self) -> int:
        return 7

    def run(self, *argv: str, purpose: str) -> str:
        if argv[0] == "apt-get":
            self.asked += argv[4:]
            return "".join(
                f"Inst {one.name} ({one.version} Debian:12/stable [{one.architecture}])\n" for one in self.debs
            )
        return "\n".join(
            f"Package: {one.name}\nVersion: {one.version}\nArchitecture: {one.architecture}\nFilename: {one.filename}\n"
            f"SHA256: {one.sha256}\nSize: {one.size}\n"
            for one in self.debs
        )


LIBC, TZDATA, SSH = deb("libc6", "2.36-9"), replace(deb("tzdata"), architecture="all"), deb("ssh")


def test_a_base_is_what_is_essential_and_what_is_asked_for() -> None:
    apt = SaidBefore(SSH, LIBC)
    found = Archive(cast("Apt", apt), "bookworm").resolve(["ssh"])
    assert apt.asked == ["?essential", "apt", "ssh"]
    assert found == debian.Resolution(debs=(LIBC, SSH), epoch=7)


def test_packages_are_added_to_exactly_the_locked_ones() -> None:
    moved = replace(LIBC, filename="pool/updates/main/g/glibc/libc6_2.36-9_amd64.deb")
    apt = SaidBefore(SSH, LIBC, TZDATA)
    found = Archive(cast("Apt", apt), "bookworm").extend([moved, TZDATA], ["ssh"])
    assert apt.asked == ["libc6:amd64=2.36-9", "tzdata=1-1", "ssh"]
    assert found.debs == (moved, SSH, TZDATA), "a file that moved within the archive is as it was locked"


@pytest.mark.parametrize("other", [replace(LIBC, sha256="0" * 64), replace(LIBC, version="2.36-10")])
def test_other_packages_than_the_locked_ones_are_refused(other: Deb) -> None:
    apt = SaidBefore(SSH, other)
    with pytest.raises(ToolError, match="other packages than were locked: libc6"):
        Archive(cast("Apt", apt), "bookworm").extend([LIBC], ["ssh"])


def test_downloads_come_in_batches_a_kill_may_lose() -> None:
    one = debian.Deb(name="a", version="1", architecture="all", filename="pool/a.deb", sha256="0" * 64, size=6 << 20)
    assert [len(batch) for batch in debian._batches([one] * 7)] == [3, 3, 1]
