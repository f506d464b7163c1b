"""`--cache_cross_attention`: the same training without the text's projections on the device."""

from pathlib import Path

import pytest
import torch

from dreambooth_moslora.base.load import TextProducts, TextProjection
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny import tiny_unet
from tests.helpers.tiny_training import largest_difference, paint_photos, tiny_config

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
PRIOR = {"with_prior_preservation": True, "prior": "adapter_off"}


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in RunDir(run).read_metrics() if event["type"] == "step"]


def trained_both_ways(tiny_base, tmp_path, **changes) -> tuple[Path, Path]:
    photos = paint_photos(tmp_path / "photos")
    for name, cached in (("live", False), ("cached", True)):
        settings = {"target_modules": ATTENTION, "max_train_steps": 3, "cache_cross_attention": cached} | changes
        train(tiny_config(tiny_base, photos, tmp_path / name, **settings))
    return tmp_path / "live", tmp_path / "cached"


@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "bf16", "gradient_checkpointing": True},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"target_modules": ("to_q", "attn2.to_v")}, marks=pytest.mark.slow),
        pytest.param({"lora_dropout": 0.1}, marks=pytest.mark.slow),
        pytest.param({"caption_dropout": 0.5, "max_train_steps": 5}, marks=pytest.mark.slow),
        pytest.param({"num_validation_images": 1, "max_train_steps": 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_one_photo_at_a_time_gives_the_same_bytes(tiny_base, tmp_path, changes):
    """On a CPU: the same products of the same shapes."""
    live, cached = trained_both_ways(tiny_base, tmp_path, **changes)
    assert losses(cached) == losses(live) and largest_difference(live, cached) == 0
    for picture in live.rglob("*.png"):
        assert (cached / picture.relative_to(live)).read_bytes() == picture.read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(PRIOR | {"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"train_batch_size": 3}, marks=pytest.mark.slow),
    ],
)
def test_several_rows_give_the_same_but_for_rounding(tiny_base, tmp_path, changes):
    live, cached = trained_both_ways(tiny_base, tmp_path, **changes)
    assert losses(cached) == pytest.approx(losses(live), rel=1e-5)
    assert largest_difference(live, cached) < 1e-4


def test_the_weights_leave_the_unet_and_a_text_of_no_prompt_has_their_products():
    unet = tiny_unet()
    added = {"text_embeds": torch.randn(1, 32), "time_ids": torch.randn(1, 6)}
    given = torch.randn(1, 4, 8, 8), 5, torch.randn(1, 7, 48)
    expected = unet(*given, added_cond_kwargs=added).sample
    numbers = sum(weight.numel() for weight in unet.parameters())
    products = TextProducts(unet, torch.device("cpu"))
    gone = sum(layer.host_weight.numel() for layer in products.layers)
    assert len(products.layers) == sum(isinstance(module, TextProjection) for module in unet.modules()) > 0
    assert sum(weight.numel() for weight in unet.parameters()) == numbers - gone
    assert all(layer.weight.untyped_storage().nbytes() <= 4 for layer in products.layers)
    assert torch.equal(unet(*given, added_cond_kwargs=added).sample, expected)
