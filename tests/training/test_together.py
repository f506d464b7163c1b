"""Runs that share their steps end with the adapters that each gets alone, to rounding; and each
keeps to itself."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.extras.cluster.fleet import needs_to_be_alone, shared_settings
from dreambooth_moslora.extras.cluster.together import Member, train_together
from dreambooth_moslora.plan.plan import make_plan
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training import loop, step
from tests.helpers.tiny_training import (
    adapter_sha256,
    largest_difference,
    logged,
    paint_photos,
    tiny_config,
)
from tests.training.conftest import stop_at

RATE, STEPS = 1e-3, (2, 4, 3)
"""The first ends early, and the third joins when it has."""
HARD = {"target_modules": ("to_q", "to_k", "conv1"), "gradient_accumulation_steps": 2}
HARD |= {"with_prior_preservation": True, "prior": "adapter_off"}


def configs(base: Path, photos: Path, out: Path, **changes) -> list[TrainConfig]:
    """Three runs that differ in photos, seed, length and optimizer."""
    own = [{"max_train_steps": steps, "seed": number} for number, steps in enumerate(STEPS)]
    own[1] |= {"lr_scheduler": "cosine", "lr_warmup_steps": 1, "random_flip": True}
    own[2] |= {"snr_gamma": 5.0, "use_ema": True}
    places = [
        (paint_photos(photos / str(number), number + 2), out / str(number)) for number in range(3)
    ]
    return [
        tiny_config(base, *place, **{"learning_rate": RATE, **one, **changes})
        for place, one in zip(places, own)
    ]


def together(
    runs: list[TrainConfig], most: int, *options: tuple
) -> dict[str, loop.TrainResult | Exception]:
    """What each ended with, by its folder's name."""
    ended = {}
    members = [
        Member(make_plan(config), *own)
        for config, own in zip(runs, options or [()] * len(runs), strict=True)
    ]
    keep = lambda member, result: ended.update({Path(member.plan.config.output_dir).name: result})  # noqa: E731
    train_together(members, most, keep)
    return ended


@pytest.mark.slow
def test_each_adapter_is_that_of_its_run_alone_to_rounding(tiny_base, tmp_path):
    """Adam moves a number by up to the learning rate a step whatever its gradient's size: where the
    gradient is mostly rounding, so is that step. So the bound is a part of the rate."""
    alone = configs(tiny_base, tmp_path / "photos", tmp_path / "alone", **HARD)
    for config in alone:
        loop.train(config)
    shared = configs(tiny_base, tmp_path / "photos", tmp_path / "shared", **HARD)
    ended = together(shared, most=2)
    assert list(ended) == ["0", "2", "1"] or list(ended) == ["0", "1", "2"]
    for config, other in zip(alone, shared, strict=True):
        one, two = RunDir(config.output_dir), RunDir(other.output_dir)
        assert ended[two.path.name].step == config.max_train_steps
        assert largest_difference(one.path, two.path) < RATE / 20
        losses = [[event["loss"] for event in logged(run.path)] for run in (one, two)]
        assert len(losses[0]) == config.max_train_steps and losses[1] == pytest.approx(
            losses[0], rel=1e-4
        )


@pytest.mark.slow
def test_stopped_and_resumed_together_is_the_same_bytes_and_alone_to_rounding(tiny_base, tmp_path):
    def pair(out: str, **changes) -> list[TrainConfig]:
        return configs(
            tiny_base, tmp_path / "photos", tmp_path / out, max_train_steps=4, **changes
        )[:2]

    together(pair("unbroken"), most=2)
    for out in ("again", "apart"):
        ended = together(pair(out), 2, stop_at(2), stop_at(2))
        assert [(result.interrupted, result.step) for result in ended.values()] == [(True, 2)] * 2
    together(pair("again", resume_from_checkpoint="latest"), most=2)
    for config in pair("apart", resume_from_checkpoint="latest"):
        loop.train(config)
    for name in ("0", "1"):
        assert adapter_sha256(tmp_path / "again" / name) == adapter_sha256(
            tmp_path / "unbroken" / name
        )
        assert (
            largest_difference(tmp_path / "apart" / name, tmp_path / "unbroken" / name) < RATE / 20
        )


@pytest.mark.slow
def test_a_bad_run_ends_alone(tiny_base, tmp_path, monkeypatch):
    """One whose loss is not finite, and one whose micro-batch cannot be had: the third goes on."""
    runs = configs(tiny_base, tmp_path / "photos", tmp_path / "out", max_train_steps=3)
    loss_of, micro_batch = step.TrainStep.loss_of, step.TrainStep.micro_batch

    def not_finite(self, *arguments):
        parts = loss_of(self, *arguments)
        return (
            replace(parts, total=parts.total * torch.nan)
            if (self.config.seed, self.step) == (1, 1)
            else parts
        )

    def gone(self, number):
        if (self.config.seed, self.step) == (2, 2):
            raise UserError("its encoding cannot be read any more")
        return micro_batch(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(step.TrainStep, "loss_of", not_finite)
        patch.setattr(step.TrainStep, "micro_batch", gone)
        ended = together(runs, most=3)
    assert ended["0"].step == 3 and ended["0"].proof is not None
    assert "the loss is nan at step 2" in str(ended["1"]) and "cannot be read any more" in str(
        ended["2"]
    )
    assert [event["state"] for event in logged(runs[2].output_dir, "end")] == ["failed"]
    loop.train(replace(runs[0], output_dir=str(tmp_path / "alone")))
    assert largest_difference(tmp_path / "alone", tmp_path / "out" / "0") < RATE / 20


def test_runs_share_their_steps_where_the_unet_computes_one_shape_and_what_cannot_is_named(
    tiny_base, tmp_path
):
    config = configs(tiny_base, tmp_path / "photos", tmp_path)[0]
    assert needs_to_be_alone(config) is None
    flags = {
        "train_text_encoder": True,
        "use_dora": True,
        "lora_dropout": 0.1,
        "enable_bucket": True,
        "caching": "off",
    }
    for name, value in flags.items():
        assert f"--{name}" in needs_to_be_alone(replace(config, **{name: value}))
    # what FLUX.1 is told, and the length of its texts
    of_one_pass = {"guidance_scale": 1.0, "max_sequence_length": 77}
    for name, value in {
        "rank": 8,
        "train_batch_size": 2,
        "resolution": 128,
        "mixer": "none",
        **of_one_pass,
    }.items():
        assert shared_settings(replace(config, **{name: value})) != shared_settings(config)
    own = {
        "seed": 5,
        "learning_rate": 1.0,
        "max_train_steps": 9,
        "optimizer": "Prodigy",
        "instance_prompt": "x",
    }
    assert shared_settings(replace(config, **own)) == shared_settings(config)
