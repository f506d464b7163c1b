"""Flags of other trainers on the command line."""

import shlex
from pathlib import Path

import pytest

from dreambooth_moslora.cli.command_train import parse_training, train_main
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.disk.paths import find_asset
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.importers.flags import translate_flags
from dreambooth_moslora.settings.train_config import TrainConfig

DIFFUSERS_COMMAND = shlex.split("""
--pretrained_model_name_or_path toy --instance_data_dir assets/subjects/bear --output_dir lora-bear
--instance_prompt "a photo of sks toy" --mixed_precision no --resolution 128
--train_batch_size 1 --repeats 1
--gradient_accumulation_steps 4 --learning_rate 1e-4 --lr_scheduler constant --lr_warmup_steps 0
--max_train_steps 500 --seed 0 --rank 4 --snr_gamma 5 --validation_epochs 25 --center_crop
--checkpointing_steps 100 --report_to tensorboard --allow_tf32""")
"""Command of diffusers' train_dreambooth_lora_sdxl.py."""
WITHOUT_EFFECT = shlex.split("""
--output_kohya_format --dataloader_num_workers 4 --prior_generation_precision fp16
--local_rank=-1 --image-interpolation-mode nearest""")
"""Flags of that script that have no effect here."""
KOHYA_COMMAND = shlex.split("""
--pretrained_model_name_or_path toy --train_data_dir train --output_dir out --output_name dog
--save_model_as safetensors --network_module networks.lora --network_dim 16 --network_alpha 8
--network_train_unet_only --unet_lr 1e-4 --lr_scheduler cosine --optimizer_type AdamW8bit
--max_train_epochs 10 --train_batch_size 2 --resolution 128,128 --enable_bucket
--bucket_reso_steps 64 --caption_extension .txt --cache_latents --mixed_precision no
--gradient_checkpointing --xformers --no_half_vae --min_snr_gamma 5 --sample_prompts prompts.txt
--optimizer_args weight_decay=0.1 betas=0.9,0.99 --seed 42""")
"""Usual command of sd-scripts."""


def parse_config(arguments: list[str]) -> TrainConfig:
    return TrainConfig.from_dict(parse_training(arguments).all_settings)


def list_ignored_lines(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if "no effect here" in line]


def test_command_of_diffusers_names_flags_without_effect_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train_main([*WITHOUT_EFFECT, *DIFFUSERS_COMMAND, "--dry_run"]) == 0
    (line,) = list_ignored_lines(capsys)
    for text in (
        "output_kohya_format True (a UNet's kohya file is always written)",
        "dataloader_num_workers 4 (photos are encoded once)",
        "prior_generation_precision fp16 (class images are generated in the run's precision)",
        "local_rank -1 (",
        "image_interpolation_mode nearest (photos are resized by Lanczos)",
    ):
        assert line.count(text) == 1


def test_flags_without_effect_leave_the_settings_alone(capsys):
    plain = parse_training(DIFFUSERS_COMMAND).all_settings
    assert list_ignored_lines(capsys) == []
    first, last = WITHOUT_EFFECT[:3], WITHOUT_EFFECT[3:]
    assert parse_training([*first, *DIFFUSERS_COMMAND, *last]).all_settings == plain


def test_switch_takes_no_value_and_another_flag_takes_one(capsys):
    """PHOTOS WORD may stand behind the flags."""
    positionals = [find_asset("assets/subjects/bear"), "bear"]
    for flags in (["--xformers"], ["--save_precision", "fp16"], ["--min_snr_gamma", "5"]):
        settings = parse_training(["--base", "toy", *flags, *positionals]).all_settings
        assert settings["instance_prompt"] == "a photo of a sks bear"
    with pytest.raises(UserError, match="--save_precision: expected 1 argument"):
        parse_training([*DIFFUSERS_COMMAND, "--save_precision"])


def test_check_accepts_flags_of_other_trainers(capsys):
    positionals = [find_asset("assets/subjects/bear"), "bear", "--base", "toy", "--no_picture"]
    assert main(["check", *positionals, *WITHOUT_EFFECT]) == 0
    (line,) = list_ignored_lines(capsys)
    assert "local_rank -1 (" in line


def test_unsupported_flags_end_the_command_together():
    flags = ["--timestep_bias_strategy", "later", "--system_prompt", "x", "--use_ema"]
    with pytest.raises(UserError) as caught:
        parse_training([*DIFFUSERS_COMMAND, *flags])
    message = str(caught.value)
    assert all(name in message for name in ("timestep_bias_strategy", "system_prompt", "use_ema"))


def test_flag_with_another_name_is_translated():
    config = parse_config([*DIFFUSERS_COMMAND, "--offset_noise", "--min_snr_gamma", "3"])
    assert (config.noise_offset, config.snr_gamma) == (0.1, 5.0)  # our own flag wins


def test_command_of_kohya_runs_with_its_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train/10_sks dog").mkdir(parents=True)
    Path("prompts.txt").write_text("# samples\nsks dog, running --n blurry --w 1024\nsks dog\n")
    config = parse_config(KOHYA_COMMAND)
    expected = {
        "instance_data_dir": "train/10_sks dog",
        "instance_prompt": "sks dog",
        "repeats": 10,
        "mixer": "none",
        "rank": 16,
        "lora_alpha": 8.0,
        "learning_rate": 1e-4,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 0,
        "use_8bit_adam": True,
        "adam_weight_decay": 0.1,
        "adam_beta2": 0.99,
        "num_train_epochs": 10,
        "resolution": 128,
        "snr_gamma": 5.0,
        "train_text_encoder": False,
        "validation_prompt": ("sks dog, running", "sks dog"),
        "output_dir": "out/dog",
        "center_crop": True,
    }
    assert {name: getattr(config, name) for name in expected} == expected


def test_hyphens_in_flags_of_kohya_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    command = ["--base", "toy", "--train-data-dir", "photos", "--network-dim", "8"]
    config = parse_config(command)
    assert (config.rank, config.lora_alpha, config.instance_data_dir) == (8, 1.0, "photos")


def test_own_flags_of_anima_have_rows():
    flags = ["--qwen3", "q.safetensors", "--vae_disable_cache", "--attn_mode", "flash"]
    own_arguments, translation = translate_flags([*flags, "--t5_max_token_length", "256"], [])
    assert not own_arguments and translation is not None
    assert translation.settings == {"max_sequence_length": 256}


def test_every_optimizer_argument_is_converted_or_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    command = ["--base", "toy", "--train_data_dir", "photos", "--optimizer_type", "prodigy"]
    arguments = ["d_coef=1", "decouple=True", "betas=0.9,0.99", "safeguard_warmup=True"]
    config = parse_config([*command, "--optimizer_args", *arguments])
    assert (config.adam_beta1, config.adam_beta2) == (0.9, 0.99)
    assert config.prodigy_safeguard_warmup and not config.prodigy_use_bias_correction
    with pytest.raises(UserError, match="optimizer_args d_coef=2"):
        parse_training([*command, "--optimizer_args", "d_coef=2"])


def test_compile_switch_of_musubi_tuner_takes_no_value(tmp_path, monkeypatch):
    """It is a setting with a value here."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    command = "--dit toy --network_module networks.lora_zimage --compile --train_data_dir photos"
    config = parse_config(command.split())
    assert (config.compile, config.instance_data_dir) == ("on", "photos")


def test_text_encoders_rate_is_the_largest_of_several(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    command = ["--base", "toy", "--train_data_dir", "photos", "--network_dim", "4"]
    assert parse_config([*command, "--text_encoder_lr", "1e-5", "2e-5"]).text_encoder_lr == 2e-5
    assert not parse_config([*command, "--text_encoder_lr", "0"]).train_text_encoder


def test_folder_of_text_to_image_in_diffusers_is_no_command_of_kohya():
    flags = ["--center_crop", "--resolution", "128", "--instance_prompt", "sks toy"]
    folder = ["--train_data_dir", find_asset("assets/subjects/bear")]
    config = parse_config(["--base", "toy", *folder, *flags])
    assert config.lora_alpha is None and config.instance_data_dir == folder[1]
    with pytest.raises(UserError, match="use_ema True"):
        parse_training(["--base", "toy", *folder, *flags, "--use_ema"])


def test_several_validation_images_belong_to_one_flag():
    images = ["--validation_images", "a.png", "b.png", "--validation_scheduler", "DDPMScheduler"]
    with pytest.raises(UserError, match=r"validation_images \['a.png', 'b.png'\]: samples"):
        parse_training([*DIFFUSERS_COMMAND, *images])


def test_rates_of_text_encoders_in_sdxl_scripts_are_translated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    command = ["--base", "toy", "--train_data_dir", "photos", "--network_dim", "4"]
    rates = ["--learning_rate_te1", "1e-5", "--learning_rate_te2", "2e-5"]
    assert parse_config([*command, *rates]).text_encoder_lr == 2e-5
