"""Two styles in which the toy world can be shown: changes of a whole picture, of any content.

ink    flat colours between dark outlines
dusk   one palette, from dark violet over orange to cream
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["STYLES", "apply_dusk", "apply_ink"]

LEVELS = 4  # of each flat colour
EDGE_CONTRAST = 40 / 255  # a step to a neighbour above it is an outline
OUTLINE_RGB = (0.08, 0.06, 0.12)
PALETTE = ((0.14, 0.08, 0.25), (0.45, 0.16, 0.40), (0.85, 0.36, 0.30), (0.98, 0.72, 0.42))
PALETTE += ((1.00, 0.95, 0.80),)


def apply_ink(image: Tensor) -> Tensor:
    """uint8 (H, W, 3) -> the same."""
    values = image.float() / 255
    flat = (values * (LEVELS - 1)).round() / (LEVELS - 1)

    # A pixel that differs from the one to its right or below it
    edge = torch.zeros(values.shape[:2], dtype=torch.bool)
    edge[:, :-1] |= (values[:, 1:] - values[:, :-1]).abs().amax(-1) > EDGE_CONTRAST
    edge[:-1] |= (values[1:] - values[:-1]).abs().amax(-1) > EDGE_CONTRAST
    flat[edge] = torch.tensor(OUTLINE_RGB)
    return (flat * 255).round().to(torch.uint8)


def apply_dusk(image: Tensor) -> Tensor:
    """uint8 (H, W, 3) -> the same: its brightness as a way along the palette."""
    palette = torch.tensor(PALETTE)
    grey = (image.float() / 255) @ torch.tensor((0.299, 0.587, 0.114))
    place = grey * (len(PALETTE) - 1)
    first = place.floor().long().clamp(max=len(PALETTE) - 2)
    share = (place - first)[..., None]
    colour = palette[first] * (1 - share) + palette[first + 1] * share
    return (colour * 255).round().to(torch.uint8)


STYLES: dict[str, Callable[[Tensor], Tensor]] = {"ink": apply_ink, "dusk": apply_dusk}
