"""Safetensors files: written atomically and in a fixed order, read without running code, refused if a value is
not finite."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dreambooth_moslora.core.atomic_files import atomic_write
from dreambooth_moslora.core.errors import UserError, one_line

__all__ = ["check_finite", "read_tensors", "with_sorted_metadata", "write_file"]


def check_finite(tensors: dict[str, Tensor], owner: str) -> None:
    """Raises UserError for NaN and infinity. `owner` begins the message."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.element_size() == 1:
            tensor = tensor.float()  # eight-bit floats have no isfinite
        if not torch.isfinite(tensor).all():
            raise UserError(f"{owner} holds NaN or infinite values, first in {key}; use an earlier checkpoint")


def write_file(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, with_sorted_metadata(save(tensors, metadata=header)))


def with_sorted_metadata(content: bytes) -> bytes:
    """The safetensors file with sorted metadata: the library's random order would give files of equal adapters
    different hashes."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header strings of a safetensors file. Raises UserError for pickles and any other file."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    with path.open("rb") as file:
        start = file.read(9)  # in a safetensors file: the header's length in 8 bytes, and its opening brace
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") and start[8:] != b"{":
        raise UserError(f"{path.name} is a pickled file, which can run code when it is opened; use a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path.name} is truncated or not a safetensors file: {one_line(error)}") from None
