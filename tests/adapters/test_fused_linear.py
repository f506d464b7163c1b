"""The fast path is PEFT's own forward, cheaper: each equality is checked against the general path or against fp64."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from dreambooth_moslora.adapters.fast_linear import (
    FastLinear,
    WorkingCopies,
    compute_dtype,
    disable_fast_path,
    enable_fast_path,
    slow_reason,
)
from dreambooth_moslora.adapters.moslora import MoSLoraConfig, adapter_layers, disabled, inject, set_scale
from dreambooth_moslora.base.load import quantize
from dreambooth_moslora.settings.table import MIXERS
from tests.helpers.layer_figures import slow_projections
from tests.helpers.tiny import tiny_unet

RANK = 3
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


class Block(nn.Module):
    """Two projections of one input, as q and k are."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(12, 20, bias=bias), nn.Linear(12, 20, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_q(x).tanh() * self.to_k(x)


def randomize(model: nn.Module, seed: int = 7) -> nn.Module:
    """Give every adapter matrix a value: a fresh B is zero, and then nothing but dB could differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(model: nn.Module, adapter_name: str = "default", **options) -> nn.Module:
    """`model` with an adapter, all matrices random, base frozen."""
    config = MoSLoraConfig(**{"r": RANK, "lora_alpha": 2 * RANK, "target_modules": TARGETS, **options})
    return randomize(inject(model, config, adapter_name))


def gradients(model: nn.Module, run) -> dict[str, torch.Tensor]:
    """Gradients of the trained parameters for the scalar that `run(model)` returns."""
    model.zero_grad()
    run(model).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same(fast: dict[str, torch.Tensor], general: dict[str, torch.Tensor], tolerance: float) -> None:
    assert fast.keys() == general.keys() and fast
    for name, expected in general.items():
        assert fast[name].dtype == expected.dtype
        assert (fast[name] - expected).norm() <= tolerance * expected.norm(), name


def unet_loss(unet: nn.Module) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    latents, words, pooled = (torch.randn(s, generator=g).to(unet.dtype) for s in [(2, 4, 8, 8), (2, 77, 48), (2, 32)])
    extra = {"text_embeds": pooled, "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]] * 2).to(unet.dtype)}
    return unet(latents, torch.tensor([10, 700]), words, added_cond_kwargs=extra).sample.square().mean()


@pytest.mark.parametrize("mixer", [m for m in MIXERS if m != "butterfly"])
@pytest.mark.parametrize(("shape", "bias"), [((5, 12), False), ((2, 7, 12), True), ((12,), True)])
def test_gradients_are_those_of_finite_differences(mixer, shape, bias):
    """Of x, A, B and, where there is one, M."""
    torch.manual_seed(0)
    model = adapted(Block(bias), mixer=mixer).double()
    assert enable_fast_path(model) == 2
    parameters = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x, *parameters))


@pytest.mark.parametrize("options", [{}, {"mixer": "none"}, {"train_mixer": False}, {"use_rslora": True}])
def test_a_unet_gives_the_same_loss_and_gradients(options):
    general = adapted(tiny_unet().double(), **options).double()
    fast = copy.deepcopy(general)
    assert enable_fast_path(fast) == len(adapter_layers(general))
    assert unet_loss(fast).item() == pytest.approx(unet_loss(general).item(), rel=1e-9)
    assert_same(gradients(fast, unet_loss), gradients(general, unet_loss), 1e-7)


def test_gradient_checkpointing_gives_the_same_gradients():
    model = adapted(tiny_unet().double()).double().train()
    enable_fast_path(model)
    plain = gradients(model, unet_loss)
    model.enable_gradient_checkpointing()
    assert_same(gradients(model, unet_loss), plain, 1e-9)


def test_the_gradient_of_the_input_is_not_computed_where_nothing_needs_it():
    model = adapted(Block())
    enable_fast_path(model)
    x = torch.randn(4, 12)
    model(x).sum().backward()
    assert x.grad is None and model.to_q.lora_A["default"].weight.grad is not None


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_base_with_fp32_masters_is_as_exact_as_the_general_path(autocast):
    """Against fp64 truth: error of output and gradients at most 1.5 times that of PEFT's forward."""
    torch.manual_seed(1)
    truth = adapted(Block()).double()
    x = torch.randn(64, 12)

    def run(model: nn.Module) -> torch.Tensor:
        weight = model.to_q.base_layer.weight
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and weight.dtype == torch.bfloat16):
            return model(x.to(weight.dtype)).double().square().mean()

    def bf16_base() -> nn.Module:
        model = copy.deepcopy(truth).float()
        for layer in (model.to_q, model.to_k):
            layer.base_layer.bfloat16()
        return model

    general, fast = bf16_base(), bf16_base()
    enable_fast_path(fast)
    expected, seen_general, seen_fast = (gradients(m, run) for m in (truth, general, fast))
    for name, value in expected.items():
        assert seen_fast[name].dtype == torch.float32
        error, allowed = (seen_fast[name] - value).norm(), (seen_general[name] - value).norm()
        assert error <= 1.5 * allowed + 2e-3 * value.norm(), name


def full_width_tensors(model: nn.Module, x: torch.Tensor) -> int:
    """How many different tensors as large as x the two projections of x keep for the backward pass, under autocast."""
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() == x.numel():
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        outputs = model.to_q(x), model.to_k(x)
    return len(kept) if outputs else 0


def test_two_projections_of_one_input_keep_it_once():
    general = adapted(Block())
    for layer in (general.to_q, general.to_k):
        layer.base_layer.bfloat16()
    fast = copy.deepcopy(general)
    enable_fast_path(fast)
    x = torch.randn(64, 12, dtype=torch.bfloat16, requires_grad=True)
    assert full_width_tensors(general, x) == 2
    assert full_width_tensors(fast, x) == 1


def same_output(model: nn.Module, change=lambda layer: None, **kwargs) -> bool:
    """Whether fast and general agree after `change` is made to the layers of both."""
    general, fast = copy.deepcopy(model), copy.deepcopy(model)
    assert enable_fast_path(fast) == 2
    x = torch.randn(6, 12)
    before = fast.to_q(x)
    for side in (general, fast):
        for layer in (side.to_q, side.to_k):
            change(layer)
    after = fast.to_q(x, **kwargs)
    assert not torch.equal(before, after)
    return torch.allclose(after, general.to_q(x, **kwargs), atol=1e-5)


def test_a_changed_scale_is_followed():
    assert same_output(adapted(Block()), lambda layer: layer.set_scale("default", 0.25))


def test_scale_zero_equals_the_base_bit_for_bit():
    model = adapted(Block(bias=True))
    enable_fast_path(model)
    set_scale(model, 0.0)
    x = torch.randn(6, 12)
    assert torch.equal(model.to_q(x), model.to_q.base_layer(x))


def test_disabled_adapters_give_the_base_bit_for_bit():
    model = adapted(Block())
    enable_fast_path(model)
    x = torch.randn(6, 12)
    with disabled(model):
        assert torch.equal(model.to_q(x), model.to_q.base_layer(x))
    assert not torch.equal(model.to_q(x), model.to_q.base_layer(x))
    model.to_q.enable_adapters(False)
    assert torch.equal(model.to_q(x), model.to_q.base_layer(x))


def test_merged_and_unmerged_agree():
    model = adapted(Block())
    enable_fast_path(model)
    x = torch.randn(6, 12)
    live = model.to_q(x)
    model.to_q.merge()
    assert torch.allclose(model.to_q(x), live, atol=1e-5)
    model.to_q.unmerge()
    assert torch.allclose(model.to_q(x), live, atol=1e-5)


def test_a_second_active_adapter_is_added():
    two = adapted(adapted(Block()), adapter_name="other")
    assert same_output(two, lambda layer: layer.set_adapter(["default", "other"]))


def test_an_adapter_of_another_name_is_followed():
    two = adapted(adapted(Block()), adapter_name="other")
    for layer in (two.to_q, two.to_k):
        layer.set_adapter("default")
    assert same_output(two, lambda layer: layer.set_adapter("other"))


def test_a_batch_of_mixed_adapters_goes_the_general_way():
    assert same_output(adapted(Block()), adapter_names=["default", "__base__"] * 3)


def test_autocast_to_another_dtype_than_the_weights_goes_the_general_way():
    general = adapted(Block())
    fast = copy.deepcopy(general)
    enable_fast_path(fast)
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(6, 12)
        assert torch.equal(fast(x), general(x))


def test_a_device_without_autocast_is_asked_for_none():
    """`meta` is such a device: it has shapes and no numbers."""
    model = adapted(Block()).to("meta")
    enable_fast_path(model)
    assert model(torch.ones(6, 12, device="meta")).shape == (6, 20)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lora_dropout": 0.1}, "dropout"),
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True, "mixer": "none", "init_lora_weights": True}, "bias"),
    ],
)
def test_what_cannot_be_fast_is_left_alone_and_reported(options, reason):
    model = adapted(Block(bias=True), **options)
    assert enable_fast_path(model) == 0
    slow = slow_projections(model)
    assert slow.keys() == {"to_q", "to_k"} and all(reason in text for text in slow.values())


def test_a_convolution_a_trained_base_and_a_hooked_base_are_reported():
    layers = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Linear(4, 4), nn.Linear(4, 4))
    model = adapted(layers, target_modules=["0", "1", "2"], mixer="none")
    model[1].base_layer.requires_grad_(True)
    model[2].base_layer.register_forward_hook(lambda *_: None)
    assert enable_fast_path(model) == 0
    reasons = [slow_reason(layer) for layer in model]
    assert [word in text for word, text in zip(["Conv2d", "trained", "hooks"], reasons)] == [True] * 3


def quantised(kind: str, dtype: torch.dtype) -> nn.Module:
    """Two adapted projections of widths that bitsandbytes takes, named as the quantisation wants them."""
    torch.manual_seed(0)
    block = Block()
    block.to_q, block.to_k = nn.Linear(64, 96), nn.Linear(64, 96, bias=False)
    model = nn.ModuleDict({"transformer_blocks": block}).to(dtype).requires_grad_(False).train()
    quantize(model, kind, dtype)
    return adapted(model)


def quantised_loss(model: nn.Module) -> torch.Tensor:
    """Of bf16 or fp32 inputs, through x itself too: the first projection's input needs a gradient."""
    block = model["transformer_blocks"]
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).to(compute_dtype(block.to_q.base_layer))
    first = block.to_q(x)[:, :64].tanh()
    return (block.to_k(first) * block.to_q(first)).float().square().sum()


@pytest.mark.parametrize("on_copies", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_a_base_in_4_bit_gives_the_same_gradients(dtype, tolerance, on_copies):
    general = quantised("nf4", dtype)
    fast = copy.deepcopy(general)
    assert enable_fast_path(fast) == 2 and not slow_projections(fast)
    expected = gradients(general, quantised_loss)
    with WorkingCopies(fast).for_one_step() if on_copies else nullcontext() as step:
        quantised_loss(fast).backward()
        if on_copies:
            step.collect()
    assert_same({n: p.grad for n, p in fast.named_parameters() if p.requires_grad}, expected, tolerance)
    disable_fast_path(fast)
    assert torch.equal(quantised_loss(fast), quantised_loss(general))


def test_a_base_in_8_bit_is_left_alone_and_reported():
    model = quantised("int8", torch.float32)
    assert enable_fast_path(model) == 0
    assert all("Linear8bitLt" in reason for reason in slow_projections(model).values())


def test_it_can_be_switched_off_and_leaves_the_state_dict_alone():
    model = adapted(Block())
    keys = list(model.state_dict())
    enable_fast_path(model)
    assert list(model.state_dict()) == keys and type(model.to_q) is FastLinear
    disable_fast_path(model)
    assert type(model.to_q) is not FastLinear and not slow_projections(model)
