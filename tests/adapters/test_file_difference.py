"""In what two adapter files differ."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dreambooth_moslora.adapters.describe import difference_of
from dreambooth_moslora.core import UserError

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
    ("changes", "first"),
    [
        ({}, ""),
        ({"b": None}, "b is in one of the files alone"),
        ({"s": torch.tensor(2.0)}, "s differs by 1.0e+00 of its norm"),
        ({"c": torch.ones(1)}, "c is in one of the files alone"),
        ({"b": torch.zeros(6)}, "b is [2, 3] and [6]"),
        ({"a": torch.arange(4.0).half()}, "a is float32 and float16"),
        ({"a": torch.tensor([0.0, 1.0, 2.0, 2.0])}, "a differs by 2.7e-01 of its norm"),
        ({"b": -torch.zeros(2, 3)}, "b differs by 0.0e+00 of its norm"),
    ],
)
def test_tensors_are_compared_bit_by_bit(against, changes, first):
    found = against(changes)
    assert found.first == first and found.count == bool(first) and not found.header


def test_the_facts_of_a_header_are_named(against):
    assert against({}, json.dumps({"versions": {"torch": "2"}, "best_scale": 0.8})).header == ("best_scale", "versions")
    assert "moslora" in against({}, "{broken").header


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


def test_another_shape_or_type_is_told_apart_from_other_numbers(against):
    assert against({"a": torch.arange(4.0).half()}).is_cast and against({"b": torch.zeros(6)}).is_cast
    assert not against({"a": torch.ones(4)}).is_cast and not against({"b": None}).is_cast


def test_a_broken_file_is_said(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="not a safetensors file"):
        difference_of(tmp_path / "a.safetensors", tmp_path / "a.safetensors")
