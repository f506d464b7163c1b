"""`doctor`: look for problems of this machine before training."""

import argparse
import os
import platform
import shutil
from dataclasses import dataclass, field

from dreambooth_moslora.cli.terminal import print_loading
from dreambooth_moslora.precision import choose_half_precision
from dreambooth_moslora.settings.optimizers import OPTIMIZERS
from dreambooth_moslora.settings.rules import find_package_version

LIBRARIES = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "gradio",
    # needed by some settings only
    "bitsandbytes",
    *(kind.package for kind in OPTIMIZERS.values() if kind.package),
    "tensorboard",
    "wandb",
    "trackio",
    "torchvision",
)
"""Packages whose versions are printed."""


@dataclass
class Findings:
    """Facts and warnings about the machine."""

    facts: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)  # each is a line with a remedy


def doctor_arguments(_: argparse.ArgumentParser) -> None:
    """Add no arguments: `doctor` has none."""


def run_doctor(_: argparse.Namespace) -> int:
    """Look for problems and print the versions and the machine's facts."""
    findings = Findings()
    collect_versions(findings)
    collect_machine_facts(findings)

    # Warnings come first, then facts.
    lines = [f"warning  {line}" for line in findings.warnings] or ["no problems found"]
    lines += [f"  {name:16} {value}" for name, value in findings.facts.items()]
    print("\n".join(lines))
    return 0


def collect_versions(findings: Findings) -> None:
    """Add the versions of Python and of the libraries to the findings."""
    findings.facts["python"] = platform.python_version()
    for name in LIBRARIES:
        findings.facts[name] = find_package_version(name) or "-"


def collect_machine_facts(findings: Findings) -> None:
    """Add processor, disk, GPU and PyTorch's abilities on it to the findings."""
    import psutil

    free = shutil.disk_usage(".").free / 2**30
    memory = psutil.virtual_memory().total / 2**30
    findings.facts["processor"] = f"{os.cpu_count()} cores, {memory:.1f} GiB"
    findings.facts["disk"] = f"{free:.1f} GiB free here"
    print_loading()
    try:
        import torch
    except Exception as error:  # a broken installation may raise any error
        findings.warnings.append(f"torch cannot be imported: {' '.join(str(error).split())[:200]}")
        return
    from dreambooth_moslora.base.devices import explain_unused_gpu, measure_apple_memory

    # Describe the device that trains.
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        gib = facts.total_memory / 2**30
        findings.facts["device"] = (
            f"{facts.name}, {gib:.1f} GiB, {torch.cuda.device_count()} of them"
        )
    elif torch.backends.mps.is_available():
        findings.facts["device"] = (
            f"Apple GPU (mps), {measure_apple_memory()[0]:.1f} GiB for a process"
        )
    else:
        findings.facts["device"] = "CPU"
        findings.warnings += filter(None, [explain_unused_gpu()])
        findings.warnings.append("no GPU: the embedded base trains in minutes, SDXL in hours")
        return
    has_bf16 = choose_half_precision() == "bf16"
    findings.facts["bf16"] = "yes" if has_bf16 else "no: use --mixed_precision fp16"
