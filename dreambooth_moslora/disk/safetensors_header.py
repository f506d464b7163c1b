"""Header of a safetensors file: its metadata, and the names, shapes and dtypes of its tensors.

A file is the header's length in 8 bytes, the header in JSON, and the tensors' bytes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dreambooth_moslora.errors import UserError, format_error

METADATA_NAME = "__metadata__"
"""Entry of the JSON that is not a tensor."""


@dataclass(frozen=True)
class SafetensorsHeader:
    """Content of a header; shapes and dtypes by the tensor's name, dtypes as in the file: BF16."""

    metadata: dict[str, str]
    shapes: dict[str, list[int]]
    dtypes: dict[str, str]


def read_header(path: Path) -> SafetensorsHeader:
    """Return the header of a file; no tensor is read. Raises UserError for any other or damaged
    file."""
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return SafetensorsHeader(
                metadata=dict(file.metadata() or {}),
                shapes={name: tensor.get_shape() for name, tensor in slices.items()},
                dtypes={name: tensor.get_dtype() for name, tensor in slices.items()},
            )
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"it is damaged, cut short or not a safetensors file ({format_error(error)})"
        ) from None


def split_content(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header's JSON and the tensors' bytes of a whole file's content."""
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def join_content(header: dict[str, Any], tensor_bytes: bytes) -> bytes:
    """Return the content of a file; spaces let the tensors begin at a multiple of 8."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + tensor_bytes
