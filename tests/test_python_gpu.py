"""Trainings on a GPU written in Python (`tests.python_gpu`): what can be known of a GPU without one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

from tests.tiny_training import paint_photos

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch has no devices written in Python",
)


def run_on_device(base: Path, folder: Path, **changes) -> dict:
    """Train two steps there; the losses of the steps, and what the last micro-batch did on the device."""
    settings = json.dumps({"max_train_steps": 2} | changes)
    photos = paint_photos(folder / "photos")
    command = [sys.executable, "-m", "tests.on_python_gpu", str(base), str(photos), str(folder / "gpu"), settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("changes", [{"target_modules": ["to_q", "conv1"]}, {"allow_tf32": True}])
def test_an_adapter_is_published_from_a_gpu_that_multiplies_in_tf32(tiny_base, tmp_path, changes):
    run_on_device(tiny_base, tmp_path, has_tf32=True, **changes)
