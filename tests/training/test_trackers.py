"""What goes to tensorboard and its like, and that their trouble is said early, or costs the run nothing."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate.tracking import TensorBoardTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dreambooth_moslora.core import UserError
from dreambooth_moslora.settings.table import FIELD_TYPES, SETTINGS, TrainConfig
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.reporter import Reporter
from tests.helpers.tiny_training import paint_photos, tiny_config

pytestmark = pytest.mark.usefixtures("few_steps")


@pytest.fixture
def config(tiny_base, tmp_path):
    photos = paint_photos(tmp_path / "photos")
    drawn = {"report_to": "tensorboard", "max_train_steps": 3}
    return lambda **changes: tiny_config(tiny_base, photos, tmp_path / "run", **drawn, **changes)


def test_trackers_get_numbers_switches_and_choices_and_no_text_of_the_users():
    def told_of(**settings) -> dict:
        got = {}
        accelerator = SimpleNamespace(init_trackers=lambda _, config: got.update(config))
        Reporter(None, accelerator, None).start_trackers(TrainConfig(**settings))
        return got

    told = told_of(optimizer="Prodigy", learning_rate=1.0, random_flip=True)
    assert (told["optimizer"], told["learning_rate"], told["random_flip"]) == ("Prodigy", 1.0, True)
    for name in [name for name, (kind, _) in FIELD_TYPES.items() if kind is str]:
        if not SETTINGS[name].metadata["choices"]:
            assert "alice" not in told_of(**{name: "alice"}).values(), name


def test_a_tracker_that_cannot_start_is_a_mistake_before_anything_is_loaded(config, tmp_path, caplog):
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "run" / "logs" / "dreambooth_moslora").write_text("no folder")
    events = []
    with pytest.raises(UserError, match=r"--report_to tensorboard cannot start: FileExistsError .*; none trains"):
        train(config(), events.append)
    assert [event.kind for event in events] == ["start", "end"] and not caplog.text


def test_a_tracker_that_fails_on_the_way_is_said_once_and_the_run_goes_on(config, monkeypatch, caplog):
    asked, log = [], TensorBoardTracker.log

    def fail_later(self, values, step, **options):
        asked.append(step)
        if step > 1:
            raise ConnectionError("no\nnetwork")
        log(self, values, step, **options)

    monkeypatch.setattr(TensorBoardTracker, "log", fail_later)
    assert train(config()).proof is not None
    assert asked == [1, 2]
    assert caplog.text.count("tensorboard failed and is not used again in this run: ConnectionError no network") == 1


@pytest.mark.slow
def test_the_samples_go_to_tensorboard_as_they_are_and_without_their_prompts(config, tmp_path):
    train(config(num_validation_images=2, validation_steps=2))
    logs = EventAccumulator(str(tmp_path / "run" / "logs" / "dreambooth_moslora")).Reload()
    shown = logs.Images("samples")
    assert [picture.step for picture in shown] == [0, 2, 3] and logs.Tags()["images"] == ["samples"]
    sheet = np.asarray(Image.open(io.BytesIO(shown[1].encoded_image_string)))
    saved = [np.asarray(Image.open(tmp_path / "run" / "samples" / f"step_000002_{n}.png")) for n in (0, 1)]
    assert np.array_equal(sheet, np.concatenate(saved, axis=1))
    assert [scalar.step for scalar in logs.Scalars("loss")] == [1, 2, 3]
