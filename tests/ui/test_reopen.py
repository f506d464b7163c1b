"""A run's settings come back into the form: started again unchanged, it is the same run in another folder."""

import shutil
from dataclasses import replace

import pytest

from dreambooth_moslora.core import UserError
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.ui.train_form import TrainForm, folder_of, values_of
from dreambooth_moslora.ui.train_start import form_of_run, prepared, take_photos_of_run
from tests.ui.test_more_subjects import FORM, ROCKET, ann, page  # noqa: F401 (fixtures)

CHANGED = {"rank": 3, "learning_rate": 0.5, "mixer": "none", "seed": 9, "unmasked_weight": 0.5, "scores": False}
CHANGED |= {"prior": "class_images", "prior_weight": 4.0, "make_masks": False, "make_captions": True}


@pytest.mark.parametrize(
    "form",
    [
        TrainForm("sks", "duck"),
        TrainForm("tok", "toy duck", preset="quick", captions="first\n\nthird"),
        TrainForm("sks", "duck", steps=7, **CHANGED),
        TrainForm("sks", "duck", prior_preservation=False, new_tokens=True, tokens_begin_as="toy duck"),
        replace(FORM, preset="thorough"),
        replace(FORM, steps=30, seed=4),
        replace(FORM, new_tokens=True, others=(replace(ROCKET, tokens_begin_as="red rocket"),)),
    ],
)
def test_what_a_run_was_started_with_comes_back_and_makes_the_same_run(ann, page, form):  # noqa: F811
    with prepared(page, form, ann) as run:
        back = form_of_run(run.settings, run.run_dir / "photos")
        take_photos_of_run(run.run_dir, ann, len(back.subjects))
    assert (back.subjects, back.preset, back.steps) == (
        tuple(replace(words, captions=words.captions.rstrip()) for words in form.subjects),
        form.preset,
        form.steps,
    )
    with prepared(page, back, ann) as again:
        own = ("output_dir", "instance_data_dir", "subjects", "token")
        assert {n: v for n, v in again.settings.items() if n not in own} == {
            n: v for n, v in run.settings.items() if n not in own
        }
        prompts = [[one.get("instance_prompt") for one in each.settings["subjects"]] for each in (run, again)]
        assert prompts[0] == prompts[1]
        texts = [sorted(path.name for path in each.run_dir.rglob("*.txt")) for each in (run, again)]
        assert texts[0] == texts[1]


def test_the_photos_of_the_run_with_their_masks_replace_those_that_were_added(ann, page):  # noqa: F811
    (ann.photos_dir / "photo_01.mask.png").write_bytes((ann.photos_dir / "photo_02.png").read_bytes())
    with prepared(page, FORM, ann) as run:
        shutil.rmtree(folder_of(ann.photos_dir, 2))
        (ann.photos_dir / "photo_05.png").unlink()
        take_photos_of_run(run.run_dir, ann, 2)
        assert [len(list(folder_of(ann.photos_dir, n).iterdir())) for n in (1, 2)] == [6, 2]
        take_photos_of_run(run.run_dir, ann, 1)
        assert not folder_of(ann.photos_dir, 2).exists()
        with pytest.raises(UserError, match="the photos of this run are not there any more"):
            take_photos_of_run(run.run_dir, ann, 3)


def test_where_photos_of_a_subject_are_gone_from_the_run_the_visitor_keeps_all_of_theirs(ann, page):  # noqa: F811
    with prepared(page, FORM, ann) as run:
        shutil.rmtree(folder_of(run.run_dir / "photos", 2))
        (ann.photos_dir / "photo_05.png").unlink()
        with pytest.raises(UserError, match="the photos of this run are not there any more"):
            take_photos_of_run(run.run_dir, ann, 2)
        assert [len(list(folder_of(ann.photos_dir, n).iterdir())) for n in (1, 2)] == [4, 2]


def test_the_fields_of_subjects_that_the_run_has_not_are_empty_again():
    values = values_of(FORM)
    assert (values["subjects"], values["class_word_2"], values["token_2"]) == (2, "rocket", "zwx")
    assert (values["class_word_3"], values["token_3"], values["captions_3"]) == ("", "ohwx", "")


def test_a_run_that_used_a_removed_setting_comes_back_without_it(ann, page):  # noqa: F811
    with prepared(page, TrainForm("sks", "duck"), ann) as run:
        photos, old = run.run_dir / "photos", {"new_backgrounds": 2, "background_scenes": ["in a barn"]}
        assert form_of_run({**run.settings, **old}, photos) == form_of_run(run.settings, photos)


def test_settings_that_are_none_are_told_in_words(tmp_path):
    with pytest.raises(UserError, match="rnak"):
        form_of_run({"rnak": 3}, tmp_path)
    tables = [
        {"instance_data_dir": f"/p{n}", "instance_prompt": f"a photo of a t{n} dog", "class_prompt": "a dog"}
        for n in range(5)
    ]
    settings = TrainConfig(subjects=tables).to_dict()
    with pytest.raises(UserError, match="5 subjects, and the form 4 at most"):
        form_of_run(settings, tmp_path)
