"""A step on working copies gives the gradients of the layers themselves, and leaves nothing behind."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dreambooth_moslora.adapters.fast_linear import WorkingCopies, disable_fast_path, enable_fast_path
from dreambooth_moslora.adapters.mixer import MixerLinear
from dreambooth_moslora.adapters.moslora import adapter_layers, disabled
from tests.adapters.test_fused_linear import Block, adapted, assert_same, unet_loss
from tests.helpers.tiny import tiny_unet

KINDS = {
    "learnt mixer": {},
    "no mixer": {"mixer": "none"},
    "frozen mixer": {"train_mixer": False},
    "scale": {"lora_alpha": 1, "use_rslora": True},
    "ranks and scales": {"rank_pattern": {"to_k": 5, "attn2.to_v": 1}, "alpha_pattern": {"to_q": 1}},
    "convolutions": {"target_modules": ["to_q", "to_v", "conv1", "conv_shortcut"]},
}


def given(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def plain_step(model: nn.Module, losses: list[Callable]) -> dict[str, torch.Tensor]:
    """Gradients of the sum of losses, each with a backward pass of its own."""
    for loss in losses:
        loss(model).backward()
    return given(model)


def step_on_copies(model: nn.Module, losses: list[Callable]) -> dict[str, torch.Tensor]:
    with WorkingCopies(model).for_one_step() as copies:
        for loss in losses:
            loss(model).backward()
            copies.collect()
    return given(model)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_gradients_are_those_of_pefts_own_layers(options, micro_batches, recomputed):
    general = adapted(tiny_unet().double(), **options).double().train()
    fast = copy.deepcopy(general)
    enable_fast_path(fast)
    if recomputed:
        fast.enable_gradient_checkpointing()
    losses = [unet_loss, lambda unet: 3 * unet_loss(unet).sqrt()][:micro_batches]
    assert_same(step_on_copies(fast, losses), plain_step(general, losses), 1e-8)


@pytest.mark.parametrize("options", [KINDS["learnt mixer"], KINDS["no mixer"], KINDS["scale"]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)])
def test_fp32_adapters_on_a_base_of_either_dtype_get_fp32_gradients(options, dtype, tolerance):
    """In bf16 both round at the same places; sums over micro-batches are in fp32."""
    plain = adapted(Block(), **options)
    for layer in (plain.to_q, plain.to_k):
        layer.base_layer.to(dtype)
    enable_fast_path(plain)
    fast = copy.deepcopy(plain)
    inputs = [torch.randn(64, 12, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (1, 2)]
    losses = [lambda block, x=x: block(x).float().square().sum() for x in inputs]
    assert_same(step_on_copies(fast, losses), plain_step(plain, losses), tolerance)
    assert {p.dtype for p in fast.parameters() if p.requires_grad} == {torch.float32}


def test_gradients_lie_in_memory_as_their_parameters_do():
    """A fused optimizer wants it so."""
    for options in (KINDS["learnt mixer"], KINDS["no mixer"]):
        model = adapted(Block(), **options)
        enable_fast_path(model)
        step_on_copies(model, [lambda block: block(torch.ones(4, 12)).sum()])
        assert all(p.grad.stride() == p.stride() for p in model.parameters() if p.requires_grad)


def test_a_layer_that_is_not_used_has_no_gradient():
    model = adapted(Block())
    enable_fast_path(model)
    found = step_on_copies(model, [lambda block: block.to_q(torch.ones(4, 12)).sum()])
    assert {name.split(".")[0] for name in found} == {"to_q"}


def test_layers_of_the_general_path_and_calls_that_take_it_keep_their_gradients():
    model = adapted(Block())
    enable_fast_path(model)
    x = torch.randn(4, 12)
    wanted = {name: 2 * grad for name, grad in plain_step(copy.deepcopy(model), [lambda b: b(x).sum()]).items()}

    def both_ways(block: Block) -> torch.Tensor:
        names = {"adapter_names": ["default"] * 4}
        return block(x).sum() + (block.to_q(x, **names).tanh() * block.to_k(x, **names)).sum()

    assert_same(step_on_copies(model, [both_ways]), wanted, 1e-5)


def test_the_product_is_made_once_for_all_micro_batches_and_recomputations(monkeypatch):
    products = []
    monkeypatch.setattr(MixerLinear, "product", lambda self: products.append(self))
    model = adapted(tiny_unet()).train()
    model.enable_gradient_checkpointing()
    assert enable_fast_path(model)
    step_on_copies(model, [unet_loss] * 2)
    assert not products


def test_a_switched_off_adapter_gives_the_base_bit_for_bit_during_a_step():
    model = adapted(Block())
    enable_fast_path(model)
    x = torch.randn(6, 12)
    with WorkingCopies(model).for_one_step():
        live = model.to_q(x)
        with disabled(model):
            assert torch.equal(model.to_q(x), model.to_q.base_layer(x))
        assert torch.equal(model.to_q(x), live) and not torch.equal(live, model.to_q.base_layer(x))


def test_an_adapter_that_moved_is_never_seen_as_it_was():
    """After a step, after one that failed, and in the next one."""
    model = adapted(Block())
    enable_fast_path(model)
    copies, x = WorkingCopies(model), torch.randn(6, 12)
    with pytest.raises(ZeroDivisionError), copies.for_one_step():
        raise ZeroDivisionError
    for _ in range(2):
        with torch.no_grad(), copies.for_one_step():
            in_step = model.to_q(x)
        assert torch.allclose(model.to_q(x), in_step, atol=1e-6)
        with torch.no_grad():
            model.to_q.lora_B["default"].up.mul_(2)
        model.to_q.set_scale("default", 3)
        assert not torch.allclose(model.to_q(x), in_step, atol=1e-3)
    assert not any(layer.working for layer in adapter_layers(model).values())


def test_layers_given_back_to_peft_are_left_alone():
    model = adapted(Block())
    enable_fast_path(model)
    copies = WorkingCopies(model)
    disable_fast_path(model)
    with copies.for_one_step() as step:
        assert not step.batches
