"""“Train like”: the form, filled by an adapter's recipe, makes the run that `--like` makes; bad files are one line."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from dreambooth_moslora.adapters.metadata import AdapterMetadata
from dreambooth_moslora.cli.parser import parse_train_config
from dreambooth_moslora.core import UserError
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.ui.state import AdapterCatalog
from dreambooth_moslora.ui.train import said_of
from dreambooth_moslora.ui.train_form import TrainForm, crop_config, rows, values_like
from dreambooth_moslora.ui.train_photos import review_kept
from dreambooth_moslora.ui.train_start import (
    MOST_RECIPES,
    add_recipe,
    estimate_cost,
    form_of_run,
    like_of_run,
    prepared,
    recipe_names,
    recipe_of,
)
from tests.ui.test_handlers import visitor
from tests.ui.test_more_subjects import ann, page  # noqa: F401 (fixtures)

OURS = {"rank": 3, "lora_alpha": 6.0, "learning_rate": 5e-4, "mixer": "kaiming", "seed": 4, "optimizer": "Adafactor"}
OURS |= {"unmasked_weight": 0.5, "with_prior_preservation": True, "prior": "class_images", "prior_loss_weight": 0.7}
OURS |= {"masks": "given", "crops_per_photo": 3, "crop_zoom": 1.5, "resolution": 128, "exposures_per_photo": 40}
PIVOTAL = {"with_prior_preservation": False, "train_text_encoder_ti": True, "text_encoder_lr": 2e-3, "seed": 0}
PIVOTAL |= {"num_new_tokens_per_abstraction": 3, "max_train_steps": 30, "masks": "auto", "captions": "auto"}
KOHYA = {"ss_network_dim": "8", "ss_network_alpha": "4", "ss_learning_rate": "0.001", "ss_num_epochs": "7"}
KOHYA |= {"ss_seed": "42", "ss_clip_skip": "2", "ss_resolution": "(1024, 1024)", "ss_lr_scheduler": "cosine"}
OTHER = {"output_dir", "variant", "evaluate_steps", "validation_steps"}
"""What the page and the command line choose each in their own way."""


def save(file: Path, header: dict[str, str]) -> Path:
    save_file({"weight": np.zeros((1, 1), np.float32)}, file, metadata=header)
    return file


def ours(**recipe) -> dict[str, str]:
    return {"moslora": AdapterMetadata(rank=4, alpha=4, recipe=recipe).to_json()}


@pytest.fixture
def shelf(page, tmp_path):  # noqa: F811
    """The page with a shelf of "ours", "pivotal", "kohya" and "plain", which has no recipe."""
    (folder := tmp_path / "adapters").mkdir()
    for name, header in (("ours", ours(**OURS)), ("pivotal", ours(**PIVOTAL)), ("kohya", KOHYA), ("plain", {})):
        save(folder / f"{name}.safetensors", header)
    return SimpleNamespace(**vars(page), catalog=AdapterCatalog(folder, page.runs_dir))


def filled(ctx, name: str, person) -> TrainForm:
    values = values_like(recipe_of(ctx, name, person), ctx.base_name)
    return replace(TrainForm("sks", "duck", like=name), **values)


@pytest.mark.parametrize("name", ["ours", "pivotal", "kohya"])
def test_the_filled_form_makes_the_config_of_the_flag(shelf, ann, name, monkeypatch, tmp_path):  # noqa: F811
    ctx = shelf
    form = filled(ctx, name, ann)
    config = form.config("toy", 128, ann.photos_dir, tmp_path / "run", recipe_of(ctx, name, ann))
    monkeypatch.chdir(tmp_path)
    file = ctx.catalog.path(name, ann)
    of_form = {"kohya": ["--resolution", "128"]}.get(name, ["--resolution", "128", "--seed", str(form.seed)])
    flags = ["--pretrained_model_name_or_path", "toy", "--like", str(file), *of_form]
    command = parse_train_config([str(ann.photos_dir), "duck", *flags]).to_dict()
    found = TrainConfig.from_dict(config).to_dict()
    assert {n: v for n, v in found.items() if n not in OTHER} == {n: v for n, v in command.items() if n not in OTHER}


def test_a_field_of_the_form_wins_over_the_file(shelf, ann, tmp_path):  # noqa: F811
    ctx = shelf
    recipe = recipe_of(ctx, "ours", ann)
    own = {"rank": 5, "mixer": "none", "prior_preservation": False, "make_masks": True, "preset": "thorough"}
    config = replace(filled(ctx, "ours", ann), **own).config("toy", 128, ann.photos_dir, tmp_path / "run", recipe)
    assert (config["rank"], config["mixer"], config["with_prior_preservation"]) == (5, "none", False)
    assert (config["masks"], config["exposures_per_photo"], config["optimizer"]) == ("auto", 80, "Adafactor")
    steps = replace(filled(ctx, "ours", ann), steps=7).config("toy", 128, ann.photos_dir, tmp_path / "run", recipe)
    assert steps["max_train_steps"] == 7 and "exposures_per_photo" not in steps


def test_fields_that_a_file_does_not_speak_of_are_as_at_first():
    values = values_like(None, "toy")
    assert values.keys() < set(rows(TrainForm)) and values.pop("make_masks") is True
    assert values == {name: getattr(TrainForm, name) for name in values}


def test_the_line_says_what_was_taken_and_what_not(shelf, ann):  # noqa: F811
    ctx = shelf
    line = said_of("kohya", recipe_of(ctx, "kohya", ann)).value
    assert (
        ">Like kohya: 6 settings, those of this form filled in; left to this page: resolution; "
        "without an equivalent here: ss_clip_skip.<"
    ) in line
    great = add_recipe(ctx, save(ctx.catalog.adapters_dir.parent / "g.safetensors", ours(rank=4000, seed=1)), ann)
    assert "ignored, as they are invalid: rank is too great for this page" in said_of(great, ann.recipes[great]).value


def test_a_run_keeps_the_recipe_and_comes_back_into_the_form_with_it(shelf, ann):  # noqa: F811
    for name in ("ours", "pivotal", "kohya"):
        form = replace(filled(shelf, name, ann), preset="quick")
        with prepared(shelf, form, ann) as run:
            assert f"settings like {name}, where the form says nothing else" in run.said
            back = form_of_run(run.settings, run.run_dir / "photos")
            kept, recipe = like_of_run(run.run_dir)
            assert (kept, recipe.settings) == (name, recipe_of(shelf, name, ann).settings)
        assert (back.like, back.preset) == (name, "standard" if name == "pivotal" else "quick")
        with prepared(shelf, back, ann) as again:
            own = ("output_dir", "instance_data_dir", "token")
            assert {n: v for n, v in again.settings.items() if n not in own} == {
                n: v for n, v in run.settings.items() if n not in own
            }


def test_the_crops_are_shown_as_the_recipe_makes_them(shelf, ann):  # noqa: F811
    ctx = shelf
    config = crop_config("toy", 128, ann.photos_dir, [], 0, recipe_of(ctx, "ours", ann))
    assert (config.crops_per_photo, config.crop_zoom, config.resolution) == (3, 1.5, 128)
    assert "each shown by the first of its 3 crops" in review_kept(ctx, ann, like="ours").remarks


def test_a_file_of_ones_own_is_offered_to_oneself_alone(shelf, ann, tmp_path):  # noqa: F811
    ctx = shelf
    file = save(tmp_path / "ours.safetensors", ours(rank=7))
    assert add_recipe(ctx, file, ann) == "ours.safetensors" and add_recipe(ctx, file, ann) == "ours.safetensors 2"
    file.unlink()
    assert recipe_of(ctx, "ours.safetensors", ann).settings == {"rank": 7}
    assert recipe_names(ctx, ann)[:3] == ["none", "ours.safetensors", "ours.safetensors 2"]
    (tmp_path / "bob").mkdir()
    bob = visitor(tmp_path / "bob")
    assert recipe_names(ctx, bob) == ["none", "kohya", "ours", "pivotal", "plain"]
    with pytest.raises(UserError, match="there is no adapter ours"):
        recipe_of(ctx, "ours.safetensors", bob)
    for number in range(MOST_RECIPES):
        add_recipe(ctx, save(tmp_path / f"{number}.safetensors", ours(rank=7)), ann)
    assert len(ann.recipes) == MOST_RECIPES and "ours.safetensors" not in ann.recipes


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.pt", b"\x80\x02}q", "is not a .safetensors file"),
        ("a.safetensors", b"", "not a safetensors file"),
        ("a.safetensors", b"\xff" * 64, "not a safetensors file"),
        ("a.safetensors", (9 << 20).to_bytes(8, "little") + b" " * (9 << 20), "its header has 9 MiB; at most 8"),
        ("a.safetensors", {}, "its header holds no recipe"),
        ("a.safetensors", ours(output_dir="/etc"), "none of its settings is valid"),
        ("a.safetensors", ours(rank=4000), "rank are too great for this page"),
        ("a.safetensors", ours(target_modules=["to_q"] * 50_000), "names too many layers"),
    ],
)
def test_a_bad_file_is_one_line(shelf, ann, tmp_path, name, content, words):  # noqa: F811
    file = tmp_path / name
    file.write_bytes(content) if isinstance(content, bytes) else save(file, content)
    with pytest.raises(UserError, match=words) as raised:
        add_recipe(shelf, file, ann)
    assert "\n" not in str(raised.value) and str(tmp_path) not in str(raised.value) and not ann.recipes


def test_a_recipe_that_cannot_be_used_is_named_before_anything_is_made(shelf, ann, tmp_path):  # noqa: F811
    ctx, jobs = shelf, shelf.jobs
    save(tmp_path / "adapters" / "blocks.safetensors", ours(target_modules=["to_quarrel"], rank=3))
    cases = {"plain": "holds no recipe", "gone": "there is no adapter gone", "blocks": "has no such layer"}
    for name, words in cases.items():
        form = TrainForm("sks", "duck", like=name)
        with pytest.raises(UserError, match=words):
            estimate_cost(ctx, form, ann)
        with pytest.raises(UserError, match=words), prepared(ctx, form, ann):
            pass
    assert not jobs.runs_dir.exists() or not list(jobs.runs_dir.iterdir())


def test_a_changed_recipe_of_a_run_is_checked_again(tmp_path):
    (tmp_path / "like").mkdir()
    for content, left in ((json.dumps({"rank": 5, "output_dir": "/etc"}), {"rank": 5}), ("[1]", None), ("{", None)):
        (tmp_path / "like" / "a.json").write_text(content)
        name, recipe = like_of_run(tmp_path)
        assert (name, recipe and recipe.settings) == (("a", left) if left else ("none", None))
