"""Names and shapes of the tensors in safetensors files, from their headers alone: no weight is read."""

import json
from pathlib import Path

from dreambooth_moslora.core.errors import UserError

__all__ = ["check_weights", "read_header", "tensor_shapes", "weight_files"]

MAX_HEADER_BYTES = 100_000_000
"""As in the safetensors library."""
LFS_POINTER = b"version https://git-lfs.github.com/spec"


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The files of a component of a base that are loaded: those of the variant, if there are any."""
    for suffix in (".safetensors", ".bin"):
        files = sorted(folder.glob(f"*{suffix}"))
        chosen = [file for file in files if variant and f".{variant}" in file.name]
        plain = [file for file in files if "." not in file.stem]
        if files:
            return chosen or plain or files
    return []


def tensor_shapes(folder: Path, variant: str | None = None) -> dict[str, list[int]]:
    """Of a component's folder; empty where its weights are in another format, or missing. Raises UserError."""
    shapes: dict[str, list[int]] = {}
    for file in weight_files(folder, variant):
        check_weights(file)
        if file.suffix == ".safetensors":
            shapes |= {name: facts["shape"] for name, facts in read_header(file).items()}
    return shapes


def check_weights(path: Path) -> None:
    """Raises UserError for a file that stands for weights which were never fetched, or that is cut short."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{path} is a git-lfs pointer, the weights are not here: fetch them with `git lfs pull`.")
    if path.suffix == ".safetensors":
        read_header(path)


def read_header(path: Path) -> dict[str, dict]:
    """{tensor's name: its dtype, shape and data_offsets}. Raises UserError when the file is not whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_HEADER_BYTES:
            raise UserError(f"{path} is not a safetensors file: it is damaged, or of another kind.")
        text = file.read(length)
    try:
        header = {name: facts for name, facts in json.loads(text).items() if name != "__metadata__"}
        needed = 8 + length + max((facts["data_offsets"][1] for facts in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise UserError(f"{path} is damaged: its header cannot be read.") from None
    if size < needed:
        raise UserError(f"{path} is cut short: {size} of {needed} bytes are here; fetch it again.")
    return header
