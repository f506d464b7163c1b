"""The programs' entry points. Exit codes: 0 done, 2 a user's mistake, 130 stopped, 1 a bug.

    python train_dreambooth.py …            train_main
    python -m dreambooth_moslora COMMAND …  main, as is the installed `dreambooth-moslora COMMAND …`

Nothing here imports torch before the arguments are checked, so that `--help` and mistakes are answered at once.
"""

import errno
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth_moslora import __version__
from dreambooth_moslora.cli.parser import SCRIPT, Parser, parse_training, underscored
from dreambooth_moslora.cli.terminal import INTERRUPTED, StopRequest, TerminalProgress, survive_broken_pipes
from dreambooth_moslora.core import UserError, is_main_process, is_out_of_memory, public_name, shortened, spelled_out
from dreambooth_moslora.disk.processes import avoid_fragmentation, uncollected
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.settings.rows import nearest
from dreambooth_moslora.settings.table import TrainConfig, is_scored

if TYPE_CHECKING:
    from dreambooth_moslora.evaluation.during_training import TrainingEvaluator
    from dreambooth_moslora.photos.folder import PhotoReport
    from dreambooth_moslora.plan.plan import Plan
    from dreambooth_moslora.training.loop import TrainResult

# fmt: off
COMMANDS = {
    "check": ("cli.photos", "judge a folder of photos and show the exact crops, before any training"),
    "caption": ("cli.photos", "write captions for photos that have none: the subject's words and the surroundings"),
    "export": ("cli.adapter_files",
        "turn a checkpoint's raw weights into LoRA files for diffusers and for ComfyUI, A1111, InvokeAI"),
    "evaluate": ("cli.evaluate", "measure how good an adapter is: report.html and scores.json"),
    "explain": ("cli.runs", "say what a run's figures mean, and which flag to try next"),
    "compare": ("extras.lab.command_compare",
        "train and score several kinds of adapter at an equal budget: tables, intervals, plots"),
    "queue": ("cli.runs", "list, order and train the runs that wait; `train … --queue` adds one"),
    "fleet": ("extras.cluster.command_fleet",
        "train many subjects on many machines (Ray); `fleet status DIR` shows their state"),
    "generate": ("cli.generate", "make pictures with a base and adapters, one by one or as a captioned grid"),
    "serve": ("extras.serving.command_serve", "answer HTTP requests with pictures of many adapters (Ray Serve)"),
    "verify": ("cli.verify", "train again by the recipe in a published file, and compare the files"),
    "doctor": ("cli.machine", "look for problems: versions, device, disk, a VAE that overflows"),
    "selftest": ("cli.machine",
        "train, resume and draw on this machine's device, and compare the results with its CPU"),
    "info": ("cli.adapter_files",
        "say what a LoRA file is: kind, rank, alpha, modules, base, trigger words, the mixer's figures"),
    "basis": ("extras.lab.command_basis", "learn A and B that many subjects share, for `train --basis FILE`"),
}
"""Each command: its module, which has `NAME_arguments(parser)` and `run_NAME(args)`, and its line of the help."""
# fmt: on
UNLISTED = {"together": ("extras.cluster.together", "train several subjects of a fleet in one process")}
"""What a fleet's worker starts for a group of subjects."""
DONE, OUR_BUG, MISTAKE = 0, 1, 2
INSTALLED, MODULE = "dreambooth-moslora", "python -m dreambooth_moslora"  # The two ways to start `main`.
FILE_MISTAKES = (
    *(errno.EBUSY, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR),
    *(errno.ENOTEMPTY, errno.EROFS, errno.ESTALE),
)
WHILE_WRITING = ", while a file was written"
SYSTEM_ERRORS = {
    errno.ENOSPC: "the disk is full{place}; free some and resume.",
    errno.EDQUOT: "your quota of the disk is used up{place}; free some and resume.",
    errno.EFBIG: "a file would be larger than the system allows{place}; raise the limit (`ulimit -f`) and resume.",
    errno.EIO: "the disk could not be read or written{place} (input/output error); look after it, then resume.",
    errno.EMFILE: "too many files are open{place}; raise the limit (`ulimit -n`) and resume.",
    errno.ENOMEM: "the system has no memory left{place}; close some programs and resume.",
    errno.ENFILE: "the system has too many open files{place}; close some programs and resume.",
}
OUT_OF_MEMORY = (
    "out of memory: try --gradient_checkpointing, --train_batch_size 1, --mixed_precision bf16 (fp16 on Nvidia GPUs "
    "before Ampere), a smaller --resolution or --base_quantization nf4; --dry_run estimates the need."
)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m dreambooth_moslora COMMAND …` or `dreambooth-moslora COMMAND …`."""
    return exit_code(lambda: run_command(list(sys.argv[1:] if argv is None else argv)))


def train_main(argv: Sequence[str] | None = None) -> int:
    """`python train_dreambooth.py …`, alone or under `accelerate launch`."""
    return exit_code(lambda: train_or_queue(list(sys.argv[1:] if argv is None else argv)))


def exit_code(run: Callable[[], int]) -> int:
    """Run, and return the exit code. An error becomes one line; a closed pipe (`| head`) does not end the run."""
    avoid_fragmentation()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns without a GPU, even if unused
    with survive_broken_pipes():
        try:
            return run()
        except UserError as error:
            return print_user_error(str(error))
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        except Exception as error:
            if (line := message_for_known_error(error)) is not None:
                return print_user_error(line)
            traceback.print_exc()
            return OUR_BUG


def print_user_error(text: str) -> int:
    print(f"error: {shortened(spelled_out(' '.join(text.split())))}", file=sys.stderr)
    return MISTAKE


def message_for_known_error(error: Exception) -> str | None:
    """One line for an error of the machine (memory, disk, permissions); None for any other error."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    if not isinstance(error, OSError):
        return None
    place = f": {error.filename}" if error.filename else ""
    if error.errno in SYSTEM_ERRORS:
        return SYSTEM_ERRORS[error.errno].format(place=place)
    if isinstance(error, PermissionError):
        return f"permission denied{place or WHILE_WRITING}."
    return f"{error.strerror}{place or WHILE_WRITING}." if error.errno in FILE_MISTAKES else None


def run_command(argv: list[str]) -> int:
    program = INSTALLED if Path(sys.argv[0]).stem == INSTALLED else MODULE
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {program} COMMAND …\n\ncommands (each has --help):")
        print("  train     teach a subject; the same as train_dreambooth.py")
        print("  app       open the page in the browser; the same as app.py")
        for name, (_, about) in COMMANDS.items():
            print(f"  {name:9} {about}")
        return DONE if argv else MISTAKE
    name, rest = argv[0], argv[1:]
    if name == "--version":
        print(__version__)
        return DONE
    if name == "train":
        return train_or_queue(rest, f"{program} train")
    if name == "app":
        from dreambooth_moslora.ui import app

        return app.main(rest, f"{program} app")
    if name not in COMMANDS | UNLISTED:
        known = ("train", "app", *COMMANDS)
        close = nearest(name, known)
        hint = f"did you mean {close}?" if close else f"choose one of {', '.join(known)}."
        raise UserError(f"unknown command {name}: {hint}")
    add_arguments, run = command(name)
    parser = Parser(prog=f"{program} {name}", description=(COMMANDS | UNLISTED)[name][1])
    add_arguments(parser)
    return run(parser.parse_args(underscored(rest)))


def command(name: str) -> tuple[Callable, Callable]:
    """What adds a command's arguments to a parser, and what runs it."""
    module = import_module(f"dreambooth_moslora.{(COMMANDS | UNLISTED)[name][0]}")
    return getattr(module, f"{name}_arguments"), getattr(module, f"run_{name}")


def train_or_queue(argv: list[str], prog: str = SCRIPT) -> int:
    config, is_queued, report = parse_training(argv, prog)
    if config.dry_run:
        from dreambooth_moslora.training.dry_run import describe_run

        print(spelled_out(describe_run(config, report)))
        return DONE
    if is_queued:
        from dreambooth_moslora.cli.runs import enqueue

        print(spelled_out(enqueue(config, argv)))
        return DONE
    from dreambooth_moslora.plan.checks import check_folders

    with StopRequest() as stop:
        check_folders(config)  # before the log file creates or changes a folder
        file_only = start_log(config)
        file_only.info("begins: version %s, base %s", __version__, public_name(config.pretrained_model_name_or_path))
        try:
            code = run_trainer(config, stop, report)
            file_only.info("ended: %s", "stopped" if code == INTERRUPTED else "done")
            return code
        except UserError as error:
            file_only.error("%s", error)
            raise
        except Exception:
            file_only.error("stopped by an error", exc_info=True)
            raise


def run_trainer(config: TrainConfig, stop: StopRequest, report: "PhotoReport | None" = None) -> int:
    """`report` is given where the photos were read before."""
    from dreambooth_moslora.plan.plan import make_plan

    plan = make_plan(config, report)  # refuses the run, if it must, before torch is imported
    with uncollected():
        from dreambooth_moslora.training.loop import train

    warn_about(plan)
    progress = TerminalProgress()
    evaluator = make_evaluator(plan) if is_scored(config) else None
    try:
        result = train(plan, progress, stop, evaluator)
    finally:
        progress.close()
    if is_main_process():
        print_ending(plan, result)
    return INTERRUPTED if result.interrupted else DONE


def print_ending(plan: "Plan", result: "TrainResult") -> None:
    """Say where the adapter is, and of a run that was not stopped the most important advice of `explain`."""
    folder, step = result.run_dir, result.step
    if not result.interrupted:
        text = (
            f'done: {step} steps. pipe.load_lora_weights("{folder}") loads the adapter; {folder}/README.md says more.'
        )
    elif step:
        text = f"stopped at step {step}: the adapter so far is in {folder}; --resume_from_checkpoint latest goes on."
    else:
        text = "stopped before the first step: nothing was saved."
    print(text, file=sys.stderr)
    if not result.interrupted:
        from dreambooth_moslora.training.explain import closing_advice, figures_of

        for line in closing_advice(figures_of(RunDir(plan.config.output_dir), plan.photos)):
            print(f"try next: {spelled_out(line)}", file=sys.stderr)


def warn_about(plan: "Plan") -> None:
    from dreambooth_moslora.training.dry_run import advice

    if is_main_process():
        for line in advice(plan):
            logging.getLogger(__name__).warning("note: %s", line)


def make_evaluator(plan: "Plan") -> "TrainingEvaluator":
    from dreambooth_moslora.evaluation.during_training import TrainingEvaluator

    return TrainingEvaluator(plan.config, plan.photos, scores=is_main_process())


def start_log(config: TrainConfig) -> logging.Logger:
    """Send all log records to the run folder, and the main process's warnings also to the terminal. Returns a logger
    that writes only to the run folder: `exit_code` prints the last error on the terminal."""
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", category=FutureWarning)
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.WARNING if is_main_process() else logging.ERROR)
    terminal.setFormatter(SpelledOut("%(message)s"))
    file = log_file(RunDir(config.output_dir)) if is_main_process() else logging.NullHandler()
    file_only = logging.Logger(__name__)
    file_only.addHandler(file)
    root.addHandler(terminal)
    root.addHandler(file)
    return file_only


class SpelledOut(logging.Formatter):
    """Escapes control characters, which a file name in a record may contain."""

    def format(self, record: logging.LogRecord) -> str:
        return spelled_out(super().format(record))


class LogFile(logging.FileHandler):
    """A log file that reports a failed write once, as on a full disk, instead of a traceback for each record."""

    is_lost = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        if not self.is_lost:
            print(f"note: {self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)
        self.is_lost = True


def log_file(run_dir: RunDir) -> logging.Handler:
    """The handler for the run's log. Raises UserError when the folder cannot be written."""
    try:
        run_dir.path.mkdir(parents=True, exist_ok=True)
        handler = LogFile(run_dir.log_path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"--output_dir {run_dir.path}: cannot be written: {error.strerror}.") from error
    handler.setFormatter(SpelledOut("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler
