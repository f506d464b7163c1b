"""Parses a client's JSON into an `Order`, or raises a `RefusedError` with an HTTP status and one line."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dreambooth_moslora.core.errors import UserError, parse_object
from dreambooth_moslora.generation.params import GenerationParams, check_steps, draw_seed

MAX_BODY_BYTES = 64 * 1024
"""Fits two prompts of the longest kind with every letter escaped."""


class RefusedError(UserError):
    """A refused request: `status` is the HTTP status, `retry_sec` is when to ask again."""

    def __init__(self, status: int, text: str, retry_sec: int | None = None) -> None:
        super().__init__(text)
        self.status, self.retry_sec = status, retry_sec

    def __reduce__(self) -> tuple:
        return RefusedError, (self.status, str(self), self.retry_sec)


@dataclass(frozen=True)
class AdapterRef:
    """One version of an adapter's file. `place` is a path or URL; `version` changes with the content."""

    name: str
    place: str
    version: str

    @property
    def key(self) -> str:
        return f"{self.name}:{self.version}"


@dataclass(frozen=True)
class Order:
    """One picture to draw within `seconds`. `sha256` maps adapters' names to the digests that the client expects."""

    params: GenerationParams
    sha256: Mapping[str, str] = field(default_factory=dict)
    adapters: tuple[AdapterRef, ...] = ()
    seconds: float = 120.0

    @property
    def batch_key(self) -> tuple:
        """Orders with the same key can share a batch: same adapters at the same scales, same size."""
        scales = tuple(scale for _, scale in self.params.adapters)
        return tuple(ref.key for ref in self.adapters), scales, self.params.height_px, self.params.width_px


@dataclass(frozen=True)
class Drawn:
    """A finished picture and its replica's state: loads of adapters so far, and resident memory in bytes."""

    png: bytes
    replica: str
    adapter_loads: int
    memory_bytes: int
    batch_size: int


def parse_order(body: bytes) -> Order:
    """Parse a JSON object with the fields of GenerationParams. `adapter` and `scale` may stand for one of
    `adapters`; `adapter_sha256` is as in a picture's recipe. A missing seed is drawn at random. Raises
    UserError."""
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
        raise UserError("a request draws one picture; send another one with the next seed")
    check_steps(params)
    return Order(params, expected)
