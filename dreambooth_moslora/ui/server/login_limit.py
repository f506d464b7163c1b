"""Limits attempts to guess passwords: after a few wrong ones the login is closed for a while."""

import time
from collections import deque
from typing import Any

from starlette.responses import PlainTextResponse

__all__ = ["PER_ADDRESS", "TOGETHER", "LoginLimit"]

WINDOW_SEC = 300.0
PER_ADDRESS = 10
TOGETHER = 100
"""Limit for all addresses together: behind a proxy a client may send any address."""
TOO_MANY = "too many wrong passwords; wait five minutes"


class LoginLimit:
    """ASGI middleware: answers 429 to a login after PER_ADDRESS wrong ones in WINDOW_SEC. Existing logins are
    not affected."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self._tries: deque[tuple[float, str]] = deque()

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].rstrip("/") != "/login":
            await self.app(scope, receive, send)
            return
        address = (scope.get("client") or ("",))[0]
        if self._is_closed(address):
            await PlainTextResponse(TOO_MANY, 429)(scope, receive, send)
            return
        attempt = (time.monotonic(), address)  # counted at once, as many may be sent together
        self._tries.append(attempt)

        async def send_and_forgive(message: dict) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400 and attempt in self._tries:
                self._tries.remove(attempt)
            await send(message)

        await self.app(scope, receive, send_and_forgive)

    def _is_closed(self, address: str) -> bool:
        while self._tries and time.monotonic() - self._tries[0][0] > WINDOW_SEC:
            self._tries.popleft()
        return len(self._tries) >= TOGETHER or sum(other == address for _, other in self._tries) >= PER_ADDRESS
