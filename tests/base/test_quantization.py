"""The frozen UNet in few bits: what is replaced, how it is told to PEFT, and that making it costs nothing else."""

import pytest
import torch
from bitsandbytes import nn as bnb
from peft import LoraConfig
from peft.tuners.lora import bnb as peft_bnb
from torch import nn

from dreambooth_moslora.adapters.moslora import inject
from dreambooth_moslora.base.load import quantize


class Unet(nn.Module):
    """One transformer block with projections of two widths, as SDXL's are named."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.conv_in = nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(width, width)})])
        self.transformer_blocks[0]["narrow"] = nn.Linear(width, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.transformer_blocks[0]["to_q"](self.conv_in(x))


KINDS = {"nf4": (bnb.Linear4bit, peft_bnb.Linear4bit), "int8": (bnb.Linear8bitLt, peft_bnb.Linear8bitLt)}


@pytest.mark.parametrize("kind", KINDS)
def test_only_projections_in_blocks_that_the_kernels_can_take_are_quantised(kind):
    """bitsandbytes' kernels for CPUs want blocks of 32 outputs."""
    unet = Unet()
    assert quantize(unet, kind, torch.float32) == 1
    layers = unet.transformer_blocks[0]
    assert type(layers["to_q"]) is KINDS[kind][0]
    assert type(unet.conv_in) is nn.Linear and type(layers["narrow"]) is nn.Linear


@pytest.mark.parametrize("kind", KINDS)
def test_peft_adapts_the_layer_as_a_quantised_one(kind):
    """Its layer for dense weights would add the adapter's fp32 to the bf16 output, and round twice."""
    unet = Unet().to(torch.bfloat16).requires_grad_(False)
    quantize(unet, kind, torch.bfloat16)
    inject(unet, LoraConfig(r=4, target_modules=["to_q"]))
    assert type(unet.transformer_blocks[0]["to_q"]) is KINDS[kind][1]


@pytest.mark.parametrize("kind", KINDS)
def test_no_random_number_is_drawn_for_weights_that_are_thrown_away(kind):
    unet = Unet()
    before = torch.random.get_rng_state()
    quantize(unet, kind, torch.float32)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_int8_in_bf16_says_nothing_at_each_call(caplog):
    unet = Unet().to(torch.bfloat16).eval()
    quantize(unet, "int8", torch.bfloat16)
    unet(torch.randn(3, 64, dtype=torch.bfloat16))
    assert not caplog.text


def test_a_4_bit_layer_waits_where_the_dense_one_was(monkeypatch):
    """The device is for the text encoders and the VAE until training begins."""
    seen, move = [], bnb.Linear4bit.to
    monkeypatch.setattr(bnb.Linear4bit, "to", lambda self, device: seen.append(str(device)) or move(self, device))
    quantize(Unet(), "nf4", torch.float32, "cpu:0")
    assert seen == ["cpu:0", "cpu"]
