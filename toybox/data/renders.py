"""Rendered data set: shards of uint8 images with their scenes and captions (written by
`render_dataset`)."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["Renders", "to_pixels", "to_uint8"]


def to_pixels(images: Tensor) -> Tensor:
    """uint8 (N,H,W,3) -> fp32 (N,3,H,W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1)


def to_uint8(pixels: Tensor) -> Tensor:
    """(N,3,H,W) in [-1, 1] -> uint8 (N,H,W,3)."""
    return pixels.float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


class Renders:
    """Shards of a folder, memory-mapped: `images(indices)` and the row of each (caption, canonical,
    scene)."""

    def __init__(self, folder: Path, limit: int | None = None):
        paths = sorted(Path(folder).glob("images_*.npy"))
        if not paths:
            raise FileNotFoundError(
                f"{folder} holds no images_*.npy; run python -m toybox.data.render_dataset first"
            )
        shards = [np.load(p, mmap_mode="r") for p in paths]
        self._shards, self._size = shards, len(shards[0])
        self.rows = [
            json.loads(line)
            for p in paths
            for line in p.with_name(p.name.replace("images", "scenes"))
            .with_suffix(".jsonl")
            .read_text()
            .splitlines()
        ]
        self.count = min(limit or len(self.rows), len(self.rows))

    def __len__(self) -> int:
        return self.count

    def load_images(self, indices: Tensor | list[int]) -> Tensor:
        """uint8 (N,H,W,3)."""
        picked = [self._shards[int(i) // self._size][int(i) % self._size] for i in indices]
        return torch.from_numpy(np.stack(picked))

    def sample(self, n: int, generator: torch.Generator, held_back: int = 1000) -> Tensor:
        """n random indices; the last `held_back` images are never drawn (they are for
        evaluation)."""
        return torch.randint(self.count - held_back, (n,), generator=generator)
