"""Long work in pieces: each piece is a file, complete or absent, and is made only once."""

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["load_or_make"]


def load_or_make(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Load the tensors of the file; if it is missing, make and write them atomically."""
    if path.is_file():
        return load_file(path)
    tensors = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    temporary.replace(path)
    return tensors
