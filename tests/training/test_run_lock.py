"""Two runs in one folder: the second is refused, and what a killed run left holds nobody up."""

import os
import socket
import subprocess
import sys

import pytest

from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.queue import LOCK_NAME, locked
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny_training import paint_photos, tiny_config

HOLD = """
import sys
from pathlib import Path
from dreambooth_moslora.disk.queue import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    pytest.importorskip("fcntl")
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_in_a_folder_is_refused_and_touches_nothing(holder, tiny_base, tmp_path, tmp_path_factory):
    photos = paint_photos(tmp_path_factory.mktemp("photos"))
    config = tiny_config(tiny_base, photos, tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match=f"process {holder.pid} on {socket.gethostname()} is training there"):
        train(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_lock_of_a_killed_process_holds_nobody_up(holder, tmp_path):
    holder.kill()
    holder.wait()
    assert str(holder.pid) in (tmp_path / LOCK_NAME).read_text()
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK_NAME).read_text()
    assert not (tmp_path / LOCK_NAME).exists()


def test_a_folder_is_free_again_after_its_run(tmp_path):
    for _ in range(2):
        with locked(tmp_path), pytest.raises(UserError, match="is training there"), locked(tmp_path):
            pass
