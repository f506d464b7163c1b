"""The proof of an adapter file is computed in full fp32, whatever precision is allowed for speed."""

import pytest
import torch

from dreambooth_moslora.adapters import proof
from dreambooth_moslora.adapters.export import publish
from dreambooth_moslora.core import UserError
from tests.helpers.live_adapters import facts_of, live

COARSEST = {
    torch.backends.cuda.matmul: "tf32",
    torch.backends.cudnn.conv: "tf32",
    torch.backends.mkldnn.matmul: "bf16",
    torch.backends.mkldnn.conv: "bf16",
}


def precisions() -> list[str]:
    return [setting.fp32_precision for setting in COARSEST]


@pytest.fixture
def coarse():
    """Products and convolutions of GPU and CPU as coarse as PyTorch lets them be."""
    before = precisions()
    for setting, precision in COARSEST.items():
        setting.fp32_precision = precision
    yield
    for setting, precision in zip(COARSEST, before, strict=True):
        setting.fp32_precision = precision


@pytest.mark.parametrize("keep", [1.0, 0.9])
def test_every_comparison_is_in_full_fp32_and_the_settings_come_back(keep, coarse, monkeypatch, tmp_path):
    found, compare = [], proof.relative_difference

    def watched(*tensors):
        found.append(precisions())
        return compare(*tensors)

    monkeypatch.setattr(proof, "relative_difference", watched)
    components = live()
    publish(components, tmp_path, "dog", facts_of(components), keep=keep)
    assert found and all(each == ["ieee"] * 4 for each in found)
    assert precisions() == list(COARSEST.values())


def test_the_settings_come_back_after_a_refusal(coarse):
    components = live()
    reduced = {name: torch.zeros(1) for name in proof.all_layers(components, "default")}
    with pytest.raises(UserError, match="reduced in rank"):
        proof.check_reduction(components, "default", reduced, keep=0.9)
    assert precisions() == list(COARSEST.values())


@pytest.fixture
def older_switches():
    """PyTorch raises on reading one of them where the newer settings contradict it."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    yield switches
    for switch, allowed in zip(switches, before, strict=True):
        switch.allow_tf32 = allowed


@pytest.mark.parametrize("allowed", [(True, True), (False, False), (True, False), (False, True)])
def test_the_older_switches_for_tf32_can_be_read_inside_and_afterwards(allowed, older_switches):
    for switch, value in zip(older_switches, allowed, strict=True):
        switch.allow_tf32 = value
    before = precisions()
    with proof.full_fp32():
        assert [switch.allow_tf32 for switch in older_switches] == [False, False]
        assert precisions() == ["ieee"] * 4
    assert tuple(switch.allow_tf32 for switch in older_switches) == allowed and precisions() == before
