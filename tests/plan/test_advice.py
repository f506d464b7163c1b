"""What is advised before a run: more exposures, and that DoRA is another adapter elsewhere."""

from dataclasses import replace

from dreambooth_moslora.adapters.metadata import DORA_NOTE
from dreambooth_moslora.plan.plan import make_plan
from dreambooth_moslora.plan.steps import plan_steps
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.dry_run import advice, exposure_advice
from tests.helpers.odd_photos import picture


def test_too_few_exposures_are_said_with_the_flag_that_sets_them():
    (line,) = exposure_advice(plan_steps(TrainConfig(), 5))
    assert "about 2 times" in line and "--exposures_per_photo" in line
    assert exposure_advice(plan_steps(TrainConfig(exposures_per_photo=19, train_batch_size=1), 5))
    assert exposure_advice(plan_steps(TrainConfig(exposures_per_photo=20), 5)) == []


def test_a_run_with_dora_is_told_before_it_begins_what_other_programs_make_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture().save("0.png")
    config = TrainConfig(instance_data_dir=".", resolution=64, use_dora=True)
    assert DORA_NOTE in advice(make_plan(config))
    assert DORA_NOTE not in advice(make_plan(replace(config, use_dora=False)))
    assert "AUTOMATIC1111, InvokeAI: another adapter" in DORA_NOTE
