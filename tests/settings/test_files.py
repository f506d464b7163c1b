"""Settings in files: below the flags, above the defaults, with mistakes named; and the recipes that
are shipped."""

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
    "text, flags, wanted",
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
def test_flags_override_the_file_and_the_file_the_defaults(tmp_path, text, flags, wanted):
    (tmp_path / "a.toml").write_text(f'instance_prompt = "sks cat"\n[training]\n{text}')
    config = parse_train_config([*NEEDED[:4], "--config", str(tmp_path / "a.toml"), *flags.split()])
    assert config.to_dict().items() >= (wanted | {"instance_prompt": "sks cat"}).items()


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
        (
            "a.json",
            '{"train_data_dir": "x"}',
            "unknown setting `train_data_dir`",
        ),
        ("a.toml", "rank = 3\n[x]\nrank = 4", "given twice"),
        ("a.json", '{"rank": 3, "seed": 1, "rank": 4}', "rank is given twice"),
        ("a.toml", f"rank = {'1' * 20_000}", "not valid TOML: Exceeds the limit"),
        ("a.toml", f"rank = 0x{'1' * 20_000}", "--rank inf: must be a finite number"),
        ("a.toml", 'rank = "many"', "expected a whole number"),
        ("a.toml", "random_flip = 1", "expected true or false"),
        ("a.toml", f"{'a.' * 20_000}rank = 4", "nested too deep"),
    ],
)
def test_mistakes_in_files_name_the_place_and_are_named_before_what_is_missing(
    tmp_path, name, text, says
):
    (tmp_path / name).write_text(text)
    for needed in (NEEDED, []):
        with pytest.raises(UserError) as caught:
            parse_train_config([*needed, "--config", str(tmp_path / name)])
        assert says in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes of a name")
@pytest.mark.parametrize("name", ["a.toml", "a.json"])
def test_a_pipe_that_nobody_writes_to_is_told_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    writer = threading.Timer(5, (tmp_path / name).write_text, [""])
    writer.start()
    with pytest.raises(UserError, match="it is a pipe, not a file"):
        parse_train_config(["--config", str(tmp_path / name)])
    writer.cancel()


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="no pipe has a path here")
def test_a_shells_pipe_is_read(tmp_path):
    end, start = os.pipe()
    with open(start, "w") as file:
        file.write("rank = 3")
    assert parse_train_config([*NEEDED, "--config", f"/dev/fd/{end}"]).rank == 3
    os.close(end)


def test_the_json_of_a_run_is_taken_back_without_what_is_gone_and_holds_no_secret(tmp_path):
    """An earlier version had other settings; its run goes on all the same."""
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
    words = [] if "[[subjects]]" in path.read_text() else NEEDED
    config = parse_train_config([*words, "--config", str(path)])
    assert config.max_train_steps and config.mixer in ("orthogonal", "none")


def test_the_papers_recipe_has_the_papers_numbers():
    config = parse_train_config([*NEEDED, "--config", str(CONFIGS / "paper.toml")])
    assert (config.rank, config.lora_alpha, config.learning_rate, config.max_train_steps) == (
        4,
        4.0,
        1e-4,
        500,
    )
    assert (config.train_batch_size, config.gradient_accumulation_steps, config.resolution) == (
        1,
        4,
        1024,
    )
    assert (
        config.target_modules == ("to_q", "to_k", "to_v", "to_out.0")
        and config.mixer == "orthogonal"
    )


@pytest.mark.parametrize("name", ["toy", "quickstart", "two_subjects"])
def test_a_recipe_does_not_preserve_what_drift_and_likeness_are_measured_on(name):
    config = parse_train_config(["--config", str(CONFIGS / f"{name}.toml")])
    words = [folder.name.rpartition("_")[2] for folder in (CONFIGS.parent / "subjects").iterdir()]
    measured = {text.format(kind) for text, kind in toy_bases.UNRELATED_PROMPTS}
    measured |= {
        template.replace("{}", word) for template in toy_bases.PLACE_TEMPLATES for word in words
    }
    assert config.prior_prompts and not measured & set(config.prior_prompts)
