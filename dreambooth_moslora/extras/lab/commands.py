"""The commands `basis` and `compare`.

basis DIR… --out basis.safetensors             A and B that many subjects share
compare PHOTOS WORD --mixers none identity     arms at an equal budget, on one folder
compare --config STUDY.toml                    the same as a file says
"""

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
"""Seconds between two lines about the progress."""
GROUPS_OF_RUNS = ("optimizer", "samples and evaluation", "run folder", "hub")
"""Groups of settings that a basis has no use for."""
OF_RUNS = (
    *(item.name for item in fields(TrainConfig) if item.metadata["group"] in GROUPS_OF_RUNS),
    # photos and words: each subject's are in its folder
    "instance_data_dir",
    "dataset_name",
    "dataset_config_name",
    "image_column",
    "caption_column",
    "subjects",
    "instance_prompt",
    "class_prompt",
    "token",
    "class_word",
    "enable_bucket",
    # the adapter: A, B and a mixer, of the denoiser alone
    "mixer",
    "mixer_lr_scale",
    "train_mixer",
    "use_dora",
    "init_adapter",
    "train_text_encoder",
    "train_text_encoder_ti",
    # the steps: AdamW with falling rates
    "gradient_accumulation_steps",
    "text_encoder_lr",
    "scale_lr",
    "lr_scheduler",
    "lr_warmup_steps",
    "lr_num_cycles",
    "lr_power",
    "use_ema",
    "ema_decay",
    # new tokens, which are trained with the text encoders
    "train_text_encoder_ti_frac",
    "token_abstraction",
    "num_new_tokens_per_abstraction",
    "initializer_concept",
)
"""Settings of a run that a basis has no use for: as flags they are refused, in a file they are left
out."""
OWN = ("folders", "out", "start", "basis_lr")
"""Flags of `basis` that are no settings of a run."""
OF_FILES = (*OF_RUNS, *SAID_BY_SUBJECTS)
"""Of the subject in a file, too, what a flag may say of all: `--mask_prompt toy`."""


def basis_arguments(parser: argparse.ArgumentParser) -> None:
    about = "folders of photos, each with its subject.json"
    parser.add_argument("folders", metavar="DIR", nargs="+", help=about)
    about = "its file, such as runs/toys_basis.safetensors"
    parser.add_argument("--out", metavar="FILE", required=True, help=about)
    about = "an earlier basis (default: that of the base)"
    parser.add_argument("--start", metavar="FILE", default="svd", help=about)
    about = "learning rate of A and B (default: 0.001)"
    parser.add_argument("--basis_lr", type=float, default=1e-3, help=about)
    command_train.add_training_flags(parser, hidden=OF_RUNS)


def run_basis(args: argparse.Namespace) -> int:
    """Learn a basis and write it. Returns 130 when it was stopped."""
    flags = {name: value for name, value in vars(args).items() if name not in OWN}
    check_number("basis_lr", args.basis_lr, low=0, high=100)  # as --learning_rate

    # the file must be new: hours later it would be too late to say so
    out = user_path(args.out)
    if out.exists():
        raise UserError(f"--out {out}: it is there already; give another name.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}.")

    # what imports torch comes after the mistakes that can be seen without it
    config = config_of(args.folders, taken(flags))
    from dreambooth_moslora.extras.lab.learn_basis import learn_basis
    from dreambooth_moslora.plan.checks import check_settings

    check_settings(config, Base.of(config))
    said_at = 0.0

    def progress(done: int, total: int, loss: float, eta_sec: float) -> None:
        nonlocal said_at
        if done in (1, total) or time.monotonic() - said_at > EVERY_SEC:
            said_at = time.monotonic()
            line = f"step {done} of {total}, loss {loss:.3f}, {eta_sec:.0f} s left"
            print(line, file=sys.stderr, flush=True)

    with terminal.StopRequest() as stop:
        done = learn_basis(
            config,
            args.start,
            out,
            basis_lr=args.basis_lr,
            progress=progress,
            should_stop=stop,
        )
    if done:
        print(out)
    return terminal.INTERRUPTED if stop() else 0


def taken(flags: dict) -> dict:
    """The settings of flags and files that a basis has. Raises UserError for another flag."""
    for name in OF_RUNS:
        if name in flags:
            raise UserError(
                f"--{name}: basis has no such flag. It takes the subjects from their folders, "
                "crops photos in their own shapes, and learns by AdamW with falling rates, "
                "in one go."
            )
    settings, _ = command_train.settings_of(flags)
    kept = {}
    for name, value in settings.items():
        if name in flags or name not in OF_FILES:
            kept[name] = value
    return kept


def config_of(folders: list[str], settings: dict) -> TrainConfig:
    """The settings of one run with a subject for each folder. Raises UserError."""
    # prompts must differ; each subject has a mixer of its own
    tables = [table_of(folder) for folder in folders]
    seen: Counter[str] = Counter()
    for table in tables:
        prompt = table["instance_prompt"]
        seen[prompt] += 1
        if seen[prompt] > 1:
            table["instance_prompt"] = f"{prompt} {seen[prompt]}"

    fixed = {"subjects": tables, "output_dir": "basis", "report_to": "none"}
    chosen = choices.Choices({"pretrained_model_name_or_path": "toy", **settings, **fixed})
    choices.choose_resolution(chosen)
    return TrainConfig.from_dict(chosen.all)


def table_of(folder: str) -> dict[str, str]:
    """The settings of the subject in a folder. Raises UserError when nothing there says what it
    is."""
    place = Path(find_asset(folder))
    if not place.is_dir():
        raise UserError(f"{folder}: there is no such folder.")
    file = place / SUBJECT_FILE
    facts = read_json(file) if file.is_file() else {}
    token = facts.get("token")
    word = facts.get("class_word")
    if not (token and word):
        example = '{"token": "sks", "class_word": "dog"}'
        raise UserError(f"{folder}: write {SUBJECT_FILE} into it, such as {example}.")
    return {"instance_data_dir": str(place), **fleet_subjects.prompts_of(token, word)}


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    # a folder, or a whole study
    about = "a folder and what it shows, as for `train`"
    parser.add_argument("words", metavar="PHOTOS WORD", nargs="*", help=about)
    about = "of the arms, the first of which is the reference"
    parser.add_argument("--mixers", nargs="+", metavar="MIXER", help=about)
    about = "base of a study of a folder (default: as `train` chooses)"
    parser.add_argument("--pretrained_model_name_or_path", metavar="BASE", help=about)
    about = "a whole study instead: see assets/studies/mixers.toml"
    parser.add_argument("--config", metavar="FILE", help=about)

    # how it is done
    about = "results, and where to resume from (default: runs/study, or runs/compare_WORD)"
    parser.add_argument("--output_dir", metavar="DIR", help=about)
    about = "trainings at once (default: 1, or what a cluster takes); timings are fair only at 1"
    parser.add_argument("--jobs", type=int, help=about)
    command_fleet.add_cluster_flags(parser, of_one="no Ray, and processes of this machine")
    about = "report what is finished; train nothing"
    parser.add_argument("--report_only", action="store_true", help=about)
    about = "print what would be trained and what is already done"
    parser.add_argument("--dry_run", action="store_true", help=about)


def run_compare(args: argparse.Namespace) -> int:
    """Train what is missing of a study, and write its report. Returns 1 when a training failed."""
    # the study, and where its results are
    command_fleet.check_shares(args)
    study = load_study(Path(args.config)) if given(args) else study_of(args)
    default = "runs/study" if args.config else f"runs/compare_{study.subjects[0].name}"
    out = user_path(args.output_dir or default)
    tuning = len(study.tuning_cells())
    tests = len(study.test_cells(study.first_rates()))
    line = f"{tuning + tests} trainings: {tuning} to choose learning rates, {tests} to compare"
    print(line, file=sys.stderr)
    from dreambooth_moslora.extras.lab import run, study_report

    if args.dry_run:
        todo = run.unfinished(study, out)
        print("\n".join(cell.name for cell in todo))
        print(f"{len(todo)} of them are still to be done", file=sys.stderr)
        return 0
    from dreambooth_moslora.extras.cluster import fleet, ray_fleet

    # train, on a cluster or here
    progress = CellProgress()
    jobs = 0 if args.report_only else max(1, args.jobs or 1)
    if args.ray_address and jobs:
        with ray_fleet.connected(args.ray_address):
            machines = fleet.Machines.of_cluster(args.per_gpu, args.cpus)
            runner = partial(run.cells_on_cluster, machines, args.jobs)
            results = run.run_study(study, out.resolve(), jobs, progress, runner=runner)
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


NOT_SHARED = ("instance_prompt", "class_prompt", "class_word", "mixer", "rank", "learning_rate")
"""Settings that a study says of its subjects, arms, ranks and learning rates."""


def study_of(args: argparse.Namespace) -> Study:
    """One arm for each mixer, trained on the folder as `train PHOTOS WORD` would. Raises
    UserError."""
    folder, word = command_train.folder_and_word(args.words)
    mixers = args.mixers or ["none", "orthogonal"]
    if unknown := [mixer for mixer in mixers if mixer not in MIXERS]:
        raise UserError(f"--mixers {unknown[0]}: choose from {', '.join(MIXERS)}.")

    # what `train` would choose
    base = args.pretrained_model_name_or_path
    chosen = choices.Choices({"pretrained_model_name_or_path": base} if base else {})
    command_train.choose_base(chosen, folder)
    free_gib = None if chosen.base.is_toy else memory.least_free_gib()
    exposures = choices.choose_recipe(chosen, free_gib)
    choices.choose_words(chosen, word)
    chosen.add("", exposures_per_photo=exposures)

    # of it, what all arms share; the rest is named by the study
    recipe = chosen.all
    shared = {name: value for name, value in recipe.items() if name not in NOT_SHARED}
    subject = StudySubject(
        photos=str(folder),
        instance_prompt=recipe["instance_prompt"],
        class_prompt=recipe["class_prompt"],
    )
    return Study(
        subjects=(subject,),
        arms={mixer: {"mixer": mixer} for mixer in mixers},
        train=shared | {"exposures_per_photo": exposures},
        ranks=(recipe["rank"],),
        learning_rates=(recipe["learning_rate"],),
        reference=mixers[0],
    )


class CellProgress:
    """One line per cell, with the remaining time of its stage."""

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
