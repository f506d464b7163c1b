"""Two processes against one process that accumulates two micro-batches.

They are started by torchrun: `accelerate launch --cpu --num_processes 2` starts two only through an MPI host file.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dreambooth_moslora.rundir import RunDir
from dreambooth_moslora.trainer import train
from tests.tiny_training import paint_photos, tiny_config


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in RunDir(folder).read_metrics() if event["type"] == "step"]


def test_two_processes_train_one_adapter_and_are_one_process_with_accumulation_two(tiny_base, tmp_path):
    photos = paint_photos(tmp_path / "photos")
    changes = {"max_train_steps": 4, "with_prior_preservation": True, "prior": "adapter_off"}
    both = tiny_config(tiny_base, photos, tmp_path / "both", **changes)
    (tmp_path / "config.json").write_text(json.dumps(both.to_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = Path(__file__).with_name("two_processes.py")
    done = subprocess.run(
        [*command, str(script), str(tmp_path / "config.json")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [json.loads((tmp_path / "both" / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1] and ranks[0]["processes"] == 2
    train(tiny_config(tiny_base, photos, tmp_path / "one", gradient_accumulation_steps=2, **changes))
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
