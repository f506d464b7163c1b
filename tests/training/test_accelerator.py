"""How a run begins, and what is said when it cannot."""

import pytest
import torch

from dreambooth_moslora.core.config import TrainConfig
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.run_folder import RunDir
from dreambooth_moslora.training.accelerator import make_accelerator, refusal

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
