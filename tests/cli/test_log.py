"""The log of a run."""

import logging
import os

import pytest

from dreambooth_moslora.cli.main import log_file
from dreambooth_moslora.core.run_folder import RunDir


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is full")
def test_a_log_on_a_full_disk_is_said_once_and_without_a_traceback(tmp_path, capsys):
    (tmp_path / "train.log").symlink_to("/dev/full")
    logger = logging.Logger("a run")
    logger.addHandler(log_file(RunDir(tmp_path)))
    logger.warning("one")
    logger.warning("two")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("note: ") and "No space left on device" in said
