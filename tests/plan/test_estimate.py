"""What a run is said to need: held against a count, and against the card before anything is loaded."""

import pytest
import torch

from benchmarks.gpu_memory import adapted_unet, count, counted_total_gib, estimated_total_gib, run_config
from dreambooth_moslora.core import UserError
from dreambooth_moslora.plan.checks import preflight
from dreambooth_moslora.plan.memory import BaseSize, estimate, size_of_base
from dreambooth_moslora.settings.table import TrainConfig

GIB = 2**30
SDXL = {
    "pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0",
    "instance_data_dir": ".",
    "instance_prompt": "a photo of sks dog",
    "resolution": 1024,
    "train_batch_size": 1,
}


def cost(**changes):
    return estimate(TrainConfig.from_dict(SDXL | {"mixed_precision": "bf16"} | changes), BaseSize(), 100)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("px", "rank", "batch", "recomputed", "cached"),
    [(1024, 16, 1, False, False), (512, 128, 1, False, True), (768, 16, 2, True, False), (512, 16, 4, True, True)],
)
def test_the_estimate_is_within_a_tenth_of_the_count(px, rank, batch, recomputed, cached):
    config = run_config(px, rank, batch, recomputed, cached)
    unet = adapted_unet(config)
    assert estimated_total_gib(config) == pytest.approx(counted_total_gib(unet, count(config, unet)), rel=0.1)


def test_a_quantised_unet_counts_as_it_weighs():
    """Of SDXL's 2.567 billion numbers 2.184 are in projections of blocks; the others stay in half precision."""
    dense, nf4, int8 = (cost(base_quantization=kind).sampling_gib for kind in ("none", "nf4", "int8"))
    assert dense - nf4 == pytest.approx(4.78 - 1.76, abs=0.02)
    assert dense - int8 == pytest.approx(4.78 - 2.75, abs=0.02)


def test_cached_text_counts_as_its_products_weigh():
    """340.8 million numbers of SDXL's are on the host; 77 tokens have 166,400 products."""
    for changes, images in (({}, 1), ({"train_batch_size": 3}, 3)):
        live, cached = cost(**changes), cost(**changes, cache_cross_attention=True)
        saved = (340_787_200 - images * 77 * 166_400) * 2 / GIB
        assert live.training_gib - cached.training_gib == pytest.approx(saved)
        assert live.encoding_gib == cached.encoding_gib
    sampling = cost(cache_cross_attention=True).sampling_gib
    assert sampling == pytest.approx(cost().sampling_gib - (340_787_200 - 2 * 77 * 166_400) * 2 / GIB)


def test_the_texts_projections_are_counted_in_the_files(tiny_base):
    from dreambooth_moslora.base.load import TextProducts, load_pipeline

    layers = TextProducts(load_pipeline(tiny_base).unet, torch.device("cpu")).layers
    size = size_of_base(tiny_base, ("to_q",))
    assert size.text_projections == sum(layer.host_weight.numel() for layer in layers)
    assert size.text_outputs == sum(layer.out_features for layer in layers) > 0


def test_a_unet_that_is_still_on_the_cpu_is_not_counted():
    class_images = {"with_prior_preservation": True, "class_prompt": "a photo of a dog"}
    alone, with_unet = cost().encoding_gib, cost(**class_images).encoding_gib
    assert alone < 5.0 and with_unet > alone + 3.0


def test_projections_are_counted_in_the_files(tiny_base):
    from bitsandbytes.nn import Linear4bit

    from dreambooth_moslora.base.load import load_pipeline, quantize

    unet = load_pipeline(tiny_base).unet
    quantize(unet, "nf4", torch.float32)
    layers = [m for m in unet.modules() if type(m) is Linear4bit]
    numbers = sum(layer.in_features * layer.out_features for layer in layers)
    assert size_of_base(tiny_base, ("to_q",)).projections == numbers > 0


@pytest.fixture
def card(monkeypatch):
    """Pretend that there is a GPU with so much free beside CUDA's context."""

    def put(free_gib: float, capability: int = 8) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: capability >= 8)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "a GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (capability, 5))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *device: (int(free_gib * GIB), 80 * GIB))

    return put


@pytest.mark.parametrize(
    ("free_gib", "says"),
    [
        (15.0, r"needs about 2\d\.\d GiB .* 15\.5 GiB are free: give --mixed_precision bf16 \(then 10"),
        (7.4, r"give --mixed_precision bf16 --gradient_checkpointing .* start from assets/configs/sdxl_8gb.toml"),
        (5.4, r"--base_quantization nf4 \(then [45]\.\d GiB\), or start from assets/configs/sdxl_6gb.toml"),
        (2.0, r"give a smaller --resolution than 1024"),
    ],
)
def test_a_run_beyond_the_card_is_refused_with_the_nearest_one_that_fits(card, free_gib, says):
    card(free_gib)
    with pytest.raises(UserError, match=says):
        preflight(TrainConfig.from_dict(SDXL))


def test_the_settings_that_are_named_on_a_card_without_bf16_are_not_refused_there(card):
    card(14.6, capability=7)
    with pytest.raises(
        UserError, match=r"give --mixed_precision fp16 --gradient_checkpointing .*16gb.toml with --mixed_precision fp16"
    ):
        preflight(TrainConfig.from_dict(SDXL | {"train_batch_size": 2}))
    preflight(
        TrainConfig.from_dict(SDXL | {"train_batch_size": 2, "mixed_precision": "fp16", "gradient_checkpointing": True})
    )


def test_a_run_within_the_card_and_a_small_base_are_let_through(card):
    card(24.0)
    preflight(TrainConfig.from_dict(SDXL | {"mixed_precision": "bf16"}))
    card(0.1)
    preflight(TrainConfig.from_dict(SDXL | {"pretrained_model_name_or_path": "toy", "resolution": 128}))
