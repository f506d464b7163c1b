"""Settings: flags, mistakes in one line, and rows of the table that are all a setting needs."""

import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import dreambooth_moslora
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings.field_facts import COMMAND_WORDS
from dreambooth_moslora.settings.parsing import parse_settings
from dreambooth_moslora.settings.rules import list_remarks
from dreambooth_moslora.settings.setting_names import SETTINGS, format_arguments
from dreambooth_moslora.settings.train_config import TrainConfig
from tests.helpers.command_line import parse_train_config

NEEDED = [
    *("--pretrained_model_name_or_path", "base", "--instance_data_dir", "x"),
    *("--instance_prompt", "a photo of sks dog"),
]
UNSET = """
pretrained_vae_model_name_or_path revision variant cache_dir class_data_dir class_prompt
validation_prompt seed max_train_steps
checkpoints_total_limit resume_from_checkpoint snr_gamma prodigy_beta3 hub_token hub_model_id
mixed_precision
"""
OFF = """
do_edm_style_training with_prior_preservation center_crop random_flip
train_text_encoder gradient_checkpointing scale_lr use_8bit_adam push_to_hub allow_tf32
enable_xformers_memory_efficient_attention use_dora
"""
DIFFUSERS_DEFAULTS = {
    **dict.fromkeys(UNSET.split()),
    **dict.fromkeys(OFF.split(), False),
    "prodigy_decouple": True,
    "prodigy_use_bias_correction": True,
    "prodigy_safeguard_warmup": True,
    "repeats": 1,
    "num_validation_images": 4,
    "validation_epochs": 50,
    "num_class_images": 100,
    "rank": 4,
    "resolution": 1024,
    "train_batch_size": 4,
    "sample_batch_size": 4,
    "num_train_epochs": 1,
    "checkpointing_steps": 500,
    "gradient_accumulation_steps": 1,
    "lr_warmup_steps": 500,
    "lr_num_cycles": 1,
    "prior_loss_weight": 1.0,
    "learning_rate": 1e-4,
    "text_encoder_lr": 5e-6,
    "lr_power": 1.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 1e-4,
    "adam_weight_decay_text_encoder": 1e-3,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "lora_dropout": 0.0,
    "output_dir": "lora-dreambooth-model",
    "lr_scheduler": "constant",
    "optimizer": "AdamW",
    "logging_dir": "logs",
    "report_to": "tensorboard",
}
"""Optional flags of train_dreambooth_lora_sdxl.py that are accepted -> their default there."""

EXAMPLES = {
    "validation_prompt": ("a dog, wet", ("a dog, wet",)),
    "lr_scheduler": ("cosine", "cosine"),
    "optimizer": ("prodigy", "Prodigy"),
    "mixed_precision": ("bf16", "bf16"),
    "report_to": ("wandb", "wandb"),
    "resolution": ("512", 512),
    "snr_gamma": ("5.0", 5.0),
    "prodigy_beta3": ("0.5", 0.5),
    "lora_dropout": ("0.1", 0.1),
    "seed": ("7", 7),
    "max_train_steps": ("7", 7),
    "checkpoints_total_limit": ("7", 7),
}
"""Flag -> text of a value, and the value."""
EXAMPLES_BY_TYPE = {int: ("7", 7), float: ("0.5", 0.5), bool: ("False", False)}
TO_Q_V = {"target_modules": ["to_q", "to_v"]}


def read_answers(file: str) -> dict[str, str]:
    """Return flags, given beside NEEDED -> the line that answers them."""
    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    return {flags: line.strip() for flags, line in zip(lines[::2], lines[1::2], strict=True)}


REFUSALS = read_answers("refusals.txt")


@pytest.mark.parametrize("name", DIFFUSERS_DEFAULTS)
def test_a_flag_of_diffusers_has_its_default_and_takes_a_value(name):
    default = DIFFUSERS_DEFAULTS[name]
    config = parse_train_config(NEEDED)
    value = config.sample_count if name == "num_validation_images" else getattr(config, name)
    assert value == default and type(value) is type(default)
    if default is False:
        extra = ["--class_prompt", "a dog"] if name == "with_prior_preservation" else []
        assert getattr(parse_train_config([*NEEDED, f"--{name}", *extra]), name) is True
        return
    text, expected = EXAMPLES.get(name, EXAMPLES_BY_TYPE.get(type(default), ("7", "7")))
    value = getattr(parse_train_config([*NEEDED, f"--{name}", text]), name)
    assert value == expected != default


def test_a_command_of_diffusers_readme_is_accepted():
    command = """--pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0
      --instance_data_dir=dog --pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix
      --output_dir=lora-trained-xl
      --mixed_precision=fp16 --resolution=1024 --train_batch_size=1 --gradient_accumulation_steps=4
      --learning_rate=1e-4 --report_to=wandb --lr_scheduler=constant --lr_warmup_steps=0
      --max_train_steps=500
      --validation_epochs=25 --seed=0 --push_to_hub --use_8bit_adam --gradient_checkpointing"""
    prompts = [
        "--instance_prompt=a photo of sks dog",
        "--validation_prompt=A photo of sks dog in a bucket",
    ]
    config = parse_train_config([*command.split(), *prompts])
    assert (config.max_train_steps, config.learning_rate, config.seed) == (500, 1e-4, 0)
    assert config.validation_prompt == ("A photo of sks dog in a bucket",) and config.push_to_hub


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            "--train-batch-size 2 --output-dir=my-run",
            {"train_batch_size": 2, "output_dir": "my-run"},
        ),
        ("--no_train_mixer", {"train_mixer": False}),
        ("--no-train-mixer", {"train_mixer": False}),
        ("--train_mixer false", {"train_mixer": False}),
        ("--train-mixer=False", {"train_mixer": False}),
        ("--target_modules to_q to_v", TO_Q_V),
        ("--target_modules to_q,to_v", TO_Q_V),
        ("--target_modules to_q, to_v", TO_Q_V),
    ],
)
def test_hyphens_switches_and_lists_are_accepted_in_each_form(flags, expected):
    assert parse_train_config([*NEEDED, *flags.split()]).to_dict().items() >= expected.items()


def test_prompts_keep_their_commas(tmp_path):
    prompts = ("a red car, in the snow", "a cup")
    assert parse_train_config([*NEEDED, "--prior_prompts", *prompts]).prior_prompts == prompts
    (tmp_path / "a.toml").write_text(f"prior_prompts = {list(prompts)}")
    assert (
        parse_train_config([*NEEDED, "--config", str(tmp_path / "a.toml")]).prior_prompts == prompts
    )
    assert TrainConfig(prior_prompts=prompts[0]).prior_prompts == prompts[:1]


@pytest.mark.parametrize("flags", REFUSALS)
def test_a_refusal_is_one_line(flags):
    with pytest.raises(UserError) as caught:
        parse_train_config([*NEEDED, *shlex.split(flags)])
    assert str(caught.value) == REFUSALS[flags]


def test_a_tilde_is_the_home_folder_in_each_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    (tmp_path / "r.toml").write_text(
        'instance_data_dir = "~/photos"\ncache_dir = "~/cache"\nlogging_dir = "~/logs"'
    )
    flags = (
        "--pretrained_model_name_or_path=~/base --instance_prompt ~ --output_dir=~/x "
        "--class_data_dir=~ --resume_from_checkpoint=~/c --config"
    )
    config = parse_train_config([*flags.split(), str(tmp_path / "r.toml")])
    expected = {
        "instance_data_dir": "/home/ann/photos",
        "output_dir": "/home/ann/x",
        "cache_dir": "/home/ann/cache",
        "class_data_dir": "/home/ann",
        "logging_dir": "/home/ann/logs",
        "pretrained_model_name_or_path": "/home/ann/base",
        "resume_from_checkpoint": "/home/ann/c",
        "instance_prompt": "~",
    }
    assert vars(config).items() >= expected.items()
    assert TrainConfig(output_dir=tmp_path).output_dir == str(tmp_path)
    with pytest.raises(AttributeError):
        config.rank = 5


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mixer": "none", "max_train_steps": 3, "optimizer": "Prodigy", "learning_rate": 1.0},
        {"class_prompt": "a dog", "class_data_dir": "dogs", "with_prior_preservation": True},
        {"lr_warmup_steps": 0, "caption_model": "", "unmasked_weight": 0.0, "random_flip": False},
        {
            "train_text_encoder": True,
            "text_encoder_lr": 1e-5,
        },
    ],
)
def test_effective_settings_have_no_remark(settings):
    assert list_remarks(TrainConfig(**settings)) == []


@pytest.mark.parametrize("name", SETTINGS)
def test_the_facts_of_a_row_are_valid(name):
    facts = SETTINGS[name].metadata
    assert facts["publish"] in (None, "always", "if_changed")
    assert {*facts["yields_to"], *facts["replaces"], *facts["excludes"]} <= {
        *SETTINGS,
        COMMAND_WORDS,
    }
    assert facts["family"] in ("", "unet", "flow")
    if facts["choices"]:
        assert {*facts["spellings"].values(), *facts["packages"]} <= {*facts["choices"]}
    config = TrainConfig()
    for condition, applies in facts["idle"]:
        applies(config)
        assert condition.format_map(vars(config))


def test_an_unknown_setting_is_an_error_with_the_nearest_name():
    with pytest.raises(UserError, match="`rnak`: did you mean `rank`"):
        TrainConfig(rnak=3)


def test_the_base_has_a_short_name():
    config = TrainConfig(base=Path("toy-zimage"))
    assert config.base == config.pretrained_model_name_or_path == "toy-zimage"
    assert replace(config, pretrained_model_name_or_path="toy").base == "toy"
    with pytest.raises(UserError, match="give one of them"):
        TrainConfig(base="toy", pretrained_model_name_or_path="toy")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 1}, "unknown setting `lr`: did you mean `learning_rate`?"),
        ({"rank": -1}, "rank=-1: must be at least 1."),
        ({"rank": "many"}, "rank='many': expected a whole number."),
        ({"mixer": "blender"}, 'mixer="blender": choose one of '),
        ({"qqqq": 1}, "unknown setting `qqqq`; docs/settings.md lists all."),
    ],
)
def test_a_mistake_in_a_program_names_its_argument(settings, message):
    with pytest.raises(UserError) as error:
        TrainConfig(**settings)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lower --learning_rate; or --masks auto.", 'lower learning_rate; or masks="auto".'),
        ("without --captions auto, set --rank 8.", 'without captions="auto", set rank=8.'),
        ("--masks and --no_train_mixer: unset", "masks and train_mixer=False: unset"),
        ("as in `train photos/dog dog`.", 'as in `train_subject("photos/dog", "dog")`.'),
    ],
)  # fmt: skip
def test_flags_in_a_message_are_written_as_arguments(text, expected):
    assert format_arguments(text) == expected


def test_settings_can_be_pickled_and_replaced():
    config = TrainConfig(rank=3, seed=1)
    assert pickle.loads(pickle.dumps(config)) == config == replace(TrainConfig(rank=3), seed=1)


def test_dir_lists_the_public_names():
    assert dir(dreambooth_moslora) == sorted(dreambooth_moslora.__all__)


@pytest.mark.parametrize("seed", [123456789012345678, 2**63 - 1])
def test_a_whole_number_keeps_all_its_digits(seed):
    assert parse_train_config([*NEEDED, f"--seed={seed}"]).seed == seed
    assert TrainConfig(seed="1e9").seed == 10**9


REMARKS = read_answers("remarks.txt")


@pytest.mark.parametrize("flags", REMARKS)
def test_settings_that_do_not_fit_have_one_remark(flags):
    config = parse_train_config([*NEEDED, "--base", "toy", *shlex.split(flags)])
    assert list_remarks(config) == [REMARKS[flags]]


ROOT = Path(__file__).parents[2]
BEFORE = "    repeats: int = photos_field("
ROW = """    haze: float = photos_field(0.5, "how much haze", low=0, high=2,
        publish="if_changed", idle=field_facts.ignore_unless(random_flip=True),
        per_subject=True, path=False, packages={1.5: "no_such_package"})
"""
PROGRAM = """
import json, sys
from pathlib import Path
from dreambooth_moslora.cli.command_train import parse_training
from dreambooth_moslora.cli.train_flags import build_train_parser
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings import config_files, rules
from dreambooth_moslora.settings.parsing import SubjectTable
from dreambooth_moslora.settings.train_config import TrainConfig
from tools.tables import render_settings

NEEDED = ["--base", "toy", "--instance_data_dir", "x", "--instance_prompt", "a sks dog"]

def call(function):
    try:
        return function()
    except UserError as error:
        return str(error)

def parse_haze(*flags):
    parsed = call(lambda: parse_training([*NEEDED, *flags]))
    return parsed if isinstance(parsed, str) else TrainConfig.from_dict(parsed.all_settings).haze

Path("a.toml").write_text("[photos]\\nhaze = 1.25")
recipe = config_files.build_recipe(TrainConfig(haze=1.0))
lines = build_train_parser().format_help().splitlines()
json.dump({
    "default": parse_haze(),
    "flag": parse_haze("--haze", "1"),
    "bound": parse_haze("--haze", "3"),
    "file": parse_haze("--config", "a.toml"),
    "near": parse_haze("--hase", "1"),
    "help": [line.split() for line in lines if line.startswith("  --haze")],
    "recipe": [recipe["haze"], "haze" in config_files.build_recipe(TrainConfig())],
    "remarks": rules.list_remarks(TrainConfig(haze=1.0)),
    "package": call(lambda: rules.require_packages(TrainConfig(haze=1.5, random_flip=True))),
    "subject": SubjectTable(haze=2).to_dict(),
    "docs": [line for line in render_settings().splitlines() if "haze" in line],
}, sys.stdout)
"""


def test_a_new_row_is_all_that_a_new_setting_needs(tmp_path):
    unneeded = shutil.ignore_patterns("__pycache__")
    for folder in ("dreambooth_moslora", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder, copy_function=os.symlink, ignore=unneeded)
    table = tmp_path / "dreambooth_moslora" / "settings" / "setting_rows.py"
    rows = table.read_text(encoding="utf-8")
    assert rows.count(BEFORE) == 1
    table.unlink()
    table.write_text(rows.replace(BEFORE, ROW + BEFORE), encoding="utf-8")
    command = [sys.executable, "-B", "-c", PROGRAM]
    output = subprocess.check_output(command, cwd=tmp_path, text=True)
    assert json.loads(output) == {
        "default": 0.5,
        "flag": 1.0,
        "bound": "--haze 3: must be at most 2.",
        "file": 1.25,
        "near": "unknown flag --hase: did you mean --haze?",
        "help": [["--haze", "X", "how", "much", "haze", "(default:", "0.5)"]],
        "recipe": [1.0, False],
        "remarks": ["--haze has no effect without --random_flip"],
        "package": "--haze 1.5 needs no_such_package: pip install no_such_package.",
        "subject": {"haze": 2},
        "docs": ["`--haze` | number from 0 to 2 | `0.5` | how much haze | if changed"],
    }


def test_converted_settings_pass_unchanged():
    texts = {"base": "toy", "rank": "8", "target_modules": "to_q, to_k", "random_flip": "yes"}
    settings = parse_settings(texts)
    assert settings == {
        "pretrained_model_name_or_path": "toy",
        "rank": 8,
        "target_modules": ("to_q", "to_k"),
        "random_flip": True,
    }
    assert parse_settings(settings) == settings
