"""The end of a run: whatever happened to the photos or the hub meanwhile, the adapter and its pictures are there."""

import shutil

import pytest

from dreambooth_moslora.core import UserError
from dreambooth_moslora.training import publish
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny_training import paint_photos, tiny_config

pytestmark = pytest.mark.usefixtures("few_steps")


@pytest.mark.slow
def test_photos_that_were_moved_in_training_cost_their_place_on_the_sheet_only(tiny_base, tmp_path, caplog):
    photos, events = paint_photos(tmp_path / "photos"), []

    def note(event):
        events.append(event)
        if event.kind == "step":
            shutil.rmtree(photos, ignore_errors=True)

    train(tiny_config(tiny_base, photos, tmp_path / "run", max_train_steps=1, num_validation_images=1), note)
    assert events[-1].state == "done" and (tmp_path / "run" / "contact_sheet.png").is_file()
    assert caplog.text.count("the contact sheet is without a photo") == 3


def test_a_push_that_fails_costs_no_picture_and_comes_before_them(tiny_base, tmp_path, monkeypatch):
    there = []

    def push(folder, *_):
        there.extend(path.name for path in folder.iterdir())
        raise UserError("no hub")

    monkeypatch.setattr(publish, "push", push)
    photos = paint_photos(tmp_path / "photos")
    with pytest.raises(UserError, match="no hub"):
        train(tiny_config(tiny_base, photos, tmp_path / "run", max_train_steps=1, push_to_hub=True))
    assert {"README.md", "pytorch_lora_weights.safetensors"} <= set(there) and "loss.png" not in there
    assert (tmp_path / "run" / "loss.png").is_file()
