#!/opt/venv/bin/python
"""Starts JupyterLab, which nobody uses without a token or a password; where none is given, it makes a token.

  torchyard-notebook [ARGUMENT ...]   serves /workspace on port 8888; arguments are those of jupyter lab
  torchyard-notebook --health         ends with 0 if the server answers, with 1 if not

  JUPYTER_TOKEN, JUPYTER_TOKEN_FILE                       the token, or a file with it
  JUPYTER_HASHED_PASSWORD, JUPYTER_HASHED_PASSWORD_FILE   what `jupyter server password` makes, or a file with it
  JUPYTER_PORT                                            another port than 8888

Without a token and a password a token is made at the first start, kept in ~/.local/share/torchyard/jupyter-token and
printed once, with the address to open. What lets people in without either is refused, wherever it is configured: the
server is looked at after it has read all its configuration, and before it answers anybody.
"""
# Jupyter is imported late: it takes a second, and neither the health check nor most refusals need it.

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import secrets
import signal
import ssl
import stat
import sys
import tempfile
import urllib.parse
import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

NAME = "torchyard-notebook"
ROOT = "/workspace"
OWN = ".local/share/torchyard"
"""Directory of the files that are this program's own, in the home directory."""
TOKEN_FILE = "jupyter-token"  # noqa: S105
ADDRESS_FILE = "jupyter-address"
FEWEST = 16
"""Characters of a token."""
FEWEST_DIFFERENT = 5
TOKEN_BYTES = 24
"""Of a token that is made here: 192 bits."""
MOST = 4096
"""Bytes of a file with a secret."""
HEALTH_S = 5.0
NEW_TOKEN = f"unset it, and a good one is made; or give {FEWEST} characters or more, such as $(openssl rand -hex 24)"
ARGON2 = re.compile(
    r"argon2:\$argon2(?:id|i|d)\$v=\d+\$m=\d+,t=\d+,p=\d+\$[A-Za-z0-9+/]{11,}\$[A-Za-z0-9+/]{22,}", re.ASCII
)
STRANGER = "https://torchyard.invalid"
"""A site that nobody can have meant to let in."""

ANNOUNCEMENTS = "@jupyterlab/apputils-extension:announcements"
"""The part of the user interface that asks whether news are wanted, whatever the server says of them."""
# What stands before the user's own arguments, so that these win. News and updates would be asked of the network.
ARGUMENTS = (
    "--no-browser",
    "--LabApp.news_url=None",
    "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate",
)


class RefusedError(Exception):
    """The server is not started: what is wrong, why, and what to do; a line each."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def tell(text: str) -> None:
    """Write a line for people."""
    sys.stderr.write(f"{NAME}: {text}\n")
    sys.stderr.flush()


# ----------------------------------------------------------------------------------------------------
# Secrets


@dataclass(frozen=True)
class Secrets:
    """What the environment gives to log in with."""

    token: str | None = None
    hashed_password: str | None = None
    source: str = ""
    """Where the token is from, for people."""


def weakness(token: str) -> str:
    """Return what is wrong with a token; empty if it will do."""
    if not token:
        return "is empty, which would let everybody in"
    if not re.fullmatch(r"[!-~]+", token):
        return "has spaces or characters that are not ASCII, which no browser or program sends as they are"
    if len(token) < FEWEST:
        return f"is too short: it has {len(token)} characters, and a guess is as good as a log-in"
    if len(set(token)) < FEWEST_DIFFERENT:
        return f"is too easy to guess: it has {len(set(token))} different characters"
    return ""


def given(environment: MutableMapping[str, str]) -> Secrets:
    """Take the secrets out of the environment, so that terminals and kernels do not have them.

    Raises RefusedError if one is not fit to be used.
    """
    token, source = _taken(environment, "JUPYTER_TOKEN")
    hashed, hashed_source = _taken(environment, "JUPYTER_HASHED_PASSWORD")
    if environment.pop("JUPYTER_PASSWORD", None) is not None:
        raise RefusedError(
            "JUPYTER_PASSWORD is not read, for a password is kept as its hash only: give JUPYTER_HASHED_PASSWORD, "
            "which `python -c 'from jupyter_server.auth import passwd; print(passwd())'` prints, or JUPYTER_TOKEN"
        )
    if token is not None and (problem := weakness(token)):
        raise RefusedError(f"{source} {problem}: {NEW_TOKEN}")
    if hashed is not None and not hashed:
        raise RefusedError(f"{hashed_source} is empty, which would let everybody in: unset it, or give the hash")
    return Secrets(token, hashed, source)


def _taken(environment: MutableMapping[str, str], name: str) -> tuple[str | None, str]:
    """Return the value that a variable or the file it names gives, and where it is from."""
    value, file = environment.pop(name, None), environment.pop(f"{name}_FILE", None)
    if value is not None and file is not None:
        raise RefusedError(f"{name} and {name}_FILE are both set: which one is meant? Unset the other")
    if file is None:
        return value, name
    source = f"{file or 'nothing'} ({name}_FILE)"
    try:
        content = _read(Path(file))
    except (OSError, ValueError) as error:
        raise RefusedError(
            f"{source} cannot be read: {_why(error)}: mount it so that uid {os.geteuid()} of group {os.getegid()} can"
        ) from error
    return content, source


def _read(path: Path, *, own: bool = False) -> str:
    """Return what a file has on its one line; raises OSError, or ValueError if it is no such file.

    One that is this program's own is made private again if it is not, and is never a link.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_NOFOLLOW if own else 0)
    descriptor = os.open(path, flags)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a file")
        if own and found.st_mode & 0o077:
            os.fchmod(descriptor, 0o600)
        content = os.read(descriptor, MOST + 1)
    finally:
        os.close(descriptor)
    if len(content) > MOST:
        raise ValueError(f"it has more than {MOST} bytes")
    return content.decode().rstrip("\r\n")


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def kept(directory: Path) -> tuple[str, bool]:
    """Return the token that the directory keeps, and whether it was made just now because it kept none."""
    path = directory / TOKEN_FILE
    new = not os.path.lexists(path) and _made(path)
    try:
        token = _read(path, own=True)
    except (OSError, ValueError) as error:
        raise RefusedError(f"{path} cannot be read: {_why(error)}: remove it, and a new token is made") from error
    if problem := weakness(token):
        raise RefusedError(f"the token in {path} {problem}: remove the file, and a new one is made")
    return token, new


def _made(path: Path) -> bool:
    """Write a new token, unless another process was quicker; nobody sees half of one."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(f"{secrets.token_hex(TOKEN_BYTES)}\n")
        try:
            os.link(name, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            Path(name).rename(path)
    finally:
        Path(name).unlink(missing_ok=True)
    return True


# ----------------------------------------------------------------------------------------------------
# Places


def temporary(environment: Mapping[str, str]) -> Path:
    """Return the place among the temporary files that this user's own files have there."""
    return Path(environment.get("TMPDIR") or "/tmp") / f"torchyard-{os.geteuid()}"  # noqa: S108


def private(environment: Mapping[str, str]) -> Path:
    """Make that place, for this user alone; raises RefusedError if that cannot be."""
    path = temporary(environment)
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise RefusedError(
            f"there is no place for Jupyter's files: {error}: mount one, --tmpfs /tmp, or a volume on the home "
            f"directory that uid {os.geteuid()} can write"
        ) from error
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise RefusedError(f"{path} is not a directory of uid {os.geteuid()} alone: remove it, or set TMPDIR")
    return path


def own_directory(environment: MutableMapping[str, str]) -> Path:
    """Return the directory of this program's own files; moves HOME to a private one if it cannot be written."""
    home = Path(environment.get("HOME") or "/")
    if _usable(home / OWN):
        return home / OWN
    other = private(environment)
    if not _usable(other / OWN):
        raise RefusedError(f"{other / OWN} cannot be written: remove {other}")
    tell(f"uid {os.geteuid()} cannot write to {home}: settings and the token are in {other} as long as that exists")
    # What was configured in the old one still holds.
    configured = [environment.get("JUPYTER_CONFIG_PATH", ""), environment.get("JUPYTER_CONFIG_DIR", f"{home}/.jupyter")]
    environment["JUPYTER_CONFIG_PATH"] = os.pathsep.join(filter(None, configured))
    environment["HOME"] = str(other)
    return other / OWN


def _usable(directory: Path) -> bool:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(directory, os.R_OK | os.W_OK | os.X_OK)


def look_at_root(root: str) -> None:
    """Look whether notebooks can be kept; raises RefusedError if they cannot even be read."""
    who = f"uid {os.geteuid()} of group {os.getegid()}"
    if not os.access(root, os.R_OK | os.X_OK):
        raise RefusedError(f"{who} cannot read {root}: mount a directory there that it can")
    if not os.access(root, os.W_OK):
        tell(f"{who} cannot write to {root}: nothing can be saved there; mount a volume that group 0 can write")


# ----------------------------------------------------------------------------------------------------
# The server


def openings(server: Any) -> Iterator[str]:
    """Yield what lets people in who have no token or password, as the server is configured in the end."""
    provider, settings = server.identity_provider, server.web_app.settings
    if type(provider) is not server.identity_class or settings.get("identity_provider") is not provider:
        yield "another identity provider is configured, which may let everybody in: leave identity_provider_class out"
        return
    for section, traits in server.cli_config.items():
        if str(traits.get("token") or ""):
            yield f"--{section}.token is seen by everybody who sees the processes: use JUPYTER_TOKEN_FILE instead"
    if provider.hashed_password and (problem := password_weakness(provider)):
        yield f"the hashed password {problem}: make one with `jupyter server password`, and leave the old one out"
    if not (provider.hashed_password and not provider.token) and (problem := weakness(provider.token)):
        yield f"the token that is configured {problem}: leave it out, and a good one is made"
    if settings.get("allow_unauthenticated_access"):
        yield "allow_unauthenticated_access opens what extensions add to everybody: leave it out"
    if not settings.get("authenticate_prometheus", True):
        yield "authenticate_prometheus=False shows /metrics to everybody: leave it out; Prometheus can send the token"
    if settings.get("disable_check_xsrf"):
        yield "disable_check_xsrf lets any web site use this server through its user's browser: leave it out"
    origin, pattern = settings.get("allow_origin"), settings.get("allow_origin_pat")
    headers = {str(name).lower(): value for name, value in (settings.get("headers") or {}).items()}
    if "*" in (origin, headers.get("access-control-allow-origin")):
        yield "the origin * lets any web site use this server through its user's browser: name sites in allow_origin"
    elif not origin and pattern and re.match(pattern, STRANGER):
        yield "allow_origin_pat is so wide that it lets in any web site: end what it names, such as https://a[.]org$"


def password_weakness(provider: Any) -> str:
    """Return what is wrong with a hashed password; empty if it will do."""
    if not provider.hashed_password.startswith("argon2:"):
        return "is not one of Argon2, and others are guessed quickly"
    if not ARGON2.fullmatch(provider.hashed_password):
        return "is not whole: a shell, or Compose, may have taken its $ for variables"
    return "is that of an empty one" if provider.passwd_check("") else ""


def without_news(handler: Any, page: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001 (a hook)
    """Take out of the user interface what asks about news, unless an argument wants them."""
    off: Sequence[str] = page.get("disabledExtensions") or ()
    if page.get("news", {}).get("disabled") and ANNOUNCEMENTS not in off:
        page["disabledExtensions"] = [*off, ANNOUNCEMENTS]
    return page


def origin_of(server: Any) -> str:
    """Return scheme, host and port of the server as seen from where it runs."""
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.ip, server.ip)
    scheme = "https" if server.certfile else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{server.port}"


@dataclass
class Door:
    """How people get in, and what has become of it."""

    given: Secrets
    directory: Path
    """Of this program's own files."""
    kept: bool = False
    """The token is the one that the directory keeps,"""
    made: bool = False
    """and it was made just now."""
    open: bool = False

    def token(self) -> str:
        """Return the token that is kept."""
        token, self.made = kept(self.directory)
        self.kept = True
        return token

    def announce(self, server: Any) -> None:
        """Say how to get in: with the token if it is new, where it is from if not."""
        token, url = server.identity_provider.token, f"{origin_of(server)}{server.default_url}"
        path = self.directory / TOKEN_FILE
        if self.made:
            tell(f"open {url}?{urllib.parse.urlencode({'token': token})}")
            tell(f"that token is kept in {path} and not printed again; after -p 127.0.0.1:9999:8888 the port is 9999")
        elif self.kept:
            tell(f"{url} asks for the token that was printed at the first start: docker exec CONTAINER cat {path}")
        elif self.given.token is not None:
            tell(f"{url} asks for the token of {self.given.source}")
        else:
            tell(f"{url} asks for the {'token' if token else 'password'} that is configured")

    def close(self) -> None:
        """Forget a new token that nobody was told."""
        if self.made and not self.open:
            (self.directory / TOKEN_FILE).unlink(missing_ok=True)


def server_class(door: Door) -> type:
    """Return Jupyter's server with other defaults, which looks at itself before it starts."""
    from jupyter_server.auth.identity import PasswordIdentityProvider
    from jupyter_server.serverapp import ServerApp
    from traitlets import default

    class Identity(PasswordIdentityProvider):
        """The secrets of the environment before those of configuration files; else the token that is kept."""

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            if door.given.hashed_password is not None:
                self.hashed_password = door.given.hashed_password
            if door.given.token is not None:
                self.token = door.given.token

        @default("token")
        def _kept_token(self) -> str:
            return door.token() if self.need_token else ""

        @default("allow_password_change")
        def _no_password_change(self) -> bool:
            return False  # the log-in page would take any, however short

    class NotebookServer(ServerApp):
        """The server."""

        identity_class = Identity

        @default("identity_provider_class")
        def _own_identity(self) -> type:
            return Identity

        @default("ip")
        def _every_interface(self) -> str:
            return "0.0.0.0"  # of the container: who publishes the port decides who sees it

        @default("port_retries")
        def _no_other_port(self) -> int:
            return 0

        @default("root_dir")
        def _workspace(self) -> str:
            return ROOT if Path(ROOT).is_dir() else str(Path.cwd())

        @default("no_browser_open_file")
        def _no_file_with_token(self) -> bool:
            return True

        @default("allow_unauthenticated_access")
        def _always_authenticated(self) -> bool:
            return False

        @default("terminado_settings")
        def _plain_shell(self) -> dict[str, list[str]]:
            # Not a log-in shell, which is Jupyter's choice: /etc/profile would set another PATH than the image's.
            return {"shell_command": [os.environ.get("SHELL") or "/bin/bash"]}

        def start(self) -> None:
            """Look, tell, and start."""
            if os.geteuid() == 0 and not self.allow_root:
                raise RefusedError("this is root: use --user 1000:0, or --allow-root if that is really meant")
            if problems := list(openings(self)):
                raise RefusedError(*problems)
            look_at_root(self.root_dir)
            self.web_app.settings.setdefault("page_config_hook", without_news)
            remember(f"{origin_of(self)}{self.base_url}api", os.environ)
            door.announce(self)
            door.open = True
            super().start()

    return NotebookServer


def serve(arguments: Sequence[str]) -> int:
    """Run JupyterLab until a signal ends it."""
    # Until Jupyter has its own handler, after a second or two.
    signal.signal(signal.SIGTERM, _end)
    # Of endpoints that do not say who may use them: here nobody may who has not logged in.
    warnings.filterwarnings("ignore", "Extension endpoints without")
    door = Door(given(os.environ), own_directory(os.environ))
    try:
        from jupyterlab.labapp import LabApp
    except ImportError as error:
        raise RefusedError(f"JupyterLab cannot be imported: {error}: pip install jupyterlab") from error
    LabApp.serverapp_class = server_class(door)
    try:
        LabApp.launch_instance([*ARGUMENTS, *arguments])
    except SystemExit as end:
        # With 1 Jupyter ends where its configuration is wrong.
        if end.code == 1 and not door.open:
            return 2
        raise
    finally:
        door.close()
    return 0


def _end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 (a handler's arguments)
    sys.exit(0)


# ----------------------------------------------------------------------------------------------------
# Health


def remember(url: str, environment: Mapping[str, str]) -> None:
    """Write down where the server answers, for the health check; in this container only, if that is possible."""
    places = [Path(environment.get("HOME") or "/") / OWN]
    with contextlib.suppress(RefusedError):
        places.insert(0, private(environment))
    for place in places:
        with contextlib.suppress(OSError):
            (place / ADDRESS_FILE).write_text(f"{url}\n", "utf-8")
            return


def remembered(environment: Mapping[str, str]) -> str:
    """Return where the server answers."""
    for place in (temporary(environment), Path(environment.get("HOME") or "/") / OWN):
        with contextlib.suppress(OSError, ValueError):
            if place.stat().st_uid == os.geteuid():
                return _read(place / ADDRESS_FILE, own=True)
    return f"http://127.0.0.1:{environment.get('JUPYTER_PORT') or 8888}/api"


def health(url: str) -> str:
    """Ask the server for its version, which it tells everybody; raises OSError or ValueError if it does not answer."""
    parts = urllib.parse.urlsplit(url)
    host, port = parts.hostname or "", parts.port
    if parts.scheme == "https":
        # Its certificate is for the name under which others know it.
        context = ssl._create_unverified_context()  # noqa: S323, SLF001
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, port, timeout=HEALTH_S, context=context
        )
    else:
        connection = http.client.HTTPConnection(host, port, timeout=HEALTH_S)
    with contextlib.closing(connection):
        connection.request("GET", parts.path)
        answer = connection.getresponse()
        document = json.loads(answer.read(MOST)) if answer.status == http.HTTPStatus.OK else None
    if not isinstance(document, dict) or "version" not in document:
        raise ValueError(f"{answer.status} {answer.reason}")
    return str(document["version"])


def report_health() -> int:
    """Say in one line whether the server answers."""
    url = remembered(os.environ)
    try:
        version = health(url)
    except (OSError, ValueError, http.client.HTTPException) as error:
        sys.stdout.write(f"{url} does not answer as it should: {str(error) or type(error).__name__}\n")
        return 1
    sys.stdout.write(f"Jupyter Server {version} answers at {url}\n")
    return 0


def main(arguments: Sequence[str]) -> int:
    """Do what was asked for and return the exit code."""
    if list(arguments) == ["--health"]:
        return report_health()
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(
            f"{__doc__}\n`jupyter lab --help` shows its arguments, `jupyter lab --help-all` all of them.\n"
        )
        return 0
    try:
        return serve(arguments)
    except RefusedError as error:
        for problem in error.problems:
            tell(problem)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
