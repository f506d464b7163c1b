"""Which layers of a frozen base are quantised, and where."""

import pytest
import torch
from bitsandbytes import nn as bnb
from peft import LoraConfig
from peft.tuners.lora import bnb as peft_bnb
from torch import nn

from dreambooth_moslora.base.quantization import quantize
from dreambooth_moslora.method.moslora import inject

KINDS = {
    "nf4": (bnb.Linear4bit, peft_bnb.Linear4bit),
    "int8": (bnb.Linear8bitLt, peft_bnb.Linear8bitLt),
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
def test_only_projections_in_blocks_that_the_kernels_can_take_are_quantised(
    kind, caplog, monkeypatch
):
    """bitsandbytes' kernels for CPUs want blocks of 32 outputs. PEFT adapts the layer as a
    quantised one: its layer for dense weights would add the adapter's fp32 to the bf16 output, and
    round twice. A 4-bit layer waits where the dense one was: the device is for the text encoders
    and the VAE until training begins."""
    unet, before = (
        Unet().to(torch.bfloat16).requires_grad_(False).eval(),
        torch.random.get_rng_state(),
    )
    assert quantize(unet, kind, torch.bfloat16) == 1
    assert torch.equal(torch.random.get_rng_state(), before), (
        "drawn for weights that are thrown away"
    )
    layers = unet.transformer_blocks[0]
    assert type(layers["to_q"]) is KINDS[kind][0]
    assert type(unet.conv_in) is nn.Linear and type(layers["narrow"]) is nn.Linear
    unet(torch.randn(3, 64, dtype=torch.bfloat16))
    assert not caplog.text
    inject(unet, LoraConfig(r=4, target_modules=["to_q"]))
    assert type(layers["to_q"]) is KINDS[kind][1]
    seen, move = [], bnb.Linear4bit.to
    monkeypatch.setattr(
        bnb.Linear4bit, "to", lambda self, device: seen.append(str(device)) or move(self, device)
    )
    quantize(Unet(), "nf4", torch.float32, "cpu:0")
    assert seen == ["cpu:0", "cpu"]
