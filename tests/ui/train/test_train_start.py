"""From the form to a run as the command would make it, and from an earlier run, or from a recipe,
back to the form."""

import os
import re
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.disk.process_identity import read_process_start
from dreambooth_moslora.plan import agreement
from dreambooth_moslora.plan.base_size import BaseSize
from dreambooth_moslora.plan.memory import estimate_memory
from dreambooth_moslora.plan.memory_plans import choose_memory_settings
from dreambooth_moslora.plan.steps import plan_steps
from dreambooth_moslora.settings.config_files import load_settings
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.ui import jobs as page_jobs
from dreambooth_moslora.ui.jobs import Job
from dreambooth_moslora.ui.train.train_form import (
    TrainForm,
)
from dreambooth_moslora.ui.train.train_start import (
    build_config,
    estimate_cost,
    free_run_dir,
    prepare_run,
    start_run,
)
from tests.helpers.command_line import parse_train_config
from tests.helpers.stub_faces import stub_faces  # noqa: F401
from tests.helpers.tiny_training import paint_photos
from tests.ui.conftest import click, find_handler, list_toy_photos, write_run

DUCK = TrainForm("sks", "duck")


@pytest.fixture
def workspace(toys):
    """All of this module's forms have photos."""
    return toys


NAMES = {
    "guinea pig": "guinea-pig",
    "-dog": "dog",
    "d..g": "d.g",
    "dog.": "dog",
    "_ +": "run",
    "../../x": "x",
}
NAMES |= {"Bär v2.1": "Bär-v2.1", "a" * 59 + ".b": "a" * 59, "d@/<g": "d-g"}


@pytest.mark.parametrize("class_word, name", NAMES.items())
def test_any_word_gives_a_free_run_folder(jobs, class_word, name):
    assert free_run_dir(jobs, TrainForm("sks", class_word)) == jobs.runs_dir / name
    (jobs.runs_dir / name).mkdir()
    assert free_run_dir(jobs, TrainForm("sks", "dog", run_name=class_word)).name == f"{name}-2"


def test_prepared_run_has_photos_and_cost(workspace, tab):
    (workspace.photos_dir / "photo_01.txt").write_text("a yellow duck")
    with prepare_run(tab, DUCK) as run:
        assert run.run_dir.name == "duck"
        folder, choices = Path(run.settings["instance_data_dir"]), " ".join(run.lines)
        assert len(list(folder.glob("*.png"))) == 5
        assert (folder / "photo_01.txt").read_text() == "a yellow duck"
    for text in ("from 5 photos.", "“a photo of a sks duck” will show your subject."):
        assert text in choices
    cost = estimate_cost(tab, DUCK)
    title, _, details = cost.partition("<details>")
    assert re.fullmatch(r".*[\d.]+ GiB of memory · [\d.]+ GiB on the disk</b>", title)
    assert "480 steps at 128 px" in details


@pytest.mark.parametrize("broken", ["start", "spawn"])
def test_failed_start_leaves_no_folder(context, workspace, monkeypatch, broken):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    page = context()
    spawn = (page_jobs.processes, "start_process")
    targets = {
        "start": (page.jobs, "start"),
        "spawn": spawn,
    }
    monkeypatch.setattr(*targets[broken], fail)
    with pytest.raises(OSError, match="disk full"):
        start_run(page, DUCK)
    assert not list(page.runs_dir.glob("*"))


def test_start_asks_for_photos_then_warns_of_real_ones(toy_page, monkeypatch, tmp_path):
    """Real photos on the practice model were trained at once, into a melted dog."""
    names = []
    monkeypatch.setattr(
        toy_page.ctx.jobs,
        "start",
        lambda name, config: names.append(name) or Job(tmp_path / name, 1, ""),
    )
    assert "Add some photos of your subject first" in click(toy_page, "start", class_word="dog")
    toy_page.ctx.workspace.photos_dir.mkdir()
    copy = toy_page.ctx.workspace.photos_dir / "photo_01.png"
    PIL.Image.effect_noise((200, 200), 80).convert("RGB").save(copy)
    answer = click(toy_page, "start", class_word="dog")
    assert "The practice model draws only its own toys" in answer and not names
    assert "run dog is starting" in click(toy_page, "train_anyway", class_word="dog")

    # Photos of its toys need no second click.
    with PIL.Image.open(list_toy_photos("duck", 1)[0]) as toy:
        toy.save(copy)
    assert "run duck is starting" in click(toy_page, "start", class_word="duck")
    assert names == ["dog", "duck"]


PROMPTS_AND_PATHS = {
    *("pretrained_model_name_or_path", "variant", "instance_data_dir", "output_dir"),
    *("instance_prompt", "class_prompt"),
}
PAGE_SETTINGS = {"seed", "memory"}
"""Named by the form alone: the crops it shows are drawn from the seed, and a plan may add to the
recipe's."""


@pytest.fixture
def photos(tmp_path):
    """Five, large enough for SDXL."""
    for path in paint_photos(tmp_path / "dog", 5).iterdir():
        with PIL.Image.open(path) as image:
            image.resize((256, 256)).save(path)
    return tmp_path / "dog"


def choose_config(
    form: TrainForm, photos, base: str = "owner/sdxl", resolution_px: int = 1024
) -> TrainConfig:
    return TrainConfig.from_dict(
        form.choose_settings(base, resolution_px, photos, photos.parent / "run").all_settings
    )


@pytest.mark.parametrize("gb", [8, 24])
def test_form_equals_recipe_and_command(gpu, photos, monkeypatch, gb):
    gpu(8, 0.95 * gb)
    config = choose_config(TrainForm("sks", "dog"), photos)
    recipe = load_settings("assets/configs/sdxl.toml")
    own_names = PROMPTS_AND_PATHS | {"max_train_steps", "prior"}
    assert {n: v for n, v in recipe.items() if n not in own_names} == {
        n: config.to_dict()[n] for n in recipe.keys() - own_names
    }
    assert plan_steps(config, 5).total_steps == recipe["max_train_steps"]
    monkeypatch.setattr(agreement, "get_min_free_gib", lambda: 0.95 * gb)
    command = parse_train_config(
        [str(photos), "dog", "--pretrained_model_name_or_path", "owner/sdxl"]
    )
    left_out = {"output_dir", *PAGE_SETTINGS}
    form_settings, command_settings = (
        {n: v for n, v in c.to_dict().items() if n not in left_out} for c in (config, command)
    )
    assert form_settings == command_settings and (config.memory, config.seed) == ("auto", 0)
    planned = replace(config, **choose_memory_settings(config, Base.of(config), 0.95 * gb))
    assert estimate_memory(planned, BaseSize(), 400).peak_gib <= 0.95 * gb
    assert config.crops_per_photo == recipe.get("crops_per_photo", 1)


def test_crop_sides_fit_the_bases_patches(workspace, context):
    PIL.Image.new("RGB", (160, 90)).save(workspace.photos_dir / "photo_01.png")
    pages = [context(name=base, resolution_px=128) for base in ("toy", "toy-zimage")]
    assert [build_config(page, DUCK).bucket_reso_steps for page in pages] == [8, 16]


@pytest.mark.usefixtures("stub_faces")  # OpenCV is an extra
@pytest.mark.parametrize(
    ("values", "flags"),
    [
        ({}, []),
        ({"subject": "style"}, ["--subject", "style"]),
        (
            {"subject": "person", "describe": "hair, clothes", "make_captions": True},
            ["--subject", "person", "--describe", "hair", "clothes", "--captions", "auto"],
        ),
    ],
)
def test_toy_form_equals_command(gpu, photos, values, flags):
    base_flags = ["--pretrained_model_name_or_path", "toy"]
    command = parse_train_config([str(photos), "dog", *base_flags, *flags])
    gpu(8, 4.0)
    config = choose_config(TrainForm("sks", "dog", **values), photos, "toy", 128)
    form_settings, command_settings = (
        {n: v for n, v in c.to_dict().items() if n != "output_dir"} for c in (config, command)
    )
    assert (
        form_settings == command_settings
        and config.mixed_precision is None
        and config.memory is None
    )
    # What compares faces is not here.
    assert bool(config.evaluate_steps) == (config.subject != "person")


def test_cost_lists_choices_and_memory_plans(gpu, workspace, context):
    gpu(8, 7.0)
    ctx = context(title="sdxl", name="owner/sdxl", resolution_px=1024)
    cost = estimate_cost(ctx, TrainForm("sks", "dog"))
    assert "memory plans: full" in cost and "GiB are free" in cost
    assert "(“Memory” auto)" in cost and "--memory" not in cost
    for text in ("at 1024 px, from 5 photos.", "learned whole", "Likeness is not measured"):
        assert text in cost, (text, cost)


def test_busy_message_goes_by_itself(workspace, context):
    """On the card it stayed when the other run had ended."""
    page = context()
    write_run(page.runs_dir / "bear", birth=read_process_start(os.getpid()))
    submit = find_handler(page, "submit", "start")
    with pytest.warns(UserWarning, match="Another run is going on"):
        question, card = submit([], **vars(DUCK)).values()
    assert card == "" and not question["visible"]
