"""The command `train`: from flags and files to settings, a plan and a run; defaults < --config <
flags.

A switch may be written `--flag`, `--flag false` or `--no_flag`. `train photos/dog dog` chooses
every other setting for a folder and a word; a --config file replaces the recipe. Nothing imports
torch before the arguments are checked.
"""

import argparse
import logging
import re
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import Field
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from dreambooth_moslora import __version__
from dreambooth_moslora.base import machine
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.machine import is_main_process
from dreambooth_moslora.cli.parser import FOREIGN_FLAGS, Parser, underscored, unknown_flag_message
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
from dreambooth_moslora.disk.paths import (
    SUBJECT_FILE,
    find_asset,
    free_name,
    public_name,
)
from dreambooth_moslora.disk.run_folder import RunDir, is_checkpoint
from dreambooth_moslora.errors import UserError, spelled_out
from dreambooth_moslora.plan import agreement, choices
from dreambooth_moslora.settings import families, sources, table
from dreambooth_moslora.settings.rows import WORDS, Prompt, Subject

if TYPE_CHECKING:
    from dreambooth_moslora.disk.events import Event
    from dreambooth_moslora.evaluation.during_training import TrainingEvaluator
    from dreambooth_moslora.photos.folder import PhotoReport
    from dreambooth_moslora.plan.plan import Plan
    from dreambooth_moslora.training.loop import TrainResult

DESCRIPTION = (
    "Teach SDXL or another diffusion model one subject from a few photos, by a MoSLoRA "
    "(arXiv 2406.11909)."
)
# The name under which it is called as a script
SCRIPT = "train_dreambooth.py"
EXAMPLE = """examples:
  {command} photos/dog dog
      a folder and a word: the program chooses and prints the rest, and any flag below overrides it
  {command} photos/dog dog --base stabilityai/stable-diffusion-xl-base-1.0
  {command} --config assets/configs/quickstart.toml

Flags are those of diffusers' train_dreambooth_lora_sdxl.py, and more. Switches are undone by
--no_SWITCH. Ctrl-C finishes the step and saves; --resume_from_checkpoint latest goes on."""
DAILY = {
    "what is taught": (
        "pretrained_model_name_or_path",
        "instance_data_dir",
        "instance_prompt",
        "class_prompt",
        "token",
        "masks",
    ),
    "how long and how strong": (
        "max_train_steps",
        "exposures_per_photo",
        "learning_rate",
        "rank",
        "mixer",
        "resolution",
    ),
    "what is kept": ("output_dir", "resume_from_checkpoint", "seed"),
    "before it begins, and all other flags": ("memory", "dry_run"),
}
"""Title -> the settings that `--help` shows."""
NEEDED = "needed as a flag or by --config"
WITHOUT_WORDS = {
    "pretrained_model_name_or_path": f" ({NEEDED}, except with PHOTOS WORD)",
    "instance_data_dir": f" ({NEEDED}, except with PHOTOS WORD or --subjects)",
    "instance_prompt": f" ({NEEDED}, except with PHOTOS WORD or --subjects)",
}
"""What `train` needs, in its help; `require` asks for it."""
# Where runs go that have no --output_dir
RUNS = Path("runs")
# The end of messages about PHOTOS WORD
AS_ONE_WORD = "as in `train photos/dog dog`"
CONFIG_HELP = "settings from a .toml or .json file; flags override them"
# In characters, of what the short help shows
LONGEST_METAVAR = 30
# Type of a setting -> what its help calls a value
METAVARS = {int: "N", float: "X", str: "TEXT", tuple: "NAME", Prompt: "TEXT", Subject: "DIR"}


def train_main(argv: Sequence[str] | None = None) -> int:
    """`python train_dreambooth.py …`, alone or under `accelerate launch`."""
    words = list(sys.argv[1:] if argv is None else argv)
    return exit_code(lambda: run_train(words))


def run_train(argv: list[str], prog: str = SCRIPT) -> int:
    """Describe or train the run of a command line; returns the exit code. Raises UserError."""
    config, chosen = parse_training(argv, prog)
    report = chosen.photo_report

    # Only say what would be trained
    if config.dry_run:
        from dreambooth_moslora.training.dry_run import describe_run

        print(spelled_out(describe_run(config, report)))
        print(set_apart(chosen.last_words), end="")
        return DONE

    # Train it here
    with StopRequest() as stop:
        # Before the log file creates or changes a folder
        check_beforehand(config)

        # The log of the run folder also says how the run ended.
        file_only = start_log(config)
        base = public_name(config.pretrained_model_name_or_path)
        file_only.info("begins: version %s, base %s", __version__, base)
        try:
            code = run_trainer(config, stop, report, chosen.last_words)
            file_only.info("ended: %s", "stopped" if code == INTERRUPTED else "done")
            return code
        except Exception as error:
            file_only.error("stopped: %s", error, exc_info=not isinstance(error, UserError))
            raise


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
    given = Given(words=[str(photos), word], settings=table.check_each(settings), has_recipe=False)
    chosen = choose(given)
    for line in chosen.last_words:
        logging.getLogger(__name__).warning("%s", line)
    config = table.TrainConfig.from_dict(chosen.all)
    check_beforehand(config)

    progress = on_event or TerminalProgress()
    try:
        return train_plan(plan_with_room(config, chosen.photo_report), progress, should_stop)
    finally:
        if on_event is None:
            progress.close()


def check_beforehand(config: table.TrainConfig) -> None:
    """Raises UserError for folders and a base that cannot be used, before anything is written."""
    from dreambooth_moslora.plan.checks import check_folders

    check_folders(config)
    refusal = Base.of(config).unreachable
    if refusal:
        raise UserError(refusal)


def plan_with_room(config: table.TrainConfig, report: "PhotoReport | None") -> "Plan":
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
    evaluator = make_evaluator(plan) if plan.config.is_scored else None
    return train(plan, on_event, should_stop, evaluator)


def build_train_parser(prog: str = SCRIPT) -> Parser:
    """The parser of `train`'s flags; words come before them. Its --help shows those of DAILY."""
    command = f"python {SCRIPT}" if prog == SCRIPT else prog
    texts = {
        "description": DESCRIPTION,
        "epilog": EXAMPLE.format(command=command),
        "usage": f"{prog} [PHOTOS WORD] [--FLAG VALUE …]",
    }
    parser = Parser(prog=prog, add_help=False, **texts)

    # argparse's action `version` prints any text and exits.
    short = short_help(prog, texts)
    about = "the flags in daily use"
    parser.add_argument("-h", "--help", action="version", version=short, help=about)
    parser.add_argument("--help_all", action="help", help="all flags")
    parser.add_argument("--version", action="version", version=__version__)
    add_training_flags(parser, notes=WITHOUT_WORDS)
    return parser


def short_help(prog: str, texts: Mapping[str, str]) -> str:
    """The help with the flags in daily use alone."""
    parser = Parser(prog=prog, add_help=False, **texts)
    for title, names in DAILY.items():
        group = parser.add_argument_group(title)
        for name in names:
            add_flag(group, table.SETTINGS[name], WITHOUT_WORDS.get(name, ""))
    group.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
    about = f"all {len(table.SETTINGS)} settings, by topic"
    group.add_argument("--help_all", action="help", help=about)

    # It parses nothing: each flag has one name here, and long lists of words are left out.
    for action in parser._actions:
        action.option_strings = action.option_strings[:1]
        if len(str(action.metavar)) > LONGEST_METAVAR:
            action.metavar = "WORD"
        if action.nargs == "?":
            action.nargs = 0
    return parser.format_help()


def add_training_flags(
    parser: "Parser", hidden: Collection[str] = (), notes: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Add `--config` and a flag for each setting. What is parsed has the given settings alone.

    parser: gets the flags
    hidden: settings whose flags are understood, but not in the help
    notes: setting -> the end of its help
    """
    parser.is_of_training = True
    parser.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
    for title, rows in groupby(table.SETTINGS.values(), lambda item: item.metadata["group"]):
        group = parser.add_argument_group(title)
        for item in rows:
            add_flag(group, item, notes.get(item.name, ""), is_hidden=item.name in hidden)


def add_flag(group: Any, item: Field, note: str = "", *, is_hidden: bool = False) -> None:
    """Add the flag of a setting.

    group: of a parser
    item: the setting
    note: the end of its help. Without one, the default of a setting that is not required ends it
    is_hidden: leave it out of the help
    """
    kind = table.FIELD_TYPES[item.name][0]
    facts = item.metadata
    default = item.default

    # The help; argparse takes % for a format.
    has_default = not (default is None or default is False or default == ())
    if not note and has_default and not facts["required"]:
        note = f" (default: {' '.join(default) if isinstance(default, tuple) else default})"
    about = argparse.SUPPRESS if is_hidden else (facts["help"] + note).replace("%", "%%")

    # A flag that is not given leaves nothing behind: a file's setting is then seen.
    names = table.flags_of(item.name)
    options: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS, "help": about}
    if kind is bool:
        group.add_argument(*names, nargs="?", const=True, metavar="true|false", **options)
        options["help"] = argparse.SUPPRESS
        group.add_argument(f"--no_{item.name}", action="store_const", const=False, **options)
        return
    choices_shown = "{" + ",".join(facts["choices"]) + "}"
    group.add_argument(
        *names,
        nargs="+" if kind in (tuple, Prompt) else None,
        metavar=choices_shown if facts["choices"] else METAVARS[kind],
        **options,
    )


def parse_train_config(argv: Sequence[str], prog: str = SCRIPT) -> table.TrainConfig:
    """The resolved settings of a command line. Raises UserError; SystemExit for --help and
    --version."""
    return parse_training(argv, prog)[0]


def parse_training(
    argv: Sequence[str],
    prog: str = SCRIPT,
) -> tuple[table.TrainConfig, choices.Choices]:
    """Settings, and what was chosen for them. Raises UserError."""
    # All processes of a launcher must have been given the same.
    given = agreement.by_all(
        lambda: given_by(argv, prog),
        lambda own: "\n".join([*own.words, agreement.in_lines(own.settings)]),
    )

    # PHOTOS WORD leaves the rest to the program.
    chosen = choices.Choices(given.settings)
    if given.words:
        chosen = choose(given, say_loading)
        say(chosen.lines)
    require(chosen.all)
    choices.choose_resolution(chosen)

    return table.TrainConfig.from_dict(chosen.all), chosen


class Given(NamedTuple):
    """What a command line gives."""

    words: list[str]
    settings: dict[str, Any]
    has_recipe: bool  # a file replaces the recipe


def given_by(argv: Sequence[str], prog: str) -> Given:
    """Words and settings of a command line, with those of its files. Raises UserError; SystemExit
    for --help and --version."""
    if not argv:
        raise UserError(
            f"say which photos to train, and what they show, {AS_ONE_WORD}; --help shows the flags."
        )

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


def settings_of(
    flags: dict[str, Any], *, without_words: bool = False
) -> tuple[dict[str, Any], bool]:
    """The settings of flags and --config, and whether there is such a file. Raises UserError."""
    flags = dict(flags)
    file = flags.pop("config")

    # The recipe's file
    recipe = sources.load_settings(file) if file else {}
    unknown = next((name for name in recipe if name not in table.SETTINGS), "")
    if unknown in FOREIGN_FLAGS:
        raise UserError(f"--config {file}: {unknown}: {FOREIGN_FLAGS[unknown]}.")

    # A flag may replace another setting of the file, such as the photos by their other source.
    given = {*flags, WORDS} if without_words else {*flags}
    settings = {}
    for name, value in recipe.items():
        item = table.SETTINGS.get(name)
        if item is None or not given.intersection(item.metadata["yields_to"]):
            settings[name] = value
    return table.check_each(settings | flags), bool(file)


def require(settings: Mapping[str, Any]) -> None:
    """Raises UserError for missing settings."""
    missing = []
    for item in table.SETTINGS.values():
        if not item.metadata["required"]:
            continue
        is_said_by_subjects = item.metadata["per_subject"] and settings.get("subjects")
        # An empty prompt is one, which captions may stand in for.
        is_empty_prompt = item.name == "instance_prompt" and settings.get(item.name) == ""
        is_given = is_empty_prompt or str(settings.get(item.name, "")).strip()
        if not is_said_by_subjects and not is_given:
            missing.append(f"--{table.shown_flag(item.name)}")
    if not any(settings.get(name) for name in ("subjects", "instance_data_dir")):
        missing.append("--instance_data_dir")
    if missing:
        flags = ", ".join(missing)
        raise UserError(
            f"missing: {flags}; give it as a flag or in a --config file, or see --help."
        )


def choose(given: Given, before_torch: Callable[[], None] = lambda: None) -> choices.Choices:
    """All settings for the photos and the class in the given words; `before_torch` is called where
    PyTorch may have to be loaded. Raises UserError."""
    from dreambooth_moslora.photos.folder import photo_report

    # The words, and a wrong base before PyTorch is imported to ask for the GPU's memory
    folder, word = folder_and_word(given.words)
    settings = {name: table.checked_setting(name, value) for name, value in given.settings.items()}
    if settings.get("instance_data_dir"):
        raise UserError(
            f"{given.words[0]} and --instance_data_dir: give the folder of photos once."
        )
    base = settings.get("pretrained_model_name_or_path")
    if base:
        Base.find(base)

    # The base. For photos of one's own the GPU is asked, which needs PyTorch.
    if not (folder / SUBJECT_FILE).is_file():
        before_torch()
    chosen = choices.Choices(settings, {"instance_data_dir": str(folder)})
    if choose_base(chosen, folder):
        said = f"No GPU here: {choices.PRACTICE} is trained, and it cannot draw a real {word}."
        chosen.last_words = [said, choices.on_a_gpu(given.words[0], word)]

    # The recipe that fits the GPU's memory
    free_gib = None if chosen.base.is_toy else agreement.least_free_gib()
    exposures = choices.USUAL_EXPOSURES
    if not given.has_recipe:
        exposures = choices.choose_recipe(chosen, free_gib)

    # Prompts and the run's folder
    choices.choose_words(chosen, word)
    resumed_from = settings.get("resume_from_checkpoint")
    output = run_folder(word, resumed_from)
    goes_on = ", which goes on" if resumed_from and output.exists() else ""
    chosen.add(f"output: {output}{goes_on}", "output_dir", output_dir=str(output))

    # The photos are judged by the resolution; a recipe has it, a file may lack it.
    choices.choose_resolution(chosen)
    reading = table.TrainConfig.from_dict(chosen.all | {"early_stopping": None})
    chosen.photo_report = photo_report(reading)

    # Steps and scores depend on how many photos there are.
    choices.choose_steps(chosen, exposures, chosen.photo_report.photos)
    choices.choose_scores(chosen, chosen.photo_report.photos)
    return chosen


def choose_base(chosen: choices.Choices, folder: Path) -> bool:
    """Choose the base unless it is given. Returns whether for lack of a GPU it is the embedded
    one."""
    is_given = "pretrained_model_name_or_path" in chosen.given
    base = said = families.STOCK_SDXL
    is_for_lack = False

    # Photos of toys
    if (folder / SUBJECT_FILE).is_file():
        base = "toy"
        said = "the embedded one, as the photos are of its world"

    # No GPU. If PyTorch only cannot use the one that is there, that is put right first.
    elif agreement.least_free_gib() is None:
        line = "" if is_given else machine.unused_gpu()
        if line:
            without = "without it only the embedded base is trained, which knows toys alone"
            raise UserError(f"{line.rstrip('.')}; {without}: --base toy")
        base = "toy"
        said = "the embedded one, as there is no GPU here, and the embedded base knows toys alone"
        is_for_lack = not is_given
    chosen.add(f"base: {said}", "pretrained_model_name_or_path", pretrained_model_name_or_path=base)
    return is_for_lack


def set_apart(lines: Sequence[str]) -> str:
    """The lines between empty ones; "" for none."""
    return spelled_out("\n".join(["", *lines, "\n"])) if lines else ""


def folder_and_word(words: list[str]) -> tuple[Path, str]:
    """The folder of photos and the class. Raises UserError."""
    folder = Path(find_asset(words[0]))
    word = " ".join(words[1:2]).strip()
    if not folder.is_dir():
        kind = "it is a file" if folder.exists() else "there is no such folder"
        raise UserError(
            f"{words[0]}: {kind}; give the folder of photos first, then the word, {AS_ONE_WORD}."
        )

    # One word for the class, or several in quotes
    if word.startswith("-"):
        raise UserError(unknown_flag_message(word))
    if not word or "/" in word:
        raise UserError(f"{words[0]}: say in one word what it shows, {AS_ONE_WORD}.")
    if len(words) > 2:
        said = f"`{words[2]}` belongs to no flag: a class of several words goes in quotes"
        raise UserError(f'{said}, as in `train {words[0]} "{" ".join(words[1:])}"`.')
    return folder, word


def run_folder(word: str, resumed_from: str | None = None) -> Path:
    """`runs/dog`, or a free name like it; for a resumed run the folder of the named checkpoint,
    else the one that was stopped last; for several processes the first."""
    # A named checkpoint lies in its run.
    if resumed_from not in (None, "latest") and is_checkpoint(Path(resumed_from)):
        return Path(resumed_from).parent

    # A new run. Processes that start together cannot agree on a free name.
    name = re.sub(r"[^\w-]+", "_", word)[:60].strip("_") or "run"
    if not agreement.is_alone():
        return RUNS / name
    if not resumed_from:
        return RUNS / free_name(name, lambda taken: is_kept(RunDir(RUNS / taken)))

    # `latest`: of dog, dog_2, … dog_10 the one whose checkpoint is the newest, rather than one that
    # is done. One without a checkpoint may wait in the page's queue.
    own = re.compile(rf"{re.escape(name)}(_\d+)?")
    there = [RunDir(path) for path in RUNS.glob("*") if own.fullmatch(path.name)]
    saved = [run for run in there if run.latest_checkpoint()]
    stopped = [run for run in saved if run.ending() != "done"]

    def saved_at(run: RunDir) -> float:
        return (run.latest_checkpoint() or run.path).stat().st_mtime

    found = max(stopped or saved or there, key=saved_at, default=RunDir(RUNS / name))
    return found.path


def is_kept(run: RunDir) -> bool:
    """Whether a new run leaves the folder alone: it is there, and no run that ended in it without
    saving anything."""
    if not run.path.exists():
        return False
    is_empty = not (run.adapter_path.exists() or run.named_checkpoints())
    return not (is_empty and run.ending() in ("interrupted", "failed"))


def run_trainer(
    config: table.TrainConfig,
    stop: StopRequest,
    report: "PhotoReport | None" = None,
    last_words: Sequence[str] = (),
) -> int:
    """Plan and train a run, with its progress on the terminal.

    config: of the run
    stop: whether someone asked to stop
    report: on the photos, where they were read before
    last_words: said behind all remarks

    Returns the exit code. Raises UserError.
    """
    # The plan refuses the run, if it must, before torch is imported.
    plan = plan_with_room(config, report)
    say_loading()
    warn_about(plan)
    if is_main_process():
        print(set_apart(last_words), end="", file=sys.stderr)
    progress = TerminalProgress()
    try:
        result = train_plan(plan, progress, stop)
    finally:
        progress.close()
    if is_main_process():
        print_ending(plan, result)
    return INTERRUPTED if result.interrupted else DONE


def print_ending(plan: "Plan", result: "TrainResult") -> None:
    """Say where the adapter is, and of a run that was not stopped the most important advice of
    `explain`."""
    from dreambooth_moslora.training.explain import closing_advice, to_go_on
    from dreambooth_moslora.training.figures import figures_of

    folder = result.run_dir
    step = result.step
    if result.interrupted and not step:
        print("stopped before the first step: nothing was saved.", file=sys.stderr)
        return

    figures = figures_of(RunDir(folder), plan.photos)
    if result.interrupted:
        text = f"stopped at step {step}: the adapter so far is in {folder}; {to_go_on(figures)}"
        print(text, file=sys.stderr)
        return

    load = f'pipe.load_lora_weights("{folder}") loads the adapter'
    text = f"done: {step} steps. {load}; {folder}/README.md says more."
    print(text, file=sys.stderr)
    for line in closing_advice(figures):
        print(f"try next: {spelled_out(line)}", file=sys.stderr)


def warn_about(plan: "Plan") -> None:
    """Say the plan's advice in the first process's log and terminal."""
    from dreambooth_moslora.training.dry_run import advice

    if is_main_process():
        for line in advice(plan):
            logging.getLogger(__name__).warning("note: %s", line)


def make_evaluator(plan: "Plan") -> "TrainingEvaluator":
    """What scores the run while it trains; only the first process keeps scores."""
    from dreambooth_moslora.evaluation.during_training import TrainingEvaluator

    return TrainingEvaluator(plan.config, plan.photos, scores=is_main_process())


def start_log(config: table.TrainConfig) -> logging.Logger:
    """Send all records to the run folder, warnings also to the terminal; returns a logger for the
    folder alone."""
    # Warnings of libraries are records too; those about their next versions help nobody here.
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", category=FutureWarning)
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a full disk: no traceback for each record

    # One process writes; the others only say errors.
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.WARNING if is_main_process() else logging.ERROR)
    terminal.setFormatter(SpelledOut("%(message)s"))
    file = log_file(RunDir(config.output_dir)) if is_main_process() else logging.NullHandler()
    root.addHandler(terminal)
    root.addHandler(file)

    # A logger outside of the root's tree, so that the terminal does not get its records
    file_only = logging.Logger(__name__)
    file_only.addHandler(file)
    return file_only


class SpelledOut(logging.Formatter):
    """Escapes control characters, which a file name in a record may contain."""

    def format(self, record: logging.LogRecord) -> str:
        return spelled_out(super().format(record))


def log_file(run_dir: RunDir) -> logging.Handler:
    """The handler for the run's log. Raises OSError when the folder cannot be written."""
    run_dir.path.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(run_dir.log_path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(SpelledOut("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler
