"""What a person sees in the terminal while a training runs, and the log of a run."""

import io
import logging
import os

import pytest

from dreambooth_moslora.cli.main import log_file, run_trainer
from dreambooth_moslora.cli.terminal import INTERRUPTED, TerminalProgress
from dreambooth_moslora.disk.events import RunStarted, StepDone
from dreambooth_moslora.disk.run_folder import RunDir
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


def test_a_run_of_few_exposures_says_so_before_it_begins(tiny_base, tmp_path, caplog):
    config = tiny_config(tiny_base, paint_photos(tmp_path / "photos"), tmp_path / "run", max_train_steps=2)
    assert run_trainer(config, stop=lambda: True) == INTERRUPTED
    (line,) = [line for line in caplog.messages if "--exposures_per_photo" in line]
    assert line.startswith("note: each photo is seen about ")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is full")
def test_a_log_on_a_full_disk_is_said_once_and_without_a_traceback(tmp_path, capsys):
    (tmp_path / "train.log").symlink_to("/dev/full")
    logger = logging.Logger("a run")
    logger.addHandler(log_file(RunDir(tmp_path)))
    logger.warning("one")
    logger.warning("two")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("note: ") and "No space left on device" in said


def test_a_run_warns_of_a_disk_that_cannot_hold_it(tiny_base, tmp_path, caplog):
    endless = {"max_train_steps": 10**9, "checkpointing_steps": 1}
    config = tiny_config(tiny_base, paint_photos(tmp_path / "photos"), tmp_path / "run", **endless)
    assert run_trainer(config, stop=lambda: True) == INTERRUPTED
    assert [line for line in caplog.messages if line.startswith("note: the disk has too little room")]
