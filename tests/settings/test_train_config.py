"""The settings: every flag of diffusers' script means what it means there; files under flags; mistakes in one line."""

import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from dreambooth_moslora.cli.parser import FOREIGN_FLAGS, parse_train_config
from dreambooth_moslora.core import UserError
from dreambooth_moslora.settings.table import TrainConfig

NEEDED = [
    "--pretrained_model_name_or_path",
    "toy",
    "--instance_data_dir",
    "x",
    "--instance_prompt",
    "a photo of sks dog",
]
DIFFUSERS_DEFAULTS = {
    "pretrained_vae_model_name_or_path": None,
    "revision": None,
    "variant": None,
    "dataset_name": None,
    "dataset_config_name": None,
    "cache_dir": None,
    "image_column": "image",
    "caption_column": None,
    "repeats": 1,
    "class_data_dir": None,
    "class_prompt": None,
    "validation_prompt": None,
    "num_validation_images": 4,
    "validation_epochs": 50,
    "do_edm_style_training": False,
    "with_prior_preservation": False,
    "prior_loss_weight": 1.0,
    "num_class_images": 100,
    "output_dir": "lora-dreambooth-model",
    "output_kohya_format": False,
    "seed": None,
    "resolution": 1024,
    "center_crop": False,
    "random_flip": False,
    "train_text_encoder": False,
    "train_batch_size": 4,
    "sample_batch_size": 4,
    "num_train_epochs": 1,
    "max_train_steps": None,
    "checkpointing_steps": 500,
    "checkpoints_total_limit": None,
    "resume_from_checkpoint": None,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "learning_rate": 1e-4,
    "text_encoder_lr": 5e-6,
    "scale_lr": False,
    "lr_scheduler": "constant",
    "snr_gamma": None,
    "lr_warmup_steps": 500,
    "lr_num_cycles": 1,
    "lr_power": 1.0,
    "dataloader_num_workers": 0,
    "optimizer": "AdamW",
    "use_8bit_adam": False,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "prodigy_beta3": None,
    "prodigy_decouple": True,
    "adam_weight_decay": 1e-4,
    "adam_weight_decay_text_encoder": 1e-3,
    "adam_epsilon": 1e-8,
    "prodigy_use_bias_correction": True,
    "prodigy_safeguard_warmup": True,
    "max_grad_norm": 1.0,
    "push_to_hub": False,
    "hub_token": None,
    "hub_model_id": None,
    "logging_dir": "logs",
    "allow_tf32": False,
    "report_to": "tensorboard",
    "mixed_precision": None,
    "prior_generation_precision": None,
    "local_rank": -1,
    "enable_xformers_memory_efficient_attention": False,
    "rank": 4,
    "lora_dropout": 0.0,
    "use_dora": False,
    "image_interpolation_mode": "lanczos",
}
"""Every optional flag of train_dreambooth_lora_sdxl.py, with its default there."""

EXAMPLES = {
    "lr_scheduler": "cosine",
    "optimizer": "prodigy",
    "mixed_precision": "bf16",
    "prior_generation_precision": "fp32",
    "image_interpolation_mode": "nearest_exact",
    "report_to": "wandb",
    "local_rank": "0",
    "resolution": "512",
    "snr_gamma": "5.0",
    "prodigy_beta3": "0.5",
    "lora_dropout": "0.1",
}
MEANINGS = {"optimizer": "Prodigy"}


def answers_in(file: str) -> dict[str, str]:
    """Flags, given beside NEEDED -> the whole line that answers them."""
    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    return {words: line.strip() for words, line in zip(lines[::2], lines[1::2], strict=True)}


REFUSALS = answers_in("refusals.txt")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.mark.parametrize("name", DIFFUSERS_DEFAULTS)
def test_diffusers_flag_has_its_default_and_takes_a_value(name):
    default = DIFFUSERS_DEFAULTS[name]
    config = parse_train_config(NEEDED)
    found = config.sample_count if name == "num_validation_images" else getattr(config, name)
    assert found == default and type(found) is type(default)
    others = NEEDED[:2] + NEEDED[4:] if name == "dataset_name" else NEEDED
    if default is False:
        extra = ["--class_prompt", "a dog"] if name == "with_prior_preservation" else []
        assert getattr(parse_train_config([*others, f"--{name}", *extra]), name) is True
        return
    kind = type(default) if default is not None else str
    given = EXAMPLES.get(name, {int: "7", float: "0.5", bool: "False", str: "7"}[kind])
    found = getattr(parse_train_config([*others, f"--{name}", given]), name)
    expected = MEANINGS.get(name, False if kind is bool else type(found)(given))
    assert found == expected != default


def test_the_flags_that_diffusers_requires_are_required():
    with pytest.raises(UserError, match=r"--pretrained_model_name_or_path, --instance_prompt, --instance_data_dir"):
        parse_train_config([])


def test_a_command_of_diffusers_readme_is_taken_as_it_is():
    command = """--pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0 --instance_data_dir=dog
      --pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix --output_dir=lora-trained-xl
      --mixed_precision=fp16 --resolution=1024 --train_batch_size=1 --gradient_accumulation_steps=4
      --learning_rate=1e-4 --report_to=wandb --lr_scheduler=constant --lr_warmup_steps=0 --max_train_steps=500
      --validation_epochs=25 --seed=0 --push_to_hub --use_8bit_adam --gradient_checkpointing"""
    words = [
        *command.split(),
        "--instance_prompt=a photo of sks dog",
        "--validation_prompt=A photo of sks dog in a bucket",
    ]
    config = parse_train_config(words)
    assert (config.max_train_steps, config.learning_rate, config.seed) == (500, 1e-4, 0)
    assert config.validation_prompt == "A photo of sks dog in a bucket" and config.push_to_hub


def test_hyphens_are_underscores_and_values_stay_as_they_are():
    config = parse_train_config([*NEEDED, "--train-batch-size", "2", "--output-dir=my-run", "--no-train-mixer"])
    assert (config.train_batch_size, config.output_dir, config.train_mixer) == (2, "my-run", False)


@pytest.mark.parametrize("words", [["--no_train_mixer"], ["--train_mixer", "false"], ["--train-mixer=False"]])
def test_a_switch_is_undone_in_three_ways(words):
    assert parse_train_config([*NEEDED, *words]).train_mixer is False


@pytest.mark.parametrize("words", [["to_q", "to_v"], ["to_q,to_v"], ["to_q,", "to_v"]])
def test_names_are_listed_with_spaces_or_commas(words):
    assert parse_train_config([*NEEDED, "--target_modules", *words]).target_modules == ("to_q", "to_v")


def test_prompts_keep_their_commas_on_the_command_line_and_in_files(tmp_path):
    prompts = ("a red car, in the snow", "a cup")
    assert parse_train_config([*NEEDED, "--prior_prompts", *prompts]).prior_prompts == prompts
    (tmp_path / "a.toml").write_text(f"prior_prompts = {list(prompts)}")
    assert parse_train_config([*NEEDED, "--config", str(tmp_path / "a.toml")]).prior_prompts == prompts
    assert TrainConfig(prior_prompts=prompts[0]).prior_prompts == prompts[:1]


@pytest.mark.parametrize("words", REFUSALS)
def test_a_refusal_is_the_one_line_that_the_table_says(words):
    with pytest.raises(UserError) as caught:
        parse_train_config([*NEEDED, *shlex.split(words)])
    assert str(caught.value) == REFUSALS[words]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--instance_prompt", "a caf\udce9"], r"--instance_prompt 'a caf\udce9': not valid UTF-8"),
        (["--output_dir", "\udcff"], r"--output_dir '\udcff': not valid UTF-8, or with a NUL"),
        (["--target_modules", "to_\udcff"], "expected a list of names"),
        (["--\udcff"], r"unknown flag --\udcff"),
    ],
)
def test_bytes_that_are_no_text_are_one_line_too(words, says):
    with pytest.raises(UserError) as caught:
        parse_train_config([*NEEDED, *words])
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_foreign_flags_are_none_of_ours():
    assert not FOREIGN_FLAGS.keys() & {item.name for item in fields(TrainConfig)}


def test_the_launcher_says_the_rank(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert parse_train_config([*NEEDED, "--local_rank", "1"]).local_rank == 3


def test_a_tilde_is_the_persons_home_wherever_a_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    (tmp_path / "r.toml").write_text('instance_data_dir = "~/photos"\ncache_dir = "~/cache"\nlogging_dir = "~/logs"')
    words = ["--pretrained_model_name_or_path=~/base", "--instance_prompt", "~", "--config", str(tmp_path / "r.toml")]
    config = parse_train_config([*words, "--output_dir=~/x", "--class_data_dir=~", "--resume_from_checkpoint=~/c"])
    assert (config.instance_data_dir, config.output_dir) == ("/home/ann/photos", "/home/ann/x")
    assert (config.cache_dir, config.class_data_dir, config.logging_dir) == (
        "/home/ann/cache",
        "/home/ann",
        "/home/ann/logs",
    )
    assert (config.pretrained_model_name_or_path, config.instance_prompt) == ("/home/ann/base", "~")
    assert config.resume_from_checkpoint == "/home/ann/c"


def test_a_launcher_that_says_no_number_is_named(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "abc")
    with pytest.raises(UserError, match="LOCAL_RANK=abc in the environment: expected a whole number"):
        parse_train_config(NEEDED)


def test_a_config_cannot_be_changed_and_takes_paths(tmp_path):
    config = TrainConfig(instance_data_dir=tmp_path, output_dir=tmp_path / "run")
    assert config.output_dir == str(tmp_path / "run")
    with pytest.raises(AttributeError):
        config.rank = 5
