"""`--like FILE`: a file tells the settings it was trained with and nothing private; and settings
that are gone."""

import json
import os
from dataclasses import fields
from pathlib import Path

import numpy
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from dreambooth_moslora.cli.command_train import parse_train_config, train_main
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.lora.metadata import AdapterMetadata
from dreambooth_moslora.settings.sources import (
    LAYERS,
    RECIPE,
    TOLD_IF_CHANGED,
    checked_recipe,
    recipe_of,
)
from dreambooth_moslora.settings.table import FIELD_TYPES, TrainConfig
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny_training import paint_photos, tiny_config

NEEDED = [
    "--pretrained_model_name_or_path",
    "toy",
    "--instance_data_dir",
    "dog",
    "--instance_prompt",
    "a sks dog",
]
WEIGHTS = {"weight": numpy.zeros((1, 1), dtype=numpy.float32)}
EIGHT_BIT = "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1)"
KOHYA = {
    "ss_network_dim": ("32", {"rank": 32}),
    "ss_network_alpha": ("16.0", {"lora_alpha": 16.0}),
    "ss_learning_rate": ("0.001", {}),
    "ss_unet_lr": ("0.0003", {"learning_rate": 3e-4}),
    "ss_text_encoder_lr": ("[5e-05, 1e-05]", {"text_encoder_lr": 5e-5}),
    "ss_max_train_steps": ("1600", {"max_train_steps": 1600}),
    "ss_lr_scheduler": ("cosine", {"lr_scheduler": "cosine"}),
    "ss_optimizer": (EIGHT_BIT, {"optimizer": "AdamW", "use_8bit_adam": True}),
    "ss_batch_size_per_device": ("2", {"train_batch_size": 2}),
    "ss_min_snr_gamma": ("5.0", {"snr_gamma": 5.0}),
    "ss_resolution": ("(1024, 1024)", {"resolution": 1024}),
    "ss_seed": ("42", {"seed": 42}),
    "ss_mixed_precision": ("bf16", {"mixed_precision": "bf16"}),
    "ss_gradient_checkpointing": ("True", {"gradient_checkpointing": True}),
    "ss_noise_offset": ("0.05", {"noise_offset": 0.05}),
    "ss_loss_type": ("smooth_l1", {"loss_type": "smooth_l1"}),
    "ss_clip_skip": ("2", {}),
    "ss_network_dropout": ("None", {}),
    "ss_multires_noise_iterations": ("None", {}),
    "ss_tag_frequency": ('{"private": {"alice": 3}}', {}),
    "ss_v2": ("False", {}),
}
"""Key -> its value, and what it becomes here."""
OF_KOHYA = {name: value for _, ours in KOHYA.values() for name, value in ours.items()}


BOTH = (train_main, lambda argv: main(["train", *argv]))
"""The two ways to start a training."""


@pytest.fixture(autouse=True)
def photos(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return paint_photos(tmp_path / "dog", 2)


def file_of(header: dict[str, str]) -> str:
    """Writes `a.safetensors` with a header into the current folder, where there are photos in
    `dog`."""
    save_file(WEIGHTS, "a.safetensors", metadata=header)
    return "a.safetensors"


def ours(**recipe) -> dict[str, str]:
    return {"moslora": AdapterMetadata(rank=4, alpha=4, recipe=recipe).to_json()}


def differing(config: TrainConfig) -> dict:
    plain = parse_train_config(NEEDED).to_dict()
    return {name: value for name, value in config.to_dict().items() if value != plain[name]}


def test_a_training_tells_its_settings_and_another_takes_them(tiny_base, tmp_path, capsys):
    photos = paint_photos(tmp_path / "alices_photos")
    chosen = {
        "rank_pattern": ("to_q=3",),
        "target_modules": ("to_q", "to_k"),
        "mixer": "kaiming",
        "snr_gamma": 5.0,
    }
    own = {
        "cache_dir": str(tmp_path / "secret"),
        "validation_prompt": "a private prompt",
        "lora_alpha": 2.5,
    }
    words = {"caption_prefix": "prefixed by alice", "mask_prompt": "masked by alice"}
    config = tiny_config(
        tiny_base, photos, tmp_path / "first", max_train_steps=2, **chosen, **own, **words
    )
    train(config)
    for name in ("pytorch_lora_weights", "first.kohya", "last/moslora_weights"):
        with safe_open(tmp_path / "first" / f"{name}.safetensors", "np") as file:
            header = json.dumps(file.metadata())
        told = json.loads(json.loads(header)["moslora"])["recipe"]
        assert told == json.loads(json.dumps(recipe_of(config)))
        for private in (str(tmp_path), "alice", "private", "secret", os.sep + "tmp"):
            assert private not in header
    again = parse_train_config([*NEEDED, "--like", str(tmp_path / "first")])
    assert {n: getattr(again, n) for n in RECIPE} == {n: getattr(config, n) for n in RECIPE}
    assert f"settings like first: {len(told)} (" in capsys.readouterr().err


def test_a_recipe_holds_numbers_switches_choices_and_layers():
    items = {item.name: item for item in fields(TrainConfig)}
    checked = {"aspect_ratio_buckets", "text_encoder_out_layers"}  # nothing but numbers
    for name in {*RECIPE, *TOLD_IF_CHANGED} - {*LAYERS} - checked:
        assert FIELD_TYPES[name][0] in (bool, int, float) or items[name].metadata["choices"], name
    assert len({*RECIPE, *TOLD_IF_CHANGED}) == len(RECIPE) + len(TOLD_IF_CHANGED)
    # as a file says that is older than the others
    assert set(recipe_of(TrainConfig())) <= set(RECIPE)
    assert recipe_of(TrainConfig(loss_type="huber")) == recipe_of(TrainConfig()) | {
        "loss_type": "huber"
    }
    assert recipe_of(TrainConfig(target_modules=("to_q", "/home/alice", "two words")))[
        "target_modules"
    ] == ["to_q"]
    written = {"rank_pattern": ("to_k = 8", "to_q: 4"), "alpha_pattern": ("to_q=1e-1", "to_v=5E-1")}
    written |= {"target_modules": ("*[!2].to_q", "to_k")}  # as a file may spell them
    assert checked_recipe(recipe_of(TrainConfig(**written))) == (
        checked_recipe(recipe_of(TrainConfig()))[0] | written,
        [],
    )


def test_a_header_of_kohya(capsys):
    config = parse_train_config(
        [*NEEDED, "--like", file_of({key: value for key, (value, _) in KOHYA.items()})]
    )
    assert {**OF_KOHYA, **differing(config)} == OF_KOHYA and {
        n: getattr(config, n) for n in OF_KOHYA
    } == OF_KOHYA
    taken, meaningless = capsys.readouterr().err.splitlines()
    assert taken == f"settings like a.safetensors: {len(OF_KOHYA)} (--like; flags and --config win)"
    assert meaningless.endswith(": ss_clip_skip, the arguments in ss_optimizer")


def test_flags_and_files_win(tmp_path):
    like = file_of(
        ours(
            rank=8,
            seed=5,
            max_train_steps=9,
            snr_gamma=5.0,
            gradient_checkpointing=True,
            crop_zoom=2,
        )
    )
    (tmp_path / "a.toml").write_text(f'like = "{like}"\n[training]\nseed = 6\n')
    told = {
        "max_train_steps": 9,
        "snr_gamma": 5.0,
        "gradient_checkpointing": True,
        "crop_zoom": 2.0,
    }
    found = differing(parse_train_config([*NEEDED, "--config", "a.toml", "--rank", "2"]))
    assert found == told | {"rank": 2, "seed": 6}
    flags = [
        "--num_train_epochs",
        "3",
        "--do_edm_style_training",
        "--memory",
        "full",
        "--seed",
        "7",
        "--like",
        like,
    ]
    given = {"num_train_epochs": 3, "do_edm_style_training": True, "memory": "full", "seed": 7}
    found = differing(parse_train_config([*NEEDED, "--config", "a.toml", *flags]))
    assert found == given | {"rank": 8, "crop_zoom": 2.0}


def test_it_takes_the_recipes_place_beside_a_folder_and_a_word(capsys):
    toy = ["--pretrained_model_name_or_path", "toy"]
    config = parse_train_config(
        ["dog", "dog", *toy, "--like", file_of(ours(rank=3, max_train_steps=9, resolution=64))]
    )
    assert (config.rank, config.max_train_steps, config.exposures_per_photo) == (3, 9, None)
    assert (
        config.learning_rate == TrainConfig.learning_rate
        and config.instance_prompt == "a photo of a sks dog"
    )
    said = capsys.readouterr().err
    assert "settings like a.safetensors: 3 (" in said and "recipe: " not in said


def test_what_is_wrong_in_a_header_is_named_and_left_out(capsys):
    wrong = {
        "rank": "many",
        "learning_rate": float("nan"),
        "resolution": 1020,
        "mixer": ["none"],
        "seed": -1,
    }
    wrong |= {"target_modules": ["/etc/passwd"], "rank_pattern": ["to_q=x"], "crop_zoom": {}}
    wrong |= {"train_batch_size": 10**400}
    wrong |= {
        "output_dir": "/etc",
        "push_to_hub": True,
        "resume_from_checkpoint": "x",
        "\x1b[2J\n": 1,
        "local_rank": 3,
    }
    config = parse_train_config([*NEEDED, "--like", file_of(ours(lora_dropout=0.5, **wrong))])
    assert differing(config) == {"lora_dropout": 0.5}
    taken, named = capsys.readouterr().err.splitlines()
    assert "a.safetensors: 1 (" in taken and "\x1b" not in named
    assert (
        "--rank 'many': expected a whole number" in named
        and "`output_dir` is not a setting of a recipe" in named
    )


UNUSABLE = {
    "holds no recipe": (
        *(
            {},
            {"ss_v2": "False", "ss_sd_model_name": "x", "ss_clip_skip": "2"},
            {"moslora": "[" * 100_000},
        ),
        *({"moslora": "[1]"}, {"moslora": '{"recipe": [1]}'}),
    ),
    "none of its settings is valid": (
        *({"moslora": '{"recipe": {"output_dir": "/etc"}}'}, {"ss_network_dim": "x" * 100_000}),
        {"ss_resolution": "(512, 768)"},
    ),
    "not a safetensors file": (
        b"",
        b"\x80\x02}q",
        b"\xff" * 64,
        b"\x08" + b"\0" * 7 + b'{"a": 1}',
    ),
    "no such file": ("missing", "dog", "a\0b"),
}


@pytest.mark.parametrize(
    ("content", "said"), [(one, said) for said, contents in UNUSABLE.items() for one in contents]
)
def test_a_file_without_a_usable_recipe_is_one_line(capsys, content, said):
    file = content if isinstance(content, str) else "a.safetensors"
    if isinstance(content, dict):
        file_of(content)
    elif isinstance(content, bytes):
        Path(file).write_bytes(content)
    for run in BOTH:
        assert run([*NEEDED, "--like", file]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line and "--like" in line
