"""Settings in files: priority, mistakes, and the recipes that are shipped."""

import json
import os
import threading
from pathlib import Path

import pytest

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings import toy_bases
from tests.helpers.command_line import parse_train_config
from tests.settings.test_train_config import NEEDED

CONFIGS = Path(__file__).parents[2] / "assets" / "configs"
RECIPES = sorted(CONFIGS.glob("*.toml"))


@pytest.mark.parametrize(
    "text, flags, expected",
    [
        (
            "learning-rate = 3e-4\nrank = 8",
            "--rank 2",
            {"learning_rate": 3e-4, "rank": 2, "train_batch_size": 4},
        ),
        ("exposures_per_photo = 60", "", {"exposures_per_photo": 60, "max_train_steps": None}),
        (
            "exposures_per_photo = 60",
            "--max_train_steps 9",
            {"exposures_per_photo": None, "max_train_steps": 9},
        ),
        (
            "max_train_steps = 9",
            "--exposures_per_photo 60",
            {"exposures_per_photo": 60, "max_train_steps": None},
        ),
        (
            "max_train_steps = 9",
            "--num_train_epochs 3",
            {"num_train_epochs": 3, "max_train_steps": None},
        ),
        (
            "exposures_per_photo = 60",
            "--num_train_epochs 3",
            {"num_train_epochs": 3, "exposures_per_photo": None},
        ),
    ],
)
def test_flags_override_the_file_and_the_file_the_defaults(tmp_path, text, flags, expected):
    (tmp_path / "a.toml").write_text(f'instance_prompt = "sks cat"\n[training]\n{text}')
    config = parse_train_config([*NEEDED[:4], "--config", str(tmp_path / "a.toml"), *flags.split()])
    assert config.to_dict().items() >= (expected | {"instance_prompt": "sks cat"}).items()


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.toml", "rank = ", "not valid TOML"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", "[1]", "found a list"),
        ("a.toml", "rnak = 3", "unknown setting `rnak`: did you mean `rank`?"),
        (
            "a.toml",
            "target_module = ['to_q']",
            "unknown setting `target_module`: did you mean `target_modules`?",
        ),
        ("a.toml", "lora-rank = 3", "unknown setting `lora_rank`: did you mean `rank`?"),
        ("a.toml", "rank = 3\n[x]\nrank = 4", "given twice"),
        ("a.json", '{"rank": 3, "seed": 1, "rank": 4}', "rank is given twice"),
        ("a.toml", f"rank = {'1' * 20_000}", "not valid TOML: Exceeds the limit"),
        ("a.toml", f"rank = 0x{'1' * 20_000}", "--rank inf: must be a finite number"),
        ("a.toml", 'rank = "many"', "expected a whole number"),
        ("a.toml", "random_flip = 1", "expected true or false"),
        ("a.toml", f"{'a.' * 20_000}rank = 4", "nested too deep"),
    ],
)
def test_mistakes_in_files_are_reported_first(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    for needed in (NEEDED, []):
        with pytest.raises(UserError) as caught:
            parse_train_config([*needed, "--config", str(tmp_path / name)])
        assert says in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes of a name")
@pytest.mark.parametrize("name", ["a.toml", "a.json"])
def test_a_pipe_without_a_writer_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / name)
    writer = threading.Timer(5, (tmp_path / name).write_text, [""])
    writer.start()
    with pytest.raises(UserError, match="it is a pipe or a device, not a file"):
        parse_train_config(["--config", str(tmp_path / name)])
    writer.cancel()


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no device has a path here")
@pytest.mark.parametrize("name", ["a.toml", "a.json"])
def test_a_device_is_refused_before_it_is_read(tmp_path, name):
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"{name}: it is a pipe or a device, not a file"):
        parse_train_config(["--config", str(tmp_path / name)])


@pytest.mark.parametrize("folder", ["/dev/fd", "/proc/self/fd"])
def test_a_shells_pipe_is_read(folder):
    if not Path(folder).exists():
        pytest.skip("no pipe has a path here")
    end, start = os.pipe()
    with open(start, "w") as file:
        file.write("rank = 3")
    assert parse_train_config([*NEEDED, "--config", f"{folder}/{end}"]).rank == 3
    os.close(end)


def test_a_runs_json_is_read_again_and_holds_no_secret(tmp_path):
    """Accept the settings of a run of an earlier version."""
    config = parse_train_config(
        [*NEEDED, "--hub_token", "hf_secret", "--rank", "3", "--target_modules", "to_q"]
    )
    text = json.dumps(config.to_dict())
    assert "hf_secret" not in text
    for name in ("train_config.json", "job_config.json"):
        (tmp_path / name).write_text(json.dumps(config.to_dict() | {"haze": 1.0}))
        again = parse_train_config(["--config", str(tmp_path / name)])
        assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_parsed(path):
    flags = [] if "[[subjects]]" in path.read_text() else NEEDED
    config = parse_train_config([*flags, "--config", str(path)])
    assert config.max_train_steps and config.mixer in ("orthogonal", "none")


def test_the_papers_recipe_has_the_papers_numbers():
    config = parse_train_config([*NEEDED, "--config", str(CONFIGS / "paper.toml")])
    numbers = {
        "rank": 4,
        "lora_alpha": 4.0,
        "learning_rate": 1e-4,
        "max_train_steps": 500,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "resolution": 1024,
        "target_modules": ("to_q", "to_k", "to_v", "to_out.0"),
        "mixer": "orthogonal",
    }
    assert vars(config).items() >= numbers.items()


@pytest.mark.parametrize("name", ["toy", "quickstart", "two_subjects"])
def test_a_recipe_preserves_no_prompt_of_the_evaluation(name):
    config = parse_train_config(["--config", str(CONFIGS / f"{name}.toml")])
    folders = (CONFIGS.parent / "subjects").iterdir()
    class_words = [folder.name.rpartition("_")[2] for folder in folders]
    evaluated = {text.format(kind) for text, kind in toy_bases.UNRELATED_PROMPTS}
    for template in toy_bases.PLACE_TEMPLATES:
        evaluated |= {template.format(word) for word in class_words}
    assert config.prior_prompts and not evaluated & set(config.prior_prompts)
