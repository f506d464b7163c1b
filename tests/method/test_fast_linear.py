"""The fast path is PEFT's own forward, cheaper, on a step's working copies."""

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from dreambooth_moslora.base.quantization import quantize
from dreambooth_moslora.method import fast_linear
from dreambooth_moslora.method.fast_linear import WorkingCopies, enable_fast_path
from dreambooth_moslora.method.mixer import MixerLinear
from dreambooth_moslora.method.moslora import (
    MoSLoraConfig,
    disable_adapters,
    get_adapter_layers,
    inject,
)
from tests.helpers.tiny import tiny_unet
from tests.helpers.tiny_adapters import set_scale

RANK = 3
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
ROWS = 2
WORDS = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(3))


class Block(nn.Module):
    """Two projections of one input, as q and k are."""

    def __init__(self, bias: bool = False, widths: tuple[int, int] = (12, 20)) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(*widths, bias=bias), nn.Linear(*widths, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_q(x).tanh() * self.to_k(x)


def randomize(model: nn.Module, seed: int = 7) -> nn.Module:
    """Give every adapter matrix a value: a fresh B is zero, and then nothing but dB could
    differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(model: nn.Module, adapter_name: str = "default", **options) -> nn.Module:
    """`model` with an adapter, all matrices random, base frozen."""
    config = MoSLoraConfig(
        **{"r": RANK, "lora_alpha": 2 * RANK, "target_modules": TARGETS, **options}
    )
    return randomize(inject(model, config, adapter_name))


def fast_copy(model: nn.Module) -> nn.Module:
    fast = copy.deepcopy(model)
    assert enable_fast_path(fast)
    return fast


def block(change=lambda base: None, bias: bool = True, **options) -> nn.Module:
    """Two adapted projections, their base layers changed."""
    model = adapted(Block(bias), **options)
    for layer in get_adapter_layers(model).values():
        change(layer.base_layer)
    return model


def assert_same(
    fast: dict[str, torch.Tensor], general: dict[str, torch.Tensor], tolerance: float
) -> None:
    assert fast.keys() == general.keys() and fast
    for name, expected in general.items():
        assert fast[name].dtype == expected.dtype
        assert (fast[name] - expected).norm() <= tolerance * expected.norm(), name


def unet_loss(unet: nn.Module) -> Tensor:
    return prediction(unet, inputs_of(0, unet.dtype)).square().mean()


def get_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step_with_peft(model: nn.Module, losses: list[Callable]) -> dict[str, torch.Tensor]:
    """Return the gradients of the sum of losses, each with a backward pass."""
    model.zero_grad()
    for loss in losses:
        loss(model).backward()
    return get_gradients(model)


def step_on_copies(
    model: nn.Module, losses: list[Callable], copies: WorkingCopies | None = None
) -> dict[str, torch.Tensor]:
    """Return the gradients of the sum of losses by the fused path."""
    model.zero_grad()
    with (copies or WorkingCopies(model)).attach_copies() as step:
        for loss in losses:
            loss(model).backward()
            step.collect()
    return get_gradients(model)


def test_two_projections_of_one_input_keep_it_once():
    """Count the tensors of the input's size that are kept for the backward pass under
    autocast."""
    general = block(lambda base: base.bfloat16(), bias=False)
    x, counts = torch.randn(64, 12, dtype=torch.bfloat16, requires_grad=True), []
    for model in (general, fast_copy(general)):
        saved: dict[int, Tensor] = {}
        keep = lambda t, saved=saved: (  # noqa: E731
            saved.setdefault(t.data_ptr(), t) if t.numel() == x.numel() else t
        )
        with (
            WorkingCopies(model).attach_copies(),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
            torch.autocast("cpu", torch.bfloat16),
        ):
            outputs = model.to_q(x), model.to_k(x)
        counts.append(len(saved) if outputs else 0)
    assert counts == [2, 1]


LATER = {
    "a scale": (lambda layer: layer.set_scale("default", 0.25), {}),
    "two adapters": (lambda layer: layer.set_adapter(["default", "other"]), {}),
    "another adapter": (lambda layer: layer.set_adapter("other"), {}),
    "a batch of mixed adapters": (
        lambda layer: None,
        {"adapter_names": ["default", "__base__"] * 3},
    ),
}


@pytest.mark.parametrize("name", LATER)
def test_a_later_change_of_adapters_takes_effect(name):
    change, call = LATER[name]
    general, x = adapted(block(bias=False), adapter_name="other"), torch.randn(6, 12)
    for layer in get_adapter_layers(general).values():
        layer.set_adapter("default")
    fast = fast_copy(general)
    copies = WorkingCopies(fast)
    with copies.attach_copies():
        before = fast.to_q(x)
    for layer in (*get_adapter_layers(general).values(), *get_adapter_layers(fast).values()):
        change(layer)
    with copies.attach_copies():
        after = fast.to_q(x, **call)
    assert not torch.equal(before, after) and torch.allclose(
        after, general.to_q(x, **call), atol=1e-5
    )


@pytest.mark.parametrize("in_a_step", [False, True])
def test_disabled_adapters_and_scale_zero_give_the_base(
    in_a_step,
):
    model, x = fast_copy(block()), torch.randn(6, 12)
    with WorkingCopies(model).attach_copies() if in_a_step else nullcontext():
        live, base = model.to_q(x), model.to_q.base_layer(x)
        with disable_adapters(model):
            assert torch.equal(model.to_q(x), base)
        assert torch.equal(model.to_q(x), live) and not torch.equal(live, base)
        model.to_q.enable_adapters(False)
        assert torch.equal(model.to_q(x), base)
    model.to_q.enable_adapters(True)
    for change in (model.to_q.merge, model.to_q.unmerge):
        change()
        assert torch.allclose(model.to_q(x), live, atol=1e-5)
    set_scale(model, 0.0)
    assert torch.equal(model.to_q(x), model.to_q.base_layer(x))


def test_autocast_to_another_dtype_uses_pefts_forward():
    """The device `meta` has no autocast."""
    general, x = block(bias=False), torch.randn(6, 12)
    fast = fast_copy(general)
    copies = WorkingCopies(fast)
    with copies.attach_copies(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), general(x))
    fast.to("meta")
    with copies.attach_copies():
        assert fast(torch.ones(6, 12, device="meta")).shape == (6, 20)


CONVOLUTIONS = {name: nn.Conv2d(2, 2, 1) for name in ("to_q", "to_k")}
SLOW = {
    "dropout": lambda: block(lora_dropout=0.1),
    "DoRA": lambda: block(use_dora=True),
    "bias": lambda: block(lora_bias=True, mixer="none", init_lora_weights=True),
    "trained": lambda: block(lambda base: base.requires_grad_(True)),
    "hooks": lambda: block(lambda base: base.register_forward_hook(lambda *_: None)),
    "Conv2d": lambda: adapted(nn.ModuleDict(CONVOLUTIONS)),
}


def slow_projections(model: nn.Module) -> dict[str, str]:
    """The reason of each layer that cannot be fused."""
    reasons = {
        path: fast_linear.explain_slow_path(layer)
        for path, layer in get_adapter_layers(model).items()
    }
    return {path: reason for path, reason in reasons.items() if reason}


@pytest.mark.parametrize("reason", SLOW)
def test_a_layer_that_cannot_be_fused_keeps_pefts_forward(reason):
    model = SLOW[reason]()
    assert enable_fast_path(model) == 0
    slow = slow_projections(model)
    assert len(slow) == 2 and all(reason in text for text in slow.values())


def quantised(kind: str, dtype: torch.dtype) -> nn.Module:
    """Two adapted projections of widths that bitsandbytes takes, named as the quantisation wants
    them."""
    return adapted(quantised_base(kind, dtype))


def quantised_base(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"transformer_blocks": Block(bias=True, widths=(64, 96))})
    quantize(model.to(dtype).requires_grad_(False).train(), kind, dtype)
    return model


def quantised_loss(model: nn.Module, x: Tensor | None = None) -> Tensor:
    """Of bf16 or fp32 inputs, through x itself too: the first projection's input needs a
    gradient."""
    block = model["transformer_blocks"]
    if x is None:
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    first = block.to_q(x.to(fast_linear.get_compute_dtype(block.to_q.base_layer)))[:, :64].tanh()
    return (block.to_k(first) * block.to_q(first)).float().square().sum()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_packed_base_gives_the_same_gradients(kind, dtype, tolerance):
    general = quantised(kind, dtype)
    fast = fast_copy(general)
    assert not slow_projections(fast)
    gradients = step_on_copies(fast, [quantised_loss])
    assert_same(gradients, step_with_peft(general, [quantised_loss]), tolerance)


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_8_bit_base_gives_the_gradients_of_its_dense_weights(use_dora):
    model = quantised_base("int8", torch.bfloat16)
    dense = quantised_base("none", torch.bfloat16)
    for name in ("to_q", "to_k"):
        weight = model["transformer_blocks"].get_submodule(name).dequantize()
        dense["transformer_blocks"].get_submodule(name).weight.data = weight
    packed, unpacked = (adapted(base, use_dora=use_dora) for base in (model, dense))
    for base in (packed, unpacked):
        assert enable_fast_path(base) == (0 if use_dora else 2)
    assert_same(*(step_on_copies(base, [quantised_loss]) for base in (packed, unpacked)), 0)


def test_fusing_leaves_the_state_dict_alone():
    model = adapted(Block())
    keys = list(model.state_dict())
    assert enable_fast_path(model) == 2 and list(model.state_dict()) == keys


def test_a_changed_adapter_is_copied_anew_for_each_step():
    """A step that failed leaves no copies either."""
    model = fast_copy(adapted(tiny_unet(), target_modules=["to_q", "to_k", "to_v"]))
    copies, layer = WorkingCopies(model), next(iter(get_adapter_layers(model).values()))
    with pytest.raises(ZeroDivisionError), copies.attach_copies():
        raise ZeroDivisionError
    assert not layer.step_copies
    step_on_copies(model, [unet_loss], copies)
    assert not layer.step_copies
    with torch.no_grad():
        layer.lora_A["default"].weight.mul_(2)
    assert_same(step_on_copies(model, [unet_loss], copies), step_on_copies(model, [unet_loss]), 0)
    set_scale(model, 3)
    assert_same(step_on_copies(model, [unet_loss], copies), step_on_copies(model, [unet_loss]), 0)


KINDS = {
    "learnt mixer": {},
    "no mixer": {"mixer": "none", "lora_alpha": 1},
    "frozen mixer": {"train_mixer": False, "rank_pattern": {"attn2.to_v": 1}},
    "scale": {"lora_alpha": 1, "use_rslora": True},
    "ranks and scales": {
        "rank_pattern": {"to_k": 5, "attn2.to_v": 1},
        "alpha_pattern": {"to_q": 1},
    },
    "convolutions": {"target_modules": ["to_q", "to_v", "conv1", "conv_shortcut"]},
}


def test_a_layer_that_is_not_used_has_no_gradient():
    """Gradients have the strides of their parameters, as a fused optimizer needs."""
    x = torch.ones(4, 12)
    for options in (KINDS["learnt mixer"], KINDS["no mixer"]):
        model = fast_copy(block(bias=False, **options))
        gradients = step_on_copies(model, [lambda block: block.to_q(x).sum()])
        assert {name.split(".")[0] for name in gradients} == {"to_q"} and x.grad is None
        step_on_copies(model, [lambda block: block(x).sum()])
        assert all(p.grad.stride() == p.stride() for p in model.parameters() if p.requires_grad)


def test_calls_by_pefts_forward_keep_their_gradients():
    model, x = fast_copy(block(bias=False)), torch.randn(4, 12)
    expected = {
        name: 2 * grad
        for name, grad in step_with_peft(copy.deepcopy(model), [lambda b: b(x).sum()]).items()
    }

    def compute_by_each_path(block: Block) -> torch.Tensor:
        names = {"adapter_names": ["default"] * 4}
        return block(x).sum() + (block.to_q(x, **names).tanh() * block.to_k(x, **names)).sum()

    assert_same(step_on_copies(model, [compute_by_each_path]), expected, 1e-5)


def test_the_fused_path_never_computes_pefts_product(monkeypatch):
    products = []
    monkeypatch.setattr(MixerLinear, "compute_product", lambda self: products.append(self))
    model = adapted(tiny_unet()).train()
    model.enable_gradient_checkpointing()
    assert enable_fast_path(model)
    step_on_copies(model, [unet_loss] * 2)
    assert not products


class Pair(nn.Module):
    """Self-attention and cross-attention of the same width."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own, self.cross = (
            Attention(12, heads=2, dim_head=6),
            Attention(12, 12, heads=2, dim_head=6),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cross(self.own(x), encoder_hidden_states=WORDS.to(x.dtype))


def pair_loss(pair: nn.Module) -> torch.Tensor:
    weight = pair.own.to_q.base_layer.weight
    x = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(1))
    return pair(x.to(weight.dtype)).float().square().sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("micro_batches", "recomputed"),
    [
        (2, True),
        pytest.param(2, False, marks=pytest.mark.slow),
        pytest.param(1, True, marks=pytest.mark.slow),
        pytest.param(1, False, marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_pefts_own_layers(kind, micro_batches, recomputed):
    general = adapted(tiny_unet().double(), **KINDS[kind]).double().train()
    fast = copy.deepcopy(general)
    linear = [
        layer
        for layer in get_adapter_layers(general).values()
        if isinstance(layer.base_layer, nn.Linear)
    ]
    assert enable_fast_path(fast) == len(linear)
    with WorkingCopies(fast).attach_copies():
        assert unet_loss(fast).item() == pytest.approx(unet_loss(general).item(), rel=1e-9)
    if recomputed:
        fast.enable_gradient_checkpointing()
    losses = [unet_loss, lambda unet: 3 * unet_loss(unet).sqrt()][:micro_batches]
    assert_same(step_on_copies(fast, losses), step_with_peft(general, losses), 1e-8)


@pytest.mark.parametrize("options", [KINDS["learnt mixer"], KINDS["no mixer"], KINDS["scale"]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
def test_fp32_adapters_get_fp32_gradients_on_any_base(options, dtype, tolerance):
    """In bf16 PEFT rounds elsewhere. Micro-batches are summed in fp32."""
    model = adapted(Pair(), **options)
    for layer in get_adapter_layers(model).values():
        layer.base_layer.to(dtype)
    losses = [pair_loss, lambda pair: 3 * pair_loss(pair).sqrt()]
    gradients = step_on_copies(fast_copy(model), losses)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    each = [step_on_copies(fast_copy(model), [loss]) for loss in losses]
    assert_same(gradients, {name: each[0][name] + each[1][name] for name in each[0]}, 1e-6)
    assert_same(gradients, step_with_peft(model, losses), tolerance)


def test_weights_that_were_cast_later_are_used():
    model = fast_copy(adapted(Pair()))
    copies = WorkingCopies(model)
    model.double()
    gradients = step_on_copies(model, [pair_loss], copies)
    assert_same(gradients, step_with_peft(model, [pair_loss]), 1e-8)


@pytest.mark.slow
def test_a_compiled_block_is_one_graph():
    """`fullgraph` raises for code that cannot be compiled."""
    model = fast_copy(adapted(Pair()))
    plain = step_on_copies(copy.deepcopy(model), [pair_loss])
    model.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    assert_same(step_on_copies(model, [pair_loss]), plain, 2e-6)


def inputs_of(number: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(number)
    shapes = [(ROWS, 4, 8, 8), (ROWS, 77, 48), (ROWS, 32)]
    latents, text, pooled = (torch.randn(shape, generator=g).to(dtype) for shape in shapes)
    return (
        latents,
        torch.randint(1000, (ROWS,), generator=g),
        text,
        pooled,
        torch.full((ROWS, 6), 64.0, dtype=dtype),
    )


def prediction(unet: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    latents, times, text, pooled, sizes = inputs
    return unet(
        latents, times, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}
    ).sample
