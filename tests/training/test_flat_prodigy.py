"""Prodigy on long tensors is Prodigy, but for the order of two sums, and reads fewer numbers."""

import copy

import pytest
import torch
from prodigyopt import Prodigy
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dreambooth_moslora.training.optimizer import FlatProdigy

SETTINGS = {"lr": 1.0, "d0": 1e-3, "safeguard_warmup": True}


class Reads(TorchDispatchMode):
    """Counts the numbers that the program reads of tensors."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ == "_local_scalar_dense"
        return function(*args, **(kwargs or {}))


def weights_and_groups() -> tuple[list[nn.Parameter], list[dict]]:
    """One of the weights is zero at the start, as B is; one never has a gradient."""
    generator = torch.Generator().manual_seed(3)
    weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (2, 2), (5,), (3, 3), (2,))]
    nn.init.zeros_(weights[1])
    return weights, [{"params": weights[:3], "weight_decay": 0.1}, {"params": weights[3:], "weight_decay": 0.0}]


def stepped(optimizer, weights, start: int, stop: int) -> None:
    for number in range(start, stop):
        generator = torch.Generator().manual_seed(100 + number)
        for weight in weights[:4]:
            weight.grad = weight.detach() + 0.5 + 0.01 * torch.randn(weight.shape, generator=generator)
        optimizer.step()


def test_the_steps_are_prodigys_and_read_two_numbers_a_group():
    (plain, groups), (long, long_groups) = weights_and_groups(), weights_and_groups()
    one, other = Prodigy(groups, **SETTINGS), FlatProdigy(long_groups, **SETTINGS)
    stepped(one, plain, 0, 10)
    stepped(other, long, 0, 9)
    with Reads() as reads:
        stepped(other, long, 9, 10)
    assert reads.count == 4
    for expected, found in zip(plain, long, strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert one.param_groups[0]["d"] == pytest.approx(other.param_groups[0]["d"], rel=1e-6)
    assert one.param_groups[0]["d"] > 2e-3
    assert [group["params"] for group in other.param_groups] == [long[:3], long[3:]]


@pytest.mark.parametrize("kinds", [(Prodigy, FlatProdigy), (FlatProdigy, Prodigy), (FlatProdigy, FlatProdigy)])
def test_each_goes_on_from_the_others_checkpoint(kinds):
    first, second = kinds
    weights, groups = weights_and_groups()
    before = first(groups, **SETTINGS)
    stepped(before, weights, 0, 5)
    states, saved = copy.deepcopy(before.state_dict()), copy.deepcopy([weight.detach() for weight in weights])
    stepped(before, weights, 5, 8)
    fresh, groups = weights_and_groups()
    with torch.no_grad():
        for weight, value in zip(fresh, saved, strict=True):
            weight.copy_(value)
    after = second(groups, **SETTINGS)
    after.load_state_dict(states)
    stepped(after, fresh, 5, 8)
    for expected, found in zip(weights, fresh, strict=True):
        exact = first is second
        assert torch.equal(found, expected) if exact else torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_weight_that_is_reached_later_than_the_others_takes_its_first_step_then():
    (plain, groups), (long, long_groups) = weights_and_groups(), weights_and_groups()
    for optimizer, weights in ((Prodigy(groups, **SETTINGS), plain), (FlatProdigy(long_groups, **SETTINGS), long)):
        stepped(optimizer, weights, 0, 3)
        weights[4].grad = torch.ones(2)
        stepped(optimizer, weights, 3, 6)
    for expected, found in zip(plain, long, strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
