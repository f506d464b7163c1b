"""`doctor`: is this machine ready to train?"""

import argparse
import os
import platform
import shutil
import sys
import tomllib
from dataclasses import dataclass, field
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from dreambooth_moslora.cli.terminal import say_loading
from dreambooth_moslora.disk.paths import clone_folder
from dreambooth_moslora.precision import half_precision
from dreambooth_moslora.settings.optimizer_kinds import OPTIMIZERS
from dreambooth_moslora.settings.rules import version_of

MIN_PYTHON = (3, 11)
# What SDXL with a few checkpoints takes
NEEDED_DISK_GIB = 10
OPTIONAL = (
    "bitsandbytes",
    *(kind.package for kind in OPTIMIZERS.values() if kind.package),
    "tensorboard",
    "wandb",
    "trackio",
    "torchvision",
)
"""Libraries that only some settings need."""


@dataclass
class Findings:
    """What the doctor found."""

    facts: dict[str, str] = field(default_factory=dict)
    # training will fail; each is a line with a remedy
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # likewise


def doctor_arguments(_: argparse.ArgumentParser) -> None:
    """It takes none."""


def run_doctor(_: argparse.Namespace) -> int:
    """Look for problems and print what was found. Exit code 2 when something will fail."""
    found = Findings()
    examine_versions(found)
    examine_machine(found)
    print(as_text(found))
    return 2 if found.problems else 0


def as_text(found: Findings) -> str:
    """The findings as lines: problems and warnings, then facts."""
    lines = [f"PROBLEM  {line}" for line in found.problems]
    lines += [f"warning  {line}" for line in found.warnings]
    lines = lines or ["no problems found"]
    lines += [f"  {name:16} {value}" for name, value in found.facts.items()]
    return "\n".join(lines).rstrip()


def examine_versions(found: Findings) -> None:
    """Python and the libraries."""
    versions = {name: version_of(name) for name in (*needed_ranges(), *OPTIONAL)}
    found.facts["python"] = platform.python_version()
    found.facts |= {name: version or "-" for name, version in versions.items()}
    if sys.version_info[:2] < MIN_PYTHON:
        found.problems.append(
            f"Python {platform.python_version()} is too old: 3.11 or newer is needed"
        )

    # An untested version may work; a missing library does not.
    for name, ranges in needed_ranges().items():
        wanted = name + ",".join(sorted(map(str, ranges), reverse=True))
        if versions[name] is None:
            found.problems.append(f'{name} is missing; pip install "{wanted}"')
        # A release candidate counts as its release.
        elif not ranges.contains(Version(versions[name]).base_version):
            untried = f"{name} {versions[name]} was not tried with this program"
            found.warnings.append(f"{untried}; it was run with {wanted}")


def needed_ranges() -> dict[str, SpecifierSet]:
    """{library: tested versions} that every run needs, from pyproject.toml or the installed
    package's metadata."""
    clone = clone_folder()
    file = None if clone is None else clone / "pyproject.toml"
    if file is not None and file.is_file():
        lines = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        lines = metadata.requires("dreambooth_moslora") or []

    # Those with a marker belong to an extra, or to another system.
    ranges = {}
    for line in lines:
        item = Requirement(line)
        if item.marker is None and item.name not in OPTIONAL:
            ranges[item.name] = item.specifier
    return ranges


def examine_machine(found: Findings) -> None:
    """Processor, disk, GPU and what PyTorch can do on it."""
    import psutil

    free = shutil.disk_usage(".").free / 2**30
    memory = psutil.virtual_memory().total / 2**30
    found.facts["processor"] = f"{os.cpu_count()} cores, {memory:.1f} GiB"
    found.facts["disk"] = f"{free:.1f} GiB free here"
    if free < NEEDED_DISK_GIB:
        found.warnings.append(
            f"only {free:.1f} GiB of disk are free; SDXL with checkpoints wants {NEEDED_DISK_GIB}"
        )
    say_loading()
    try:
        import torch
    except Exception as error:  # a broken installation may raise any error
        found.problems.append(f"torch cannot be imported: {' '.join(str(error).split())[:200]}")
        return
    from dreambooth_moslora.base.machine import (
        apple_gib,
        has_fast_bf16,
        unused_gpu,
    )

    # The device that trains
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        gib = facts.total_memory / 2**30
        count = torch.cuda.device_count()
        found.facts["device"] = f"{facts.name}, {gib:.1f} GiB, {count} of them"
    elif torch.backends.mps.is_available():
        found.facts["device"] = f"Apple GPU (mps), {apple_gib()[0]:.1f} GiB for a process"
    else:
        found.facts["device"] = "CPU"
        line = unused_gpu()
        if line:
            found.warnings.append(line)
        found.warnings.append("no GPU: the embedded base trains in minutes, SDXL in hours")

    # Its half precision; a CPU that emulates it is slower than in fp32.
    if found.facts["device"] == "CPU":
        has_bf16 = has_fast_bf16()
        other = "no"
    else:
        has_bf16 = half_precision() == "bf16"
        other = "fp16"
    found.facts["bf16"] = "yes" if has_bf16 else f"no: use --mixed_precision {other}"
