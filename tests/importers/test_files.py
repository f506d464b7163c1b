"""Configuration files of other trainers: recognized by shape, read safely, written as TOML."""

import os
import tomllib
from pathlib import Path

import pytest

from dreambooth_moslora.cli.command_train import parse_training
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.importers.files import load_config
from dreambooth_moslora.importers.rows import list_rows
from dreambooth_moslora.settings.train_config import SETTINGS, TrainConfig
from tests.helpers.foreign_configs import CONFIGS, write_config

HOSTILE = {
    "tag.yaml": ("!!python/object/apply:os.system ['touch hacked']", "cannot be read"),
    "bomb.yaml": ("a: &a [x]\nb: [*a, *a]", "aliases"),
    "deep.yaml": ("[" * 5000, "cannot be read"),
    "deep.toml": (f"network_dim = {'[' * 5000}", "nested too deep"),
    "deep.json": ('{"model_family": ' + "[" * 100_000, "recursion depth"),
    "twice.yaml": ("job: extension\njob: x", "job is given twice"),
    "twice.json": ('{"training_method": "LORA", "training_method": "X"}', "given twice"),
    "missing.toml": (
        'network_dim = 4\ndataset_config = "none.toml"',
        "none.toml: there is no",
    ),
    "pipe.toml": ('network_dim = 4\ndataset_config = "pipe"', "pipe: it is a pipe"),
    "outside.json": (
        '{"training_method": "LORA", "concept_file_name": "../outside.txt"}',
        "outside.txt: Invalid JSON",
    ),
    "kinds.toml": ('network_dim = ["x"]\nlearning_rate = nan', "of another kind"),
    "kinds.json": ('{"model_family": "flux", "flow_schedule_shift": {}}', "expected a number"),
    "kinds.yaml": ("{job: x, config: {process: [3]}}", "training jobs alone"),
    "list.yaml": ("- 1", "expected a table"),
    "own.yaml": ("rank: 8", "no configuration of a trainer"),
    "huge.yaml": ("x" * (20 * 2**20), "it has more than 1 MiB"),
}
"""File's name -> its content, and a part of the one line that it costs."""


@pytest.fixture(autouse=True)
def work_in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_costs_one_line(name, capsys):
    content, message = HOSTILE[name]
    Path(name).write_text(content)
    Path("../outside.txt").write_text("secret")
    os.mkfifo("pipe")
    assert main(["train", "--config", name]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error and not Path("hacked").exists()


@pytest.mark.parametrize("trainer", CONFIGS)
def test_file_means_the_same_settings_here(trainer):
    _, translation = load_config(write_config(trainer))
    assert not translation.unsupported and not translation.unknown
    config = TrainConfig.from_dict(translation.settings)
    expected = CONFIGS[trainer].settings
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("trainer", CONFIGS)
def test_train_reads_the_file_and_reports_every_key(trainer, capsys):
    path = write_config(trainer)
    settings = parse_training(["--config", str(path), "--rank", "3"]).all_settings
    assert settings["rank"] == 3
    report = capsys.readouterr().err
    assert report.startswith("Translated from ")
    assert "plain LoRA" in report and f"--learning_rate {settings['learning_rate']}" in report
    assert max(map(len, report.splitlines())) <= 100


@pytest.mark.parametrize("trainer", CONFIGS)
def test_converted_file_means_what_the_file_means(trainer):
    path = write_config(trainer)
    assert main(["convert", str(path), "--out", "ours.toml"]) == 0
    converted = TrainConfig.from_dict(tomllib.loads(Path("ours.toml").read_text()))
    assert converted == TrainConfig.from_dict(load_config(path)[0])
    assert main(["convert", str(path), "--out", "ours.toml"]) == 2  # never replaced
    assert main(["convert", "ours.toml"]) == 2


def test_own_file_is_read_as_ours():
    Path("own.toml").write_text("[training]\nrank = 8\nlearning_rate = 1e-4\n")
    assert load_config(Path("own.toml")) == ({"rank": 8, "learning_rate": 1e-4}, None)


@pytest.mark.parametrize("trainer", CONFIGS)
def test_every_row_names_settings_that_exist(trainer):
    for key, row in list_rows(CONFIGS[trainer].table):
        setting = getattr(row, "setting", None)
        assert setting is None or setting in SETTINGS, key


def test_unsupported_keys_end_the_command_together():
    path = write_config("ai-toolkit", ("dtype: bf16", "loss_type: mae\n        noise_offset: x"))
    with pytest.raises(UserError, match=r"(?s)train\.loss_type mae.*train\.noise_offset x"):
        parse_training(["--config", str(path)])
