"""What a client asks for in JSON becomes an `Order`, or a `RefusedError` with an HTTP status and one line."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.generation.limits import check_steps
from dreambooth_moslora.generation.params import GenerationParams, draw_seed

__all__ = ["MAX_BODY_BYTES", "AdapterRef", "Drawn", "Order", "RefusedError", "parse_order"]

MAX_BODY_BYTES = 64 * 1024
"""Two prompts of the longest kind, every letter escaped."""


class RefusedError(UserError):
    """A request that is not met: `status` is that of HTTP, `retry_sec` when to ask again."""

    def __init__(self, status: int, text: str, retry_sec: int | None = None) -> None:
        super().__init__(text)
        self.status, self.retry_sec = status, retry_sec

    def __reduce__(self) -> tuple:
        return RefusedError, (self.status, str(self), self.retry_sec)


@dataclass(frozen=True)
class AdapterRef:
    """One state of an adapter's file in the catalogue. `place` is a path or URL; `version` changes with the content."""

    name: str
    place: str
    version: str

    @property
    def key(self) -> str:
        return f"{self.name}:{self.version}"


@dataclass(frozen=True)
class Order:
    """One picture to draw within `seconds`. `sha256` are the adapters' files that the client expects, by name."""

    params: GenerationParams
    sha256: Mapping[str, str] = field(default_factory=dict)
    adapters: tuple[AdapterRef, ...] = ()
    seconds: float = 120.0

    @property
    def batch_key(self) -> tuple:
        """Orders with the same key are drawn one after another: same adapters at the same scales, same size."""
        scales = tuple(scale for _, scale in self.params.adapters)
        return tuple(ref.key for ref in self.adapters), scales, self.params.height_px, self.params.width_px


@dataclass(frozen=True)
class Drawn:
    """A finished picture, and how its replica stands: loads of adapters so far and resident memory, bytes."""

    png: bytes
    replica: str
    adapter_loads: int
    memory_bytes: int
    batch_size: int


def parse_order(body: bytes) -> Order:
    """A JSON object with the fields of GenerationParams, where `adapter` and `scale` may stand for one of `adapters`,
    and `adapter_sha256` as a picture's recipe has it. Without a seed one is drawn. Raises UserError.
    """
    values = parse_object(body)
    expected = values.pop("adapter_sha256", None) or {}
    if not isinstance(expected, dict) or not all(isinstance(word, str) for word in expected.values()):
        raise UserError("adapter_sha256 must map names to digests")
    if values.get("seed") is None:
        values["seed"] = draw_seed(-1)
    name, scale = values.pop("adapter", None), values.pop("scale", None)
    if name is not None:
        if values.get("adapters"):
            raise UserError("give either adapter or adapters")
        values["adapters"] = [[name, 1.0 if scale is None else scale]]
    elif scale is not None:
        raise UserError("scale belongs to an adapter; name it with adapter")
    given = {key: value for key, value in values.items() if value is not None}
    params = GenerationParams.from_dict(given).apply_tags()
    if params.num_images != 1:
        raise UserError("one picture a request is drawn; ask again with the next seed")
    check_steps(params)
    return Order(params, expected)


def parse_object(body: bytes) -> dict[str, Any]:
    """Raises UserError for what is no JSON object: too deep, a number that is none, or bytes that are no text."""
    try:
        values = json.loads(body.decode("utf-8"), parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise UserError("the body is no valid JSON") from error
    if not isinstance(values, dict):
        raise UserError('the body must be a JSON object like {"prompt": "a dog"}')
    return values


def no_number(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")
