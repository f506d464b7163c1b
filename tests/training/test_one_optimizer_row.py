"""An optimizer is one row: with it the flag, the estimate, a training step and the checkpoint know it."""

from dataclasses import replace

import pytest
import torch

from dreambooth_moslora.cli.parser import parse_train_config
from dreambooth_moslora.core import UserError
from dreambooth_moslora.plan.memory import BaseSize, estimate
from dreambooth_moslora.settings.optimizers import OPTIMIZERS, OptimizerKind
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny_training import adapter_sha256, paint_photos, tiny_config

WORDS = ["--pretrained_model_name_or_path", "toy", "--instance_prompt", "a photo of sks cup", "--instance_data_dir"]


@pytest.fixture
def row(monkeypatch):
    kind = OptimizerKind("torch.optim:RAdam", lambda config: {"betas": (0.8, config.adam_beta2)}, bytes_each=1000)
    monkeypatch.setitem(OPTIMIZERS, "RAdam", kind)


@pytest.mark.usefixtures("row")
def test_the_flag_and_the_estimate_know_the_row():
    config = parse_train_config([*WORDS, "assets/subjects/duck", "--optimizer", "RAdam"])
    known, other = (estimate(replace(config, optimizer=name), BaseSize(), 1) for name in ("RAdam", "AdamW"))
    assert known.training_gib > other.training_gib
    with pytest.raises(UserError, match="choose one of AdamW, Prodigy, AdamWScheduleFree, Adafactor, RAdam"):
        replace(config, optimizer="Lion")


@pytest.mark.usefixtures("row")
def test_a_run_with_the_row_is_resumed_to_the_same_bytes(tmp_path, tiny_base):
    photos = paint_photos(tmp_path / "photos", count=2)
    whole, half = (
        tiny_config(tiny_base, photos, tmp_path / name, optimizer="RAdam", max_train_steps=4, checkpointing_steps=2)
        for name in ("whole", "half")
    )
    train(whole)
    train(replace(half, max_train_steps=2))
    train(replace(half, resume_from_checkpoint="latest"))
    saved = torch.load(tmp_path / "half" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert all("exp_avg_sq" in state for state in saved["state"].values())
    assert adapter_sha256(tmp_path / "half") == adapter_sha256(tmp_path / "whole")
