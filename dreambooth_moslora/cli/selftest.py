"""`python -m dreambooth_moslora selftest`: tests this machine in a few minutes."""

import argparse
import time
from pathlib import Path

from dreambooth_moslora.core import UserError, atomic_write

HELP = "train, resume and draw on this machine's device, and compare the results with its CPU"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cuda", "cpu"), help="device to test (default: the GPU, if there is one)")
    parser.add_argument("--output_dir", default="selftest", metavar="DIR", help="folder of the runs and of the report")


def run(args: argparse.Namespace) -> int:
    """Exit code 2 when a test fails. Writes selftest.json, and selftest.md for a bug report."""
    from dreambooth_moslora.cli.doctor import Findings, examine_machine, examine_versions
    from dreambooth_moslora.training.selftest import ON_CPU, SelfTest, as_json, as_page

    device = chosen_device(args.device)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    machine = Findings()
    examine_versions(machine)
    examine_machine(machine)
    facts = machine.facts | {"tried": device}
    env = ON_CPU if device == "cpu" else {}
    test = SelfTest(folder, precisions_of(device), env=env, free_gib=free_gib_of(device))
    found, start = [], time.monotonic()
    for finding in test.findings():
        print(f"{'ok  ' if finding.holds else 'FAIL'}  {finding.name:14} {finding.said}", flush=True)
        found.append(finding)
    facts["seconds"] = f"{time.monotonic() - start:.0f}"
    atomic_write(folder / "selftest.json", as_json(facts, found))
    atomic_write(folder / "selftest.md", as_page(facts, found))
    print(f"{facts['seconds']} s; paste {folder / 'selftest.md'} into a bug report")
    return 0 if all(finding.holds for finding in found) else 2


def chosen_device(asked: str | None) -> str:
    """The device to test. Raises UserError for a GPU that is not there."""
    import torch

    has_gpu = torch.cuda.is_available()
    if asked == "cuda" and not has_gpu:
        raise UserError("--device cuda: this torch sees no GPU; `doctor` says why.")
    return asked or ("cuda" if has_gpu else "cpu")


def free_gib_of(device: str) -> float:
    import psutil

    from dreambooth_moslora.plan.memory import GIB, free_gib_of_gpu

    free = free_gib_of_gpu() if device == "cuda" else None
    return psutil.virtual_memory().available / GIB if free is None else free


def precisions_of(device: str) -> tuple[str, ...]:
    """fp32, and the half precision that the device has."""
    import torch

    if device == "cpu":
        return "no", "bf16"
    return "no", "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
