"""Flags of other trainers that have no effect here: they are accepted, and named in one line."""

import shlex

import pytest

from dreambooth_moslora.cli.command_train import parse_training, train_main
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.cli.parser import FOREIGN_FLAGS
from dreambooth_moslora.disk.paths import find_asset
from dreambooth_moslora.errors import UserError

COMMAND = shlex.split("""
--pretrained_model_name_or_path toy --instance_data_dir assets/subjects/bear --output_dir lora-bear
--instance_prompt "a photo of sks toy" --mixed_precision no --resolution 128
--train_batch_size 1 --repeats 1
--gradient_accumulation_steps 4 --learning_rate 1e-4 --lr_scheduler constant --lr_warmup_steps 0
--max_train_steps 500 --seed 0 --rank 4 --snr_gamma 5 --validation_epochs 25 --center_crop
--checkpointing_steps 100 --report_to tensorboard --allow_tf32""")
"""A command of diffusers' train_dreambooth_lora_sdxl.py."""
WITHOUT_EFFECT = shlex.split("""
--output_kohya_format --dataloader_num_workers 4 --prior_generation_precision fp16
--local_rank=-1 --image-interpolation-mode nearest""")
"""Flags of that script that have no effect here."""


def list_ignored_lines(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("Ignored")]


def test_a_full_command_of_diffusers_runs_and_its_flags_without_effect_are_named_in_one_line(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert train_main([*WITHOUT_EFFECT, *COMMAND, "--dry_run"]) == 0
    (line,) = list_ignored_lines(capsys)
    assert line.startswith("Ignored, as they have no effect here: --output_kohya_format (a UNet's")
    for flag in (
        "--dataloader_num_workers 4 (photos are encoded once",
        "--prior_generation_precision fp16 (class images are generated in the run's precision",
        "--local_rank -1 (",
        "--image_interpolation_mode nearest (photos are resized by Lanczos",
    ):
        assert flag in line


def test_the_settings_are_those_of_the_command_without_them(capsys):
    plain = parse_training(COMMAND).all_settings
    assert list_ignored_lines(capsys) == []
    first_flags, last_flags = WITHOUT_EFFECT[:3], WITHOUT_EFFECT[3:]
    assert parse_training([*first_flags, *COMMAND, *last_flags]).all_settings == plain


def test_a_switch_takes_no_word_and_a_flag_only_its_value(capsys):
    """Words may stand behind the flags."""
    positionals = [find_asset("assets/subjects/bear"), "bear"]
    for flags in (["--xformers"], ["--save_precision", "fp16"]):
        settings = parse_training(["--base", "toy", *flags, *positionals]).all_settings
        assert settings["instance_prompt"] == "a photo of a sks bear"
    with pytest.raises(UserError, match="--save_precision: expected 1 argument"):
        parse_training([*COMMAND, "--save_precision"])


def test_check_takes_them_too(capsys):
    positionals = [find_asset("assets/subjects/bear"), "bear", "--base", "toy", "--no_picture"]
    assert main(["check", *positionals, *WITHOUT_EFFECT]) == 0
    assert len(list_ignored_lines(capsys)) == 1


@pytest.mark.parametrize("flag", ["timestep_bias_strategy", "system_prompt", "use_ema"])
def test_a_flag_that_would_change_the_training_still_ends_the_command(flag):
    with pytest.raises(UserError, match=f"--{flag}: "):
        parse_training([*COMMAND, f"--{flag}", "later"])
    assert flag in FOREIGN_FLAGS
