"""`python -m dreambooth_moslora compare`: kinds of adapter at an equal budget.

compare PHOTOS WORD --mixers none identity     on one folder
compare --config STUDY.toml                    as a file says
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from dreambooth_moslora.cli import one_word
from dreambooth_moslora.cli.terminal import print_loading
from dreambooth_moslora.disk.paths import expand_user_path
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.extras.cluster import command_fleet
from dreambooth_moslora.extras.lab.study import Study, StudySubject, load_study
from dreambooth_moslora.plan import agreement, defaults
from dreambooth_moslora.settings.setting_names import list_flags
from dreambooth_moslora.settings.setting_rows import MIXERS

BASE_SETTING = "pretrained_model_name_or_path"


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    # a folder, or a whole study
    help_text = "a folder and what it shows, as for `train`"
    parser.add_argument("words", metavar="PHOTOS WORD", nargs="*", help=help_text)
    help_text = "of the arms, the first of which is the reference"
    parser.add_argument("--mixers", nargs="+", metavar="MIXER", help=help_text)
    help_text = "base of a study of a folder (default: as `train` chooses)"
    parser.add_argument(*list_flags(BASE_SETTING), dest="base", metavar="BASE", help=help_text)
    help_text = "a whole study instead: see assets/studies/mixers.toml"
    parser.add_argument("--config", metavar="FILE", help=help_text)

    # how it is done
    help_text = "results, and where to resume from (default: runs/study, or runs/compare_WORD)"
    parser.add_argument("--output_dir", metavar="DIR", help=help_text)
    help_text = (
        "trainings at once (default: 1, or what a cluster takes); timings are fair only at 1"
    )
    parser.add_argument("--jobs", type=int, help=help_text)
    command_fleet.add_cluster_flags(parser, default_note="no Ray, and processes of this machine")
    help_text = "report what is finished; train nothing"
    parser.add_argument("--report_only", action="store_true", help=help_text)
    help_text = "print what would be trained and what is already done"
    parser.add_argument("--dry_run", action="store_true", help=help_text)


def run_compare(args: argparse.Namespace) -> int:
    """Train what is missing of a study, and write its report. Returns 1 when a training failed."""
    # the study, and where its results are
    command_fleet.check_machine_shares(args)
    study = load_study(Path(args.config)) if has_study_file(args) else build_study(args)
    default = "runs/study" if args.config else f"runs/compare_{study.subjects[0].name}"
    out = expand_user_path(args.output_dir or default)
    tuning = len(study.list_tuning_cells())
    tests = len(study.list_test_cells(study.get_first_rates()))
    line = f"{tuning + tests} trainings: {tuning} to choose learning rates, {tests} to compare"
    print(line, file=sys.stderr)
    print_loading()
    from dreambooth_moslora.extras.lab import run, study_report

    if args.dry_run:
        todo = run.list_unfinished(study, out)
        print("\n".join(cell.name for cell in todo))
        print(f"{len(todo)} of them are still to be done", file=sys.stderr)
        return 0
    from dreambooth_moslora.extras.cluster import fleet, ray_fleet

    # train, on a cluster or here
    progress = CellProgress()
    jobs = 0 if args.report_only else max(1, args.jobs or 1)
    if args.ray_address and jobs:
        with ray_fleet.connect(args.ray_address):
            machines = fleet.Machines.from_cluster(args.per_gpu, args.cpus)
            runner = partial(run.run_cells_on_cluster, machines, args.jobs)
            results = run.run_study(study, out.resolve(), jobs, progress, runner=runner)
    else:
        results = run.run_study(study, out, jobs, progress)

    print(study_report.write_comparison(study, results, out))
    print(out / "report.html")
    if progress.failed:
        print(f"{progress.failed} trainings failed; run again to try them again", file=sys.stderr)
    return 1 if progress.failed else 0


def has_study_file(args: argparse.Namespace) -> bool:
    """Return whether a file gives the study. Raises UserError unless a file or a folder does."""
    if bool(args.config) == bool(args.words):
        raise UserError(
            "give a folder and a word, as in `compare photos/dog dog`, or a study by --config."
        )
    if args.config and (args.mixers or args.base):
        raise UserError(
            "--config names the arms and the base of its study; leave out --mixers and the base."
        )
    return bool(args.config)


ARM_SETTINGS = ("instance_prompt", "class_prompt", "class_word", "mixer", "rank", "learning_rate")
"""Settings that a study says of its subjects, arms, ranks and learning rates."""


def build_study(args: argparse.Namespace) -> Study:
    """Build one arm for each mixer, trained on the folder as `train PHOTOS WORD` would. Raises
    UserError."""
    folder, word = one_word.parse_folder_and_word(args.words)
    mixers = args.mixers or ["none", "orthogonal"]
    if unknown := [mixer for mixer in mixers if mixer not in MIXERS]:
        raise UserError(f"--mixers {unknown[0]}: choose from {', '.join(MIXERS)}.")

    # what `train` would choose; the GPU is asked, which needs PyTorch
    print_loading()
    base = args.base
    choices = defaults.Choices({BASE_SETTING: base} if base else {})
    one_word.choose_base(choices, folder)
    free_gib = None if choices.base.is_toy else agreement.get_min_free_gib()
    exposures = defaults.choose_recipe(choices, free_gib)
    defaults.choose_prompts(choices, word)
    choices.add("", exposures_per_photo=exposures)

    # of it, what all arms share; the rest is named by the study
    recipe = choices.all_settings
    shared = {name: value for name, value in recipe.items() if name not in ARM_SETTINGS}
    subject = StudySubject(
        photos=str(folder),
        instance_prompt=recipe["instance_prompt"],
        class_prompt=recipe["class_prompt"],
    )
    return Study(
        subjects=(subject,),
        arms={mixer: {"mixer": mixer} for mixer in mixers},
        train=shared,
        ranks=(recipe["rank"],),
        learning_rates=(recipe["learning_rate"],),
        reference=mixers[0],
    )


class CellProgress:
    """Progress of a study: one line per cell, with the remaining time of its stage."""

    def __init__(self):
        self.failed = 0
        self.finished = 0
        self.started = time.monotonic()

    def __call__(self, progress: Any) -> None:
        self.finished += 1
        self.failed += bool(progress.error)
        each_sec = (time.monotonic() - self.started) / self.finished
        left_min = each_sec * (progress.total - progress.done) / 60
        end = f"FAILED: {progress.error}" if progress.error else f"{progress.seconds:.0f} s"
        done = f"{progress.done}/{progress.total} {progress.cell.name}"
        print(f"{done}: {end}; about {left_min:.0f} min left", file=sys.stderr, flush=True)
