"""`selftest`: does this machine train, resume and draw as it should?"""

import argparse
import time

from dreambooth_moslora.cli.command_doctor import Findings, collect_machine_facts, collect_versions
from dreambooth_moslora.disk.atomic import write_atomic
from dreambooth_moslora.disk.paths import expand_user_path
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.precision import choose_half_precision


def selftest_arguments(parser: argparse.ArgumentParser) -> None:
    help_text = "device to test (default: the GPU, if there is one)"
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), help=help_text)
    help_text = "folder of the runs and of the report"
    parser.add_argument("--output_dir", default="selftest", metavar="DIR", help=help_text)


def run_selftest(args: argparse.Namespace) -> int:
    """Exit code 2 when a test fails. Writes selftest.md for a bug report."""
    import psutil
    import torch

    from dreambooth_moslora.base.devices import GIB, get_best_device, measure_free_gpu_gib
    from dreambooth_moslora.extras.lab.selftest import (
        CPU_ENV,
        TWO_GPU_COMMAND,
        SelfTest,
        format_page,
    )

    # the device
    best = get_best_device().type
    if args.device not in (None, "cpu", best):
        raise UserError(f"--device {args.device}: this torch sees no such GPU; `doctor` says why.")
    is_on_gpu = best != "cpu" and args.device != "cpu"

    # the folder, and what `doctor` says of this machine
    folder = expand_user_path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    machine = Findings()
    collect_versions(machine)
    collect_machine_facts(machine)
    facts = machine.facts | {"tried": best if is_on_gpu else "cpu"}

    # what can be tried on the device
    has_bf16 = not is_on_gpu or choose_half_precision() == "bf16"
    free_gib = measure_free_gpu_gib() if is_on_gpu else None
    if free_gib is None:
        free_gib = psutil.virtual_memory().available / GIB
    is_cuda = is_on_gpu and best == "cuda"
    has_two = is_cuda and torch.cuda.device_count() > 1
    test = SelfTest(
        folder,
        precisions=("no", "bf16" if has_bf16 else "fp16"),
        env={} if is_on_gpu else CPU_ENV,
        free_gib=free_gib,
        compiles=is_cuda,
        launcher=TWO_GPU_COMMAND if has_two else (),
    )

    # each finding is shown at once, as a training takes a while
    findings = []
    start = time.monotonic()
    for finding in test.run_tests():
        mark = "ok  " if finding.holds else "FAIL"
        print(f"{mark}  {finding.name:14} {finding.line}", flush=True)
        findings.append(finding)

    facts["seconds"] = f"{time.monotonic() - start:.0f}"
    write_atomic(folder / "selftest.md", format_page(facts, findings))
    print(f"{facts['seconds']} s; paste {folder / 'selftest.md'} into a bug report")
    return 0 if all(finding.holds for finding in findings) else 2
