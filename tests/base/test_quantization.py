"""Which layers of a frozen base are quantised, and where; how near those in 8 bit come."""

import subprocess
import sys
import weakref

import pytest
import torch
from bitsandbytes import nn as bnb
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.lora import bnb as peft_bnb
from torch import nn

from benchmarks.meta_count import Counter
from dreambooth_moslora.base import quantization
from dreambooth_moslora.base.int8 import Int8Linear, dequantize_weight, quantize_weight
from dreambooth_moslora.base.quantization import list_block_layers, quantize
from dreambooth_moslora.disk.paths import get_assets_folder
from dreambooth_moslora.method.moslora import inject

KINDS = {
    "nf4": (bnb.Linear4bit, peft_bnb.Linear4bit),
    "int8": (Int8Linear, lora.Linear),
}


class Unet(nn.Module):
    """One transformer block with projections of two widths, as SDXL's are named."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.conv_in = nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(width, width)})])
        self.transformer_blocks[0]["narrow"] = nn.Linear(width, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.transformer_blocks[0]["to_q"](self.conv_in(x))


@pytest.mark.parametrize("kind", KINDS)
def test_only_projections_in_blocks_are_quantised(kind, caplog, monkeypatch):
    """bitsandbytes' kernels for CPUs need multiples of 32 outputs. PEFT must adapt a layer in 4
    bit as a quantised one, and a layer stays on its device."""
    unet = Unet().to(torch.bfloat16).requires_grad_(False).eval()
    quantize(unet, kind, torch.bfloat16)
    layers = unet.transformer_blocks[0]
    assert type(layers["to_q"]) is KINDS[kind][0]
    assert type(unet.conv_in) is nn.Linear and type(layers["narrow"]) is nn.Linear
    unet(torch.randn(3, 64, dtype=torch.bfloat16))
    assert not caplog.text
    inject(unet, LoraConfig(r=4, target_modules=["to_q"]))
    assert type(layers["to_q"]) is KINDS[kind][1]
    devices, move = [], bnb.Linear4bit.to
    monkeypatch.setattr(
        bnb.Linear4bit, "to", lambda self, device: devices.append(str(device)) or move(self, device)
    )
    quantize(Unet(), "nf4", torch.float32, "cpu:0")
    assert devices == ["cpu:0", "cpu"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_layer_is_forgotten_before_the_next_is_quantised(kind, monkeypatch):
    """All dense blocks together may not fit onto the device."""
    unet = Unet()
    blocks = [nn.ModuleDict({"to_q": nn.Linear(64, 64)}) for _ in range(4)]
    unet.transformer_blocks = nn.ModuleList(blocks)
    dense = [weakref.ref(block["to_q"]) for block in blocks]
    del blocks
    live_counts = []
    pack = quantization.quantize_layer

    def count_and_pack(*args, **options):
        live_counts.append(sum(layer_ref() is not None for layer_ref in dense))
        return pack(*args, **options)

    monkeypatch.setattr(quantization, "quantize_layer", count_and_pack)
    quantize(unet, kind, torch.float32)
    # A local variable may still refer to the previous layer.
    assert live_counts in ([4, 3, 2, 1], [4, 4, 3, 2])

    # And it is not moved: its weights are, and go again.
    layer = nn.Linear(64, 64)
    Int8Linear(layer, torch.float32, "meta")
    assert layer.weight.device.type == "cpu"


def test_8_bit_loses_under_one_percent_of_a_trained_base():
    unet = UNet2DConditionModel.from_pretrained(get_assets_folder() / "toy-sdxl" / "unet")
    layers = [layer for _, layer in list_block_layers(unet) if isinstance(layer, nn.Linear)]
    weights = torch.cat([layer.weight.detach().flatten() for layer in layers])
    restored = [
        dequantize_weight(*quantize_weight(layer.weight.detach(), torch.bfloat16)).flatten()
        for layer in layers
    ]
    error = (torch.cat(restored) - weights).norm() / weights.norm()
    assert float(error) == pytest.approx(0.0066, abs=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_outlier_coarsens_its_group_alone(dtype):
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    weight[0, 3], weight[1] = 1000.0, 0.0
    restored = dequantize_weight(*quantize_weight(weight, dtype)).float()
    assert (restored[2:] - weight[2:]).norm() < 0.01 * weight[2:].norm()
    assert (restored[0, 128:] - weight[0, 128:]).norm() < 0.01 * weight[0, 128:].norm()
    assert restored[0, 3] == pytest.approx(1000, rel=0.01) and not restored[1].any()
    assert restored.isfinite().all()


ON_A_GPU = """
import os, torch
from dreambooth_moslora.base.int8 import dequantize_weight, quantize_weight
from tests.helpers.python_gpu import DEVICE

for dtype in (torch.float32, torch.bfloat16, torch.float16):
    weight, scales = quantize_weight(torch.randn(8, 256), dtype)
    there = dequantize_weight(weight.to(DEVICE), scales.to(DEVICE))
    assert there.dtype == dtype and torch.equal(there.cpu(), dequantize_weight(weight, scales))
print("equal", flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_8_bit_weights_are_the_same_on_a_gpu():
    output = subprocess.check_output([sys.executable, "-c", ON_A_GPU], text=True)
    assert output.strip().splitlines()[-1] == "equal"


def test_8_bit_weights_are_dequantized_in_one_kernel_on_a_gpu():
    weight = torch.empty(8, 256, dtype=torch.int8, device="meta")
    scales = torch.empty(8, 2, 1, dtype=torch.bfloat16, device="meta")
    with Counter() as counter:
        assert dequantize_weight(weight, scales).dtype == torch.bfloat16
    assert counter.kernels == 1


def test_an_8_bit_layer_computes_as_its_dense_weights():
    """Outputs and gradients are equal bit for bit, also for activations beyond the range of
    fp16."""
    torch.manual_seed(0)
    dense = nn.Linear(64, 96).to(torch.bfloat16).requires_grad_(False)
    layer = Int8Linear(dense, torch.bfloat16, "cpu")
    dense.weight.data = layer.dequantize()
    assert layer.weight.nbytes + layer.scales.nbytes < 0.52 * dense.weight.nbytes
    x = (1e5 * torch.randn(3, 5, 64)).to(torch.bfloat16)
    results, saved_dtypes = [], []
    for model in (dense, layer):
        inputs = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda saved: saved_dtypes.append(saved.dtype) or saved, lambda saved: saved
        ):
            outputs = model(inputs)
        outputs.float().square().sum().backward()
        results.append((outputs, inputs.grad))
    assert all(map(torch.equal, *results)) and results[0][0].isfinite().all()
    assert saved_dtypes == [torch.bfloat16, torch.int8, torch.bfloat16]
