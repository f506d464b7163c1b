"""What is advised before a run: settings that have no effect together."""

from dataclasses import replace

import pytest

from dreambooth_moslora.adapters.metadata import DORA_NOTE
from dreambooth_moslora.plan.steps import plan_steps
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training import dry_run as advice
from dreambooth_moslora.training.dry_run import advice_before_run, exposure_advice, settings_without_effect
from tests.helpers.odd_photos import picture


def test_defaults_draw_no_advice_alone_or_beside_a_setting_that_switches_them_off():
    assert settings_without_effect(TrainConfig()) == []
    switched_off = TrainConfig(mixer="none", max_train_steps=3, optimizer="Prodigy", learning_rate=1.0)
    assert settings_without_effect(switched_off) == []


def test_too_few_exposures_are_said_with_the_flag_that_sets_them():
    (line,) = exposure_advice(plan_steps(TrainConfig(), 5))
    assert "about 2 times" in line and "--exposures_per_photo" in line
    assert exposure_advice(plan_steps(TrainConfig(exposures_per_photo=19, train_batch_size=1), 5))
    assert exposure_advice(plan_steps(TrainConfig(exposures_per_photo=20), 5)) == []


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"prior": "adapter_off"}, "--prior "),
        ({"timestep_bias_multiplier": 2.0}, "--timestep_bias_multiplier "),
        ({"text_encoder_lr": 1e-5}, "--text_encoder_lr "),
        ({"lr_warmup_steps": 10}, "--lr_warmup_steps "),
        ({"mixer": "none", "mixer_lr_scale": 2.0}, "--train_mixer and --mixer_lr_scale "),
        ({"num_train_epochs": 3, "max_train_steps": 10}, "--num_train_epochs "),
        ({"num_train_epochs": 3, "exposures_per_photo": 10}, "--num_train_epochs "),
    ],
)
def test_a_setting_without_effect_is_named_once(settings, names, monkeypatch):
    (line,) = settings_without_effect(TrainConfig(**settings))
    assert line.startswith(names)
    monkeypatch.setattr(advice, "DEFAULTS", advice.DEFAULTS | settings)  # the default: nobody set it
    assert settings_without_effect(TrainConfig(**settings)) == []


def test_a_run_with_dora_is_told_before_it_begins_what_other_programs_make_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture().save("0.png")
    config = TrainConfig(instance_data_dir=".", resolution=64, use_dora=True)
    assert DORA_NOTE in advice_before_run(config, None)
    assert DORA_NOTE not in advice_before_run(replace(config, use_dora=False), None)
    assert "AUTOMATIC1111, InvokeAI: another adapter" in DORA_NOTE
