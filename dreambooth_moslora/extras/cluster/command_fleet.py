"""`python -m dreambooth_moslora fleet SUBJECTS --out DIR`: a training for each of many subjects, on
many machines."""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth_moslora.cli import terminal, train_flags
from dreambooth_moslora.disk.paths import expand_user_path
from dreambooth_moslora.errors import UserError, escape_control_characters
from dreambooth_moslora.extras.cluster.fleet_subjects import REFUSED_SETTINGS, read_subjects
from dreambooth_moslora.plan import defaults

if TYPE_CHECKING:
    from dreambooth_moslora.extras.cluster.fleet import Ending

COMMAND_FLAGS = ("words", "out", "ray_address", "per_gpu", "cpus")
"""Flags of the fleet; all others are settings of each training."""
EPILOG = """examples:
  fleet photos/pets --out runs/pets --config assets/configs/sdxl.toml
      a folder of folders with photos, each with its subject.json {"token", "class_word"}
  fleet pets.csv --out /shared/pets --config assets/configs/sdxl.toml --ray_address auto
      a list with the columns folder, token, class, and any setting, on the cluster that this \
machine belongs to
  fleet status runs/pets"""


def fleet_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    help_text = "a folder of subject folders, or a .toml, .csv or .jsonl list; or: status DIR"
    parser.add_argument("words", metavar="SUBJECTS", nargs="+", help=help_text)
    help_text = "a run folder for each subject: a folder shared by all machines"
    parser.add_argument("--out", metavar="DIR", help=help_text)
    add_cluster_flags(parser)
    train_flags.add_training_flags(parser, hidden=REFUSED_SETTINGS)


def add_cluster_flags(
    parser: argparse.ArgumentParser, default_note: str = "this machine alone"
) -> None:
    """Add the flags about machines. `default_note`: what is used without a cluster."""
    help_text = f'the Ray cluster: "auto", HOST:PORT or ray://HOST:PORT (default: {default_note})'
    parser.add_argument("--ray_address", metavar="ADDRESS", help=help_text)
    help_text = "trainings at once on a GPU (default: as many as the estimate allows)"
    parser.add_argument("--per_gpu", metavar="N", type=int, help=help_text)
    help_text = "cores and threads of a training (default: 1)"
    parser.add_argument("--cpus", metavar="N", type=int, default=1, help=help_text)


def check_machine_shares(args: argparse.Namespace) -> None:
    """Raise UserError for a share of a machine that is none."""
    for name in ("per_gpu", "cpus"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1.")


def run_fleet(args: argparse.Namespace) -> int:
    """Train all subjects that are not done, or show how they stand. Returns the exit code of
    `close`."""
    if args.words[0] == "status" and len(args.words) == 2:
        return show_status(args.words[1])
    if len(args.words) > 1:
        raise UserError(
            f"`{args.words[1]}` belongs to no flag: "
            "give one folder or list of subjects, or `status DIR`."
        )
    check_places(args.words[0], args.out)
    check_machine_shares(args)

    # the settings that all subjects share
    flags = {name: value for name, value in vars(args).items() if name not in COMMAND_FLAGS}
    is_dry = flags.pop("dry_run", False)  # an option of the fleet, not of each run
    shared, _ = train_flags.resolve_settings(flags, without_words=True)
    if not shared.get("pretrained_model_name_or_path"):
        raise UserError("missing: --base; give it as a flag or in a --config file.")
    choices = defaults.Choices(shared)
    defaults.choose_resolution(choices)
    shared = choices.all_settings
    from dreambooth_moslora.extras.cluster.fleet import list_unfinished

    # who is there, and who is not done yet
    out = expand_user_path(args.out).resolve()
    subjects = read_subjects(Path(args.words[0]), shared, out)
    todo = list_unfinished(out, subjects)
    done = len(subjects) - len(todo)
    line = f"{len(subjects)} subjects: {done} are done, {len(todo)} are to be trained"
    print(line, file=sys.stderr)
    if is_dry:
        lines = []
        for subject, _ in todo:
            reason = f": {subject.error}" if subject.error else ""
            lines.append(subject.name + reason)
        print(escape_control_characters("\n".join(lines)))
        return 0
    return train_all(subjects, todo, out, args)


def check_places(source: str, out: str | None) -> None:
    """Raise UserError without `--out`, and for a URL."""
    if not out:
        raise UserError("missing: --out, the folder of all run folders.")
    for place in (source, out):
        if "://" in place:
            raise UserError(f"{place}: give a folder, which all machines share.")


def train_all(subjects: list, todo: list, out: Path, args: argparse.Namespace) -> int:
    """Train what is left, and close the fleet.

    subjects: all of them
    todo: those that are not done, with their marks
    out: the fleet's folder
    args: the flags

    Returns the exit code of `close`.
    """
    from dreambooth_moslora.extras.cluster.fleet import Machines, lock_fleet, run_fleet
    from dreambooth_moslora.extras.cluster.ray_fleet import connect

    # the folder is held, and the list is written, even when nothing is left to do
    progress = FleetProgress(len(subjects), len(todo))
    with lock_fleet(out, subjects):
        if todo:
            with connect(args.ray_address), terminal.StopRequest() as stop:
                machines = Machines.from_cluster(args.per_gpu, args.cpus)
                run_fleet(todo, out, machines, on_end=progress, should_stop=stop)
        return close_fleet(out, progress)


def close_fleet(out: Path, progress: "FleetProgress") -> int:
    """Write the index; returns the exit code: 0 all done, 1 some failed, 130 stopped."""
    from dreambooth_moslora.extras.cluster.records import load_rows, write_index

    print(write_index(out, load_rows(out)))

    # what is left to do
    if progress.failed:
        print(f"{progress.failed} subjects failed; run again to try them again", file=sys.stderr)
    if progress.remaining > progress.failed:
        print("stopped; the same command continues", file=sys.stderr)
        return terminal.EXIT_INTERRUPTED
    return 1 if progress.failed else 0


def show_status(place: str) -> int:
    """Print how each subject stands, and write the page of it. Raises UserError for no fleet."""
    from dreambooth_moslora.extras.cluster.records import format_status, load_rows, write_index

    out = expand_user_path(place).resolve()
    rows = load_rows(out)
    print(escape_control_characters("\n".join(format_status(rows))))
    print(write_index(out, rows))
    return 0


class FleetProgress:
    """Progress of a fleet: one line per subject, with the remaining time and the cost.

    total, remaining, failed, ended: numbers of subjects
    hours: of GPUs and of cores, by unit
    """

    def __init__(self, total: int, todo: int, clock: Callable[[], float] = time.monotonic):
        self.total = total
        self.remaining = todo
        self.failed = 0
        self.ended = 0
        self.clock = clock
        self.started = clock()
        self.hours: dict[str, float] = defaultdict(float)

    def __call__(self, ending: "Ending") -> None:
        record = ending.record
        if ending.is_retry:
            self.print_line(f"{ending.name}: {record.message}; it continues elsewhere")
            return
        self.ended += 1
        self.remaining -= record.state == "done"
        self.failed += record.state == "failed"
        self.hours[record.unit] += record.hours

        # how it ended; a failure should catch the eye
        end = f"{record.state}: {record.message}"
        if record.state == "done":
            end = f"{record.seconds:.0f} s"
        end = end.replace("failed: ", "FAILED: ").removesuffix(": ").removesuffix(".")

        # minutes left, if those to come take as long as those that have ended
        remaining_min = (
            (self.clock() - self.started) / self.ended * (self.remaining - self.failed) / 60
        )
        spent = ", ".join(f"{hours:.2f} {unit}-hours" for unit, hours in self.hours.items())
        done = f"{self.total - self.remaining}/{self.total}"
        self.print_line(
            f"{done} {ending.name}: {end}; about {remaining_min:.0f} min left, {spent} spent"
        )

    def print_line(self, line: str) -> None:
        print(escape_control_characters(line), file=sys.stderr, flush=True)
