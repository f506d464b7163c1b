"""Long work in pieces, each a file that is complete or absent: what is made once is not made again."""

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["kept"]


def kept(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of the file; made, and written whole, when it is not there."""
    if path.is_file():
        return load_file(path)
    tensors = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    temporary.replace(path)
    return tensors
