"""From the form to a run as the command would make it, and from an earlier run, or from a recipe,
back to the form."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Barrier, BrokenBarrierError

import PIL.Image
import pytest

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.cli.command_train import parse_train_config
from dreambooth_moslora.disk import processes
from dreambooth_moslora.disk.contents import file_digest
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora.metadata import AdapterMetadata
from dreambooth_moslora.photos.folder import find_photos
from dreambooth_moslora.plan import memory
from dreambooth_moslora.plan.memory import BaseSize, estimate, memory_settings
from dreambooth_moslora.plan.plan import plan_steps
from dreambooth_moslora.settings.sources import load_settings
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.ui import jobs as page_jobs
from dreambooth_moslora.ui.page import build_app
from dreambooth_moslora.ui.photo_copies import kept_photos
from dreambooth_moslora.ui.train import train_photos
from dreambooth_moslora.ui.train.screen import said_of
from dreambooth_moslora.ui.train.train_form import (
    TrainForm,
    crop_config,
    folder_of,
    rows,
    values_like,
    values_of,
)
from dreambooth_moslora.ui.train.train_photos import remove_photo, review_kept
from dreambooth_moslora.ui.train.train_start import (
    add_recipe,
    estimate_cost,
    form_of_run,
    free_run_dir,
    like_of_run,
    prepared,
    recipe_names,
    recipe_of,
    recipe_values,
    start_run,
    take_photos_of_run,
)
from tests.helpers.tiny_training import paint_photos
from tests.ui.conftest import ROCKET, TRAINER, TWO, end_all, handler, recorded, save_header

DUCK = TrainForm("sks", "duck")
CHANGED = {
    "rank": 3,
    "learning_rate": 0.5,
    "mixer": "none",
    "seed": 9,
    "unmasked_weight": 0.5,
    "scores": False,
}
CHANGED |= {
    "prior": "class_images",
    "prior_weight": 4.0,
    "make_masks": False,
    "make_captions": True,
}


@pytest.fixture
def workspace(toys):
    """All of this module's forms have photos."""
    return toys


def without(settings: dict, *names: str) -> dict:
    return {name: value for name, value in settings.items() if name not in names}


NAMES = {
    "guinea pig": "guinea-pig",
    "-dog": "dog",
    "d..g": "d.g",
    "dog.": "dog",
    "_ +": "run",
    "../../x": "x",
}
NAMES |= {"Bär v2.1": "Bär-v2.1", "a" * 59 + ".b": "a" * 59, "d@/<g": "d-g"}


@pytest.mark.parametrize("words, name", NAMES.items())
def test_any_word_names_a_run_whose_folder_is_free(jobs, words, name):
    assert free_run_dir(jobs, TrainForm("sks", words)) == jobs.runs_dir / name
    (jobs.runs_dir / name).mkdir()
    assert free_run_dir(jobs, TrainForm("sks", "dog", run_name=words)).name == f"{name}-2"


def test_what_is_started_has_the_photos_and_captions_of_each_and_its_cost_is_three_numbers(
    workspace, tab
):
    with prepared(tab, TWO) as run:
        assert run.run_dir.name == "duck-rocket"
        tables, said = run.settings["subjects"], " ".join(run.said)
        assert [Path(table["instance_data_dir"]).name for table in tables] == ["photos", "photos_2"]
        assert [len(list(Path(table["instance_data_dir"]).glob("*.png"))) for table in tables] == [
            5,
            2,
        ]
        assert Path(tables[1]["instance_data_dir"], "photo_01.txt").read_text() == "a red rocket"
    for words in (
        "photos: 5 + 2, 0 with a mask",
        "words: “a photo of a sks duck”, “a photo of a zwx rocket”",
        "the classes: “a photo of a duck”, “a photo of a rocket” stay",
        "steps: 960, which show each photo 384 times, and those of a subject with fewer oftener",
    ):
        assert words in said
    cost = estimate_cost(tab, TWO)
    title, _, rest = cost.partition("<details>")
    assert re.fullmatch(
        r".*[\d.]+ GiB of memory · time not known yet · [\d.]+ GiB on the disk</b>", title
    )
    assert "recipe: assets/configs/toy.toml" in rest and "time: not known before" in rest
    assert (
        "2 subjects, 5 + 2 photos" in cost
        and "“a photo of a zwx rocket”: token “zwx”, class “rocket”" in cost
    )


@pytest.mark.parametrize(
    ("preset", "steps", "empty"), [("standard", "480", "384"), ("thorough", "960", "768")]
)
def test_what_an_empty_field_stands_for_is_what_the_run_would_take(
    tab, workspace, preset, steps, empty
):
    values = recipe_values(tab, preset, "none")
    assert values["steps"] == steps
    with prepared(tab, TrainForm("sks", "duck", preset=preset)) as run:
        for name in ("rank", "learning_rate"):
            assert float(values[name]) == run.settings[name]
        assert float(values["prior_weight"]) == run.settings["prior_loss_weight"]
    shutil.rmtree(workspace.photos_dir)
    assert recipe_values(tab, preset, "none")["steps"] == f"{empty} times each photo"


@pytest.mark.parametrize(
    ("form", "words"), [(DUCK, "6 captions for 5 photos:"), (TWO, "for 5 photos of subject 1:")]
)
def test_captions_that_outnumber_the_photos_are_refused_as_some_would_be_another_photos(
    workspace, tab, form, words
):
    """One of a program's photos could not be read: the rest moved up, and ran so."""
    with (
        pytest.raises(UserError, match=words),
        prepared(tab, replace(form, captions="one\n\n\n\n\nsix\n")),
    ):
        pass
    assert not list(tab.runs_dir.glob("*"))


def test_the_captions_of_the_page_stay_with_their_photos_when_another_page_has_removed_one(
    workspace, tab
):
    """The first of three photos was removed, and the last had no caption: two lines seemed to be of
    the other two."""
    digests = list(map(file_digest, kept_photos(workspace.photos_dir)))
    said = "\n".join(
        f"{digest}:{caption}" for digest, caption in zip(digests, ("one", "two: this", "", "", ""))
    )
    remove_photo(workspace, digests[0])
    with prepared(tab, replace(DUCK, captions=said)) as run:
        captions = {file.name: file.read_text() for file in (run.run_dir / "photos").glob("*.txt")}
    assert captions == {"photo_01.txt": "two: this"}


@pytest.mark.parametrize("broken", ["write_captions", "start", "spawn"])
def test_a_start_that_fails_leaves_no_photos_and_no_taken_name(
    context, workspace, monkeypatch, broken
):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    page = context()
    spawn = (page_jobs.processes, "start_logged")
    targets = {
        "write_captions": (TrainForm, "write_captions"),
        "start": (page.jobs, "start"),
        "spawn": spawn,
    }
    monkeypatch.setattr(*targets[broken], fail)
    with pytest.raises(OSError, match="disk full"):
        start_run(page, DUCK)
    assert not list(page.runs_dir.glob("*"))


def test_requests_at_once_train_each_on_the_photos_that_it_sent(context, tmp_path, monkeypatch):
    """Both took theirs into one folder before either copied it: both runs had the same animal."""
    page, both_took, take = context(), Barrier(2), train_photos.take_with_masks
    (stand_in := tmp_path / "trainer.py").write_text(TRAINER)
    monkeypatch.setattr(page.jobs, "script", stand_in)
    add = next(
        event.fn for event in build_app(page, []).fns.values() if event.api_name == "add_to_queue"
    )

    def take_with_the_other(*args):
        take(*args)
        with suppress(BrokenBarrierError):
            both_took.wait(1)

    def ask(word: str, count: int) -> int:
        files = list(map(str, sorted(paint_photos(tmp_path / word, count).iterdir())))
        add(files, **values_of(replace(DUCK, class_word=word)))
        return len(list((page.runs_dir / word / "photos").iterdir()))

    monkeypatch.setattr(train_photos, "take_with_masks", take_with_the_other)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, ("hen", "cat"), (2, 3))) == [2, 3]
    end_all(page.jobs)


@pytest.mark.parametrize(
    "form",
    [
        DUCK,
        TrainForm("tok", "toy duck", preset="quick", captions="first\n\nthird"),
        TrainForm("sks", "duck", steps=7, **CHANGED),
        TrainForm(
            "sks", "duck", prior_preservation=False, new_tokens=True, tokens_begin_as="toy duck"
        ),
        replace(TWO, preset="thorough"),
        replace(TWO, steps=30, seed=4),
        replace(TWO, new_tokens=True, others=(replace(ROCKET, tokens_begin_as="red rocket"),)),
    ],
)
def test_what_a_run_was_started_with_comes_back_and_makes_the_same_run(workspace, tab, form):
    with prepared(tab, form) as run:
        back = form_of_run(run.settings, run.run_dir / "photos")
        take_photos_of_run(run.run_dir, workspace, len(back.subjects))
    words = tuple(replace(words, captions=words.captions.rstrip()) for words in form.subjects)
    assert (back.subjects, back.preset, back.steps) == (words, form.preset, form.steps)
    with prepared(tab, back) as again:
        settings = [without(each.settings, *OF_ONE_RUN, "subjects") for each in (run, again)]
        prompts = [
            [one.get("instance_prompt") for one in each.settings["subjects"]]
            for each in (run, again)
        ]
        texts = [sorted(path.name for path in each.run_dir.rglob("*.txt")) for each in (run, again)]
    assert all(one == other for one, other in (settings, prompts, texts))


@pytest.mark.parametrize("base", ["toy", "toy-zimage"])
def test_a_run_that_comes_back_to_a_page_on_another_base_says_so(workspace, tab, context, base):
    """The page said nothing, and another model was trained."""
    page = context(title=base, name=base)
    with prepared(tab, DUCK) as run:
        processes.write_settings(run.run_dir, run.settings)
        recorded(run.run_dir)
        told = " ".join(
            value for value in handler(page, "reopen")("duck") if isinstance(value, str)
        )
    assert "photos of duck are in the form" in told
    assert (
        "It was trained on toy, and the base at the top of the page is toy-zimage." in told
    ) == (base != "toy")


def test_a_run_of_one_subject_that_comes_back_takes_the_rows_of_further_subjects_away(
    workspace, tab, context
):
    """Their photos are gone, and “Add another subject” showed them again."""
    page = context()
    with prepared(tab, DUCK) as run:
        processes.write_settings(run.run_dir, run.settings)
        recorded(run.run_dir)
        event = next(event for event in build_app(page, []).fns.values() if event.name == "reopen")
        shown = dict(
            zip((widget.elem_id for widget in event.outputs), event.fn("duck"), strict=True)
        )
    assert (shown["crops"].visible, shown["crops_2"].visible, shown["remarks_2"].visible) == (
        True,
        False,
        False,
    )


OF_ONE_RUN = ("output_dir", "instance_data_dir", "token")


def test_the_photos_of_the_run_with_their_masks_replace_those_that_were_added_unless_they_are_gone(
    workspace, tab
):
    folders = [folder_of(workspace.photos_dir, number) for number in (1, 2)]
    shutil.copy(folders[0] / "photo_02.png", folders[0] / "photo_01.mask.png")
    with prepared(tab, TWO) as run:
        shutil.rmtree(folders[1])
        (folders[0] / "photo_05.png").unlink()
        take_photos_of_run(run.run_dir, workspace, 2)
        assert [len(list(folder.iterdir())) for folder in folders] == [6, 2]
        shutil.rmtree(folder_of(run.run_dir / "photos", 2))
        (folders[0] / "photo_05.png").unlink()
        for subjects in (2, 3):
            with pytest.raises(UserError, match="the photos of this run are not there any more"):
                take_photos_of_run(run.run_dir, workspace, subjects)
        assert [len(list(folder.iterdir())) for folder in folders] == [5, 2]
        take_photos_of_run(run.run_dir, workspace, 1)
        assert len(list(folders[0].iterdir())) == 6 and not folders[1].exists()


def test_settings_that_are_none_are_told_in_words_and_other_fields_as_at_first(tmp_path):
    tables = [
        {
            "instance_data_dir": f"/p{n}",
            "instance_prompt": f"a photo of a t{n} dog",
            "class_prompt": "a dog",
        }
        for n in range(5)
    ]
    five = TrainConfig(subjects=tables).to_dict()
    for settings, words in (({"rnak": 3}, "rnak"), (five, "5 subjects, and the form 4 at most")):
        with pytest.raises(UserError, match=words):
            form_of_run(settings, tmp_path)
    values = values_of(TWO)
    assert (values["subjects"], values["class_word_2"], values["token_2"]) == (2, "rocket", "zwx")
    assert (values["class_word_3"], values["token_3"], values["captions_3"]) == ("", "ohwx", "")
    values = values_like(None, "toy")  # of no recipe
    assert values.keys() < set(rows(TrainForm)) and values.pop("make_masks") is True
    assert values == {name: getattr(TrainForm, name) for name in values}


OURS = {
    "rank": 3,
    "lora_alpha": 6.0,
    "learning_rate": 5e-4,
    "mixer": "kaiming",
    "seed": 4,
    "optimizer": "Adafactor",
}
OURS |= {
    "unmasked_weight": 0.5,
    "with_prior_preservation": True,
    "prior": "class_images",
    "prior_loss_weight": 0.7,
}
OURS |= {
    "masks": "given",
    "crops_per_photo": 3,
    "crop_zoom": 1.5,
    "resolution": 128,
    "exposures_per_photo": 40,
}
PIVOTAL = {
    "with_prior_preservation": False,
    "train_text_encoder_ti": True,
    "text_encoder_lr": 2e-3,
    "seed": 0,
}
PIVOTAL |= {
    "num_new_tokens_per_abstraction": 3,
    "max_train_steps": 30,
    "masks": "auto",
    "captions": "auto",
}
KOHYA = {
    "ss_network_dim": "8",
    "ss_network_alpha": "4",
    "ss_learning_rate": "0.001",
    "ss_num_epochs": "7",
}
KOHYA |= {
    "ss_seed": "42",
    "ss_clip_skip": "2",
    "ss_resolution": "(1024, 1024)",
    "ss_lr_scheduler": "cosine",
}
NOTE = {"word": "sks", "count": 2, "file": "moslora_emb.safetensors", "sha256": "0" * 64}
OTHER = {"output_dir", "variant", "evaluate_steps", "validation_steps"}
"""What the page and the command line choose each in their own way."""


def adapter(file: Path, **facts) -> Path:
    return save_header(file, moslora=AdapterMetadata(rank=4, alpha=4, **facts).to_json())


def ours(**recipe) -> dict[str, str]:
    return {"moslora": AdapterMetadata(rank=4, alpha=4, recipe=recipe).to_json()}


@pytest.fixture
def begun(tab):
    """The tab with the checkpoint of a run on its shelf."""
    adapter(tab.runs_dir / "old duck" / "checkpoint-30" / "moslora_weights.safetensors")
    return tab


@pytest.fixture
def shelf(tab, tmp_path):
    """The tab with a shelf of "ours", "pivotal", "kohya" and "plain", which has no recipe."""
    for name, header in (
        ("ours", ours(**OURS)),
        ("pivotal", ours(**PIVOTAL)),
        ("kohya", KOHYA),
        ("plain", {}),
    ):
        save_header(tmp_path / "adapters" / f"{name}.safetensors", **header)
    return tab


def test_a_run_that_begins_with_an_adapter_without_new_tokens_has_the_flags_config_and_its_own_copy(
    begun, workspace, context, tmp_path
):
    with prepared(begun, replace(DUCK, begin_with="old duck@30")) as run:
        copied = Path(run.settings["init_adapter"])
        assert copied == run.run_dir / "begun_with" / "old duck@30.safetensors"
        assert copied.read_bytes() == begun.catalog.path("old duck@30").read_bytes()
        assert "begins with what the adapter old duck@30 has learnt" in run.said
        assert form_of_run(run.settings, run.run_dir / "photos").begin_with == "old duck@30"
        assert list(begun.catalog.files()) == ["old duck@30"]
    with prepared(begun, DUCK) as plain:
        own = {
            name: run.settings[name] for name in ("output_dir", "instance_data_dir", "init_adapter")
        }
        assert TrainConfig.from_dict(plain.settings | own).to_dict() == run.settings
        assert not (plain.run_dir / "begun_with").exists()
    adapter(tmp_path / "adapters" / "tokens.safetensors", tokens=NOTE)
    assert [name for name, _ in handler(context(), "starts")().choices] == ["none", "old duck@30"]


@pytest.mark.parametrize(
    "form, words",
    [
        ({"begin_with": "../runs/old duck@30"}, "there is no adapter"),
        ({"begin_with": "tokens"}, "“Begin with” tokens: .*learnt new tokens for 'sks'"),
        ({"begin_with": "torn"}, "“Begin with” torn: .*not a safetensors file"),
        ({"like": "plain"}, "holds no recipe"),
        ({"like": "gone"}, "there is no adapter gone"),
        ({"like": "blocks"}, "has no such layer"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_named_before_anything_is_made(
    begun, shelf, tmp_path, form, words
):
    adapter(tmp_path / "adapters" / "tokens.safetensors", tokens=NOTE)
    adapter(
        tmp_path / "adapters" / "blocks.safetensors",
        recipe={"target_modules": ["to_quarrel"], "rank": 3},
    )
    (tmp_path / "adapters" / "torn.safetensors").write_text("an adapter")
    form = replace(DUCK, **form)
    for begin in (lambda: estimate_cost(shelf, form), lambda: prepared(shelf, form).__enter__()):
        with pytest.raises(UserError, match=words):
            begin()
    assert [path.name for path in shelf.runs_dir.iterdir()] == ["old duck"]


def test_a_recipe_that_the_bases_family_cannot_obey_is_refused_before_anything_is_made(
    shelf, workspace, tmp_path
):
    adapter(tmp_path / "adapters" / "unets.safetensors", recipe={"snr_gamma": 5.0, "rank": 3})
    shelf.base_name, form = "Tongyi-MAI/Z-Image", replace(DUCK, like="unets")
    for begin in (lambda: estimate_cost(shelf, form), lambda: prepared(shelf, form).__enter__()):
        with pytest.raises(UserError, match="--snr_gamma is not for Z-Image"):
            begin()
    assert not [*shelf.runs_dir.iterdir()]


def filled(ctx, name: str) -> TrainForm:
    return replace(DUCK, like=name, **values_like(recipe_of(ctx, name), ctx.base_name))


@pytest.mark.parametrize("name", ["ours", "pivotal", "kohya"])
def test_the_filled_form_makes_the_config_of_the_flag_and_its_run_comes_back_with_the_recipe(
    shelf, workspace, name, monkeypatch, tmp_path
):
    form = filled(shelf, name)
    config = form.config("toy", 128, workspace.photos_dir, tmp_path / "run", recipe_of(shelf, name))
    monkeypatch.chdir(tmp_path)
    flags = ["--pretrained_model_name_or_path", "toy", "--like", str(shelf.catalog.path(name))]
    flags += ["--resolution", "128", *([] if name == "kohya" else ["--seed", str(form.seed)])]
    command = parse_train_config([str(workspace.photos_dir), "duck", *flags]).to_dict()
    assert without(TrainConfig.from_dict(config).to_dict(), *OTHER) == without(command, *OTHER)
    with prepared(shelf, replace(form, preset="quick")) as run:
        assert f"settings like {name}, where the form says nothing else" in run.said
        back = form_of_run(run.settings, run.run_dir / "photos")
        kept, recipe = like_of_run(run.run_dir)
        assert (kept, recipe.settings) == (name, recipe_of(shelf, name).settings)
    assert (back.like, back.preset) == (name, "standard" if name == "pivotal" else "quick")
    with prepared(shelf, back) as again:
        assert without(again.settings, *OF_ONE_RUN) == without(run.settings, *OF_ONE_RUN)


def test_a_field_of_the_form_wins_over_the_file_whose_crops_are_shown(shelf, workspace, tmp_path):
    form, recipe = filled(shelf, "ours"), recipe_of(shelf, "ours")

    def config_with(**own) -> dict:
        return replace(form, **own).config(
            "toy", 128, workspace.photos_dir, tmp_path / "run", recipe
        )

    config = config_with(
        rank=5, mixer="none", prior_preservation=False, make_masks=True, preset="thorough"
    )
    assert (config["rank"], config["mixer"], config["with_prior_preservation"]) == (
        5,
        "none",
        False,
    )
    assert (config["masks"], config["exposures_per_photo"], config["optimizer"]) == (
        "auto",
        80,
        "Adafactor",
    )
    steps = config_with(steps=7)
    assert steps["max_train_steps"] == 7 and "exposures_per_photo" not in steps
    crops = crop_config("toy", 128, workspace.photos_dir, [], 0, recipe)
    assert (crops.crops_per_photo, crops.crop_zoom, crops.resolution) == (3, 1.5, 128)
    assert "each shown by the first of its 3 crops" in review_kept(shelf, like="ours").remarks


def test_the_line_says_what_was_taken_and_what_not(shelf):
    assert (
        ">Like kohya: 6 settings, those of this form filled in; left to this page: resolution; "
        "without an equivalent here: ss_clip_skip.<"
    ) in said_of("kohya", recipe_of(shelf, "kohya")).value


def test_the_recipe_of_an_uploaded_file_is_kept_without_the_file(shelf, tmp_path):
    file = save_header(tmp_path / "ours.safetensors", **ours(rank=7))
    assert [add_recipe(shelf, file) for _ in range(2)] == ["ours.safetensors", "ours.safetensors 2"]
    assert recipe_names(shelf)[:3] == ["none", "ours.safetensors", "ours.safetensors 2"]
    file.unlink()
    assert recipe_of(shelf, "ours.safetensors").settings == {"rank": 7}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.pt", b"\x80\x02}q", "is not a .safetensors file"),
        ("a.safetensors", b"\xff" * 64, "not a safetensors file"),
        ("a.safetensors", {}, "its header holds no recipe"),
        ("a.safetensors", ours(target_modules=["to_q"] * 50_000), "names too many layers"),
    ],
)
def test_a_bad_file_is_one_line(shelf, workspace, tmp_path, name, content, words):
    file = tmp_path / name
    file.write_bytes(content) if isinstance(content, bytes) else save_header(file, **content)
    with pytest.raises(UserError, match=words) as raised:
        add_recipe(shelf, file)
    assert (
        "\n" not in str(raised.value)
        and str(tmp_path) not in str(raised.value)
        and not workspace.recipes
    )


def test_a_changed_recipe_of_a_run_is_checked_again(tmp_path):
    (tmp_path / "like").mkdir()
    for content, left in (
        (json.dumps({"rank": 5, "output_dir": "/etc"}), {"rank": 5}),
        ("[1]", None),
        ("{", None),
    ):
        (tmp_path / "like" / "a.json").write_text(content)
        name, recipe = like_of_run(tmp_path)
        assert (name, recipe and recipe.settings) == (("a", left) if left else ("none", None))


WORDS_AND_PATHS = {
    *("pretrained_model_name_or_path", "variant", "instance_data_dir", "output_dir"),
    *("instance_prompt", "class_prompt"),
}
OF_THE_PAGE = {"seed", "memory"}
"""Named by the form alone: the crops it shows are drawn from the seed, and a plan may add to the
recipe's."""


@pytest.fixture
def photos(tmp_path):
    """Five, large enough for SDXL."""
    for path in paint_photos(tmp_path / "dog", 5).iterdir():
        with PIL.Image.open(path) as image:
            image.resize((256, 256)).save(path)
    return tmp_path / "dog"


def config_of(
    form: TrainForm, photos, base: str = "owner/sdxl", resolution_px: int = 1024
) -> TrainConfig:
    return TrainConfig.from_dict(form.config(base, resolution_px, photos, photos.parent / "run"))


@pytest.mark.parametrize("gb", [8, 24])
def test_the_form_is_the_recipe_and_what_the_command_chooses_and_memory_goes_by_the_card(
    gpu, photos, monkeypatch, gb
):
    gpu(8, 0.95 * gb)
    config = config_of(TrainForm("sks", "dog"), photos)
    recipe = load_settings("assets/configs/sdxl.toml")
    own = WORDS_AND_PATHS | {"max_train_steps", "prior"}
    assert {n: v for n, v in recipe.items() if n not in own} == {
        n: config.to_dict()[n] for n in recipe.keys() - own
    }
    assert plan_steps(config, 5).total_steps == recipe["max_train_steps"]
    monkeypatch.setattr(memory, "least_free_gib", lambda **later: 0.95 * gb)
    command = parse_train_config(
        [str(photos), "dog", "--pretrained_model_name_or_path", "owner/sdxl"]
    )
    left_out = {"output_dir", *OF_THE_PAGE}
    mine, its = (
        {n: v for n, v in c.to_dict().items() if n not in left_out} for c in (config, command)
    )
    assert mine == its and (config.memory, config.seed) == ("auto", 0)
    planned = replace(config, **memory_settings(config, Base.of(config), 0.95 * gb))
    assert estimate(planned, BaseSize(), 400).peak_gib <= 0.95 * gb
    crops = crop_config("owner/sdxl", 1024, photos, [])
    assert crops.crops_per_photo == config.crops_per_photo == recipe.get("crops_per_photo", 1)


def test_the_crops_shown_have_sides_that_the_bases_patches_divide(tmp_path):
    PIL.Image.new("RGB", (160, 90)).save(tmp_path / "a.png")
    photos = find_photos(tmp_path, "", 128).photos
    steps = [
        crop_config(base, 128, tmp_path, photos).bucket_reso_steps for base in ("toy", "toy-zimage")
    ]
    assert steps == [8, 16]


def test_the_embedded_base_is_trained_as_the_command_does_on_any_card(gpu, photos):
    command = parse_train_config([str(photos), "dog", "--pretrained_model_name_or_path", "toy"])
    gpu(8, 4.0)
    config = config_of(TrainForm("sks", "dog"), photos, "toy", 128)
    mine, its = (
        {n: v for n, v in c.to_dict().items() if n != "output_dir"} for c in (config, command)
    )
    assert (
        mine == its
        and config.mixed_precision is None
        and config.memory is None
        and config.evaluate_steps
    )


@pytest.mark.parametrize(
    ("free_gib", "words", "is_tight"),
    [(40.0, "without", False), (7.0, "with", False), (2.5, "with", True)],
)
def test_the_cost_says_each_choice_and_names_the_card(
    gpu, workspace, context, free_gib, words, is_tight
):
    gpu(8, free_gib)
    ctx = context(title="sdxl", name="owner/sdxl", resolution_px=1024)
    cost = estimate_cost(ctx, TrainForm("sks", "dog"))
    card_line = (
        f"GPU: Some Card &lt;3, {free_gib} GiB free for this run, so it trains in bf16, "
        f"{words} gradient"
    )
    assert card_line in cost and ("too little memory" in cost) == is_tight
    recipe = "recipe: assets/configs/sdxl.toml"
    for said in ("photos: 5, 0 with a mask", recipe, "which show each photo", "scores: none, as"):
        assert said in cost, (said, cost)
