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

from dreambooth_moslora.cli.parser import SCRIPT, Parser, parse_training, underscored
from dreambooth_moslora.cli.terminal import INTERRUPTED, StopRequest, TerminalProgress, survive_broken_pipes
from dreambooth_moslora.core import UserError, is_main_process, is_out_of_memory, shortened, spelled_out
from dreambooth_moslora.disk.processes import avoid_fragmentation, uncollected
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.settings.table import TrainConfig, is_scored

if TYPE_CHECKING:
    from dreambooth_moslora.evaluation.during_training import TrainingEvaluator
    from dreambooth_moslora.photos.folder import PhotoReport
    from dreambooth_moslora.plan.plan import Plan

COMMANDS = {
    "check": "cli.check",
    "caption": "cli.caption",
    "export": "cli.export",
    "evaluate": "cli.evaluate",
    "explain": "cli.explain",
    "compare": "extras.lab.command_compare",
    "queue": "cli.queue",
    "fleet": "extras.cluster.command_fleet",
    "generate": "cli.generate",
    "serve": "extras.serving.command_serve",
    "verify": "cli.verify",
    "doctor": "cli.doctor",
    "selftest": "cli.selftest",
    "info": "cli.info",
    "basis": "extras.lab.command_basis",
}
"""Each command and its module, which has HELP, `add_arguments(parser)` and `run(args)`."""
UNLISTED = {"together": "extras.cluster.together"}
"""What a fleet's worker starts for a group of subjects."""
DONE, OUR_BUG, MISTAKE = 0, 1, 2
INSTALLED, MODULE = "dreambooth-moslora", "python -m dreambooth_moslora"
"""The two ways to start `main`."""
FILE_MISTAKES = (
    *(errno.EBUSY, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR),
    *(errno.ENOTEMPTY, errno.EROFS, errno.ESTALE),
)
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
    argv = list(sys.argv[1:] if argv is None else argv)
    return exit_code(lambda: run_command(argv))


def train_main(argv: Sequence[str] | None = None) -> int:
    """`python train_dreambooth.py …`, alone or under `accelerate launch`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return exit_code(lambda: train_or_queue(argv))


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
    if isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
        return SYSTEM_ERRORS[error.errno].format(place=f": {error.filename}" if error.filename else "")
    if isinstance(error, PermissionError):
        return f"permission denied{f': {error.filename}' if error.filename else ', while a file was written'}."
    if isinstance(error, OSError) and error.errno in FILE_MISTAKES:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ', while a file was written'}."
    return None


def run_command(argv: list[str]) -> int:
    """Run the command that `argv` names. Raises UserError for an unknown one."""
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return DONE if argv else MISTAKE
    name, rest = argv[0], argv[1:]
    if name == "train":
        return train_or_queue(rest, f"{program()} train")
    if name == "app":
        from dreambooth_moslora.ui import app

        return app.main(rest, f"{program()} app")
    if name not in COMMANDS | UNLISTED:
        raise UserError(f"unknown command {name}: choose one of train, app, {', '.join(COMMANDS)}.")
    module = command(name)
    parser = Parser(prog=f"{program()} {name}", description=module.HELP)
    module.add_arguments(parser)
    return module.run(parser.parse_args(underscored(rest)))


def program() -> str:
    """The command that started this process, for the usage lines."""
    return INSTALLED if Path(sys.argv[0]).stem == INSTALLED else MODULE


def command(name: str):
    return import_module(f"dreambooth_moslora.{(COMMANDS | UNLISTED)[name]}")


def overview() -> str:
    lines = [f"usage: {program()} COMMAND …", "", "commands (each has --help):"]
    lines.append(f"  {'train':9} teach a subject; the same as train_dreambooth.py")
    lines.append(f"  {'app':9} open the page in the browser; the same as app.py")
    lines += [f"  {name:9} {command(name).HELP}" for name in COMMANDS]
    return "\n".join(lines)


def train_or_queue(argv: list[str], prog: str = SCRIPT) -> int:
    config, is_queued, report = parse_training(argv, prog)
    if not is_queued or config.dry_run:
        return run_training(config, report)
    print(spelled_out(command("queue").enqueue(config, argv)))
    return DONE


def run_training(config: TrainConfig, report: "PhotoReport | None" = None) -> int:
    """`report` is given where the photos were read before."""
    if config.dry_run:
        from dreambooth_moslora.training.dry_run import describe_run

        print(spelled_out(describe_run(config, report)))
        return DONE
    from dreambooth_moslora.plan.checks import check_folders

    with StopRequest() as stop:
        check_folders(config)  # before the log file creates or changes a folder
        file_only = start_log(config)
        try:
            return run_trainer(config, stop, report)
        except UserError as error:
            file_only.error("%s", error)
            raise
        except Exception:
            file_only.error("stopped by an error", exc_info=True)
            raise


def run_trainer(config: TrainConfig, stop: StopRequest, report: "PhotoReport | None" = None) -> int:
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
        print(closing_message(result.run_dir, result.step, result.interrupted), file=sys.stderr)
        for line in [] if result.interrupted else advice_on(plan):
            print(f"try next: {spelled_out(line)}", file=sys.stderr)
    return INTERRUPTED if result.interrupted else DONE


def warn_about(plan: "Plan") -> None:
    from dreambooth_moslora.training.dry_run import advice

    if is_main_process():
        for line in advice(plan):
            logging.getLogger(__name__).warning("note: %s", line)


def make_evaluator(plan: "Plan") -> "TrainingEvaluator":
    from dreambooth_moslora.evaluation.during_training import TrainingEvaluator

    return TrainingEvaluator(plan.config, plan.photos, scores=is_main_process())


def closing_message(run_dir: Path, step: int, interrupted: bool) -> str:
    if not interrupted:
        return (
            f'done: {step} steps. pipe.load_lora_weights("{run_dir}") loads the adapter; {run_dir}/README.md says more.'
        )
    if step == 0:
        return "stopped before the first step: nothing was saved."
    return f"stopped at step {step}: the adapter so far is in {run_dir}; --resume_from_checkpoint latest goes on."


def advice_on(plan: "Plan") -> list[str]:
    """The most important advice of `explain` on a run that has ended and was scored."""
    from dreambooth_moslora.training.explain import closing_advice, figures_of

    return closing_advice(figures_of(RunDir(plan.config.output_dir), plan.photos))


def start_log(config: TrainConfig) -> logging.Logger:
    """Send all log records to the run folder, and the main process's warnings also to the terminal.

    Returns a logger that writes only to the run folder: `exit_code` prints the last error on the terminal.
    """
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
