"""q, k and v computed together give what each alone gives, and the base takes no more memory."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from dreambooth_moslora.adapters.fast_linear import WorkingCopies, enable_fast_path, lay_together
from dreambooth_moslora.base.load import TextProducts, quantize
from dreambooth_moslora.extras.cluster.stacked_adapters import twin
from tests.adapters.test_fused_linear import adapted, assert_same, unet_loss
from tests.adapters.test_working_copies import given, plain_step
from tests.helpers.tiny import tiny_unet

WORDS = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(3))


class Pair(nn.Module):
    """Self-attention and cross-attention of the same width."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross = Attention(12, heads=2, dim_head=6), Attention(12, 12, heads=2, dim_head=6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cross(self.own(x), encoder_hidden_states=WORDS.to(x.dtype))


def pair_loss(pair: nn.Module) -> torch.Tensor:
    weight = pair.own.to_q.base_layer.weight
    x = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(1))
    return pair(x.to(weight.dtype)).float().square().sum()


def joint_step(model: nn.Module, losses: list) -> dict[str, torch.Tensor]:
    copies = WorkingCopies(model, joint=True)
    with copies.for_one_step() as step:
        assert any(batch.count > 1 for batch in step.batches)
        for loss in losses:
            loss(model).backward()
            step.collect()
    return given(model)


@pytest.mark.parametrize(
    ("options", "recomputed"),
    [
        ({}, True),
        ({"mixer": "none", "lora_alpha": 1}, False),
        pytest.param({}, False, marks=pytest.mark.slow),
        pytest.param({"train_mixer": False, "rank_pattern": {"attn2.to_v": 1}}, True, marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_pefts_own_layers(options, recomputed):
    """Of two micro-batches, in fp64."""
    general = adapted(tiny_unet().double(), **options).double().train()
    fast = copy.deepcopy(general)
    enable_fast_path(fast)
    if recomputed:
        fast.enable_gradient_checkpointing()
    losses = [unet_loss, lambda unet: 3 * unet_loss(unet).sqrt()]
    assert_same(joint_step(fast, losses), plain_step(general, losses), 1e-8)


@pytest.mark.parametrize("options", [{}, {"rank_pattern": {"attn2.to_v": 1}}])
def test_keys_and_values_of_a_text_whose_products_are_there(options):
    """Together, and alone where the ranks differ."""
    general = adapted(tiny_unet().double(), **options).double().train()
    unet = tiny_unet().double()
    unet.load_state_dict(tiny_unet().state_dict())
    TextProducts(unet, torch.device("cpu"))
    fast = adapted(unet, **options).double().train()
    fast.load_state_dict(general.state_dict(), strict=False)
    enable_fast_path(fast)
    fast.enable_gradient_checkpointing()
    losses = [unet_loss, lambda unet: 3 * unet_loss(unet).sqrt()]
    assert_same(joint_step(fast, losses), plain_step(general, losses), 1e-8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_it_rounds_as_layers_alone_do(dtype, tolerance):
    model = adapted(Pair())
    for layer in model.modules():
        if hasattr(layer, "base_layer"):
            layer.base_layer.to(dtype)
    enable_fast_path(model)
    alone = copy.deepcopy(model)
    assert_same(joint_step(model, [pair_loss]), plain_step(alone, [pair_loss]), tolerance)


def storage_bytes(model: nn.Module) -> int:
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


def test_weights_of_one_buffer_take_no_more_memory_and_are_the_same():
    model = adapted(tiny_unet())
    enable_fast_path(model)
    before, size = copy.deepcopy(model.state_dict()), storage_bytes(model)
    copies = WorkingCopies(model, joint=True)
    assert copies.joints and storage_bytes(model) == size
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_models_that_share_their_weights_share_the_buffer():
    base = tiny_unet()
    lay_together(base, [path for path, _ in base.named_modules() if path.endswith(("to_q", "to_v"))])
    size = storage_bytes(base)
    models = [adapted(twin(base), target_modules=["to_q", "to_v"]) for _ in range(2)]
    for model in models:
        enable_fast_path(model)
        assert WorkingCopies(model, joint=True).joints
    frozen = [p for model in models for p in model.parameters() if not p.requires_grad]
    assert sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in frozen}.values()) == size


def test_layers_alone_and_in_another_order_are_right_too():
    """A processor may give each projection another input, call it twice, or not at all."""
    model = adapted(Attention(12, heads=2, dim_head=6))
    enable_fast_path(model)
    x, y = torch.randn(2, 3, 12), torch.randn(2, 3, 12)
    calls = [("to_v", x), ("to_k", x), ("to_k", x), ("to_q", y), ("to_k", x), ("to_q", y)]
    wanted = [getattr(model, name)(value) for name, value in calls]
    with WorkingCopies(model, joint=True).for_one_step() as step:
        with torch.no_grad():
            assert not model.to_q(x).requires_grad
        seen = [getattr(model, name)(value) for name, value in calls]
        torch.stack(seen).sum().backward()
        step.collect()
    for one, other in zip(seen, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    found = given(model)
    model.zero_grad()
    torch.stack(wanted).sum().backward()
    assert_same(found, given(model), 1e-5)


def test_a_layer_that_is_switched_off_is_the_base_beside_the_others():
    model = adapted(Attention(12, heads=2, dim_head=6))
    enable_fast_path(model)
    x, live = torch.randn(2, 3, 12), [model.to_q, model.to_v]
    wanted = [layer(x) for layer in live]
    with WorkingCopies(model, joint=True).for_one_step():
        model.to_k._disable_adapters = True
        seen = [layer(x) for layer in (model.to_q, model.to_k, model.to_v)]
        assert torch.equal(seen.pop(1), model.to_k.base_layer(x))
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(seen, wanted, strict=True))


def test_weights_that_were_moved_or_cast_since_are_not_computed_from_the_old_ones():
    model = adapted(Pair())
    enable_fast_path(model)
    copies = WorkingCopies(model, joint=True)
    model.double()
    with copies.for_one_step() as step:
        assert all(batch.count == 1 for batch in step.batches) and not copies.joints
        pair_loss(model).backward()
        step.collect()
    found = given(model)
    model.zero_grad()
    assert_same(found, plain_step(model, [pair_loss]), 1e-8)


def test_it_is_for_devices_where_kernels_count():
    """On a CPU the weights stay where they are: often mapped from the file."""
    model = adapted(Pair())
    enable_fast_path(model)
    assert not WorkingCopies(model).joints
    assert [len(joint.layers) for joint in WorkingCopies(model.to("meta")).joints] == [3, 2]


def test_weights_in_4_bit_stay_apart():
    """Packed numbers cannot be put below one another."""
    model = nn.ModuleDict({"transformer_blocks": Attention(64, heads=2, dim_head=32)}).requires_grad_(False)
    assert quantize(model, "nf4", torch.float32) == 4
    assert enable_fast_path(adapted(model)) == 4
    assert not WorkingCopies(model, joint=True).joints


@pytest.mark.slow
def test_a_compiled_block_is_one_graph():
    """`fullgraph` raises where Python would have to step in."""
    model = adapted(Pair())
    enable_fast_path(model)
    alone = plain_step(copy.deepcopy(model), [pair_loss])
    model.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    assert_same(joint_step(model, [pair_loss]), alone, 2e-6)
