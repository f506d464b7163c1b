"""The Train form, filled from a configuration of another trainer."""

import pytest

from dreambooth_moslora.importers.files import load_config
from dreambooth_moslora.settings.parsing import parse_settings
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.ui.train.config_upload import collect_field_values
from dreambooth_moslora.ui.train.train_form import TrainForm
from tests.helpers.foreign_configs import CONFIGS, write_config
from tests.ui.conftest import write_noise_photos

SHARED = ("rank", "learning_rate", "mixer", "validation_prompt")
"""Settings of every example that the form has."""


@pytest.mark.parametrize("trainer", CONFIGS)
def test_filled_form_means_what_the_file_means(trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = parse_settings(load_config(write_config(trainer))[0])
    values, lacking = collect_field_values(settings)
    write_noise_photos(tmp_path / "photos", 2)
    form = TrainForm(**{"class_word": "dog"} | values)
    choices = form.choose_settings("toy", 128, tmp_path / "photos", tmp_path / "run")
    config = TrainConfig.from_dict(choices.all_settings)
    expected = TrainConfig.from_dict(settings)
    assert [getattr(config, name) for name in SHARED] == [
        getattr(expected, name) for name in SHARED
    ]
    assert "adam_weight_decay" in lacking and not {*lacking} & {*SHARED}
