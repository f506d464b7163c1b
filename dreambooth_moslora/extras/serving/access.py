"""The settings of the service, who may ask, and what Prometheus reads.

Who may ask: holders of a token. Without tokens, only programs of this machine may ask, over the loopback;
web pages never may.

The settings of a service, from the command line or from a Serve config file.

The metrics that Prometheus reads at `/metrics`.
"""

import hashlib
import hmac
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlsplit

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.extras.serving.orders import Drawn, RefusedError
from dreambooth_moslora.generation.remote import TOKEN_VARIABLE

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


PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60"}
"""Environment of Ray Serve, set before its start: on a busy machine its default of 5 seconds restarts the proxy
again and again."""
RANGES = {
    "port": (1, 65535),
    "replicas": (1, 1024),
    "max_waiting": (1, 100_000),
    "batch": (1, 1024),
    "resident_adapters": (1, 1024),
    "threads": (1, 1024),
    "per_gpu": (1, 64),
    "request_timeout": (1, 86400),
}


@dataclass(frozen=True)
class ServeSettings:
    """`threads` of each replica on a CPU; `per_gpu` is the number of replicas on a GPU, None without GPUs.
    Times are in seconds.

    Raises UserError for a value out of range, and for a public address without a token.
    """

    adapters: tuple[str, ...]
    pretrained_model_name_or_path: str = "toy"
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    tokens: tuple[str, ...] = ()
    max_waiting: int = 64
    request_timeout: int = 120
    batch: int = 8
    resident_adapters: int = 8
    threads: int = 1
    per_gpu: int | None = None

    def __post_init__(self) -> None:
        if not self.adapters:
            raise UserError("missing: --adapters, a folder or bucket of adapters.")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not low <= value <= high):
                raise UserError(f"--{name} {value}: must be a whole number from {low} to {high}.")
        for token in self.tokens:
            check_token(token)
        if self.host not in LOOPBACK and not self.tokens:
            raise UserError(
                f"--host {self.host} can be reached from other machines: give --token, or set {TOKEN_VARIABLE}."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ServeSettings":
        """Settings of a Serve config file, whose proxies listen on all addresses. Raises UserError for an
        unknown name."""
        if unknown := sorted(set(values) - {field.name for field in fields(cls)}):
            raise UserError(f"unknown setting {unknown[0]!r}.")
        places = values.get("adapters", ())
        adapters = (places,) if isinstance(places, str) else tuple(places)
        tokens = tokens_of(values.get("tokens", ()))
        return cls(**{"host": "0.0.0.0", **values, "adapters": adapters, "tokens": tokens})


def tokens_of(given: Any) -> tuple[str, ...]:
    """The given tokens, and the one in the environment."""
    own = os.environ.get(TOKEN_VARIABLE)
    return (*(given or ()), *([own] if own else ()))


CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)
BATCH = (1, 2, 4, 8, 16, 32)


class Telemetry:
    """Metrics of one front. They contain no prompt, adapter name or client."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        own = {"registry": self.registry, "namespace": "dreambooth"}
        self.requests = Counter("requests", "Answers to /generate", ["status"], **own)
        self.pictures = Counter("pictures", "Pictures drawn", **own)
        self.seconds = Histogram("request_seconds", "From request to picture", buckets=SECONDS, **own)
        self.batch = Histogram("batch_size", "Orders of a picture's batch", buckets=BATCH, **own)
        self.inside = Gauge("requests_inside", "Requests that wait or are drawn", **own)
        self.loads = Gauge("adapter_loads", "Adapters loaded since the replica's start", ["replica"], **own)
        self.memory = Gauge("replica_memory_bytes", "Resident memory at its last picture", ["replica"], **own)

    def note_picture(self, drawn: Drawn, seconds: float) -> None:
        self.pictures.inc()
        self.seconds.observe(seconds)
        self.batch.observe(drawn.batch_size)
        self.loads.labels(drawn.replica).set(drawn.adapter_loads)
        self.memory.labels(drawn.replica).set(drawn.memory_bytes)

    def text(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
