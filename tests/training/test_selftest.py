"""The self-test finds what it is told to find: on the CPU, on a GPU written in Python, and where a run fails."""

import math
import sys

import pytest
from torch.utils import backend_registration

from benchmarks.precision import bf16_accelerator
from dreambooth_moslora.core import UserError
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.selftest import (
    ON_CPU,
    PROGRAM,
    Finding,
    SelfTest,
    as_page,
    largest_difference,
    random_materials,
)
from dreambooth_moslora.training.step import TrainStep

HAS_PYTHON_DEVICES = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


def test_losses_are_compared_step_by_step():
    far = [([1.0, 2.0], 0.0), ([1.0, 2.2], 0.1), ([1.0], math.inf), ([1.0, math.nan], math.inf)]
    for found, difference in far:
        assert largest_difference(found, [1.0, 2.0]) == pytest.approx(difference)


def test_a_command_that_fails_is_told_by_its_last_line(tmp_path):
    program = (sys.executable, "-c", "import sys; print('loading'); sys.exit('error: the GPU has gone')")
    with pytest.raises(UserError, match="first: exit code 1: error: the GPU has gone"):
        SelfTest(tmp_path, program=program).call("first", [*program, "train"])


@pytest.mark.parametrize("weights", [b"weights", b"others"])
def test_the_tensors_are_compared_without_the_header(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(SelfTest, "train", lambda self, name, **changes: self.run(name))
    for name, header, tensors in (("device_no", b"{}", b"weights"), ("resumed", b'{"a":1}', weights)):
        (tmp_path / name).mkdir()
        content = len(header).to_bytes(8, "little") + header + tensors
        (tmp_path / name / "pytorch_lora_weights.safetensors").write_bytes(content)
    assert SelfTest(tmp_path).resumed().holds == (weights == b"weights")


def test_the_page_shows_what_does_not_hold():
    page = as_page({"torch": "2.13"}, [Finding("resumed", False, "other bytes than an unbroken run")])
    assert "| resumed | **no** | other bytes than an unbroken run |" in page and "- torch: 2.13" in page


def test_a_step_of_full_size_is_left_out_where_memory_is_short(tmp_path):
    found = SelfTest(tmp_path, env=ON_CPU).step(4.0)
    assert found.holds and found.said.startswith("left out: 4.0 GiB are free; --memory at 512 px needs full ")
    assert found.figures["full"] > found.figures["recompute"] > found.figures["nf4"] > 0


def test_random_materials_have_all_that_a_step_reads():
    """They replace `TrainInputs`, which gets new fields now and then."""
    config = TrainConfig.from_dict({"resolution": 64, "rank": 2, "mixed_precision": "bf16"})
    step = TrainStep(config, random_materials("small", 64), bf16_accelerator(), max_train_steps=1)
    assert 0 < step.accumulate_gradients().total < 10
    assert step.update_adapter() > 0


@pytest.mark.slow
def test_a_step_is_measured_beside_the_floor_in_a_process_of_its_own(tmp_path):
    found = SelfTest(tmp_path, env=ON_CPU).step(99.0, size="small")
    assert found.holds and "(full); --memory at 512 px needs" in found.said, found
    assert found.figures["floor_sec"] > 0 and found.figures["step_sec"] > 0 and 0 < found.figures["peak_gib"] < 8


@pytest.mark.slow
def test_everything_holds_on_a_gpu_written_in_python_or_on_this_cpu(tmp_path):
    """Beside one training on the CPU. The picture is drawn on the CPU in both cases."""
    program = (sys.executable, "-m", "tests.helpers.python_gpu_program") if HAS_PYTHON_DEVICES else PROGRAM
    found = {finding.name: finding for finding in SelfTest(tmp_path, program=program).findings()}
    assert list(found) == ["losses, fp32", "published", "resumed", "generated"]
    assert all(finding.holds for finding in found.values()), found
    assert found["losses, fp32"].figures["relative_difference"] < 1e-4
