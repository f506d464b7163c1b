"""Who may ask: holders of a token, and on the loopback without one, programs of this machine but no web page."""

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.serving.orders import RefusedError

__all__ = ["LOOPBACK", "Access", "check_token"]

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
OPEN = frozenset({"/healthz"})
"""Paths that need no token: a load balancer has none."""
MIN_TOKEN_CHARACTERS = 16


class Access:
    """`tokens`: each opens everything. Without any, only names of the loopback are answered, so that no web page
    reaches the service under a name of its own (DNS rebinding).
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        self._digests = [digest(token) for token in tokens]

    def check(self, path: str, headers: Mapping[str, str]) -> None:
        """Raises RefusedError."""
        if "origin" in headers:
            raise RefusedError(403, "web pages may not ask here; send requests from a program")
        if not self._digests and host_of(headers.get("host", "")) not in LOOPBACK:
            raise RefusedError(421, "unknown host; without a token only this machine is answered")
        if self._digests and path not in OPEN and not self._knows(headers.get("authorization", "")):
            raise RefusedError(401, "a token is needed: send the header `Authorization: Bearer TOKEN`")

    def _knows(self, header: str) -> bool:
        """Every token is compared, in constant time, whichever fits."""
        kind, _, token = header.partition(" ")
        given = digest(token.strip())
        fits = [hmac.compare_digest(given, known) for known in self._digests]
        return any(fits) and kind.lower() == "bearer"


def digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def host_of(header: str) -> str | None:
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return None


def check_token(token: str) -> str:
    """Raises UserError for one that can be guessed or cannot stand in a header."""
    if len(token) < MIN_TOKEN_CHARACTERS or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"a token needs at least {MIN_TOKEN_CHARACTERS} letters and digits, without spaces.")
    return token
