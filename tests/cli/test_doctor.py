"""What `doctor` says of versions and of the machine."""

import os
from types import SimpleNamespace

import psutil
import pytest
import torch

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.devices import TORCH_COMMAND, has_gpu
from dreambooth_moslora.cli.command_doctor import Findings, collect_machine_facts
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.plan import validation
from dreambooth_moslora.settings import rules
from dreambooth_moslora.settings.train_config import TrainConfig


def test_doctor_reads_versions_and_the_machine(capsys, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=3 * 2**30))
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert not output.startswith(" "), "what to do stands before the versions"
    facts = {line.split()[0]: line for line in output.splitlines() if line}
    assert {"python", "torch", "peft", "device"} <= facts.keys()
    assert facts["processor"].endswith(" cores, 3.0 GiB")


@pytest.mark.skipif(os.name != "posix" or has_gpu(), reason="a script in the place of a driver's")
def test_doctor_prints_command_for_card_that_pytorch_is_not_built_for(
    tmp_path, monkeypatch, capsys
):
    (script := tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA GeForce RTX 3060'\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", None)  # as in a build for the CPU
    assert main(["doctor"]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("warning  there is an Nvidia GPU, and PyTorch ")
    assert line.endswith(f"is not built for it: pip install uv, then {TORCH_COMMAND}")


@pytest.mark.parametrize(("macos", "says"), [(14, "yes"), (13, "no: use --mixed_precision fp16")])
def test_doctor_reports_apple_gpu_and_its_bf16(apple, macos, says, monkeypatch):
    monkeypatch.setattr(
        torch.backends.mps, "is_macos_or_newer", lambda major, minor: major <= macos
    )
    collect_machine_facts(findings := Findings())
    assert (
        findings.facts["device"] == "Apple GPU (mps), 21.3 GiB for a process"
        and findings.facts["bf16"] == says
    )
    assert not [line for line in findings.warnings if "GPU" in line]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"optimizer": "Prodigy", "use_8bit_adam": True},
            "--optimizer Prodigy needs prodigyopt: pip install prodig",
        ),
        ({"use_8bit_adam": True}, "--use_8bit_adam needs bitsandbytes"),
        ({"base_quantization": "nf4"}, "--base_quantization nf4 needs bitsandbytes"),
        ({"report_to": "wandb"}, "--report_to wandb needs wandb"),
    ],
)
def test_missing_package_of_a_flag_is_reported_first(settings, says, monkeypatch):
    base = Base.find("toy")
    validation.validate_run(TrainConfig(report_to="none"), base)
    monkeypatch.setattr(rules, "find_package_version", lambda name: None)
    with pytest.raises(UserError, match=says):
        validation.validate_run(TrainConfig(**{"report_to": "none"} | settings), base)
