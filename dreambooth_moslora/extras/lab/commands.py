"""`basis DIR… --out basis.safetensors`: A and B that many subjects share. `compare PHOTOS WORD
--mixers none identity` or `compare --config STUDY.toml`: arms at an equal budget."""

import argparse
import sys
import time
from collections import Counter
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.cli import command_train, terminal
from dreambooth_moslora.disk.contents import read_json
from dreambooth_moslora.disk.paths import SUBJECT_FILE, find_asset, user_path
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.extras.cluster import command_fleet, fleet_subjects
from dreambooth_moslora.extras.lab.study import Study, StudySubject, load_study
from dreambooth_moslora.plan import choices, memory
from dreambooth_moslora.settings.table import MIXERS, SAID_BY_SUBJECTS, TrainConfig, check_number

EVERY_SEC = 5.0
GROUPS_OF_RUNS = ("optimizer", "samples and evaluation", "run folder", "hub")
OF_RUNS = (
    *(item.name for item in fields(TrainConfig) if item.metadata["group"] in GROUPS_OF_RUNS),
    *(
        "instance_data_dir",
        "dataset_name",
        "dataset_config_name",
        "image_column",
        "caption_column",
        "subjects",
    ),
    *(
        "instance_prompt",
        "class_prompt",
        "token",
        "class_word",
        "enable_bucket",
        "mixer",
        "mixer_lr_scale",
    ),
    *("train_mixer", "use_dora", "init_adapter", "train_text_encoder", "train_text_encoder_ti"),
    *(
        "gradient_accumulation_steps",
        "text_encoder_lr",
        "scale_lr",
        "lr_scheduler",
        "lr_warmup_steps",
    ),
    *(
        "lr_num_cycles",
        "lr_power",
        "use_ema",
        "ema_decay",
        "train_text_encoder_ti_frac",
        "token_abstraction",
    ),
    *("num_new_tokens_per_abstraction", "initializer_concept"),
)
"""Settings of a run that a basis has no use for: as flags they are refused, in a file they are left
out."""
OWN = ("folders", "out", "start", "basis_lr")
OF_FILES = (*OF_RUNS, *SAID_BY_SUBJECTS)
"""Of the subject in a file, too, what a flag may say of all: `--mask_prompt toy`."""


def basis_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", metavar="DIR", nargs="+", help="folders of photos, each with its subject.json"
    )
    parser.add_argument(
        "--out", metavar="FILE", required=True, help="its file, such as runs/toys_basis.safetensors"
    )
    parser.add_argument(
        "--start",
        metavar="FILE",
        default="svd",
        help="an earlier basis (default: that of the base)",
    )
    parser.add_argument(
        "--basis_lr", type=float, default=1e-3, help="learning rate of A and B (default: 0.001)"
    )
    command_train.add_training_flags(parser, hidden=OF_RUNS)


def run_basis(args: argparse.Namespace) -> int:
    flags = {name: value for name, value in vars(args).items() if name not in OWN}
    check_number("basis_lr", args.basis_lr, low=0, high=100)  # as --learning_rate
    out = user_path(args.out)
    if out.exists():
        raise UserError(f"--out {out}: it is there already; give another name.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}.")
    config = config_of(args.folders, taken(flags))
    from dreambooth_moslora.extras.lab.learn_basis import learn_basis
    from dreambooth_moslora.plan.checks import check_settings

    check_settings(config, Base.of(config))
    last = [0.0]

    def progress(done: int, total: int, loss: float, eta_sec: float) -> None:
        if done in (1, total) or time.monotonic() - last[0] > EVERY_SEC:
            last[0] = time.monotonic()
            print(
                f"step {done} of {total}, loss {loss:.3f}, {eta_sec:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    with terminal.StopRequest() as stop:
        done = learn_basis(config, args.start, out, args.basis_lr, progress, stop)
    if done:
        print(out)
    return terminal.INTERRUPTED if stop() else 0


def taken(flags: dict) -> dict:
    """The settings of flags and files that a basis has. Raises UserError for another flag."""
    for name in OF_RUNS:
        if name in flags:
            raise UserError(
                f"--{name}: basis has no such flag. It takes the subjects from their folders, crops photos in their "
                "own shapes, and learns by AdamW with falling rates, in one go."
            )
    return {
        name: value
        for name, value in command_train.settings_of(flags)[0].items()
        if name in flags or name not in OF_FILES
    }


def config_of(folders: list[str], settings: dict) -> TrainConfig:
    """The settings of one run with a subject for each folder. Raises UserError."""
    tables, seen = [table_of(folder) for folder in folders], Counter()
    for table in tables:
        prompt = table["instance_prompt"]
        seen[prompt] += 1
        if seen[prompt] > 1:  # prompts must differ; each subject has a mixer of its own
            table["instance_prompt"] = f"{prompt} {seen[prompt]}"
    fixed = {"subjects": tables, "output_dir": "basis", "report_to": "none"}
    chosen = choices.Choices({"pretrained_model_name_or_path": "toy", **settings, **fixed})
    choices.choose_resolution(chosen)
    return TrainConfig.from_dict(chosen.all)


def table_of(folder: str) -> dict[str, str]:
    """The settings of the subject in a folder. Raises UserError when nothing there says what it is."""
    place = Path(find_asset(folder))
    if not place.is_dir():
        raise UserError(f"{folder}: there is no such folder.")
    file = place / SUBJECT_FILE
    facts = read_json(file) if file.is_file() else {}
    token, word = facts.get("token"), facts.get("class_word")
    if not (token and word):
        raise UserError(
            f'{folder}: write {SUBJECT_FILE} into it, such as {{"token": "sks", "class_word": "dog"}}.'
        )
    return {"instance_data_dir": str(place), **fleet_subjects.prompts_of(token, word)}


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", metavar="PHOTOS WORD", nargs="*", help="a folder and what it shows, as for `train`"
    )
    parser.add_argument(
        "--mixers",
        nargs="+",
        metavar="MIXER",
        help="of the arms, the first of which is the reference",
    )
    about_base = "base of a study of a folder (default: as `train` chooses)"
    parser.add_argument("--pretrained_model_name_or_path", metavar="BASE", help=about_base)
    parser.add_argument(
        "--config", metavar="FILE", help="a whole study instead: see assets/studies/mixers.toml"
    )
    about_out = "results, and where to resume from (default: runs/study, or runs/compare_WORD)"
    parser.add_argument("--output_dir", metavar="DIR", help=about_out)
    about_jobs = (
        "trainings at once (default: 1, or what a cluster takes); timings are fair only at 1"
    )
    parser.add_argument("--jobs", type=int, help=about_jobs)
    command_fleet.add_cluster_flags(parser, of_one="no Ray, and processes of this machine")
    parser.add_argument(
        "--report_only", action="store_true", help="report what is finished; train nothing"
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print what would be trained and what is already done",
    )


def run_compare(args: argparse.Namespace) -> int:
    command_fleet.check_shares(args)
    study = load_study(Path(args.config)) if given(args) else study_of(args)
    out = user_path(
        args.output_dir
        or ("runs/study" if args.config else f"runs/compare_{study.subjects[0].name}")
    )
    tuning, tests = len(study.tuning_cells()), len(study.test_cells(study.first_rates()))
    print(
        f"{tuning + tests} trainings: {tuning} to choose learning rates, {tests} to compare",
        file=sys.stderr,
    )
    from dreambooth_moslora.extras.lab import run, study_report

    if args.dry_run:
        todo = run.unfinished(study, out)
        print("\n".join(cell.name for cell in todo))
        print(f"{len(todo)} of them are still to be done", file=sys.stderr)
        return 0
    from dreambooth_moslora.extras.cluster import fleet, ray_fleet

    progress, jobs = CellProgress(), 0 if args.report_only else max(1, args.jobs or 1)
    if args.ray_address and jobs:
        with ray_fleet.connected(args.ray_address):
            runner = partial(
                run.cells_on_cluster, fleet.Machines.of_cluster(args.per_gpu, args.cpus), args.jobs
            )
            results = run.run_study(study, out.resolve(), jobs, progress, runner)
    else:
        results = run.run_study(study, out, jobs, progress)
    print(study_report.write_comparison(study, results, out))
    print(out / "report.html")
    if progress.failed:
        print(f"{progress.failed} trainings failed; run again to try them again", file=sys.stderr)
    return 1 if progress.failed else 0


def given(args: argparse.Namespace) -> bool:
    """Whether a file gives the study. Raises UserError unless a file or a folder does."""
    if bool(args.config) == bool(args.words):
        raise UserError(
            "give a folder and a word, as in `compare photos/dog dog`, or a study by --config."
        )
    if args.config and (args.mixers or args.pretrained_model_name_or_path):
        raise UserError(
            "--config names the arms and the base of its study; leave out --mixers and the base."
        )
    return bool(args.config)


def study_of(args: argparse.Namespace) -> Study:
    """One arm for each mixer, trained on the folder as `train PHOTOS WORD` would. Raises UserError."""
    folder, word = command_train.folder_and_word(args.words)
    mixers = args.mixers or ["none", "orthogonal"]
    if unknown := [mixer for mixer in mixers if mixer not in MIXERS]:
        raise UserError(f"--mixers {unknown[0]}: choose from {', '.join(MIXERS)}.")
    base = args.pretrained_model_name_or_path
    chosen = choices.Choices({"pretrained_model_name_or_path": base} if base else {})
    command_train.choose_base(chosen, folder)
    exposures = choices.choose_recipe(
        chosen, None if chosen.base.is_toy else memory.least_free_gib()
    )
    choices.choose_words(chosen, word)
    chosen.add("", exposures_per_photo=exposures)
    recipe, of_arms = (
        chosen.all,
        ("instance_prompt", "class_prompt", "class_word", "mixer", "rank", "learning_rate"),
    )
    shared = {name: value for name, value in recipe.items() if name not in of_arms}
    return Study(
        subjects=(StudySubject(str(folder), recipe["instance_prompt"], recipe["class_prompt"]),),
        arms={mixer: {"mixer": mixer} for mixer in mixers},
        train=shared | {"exposures_per_photo": exposures},
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
