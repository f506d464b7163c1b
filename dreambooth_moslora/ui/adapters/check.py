"""Limits the cost of an uploaded adapter file by its size and header, before anything is loaded or computed."""

import json
from math import prod
from pathlib import Path
from typing import Any

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.ui.server.body_limit import MAX_UPLOAD_BYTES

__all__ = ["check_header", "check_upload"]

MAX_HEADER_BYTES = 8 * 1024**2
"""SDXL with all layers trained needs less than 1 MiB; large data sets add long lists of tags."""
MAX_QUOTES = 400_000
"""Quotes in a header: four for each entry of its metadata, ten for each tensor."""
MAX_WORK = 2e10
"""Sum of rank²·width over all matrices: about half a minute of one core. Rank 64 on all of SDXL is 0.8e10."""


def check_upload(source: Path) -> None:
    """Raises UserError for anything but a safetensors file of reasonable size and header."""
    if source.suffix != ".safetensors":
        raise UserError(f"{source.name} is not a .safetensors file; other formats can carry code and are not opened")
    if (size := source.stat().st_size) > MAX_UPLOAD_BYTES:
        raise UserError(f"{source.name} has {size / 2**20:.0f} MiB; at most {MAX_UPLOAD_BYTES // 2**20} are taken")
    if _work(check_header(source)) > MAX_WORK:
        raise UserError(f"{source.name}: its ranks are too high; measuring them would hold up everybody else")


def check_header(file: Path) -> bytes:
    """The header's JSON, unparsed. Raises UserError for one that takes long to parse, and OSError."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if MAX_HEADER_BYTES < length <= file.stat().st_size:
            raise UserError(f"{file.name}: its header has {length / 2**20:.0f} MiB; at most 8 are read")
        header = opened.read(min(length, MAX_HEADER_BYTES))
    if header.count(b'"') - header.count(b'\\"') > MAX_QUOTES:
        raise UserError(f"{file.name}: its header holds too many names")
    return header


def _work(header: bytes) -> float:
    """The cost of measuring the file's ranks; 0 for an unreadable header, which fails later with a reason."""
    try:
        facts = json.loads(header)
        return sum(_work_of(entry["shape"]) for key, entry in facts.items() if "lora" in key and key != "__metadata__")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return 0.0


def _work_of(shape: Any) -> float:
    low, high = sorted((shape[0], prod(shape[1:]))) if len(shape) > 1 else (0, 0)
    return float(low) ** 2 * high
