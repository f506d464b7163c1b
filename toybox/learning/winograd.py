"""3×3 convolutions by Winograd's minimal filtering F(4×4, 3×3) (Lavin and Gray, "Fast Algorithms
for Convolutional Neural Networks", CVPR 2016), forward and backward, for processors that train in
fp32.

A 4×4 tile of the output comes from a 6×6 window of the input by Y = Aᵀ[(G·w·Gᵀ) ⊙ (Bᵀ·x·B)]A: 36
products for each pair of channels, where a direct convolution takes 144. Over all tiles and
channels these are 36 matrix products. Both gradients are the transposes of the same steps.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from toybox.learning.training import compute_dtype

__all__ = ["WinogradConv2d", "replace_convolutions"]

TILE, WINDOW = 4, 6
MIN_CHANNELS = 64  # where it takes three quarters of the time; fewer leave less work to save


def expand_to_2d(rows: list[list[float]]) -> Tensor:
    """Expand the matrix M of a transform along one direction to M ⊗ M, which transforms flattened
    tiles."""
    matrix = torch.tensor(rows, dtype=torch.float64)
    return torch.kron(matrix, matrix).float()


INPUT_TRANSFORM = expand_to_2d(  # Bᵀ
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
WEIGHT_TRANSFORM = expand_to_2d(  # G
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
)
# Aᵀ
OUTPUT_TRANSFORM = expand_to_2d(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
)


def unfold_windows(x: Tensor) -> Tensor:
    """(N,H,W,C) -> (36, N·H/4·W/4·C): the overlapping 6×6 windows of the zero-padded input, one for
    each 4×4 tile."""
    n, h, w, c = x.shape
    padded = pad(x, (0, 0, 1, 1, 1, 1))
    image, row, column, _ = padded.stride()
    strides = (row, column, image, TILE * row, TILE * column, 1)
    return padded.as_strided((WINDOW, WINDOW, n, h // TILE, w // TILE, c), strides).reshape(
        WINDOW**2, -1
    )


def fold_windows(windows: Tensor) -> Tensor:
    """(6,6,N,H/4,W/4,C) -> (N,H,W,C): the transpose of `windows`, which adds where they overlap."""
    _, _, n, rows, columns, c = windows.shape
    windows = windows.permute(2, 3, 0, 4, 1, 5)
    padded = windows.new_zeros(n, rows + 1, TILE, columns + 1, TILE, c)
    padded[:, :rows, :, :columns] = windows[:, :, :TILE, :, :TILE]
    padded[:, 1:, :2, :columns] += windows[:, :, TILE:, :, :TILE]
    padded[:, :rows, :, 1:, :2] += windows[:, :, :TILE, :, TILE:]
    padded[:, 1:, :2, 1:, :2] += windows[:, :, TILE:, :, TILE:]
    whole = padded.view(n, TILE * (rows + 1), TILE * (columns + 1), c)
    return whole[:, 1 : TILE * rows + 1, 1 : TILE * columns + 1]


class _Convolution(torch.autograd.Function):
    """x (N,C,H,W), H and W multiples of 4, and weight (O,C,3,3), fp32 -> (N,O,H,W), channels
    last."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        (n, c, h, w), o = x.shape, len(weight)
        inputs = (INPUT_TRANSFORM @ unfold_windows(x.permute(0, 2, 3, 1))).view(WINDOW**2, -1, c)
        weights = (WEIGHT_TRANSFORM @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(
            WINDOW**2, c, o
        )
        tiles = OUTPUT_TRANSFORM @ torch.bmm(inputs, weights).view(WINDOW**2, -1)
        ctx.save_for_backward(inputs, weights)
        ctx.shape = x.shape
        y = tiles.view(TILE, TILE, n, h // TILE, w // TILE, o).permute(2, 3, 0, 4, 1, 5)
        return y.reshape(n, h, w, o).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, grad: Tensor):
        inputs, weights = ctx.saved_tensors
        (n, c, h, w), o = ctx.shape, grad.shape[1]
        tiles = (
            grad.permute(0, 2, 3, 1)
            .reshape(n, h // TILE, TILE, w // TILE, TILE, o)
            .permute(2, 4, 0, 1, 3, 5)
        )
        products = (OUTPUT_TRANSFORM.T @ tiles.reshape(TILE**2, -1)).view(WINDOW**2, -1, o)
        of_weights = WEIGHT_TRANSFORM.T @ torch.bmm(inputs.mT, products).view(WINDOW**2, -1)
        of_windows = INPUT_TRANSFORM.T @ torch.bmm(products, weights.mT).view(WINDOW**2, -1)
        of_input = fold_windows(of_windows.view(WINDOW, WINDOW, n, h // TILE, w // TILE, c))
        return of_input.permute(0, 3, 1, 2), of_weights.view(3, 3, c, o).permute(3, 2, 0, 1)


class WinogradConv2d(nn.Module):
    """Replaces a convolution and shares its parameters, so that state dicts stay the same."""

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias

    @staticmethod
    def can_replace(module: nn.Module) -> bool:
        if not isinstance(module, nn.Conv2d) or min(module.weight.shape[:2]) < MIN_CHANNELS:
            return False
        options = (
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
            module.padding_mode,
        )
        return options == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % TILE or x.shape[3] % TILE:
            return conv2d(x, self.weight, self.bias, padding=1)
        y = _Convolution.apply(x, self.weight)
        return y if self.bias is None else y + self.bias[:, None, None]


def replace_convolutions(model: nn.Module, device: str = "cpu") -> nn.Module:
    """Swap every convolution below `model` that gains by it, in place, where training on `device`
    computes in fp32."""
    if compute_dtype(device) != torch.float32:
        return model
    for name, child in model.named_children():
        if WinogradConv2d.can_replace(child):
            setattr(model, name, WinogradConv2d(child))
        else:
            replace_convolutions(child, device)
    return model
