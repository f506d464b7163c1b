"""Adapters that share a batch and a base get the gradients that each gets alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dreambooth_moslora.adapters.fast_linear import WorkingCopies, enable_fast_path
from dreambooth_moslora.adapters.moslora import adapter_layers, disabled
from dreambooth_moslora.base.load import quantize
from dreambooth_moslora.extras.cluster.stacked_adapters import StackedAdapters, twin
from tests.adapters.test_fast_linear import KINDS, Block, adapted, assert_same, given, randomize
from tests.helpers.tiny import tiny_unet

COUNT, ROWS = 3, 2


def adapted_twins(base: nn.Module, **options) -> list[nn.Module]:
    """COUNT models on one base, each with an adapter of its own."""
    models = []
    for number in range(COUNT):
        model = randomize(adapted(twin(base), **options), seed=number)
        enable_fast_path(model)
        models.append(model.train())
    return models


def inputs_of(number: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(number)
    shapes = [(ROWS, 4, 8, 8), (ROWS, 77, 48), (ROWS, 32)]
    latents, words, pooled = (torch.randn(shape, generator=g).to(dtype) for shape in shapes)
    return latents, torch.randint(1000, (ROWS,), generator=g), words, pooled, torch.full((ROWS, 6), 64.0, dtype=dtype)


def prediction(unet: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    latents, times, words, pooled, sizes = inputs
    return unet(latents, times, words, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample


def loss_of(number: int, output: Tensor) -> Tensor:
    """Another one for each adapter, as subjects have."""
    return (1 + number) * output.square().mean()


def losses_alone(models: list[nn.Module], turn: int) -> list[Callable]:
    dtype = models[0].conv_in.weight.dtype
    return [
        lambda model, n=n: loss_of(n, prediction(model, inputs_of(10 * turn + n, dtype))) for n in range(len(models))
    ]


def gradients_alone(models: list[nn.Module], turns: int = 1) -> list[dict[str, Tensor]]:
    found = []
    for number, model in enumerate(models):
        with WorkingCopies(model).for_one_step() as copies:
            for turn in range(turns):
                losses_alone(models, turn)[number](model).backward()
                copies.collect()
        found.append(given(model))
        model.zero_grad()
    return found


def gradients_together(models: list[nn.Module], turns: int = 1) -> list[dict[str, Tensor]]:
    dtype = models[0].conv_in.weight.dtype
    with StackedAdapters(models).for_one_step() as copies:
        for turn in range(turns):
            each = [inputs_of(10 * turn + number, dtype) for number in range(len(models))]
            outputs = prediction(models[0], tuple(map(torch.cat, zip(*each, strict=True)))).chunk(len(models))
            sum(loss_of(number, output) for number, output in enumerate(outputs)).backward()
            copies.collect()
    found = [given(model) for model in models]
    for model in models:
        model.zero_grad()
    return found


FAST = [("learnt mixer", True), ("convolutions", False)]
SLOW = [("convolutions", True), *((kind, False) for kind in KINDS if kind != "convolutions")]


@pytest.mark.parametrize(("kind", "recomputed"), [*FAST, *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)])
def test_each_adapter_gets_the_gradients_that_it_gets_alone(kind, recomputed):
    """Of two micro-batches, in fp64: exact to its rounding."""
    models = adapted_twins(tiny_unet().double(), **KINDS[kind])
    for model in models:
        model.double()
        if recomputed:
            model.enable_gradient_checkpointing()
    for together, alone in zip(gradients_together(models, 2), gradients_alone(models, 2), strict=True):
        assert_same(together, alone, 1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_fp32_adapters_on_a_base_of_either_dtype_get_fp32_gradients(dtype, tolerance):
    models = adapted_twins(tiny_unet().to(dtype))
    for together, alone in zip(gradients_together(models), gradients_alone(models), strict=True):
        assert_same(together, alone, tolerance)
        assert {grad.dtype for grad in together.values()} == {torch.float32}


def test_a_base_in_4_bit_gives_the_same_gradients():
    base = nn.ModuleDict({"transformer_blocks": Block()})
    base["transformer_blocks"].to_q = nn.Linear(64, 96)
    base["transformer_blocks"].to_k = nn.Linear(64, 96)
    quantize(base.requires_grad_(False).train(), "nf4", torch.float32)
    models = [randomize(adapted(twin(base)), seed=number) for number in range(COUNT)]
    assert all(enable_fast_path(model) == 2 for model in models)
    rows = torch.randn(COUNT, 5, 64, generator=torch.Generator().manual_seed(1))
    for number, model in enumerate(models):
        model["transformer_blocks"](rows[number]).square().sum().backward()
    alone = [given(model) for model in models]
    for model in models:
        model.zero_grad()
    with StackedAdapters(models).for_one_step() as copies:
        models[0]["transformer_blocks"](rows.flatten(0, 1)).square().sum().backward()
        copies.collect()
    for model, wanted in zip(models, alone, strict=True):
        assert_same(given(model), wanted, 1e-5)


def test_nan_in_one_adapter_stays_there():
    models = adapted_twins(tiny_unet())
    wanted = gradients_together(models)
    with torch.no_grad():
        next(iter(adapter_layers(models[1]).values())).lora_A["default"].weight.fill_(torch.nan)
    found = gradients_together(models)
    assert all(grad.isnan().any() for grad in found[1].values())
    for number in (0, 2):
        assert all(torch.equal(found[number][name], grad) for name, grad in wanted[number].items())


def test_a_twin_has_its_own_adapter_on_the_same_weights():
    base = tiny_unet()
    first, second = adapted(twin(base)), adapted(twin(base))
    for one, other in zip(adapter_layers(first).values(), adapter_layers(second).values(), strict=True):
        assert one.base_layer.weight is other.base_layer.weight
        assert one.lora_A["default"].weight is not other.lora_A["default"].weight
    assert not any("lora" in name for name, _ in base.named_parameters())


def test_switched_off_adapters_give_the_base_bit_for_bit():
    base = tiny_unet()
    models = adapted_twins(base, target_modules=["to_q", "conv1"])
    inputs = tuple(map(torch.cat, zip(*(inputs_of(n, torch.float32) for n in range(COUNT)), strict=True)))
    with torch.no_grad(), StackedAdapters(models).for_one_step(), disabled(models[0]):
        assert torch.equal(prediction(models[0], inputs), prediction(base, inputs))


def test_afterwards_each_model_is_as_before():
    models = adapted_twins(tiny_unet(), target_modules=["to_q", "conv1"])
    before = [prediction(model, inputs_of(0, torch.float32)) for model in models]
    with pytest.raises(RuntimeError), StackedAdapters(models).for_one_step():
        raise RuntimeError
    assert all(torch.equal(prediction(m, inputs_of(0, torch.float32)), b) for m, b in zip(models, before, strict=True))
    assert not any(given(model) for model in models)


def test_models_that_do_not_fit_together_are_refused():
    base = tiny_unet()
    model, of_other_layers = adapted(twin(base)), adapted(twin(base), target_modules=["to_k"])
    with pytest.raises(ValueError, match="share their frozen weights"):
        StackedAdapters([model, adapted(tiny_unet())])
    with pytest.raises(ValueError, match="on the same layers"):
        StackedAdapters([model, of_other_layers])
    with pytest.raises(ValueError, match="no stack"):
        StackedAdapters([model])


@pytest.mark.parametrize("options", [{"use_dora": True, "mixer": "none"}, {"lora_dropout": 0.1}])
def test_adapters_that_do_more_than_add_a_product_are_refused(options):
    base = tiny_unet()
    with pytest.raises(ValueError, match="no dropout, no DoRA"):
        StackedAdapters([adapted(twin(base), **options) for _ in range(2)])
