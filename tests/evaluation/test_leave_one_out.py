"""`check --leave_one_out`: the photo that hurts is named, and of good ones none."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dreambooth_moslora.cli.commands import check
from dreambooth_moslora.cli.leave_one_out import short_run
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.evaluation.intervals import DEGREES, STUDENT
from dreambooth_moslora.evaluation.leave_one_out import (
    effect_plot,
    effects_of,
    intervals_of,
    student_point,
    study_without_each,
    table_of,
    verdict,
)
from dreambooth_moslora.evaluation.studies.run import run_study
from dreambooth_moslora.evaluation.studies.stats import Result
from dreambooth_moslora.evaluation.studies.study import Cell, Protocol
from tests.helpers.odd_photos import picture

ROOT = Path(__file__).parents[2]
NAMES = [f"{number}.jpg" for number in range(6)]


def results_of(likeness: np.ndarray, leak: np.ndarray | None = None) -> list[Result]:
    """Of the run with all photos and of those without each, from their means to each photo (1 + P, P)."""
    found = []
    for number, row in enumerate(likeness):
        arm = "all" if number == 0 else f"without_{number - 1}"
        pictures = {"likeness_by_photo": row.tolist()}
        if leak is not None:
            pictures["leak_by_photo"] = leak[number].tolist()
        found.append(Result(Cell("test", arm, 4, "dog", 0, 1e-3), {}, pictures, {}))
    return found


def runs(rng: np.random.Generator, photos: int = 6) -> np.ndarray:
    """Likenesses around 0.7; runs differ by 0.02, and photos among themselves."""
    return 0.7 + rng.normal(0, 0.02, (photos + 1, 1)) + rng.normal(0, 0.05, photos)


def test_a_photo_without_which_pictures_are_more_like_the_others_is_named():
    means = runs(np.random.default_rng(1))
    means[1 + 4] += 0.3
    effects = effects_of(NAMES, results_of(means))
    assert [effect.name for effect in effects if effect.hurts] == ["4.jpg"]
    assert effects[4].likeness.mean == pytest.approx(-0.3, abs=0.08) and effects[4].leak is None
    assert verdict(effects).endswith('--leave_out "4.jpg"')
    assert "4.jpg" in table_of(effects).splitlines()[5] and table_of(effects).splitlines()[5].endswith("hurts")
    assert len(effect_plot(effects).axes) == 1


def test_a_photo_that_brings_backgrounds_along_is_named():
    rng = np.random.default_rng(2)
    leak = 0.05 + rng.normal(0, 0.005, (7, 1)) + np.zeros(6)
    leak[1 + 2] -= 0.1
    effects = effects_of(NAMES, results_of(runs(rng), leak))
    assert [effect.name for effect in effects if effect.hurts] == ["2.jpg"]
    assert len(effect_plot(effects).axes) == 2


@pytest.mark.parametrize("photos", [4, 6, 10])
def test_of_equally_good_photos_none_stands_out_in_most_sets(photos):
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(200):
        alarms += any(effect.low > 0 or effect.high < 0 for effect in intervals_of(runs(rng, photos)))
    assert alarms <= 20
    found = effects_of(NAMES, results_of(runs(np.random.default_rng(3))))
    assert verdict(found).startswith("no photo stands out")


def test_the_points_of_students_t_are_those_of_the_table():
    found = [student_point(int(degrees), 0.025) for degrees in DEGREES[:-1]]
    assert found == pytest.approx(STUDENT[:-1].tolist(), rel=1e-3)


def test_too_few_photos_and_a_run_that_failed_are_said(tmp_path):
    config = TrainConfig(instance_data_dir=str(ROOT / "assets/subjects/bear"), learning_rate=1e-3)
    with pytest.raises(UserError, match="at least 4 photos, and there are 3"):
        study_without_each(config, NAMES[:3])
    with pytest.raises(UserError, match="1 of the 7 short runs failed"):
        effects_of(NAMES, results_of(runs(np.random.default_rng(1)))[:-1])


def test_the_short_run_is_the_recipes_with_the_steps_asked_for_and_a_persons_words_win(tmp_path):
    folder = ROOT / "assets/subjects/bear"
    config = short_run(folder, None, {}, "stabilityai/stable-diffusion-xl-base-1.0", 60)
    assert config.pretrained_model_name_or_path == "toy" and config.max_train_steps == 60 and config.masks == "auto"
    assert config.instance_prompt == "a photo of a sks bear" and config.class_prompt == "a photo of a bear"
    given = {"instance_prompt": "a photo of sks toy", "pretrained_model_name_or_path": "toy"}
    own = short_run(folder, None, given, "", 5)
    assert own.instance_prompt == "a photo of sks toy" and not own.with_prior_preservation
    assert own.resolution == config.resolution == 128 and own.learning_rate == config.learning_rate
    quick = short_run(folder, str(ROOT / "assets/configs/quickstart.toml"), {}, "", 5)
    assert quick.pretrained_model_name_or_path == "toy" and quick.prior_loss_weight == 5.0 and quick.masks == "auto"
    (tmp_path / "bare.toml").write_text('pretrained_model_name_or_path = "toy"\nmasks = "given"')
    assert short_run(folder, str(tmp_path / "bare.toml"), {}, "", 5).masks == "given"


@pytest.mark.parametrize(
    ("flags", "has_shapes"), [([], True), (["--no_enable_bucket"], False), (["--config", "square.toml"], False)]
)
def test_the_short_runs_crop_as_the_picture_shows(flags, has_shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(4):
        picture(size_px=(96, 160)).save(tmp_path / "photos" / f"{number}.png")
    Path("square.toml").write_text("crop_zoom = 1.0")
    trained = []
    monkeypatch.setattr(check, "leave_one_out", lambda config, *rest: str(trained.append(config)))
    command = ["check", "photos", "--no_picture", "--leave_one_out", "--instance_prompt", "a photo of a sks bear"]
    assert main([*command, "--pretrained_model_name_or_path", "toy", "--resolution", "64", *flags]) == 0
    assert [config.enable_bucket for config in trained] == [has_shapes]


def test_the_command_refuses_what_it_cannot_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = str(ROOT / "assets/subjects/bear")
    assert main(["check", folder, "--no_picture", "--leave_one_out", "0"]) == 2
    assert "takes a number of steps from 1 on" in capsys.readouterr().err
    (tmp_path / "three").mkdir()
    for number in range(3):
        shutil.copy(Path(folder) / f"0{number}.jpg", tmp_path / "three")
    flags = ["--no_picture", "--leave_one_out", "--instance_prompt", "a photo of sks bear"]
    assert main(["check", "three", *flags, "--pretrained_model_name_or_path", "toy"]) == 2
    assert "--leave_one_out needs at least 4 photos, and there are 3" in capsys.readouterr().err
    assert main(["check", "three", "--no_picture", "--leave_one_out"]) == 2
    assert "no subject.json" in capsys.readouterr().err


@pytest.mark.slow
def test_a_photo_of_another_subject_among_those_of_one_is_named(tmp_path):
    """Five photos of the bear and one of the rocket, called a bear."""
    subjects, photos = ROOT / "assets/subjects", tmp_path / "photos"
    photos.mkdir()
    for number, source in enumerate(["bear/00", "bear/01", "bear/02", "bear/03", "rocket/02", "bear/04"]):
        for end in (".jpg", ".mask.png"):
            shutil.copy(subjects / f"{source}{end}", photos / f"{number}{end}")
    given = {"instance_prompt": "a photo of a sks bear", "pretrained_model_name_or_path": "toy"}
    config = replace(short_run(photos, None, given, "", 60), crops_per_photo=2, train_batch_size=2)
    names = [f"{number}.jpg" for number in range(6)]
    study = study_without_each(config, names, Protocol(3, 2, 1, 1, 8))
    effects = effects_of(names, run_study(study, tmp_path / "out", 1, print))
    assert [effect.name for effect in effects if effect.hurts] == ["4.jpg"], table_of(effects)
