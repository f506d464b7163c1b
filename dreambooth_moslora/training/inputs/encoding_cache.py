"""Outputs of the frozen encoders, cached by a digest of their inputs: in memory or on disk.

The key covers everything that a value depends on (the file's bytes, the crop, the encoder's weights). A changed
photo, crop or base is encoded anew, an unchanged one never again. Values are dicts of tensors. On disk the
file's header holds a digest of the tensors; a file that does not match it is encoded anew.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save
from torch import Tensor, nn

from dreambooth_moslora.core.atomic_files import atomic_write

__all__ = ["TensorCache", "Tensors", "fingerprint"]

Tensors = dict[str, Tensor]
DIGEST = "sha256"


class TensorCache:
    """With a `folder`, values are kept in one safetensors file per key, shared between runs; with None, in memory."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._memory: dict[str, Tensors] = {}
        self.computed = 0

    def get(self, key: str, compute: Callable[[], Tensors]) -> Tensors:
        """The value under `key`; it is computed and kept if missing."""
        found = self._memory.get(key) if self.folder is None else self._read(key)
        if found is None:
            found = compute()
            self.computed += 1
            self._keep(key, found)
        return found

    def put(self, key: str, value: Tensors) -> None:
        """Keep a value that another process has computed, unless this one has it already."""
        if key not in self._memory if self.folder is None else self._read(key) is None:
            self._keep(key, value)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, key: str) -> Tensors | None:
        """The tensors on disk; None if the file is missing, unreadable, damaged or empty."""
        try:
            content = self._path(key).read_bytes()
            tensors = load_tensors(content)
        except (OSError, SafetensorError):
            return None
        return tensors if tensors and digest_in(content) == digest_of(tensors) else None

    def _keep(self, key: str, value: Tensors) -> None:
        if self.folder is None:
            self._memory[key] = value
            return
        self._path(key).parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in value.items()}
        atomic_write(self._path(key), save(tensors, metadata={DIGEST: digest_of(tensors)}))


def digest_of(tensors: Tensors) -> str:
    """SHA-256 of the names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def digest_in(content: bytes) -> str | None:
    """The digest in the header of a valid safetensors file; None without one."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]).get("__metadata__", {}).get(DIGEST)


def fingerprint(module: nn.Module) -> str:
    """Digest of a model: names, shapes, dtype and the first 16 numbers of each weight (any training changes them)."""
    digest = hashlib.sha256()
    for name, weight in module.state_dict().items():
        head = weight.detach().flatten()[:16].to("cpu", torch.float64)
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}{head.tolist()}".encode())
    return digest.hexdigest()
