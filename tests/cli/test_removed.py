"""Settings of earlier versions: who still asks for one is told that it is gone; files of runs without it still work."""

import json
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dreambooth_moslora.adapters.metadata import AdapterMetadata
from dreambooth_moslora.cli import evaluate
from dreambooth_moslora.cli.main import main, train_main
from dreambooth_moslora.cli.parser import parse_train_config
from dreambooth_moslora.settings.table import TrainConfig
from tests.helpers.tiny_training import paint_photos

NEEDED = ["--pretrained_model_name_or_path", "toy", "--instance_data_dir", "dog", "--instance_prompt", "a sks dog"]
OFF = {"new_backgrounds": 0, "background_scenes": []}
WHY = "removed, as the project's study showed no gain from new backgrounds"


@pytest.fixture(autouse=True)
def photos(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return paint_photos(tmp_path / "dog")


@pytest.mark.parametrize(
    "words",
    [
        ["--new_backgrounds", "3"],
        ["--new-backgrounds", "3"],
        ["--new_backgrounds=0"],
        ["--background_scenes", "in a garden", "in a barn"],
        ["--background-scenes=in a garden"],
    ],
)
def test_a_flag_is_answered_in_one_line(words, capsys):
    flag = words[0].partition("=")[0].replace("-", "_").replace("__", "--", 1)
    for run in (train_main, lambda argv: main(["train", *argv])):
        assert run([*NEEDED, *words]) == 2
        assert capsys.readouterr().err == f"error: {flag}: {WHY}.\n"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("a.toml", "[photos]\nnew_backgrounds = 3"),
        ("a.toml", "new-backgrounds = 3"),
        ("a.toml", 'background_scenes = ["in a garden"]'),
        ("train_config.json", json.dumps(TrainConfig().to_dict() | OFF | {"new_backgrounds": 3})),
    ],
)
def test_a_setting_in_a_file_is_answered_in_one_line(file, text, capsys):
    Path(file).write_text(text)
    for words in ([*NEEDED, "--config", file], ["dog", "dog", *NEEDED[:2], "--config", file]):
        assert train_main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: `") and line.endswith(f"`: {WHY}.")


def test_an_earlier_runs_file_that_did_not_use_them_is_taken():
    config = parse_train_config([*NEEDED, "--rank", "3", "--resolution", "64"])
    Path("train_config.json").write_text(json.dumps(config.to_dict() | OFF))
    assert parse_train_config(["--config", "train_config.json"]) == config
    assert parse_train_config(["dog", "dog", "--config", "train_config.json"]).rank == 3


@pytest.mark.parametrize("words", [["--leave_one_out"], ["--leave-one-out", "120"], ["--leave_one_out=9"]])
def test_check_answers_its_flag_that_is_gone_in_one_line(words, capsys):
    for command in (["check", "dog"], ["train", *NEEDED]):
        assert main([*command, *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: --leave_one_out: removed, as it found one bad photo of two; ")
    assert main(["check", "dog", "--new_backgrounds", "2"]) == 2
    assert capsys.readouterr().err == f"error: --new_backgrounds: {WHY}.\n"


def published(recipe: dict) -> str:
    facts = AdapterMetadata(4, 4, recipe=recipe, base_id="toy", trigger_words=("sks dog",))
    save_file({"weight": torch.zeros(1, 1)}, "a.safetensors", metadata={"moslora": facts.to_json()})
    return "a.safetensors"


def test_the_recipe_of_a_file_that_used_them_is_taken_without_and_cannot_be_verified(capsys):
    file = published({"seed": 1, "rank": 3, "new_backgrounds": 2})
    config = parse_train_config([*NEEDED, "--like", file])
    assert (config.seed, config.rank) == (1, 3)
    taken, remark = capsys.readouterr().err.splitlines()
    assert "settings like a.safetensors: 2 (" in taken
    assert remark == f"ignored, as they are invalid: `new_backgrounds`: {WHY}"
    assert main(["verify", file, "--photos", "dog"]) == 2
    assert f"`new_backgrounds`: {WHY}" in capsys.readouterr().err


def test_a_run_that_used_them_is_still_evaluated_and_explained(capsys):
    run, used = Path("run"), {"new_backgrounds": 2, "background_scenes": ["in a barn"]}
    run.mkdir()
    config = parse_train_config([*NEEDED, "--rank", "3"])
    (run / "train_config.json").write_text(json.dumps(config.to_dict() | used))
    (run / "metrics.jsonl").write_text("")
    parser = ArgumentParser()
    evaluate.evaluate_arguments(parser)
    assert evaluate.resolve(parser.parse_args(["run"])).rank == 3
    assert main(["explain", "run"]) == 0
