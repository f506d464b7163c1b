"""`python -m dreambooth_moslora together RUN_DIR… --at_once N`: the process that a fleet's worker starts for a group.

Each run folder has its `job_config.json` and its fleet's record. This process updates the record: running, then
how the run ended.
"""

import argparse
import logging
import socket
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth_moslora.cli.main import make_evaluator, message_for_known_error, start_log, warn_about
from dreambooth_moslora.cli.terminal import INTERRUPTED, StopRequest
from dreambooth_moslora.core import UserError, shortened, spelled_out
from dreambooth_moslora.disk.processes import CONFIG_NAME
from dreambooth_moslora.extras.cluster.records import Record, read_record, write_record
from dreambooth_moslora.settings.sources import read_json_table
from dreambooth_moslora.settings.table import TrainConfig, is_scored

if TYPE_CHECKING:
    from dreambooth_moslora.extras.cluster.together import Member
    from dreambooth_moslora.training.loop import TrainResult

HELP = "train several subjects of a fleet in one process"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", help="run folders with their settings")
    parser.add_argument("--at_once", type=int, default=2, help="how many of them train at the same time")
    parser.add_argument("--share", type=float, default=1.0, help="GPUs or cores that the process holds")


def run(args: argparse.Namespace) -> int:
    """Returns 130 when a run was stopped. Each run's record says how it ended."""
    from dreambooth_moslora.extras.cluster.together import train_together

    folders, costs = [Path(folder) for folder in args.run_dirs], Costs(args.share)
    with StopRequest() as stop:
        train_together(members(folders, stop, costs), args.at_once, costs.ended)
    states = [record.state for folder in folders if (record := read_record(folder)) is not None]
    return INTERRUPTED if "interrupted" in states else 0


def members(folders: Sequence[Path], stop: StopRequest, costs: "Costs") -> Iterator["Member"]:
    """Yield the runs one by one, as there is room. A faulty run is recorded as failed."""
    from dreambooth_moslora.extras.cluster.together import Member
    from dreambooth_moslora.plan.checks import check_folders
    from dreambooth_moslora.plan.plan import make_plan

    for folder in folders:
        if stop():
            record = read_record(folder) or Record("interrupted")
            write_record(folder, replace(record, state="interrupted", message="stopped before it began"))
            continue
        costs.began(folder)
        try:
            config = TrainConfig.from_dict(read_json_table(folder / CONFIG_NAME))
            check_folders(config)
            with logged_to(config):
                plan = make_plan(config)
                warn_about(plan)
        except Exception as error:
            costs.close(folder, "failed", line_for(error))
        else:
            evaluator = make_evaluator if is_scored(config) else lambda plan: None
            yield Member(plan, None, stop, evaluator, lambda config=config: logged_to(config))


@contextmanager
def logged_to(config: TrainConfig) -> Iterator[None]:
    """Log only to the run folder for the length of the block, since its events concern this run."""
    root = logging.getLogger()
    before = list(root.handlers)
    file_only = start_log(config)
    try:
        yield
    except UserError as error:
        file_only.error("%s", error)
        raise
    finally:
        for handler in [handler for handler in root.handlers if handler not in before]:
            root.removeHandler(handler)
            handler.close()


def line_for(error: Exception) -> str:
    """The line for the user; for a bug, the log has the traceback."""
    if isinstance(error, UserError):
        return shortened(spelled_out(" ".join(str(error).split())))
    if (line := message_for_known_error(error)) is not None:
        return line
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


class Costs:
    """The records of the current runs, each with its share of the time."""

    def __init__(self, share: float):
        self.share, self._since = share, time.monotonic()
        self._seconds: dict[Path, float] = {}

    def began(self, folder: Path) -> None:
        self._divide()
        self._seconds[folder] = 0.0
        record = read_record(folder) or Record("running")
        begun = replace(record, state="running", message="", starts=record.starts + 1, machine=socket.gethostname())
        write_record(folder, begun)

    def ended(self, member: "Member", result: "TrainResult | Exception") -> None:
        folder = Path(member.plan.config.output_dir)
        if isinstance(result, Exception):
            self.close(folder, "failed", line_for(result))
        else:
            self.close(folder, "interrupted" if result.interrupted else "done")

    def close(self, folder: Path, state: str, message: str = "") -> None:
        self._divide()
        spent, record = self._seconds.pop(folder), read_record(folder) or Record(state)
        hours = spent / 3600 * self.share
        done = replace(record, state=state, message=message, seconds=record.seconds + spent, hours=record.hours + hours)
        write_record(folder, done)

    def _divide(self) -> None:
        """Divide the time since the last change among the current runs."""
        now = time.monotonic()
        for folder in self._seconds:
            self._seconds[folder] += (now - self._since) / len(self._seconds)
        self._since = now
