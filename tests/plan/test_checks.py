"""A run takes no folder in which it would harm what it did not make."""

import os
from pathlib import Path

import pytest

from dreambooth_moslora.cli.main import train_main
from dreambooth_moslora.core import UserError, atomic_write
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.plan.checks import check_folders
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny_training import paint_photos, tiny_config

pytestmark = pytest.mark.usefixtures("few_steps")


class Always:
    """An evaluator to whom the first step is the best."""

    prompts = ()

    def __call__(self, sampler, step):
        return {"score": 1.0, "best": {"step": step, "score": 1.0, "since": 0}}


def check(output, photos="photos", **changes):
    check_folders(TrainConfig(output_dir=str(output), instance_data_dir=str(photos), **changes))


@pytest.mark.parametrize("output", ["", " ", ".", "../photos", "{photos}"])
def test_neither_an_empty_name_nor_the_photo_folder_is_a_run_folder(output, tmp_path, monkeypatch):
    photos = paint_photos(tmp_path / "photos")
    monkeypatch.chdir(photos)
    with pytest.raises(UserError, match="--output_dir"):
        check(output.format(photos=photos), photos)


@pytest.mark.parametrize("output", ["/", "//", "~", "{home}/.", "{home}/photos/.."])
def test_neither_the_root_nor_the_home_is_a_run_folder(output, tmp_path, monkeypatch):
    paint_photos(tmp_path / "photos")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"--output_dir .* itself: name a folder of the run's own"):
        check(output.format(home=tmp_path))
    check(tmp_path / "run")


@pytest.mark.parametrize("name", ["output_dir", "instance_data_dir", "class_data_dir", "dataset_name"])
@pytest.mark.parametrize("inner", ["", "/inner"])
def test_a_link_to_itself_is_one_line(name, inner, tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    settings = {"output_dir": tmp_path / "run", "pretrained_model_name_or_path": "toy", "instance_prompt": "a sks dog"}
    settings |= {} if name == "dataset_name" else {"instance_data_dir": tmp_path}
    settings[name] = f"{tmp_path}/loop{inner}"
    assert train_main([word for key, value in settings.items() for word in (f"--{key}", str(value))]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--{name}" in error and "leads back to itself" in error


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="only Linux has a folder that nobody can write to")
@pytest.mark.parametrize("cache", ["/proc/nope", "/proc", "{file}"])
def test_a_default_cache_that_cannot_be_used_is_said_before_training(cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", cache.format(file=tmp_path / "file"))
    check(tmp_path / "run", paint_photos(tmp_path / "photos"))
    with pytest.raises(UserError, match=r"--cache_dir .* (cannot be written|is a file, not a folder)"):
        check(tmp_path / "run", tmp_path / "photos", caching="disk")
    with pytest.raises(UserError, match="--cache_dir /proc: cannot be written"):
        check(tmp_path / "run", tmp_path / "photos", caching="disk", cache_dir="/proc")


@pytest.mark.parametrize("name", ["a\nb", "d" * 245, "ü" * 101])
def test_a_folder_of_which_no_adapter_can_be_called_is_refused_before_training(name, tmp_path):
    with pytest.raises(UserError, match="name"):
        check(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_the_longest_name_leaves_room_for_every_file_and_its_temporary(tmp_path):
    run = RunDir(tmp_path / ("d" * 200))
    check(run.path)
    run.path.mkdir()
    atomic_write(run.kohya_path, b"x")


def test_the_present_folder_lends_the_best_adapter_its_name_too(tiny_base, tmp_path, monkeypatch):
    photos = paint_photos(tmp_path / "photos")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    train(tiny_config(tiny_base, photos, ".", max_train_steps=1, evaluate_steps=1), evaluator=Always())
    assert (tmp_path / "here" / "best" / "here.kohya.safetensors").is_file()


@pytest.mark.parametrize("inner", ["samples", "checkpoint-5", "best/mine", "class_images", "masks"])
def test_photos_are_not_taken_from_where_a_run_writes(inner, tmp_path):
    with pytest.raises(UserError, match="--instance_data_dir"):
        check(tmp_path, tmp_path / inner)


def test_the_class_is_not_learnt_from_the_subjects_photos(tmp_path):
    with pytest.raises(UserError, match="--class_data_dir is the folder of --instance_data_dir"):
        check(tmp_path / "run", tmp_path / "photos", class_data_dir=f"{tmp_path}/x/../photos")


def test_photo_folders_that_a_run_leaves_alone_may_be_near(tmp_path):
    check(tmp_path, tmp_path / "photos", class_data_dir=str(tmp_path / "class_images"))
    check(tmp_path / "photos" / "run", tmp_path / "photos")


def test_a_run_is_refused_before_it_touches_the_photos(tiny_base, tmp_path):
    photos = paint_photos(tmp_path / "photos")
    (photos / "0.png").rename(photos / "image_0.png")
    (photos / "README.md").write_text("my photos")
    before = {path.name: path.read_bytes() for path in photos.iterdir()}
    with pytest.raises(UserError, match="is the folder of --instance_data_dir"):
        train(tiny_config(tiny_base, photos, photos))
    assert {path.name: path.read_bytes() for path in photos.iterdir()} == before


@pytest.mark.parametrize("name", ["README.md", "image_7.png"])
def test_a_card_or_picture_that_no_run_made_is_not_written_over(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="is not a run's"):
        check(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="everything is allowed to root")
def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(UserError, match=r"--output_dir .*: cannot be written: Permission denied"):
        check(tmp_path / "a" / "b")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no file system here that refuses even the administrator")
@pytest.mark.parametrize("name", ["output_dir", "class_data_dir", "cache_dir"])
def test_where_the_file_system_refuses_a_folder_is_said_before_training(name, tmp_path):
    places = {"output_dir": tmp_path / "run", name: "/proc/no/such"}
    with pytest.raises(UserError, match=rf"--{name} /proc/no/such: cannot be written"):
        check(places.pop("output_dir"), **places)


@pytest.mark.slow
def test_a_run_replaces_the_pictures_of_its_own_card_only(tiny_base, tmp_path):
    photos, run = paint_photos(tmp_path / "photos"), tmp_path / "run"
    drawn = {"max_train_steps": 1, "num_validation_images": 2}
    train(tiny_config(tiny_base, photos, run, **drawn))
    assert len(list(run.glob("image_*.png"))) == 6
    train(tiny_config(tiny_base, photos, run, **{**drawn, "num_validation_images": 0}))
    assert not list(run.glob("image_*.png"))
