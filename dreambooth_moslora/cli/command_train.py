"""Command `train`: from flags and files to settings, a plan and a run; defaults < --config < flags.

`train photos/dog dog` chooses all other settings for a folder and a word; a --config file replaces
the recipe. torch is not imported before the arguments are checked.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dreambooth_moslora import __version__
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.devices import assumed_vram_gib, is_main_process
from dreambooth_moslora.base.library_notes import disable_library_notes
from dreambooth_moslora.cli import one_word
from dreambooth_moslora.cli.parser import describe_unknown_flag, normalize_flags
from dreambooth_moslora.cli.run_log import start_log
from dreambooth_moslora.cli.terminal import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    StopRequest,
    TerminalProgress,
    print_lines,
    print_loading,
    run_to_exit_code,
)
from dreambooth_moslora.cli.train_flags import (
    SCRIPT,
    build_train_parser,
    require_settings,
    resolve_settings,
)
from dreambooth_moslora.disk.paths import find_asset, get_public_name
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError, escape_control_characters
from dreambooth_moslora.plan import agreement, defaults
from dreambooth_moslora.settings import parsing, setting_names, train_config

if TYPE_CHECKING:
    from typing import Unpack

    from dreambooth_moslora.disk.events import Event
    from dreambooth_moslora.photos.folder import PhotoReport
    from dreambooth_moslora.plan.plan import RunPlan
    from dreambooth_moslora.settings.train_settings import TrainSettings
    from dreambooth_moslora.training.loop import TrainResult

logger = logging.getLogger(__name__)


def train_main(argv: Sequence[str] | None = None) -> int:
    """Run `python train_dreambooth.py …`, alone or under `accelerate launch`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_to_exit_code(lambda: run_train(arguments))


def run_train(argv: list[str], prog: str = SCRIPT) -> int:
    """Describe or train the run of a command line, and return the exit code. Raises UserError."""
    choices = parse_training(argv, prog)
    config = train_config.TrainConfig.from_dict(choices.all_settings)

    # Only describe the run.
    if config.dry_run:
        from dreambooth_moslora.training.dry_run import describe_run

        report = describe_run(config, choices.photo_report, is_verbose=choices.is_verbose)
        print(escape_control_characters("\n".join([report, *choices.closing_lines])))
        return EXIT_DONE

    if assumed_vram_gib.get():
        raise UserError("--vram plans for a GPU that is elsewhere: give --dry_run too.")

    # Train. Mistakes are reported before the log creates a folder and before torch is imported.
    with StopRequest() as stop:
        check_folders_and_base(config)
        plan = plan_run(config, choices.photo_report)
        start_log(RunDir(config.output_dir))

        # Log the beginning and the end of the run, not on the terminal.
        base = get_public_name(config.pretrained_model_name_or_path)
        logger.info("begins: version %s, base %s", __version__, base)
        try:
            code = run_trainer(plan, stop, choices.closing_lines)
        except Exception as error:
            logger.info("stopped: %s", error, exc_info=not isinstance(error, UserError))
            raise
        logger.info("ended: %s", "stopped" if code == EXIT_INTERRUPTED else "done")
        return code


@setting_names.name_arguments_in_errors()
def train_subject(
    photos: str | Path,
    word: str,
    *,
    on_event: "Callable[[Event], None] | None" = None,
    should_stop: Callable[[], bool] | None = None,
    **settings: "Unpack[TrainSettings]",
) -> "TrainResult":
    """Teach a base one subject, as `train photos/dog dog` does: the program chooses all other
    settings.

    photos: the folder of photos
    word: the kind of thing that they show, such as "dog"
    on_event: called with every event of the run; by default a bar on standard error
    should_stop: returns whether to stop after this step, and save
    settings: any of `TrainConfig`, which are not chosen then; `base` is by default SDXL on a GPU,
        else "toy"

    The result's `run_dir` holds the adapter, `runs/dog` or a free name like it. Raises UserError.
    """
    # Check the user's settings before choosing the rest.
    user_settings = parsing.parse_settings(settings)
    choices = one_word.choose_settings([str(photos), word], user_settings, has_recipe=False)
    for line in filter(None, choices.closing_lines):
        logger.warning("%s", line)
    config = train_config.TrainConfig.from_dict(choices.all_settings)
    check_folders_and_base(config)

    # Train.
    progress = on_event or TerminalProgress()
    try:
        return train_plan(plan_run(config, choices.photo_report), progress, should_stop)
    finally:
        if on_event is None:
            progress.close()


def check_folders_and_base(config: train_config.TrainConfig) -> None:
    """Raise UserError for folders and a base that cannot be used, before anything is written."""
    from dreambooth_moslora.plan.validation import check_folders

    check_folders(config)
    refusal = Base.of(config).unreachable
    if refusal:
        raise UserError(refusal)


def plan_run(config: train_config.TrainConfig, report: "PhotoReport | None") -> "RunPlan":
    """Return the plan of a run. Raises UserError, also for a disk that it would fill."""
    from dreambooth_moslora.plan.plan import make_plan
    from dreambooth_moslora.training.dry_run import describe_disk_lack

    plan = make_plan(config, report)

    # A resumed run has written part of its files already.
    lack = describe_disk_lack(plan)
    if lack and not config.resume_from_checkpoint:
        raise UserError(f"{lack[0]}: free some of it, or give --output_dir on another disk.")
    return plan


def train_plan(
    plan: "RunPlan", on_event: "Callable[[Event], None]", should_stop: Callable[[], bool] | None
) -> "TrainResult":
    """Train, with the scores that the run's settings ask for. Raises UserError."""
    from dreambooth_moslora.training.loop import train

    # Each encoder of the scores would show a bar while it is loaded.
    disable_library_notes()
    evaluator = None
    if plan.config.is_scored:
        from dreambooth_moslora.evaluation.during_training import TrainingEvaluator

        evaluator = TrainingEvaluator(plan.config, plan.photos, scores=is_main_process())
    return train(plan, on_event, should_stop, evaluator)


def parse_training(argv: Sequence[str], prog: str = SCRIPT) -> defaults.Choices:
    """Return the settings of a command line, completed by the program's choices. Raises UserError;
    SystemExit for --help and --version."""
    # All processes of a launcher must have the same arguments.
    command_line = agreement.agree_on_result(
        lambda: parse_command_line(argv, prog),
        lambda command_line: "\n".join(
            [*command_line.positionals, agreement.format_settings(command_line.settings)]
        ),
    )

    # After PHOTOS WORD the program chooses the rest.
    choices = defaults.Choices(command_line.settings)
    if command_line.positionals:
        choices = one_word.choose_settings(
            command_line.positionals, command_line.settings, has_recipe=command_line.has_recipe
        )
        print_lines(choices.lines)
    choices.is_verbose = command_line.is_verbose
    require_settings(choices.all_settings)
    defaults.choose_resolution(choices)
    return choices


class CommandLine(NamedTuple):
    """Parsed command line."""

    positionals: list[str]
    settings: dict[str, Any]
    has_recipe: bool  # a file replaces the recipe
    is_verbose: bool  # of `--dry_run`


def parse_command_line(argv: Sequence[str], prog: str) -> CommandLine:
    """Return positionals and settings of a command line, with those of its files. Raises UserError;
    SystemExit for --help and --version."""
    if not argv:
        raise UserError(
            "say which photos to train, and what they show, "
            f"{one_word.USAGE_EXAMPLE}; --help shows the flags."
        )

    # PHOTOS WORD may come before the flags …
    argv = normalize_flags(argv)
    positionals = list(takewhile(lambda argument: not argument.startswith("-"), argv))
    flags, unknown = build_train_parser(prog).parse_known_args(argv[len(positionals) :])

    # … or after them.
    if not positionals and len(unknown) == 2 and Path(find_asset(unknown[0])).is_dir():
        positionals, unknown = unknown, []
    if unknown:
        raise UserError(describe_unknown_flag(unknown[0]))
    flag_values = vars(flags)
    is_verbose = flag_values.pop("verbose")
    settings, has_recipe = resolve_settings(flag_values, without_words=bool(positionals))
    return CommandLine(positionals, settings, has_recipe, is_verbose)


def run_trainer(plan: "RunPlan", stop: Callable[[], bool], final_lines: Sequence[str] = ()) -> int:
    """Train a run, with its progress on the terminal.

    plan: of the run
    stop: returns whether a stop was requested
    final_lines: printed after all remarks

    Returns the exit code. Raises UserError.
    """
    from dreambooth_moslora.training.dry_run import list_plan_advice

    print_loading()
    if is_main_process():
        for line in list_plan_advice(plan):
            logger.warning("note: %s", line)
    print_lines(final_lines)

    progress = TerminalProgress()
    try:
        result = train_plan(plan, progress, stop)
    finally:
        progress.close()
    print_lines(format_ending(plan, result))
    return EXIT_INTERRUPTED if result.interrupted else EXIT_DONE


def format_ending(plan: "RunPlan", result: "TrainResult") -> list[str]:
    """Return lines on where the adapter is, and after a finished run the most important advice of
    `explain`."""
    from dreambooth_moslora.training.run_advice import (
        NO_ADVICE,
        format_resume_command,
        judge_run,
        list_closing_advice,
    )
    from dreambooth_moslora.training.run_metrics import load_run_metrics

    # An interrupted run, which may have no adapter.
    folder = result.run_dir
    step = result.step
    if result.interrupted and not step:
        return ["stopped before the first step: nothing was saved."]
    metrics = load_run_metrics(RunDir(folder), plan.photos)
    if result.interrupted:
        return [
            f"stopped at step {step}: the adapter so far is in {folder}; "
            f"{format_resume_command(metrics)}"
        ]

    # A finished run.
    return [
        f'done: {step} steps. pipe.load_lora_weights("{folder}") loads the adapter; '
        f"{folder}/README.md says more.",
        judge_run(metrics),
        *(
            line if line == NO_ADVICE else f"try next: {line}"
            for line in list_closing_advice(metrics)
        ),
    ]
