"""Parameter groups: who is trained how fast, and what does not decay."""

import sys

import pytest
import torch

from dreambooth_moslora.adapters.moslora import MoSLoraConfig, inject
from dreambooth_moslora.core import UserError
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.optimizer import (
    ScheduleFreeAverage,
    make_lr_schedule,
    make_optimizer,
    parameter_groups,
)


def components(**extra):
    models = {name: torch.nn.ModuleDict({"to_q": torch.nn.Linear(8, 8)}) for name in ("unet", "text_encoder")}
    for model in models.values():
        inject(model, MoSLoraConfig(r=4, target_modules=["to_q"], **extra))
    return models


def groups_of(config, **extra):
    return {group["name"]: group for group in parameter_groups(config, components(**extra))}


def test_mixers_do_not_decay_and_have_their_own_rate():
    groups = groups_of(TrainConfig(learning_rate=1e-4, text_encoder_lr=1e-6, mixer_lr_scale=3, adam_weight_decay=0.1))
    assert [groups[n]["lr"] for n in ("unet", "unet.mixer")] == pytest.approx([1e-4, 3e-4])
    assert [groups[n]["lr"] for n in ("text_encoder", "text_encoder.mixer")] == pytest.approx([1e-6, 3e-6])
    assert groups["unet"]["weight_decay"] == 0.1 and groups["text_encoder"]["weight_decay"] == 1e-3
    assert groups["unet.mixer"]["weight_decay"] == groups["text_encoder.mixer"]["weight_decay"] == 0
    assert [tuple(p.shape) for p in groups["unet.mixer"]["params"]] == [(4, 4)] and len(groups["unet"]["params"]) == 2


def test_a_frozen_mixer_has_no_group():
    assert set(groups_of(TrainConfig(), train_mixer=False)) == {"unet", "text_encoder"}


def test_scale_lr_counts_accumulation_batch_and_processes():
    config = TrainConfig(scale_lr=True, train_batch_size=3, gradient_accumulation_steps=2, learning_rate=1e-4)
    groups = {group["name"]: group["lr"] for group in parameter_groups(config, components(), world_size=4)}
    assert groups["unet"] == pytest.approx(24e-4) and groups["text_encoder"] == 5e-6


def test_a_text_encoder_without_a_rate_takes_that_of_the_unet():
    assert groups_of(TrainConfig(text_encoder_lr=0, learning_rate=1e-3))["text_encoder"]["lr"] == 1e-3


def test_warmup_counts_optimizer_steps():
    config = TrainConfig(lr_scheduler="linear", lr_warmup_steps=2, learning_rate=1.0)
    optimizer = make_optimizer(config, parameter_groups(config, components()))
    schedule = make_lr_schedule(config, optimizer, max_train_steps=4)
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0])


def stepped(config, module_groups, count=3):
    """The first group's parameters after some steps with gradients of one, and the optimizer."""
    optimizer = make_optimizer(config, module_groups)
    for _ in range(count):
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = torch.ones_like(weight)
        optimizer.step()
    return module_groups[0]["params"], optimizer


def test_adafactor_steps_by_the_given_rate_whatever_the_size_of_the_weights():
    groups = parameter_groups(TrainConfig(adam_weight_decay=0, learning_rate=1e-2), components())
    before = [weight.detach().clone() for weight in groups[0]["params"]]
    after, _ = stepped(TrainConfig(optimizer="adafactor"), groups)
    for old, new in zip(before, after, strict=True):
        assert torch.allclose(old - new, torch.full_like(new, 3e-2), rtol=1e-3)


@pytest.mark.extra("schedulefree")
def test_the_schedule_free_average_is_what_the_library_evaluates():
    groups = parameter_groups(TrainConfig(learning_rate=1e-2), components())
    config = TrainConfig(optimizer="schedulefree")
    weights, optimizer = stepped(config, groups)
    ours = [value.clone() for value in ScheduleFreeAverage(weights, optimizer).values()]
    assert not any(torch.equal(one, weight) for one, weight in zip(ours, weights))
    optimizer.eval()
    assert all(torch.equal(one, weight) for one, weight in zip(ours, weights))


def test_a_library_that_is_missing_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(UserError, match="AdamWScheduleFree needs schedulefree: pip install schedulefree"):
        make_optimizer(TrainConfig(optimizer="AdamWScheduleFree"), [])
