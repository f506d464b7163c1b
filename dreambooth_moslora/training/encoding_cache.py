"""What the frozen encoders make, kept under a key of its content: in memory, on disk, or not at all.

The key holds everything that the value depends on (the file's bytes, the crop, the encoder's weights), so a changed
photo, crop or base is encoded anew and an unchanged one never again. Values are dicts of tensors.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from dreambooth_moslora.core.run_folder import atomic_write

__all__ = ["TensorCache", "Tensors", "fingerprint"]

Tensors = dict[str, Tensor]


class TensorCache:
    """`folder` None keeps values in memory; a folder keeps one safetensors file a key, shared between runs."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._memory: dict[str, Tensors] = {}
        self.computed = 0

    def get(self, key: str, compute: Callable[[], Tensors]) -> Tensors:
        """The value under `key`; computed, and kept, when it is not there yet."""
        found = self._memory.get(key) if self.folder is None else self._read(key)
        if found is None:
            found = compute()
            self.computed += 1
            self._keep(key, found)
        return found

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, key: str) -> Tensors | None:
        """A file that was damaged from outside counts as missing."""
        try:
            return load(self._path(key).read_bytes())
        except (FileNotFoundError, SafetensorError):
            return None

    def _keep(self, key: str, value: Tensors) -> None:
        if self.folder is None:
            self._memory[key] = value
            return
        self._path(key).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self._path(key), save({name: tensor.contiguous() for name, tensor in value.items()}))


def fingerprint(module: nn.Module) -> str:
    """Identity of a model: names, shapes, dtype and the first 16 numbers of each weight (any training changes them)."""
    digest = hashlib.sha256()
    for name, weight in module.state_dict().items():
        head = weight.detach().flatten()[:16].to("cpu", torch.float64)
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}{head.tolist()}".encode())
    return digest.hexdigest()
