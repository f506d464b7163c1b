"""The settings of a service, from the command line or from a Serve config file."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.serving.access import LOOPBACK, check_token
from dreambooth_moslora.serving.client import TOKEN_VARIABLE

__all__ = ["PATIENCE", "ServeSettings", "tokens_of"]

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
