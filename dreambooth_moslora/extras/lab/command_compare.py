"""`compare PHOTOS WORD --mixers none orthogonal`, or `compare --config STUDY.toml`: arms at an equal budget."""

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from dreambooth_moslora.cli import train
from dreambooth_moslora.core import UserError, is_toy
from dreambooth_moslora.extras.cluster.command_fleet import add_cluster_flags, check_shares
from dreambooth_moslora.extras.lab.study import Study, StudySubject, load_study
from dreambooth_moslora.plan import choices, memory
from dreambooth_moslora.settings import table


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", metavar="PHOTOS WORD", nargs="*", help="a folder and what it shows, as for `train`")
    parser.add_argument("--mixers", nargs="+", metavar="MIXER", help="of the arms, the first of which is the reference")
    about_base = "base of a study of a folder (default: as `train` chooses)"
    parser.add_argument("--pretrained_model_name_or_path", metavar="BASE", help=about_base)
    parser.add_argument("--config", metavar="FILE", help="a whole study instead: see assets/studies/mixers.toml")
    about_out = "results, and where to resume from (default: runs/study, or runs/compare_WORD)"
    parser.add_argument("--output_dir", metavar="DIR", help=about_out)
    parser.add_argument(
        "--jobs", type=int, help="trainings at once (default: 1, or what a cluster takes); timings are fair only at 1"
    )
    add_cluster_flags(parser, of_one="no Ray, and processes of this machine")
    parser.add_argument("--report_only", action="store_true", help="report what is finished; train nothing")
    parser.add_argument("--dry_run", action="store_true", help="print what would be trained and what is already done")


def run_compare(args: argparse.Namespace) -> int:
    check_shares(args)
    study = load_study(Path(args.config)) if given(args) else study_of(args)
    out = Path(args.output_dir or ("runs/study" if args.config else f"runs/compare_{study.subjects[0].name}"))
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


def given(args: argparse.Namespace) -> bool:
    """Whether a file gives the study. Raises UserError unless a file or a folder does."""
    if bool(args.config) == bool(args.words):
        raise UserError("give a folder and a word, as in `compare photos/dog dog`, or a study by --config.")
    if args.config and (args.mixers or args.pretrained_model_name_or_path):
        raise UserError("--config names the arms and the base of its study; leave out --mixers and the base.")
    return bool(args.config)


def study_of(args: argparse.Namespace) -> Study:
    """One arm for each mixer, trained on the folder as `train PHOTOS WORD` would. Raises UserError."""
    folder, word = train.folder_and_word(args.words)
    mixers = args.mixers or ["none", "orthogonal"]
    if unknown := [mixer for mixer in mixers if mixer not in table.MIXERS]:
        raise UserError(f"--mixers {unknown[0]}: choose from {', '.join(table.MIXERS)}.")
    base = args.pretrained_model_name_or_path
    chosen = choices.Choices({"pretrained_model_name_or_path": base} if base else {})
    train.choose_base(chosen, folder)
    is_of_toys = is_toy(chosen.all["pretrained_model_name_or_path"])
    exposures = choices.choose_recipe(chosen, None if is_of_toys else memory.least_free_gib())
    choices.choose_words(chosen, word)
    chosen.add("", exposures_per_photo=exposures)
    recipe, of_arms = chosen.all, ("instance_prompt", "class_prompt", "class_word", "mixer", "rank", "learning_rate")
    return Study(
        subjects=(StudySubject(str(folder), recipe["instance_prompt"], recipe["class_prompt"]),),
        arms={mixer: {"mixer": mixer} for mixer in mixers},
        train={name: value for name, value in recipe.items() if name not in of_arms}
        | {"exposures_per_photo": exposures},
        ranks=(recipe["rank"],),
        learning_rates=(recipe["learning_rate"],),
        reference=mixers[0],
    )


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
