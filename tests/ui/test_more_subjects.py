"""Several subjects on the page: the form's config is that of the TOML tables, and each mistake is told by number."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest

from dreambooth_moslora.core import UserError, assets_folder
from dreambooth_moslora.photos.crops import apply_crop, plans_of
from dreambooth_moslora.photos.folder import photo_report
from dreambooth_moslora.photos.photo import open_rgb
from dreambooth_moslora.settings.sources import load_settings
from dreambooth_moslora.settings.table import TrainConfig, checked_setting
from dreambooth_moslora.ui.jobs import Jobs
from dreambooth_moslora.ui.train_form import SubjectWords, TrainForm, folder_of, form_of
from dreambooth_moslora.ui.train_photos import EDIT_PX, LEARNED, LEFT_OUT, keep_mask, review_kept, shown_masks
from dreambooth_moslora.ui.train_start import estimate_cost, prepared
from tests.ui.test_handlers import visitor

SUBJECTS = assets_folder() / "subjects"
ROCKET = SubjectWords("rocket", "zwx", "a red rocket\n\n")
FORM = TrainForm("sks", "duck", others=(ROCKET,))


@pytest.fixture
def ann(tmp_path):
    """A visitor with five photos of a duck and two of a rocket."""
    person = visitor(tmp_path)
    for number, (name, count) in enumerate((("duck", 5), ("rocket", 2)), 1):
        folder = folder_of(person.photos_dir, number)
        folder.mkdir()
        for photo in range(count):
            shutil.copy(SUBJECTS / name / f"0{photo}.jpg", folder / f"photo_0{photo + 1}.png")
    return person


@pytest.fixture
def page(tmp_path):
    jobs = Jobs(tmp_path / "runs")
    return SimpleNamespace(base_name="toy", resolution_px=128, runs_dir=jobs.runs_dir, jobs=jobs)


def in_toml(folder: Path, run_dir: Path, file: Path) -> TrainConfig:
    """What `--config` makes of the toy's recipe, two tables, and the lines that the form prints."""
    lines = (assets_folder() / "configs" / "toy.toml").read_text().splitlines()
    gone = ("instance_data_dir", "output_dir", "instance_prompt", "class_prompt", "max_train_steps", "validation_steps")
    tables = [
        f'[[subjects]]\ninstance_data_dir = "{folder_of(folder, number)}"\n'
        f'instance_prompt = "a photo of a {words}"\nclass_prompt = "a photo of a {words.split()[1]}"'
        for number, words in enumerate(("sks duck", "zwx rocket"), 1)
    ]
    own = [f'output_dir = "{run_dir}"', "exposures_per_photo = 384", 'masks = "auto"', "find_scale = true"]
    own += ["evaluate_steps = 240", "validation_steps = 240"]
    file.write_text("\n".join([*own, *(line for line in lines if not line.startswith(gone)), *tables]))
    return TrainConfig.from_dict(load_settings(file))


def test_the_forms_config_is_that_of_a_file_with_a_table_of_each(ann, tmp_path):
    found = TrainConfig.from_dict(FORM.config("toy", 128, ann.photos_dir, tmp_path / "run"))
    assert found == in_toml(ann.photos_dir, tmp_path / "run", tmp_path / "two.toml")


def test_the_forms_tables_are_those_of_a_folder_of_folders(ann, tmp_path):
    shutil.copytree(ann.photos_dir, tmp_path / "both" / "sks duck")
    shutil.copytree(folder_of(ann.photos_dir, 2), tmp_path / "both" / "zwx rocket")
    one, two = checked_setting("subjects", tmp_path / "both")
    for mine, other in zip(FORM.given("toy", 128, ann.photos_dir, tmp_path)["subjects"], (one, two), strict=True):
        assert mine | {"instance_data_dir": other.instance_data_dir} == other.to_dict()


def test_one_subject_is_as_without_the_others_fields(ann, tmp_path):
    alone = TrainForm("sks", "duck")
    values = {"token": "sks", "class_word": "duck", "subjects": 1, "class_word_2": "", "token_2": "zwx"}
    assert form_of(values) == alone and form_of({"token": "sks", "class_word": "duck"}) == alone
    config = alone.config("toy", 128, ann.photos_dir, tmp_path)
    assert config["instance_data_dir"] == str(ann.photos_dir) and "subjects" not in config


def test_what_is_started_has_the_photos_and_captions_of_each_and_the_steps_for_both(ann, page, tmp_path):
    values = {"token": "sks", "class_word": "duck", "subjects": 2, "class_word_2": "rocket", "token_2": "zwx"}
    form = form_of(values | {"captions_2": ROCKET.captions})
    assert form == FORM
    with prepared(page, form, ann) as run:
        assert run.run_dir.name == "duck-rocket"
        tables = run.settings["subjects"]
        assert [Path(table["instance_data_dir"]).name for table in tables] == ["photos", "photos_2"]
        assert [len(list(Path(table["instance_data_dir"]).glob("*.png"))) for table in tables] == [5, 2]
        assert Path(tables[1]["instance_data_dir"], "photo_01.txt").read_text() == "a red rocket"
        said = " ".join(run.said)
    assert (
        "photos: 5 + 2, 0 with a mask" in said and "words: “a photo of a sks duck”, “a photo of a zwx rocket”" in said
    )
    assert "the classes: “a photo of a duck”, “a photo of a rocket” stay" in said
    assert "steps: 960, which show each photo 384 times, and those of a subject with fewer oftener" in said
    cost = estimate_cost(page, form, ann)
    assert "2 subjects, 5 + 2 photos" in cost and "“a photo of a zwx rocket”: token “zwx”, class “rocket”" in cost


def test_masks_are_shown_and_kept_of_each_subject(ann, tmp_path):
    config = TrainConfig.from_dict(FORM.config("toy", 128, ann.photos_dir, tmp_path / "run"))
    found = list(shown_masks(config, ann))
    assert [(mask.photo, mask.label) for mask in found][4:6] == [
        ("photo_05.png", "photo 5 of subject 1"),
        ("photos_2/photo_01.png", "photo 1 of subject 2"),
    ]
    layer = PIL.Image.new("RGBA", (EDIT_PX, EDIT_PX), (*LEFT_OUT, 255))
    layer.paste((*LEARNED, 255), (200, 200, 400, 400))
    keep_mask(ann, "photos_2/photo_01.png", layer, config)
    assert (folder_of(ann.photos_dir, 2) / "photo_01.mask.png").is_file()
    assert not (ann.photos_dir / "photo_01.mask.png").exists()


@pytest.mark.parametrize("number", [1, 2])
def test_the_crops_shown_of_each_subject_are_those_of_the_run(ann, page, tmp_path, number):
    config = TrainConfig.from_dict(FORM.config("toy", 128, ann.photos_dir, tmp_path / "run"))
    photo = next(photo for photo in photo_report(config).photos if photo.subject == number - 1)
    (crop, _), *_ = review_kept(page, ann, number=number).crops
    assert np.array_equal(np.asarray(crop), np.asarray(apply_crop(open_rgb(photo), next(plans_of(photo, 0, config)))))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"subjects": 5}, "subjects must be a whole number from 1 to 4"),
        ({"subjects": True}, "subjects must be"),
        ({"subjects": []}, "subjects must be"),
        ({"subjects": float("nan")}, "subjects must be"),
        ({"class_word_2": "cat"}, "with class_word_2, subjects must be at least 2, not 1"),
        ({"subjects": 2, "token_2": "zwx"}, "subject 2: the word for what the photos show"),
        ({"subjects": 2, "class_word_2": "cat"}, "subject 2: the token"),
        ({"subjects": 2, "class_word_2": "duck", "token_2": "sks"}, "two subjects are called “a photo of a sks duck”"),
        (
            {"subjects": 3, "class_word_2": "cat", "token_2": "a", "class_word_3": "hen", "token_3": "b"},
            "add some photos of subject 3 first",
        ),
    ],
)
def test_a_mistake_names_the_subject(ann, tmp_path, values, words):
    with pytest.raises(UserError, match=words):
        form_of({"token": "sks", "class_word": "duck"} | values).config("toy", 128, ann.photos_dir, tmp_path)
