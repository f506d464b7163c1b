"""Trainings on a GPU written in Python (`tests.helpers.python_gpu`): what can be known of a GPU without one."""

import json
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
from torch.utils import backend_registration

from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.plan.memory import size_of_base
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny_training import paint_photos, tiny_config

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.usefixtures("few_steps"),  # on the device as well: both draw the same class images
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this PyTorch has no devices written in Python",
    ),
]
TRAININGS = {
    "plain": {"target_modules": ["to_q", "to_k", "to_v", "to_out.0"]},
    "bf16": {"target_modules": ["to_q", "to_k", "to_v", "to_out.0"], "mixed_precision": "bf16"},
    "prior of the base": {"with_prior_preservation": True, "prior": "adapter_off"},
    "class images": {"with_prior_preservation": True},
    "convolutions": {"target_modules": ["to_q", "conv1", "ff.net.0.proj"]},
    "text encoders, recomputed": {"train_text_encoder": True, "gradient_checkpointing": True},
    "new tokens, bf16": {"train_text_encoder_ti": True, "mixed_precision": "bf16"},
    "DoRA": {"use_dora": True},
    "uncached": {"caching": "off", "dataloader_num_workers": 2},
    "EDM": {"do_edm_style_training": True},
    "min-SNR, accumulated": {"snr_gamma": 5.0, "gradient_accumulation_steps": 2},
    "Prodigy": {"optimizer": "Prodigy", "learning_rate": 1.0},
    "samples": {"num_validation_images": 1, "validation_steps": 2},
    "text cached, samples": {"cache_cross_attention": True, "num_validation_images": 1, "validation_steps": 2},
}

COUNTED = ("plain", "prior of the base", "class images", "min-SNR, accumulated")
"""Each wait leaves the GPU idle until the program has handed it the next kernels: the loss alone is read. And each
micro-batch is sent at once."""


INDEXED = """
import os, torch
from tests.helpers.python_gpu import DEVICE

table, rows = torch.arange(4.0), torch.tensor([1, 3])
assert table.to(DEVICE)[rows].tolist() == table.to(DEVICE)[rows.to(DEVICE)].tolist() == [1.0, 3.0]
try:
    table[rows.to(DEVICE)]
except RuntimeError as error:
    print(error, flush=True)
os._exit(0)
"""


def slow_but_the_first(name: str):
    return name if name == "plain" else pytest.param(name, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """A process with such a GPU: starting one costs more than a training."""
    log = tmp_path_factory.mktemp("device") / "stderr.txt"
    command = [sys.executable, "-m", "tests.helpers.on_python_gpu"]
    with (
        log.open("w") as errors,
        subprocess.Popen(command, cwd=ROOT, stdin=PIPE, stdout=PIPE, stderr=errors, text=True) as process,
    ):
        yield process, log


@pytest.fixture
def run_on_device(device, tiny_base, tmp_path):
    """A function that trains two steps there: the losses of the steps, and what the last micro-batch did."""
    process, log = device

    def run(**changes) -> dict:
        words = {"base": str(tiny_base), "photos": str(paint_photos(tmp_path / "photos"))}
        words |= {"output": str(tmp_path / "gpu"), "changes": {"max_train_steps": 2} | changes}
        process.stdin.write(json.dumps(words) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, f"the process ended: {log.read_text()[-3000:]}"
        found = json.loads(answer)
        assert "error" not in found, found["error"]
        return found

    return run


@pytest.mark.parametrize("training", [slow_but_the_first(name) for name in TRAININGS])
def test_a_training_mixes_no_devices_has_the_losses_of_the_cpu_and_waits_once_a_step(
    run_on_device, tiny_base, tmp_path, training
):
    """The losses of two steps; bf16 rounds in another order there."""
    settings = TRAININGS[training]
    found = run_on_device(**settings)
    train(tiny_config(tiny_base, tmp_path / "photos", tmp_path / "cpu", max_train_steps=2, **settings))
    expected = [event["loss"] for event in RunDir(tmp_path / "cpu").read_metrics() if event["type"] == "step"]
    assert found["losses"] == pytest.approx(expected, rel=1e-2 if "mixed_precision" in settings else 1e-5)
    if training in COUNTED:
        assert sum(found["waits"].values()) == 1, found["waits"]
        assert sum(found["copies"].values()) == settings.get("gradient_accumulation_steps", 1), found["copies"]


@pytest.mark.slow
def test_cached_text_needs_no_projection_on_the_device_and_one_more_copy_a_row(run_on_device, tiny_base):
    """With the frozen base as the prior a photo has two rows."""
    targets = {"target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
    live = run_on_device(**targets, **TRAININGS["prior of the base"])
    cached = run_on_device(**targets, **TRAININGS["prior of the base"], cache_cross_attention=True)
    assert cached["losses"] == pytest.approx(live["losses"], rel=1e-5)
    assert live["frozen"] - cached["frozen"] == size_of_base(tiny_base, ()).text_projections > 0
    assert sum(cached["waits"].values()) == 1, cached["waits"]
    assert sum(cached["copies"].values()) == 1 + 3, cached["copies"]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"target_modules": ["to_q", "conv1"]}, {"allow_tf32": True}])
def test_an_adapter_is_published_from_a_gpu_that_multiplies_in_tf32(run_on_device, changes):
    run_on_device(has_tf32=True, **changes)


def test_a_table_of_the_cpu_takes_no_indices_from_the_device_as_with_cuda():
    said = subprocess.check_output([sys.executable, "-c", INDEXED], text=True, cwd=ROOT)
    assert said.strip() == "aten::index: indices on pygpu into a tensor of the CPU: (4,)"
