"""How a run begins, and what is said when it cannot."""

import pytest
import torch
from accelerate import Accelerator

from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.plan import processes as accelerator_module
from dreambooth_moslora.plan.processes import make_accelerator, refusal
from dreambooth_moslora.settings.table import TrainConfig

REFUSED = {
    ("ACCELERATE_MIXED_PRECISION", "fp7"): (
        None,
        "asks for the precision fp7: give --mixed_precision no, fp16 or bf16",
    ),
    ("ACCELERATE_DYNAMO_BACKEND", "two"): ("bf16", "^accelerate says: 'TWO' is not a valid DynamoBackend; look"),
}


@pytest.mark.parametrize("setting", REFUSED)
def test_a_setting_of_accelerates_own_is_blamed_on_no_flag(setting, tmp_path, monkeypatch):
    precision, says = REFUSED[setting]
    monkeypatch.setenv(*setting)
    with pytest.raises(UserError, match=says):
        make_accelerator(TrainConfig(report_to="none", mixed_precision=precision), RunDir(tmp_path / "run"))


@pytest.mark.parametrize("number", ["4", "two"])
def test_accelerates_own_accumulation_divides_no_gradient_again(number, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", number)
    accelerator = make_accelerator(TrainConfig(report_to="none"), RunDir(tmp_path / "run"))
    weight = torch.ones(1, requires_grad=True)
    accelerator.backward(weight.sum())
    assert weight.grad.item() == 1


def test_the_flag_is_named_where_it_is_to_blame():
    """No machine has all the reasons; these are accelerate's words on a GPU that is too old."""
    said = "bf16 mixed precision requires PyTorch >= 1.10 and a supported device."
    assert refusal("bf16", said) == f"--mixed_precision bf16: {said}"


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_sharding_is_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match="adapters need no sharding; use accelerate launch --multi_gpu"):
        make_accelerator(TrainConfig(report_to="none"), RunDir(tmp_path / "run"))


def test_processes_that_accelerate_does_not_join_are_refused(tmp_path, monkeypatch):
    """Each of them would be the main process and write the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"2 processes were started .* accelerate joins 1"):
        make_accelerator(TrainConfig(report_to="none"), RunDir(tmp_path / "run"))


@pytest.mark.parametrize(("device", "kept"), [("cpu", 1), ("cuda", 0)])
def test_freed_memory_is_kept_on_a_cpu_only(device, kept, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(accelerator_module, "keep_freed_memory", lambda: asked.append(1))
    monkeypatch.setattr(Accelerator, "device", torch.device(device))
    make_accelerator(TrainConfig(report_to="none"), RunDir(tmp_path / "run"))
    assert len(asked) == kept
