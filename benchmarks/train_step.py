"""Seconds and memory of one training step, compared with a loop in the style of diffusers' script
and with the lower bound.

    python -m benchmarks.train_step            # full-size SDXL, random weights: 17 GB, ten minutes
    python -m benchmarks.train_step --quick    # a small UNet of the same topology, a minute
    python -m benchmarks.train_step --arms floor ours --resolutions 1024 --json step.json

Each arm runs in a process of its own, one after the other, so that none inherits another's memory.
Batch 1. The lower bound (floor) is the frozen UNet's forward and the gradient of its input: no
adapter, no optimizer. Memory is the largest resident set during the steps; that of building the
models is not counted.
"""

import argparse
import json
import os
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.arms import ARMS

__all__ = ["main", "measure"]

ARM_SETTINGS = ("size", "rank", "warmup", "steps", "realtime")


def reset_peak() -> None:
    """Reset the kernel's peak, so that VmHWM counts from here (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def get_peak_gb() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def get_page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def time_step(step: Callable[[], tuple[float, float]]) -> tuple[float, float, tuple[float, float]]:
    """Wall seconds, processor seconds of all threads, and the step's result."""
    start, cpu_start = time.perf_counter(), time.process_time()
    outcome = step()
    return time.perf_counter() - start, time.process_time() - cpu_start, outcome


@contextmanager
def reserve_cores(is_enabled: bool) -> Iterator[None]:
    """Real-time scheduling of all threads, so that other programs wait while steps are timed
    (Linux, root)."""
    threads = [int(name) for name in os.listdir("/proc/self/task")] if is_enabled else []
    for thread in threads:
        os.sched_setscheduler(thread, os.SCHED_RR, os.sched_param(1))
    try:
        yield
    finally:
        for thread in threads:
            os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def measure(
    arm: str, size: str, resolution_px: int, rank: int, warmup: int, steps: int, realtime: int
) -> dict:
    """Build the arm in this process and time its steps."""
    import torch

    torch.manual_seed(0)
    build_start = time.perf_counter()
    step = ARMS[arm].build(size, resolution_px, rank)
    build_sec, loading_gb = time.perf_counter() - build_start, get_peak_gb()
    for _ in range(warmup):
        step()
    reset_peak()
    faults = get_page_faults()
    with reserve_cores(bool(realtime)):
        runs = [time_step(step) for _ in range(steps)]
    return {
        "arm": arm,
        "resolution_px": resolution_px,
        "step_sec": statistics.median(wall for wall, _, _ in runs),
        "cpu_sec": statistics.median(cpu for _, cpu, _ in runs),
        "step_secs": [round(wall, 3) for wall, _, _ in runs],
        "peak_gb": round(get_peak_gb(), 2),
        "page_faults_a_step": (get_page_faults() - faults) // steps,
        "loading_peak_gb": round(loading_gb, 2),
        "build_sec": round(build_sec, 1),
        "loss": runs[-1][2][0],
        "grad_norm": runs[-1][2][1],
    }


def run_apart(arm: str, resolution_px: int, options: argparse.Namespace) -> dict:
    """Run `measure` in a fresh process and return its line of JSON."""
    settings = [f"--{name}={getattr(options, name)}" for name in ARM_SETTINGS]
    command = [
        sys.executable,
        "-m",
        "benchmarks.train_step",
        f"--alone={arm}:{resolution_px}",
        *settings,
    ]
    done = subprocess.run(
        [*shlex.split(options.launcher), *command], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        return {"arm": arm, "resolution_px": resolution_px, "failed": done.returncode}
    return json.loads(done.stdout.splitlines()[-1])


def compute_ratio(
    results: list[dict], key: str, arm: str, against: str, resolution_px: int
) -> float | None:
    values = {r["arm"]: r.get(key) for r in results if r["resolution_px"] == resolution_px}
    return (
        round(values[arm] / values[against], 3) if values.get(arm) and values.get(against) else None
    )


def compute_ratios(results: list[dict], resolution_px: int) -> dict[str, dict[str, float | None]]:
    """Ratios of each of our arms to the arms that it can fairly be compared with."""
    table = {}
    for name, arm in ARMS.items():
        for rival in arm.against:
            pair = {
                key: compute_ratio(results, key, name, rival, resolution_px)
                for key in ("step_sec", "cpu_sec", "peak_gb")
            }
            if any(pair.values()):
                table[f"{name} / {rival}"] = pair
    return table


def show(results: list[dict], resolutions: list[int]) -> None:
    print(
        f"\n{'arm':28} {'px':>5} {'s a step':>9} {'cpu s':>7} {'peak GB':>8} "
        f"{'faults a step':>14}  steps"
    )
    for r in results:
        if "failed" in r:
            print(f"{r['arm']:28} {r['resolution_px']:5} failed with exit code {r['failed']}")
            continue
        numbers = (
            f"{r['step_sec']:9.3f} {r['cpu_sec']:7.2f} {r['peak_gb']:8.2f} "
            f"{r['page_faults_a_step']:14,}"
        )
        print(f"{r['arm']:28} {r['resolution_px']:5} {numbers}  {r['step_secs']}")
    for px in resolutions:
        for pair, values in compute_ratios(results, px).items():
            print(
                f"{px} px  {pair:50} time {values['step_sec']}  cpu {values['cpu_sec']}  memory "
                f"{values['peak_gb']}"
            )


def build_parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    options.add_argument("--resolutions", nargs="+", type=int, default=[512, 1024], metavar="PX")
    options.add_argument("--rank", type=int, default=4)
    options.add_argument("--warmup", type=int, default=2, help="steps before the clock starts")
    options.add_argument(
        "--steps", type=int, default=3, help="steps that are timed; the median counts"
    )
    options.add_argument(
        "--quick",
        action="store_true",
        help="a small UNet at 64 px: seconds, the ratios mean nothing",
    )
    options.add_argument(
        "--realtime", type=int, default=0, help="1: other programs wait during timed steps (root)"
    )
    options.add_argument(
        "--launcher", default="", help='run each arm through a command, such as "taskset -c 0,1"'
    )
    options.add_argument("--json", type=Path, help="write every figure here")
    options.add_argument("--size", default="sdxl", help=argparse.SUPPRESS)
    options.add_argument("--alone", help=argparse.SUPPRESS)
    return options


MATRIX_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx", "sve", "i8mm", "bf16")


def read_cpu_flags(path: Path = Path("/proc/cpuinfo")) -> str:
    """Return the instructions that decide how fast this CPU multiplies matrices; "" where the
    system is not Linux."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    line = re.search(r"^(?:flags|Features)\s*:(.*)", text, re.MULTILINE)
    return (
        " ".join(flag for flag in line[1].split() if flag.startswith(MATRIX_FLAGS)) if line else ""
    )


def collect_facts(options: argparse.Namespace) -> dict:
    """Collect the conditions that affect the figures."""
    import torch

    machine = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    machine["flags"] = read_cpu_flags()
    settings = {name: getattr(options, name) for name in ARM_SETTINGS}
    return {**machine, "torch": torch.__version__, "dtype": "bfloat16", "batch": 1, **settings}


def list_pairs(options: argparse.Namespace) -> list[tuple[str, int]]:
    """(arm, resolution) pairs. The slow arms are timed at the smallest resolution only: they take
    minutes at 1024."""
    smallest = min(options.resolutions)
    return [
        (a, px)
        for px in options.resolutions
        for a in options.arms
        if px == smallest or not ARMS[a].slow
    ]


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    if options.alone:
        arm, px = options.alone.split(":")
        settings = {name: getattr(options, name) for name in ARM_SETTINGS}
        print(json.dumps(measure(arm, resolution_px=int(px), **settings)))
        return
    if options.quick:
        options.size, options.resolutions = "small", [64]
    results = []
    for arm, px in list_pairs(options):
        results.append(run_apart(arm, px, options))
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    show(results, options.resolutions)
    if options.json:
        tables = {str(px): compute_ratios(results, px) for px in options.resolutions}
        report = {"settings": collect_facts(options), "results": results, "ratios": tables}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
