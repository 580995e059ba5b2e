"""Whether the image is safe to start: whom it runs as, what that user could become, and that it holds no secrets: T1.

A machine is not looked at: its users have keys, and its root is nobody's business. What is mounted into a container is
not the image's, either.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Set, Tuple

from validate.check import Probe, check
from validate.verdict import Blame, Skip

ROOT = "/"
"""Where the image's files are; the tests have trees of their own."""
SHOWN = 5
"""Paths that a finding names of many."""

Tell = Callable[..., None]


# ----------------------------------------------------------------------------------------------------
# The image's files


@dataclass(frozen=True)
class Entry:
    """A file, directory or link of the image, by its path from the image's root on."""

    path: str
    status: os.stat_result
    installed: bool
    """Whether it is part of an installation of Python, whose files come from packages that anybody can have."""


@dataclass
class Walk:
    """A walk over the image's files, and where it could not look."""

    root: str
    skipped: Set[str] = field(default_factory=set)
    """Mounts below the root."""
    closed: List[str] = field(default_factory=list)
    """Directories that this user may not list."""

    @property
    def told(self) -> str:
        """Say what was not seen; a run as root sees it."""
        return f"; only root can look into {_some(self.closed)}" if self.closed else ""

    def __iter__(self) -> Iterator[Entry]:
        todo = [("", False)]
        while todo:
            directory, installed = todo.pop()
            try:
                with os.scandir(f"{self.root.rstrip('/')}{directory}/") as opened:
                    entries = sorted(opened, key=lambda it: it.name)
            except OSError:
                self.closed.append(directory or "/")
                continue
            names = {entry.name for entry in entries}
            inside = installed or bool(names & {"pyvenv.cfg", "conda-meta"})
            below = []
            for entry in entries:
                path = f"{directory}/{entry.name}"
                if path in self.skipped:
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                yield Entry(path, status, inside)
                if stat.S_ISDIR(status.st_mode):
                    below.append((path, inside or entry.name in ("site-packages", "dist-packages")))
            todo += reversed(below)


def mounts(text: str) -> Set[str]:
    """Return the mount points in the text of /proc/self/mountinfo, but for the root."""
    found = set()
    for line in text.splitlines():
        fields = line.split(" ")
        if len(fields) > 4:
            # Blanks and line ends are written as octal numbers.
            found.add(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), fields[4]))
    return found - {"/"}


def _walk(probe: Probe) -> Walk:
    """Return a walk over what the image holds, without what this run has put beside it."""
    skipped: Set[str] = {probe.request.scratch} if ROOT == "/" else set()
    if ROOT == "/":
        with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            skipped |= mounts(file.read())
    # In a container these are mounts; where /proc cannot be read they still are not the image's.
    return Walk(ROOT, skipped | {"/proc", "/sys", "/dev"})


def _text(path: str, most: int = 1 << 16) -> Optional[str]:
    """Return the beginning of an image's file, None if this user may not read it or there is none."""
    try:
        # Not to wait for ever: a path may be a pipe.
        descriptor = os.open(f"{ROOT.rstrip('/')}{path}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    with open(descriptor, "rb") as file:  # noqa: PTH123
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        with contextlib.suppress(OSError):
            return file.read(most).decode("utf-8", "replace")
    return None


def _only_images(probe: Probe) -> None:
    """Skip the check unless it is an image that is validated."""
    if probe.request.declared is None and not probe.request.image:
        probe.skip(Skip.NOT_DECLARED, "this is a machine, not an image")


def _some(paths: List[str]) -> str:
    shown = ", ".join(path if path.isprintable() else ascii(path) for path in paths[:SHOWN])
    return shown + (f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else "")


# ----------------------------------------------------------------------------------------------------
# The user

# Set-user-id and set-group-id programs of Debian's and Ubuntu's packages, in the order of the packages' names. Those of
# sudo and polkit are missing on purpose: nothing in a container should become root.
KNOWN: Set[str] = {
    "/usr/bin/wall", "/usr/bin/write", "/usr/bin/write.ul",  # bsdutils
    "/usr/bin/crontab",  # cron
    "/usr/lib/dbus-1.0/dbus-daemon-launch-helper",  # dbus
    "/usr/bin/fusermount", "/usr/bin/fusermount3",  # fuse
    "/usr/bin/dotlockfile",  # liblockfile-bin
    "/usr/sbin/pam_extrausers_chkpwd", "/usr/sbin/unix_chkpwd",  # libpam-modules-bin
    "/usr/bin/newgrp",  # login
    "/usr/bin/mount", "/usr/bin/umount",  # mount
    "/usr/bin/ssh-agent", "/usr/lib/openssh/ssh-keysign",  # openssh-client
    "/usr/bin/chage", "/usr/bin/chfn", "/usr/bin/chsh", "/usr/bin/expiry", "/usr/bin/gpasswd",  # passwd
    "/usr/bin/passwd",
    "/usr/bin/newgidmap", "/usr/bin/newuidmap",  # uidmap
    "/usr/bin/su",  # util-linux
}  # fmt: skip
SYSTEM = ("/etc", "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/boot", "/root", "/var/lib/dpkg")
"""Nothing here is for the image's user to change: whoever can, can change what root would run."""


@check(
    "sec.user",
    title="the image's user is not root and cannot become it",
    tier=1,
    modes=("F80",),
)
def user(probe: Probe) -> None:
    """Look at the user, and at what on the file system would make more of it."""
    _only_images(probe)
    declared = probe.request.declared
    # Somebody else's image may run as root, unless the profile is one that forbids it.
    tell = probe.fail if declared is not None or probe.options.get("foreign_user") == "fail" else probe.warn
    uid, gids = os.geteuid(), {os.getegid(), *os.getgroups()}
    judge_user(None if declared is None else str(declared.get("config", {}).get("user", "")), uid, probe, tell)
    judge_passwords(_text("/etc/passwd") or "", _text("/etc/shadow"), uid, probe)
    judge_sudo(_sudoers(), tell)
    strange, mine, files = [], [], 0
    owned = _packaged()
    walk = _walk(probe)
    for entry in walk:
        files += 1
        mode = entry.status.st_mode
        if stat.S_ISREG(mode) and mode & (stat.S_ISUID | stat.S_ISGID) and not _is_known(entry.path, owned):
            strange.append(entry.path)
        if uid != 0 and _is_system(entry.path) and may_write(entry.status, uid, gids):
            mine.append(entry.path)
    if strange:
        tell(
            f"{len(strange)} programs run with the rights of another user or group",
            why=f"set-user-id or set-group-id, and of no package that is known to have such: {_some(strange)}",
            remedy="chmod a-s, or remove the package",
            blame=Blame.IMAGE,
        )
    if mine:
        tell(
            f"uid {uid} can change files of the system",
            why=_some(mine),
            remedy="chown root:root and chmod go-w; what a user installs belongs into the environment or the home",
            blame=Blame.IMAGE,
        )
    probe.saw(uid=uid, gids=sorted(gids), files=files, closed=walk.closed[:50])
    probe.detail(f"uid {uid}, {files} files{walk.told}")


def judge_user(declared: Optional[str], uid: int, probe: Probe, tell: Tell) -> None:
    """Judge whom the image declares and whom it runs as."""
    if declared is not None and not re.fullmatch(r"\d+(?::\d+)?", declared):
        tell(
            f"the image's user is {declared!r}, not a number" if declared else "the image names no user, which is root",
            why="with runAsNonRoot Kubernetes refuses what it cannot tell from root",
            remedy="USER 1000:0",
            mode="F80",
            blame=Blame.IMAGE,
        )
    elif declared is not None and int(declared.partition(":")[0]) == 0:
        tell("the image's user is root", remedy="USER 1000:0", mode="F80", blame=Blame.IMAGE)
    elif uid == 0 and declared is not None:
        probe.warn(
            f"this container runs as root, though the image's user is {declared}",
            why="it was started so",
            remedy="leave out --user, or give another one; group 0 is enough to install packages",
            blame=Blame.HOST,
        )
    elif uid == 0:
        tell("the image runs as root", remedy="USER 1000:0, and a home for that user", mode="F80", blame=Blame.IMAGE)


def judge_passwords(passwd: str, shadow: Optional[str], uid: int, probe: Probe) -> None:
    """Judge whether anybody can log in with a password; `shadow` is None if this user may not read it, as it should."""
    usable, none = [], []
    for line in [*passwd.splitlines(), *(shadow or "").splitlines()]:
        name, _, rest = line.partition(":")
        if not name or name.startswith("#") or not rest:
            continue
        secret = rest.partition(":")[0]
        if not secret:
            none.append(name)
        elif secret not in ("x", "*") and secret[0] not in "!*":
            usable.append(name)
    if none:
        probe.fail(
            f"{_some(sorted(set(none)))}: an empty password",
            why="/etc/passwd or /etc/shadow has nothing where a hash or a * belongs",
            remedy="passwd --lock NAME",
            blame=Blame.IMAGE,
        )
    if usable:
        probe.fail(
            f"{_some(sorted(set(usable)))}: a password that all who have the image share",
            why="/etc/passwd or /etc/shadow has a hash of it",
            remedy="passwd --lock NAME; give keys or tokens to containers, not to images",
            mode="F62",
            blame=Blame.IMAGE,
        )
    if shadow is not None and uid != 0:
        probe.fail(f"uid {uid} can read /etc/shadow", remedy="chmod 0640 /etc/shadow; chgrp shadow", blame=Blame.IMAGE)


def judge_sudo(rules: Mapping[str, str], tell: Tell) -> None:
    """Judge the rules of sudo, by the file they are in."""
    for path, text in sorted(rules.items()):
        lines = [line.strip() for line in text.splitlines() if not line.lstrip().startswith("#")]
        free = [line for line in lines if "NOPASSWD" in line or "!authenticate" in line]
        if free:
            tell(
                "sudo gives root's rights without a password",
                why=f"{path}: {free[0]}",
                remedy="remove sudo: what needs root belongs into the image's build",
                blame=Blame.IMAGE,
            )


def _sudoers() -> Dict[str, str]:
    directory = "/etc/sudoers.d"
    names = []
    with contextlib.suppress(OSError):
        names = sorted(os.listdir(f"{ROOT.rstrip('/')}{directory}"))  # noqa: PTH208 (py39)
    found = {path: _text(path) for path in ("/etc/sudoers", *(f"{directory}/{name}" for name in names))}
    return {path: text for path, text in found.items() if text is not None}


def _packaged() -> Optional[Set[str]]:
    """Return which of the known programs belong to a package of dpkg's; None where there is no dpkg."""
    directory = f"{ROOT.rstrip('/')}/var/lib/dpkg/info"
    try:
        names = os.listdir(directory)  # noqa: PTH208 (py39)
    except OSError:
        return None
    found: Set[str] = set()
    for name in names:
        if name.endswith(".list"):
            text = _text(f"/var/lib/dpkg/info/{name}", 16 << 20) or ""
            found.update(path for path in map(_merged, text.splitlines()) if path in KNOWN)
    return found


def _merged(path: str) -> str:
    """Return where a path lies once /bin, /sbin and /lib are links into /usr, as they are today."""
    return f"/usr{path}" if path.startswith(("/bin/", "/sbin/", "/lib")) else path


def _is_known(path: str, owned: Optional[Set[str]]) -> bool:
    merged = _merged(path)
    return merged in KNOWN and (owned is None or merged in owned)


def _is_system(path: str) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in SYSTEM)


def may_write(status: os.stat_result, uid: int, gids: Set[int]) -> bool:
    """Say whether permissions let a user other than root change a file, or what is in a directory."""
    mode = status.st_mode
    if stat.S_ISLNK(mode):
        return False
    shift = 6 if status.st_uid == uid else 3 if status.st_gid in gids else 0
    wanted = 0o3 if stat.S_ISDIR(mode) else 0o2
    # Whoever owns a file can make it writable.
    return status.st_uid == uid or (mode >> shift & wanted == wanted and not mode & stat.S_ISVTX)


# ----------------------------------------------------------------------------------------------------
# Secrets


@dataclass(frozen=True)
class Kind:
    """A kind of secret, and what to do about one."""

    name: str
    remedy: str
    mode: str = "F81"


_AT_RUN = "remove it from the image, and revoke it: everybody who has the image has it; mount it into the container"
_HOST_KEY = Kind("an SSH host key", "remove it: containers make their own at their first start", "F62")
_SESSION = Kind("a secret of a service", "remove it: containers make their own at their first start", "F62")
_PRIVATE = Kind("a private key", _AT_RUN)
_TOKEN = Kind("a token", _AT_RUN)
_PASSWORD = Kind("a password", _AT_RUN)
_CLOUD = Kind("credentials of a cloud", _AT_RUN)
_LOGIN = Kind("keys that may log in", "remove them: give authorized_keys to containers, by a mount", "F62")

BY_NAME: Tuple[Tuple[Kind, str], ...] = (
    (_PRIVATE, r"id_(?:rsa|dsa|ecdsa|ed25519)(?:_sk)?"),
    (_PRIVATE, r"\.gnupg/(?:private-keys-v1\.d/.+|secring\.gpg)"),
    (_HOST_KEY, r"ssh_host_\w+_key"),
    (_LOGIN, r"authorized_keys2?"),
    (_PASSWORD, r"[._]netrc|\.pypirc|\.git-credentials|git/credentials"),
    (_TOKEN, r"\.?huggingface/(?:token|stored_tokens)|\.kaggle/kaggle\.json"),
    (_CLOUD, r"\.aws/credentials|\.azure/(?:accessTokens|msal_token_cache)\.\w+|\.kube/config"),
    (_CLOUD, r"gcloud/(?:credentials\.db|access_tokens\.db|application_default_credentials\.json)"),
    (_SESSION, r"(?:jupyter|notebook)_cookie_secret|(?:jp|nb)server-\d+(?:-open)?\.\w+"),
    (_SESSION, r"\.local/share/torchyard/.+"),
)
"""Ends of paths, behind a slash, that tell a secret whatever is in the file."""

IN_TEXT: Tuple[Tuple[Kind, str], ...] = (
    (_PRIVATE, r"-----BEGIN (?:[A-Z]{2,9} ){0,2}PRIVATE KEY(?: BLOCK)?-----"),
    (_TOKEN, r"\bhf_[A-Za-z0-9]{30,}\b"),
    (_TOKEN, r"\bgh[opsur]_[A-Za-z0-9]{36}\b|\bgithub_pat_\w{22,}"),
    (_TOKEN, r"\bglpat-[\w-]{20,}|\bxox[abprs]-[\w-]{10,}|\bnpm_[A-Za-z0-9]{36}\b|\bpypi-AgE[\w-]{50,}"),
    (_TOKEN, r"\bsk-(?:proj-|ant-)?[\w-]{40,}|\bAIza[\w-]{35}"),
    (_CLOUD, r"\bA(?:KIA|SIA)[0-9A-Z]{16}\b|aws_secret_access_key[ \t]*[=:][ \t]*[\w/+=]{40}"),
    # Not a variable, nor what documentation writes there.
    (_PASSWORD, r"://[^\s/:@$<>{}'\"]{1,100}:(?!pass|PASS|secret|\*|x+@)[^\s/:@$<>{}'\"]{1,100}@\w"),
    (_PASSWORD, r"\bmachine[ \t]+\S{1,200}[ \t]+login[ \t]+\S{1,200}[ \t]+password[ \t]+\S|:_authToken=[\w-]{20,}"),
    (_PASSWORD, r"\"auths\"[^\0]{1,500}\"auth\"[ \t]*:[ \t]*\"[A-Za-z0-9+/]{8,}={0,2}\""),
    (
        _PASSWORD,
        r"(?:App|Provider)\.(?:token|password|hashed_password)[ \t]*=[ \t]*['\"][^'\"]{8,200}['\"]|argon2:\$argon2",
    ),
)
"""Texts that are secrets wherever they stand. What repeats has a bound, so that no text takes long."""

_ALL_NAMES = "|".join(f"(?P<k{number}>{pattern})" for number, (_, pattern) in enumerate(BY_NAME))
_NAMED = re.compile(f"/(?:{_ALL_NAMES})$")
_WRITTEN = tuple((kind, re.compile(pattern)) for kind, pattern in IN_TEXT)
_HISTORY = re.compile(r"/(?:\.\w+_history|\.lesshst|\.viminfo)$")
_CACHES = re.compile(
    r"/\.cache/(?:pip|uv)/|/conda\w*/pkgs/|^/var/lib/apt/lists/|^/var/cache/(?:dnf|yum|apk)/|^/var/cache/apt/.+\.(?:bin|deb)$"
)
_LIKELY = re.compile(
    r"^/(?:app|data|etc|home|mnt|opt|root|run|src|srv|tmp|usr/local/etc|usr/src|var/www|workspace)/|^/[^/]+$"
)
"""Places where people and builds leave files; the others are filled by packages."""
_READ = 64 << 10
"""Bytes of the largest file that is read: secrets are small."""
_READ_S = 20.0
"""For reading; a foreign image may have any number of files."""
_NOISE = 100_000
"""Bytes of caches that are not worth a word."""

_SECRET_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|SECRETS|PASSWORD|PASSWD|APIKEY|API_KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIALS)(?:_ID)?$",
    re.IGNORECASE,
)
_NO_SECRET = re.compile(r"|/.*|[01]|true|false|yes|no|none|null|\$\{?\w+\}?", re.IGNORECASE)
"""Values that are none: nothing, the path of a file, a switch, another variable."""


@check(
    "sec.secrets",
    title="the image holds no secrets",
    tier=1,
    exclusive=True,  # other checks make keys for themselves, and start programs that do
    modes=("F62", "F81"),
)
def secrets(probe: Probe) -> None:
    """Look at names everywhere, at contents where secrets are left behind, and at the image's variables and labels."""
    _only_images(probe)
    declared = probe.request.declared
    judge_settings(declared, os.environ, probe)
    found: Dict[Kind, List[str]] = {}
    histories: List[str] = []
    cached: Dict[str, int] = {}
    files, read, unread, spent = 0, 0, 0, 0.0
    walk = _walk(probe)
    for entry in walk:
        if not stat.S_ISREG(entry.status.st_mode):
            continue
        files += 1
        cache = _CACHES.search(entry.path)
        if cache:
            place = entry.path[: cache.end()].rpartition("/")[0]
            cached[place] = cached.get(place, 0) + entry.status.st_size
        if _HISTORY.search(entry.path) and entry.status.st_size:
            histories.append(entry.path)
        kind = named(entry)
        if kind is None and is_likely(entry) and spent > _READ_S:
            unread += 1
        elif kind is None and is_likely(entry):
            begun = time.monotonic()
            kind = written(_text(entry.path, _READ) or "")
            spent += time.monotonic() - begun
            read += 1
        if kind is not None:
            found.setdefault(kind, []).append(entry.path)
    for kind, paths in found.items():
        probe.fail(
            f"{kind.name} is in the image",
            why=f"{_some(paths)}: everybody who has the image has it, too",
            remedy=kind.remedy,
            mode=kind.mode,
            blame=Blame.IMAGE,
        )
    if histories:
        probe.warn(
            "what was typed while the image was made is in it",
            why=f"{_some(histories)}: passwords are among such lines at times",
            remedy="remove it in the step that makes it",
            blame=Blame.IMAGE,
        )
    if sum(cached.values()) > _NOISE:
        places = ", ".join(f"{place}: {size / 1e6:.1f} MB" for place, size in sorted(cached.items()))
        probe.warn(
            "caches of package managers are in the image",
            why=places,
            remedy="pip install --no-cache-dir; rm -rf /var/lib/apt/lists/* in the step that runs apt-get update",
            blame=Blame.IMAGE,
        )
    if unread:
        probe.warn(
            f"{unread} files were not read",
            why=f"{read} others took {spent:.0f} s",
            remedy="keep data out of the image, on a volume",
            blame=Blame.UNKNOWN,
        )
    probe.saw(files=files, read=read, unread=unread, cached=cached, closed=walk.closed[:50])
    probe.detail(f"{files} files, {read} of them read{walk.told}")


def named(entry: Entry) -> Optional[Kind]:
    """Return the kind of secret that a file is by its name; packages' tests have keys that are known to everybody."""
    match = _NAMED.search(entry.path)
    if match is None or not entry.status.st_size or (entry.installed and "/test" in entry.path):
        return None
    assert match.lastgroup is not None
    return BY_NAME[int(match.lastgroup[1:])][0]


def is_likely(entry: Entry) -> bool:
    """Say whether a file is worth reading."""
    return not entry.installed and 0 < entry.status.st_size <= _READ and bool(_LIKELY.search(entry.path))


def written(text: str) -> Optional[Kind]:
    """Return the kind of secret that stands in a text."""
    return next((kind for kind, pattern in _WRITTEN if pattern.search(text)), None)


def judge_settings(declared: Optional[Mapping[str, Any]], environment: Mapping[str, str], probe: Probe) -> None:
    """Judge the image's variables and labels.

    What is in this process's environment and not among the image's variables was given to the container.
    """
    config: Mapping[str, Any] = (declared or {}).get("config", {})
    own: Mapping[str, str] = config.get("env", {}) if declared is not None else environment
    labels: Mapping[str, str] = config.get("labels", {})
    for what, values in (("variable", own), ("label", labels)):
        for name in sorted(name for name, value in values.items() if is_secret(name, value)):
            probe.fail(
                f"the image's {what} {name} holds a secret",
                why="everybody who has the image has it, too",
                remedy="remove and revoke it; give it to containers: docker run -e, or a file at /run/secrets",
                mode="F81",
                blame=Blame.IMAGE,
            )
    words = " ".join(map(str, (*config.get("entrypoint", ()), *config.get("cmd", ()))))
    if written(words) is not None:
        probe.fail("the image's command holds a secret", remedy=_AT_RUN, mode="F81", blame=Blame.IMAGE)


def is_secret(name: str, value: str) -> bool:
    """Say whether a variable or label holds a secret, by its name or by what is in it."""
    if written(value) is not None:
        return True
    return bool(_SECRET_NAME.search(name.replace(".", "_").replace("-", "_"))) and not _NO_SECRET.fullmatch(value)
