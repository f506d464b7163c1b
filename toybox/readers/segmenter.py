"""Finds the pixels of a toy: the toy world's segmentation net, a small U-Net (Ronneberger et al., 2015).

    from toybox.readers import segmenter
    logits = segmenter.load(folder).logits(pixels)  # (N,3,H,W) in [-1, 1] -> (N,H,W), above 0 at toys

`toybox.learning.train_segmenter` trains it on renders.
"""

from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate, pixel_shuffle, pixel_unshuffle

__all__ = ["FILE", "SIZE_PX", "Segmenter", "load"]

FILE = "model.safetensors"
SIZE_PX = 128
"""Shorter side of its training pictures."""
PATCH = 2
"""The pixels of 2 x 2 patches become channels of one position: a quarter of the work for the same outline."""
WIDTHS = (24, 32, 40, 48)
STRIDE = PATCH * 2 ** (len(WIDTHS) - 1)


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
    )


class Segmenter(nn.Module):
    """Pixels (N,3,H,W) in [-1, 1], sides multiples of 16 -> logits (N,H,W).

    Each halving of the sides is followed by a bilinear doubling, to which the features of that size are added.
    """

    def __init__(self):
        super().__init__()
        pairs = list(pairwise(WIDTHS))
        self.stem = _convolution(3 * PATCH**2, WIDTHS[0])
        self.down = nn.ModuleList(nn.Sequential(_convolution(a, b, 2), _convolution(b, b)) for a, b in pairs)
        self.narrow = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in reversed(pairs))
        self.up = nn.ModuleList(_convolution(a, a) for a, _ in reversed(pairs))
        self.head = nn.Conv2d(WIDTHS[0], PATCH**2, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        levels = [self.stem(pixel_unshuffle(pixels, PATCH))]
        for down in self.down:
            levels.append(down(levels[-1]))
        x = levels.pop()
        for narrow, up in zip(self.narrow, self.up):
            x = interpolate(narrow(x), scale_factor=2, mode="bilinear")
            x = up(x + levels.pop())
        return pixel_shuffle(self.head(x), PATCH)[:, 0]

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        """(N,3,H,W) of any size -> (N,H,W); computed with the shorter side scaled to about 128 px."""
        sides = pixels.shape[-2:]
        scale = SIZE_PX / min(sides)
        seen = [max(STRIDE, round(side * scale / STRIDE) * STRIDE) for side in sides]
        small = interpolate(pixels, size=seen, mode="bilinear", antialias=True)
        return interpolate(self(small)[:, None], size=sides, mode="bilinear")[:, 0]


def load(folder: Path) -> Segmenter:
    """The net of `folder`, in fp32."""
    net = Segmenter().eval().requires_grad_(False)
    net.load_state_dict({name: tensor.float() for name, tensor in load_file(Path(folder) / FILE).items()})
    return net
