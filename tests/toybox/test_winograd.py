"""Winograd's convolution: values and gradients are the direct one's, and where it is taken."""

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from toybox.learning import winograd
from toybox.learning.train_unet import build_unet
from toybox.learning.winograd import WinogradConv2d, replace_convolutions


@pytest.mark.parametrize(
    ("height", "width", "is_last"), [(8, 8, True), (12, 16, True), (4, 8, False)]
)
def test_values_and_gradients_equal_the_direct_convolutions(height, width, is_last):
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 72, 3, padding=1)
    x = torch.randn(3, 64, height, width)
    x = (x.to(memory_format=torch.channels_last) if is_last else x).requires_grad_()
    y = WinogradConv2d(layer)(x)
    grad = torch.randn_like(y)
    gradients = torch.autograd.grad(y, (x, layer.weight, layer.bias), grad)
    exact = [v.detach().double().requires_grad_() for v in (x, layer.weight, layer.bias)]
    expected = conv2d(*exact, padding=1)
    torch.testing.assert_close(y.double(), expected, atol=2e-5, rtol=1e-5)
    for gradient, expected_gradient in zip(
        gradients, torch.autograd.grad(expected, exact, grad.double())
    ):
        assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


def test_other_sizes_are_convolved_directly():
    layer = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    x = torch.randn(1, 64, 6, 8)
    assert torch.equal(WinogradConv2d(layer)(x), layer(x))


OTHERS = [
    nn.Conv2d(64, 64, 1),
    nn.Conv2d(64, 64, 3),
    nn.Conv2d(64, 64, 3, stride=2, padding=1),
    nn.Conv2d(64, 64, 3, padding=1, dilation=2),
    nn.Conv2d(128, 128, 3, padding=1, groups=2),
    nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular"),
    nn.Conv2d(4, 64, 3, padding=1),
    nn.Linear(64, 64),
]


@pytest.mark.parametrize("layer", OTHERS, ids=str)
def test_only_the_convolution_that_it_computes_is_replaced(layer, monkeypatch):
    monkeypatch.setattr(winograd, "compute_dtype", lambda device: torch.float32)
    assert replace_convolutions(nn.Sequential(layer))[0] is layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_unet_predicts_the_same_where_bfloat16_is_emulated(dtype, monkeypatch):
    monkeypatch.setattr(winograd, "compute_dtype", lambda device: dtype)
    torch.manual_seed(0)
    unet = build_unet().eval()
    added = {"text_embeds": torch.randn(2, 160), "time_ids": torch.ones(2, 6)}
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([5, 700]), torch.randn(2, 77, 256)
    with torch.no_grad():
        before, names = unet(*inputs, added_cond_kwargs=added).sample, set(unet.state_dict())
        replace_convolutions(unet)
        after = unet(*inputs, added_cond_kwargs=added).sample
    assert set(unet.state_dict()) == names
    assert sum(isinstance(m, WinogradConv2d) for m in unet.modules()) == (
        24 if dtype is torch.float32 else 0
    )
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
