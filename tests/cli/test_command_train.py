"""The command `train` before it trains: its help, the base's own resolution, and what it refuses
without a trace."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from dreambooth_moslora.base import model_files
from dreambooth_moslora.base.base import Base, fetch_index
from dreambooth_moslora.cli.command_train import train_main
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.disk.queue import lock_folder
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings.setting_names import SETTINGS, list_flags
from tests.helpers.command_line import parse_train_config
from tests.helpers.tiny import RESOLUTION_PX
from tests.helpers.tiny_training import paint_photos


@pytest.fixture
def flags(tmp_path):
    photos, run = paint_photos(tmp_path / "photos"), tmp_path / "run"
    return [
        "--instance_data_dir",
        str(photos),
        "--instance_prompt",
        "a photo of a sks dog",
        "--output_dir",
        str(run),
    ]


def test_help_shows_the_flags_in_daily_use_and_all_of_it_each(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    help_texts = {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit):
            main(["train", flag])
        help_texts[flag] = capsys.readouterr().out
    daily, each = help_texts["--help"], help_texts["--help_all"]
    assert all(f"  {list_flags(name)[0]} " in each for name in SETTINGS)
    assert len(daily.splitlines()) <= 68 < len(each.splitlines())
    assert "train photos/dog dog" in daily and "--help_all" in daily
    assert all(f"  --{name} " in daily for name in ("exposures_per_photo", "masks", "token"))
    assert "(required)" not in each

    # The short help has the defaults of the recommended form.
    help_line = " ".join(daily.split())
    assert "(default: 16)" in help_line and "(default: runs/WORD)" in help_line
    assert "--evaluate_steps" in daily and "(default: runs/WORD)" not in each


@pytest.mark.parametrize("command", ["check", "generate", "evaluate"])
def test_the_usage_of_many_flags_is_one_line(command, capsys):
    """`generate` named its flags twice."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    message = capsys.readouterr().out
    assert re.match(rf"usage: \S.* {command} \[ARGUMENT …\] \[--FLAG VALUE …\]\n\n", message)
    assert not re.search(r"--\w+-", message) and ("examples:" in message) == (command != "check")


@pytest.mark.parametrize(
    ("extra_flags", "px"), [([], RESOLUTION_PX), (["--resolution", "128"], 128)]
)
def test_a_base_that_was_trained_smaller_has_its_own_resolution(
    extra_flags, px, flags, tiny_base, tmp_path
):
    """So has a run that one word describes, alone or with a file: its photos were judged for 1024
    px, and left out."""
    base, file = ["--pretrained_model_name_or_path", str(tiny_base)], tmp_path / "a.toml"
    file.write_text("rank = 2")
    for arguments in (flags, [flags[1], "dog"], [flags[1], "dog", "--config", str(file)]):
        assert parse_train_config([*arguments, *base, *extra_flags]).resolution == px


def test_resolution_is_read_without_a_vae_or_from_a_single_file(tiny_base, tmp_path):
    assert Base.find(tiny_base).resolution_px == RESOLUTION_PX
    unet = tmp_path / "mine" / "unet" / "config.json"
    unet.parent.mkdir(parents=True)
    unet.write_text(json.dumps({"sample_size": 96}))
    (tmp_path / "mine" / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionXLPipeline"})
    )
    save_file({"model.diffusion_model.x": torch.zeros(1)}, tmp_path / "mine.safetensors")
    for base in (tmp_path / "mine", tmp_path / "mine.safetensors"):
        assert Base.find(base).resolution_px == 768
    unet.write_text(json.dumps({"sample_size": -96}))
    assert Base.find(tmp_path / "mine").resolution_px == 1024


@pytest.mark.parametrize(
    "name", ["my models/sdxl", "a/b--c", "a/b..c", "a/b.git", "-a/b", "a/b.", "a/b/c", "./a", "~/a"]
)
def test_what_the_hub_would_not_take_as_a_name_is_a_path(name):
    assert not model_files.is_hub_id(name) and model_files.is_hub_id("stabilityai/sd-turbo_1.0")
    with pytest.raises(UserError, match="does not exist"):
        Base.find(name)


@pytest.fixture
def hub_says(monkeypatch):
    """Let the hub answer with this status and `model_index.json`, or not at all; the seconds that
    it is given."""

    def say(answer, index=None) -> list:
        class Session:
            def get(self, url, **options):
                timeouts.append(options["timeout"])
                if isinstance(answer, Exception):
                    raise answer
                return type("Answer", (), {"status_code": answer, "json": lambda self: index})()

        timeouts = []
        fetch_index.cache_clear()
        if answer is not None:
            monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
        return timeouts

    yield say
    fetch_index.cache_clear()


ANSWERS = [(401, "asks for a login"), (404, "has no such model"), (500, "has none")]
ANSWERS += [
    (OSError("no route"), "does not answer"),
    (None, "is not asked, as HF_HUB_OFFLINE is set"),
]


@pytest.mark.parametrize(("answer", "why"), ANSWERS)
def test_unreachable_base_is_refused_before_a_folder_is_made(
    answer, why, flags, tmp_path, hub_says, capsys
):
    timeouts = hub_says(answer)
    assert train_main([*flags, "--pretrained_model_name_or_path", "nobody/a-model-1.0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line and "hf download nobody/a-model-1.0" in line
    # Without an index the hub is asked for that of a modular pipeline.
    requests = {None: 0, 404: 2}.get(answer, 1)
    assert timeouts == [5] * requests and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "Flux2KleinPipeline",
            "taken to be that of black-forest-labs/FLUX.2-klein-base-9B, with the adapter on",
        ),
        (
            "StableDiffusionXLPipeline",
            "taken to be SDXL's, with the adapter on attention alone, as its files are no",
        ),
        (
            None,
            "as its size is not known without its .safetensors files, nor its family, "
            "which the hub does not tell",
        ),
    ],
)
def test_dry_run_says_what_it_assumes_of_an_unknown_base(kind, message, flags, hub_says, capsys):
    timeouts = hub_says(200 if kind else 404, {"_class_name": kind})
    arguments = [
        "--pretrained_model_name_or_path",
        "nobody/a-model-2.0",
        "--resolution",
        "64",
        "--dry_run",
    ]
    assert train_main([*flags, *arguments]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "adapter: " in line)
    assert message in line and len(timeouts) == (1 if kind else 2)


def test_distilled_base_is_refused_before_it_is_fetched(flags, hub_says, capsys):
    hub_says(200, {"_class_name": "Flux2KleinPipeline", "is_distilled": True})
    assert train_main([*flags, "--pretrained_model_name_or_path", "nobody/a-klein"]) == 2
    message = capsys.readouterr().err
    assert (
        "it is distilled to a few steps" in message
        and "black-forest-labs/FLUX.2-klein-base-4B or" in message
    )


def test_launcher_fp16_is_refused_where_it_overflows(flags, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert (
        train_main([*flags, "--pretrained_model_name_or_path", "Tongyi-MAI/Z-Image", "--dry_run"])
        == 2
    )
    assert "Z-Image overflows in fp16; give bf16" in capsys.readouterr().err


def test_a_dry_run_is_refused_where_training_would_be(flags, tiny_base, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    arguments = [*flags, "--pretrained_model_name_or_path", str(tiny_base), "--dry_run"]
    assert train_main(arguments) == 0
    with lock_folder(tmp_path / "run"):
        assert train_main(arguments) == 2
    assert "is training there" in capsys.readouterr().err
    assert train_main(arguments) == 0


def test_an_empty_instance_prompt_is_trained_with_and_remarked(flags, tiny_base, tmp_path, capsys):
    """diffusers' own tests of Lumina 2 and Sana give it. It was called missing."""
    arguments = [*flags, "--pretrained_model_name_or_path", str(tiny_base), "--resolution", "64"]
    arguments[arguments.index("--instance_prompt") + 1] = ""
    assert train_main([*arguments, "--dry_run"]) == 0
    message = capsys.readouterr()
    assert "--instance_prompt is empty" in message.out + message.err
    assert train_main([*arguments, "--max_train_steps", "1", "--num_validation_images", "0"]) == 0
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()
