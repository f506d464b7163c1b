"""Safetensors files: written atomically and in a fixed order, read without running code."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dreambooth_moslora.disk.atomic import write_atomic
from dreambooth_moslora.disk.paths import expand_user_path
from dreambooth_moslora.disk.safetensors_header import METADATA_NAME, join_content, split_content
from dreambooth_moslora.errors import UserError, format_error
from dreambooth_moslora.method.mixer import Tensors


def check_finite(tensors: Tensors, owner: str) -> None:
    """Raise UserError for NaN and infinity. `owner` begins the message."""
    for key, tensor in tensors.items():
        # 8-bit floats have no isfinite.
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise UserError(
                f"{owner} holds NaN or infinite values, first in {key}; use an earlier checkpoint"
            )


def write_safetensors(path: Path, tensors: Tensors, header: dict[str, str]) -> None:
    """Write a safetensors file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, sort_metadata(save(tensors, metadata=header)))


def sort_metadata(content: bytes) -> bytes:
    """Return the content of a safetensors file with sorted metadata, so that equal adapters have
    equal hashes."""
    header, tensor_bytes = split_content(content)
    header[METADATA_NAME] = dict(sorted(header.get(METADATA_NAME, {}).items()))
    return join_content(header, tensor_bytes)


def read_tensors(path: str | Path) -> tuple[Tensors, dict[str, str]]:
    """Return tensors and header strings of a safetensors file. Raises UserError for any other
    file."""
    path = expand_user_path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path.name} is truncated or not a safetensors file: {format_error(error)}"
        ) from None
