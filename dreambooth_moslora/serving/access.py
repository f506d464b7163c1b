"""Who may ask: holders of a token. Without tokens, only programs of this machine may ask, over the loopback;
web pages never may."""

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.serving.orders import RefusedError

__all__ = ["LOOPBACK", "Access", "check_token"]

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
OPEN = frozenset({"/healthz"})
"""Paths without a token, for load balancers."""
MIN_TOKEN_CHARACTERS = 16


class Access:
    """Each of the `tokens` opens all paths. Without tokens, only requests to a loopback host name are answered:
    a web page cannot reach the service under its own name then (DNS rebinding)."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._digests = [digest(token) for token in tokens]

    def check(self, path: str, headers: Mapping[str, str]) -> None:
        """Raises RefusedError for a request that may not be answered."""
        if "origin" in headers:
            raise RefusedError(403, "web pages may not send requests; use a program")
        if not self._digests and host_of(headers.get("host", "")) not in LOOPBACK:
            raise RefusedError(421, "unknown host; without a token only this machine is answered")
        if self._digests and path not in OPEN and not self._knows(headers.get("authorization", "")):
            raise RefusedError(401, "a token is needed: send the header `Authorization: Bearer TOKEN`")

    def _knows(self, header: str) -> bool:
        """Compares every token in constant time, so that the duration tells nothing."""
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
    """The token itself. Raises UserError when it can be guessed or cannot stand in a header."""
    if len(token) < MIN_TOKEN_CHARACTERS or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"a token needs at least {MIN_TOKEN_CHARACTERS} letters and digits, without spaces.")
    return token
