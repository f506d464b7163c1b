"""`info` and Inspect on files that torch cannot compute with, or that are half there: one line, no traceback."""

import pytest
import torch
from safetensors.torch import save_file

from dreambooth_moslora.adapters.describe import describe
from dreambooth_moslora.core import UserError

NAME = "lora_unet_mid_block_attentions_0_proj_in"


def pair(dtype=torch.float32, value: float = 1.0) -> dict[str, torch.Tensor]:
    down, up = torch.full((2, 4), value, dtype=dtype), torch.full((4, 2), value, dtype=dtype)
    return {f"{NAME}.lora_down.weight": down, f"{NAME}.lora_up.weight": up}


ODD = {
    "overflow": pair(torch.float64, 1e200),
    "complex alpha": pair() | {f"{NAME}.alpha": torch.tensor(1 + 1j)},
    "up alone": {key: value for key, value in pair().items() if "up" in key} | {f"{NAME}_b.lora_mid": torch.ones(1)},
}
if hasattr(torch, "float4_e2m1fn_x2"):
    ODD["float4"] = {key: torch.zeros(4, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2) for key in pair()}


@pytest.mark.parametrize("kind", ODD)
def test_a_file_that_cannot_be_computed_with_is_refused_in_words(tmp_path, kind):
    save_file(ODD[kind], tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="is broken"):
        describe(tmp_path / "odd.safetensors")
