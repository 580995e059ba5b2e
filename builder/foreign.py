"""Foreign text: how what others wrote, or what was asked of them, may be shown in an error."""

from __future__ import annotations

import re
from urllib.parse import urlsplit, urlunsplit


def quoted(text: object) -> str:
    """Return foreign text as it may be printed: quoted, on one line, and not long."""
    shown = ascii(text)
    return shown if len(shown) <= 120 else f"{shown[:117]}…'"


def without_credentials(url: str) -> str:
    """Return `url` as it may be shown: without user and password, and without a query, which may be a signature."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def reason(error: BaseException) -> str:
    """Say the innermost cause in one line, without addresses of objects, credentials or queries."""
    cause: BaseException = error
    for _ in range(10):
        inner = getattr(cause, "reason", None) or cause.__cause__ or (cause.args[0] if cause.args else None)
        if not isinstance(inner, BaseException):
            break
        cause = inner
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code} from {without_credentials(response.url)}"
    text = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
    return re.sub(r"\?\S+", "?…", text.rsplit(">: ", 1)[-1])
