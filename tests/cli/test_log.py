"""The log of a run."""

import logging
import os

import pytest

from dreambooth_moslora.cli.main import log_file, run_trainer
from dreambooth_moslora.cli.terminal import INTERRUPTED
from dreambooth_moslora.disk.run_folder import RunDir
from tests.helpers.tiny_training import paint_photos, tiny_config


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
