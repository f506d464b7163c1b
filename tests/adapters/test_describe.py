"""What `info` and Inspect say of a file, however odd it is, and in what two adapter files differ."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dreambooth_moslora.adapters.describe import describe, difference_of
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


def test_a_foreign_file_is_described_whatever_its_kernels_are(tmp_path):
    up, down, mid = torch.eye(4)[..., None, None], torch.eye(4)[..., None, None], torch.ones(4, 4, 3, 3)
    files = {
        "plain": {"lora_up": up, "lora_down": down},
        "with a middle": {"lora_up": up, "lora_down": down, "lora_mid": mid},
        "empty": {"lora_up": up[:0], "lora_down": down},
    }
    found = {}
    for name, parts in files.items():
        tensors = {f"lora_unet_conv_in.{part}.weight": tensor.contiguous() for part, tensor in parts.items()}
        save_file(tensors, tmp_path / "x.safetensors")
        found[name] = describe(tmp_path / "x.safetensors")
    assert found["plain"]["effective_rank_median"] == 4 and found["plain"]["kind"] == "kohya keys"
    assert "effective_rank_median" not in found["with a middle"] and "LoCon" in found["with a middle"]["kind"]
    assert found["empty"]["ranks"] == {"4": 1}


TENSORS = {"a": torch.arange(4.0), "b": torch.zeros(2, 3), "s": torch.tensor(1.0)}


@pytest.fixture
def against(tmp_path):
    """The difference of TENSORS, whose header names torch 1, and other tensors."""
    save_file(TENSORS, tmp_path / "one.safetensors", metadata={"moslora": json.dumps({"versions": {"torch": "1"}})})

    def difference(changes: dict, header: str = json.dumps({"versions": {"torch": "1"}})):
        tensors = {name: tensor for name, tensor in (TENSORS | changes).items() if tensor is not None}
        save_file(tensors, tmp_path / "other.safetensors", metadata={"moslora": header})
        return difference_of(tmp_path / "one.safetensors", tmp_path / "other.safetensors")

    return difference


@pytest.mark.parametrize(
    ("changes", "first", "is_cast"),
    [
        ({}, "", False),
        ({"b": None}, "b is in one of the files alone", False),
        ({"s": torch.tensor(2.0)}, "s differs by 1.0e+00 of its norm", False),
        ({"c": torch.ones(1)}, "c is in one of the files alone", False),
        ({"b": torch.zeros(6)}, "b is [2, 3] and [6]", True),
        ({"a": torch.arange(4.0).half()}, "a is float32 and float16", True),
        ({"a": torch.tensor([0.0, 1.0, 2.0, 2.0])}, "a differs by 2.7e-01 of its norm", False),
        ({"b": -torch.zeros(2, 3)}, "b differs by 0.0e+00 of its norm", False),
    ],
)
def test_tensors_are_compared_bit_by_bit(against, changes, first, is_cast):
    """A cast is another shape or type, and no other number."""
    found = against(changes)
    assert (found.first, found.count, found.is_cast) == (first, bool(first), is_cast) and not found.header


def test_the_facts_of_a_header_are_named(against, tmp_path):
    assert against({}, json.dumps({"versions": {"torch": "2"}, "best_scale": 0.8})).header == ("best_scale", "versions")
    assert "moslora" in against({}, "{broken").header
    (tmp_path / "a.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="not a safetensors file"):
        difference_of(tmp_path / "a.safetensors", tmp_path / "a.safetensors")


def test_the_updates_are_compared_whatever_the_factors(against, tmp_path):
    """One layer of two has half its update: by hand, sqrt(0.25 / 2)."""
    same = {f"unet.{layer}.lora_{half}.weight": torch.ones(1, 1) for layer in "xy" for half in "AB"}
    halved = same | {"unet.y.lora_B.weight": torch.full((1, 1), 0.5)}
    scaled = halved | {"unet.y.lora_A.weight": torch.full((1, 1), 2.0)}
    for tensors, gap in ((halved, 0.125**0.5), (scaled, 0)):
        for name, content in (("a", same), ("b", tensors)):
            save_file(content, tmp_path / f"{name}.safetensors")
        found = difference_of(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
        assert found.of_updates == pytest.approx(gap)
    assert against({}).of_updates == against({"c": torch.ones(1)}).of_updates == float("inf")
