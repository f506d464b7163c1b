"""What a person sees in the terminal while a training runs: phases, a bar with the time that remains, losses."""

import io

import pytest

from dreambooth_moslora.cli.terminal import TerminalProgress
from dreambooth_moslora.disk.events import RunStarted, StepDone
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny_training import paint_photos, tiny_config


@pytest.mark.slow
def test_a_run_shows_its_phases_the_time_left_and_both_losses(tiny_base, tmp_path):
    config = tiny_config(
        tiny_base,
        paint_photos(tmp_path / "photos"),
        tmp_path / "run",
        with_prior_preservation=True,
        num_validation_images=1,
        checkpointing_steps=2,
    )
    stream = io.StringIO()
    train(config, TerminalProgress(stream))
    seen = stream.getvalue()
    for words in ("loading the base", "class images", "encoding photos", "drawing samples", "saving and verifying"):
        assert words in seen, words
    assert "step 2: checkpoint" in seen and "step 0: 1 sample images" in seen
    last = [line for line in seen.replace("\r", "\n").splitlines() if line.startswith("training")][-1]
    assert "5/5 [" in last and "<00:00" in last  # done, elapsed and left
    assert all(word in last for word in ("loss=", "lr=", "instance=", "prior="))


def test_a_resumed_run_counts_from_its_step():
    stream = io.StringIO()
    progress = TerminalProgress(stream)
    progress(RunStarted(100))
    progress(StepDone(41, loss=1.0, lr=1e-4))
    progress.close()
    assert "41/100" in stream.getvalue() and "0/100" not in stream.getvalue().replace("40/100", "")
