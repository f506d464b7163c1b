"""Training computes in bfloat16 only where the processor has instructions for it; inputs and norms agree."""

import pytest
import torch
from torch import nn

from toybox.learning.channels_last import FastGroupNorm, to_channels_last, use_fast_group_norm
from toybox.learning.training import compute_dtype

OLD_X86, NEW_X86, ARM = {"avx2": True, "avx512_bf16": False}, {"avx512_bf16": True}, {"neon": True, "bf16": True}


@pytest.mark.parametrize(("has", "dtype"), [(OLD_X86, torch.float32), (NEW_X86, torch.bfloat16), (ARM, torch.bfloat16)])
def test_inputs_and_norms_have_the_dtype_of_the_processor(monkeypatch, has, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    model = use_fast_group_norm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)))
    assert compute_dtype() == to_channels_last(torch.randn(1, 3, 8, 8)).dtype == dtype
    assert isinstance(model[1], FastGroupNorm) == (dtype == torch.bfloat16)


def test_a_gpu_and_a_pytorch_that_cannot_be_asked(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert compute_dtype() == torch.float32 and compute_dtype("cuda") == torch.bfloat16
