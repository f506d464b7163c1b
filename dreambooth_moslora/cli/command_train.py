"""The command `train`: from flags and files to settings, a plan and a run; defaults < --config <
flags.

`train photos/dog dog` chooses every other setting for a folder and a word; a --config file replaces
the recipe. Nothing imports torch before the arguments are checked.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dreambooth_moslora import __version__
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.devices import is_main_process
from dreambooth_moslora.cli import one_word
from dreambooth_moslora.cli.parser import underscored, unknown_flag_message
from dreambooth_moslora.cli.run_log import start_log
from dreambooth_moslora.cli.terminal import (
    DONE,
    INTERRUPTED,
    StopRequest,
    TerminalProgress,
    exit_code,
    hush,
    say,
    say_loading,
)
from dreambooth_moslora.cli.train_flags import SCRIPT, build_train_parser, require, settings_of
from dreambooth_moslora.disk.paths import find_asset, public_name
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError, spelled_out
from dreambooth_moslora.plan import agreement, defaults
from dreambooth_moslora.settings import train_config

if TYPE_CHECKING:
    from dreambooth_moslora.disk.events import Event
    from dreambooth_moslora.photos.folder import PhotoReport
    from dreambooth_moslora.plan.plan import Plan
    from dreambooth_moslora.training.loop import TrainResult

logger = logging.getLogger(__name__)


def train_main(argv: Sequence[str] | None = None) -> int:
    """`python train_dreambooth.py …`, alone or under `accelerate launch`."""
    words = list(sys.argv[1:] if argv is None else argv)
    return exit_code(lambda: run_train(words))


def run_train(argv: list[str], prog: str = SCRIPT) -> int:
    """Describe or train the run of a command line; returns the exit code. Raises UserError."""
    chosen = parse_training(argv, prog)
    config = train_config.TrainConfig.from_dict(chosen.all)

    # Only say what would be trained
    if config.dry_run:
        from dreambooth_moslora.training.dry_run import describe_run

        lines = [describe_run(config, chosen.photo_report), *chosen.last_words]
        print(spelled_out("\n".join(lines)))
        return DONE

    # Train it here. What cannot be is said before the log file creates or changes a folder, and
    # before torch is imported.
    with StopRequest() as stop:
        check_beforehand(config)
        plan = plan_with_room(config, chosen.photo_report)
        start_log(RunDir(config.output_dir))

        # The log also says how the run ended; these records are not for the terminal.
        base = public_name(config.pretrained_model_name_or_path)
        logger.info("begins: version %s, base %s", __version__, base)
        try:
            code = run_trainer(plan, stop, chosen.last_words)
        except Exception as error:
            logger.info("stopped: %s", error, exc_info=not isinstance(error, UserError))
            raise
        logger.info("ended: %s", "stopped" if code == INTERRUPTED else "done")
        return code


def train_subject(
    photos: str | Path,
    word: str,
    *,
    base: str | None = None,
    on_event: "Callable[[Event], None] | None" = None,
    should_stop: Callable[[], bool] | None = None,
    **settings: Any,
) -> "TrainResult":
    """Teach a base one subject, as `train photos/dog dog` does: the program chooses all else.

    photos: the folder of photos
    word: what they show, such as "dog"
    base: a folder, a hub id, a .safetensors file or "toy"; without it SDXL on a GPU, else "toy"
    on_event: gets every event of the run; without it a bar on standard error shows the progress
    should_stop: whether the run should stop after this step, and save
    settings: any of `TrainConfig`; a given one wins

    The adapter is in the `run_dir` of what is returned, `runs/dog` or a free name like it. Raises
    UserError.
    """
    if base is not None:
        settings["pretrained_model_name_or_path"] = str(base)
    # The given settings are checked before the rest is chosen.
    given = train_config.check_each(settings)
    chosen = one_word.choose([str(photos), word], given, has_recipe=False)
    for line in filter(None, chosen.last_words):
        logger.warning("%s", line)
    config = train_config.TrainConfig.from_dict(chosen.all)
    check_beforehand(config)

    progress = on_event or TerminalProgress()
    try:
        return train_plan(plan_with_room(config, chosen.photo_report), progress, should_stop)
    finally:
        if on_event is None:
            progress.close()


def check_beforehand(config: train_config.TrainConfig) -> None:
    """Raises UserError for folders and a base that cannot be used, before anything is written."""
    from dreambooth_moslora.plan.validation import check_folders

    check_folders(config)
    refusal = Base.of(config).unreachable
    if refusal:
        raise UserError(refusal)


def plan_with_room(config: train_config.TrainConfig, report: "PhotoReport | None") -> "Plan":
    """The plan of a run. Raises UserError, also for a disk that it would fill."""
    from dreambooth_moslora.plan.plan import make_plan
    from dreambooth_moslora.training.dry_run import lack_of_disk

    plan = make_plan(config, report)

    # What a run that goes on writes is partly there.
    lack = lack_of_disk(plan)
    if lack and not config.resume_from_checkpoint:
        raise UserError(f"{lack[0]}: free some of it, or give --output_dir on another disk.")
    return plan


def train_plan(
    plan: "Plan", on_event: "Callable[[Event], None]", should_stop: Callable[[], bool] | None
) -> "TrainResult":
    """Train, with the scores that the run's settings ask for. Raises UserError."""
    from dreambooth_moslora.training.loop import train

    # The encoders that score load with a bar each.
    hush()
    evaluator = None
    if plan.config.is_scored:
        from dreambooth_moslora.evaluation.during_training import TrainingEvaluator

        evaluator = TrainingEvaluator(plan.config, plan.photos, scores=is_main_process())
    return train(plan, on_event, should_stop, evaluator)


def parse_training(argv: Sequence[str], prog: str = SCRIPT) -> defaults.Choices:
    """The settings of a command line, and what was chosen for them. Raises UserError; SystemExit
    for --help and --version."""
    # All processes of a launcher must have been given the same.
    given = agreement.by_all(
        lambda: given_by(argv, prog),
        lambda own: "\n".join([*own.words, agreement.in_lines(own.settings)]),
    )

    # PHOTOS WORD leaves the rest to the program.
    chosen = defaults.Choices(given.settings)
    if given.words:
        chosen = one_word.choose(given.words, given.settings, has_recipe=given.has_recipe)
        say(chosen.lines)
    require(chosen.all)
    defaults.choose_resolution(chosen)
    return chosen


class Given(NamedTuple):
    """What a command line gives."""

    words: list[str]
    settings: dict[str, Any]
    has_recipe: bool  # a file replaces the recipe


def given_by(argv: Sequence[str], prog: str) -> Given:
    """Words and settings of a command line, with those of its files. Raises UserError; SystemExit
    for --help and --version."""
    if not argv:
        asked = f"say which photos to train, and what they show, {one_word.AS_ONE_WORD}"
        raise UserError(f"{asked}; --help shows the flags.")

    # PHOTOS WORD, then the flags
    argv = underscored(argv)
    flags_from = [number for number, word in enumerate(argv) if word.startswith("-")]
    first_flag = flags_from[0] if flags_from else len(argv)
    words = argv[:first_flag]
    found, unknown = build_train_parser(prog).parse_known_args(argv[first_flag:])

    # Or the words after the flags
    if not words and len(unknown) == 2 and Path(find_asset(unknown[0])).is_dir():
        words = unknown
        unknown = []
    if unknown:
        raise UserError(unknown_flag_message(unknown[0]))
    settings, has_recipe = settings_of(vars(found), without_words=bool(words))
    return Given(words=words, settings=settings, has_recipe=has_recipe)


def run_trainer(plan: "Plan", stop: Callable[[], bool], last_words: Sequence[str] = ()) -> int:
    """Train a run, with its progress on the terminal.

    plan: of the run
    stop: whether someone asked to stop
    last_words: said behind all remarks

    Returns the exit code. Raises UserError.
    """
    from dreambooth_moslora.training.dry_run import advice

    say_loading()
    if is_main_process():
        for line in advice(plan):
            logger.warning("note: %s", line)
    say(last_words)

    progress = TerminalProgress()
    try:
        result = train_plan(plan, progress, stop)
    finally:
        progress.close()
    say(ending_of(plan, result))
    return INTERRUPTED if result.interrupted else DONE


def ending_of(plan: "Plan", result: "TrainResult") -> list[str]:
    """Where the adapter is, and of a run that was not stopped the most important advice of
    `explain`."""
    from dreambooth_moslora.training.run_advice import closing_advice, to_go_on
    from dreambooth_moslora.training.run_metrics import figures_of

    folder = result.run_dir
    step = result.step
    if result.interrupted and not step:
        return ["stopped before the first step: nothing was saved."]
    figures = figures_of(RunDir(folder), plan.photos)
    if result.interrupted:
        there = f"stopped at step {step}: the adapter so far is in {folder}"
        return [f"{there}; {to_go_on(figures)}"]
    load = f'pipe.load_lora_weights("{folder}") loads the adapter'
    text = f"done: {step} steps. {load}; {folder}/README.md says more."
    return [text, *(f"try next: {line}" for line in closing_advice(figures))]
