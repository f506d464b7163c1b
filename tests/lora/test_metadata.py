"""Metadata of a file, and the facts that `info` prints about odd files."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora.describe import describe
from dreambooth_moslora.lora.metadata import AdapterMetadata

NAME = "lora_unet_mid_block_attentions_0_proj_in"
STRANGE = [("trigger_words", "much"), ("subject_prompts", [1]), ("step", "last")]


@pytest.mark.parametrize(("name", "value"), STRANGE)
def test_metadata_of_another_type_is_refused(name, value):
    with pytest.raises(ValueError, match=name):
        AdapterMetadata.from_json(json.dumps({"rank": 4, "alpha": 4.0, name: value}))
    metadata = replace(AdapterMetadata(4, 4.0), step=3)
    assert (
        AdapterMetadata.from_json(metadata.to_json()) == metadata
        and "step" not in AdapterMetadata(4, 4.0).to_json()
    )


def make_pair() -> dict[str, torch.Tensor]:
    down, up = torch.ones(2, 4), torch.ones(4, 2)
    return {f"{NAME}.lora_down.weight": down, f"{NAME}.lora_up.weight": up}


ODD = {
    "complex alpha": make_pair() | {f"{NAME}.alpha": torch.tensor(1 + 1j)},
    "float4": {
        key: torch.zeros(4, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
        for key in make_pair()
    },
}


@pytest.mark.parametrize("kind", ODD)
def test_a_file_of_an_odd_dtype_is_refused(tmp_path, kind):
    save_file(ODD[kind], tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="is broken"):
        describe(tmp_path / "odd.safetensors")


def test_a_foreign_file_is_described_with_any_kernels(tmp_path):
    eye, facts = torch.eye(4)[..., None, None], {}
    plain = {"lora_up": eye, "lora_down": eye}
    changes = {
        "plain": {},
        "with a middle": {"lora_mid": torch.ones(4, 4, 3, 3)},
        "empty": {"lora_up": eye[:0]},
    }
    for name, change in changes.items():
        tensors = {
            f"lora_unet_conv_in.{part}.weight": tensor.clone()
            for part, tensor in (plain | change).items()
        }
        save_file(tensors, tmp_path / "x.safetensors")
        facts[name] = describe(tmp_path / "x.safetensors")
    assert facts["plain"]["kind"] == "kohya keys" and "LoCon" in facts["with a middle"]["kind"]
    assert facts["empty"]["ranks"] == {"4": 1}
