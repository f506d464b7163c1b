"""Sample images before the first step: their progress, and none by default where each takes minutes."""

import io

import pytest
import torch

from dreambooth_moslora.cli.terminal import TerminalProgress
from dreambooth_moslora.disk.events import PhaseProgress, SamplesDrawn
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.prepare import too_slow_for_samples
from tests.helpers.tiny import tiny_sdxl
from tests.helpers.tiny_training import paint_photos, tiny_config


@pytest.fixture(scope="module")
def large_base(tmp_path_factory):
    """The tiny base, said to draw 512 px."""
    folder = tmp_path_factory.mktemp("large")
    pipeline = tiny_sdxl(folder)
    pipeline.unet.register_to_config(sample_size=64)
    pipeline.save_pretrained(folder / "model")
    return folder / "model"


def test_on_a_cpu_with_a_large_base_there_are_no_samples_unless_they_are_asked_for(large_base, tmp_path, caplog):
    config = tiny_config(large_base, paint_photos(tmp_path / "photos"), tmp_path / "run", max_train_steps=1)
    events = []
    train(type(config).from_dict(config.to_dict() | {"num_validation_images": None}), events.append)
    assert not [event for event in events if isinstance(event, SamplesDrawn)]
    said = [line for line in caplog.messages if "No sample images are drawn" in line]
    assert len(said) == 1 and "--num_validation_images 4" in said[0]


@pytest.mark.parametrize(
    ("asked", "device", "px", "is_slow"),
    [
        ({}, "cpu", 64, True),
        ({}, "cuda", 64, False),
        ({}, "cpu", 16, False),
        ({"num_validation_images": 4}, "cpu", 64, False),
        ({"validation_prompt": "a dog"}, "cpu", 64, False),
        ({"validation_steps": 9}, "cpu", 64, False),
    ],
)
def test_only_the_default_is_left_out(asked, device, px, is_slow, subject, tmp_path):
    subject.pipeline.unet.register_to_config(sample_size=px)
    config = tiny_config(tmp_path, tmp_path, tmp_path, **{"num_validation_images": None} | asked)
    assert config.sample_count == 4
    assert too_slow_for_samples(config, subject.pipeline, torch.device(device)) == is_slow


@pytest.mark.slow
def test_the_first_samples_show_their_steps_and_the_time_left(tiny_base, tmp_path):
    screen, events = io.StringIO(), []
    progress = TerminalProgress(screen)

    def hear(event):
        events.append(event)
        progress(event)

    photos = paint_photos(tmp_path / "photos")
    train(tiny_config(tiny_base, photos, tmp_path / "run", num_validation_images=2, max_train_steps=1), hear)
    first = next(i for i, event in enumerate(events) if isinstance(event, SamplesDrawn))
    counts = [e for e in events[:first] if isinstance(e, PhaseProgress) and e.phase == "sampling" and e.total > 1]
    assert counts[0].done == 0 and counts[-1].done == counts[-1].total == 50
    assert not [e for e in events[first:] if isinstance(e, PhaseProgress) and e.phase == "sampling" and e.total > 1]
    assert "drawing samples: 100%" in screen.getvalue() and "50/50" in screen.getvalue() and "<00:" in screen.getvalue()
