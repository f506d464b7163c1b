"""bf16 on a GPU that is too old for it is refused before anything is loaded. CUDA answers as on a T4."""

from types import SimpleNamespace

import pytest
import torch

from dreambooth_moslora.cli.main import main
from dreambooth_moslora.core import UserError, half_precision
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.plan.checks import preflight
from dreambooth_moslora.plan.processes import make_accelerator
from dreambooth_moslora.settings.table import TrainConfig


def pretend(monkeypatch, name: str, major: int, minor: int) -> None:
    """What torch.cuda says of its only GPU; bf16 itself it says by its own rules."""
    facts = SimpleNamespace(name=name, major=major, minor=minor, total_memory=16 * 2**30)
    answers = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_name": lambda device=None: name,
        "get_device_capability": lambda device=None: (major, minor),
        "get_device_properties": lambda device=None: facts,
        "mem_get_info": lambda device=None: (80 * 2**30, 80 * 2**30),
        "_check_bf16_tensor_supported": lambda device: True,  # by emulation
    }
    for function, answer in answers.items():
        monkeypatch.setattr(torch.cuda, function, answer)


@pytest.fixture
def t4(monkeypatch):
    pretend(monkeypatch, "Tesla T4", 7, 5)


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"report_to": "none"} | changes)


@pytest.mark.parametrize("flag", ["mixed_precision", "prior_generation_precision"])
def test_bf16_on_an_older_gpu_is_refused_with_the_way_out(flag, t4):
    says = rf"^--{flag} bf16: Tesla T4 \(compute capability 7.5\) has no bf16.*: give --{flag} fp16\.$"
    with pytest.raises(UserError, match=says):
        preflight(config(**{flag: "bf16"}))


def test_a_training_that_is_called_as_a_function_is_refused_too(t4, tmp_path):
    with pytest.raises(UserError, match="give --mixed_precision fp16"):
        make_accelerator(config(mixed_precision="bf16"), RunDir(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_precision_of_accelerate_launch_counts_where_no_flag_is_given(t4, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match="give --mixed_precision fp16"):
        preflight(config())
    preflight(config(mixed_precision="fp16"))


def test_other_precisions_newer_gpus_and_the_cpu_are_not_refused(t4, monkeypatch):
    for precision in ("fp16", "no", None):
        preflight(config(mixed_precision=precision))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    preflight(config(mixed_precision="bf16"))
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    pretend(monkeypatch, "NVIDIA A100", 8, 0)
    preflight(config(mixed_precision="bf16"))


@pytest.mark.parametrize(("major", "says"), [(7, "no: use --mixed_precision fp16"), (8, "yes")])
def test_doctor_does_not_count_emulation(major, says, monkeypatch, capsys):
    pretend(monkeypatch, "a GPU", major, 0)
    main(["doctor", "--base", "none"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["bf16"]]
    assert line.split(maxsplit=1)[1] == says


@pytest.mark.parametrize(
    ("architecture", "precision"),
    [
        ("gfx1030", "fp16"),
        ("gfx906:sramecc+:xnack-", "fp16"),
        ("gfx90a:sramecc+:xnack-", "bf16"),
        ("gfx942", "bf16"),
        ("gfx1100", "bf16"),
        ("gfx1201", "bf16"),
    ],
)
def test_amd_gpus_get_bf16_by_their_architecture(architecture, precision, monkeypatch):
    """ROCm gives the architecture's number as a compute capability: 10.3 for gfx1030."""
    pretend(monkeypatch, "an AMD GPU", 10, 3)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    facts = SimpleNamespace(gcnArchName=architecture)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: facts)
    assert half_precision() == precision
