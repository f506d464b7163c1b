"""`python -m dreambooth_moslora compare --config STUDY.toml`: arms × ranks × subjects × seeds at an equal budget."""

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from dreambooth_moslora.extras.cluster.command_fleet import add_cluster_flags, check_shares
from dreambooth_moslora.extras.lab.study import load_study


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", required=True, help="the study: see assets/studies/mixers.toml")
    parser.add_argument("--output_dir", metavar="DIR", default="runs/study", help="results, and where to resume from")
    parser.add_argument(
        "--jobs", type=int, help="trainings at once (default: 1, or what a cluster takes); timings are fair only at 1"
    )
    add_cluster_flags(parser, of_one="no Ray, and processes of this machine")
    parser.add_argument("--report_only", action="store_true", help="report what is finished; train nothing")
    parser.add_argument("--dry_run", action="store_true", help="print what would be trained and what is already done")


def run_compare(args: argparse.Namespace) -> int:
    check_shares(args)
    study, out = load_study(Path(args.config)), Path(args.output_dir)
    tuning, tests = len(study.tuning_cells()), len(study.test_cells(study.first_rates()))
    print(f"{tuning + tests} trainings: {tuning} to choose learning rates, {tests} to compare", file=sys.stderr)
    from dreambooth_moslora.extras.lab import report, run

    if args.dry_run:
        todo = run.unfinished(study, out)
        print("\n".join(cell.name for cell in todo))
        print(f"{len(todo)} of them are still to be done", file=sys.stderr)
        return 0
    from dreambooth_moslora.extras.cluster import fleet, on_ray

    progress, jobs = CellProgress(), 0 if args.report_only else max(1, args.jobs or 1)
    if args.ray_address and jobs:
        with on_ray.connected(args.ray_address):
            runner = partial(run.cells_on_cluster, fleet.Machines.of_cluster(args.per_gpu, args.cpus), args.jobs)
            results = run.run_study(study, out.resolve(), jobs, progress, runner)
    else:
        results = run.run_study(study, out, jobs, progress)
    print(report.write_comparison(study, results, out))
    print(out / "report.html")
    if progress.failed:
        print(f"{progress.failed} trainings failed; run again to try them again", file=sys.stderr)
    return 1 if progress.failed else 0


class CellProgress:
    """One line per cell, with the remaining time of its stage."""

    def __init__(self):
        self.failed, self.finished, self.started = 0, 0, time.monotonic()

    def __call__(self, progress: Any) -> None:
        self.finished += 1
        self.failed += bool(progress.error)
        each = (time.monotonic() - self.started) / self.finished
        left = each * (progress.total - progress.done)
        end = f"FAILED: {progress.error}" if progress.error else f"{progress.seconds:.0f} s"
        line = f"{progress.done}/{progress.total} {progress.cell.name}: {end}; about {left / 60:.0f} min left"
        print(line, file=sys.stderr, flush=True)
