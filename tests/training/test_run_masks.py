"""`--masks auto`: masks are made in the run folder before training, once, and the photos' folder stays as it is."""

import argparse
import shutil
from dataclasses import replace

import pytest

from dreambooth_moslora.cli import evaluate
from dreambooth_moslora.core import UserError
from dreambooth_moslora.photos.folder import photo_report
from dreambooth_moslora.photos.masks import Segmenter, open_mask
from dreambooth_moslora.settings.rules import remarks
from dreambooth_moslora.training.dry_run import made_lines
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny_clipseg import save_tiny_clipseg
from tests.helpers.tiny_training import adapter_sha256, paint_photos, tiny_config


@pytest.fixture
def photos(tmp_path):
    return paint_photos(tmp_path / "photos", count=2)


@pytest.fixture
def found_everywhere(monkeypatch):
    """A random CLIPSeg finds nothing: its probabilities are taken as they come, without the least peak."""
    monkeypatch.setattr("dreambooth_moslora.photos.masks.LEAST_PEAK", 0.0)


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The words that a segmenter was asked for."""
    words, ask = [], Segmenter.mask
    monkeypatch.setattr(Segmenter, "mask", lambda self, image: words.append(self.word) or ask(self, image))
    return words


@pytest.fixture
def auto(tiny_base, photos, tmp_path):
    model = str(save_tiny_clipseg(tmp_path))
    settings = {"masks": "auto", "mask_model": model, "max_train_steps": 1, "unmasked_weight": 0.0}
    return tiny_config(tiny_base, photos, tmp_path / "run", **settings)


@pytest.mark.slow
def test_masks_are_made_weigh_the_loss_and_leave_the_photos_alone(auto, photos, tmp_path, asked, found_everywhere):
    before = sorted(path.name for path in photos.iterdir())
    train(auto)
    assert asked == ["dog", "dog"]
    assert sorted(path.name for path in photos.iterdir()) == before
    made = sorted(path.name for path in (tmp_path / "run" / "masks").iterdir())
    assert made == ["0.png.mask.png", "1.png.mask.png"]
    assert all(open_mask(photo) is not None for photo in photo_report(auto).photos)
    train(replace(auto, masks="given", output_dir=str(tmp_path / "plain")))
    assert adapter_sha256(tmp_path / "plain") != adapter_sha256(tmp_path / "run")


@pytest.mark.slow
def test_a_run_in_the_same_folder_keeps_the_masks_and_ends_the_same(auto, tmp_path, asked, found_everywhere):
    train(auto)
    first = adapter_sha256(tmp_path / "run")
    train(auto)
    assert asked == ["dog", "dog"] and adapter_sha256(tmp_path / "run") == first


def test_a_model_that_is_not_there_ends_the_run_before_the_base_is_loaded(tiny_base, photos, tmp_path):
    events, config = [], tiny_config(tiny_base, photos, tmp_path / "run", masks="auto")
    with pytest.raises(UserError, match="--mask_model CIDAS/clipseg-rd64-refined is not here"):
        train(config, events.append)
    assert not [event for event in events if getattr(event, "phase", None) == "loading"]


@pytest.mark.slow
def test_a_persons_mask_needs_no_model(tiny_base, photos, tmp_path):
    for name in ("0", "1"):
        (photos / f"{name}.mask.png").write_bytes((photos / f"{name}.png").read_bytes())
    train(tiny_config(tiny_base, photos, tmp_path / "run", masks="auto", max_train_steps=1))
    assert not (tmp_path / "run" / "masks").exists()


def test_a_dry_run_says_what_would_be_made_and_advice_what_has_no_effect(tiny_base, photos, tmp_path):
    auto = tiny_config("toy", photos, tmp_path / "run", masks="auto", mask_prompt="dog")
    *_, line = made_lines(auto, photo_report(auto))
    assert line == "masks: 2 photos have none; toy-segmenter makes them before training"
    assert any("--mask_prompt has no effect with the embedded base's own net" in s for s in remarks(auto))
    real = tiny_config(tiny_base, photos, tmp_path / "run", masks="auto")
    *_, line = made_lines(real, photo_report(real))
    assert line.endswith("clipseg-rd64-refined makes them before training, looking for “dog”")
    given = tiny_config(tiny_base, photos, tmp_path / "run", mask_prompt="dog")
    assert not [line for line in made_lines(given, photo_report(given)) if line.startswith("masks")]
    assert any("without --masks auto" in line for line in remarks(given))


def test_evaluate_takes_a_moved_runs_masks_and_none_of_them_for_other_photos(auto, photos, tmp_path, found_everywhere):
    train(auto)
    moved, other = tmp_path / "moved", tmp_path / "other"
    (tmp_path / "run").rename(moved)
    shutil.copytree(photos, other)

    def masked(*flags: str) -> list[bool]:
        parser = argparse.ArgumentParser()
        evaluate.evaluate_arguments(parser)
        config = evaluate.resolve(parser.parse_args([str(moved), *flags]))
        return [photo.mask_path is not None for photo in photo_report(config).photos]

    assert masked() == [True, True]
    assert masked("--photos", str(other)) == [False, False]
