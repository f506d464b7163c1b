"""Optimizers, their groups, states and averages."""

import sys
from dataclasses import replace

import pytest
import torch

from dreambooth_moslora.disk.run_folder import OPTIMIZER_NAME
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.method.moslora import MoSLoraConfig, inject
from dreambooth_moslora.plan.base_size import BaseSize
from dreambooth_moslora.plan.memory import estimate_memory
from dreambooth_moslora.settings import rules
from dreambooth_moslora.settings.lr_schedules import LR_SCHEDULES
from dreambooth_moslora.settings.optimizers import (
    BYTES_IN_8_BIT,
    OPTIMIZERS,
    OptimizerKind,
)
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training import checkpoint, loop
from dreambooth_moslora.training import optimizer as optimizers
from dreambooth_moslora.training.optimizer import (
    build_parameter_groups,
    make_lr_schedule,
    make_optimizer,
)
from tests.helpers.command_line import parse_train_config
from tests.helpers.tiny_training import adapter_sha256, paint_photos, tiny_config


def components(**extra):
    models = {
        name: torch.nn.ModuleDict({"to_q": torch.nn.Linear(8, 8)})
        for name in ("unet", "text_encoder")
    }
    for model in models.values():
        inject(model, MoSLoraConfig(r=4, target_modules=["to_q"], **extra))
    return models


def groups_of(config, world_size=1, **extra):
    return {
        group["name"]: group
        for group in build_parameter_groups(config, components(**extra), world_size=world_size)
    }


def test_each_group_has_its_own_rate_and_mixers_do_not_decay():
    groups = groups_of(
        TrainConfig(
            learning_rate=1e-4, text_encoder_lr=1e-6, mixer_lr_scale=3, adam_weight_decay=0.1
        )
    )
    assert [groups[n]["lr"] for n in ("unet", "unet.mixer")] == pytest.approx([1e-4, 3e-4])
    assert [groups[n]["lr"] for n in ("text_encoder", "text_encoder.mixer")] == pytest.approx(
        [1e-6, 3e-6]
    )
    assert groups["unet"]["weight_decay"] == 0.1 and groups["text_encoder"]["weight_decay"] == 1e-3
    assert groups["unet.mixer"]["weight_decay"] == groups["text_encoder.mixer"]["weight_decay"] == 0
    assert [tuple(p.shape) for p in groups["unet.mixer"]["params"]] == [(4, 4)] and len(
        groups["unet"]["params"]
    ) == 2
    assert set(groups_of(TrainConfig(), train_mixer=False)) == {"unet", "text_encoder"}
    assert (
        groups_of(TrainConfig(text_encoder_lr=0, learning_rate=1e-3))["text_encoder"]["lr"] == 1e-3
    )
    config = TrainConfig(
        scale_lr=True, train_batch_size=3, gradient_accumulation_steps=2, learning_rate=1e-4
    )
    groups = groups_of(config, world_size=4)
    assert groups["unet"]["lr"] == pytest.approx(24e-4) and groups["text_encoder"]["lr"] == 5e-6


def stepped(name):
    """The first group's parameters before and after three steps with gradients of one, and the
    optimizer."""
    settings = TrainConfig(adam_weight_decay=0, learning_rate=1e-2, optimizer=name)
    groups = build_parameter_groups(settings, components())
    weights, optimizer = groups[0]["params"], make_optimizer(settings, groups)
    before = [weight.detach().clone() for weight in weights]
    for _ in range(3):
        for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    return before, weights, optimizer


def test_adafactor_step_size_ignores_weight_size():
    before, after, _ = stepped("adafactor")
    for old, new in zip(before, after, strict=True):
        assert torch.allclose(old - new, torch.full_like(new, 3e-2), rtol=1e-3)


@pytest.mark.extra("schedulefree")
def test_the_schedule_free_average_is_what_the_library_evaluates():
    _, weights, optimizer = stepped("schedulefree")
    ours = [
        value.clone()
        for value in optimizers.ScheduleFreeAverage(weights, optimizer).compute_average()
    ]
    assert not any(map(torch.equal, ours, weights))
    optimizer.eval()
    assert all(map(torch.equal, ours, weights))


def each_optimizer():
    """A case for each row, which is skipped where its module is not installed."""
    for name, kind in OPTIMIZERS.items():
        module = kind.import_path.partition(":")[0].partition(".")[0]
        marks = [pytest.mark.extra(module)] if kind.package else []
        yield pytest.param(name, marks=marks)


def of_groups(optimizer):
    """The values of each group, without its parameters."""
    groups = optimizer.state_dict()["param_groups"]
    return [{name: group[name] for name in group.keys() - {"params"}} for group in groups]


@pytest.mark.parametrize("name", each_optimizer())
def test_memory_estimate_equals_optimizer_states(name):
    """Prodigy keeps two states more, a third of a GiB for SDXL at rank 32."""
    kind = OPTIMIZERS[name]
    _, weights, optimizer = stepped(name)

    # What its steps change in a group. Without it a resumed run would go on with the first values.
    settings = TrainConfig(adam_weight_decay=0, learning_rate=1e-2, optimizer=name)
    fresh = make_optimizer(settings, build_parameter_groups(settings, components()))
    for group, before in zip(of_groups(optimizer), of_groups(fresh), strict=True):
        changed = {value for value in group if group[value] != before.get(value)}
        assert changed <= {*kind.learns}

    # What it keeps of each parameter. In a checkpoint there are no gradients, and with an average
    # there are the weights behind it too.
    in_checkpoint = kind.bytes_each - 4 + (4 if kind.averages else 0)
    tensors = [
        tensor
        for weight in weights
        for tensor in (weight, weight.grad, *optimizer.state[weight].values())
    ]
    size = sum(
        tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.dim()
    )
    assert size <= kind.bytes_each * sum(weight.numel() for weight in weights)
    for in_8_bit, expected in (
        (False, in_checkpoint),
        (True, BYTES_IN_8_BIT - 4 if kind.in_8_bit else in_checkpoint),
    ):
        cost = estimate_memory(TrainConfig(optimizer=name, use_8bit_adam=in_8_bit), BaseSize(), 1)
        assert cost.checkpoint_gib * 2**30 == pytest.approx(expected * cost.adapter_parameters)


def test_new_optimizer_needs_one_row(tmp_path, tiny_base, monkeypatch):
    """A library that is missing is one line."""
    kind = OptimizerKind(
        import_path="torch.optim:RAdam",
        summary="is rectified",
        arguments={"betas": ("adam_beta1", "adam_beta2")},
        bytes_each=1000,
    )
    monkeypatch.setitem(OPTIMIZERS, "RAdam", kind)
    flags = [
        "--pretrained_model_name_or_path",
        "toy",
        "--instance_prompt",
        "a photo of sks cup",
        "--instance_data_dir",
    ]
    flagged = parse_train_config([*flags, "assets/subjects/duck", "--optimizer", "RAdam"])
    radam, adamw = (
        estimate_memory(replace(flagged, optimizer=name), BaseSize(), 1)
        for name in ("RAdam", "AdamW")
    )
    assert radam.training_gib > adamw.training_gib
    assert rules.list_remarks(replace(flagged, adam_beta1=0.8, adam_epsilon=1e-7)) == [
        "--adam_epsilon has no effect with --optimizer RAdam"
    ]
    with pytest.raises(UserError, match=f"choose one of {', '.join(OPTIMIZERS)}"):
        replace(flagged, optimizer="Nobody")
    photos, sizes = (
        paint_photos(tmp_path / "photos", count=2),
        {"max_train_steps": 4, "checkpointing_steps": 2},
    )
    sizes["optimizer"] = "RAdam"
    whole, half = (
        tiny_config(tiny_base, photos, tmp_path / name, **sizes) for name in ("whole", "half")
    )
    for config in (
        whole,
        replace(half, max_train_steps=2),
        replace(half, resume_from_checkpoint="latest"),
    ):
        loop.train(config)
    saved = torch.load(tmp_path / "half" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert all("exp_avg_sq" in state for state in saved["state"].values())
    assert adapter_sha256(tmp_path / "half") == adapter_sha256(tmp_path / "whole")
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(
        UserError, match="AdamWScheduleFree needs schedulefree: pip install schedulefree"
    ):
        make_optimizer(TrainConfig(optimizer="AdamWScheduleFree"), [])


OF_SCHEDULES = {"lr_warmup_steps": 2, "lr_num_cycles": 3, "lr_power": 2.0}
# Shares of the rate at steps 1, 6 and 9 of 10, with these.
SHARES = {
    "linear": (0.5, 0.5, 0.125),
    "cosine": (0.5, 0.5, 0.0381),
    "cosine_with_restarts": (0.5, 0.5, 0.3087),
    "polynomial": (0.5, 0.25, 0.0156),
    "constant": (1, 1, 1),
    "constant_with_warmup": (0.5, 1, 1),
}


def test_each_schedule_has_the_rates_of_its_name():
    assert SHARES.keys() == LR_SCHEDULES.keys()
    for name, shares in SHARES.items():
        settings = TrainConfig(lr_scheduler=name, learning_rate=1e-3, **OF_SCHEDULES)
        optimizer = make_optimizer(settings, build_parameter_groups(settings, components()))
        schedule = make_lr_schedule(settings, optimizer, max_train_steps=10)
        rates = [schedule.lr_lambdas[0](step) for step in (1, 6, 9)]
        assert rates == pytest.approx(shares, abs=2e-4), name


@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_a_schedule_goes_on_at_the_rate_at_which_it_stopped(name, tmp_path):
    settings = TrainConfig(
        lr_scheduler=name,
        learning_rate=1e-3,
        text_encoder_lr=1e-4,
        **OF_SCHEDULES,
    )

    def begun():
        optimizer = make_optimizer(settings, build_parameter_groups(settings, components()))
        return optimizer, make_lr_schedule(settings, optimizer, max_train_steps=10)

    # Five steps, a checkpoint after the third, and the rates of each.
    optimizer, schedule = begun()
    rates = {}
    for step in range(1, 6):
        optimizer.step()
        schedule.step()
        rates[step] = [group["lr"] for group in optimizer.param_groups]
        if step == 3:
            torch.save(optimizer.state_dict(), tmp_path / OPTIMIZER_NAME)

    # A run that goes on from there has the same rates.
    optimizer, schedule = begun()
    checkpoint.restore_optimizer(tmp_path, 3, optimizer, schedule)
    for step in (3, 4, 5):
        assert [group["lr"] for group in optimizer.param_groups] == rates[step]
        optimizer.step()
        schedule.step()
