"""`--captions auto`: captions are made in the run folder before training, once, and the photos' folder stays."""

import json
from dataclasses import replace

import pytest

from dreambooth_moslora.core import UserError
from dreambooth_moslora.photos.captions import Captioner
from dreambooth_moslora.photos.folder import photo_report
from dreambooth_moslora.settings.rules import remarks
from dreambooth_moslora.settings.sources import recipe_of
from dreambooth_moslora.training.dry_run import made_lines
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny_training import adapter_sha256, paint_photos, tiny_config


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The words that a real language model would be asked for; it answers by the photo's number of pixels."""
    words = []

    def loaded(config, device="cpu"):
        return Captioner("model", "dog", lambda image: words.append("dog") or f"beside {image.width} trees")

    monkeypatch.setattr("dreambooth_moslora.training.made_before.load_captioner", loaded)
    return words


@pytest.mark.slow
def test_captions_are_made_are_learnt_and_leave_the_photos_alone(tiny_base, tmp_path, asked):
    photos = paint_photos(tmp_path / "photos", count=3)
    (photos / "1.txt").write_text("sks dog, mine")
    before = sorted(path.name for path in photos.iterdir())
    auto = tiny_config(tiny_base, photos, tmp_path / "run", captions="auto", max_train_steps=2)
    train(auto)
    assert len(asked) == 2 and sorted(path.name for path in photos.iterdir()) == before
    kept = json.loads((tmp_path / "run" / "captions.json").read_text())
    assert kept["0.png"]["caption"] == "a photo of sks dog beside 96 trees" and list(kept) == ["0.png", "2.png"]
    first = adapter_sha256(tmp_path / "run")
    for name, caption in ((name, facts["caption"]) for name, facts in kept.items()):
        (photos / name).with_suffix(".txt").write_text(caption)
    train(replace(auto, captions="given", output_dir=str(tmp_path / "written")))
    assert adapter_sha256(tmp_path / "written") == first
    for name in kept:
        (photos / name).with_suffix(".txt").unlink()
    train(replace(auto, captions="given", output_dir=str(tmp_path / "plain")))
    assert adapter_sha256(tmp_path / "plain") != first


def test_a_model_that_is_not_there_ends_the_run_before_the_base_is_loaded(tiny_base, tmp_path):
    photos = paint_photos(tmp_path / "photos", count=1)
    events, config = [], tiny_config(tiny_base, photos, tmp_path / "run", captions="auto")
    with pytest.raises(UserError, match="--caption_model Qwen/Qwen3-VL-2B-Instruct is not here"):
        train(config, events.append)
    assert not [event for event in events if getattr(event, "phase", None) == "loading"]


def test_a_dry_run_says_what_would_be_made_and_advice_what_has_no_effect(tmp_path):
    photos = paint_photos(tmp_path / "photos", count=2)
    (photos / "0.txt").write_text("mine")
    auto = tiny_config("toy", photos, tmp_path / "run", captions="auto")
    share, line = made_lines(auto, photo_report(auto))
    assert line == "captions: 1 photos have none of their own; toy-sdxl makes them before training"
    given = tiny_config("toy", photos, tmp_path / "run", caption_model="x/y")
    assert made_lines(given, photo_report(given)) == [share]
    assert any("--caption_model has no effect" in text for text in remarks(given))


def test_a_published_file_tells_that_captions_were_made_and_nothing_new_otherwise(tmp_path):
    config = tiny_config("toy", tmp_path, tmp_path / "run", captions="auto")
    assert recipe_of(config)["captions"] == "auto"
    assert "captions" not in recipe_of(replace(config, captions="given"))
