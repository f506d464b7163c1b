"""Representation alignment (REPA; Yu et al., 2024, arXiv 2410.06940) between the UNet and the CLIP
vision tower.

During training, the UNet's middle block also predicts the vision tower's features of the picture
without noise. That teaches it early what a toy is; the projection is dropped afterwards.
"""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cosine_similarity
from transformers import CLIPVisionModelWithProjection

from toybox.learning.train_clip import convert_to_clip_pixels
from toybox.learning.training import compute_dtype

__all__ = ["CELLS", "Alignment", "VisionTower"]

CELLS = 4  # in height and width, to which the middle block's are averaged


class VisionTower:
    """Frozen vision tower: pictures -> features of each of 4×4 cells."""

    def __init__(self, folder: Path, device: str = "cpu"):
        dtype = compute_dtype(device)
        self.tower = CLIPVisionModelWithProjection.from_pretrained(folder).eval().to(device, dtype)
        self.dtype, self.device = dtype, device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N,128,128,3) -> fp16 (N,160,4,4), the last layer's input."""
        states = self.tower(
            convert_to_clip_pixels(images, self.dtype).to(self.device), output_hidden_states=True
        ).hidden_states[-2]
        patches = states[:, 1:].float().cpu()
        side = round(patches.shape[1] ** 0.5)
        return adaptive_avg_pool2d(patches.mT.unflatten(2, (side, side)), CELLS).half().contiguous()


class Alignment(nn.Module):
    """Keeps the middle block's output of the last forward pass and compares it with a
    `VisionTower`."""

    def __init__(self, unet: UNet2DConditionModel, features: Tensor):
        """`features` (N,C,4,4) gives the size, mean and deviation of the features to predict."""
        super().__init__()
        channels, width = unet.config.block_out_channels[-1], features.shape[1]
        self.projection = nn.Sequential(nn.Linear(channels, 256), nn.SiLU(), nn.Linear(256, width))
        sample = features[::7].float()
        self.mean = sample.mean(dim=(0, 2, 3))
        self.std = sample.std(dim=(0, 2, 3))
        unet.mid_block.register_forward_hook(self._record_state)

    def _record_state(self, module: nn.Module, arguments: tuple, output: Tensor) -> None:
        self.state = output

    def compute_loss(self, features: Tensor) -> Tensor:
        """1 minus the mean cosine between the projected state and `features` (N,C,4,4),
        standardised."""
        predicted = self.projection(adaptive_avg_pool2d(self.state, CELLS).flatten(2).mT).float()
        target = (features.flatten(2).mT.float() - self.mean.to(features.device)) / self.std.to(
            features.device
        )
        return 1 - cosine_similarity(predicted, target, dim=-1).mean()
