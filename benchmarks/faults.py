"""Faults in short real trainings: each run is broken once, resumed, and compared with an unbroken
one.

    python -m benchmarks.faults [--faults 1000] [--out runs/faults] [--jobs 2] [--seed 0]
        [--kinds kill,disk]

It can be stopped with Ctrl-C and started again: faults in `OUT_PATH/faults.jsonl` are not repeated.
The table has for each kind the number of tries, the number of broken runs that ended well at once,
and the numbers of runs that lost        did not end like the unbroken run when the same command was
given again wrong       published a file that no unbroken run publishes traceback   showed a
traceback, crashed, or hung instead of printing one line

The homes of these stay in `OUT_PATH/kept`. Linux, with a C compiler.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.fault_kinds import KINDS
from benchmarks.fault_runs import VARIANTS, Shim, Workshop, build_shim, hash_best, hash_published
from benchmarks.fault_trial import Trial

PRELOADED = "DREAMBOOTH_FAULT_SHIM"
SIGNALS = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
FLAW_NAMES = ("lost", "wrong", "traceback")


def main() -> int:
    args = parse(sys.argv[1:])
    if PRELOADED not in os.environ:
        start_preloaded()
    with prepare_workshop(args) as workshop:
        return run_faults(workshop, args)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("runs/faults"))
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kinds", default="", help="only those with one of these words in their name"
    )
    parser.add_argument("--variants", default=",".join(VARIANTS), help="variants of the training")
    return parser.parse_args(argv)


@contextmanager
def prepare_workshop(args: argparse.Namespace) -> Iterator[Workshop]:
    """Make the workshop with the unbroken runs. This process has the shim preloaded."""
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        workshop = Workshop(Path(scratch), Shim(Path(os.environ[PRELOADED])))
        workshop.prepare(args.variants.split(","))
        yield workshop


def run_faults(workshop: Workshop, args: argparse.Namespace) -> int:
    """Try those without a record, and print the table; 1 if a run had a flaw."""
    args.out.mkdir(parents=True, exist_ok=True)
    inject(workshop, args)
    records = read_records(args.out)
    print(format_table(records))
    return int(any(record[flaw] for record in records for flaw in FLAW_NAMES))


def start_preloaded() -> None:
    """Restart this command with the shim preloaded."""
    shim = build_shim(Path(tempfile.mkdtemp(prefix="fault-shim-")))
    os.execve(
        sys.executable,
        [sys.executable, "-m", "benchmarks.faults", *sys.argv[1:]],
        build_environment(shim),
    )


def build_environment(shim: Path) -> dict[str, str]:
    """Build the environment of a process with the shim, and one thread per training."""
    environment = {
        PRELOADED: str(shim),
        "LD_PRELOAD": str(shim),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return os.environ | environment


def inject(workshop: Workshop, args: argparse.Namespace) -> None:
    """Distribute the remaining faults among `jobs` forked processes."""
    done = {record["number"] for record in read_records(args.out)}
    todo = [number for number in range(args.faults) if number not in done]
    workers = [spawn_worker(workshop, todo[job :: args.jobs], args) for job in range(args.jobs)]
    codes = [os.waitpid(pid, 0)[1] for pid in workers]
    if any(codes):
        raise SystemExit(
            "some faults could not be tried (above); the same command tries them again"
        )


def spawn_worker(workshop: Workshop, numbers: list[int], args: argparse.Namespace) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 0
    try:
        for number in numbers:
            code |= not run_fault(workshop, number, args)
    except BaseException:  # a forked process has no caller
        code = 1
    finally:
        sys.stderr.flush()
        os._exit(code)


def run_fault(workshop: Workshop, number: int, args: argparse.Namespace) -> bool:
    """Try one fault in a process and return whether it was recorded. The benchmark itself may fail,
    as on a machine that is too busy for its timeouts."""
    try:
        record = run_trial(workshop, number, args)
    except Exception as error:
        print(f"fault {number}: {type(error).__name__} {error}", file=sys.stderr)
        return False
    with (args.out / "faults.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    return True


def run_trial(workshop: Workshop, number: int, args: argparse.Namespace) -> dict:
    """Break a run, give the same command again, and compare."""
    kinds = [
        kind
        for kind in KINDS
        if not args.kinds or any(w in str(kind) for w in args.kinds.split(","))
    ]
    rng, begun = random.Random(f"{args.seed} {number}"), time.monotonic()
    variants = list(workshop.references)
    # that one is slow
    [variant] = rng.choices(variants, [1 if name == "scored" else 4 for name in variants])
    trial = Trial(workshop, f"fault {number}", variant, rng)
    kinds[number % len(kinds)](trial)
    went_on = [ended.code for ended in trial.ended]
    trial.run()
    record = {
        "number": number,
        "row": trial.row,
        "variant": trial.variant,
        "detail": trial.detail,
        "codes": went_on,
    }
    record |= {
        "lost": describe_loss(trial),
        "wrong": " ".join(trial.wrong),
        "traceback": find_traceback(trial),
    }
    record["seconds"] = round(time.monotonic() - begun, 1)
    if any(record[flaw] for flaw in FLAW_NAMES):
        print(json.dumps(record), flush=True)
        keep(trial, args.out / "kept" / str(number))
    shutil.rmtree(trial.home, ignore_errors=True)
    return record


def describe_loss(trial: Trial) -> str:
    """Describe how the last run differs from an unbroken one; empty if it does not."""
    last = trial.ended[-1]
    if last.code != 0:
        return f"code {last.code}: {last.text[-300:]}"
    if hash_published(trial.home) != trial.reference.final:
        return "other bytes"
    scores_known = "metrics" not in trial.row
    return (
        "another best step"
        if scores_known and hash_best(trial.home) != trial.reference.best
        else ""
    )


def find_traceback(trial: Trial) -> str:
    """Return the output of a run that ended with more than a line; empty if there is none."""
    for ended in trial.ended:
        is_ours = trial.killed and ended.code in SIGNALS
        if "Traceback (most recent call last)" in ended.text:
            return ended.text[-600:]
        if ended.code not in (0, 2, 130) and not is_ours:
            return f"code {ended.code}: {ended.text[-300:]}"
    return ""


def keep(trial: Trial, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, ended in enumerate(trial.ended):
        (folder / f"run {number}.txt").write_text(ended.text, encoding="utf-8")
    shutil.copytree(trial.home, folder / "home", dirs_exist_ok=True, symlinks=True)


def read_records(out: Path) -> list[dict]:
    path = out / "faults.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def format_table(records: list[dict]) -> str:
    """Format the results as Markdown."""
    rows = defaultdict(list)
    for record in records:
        rows[record["row"]].append(record)
    lines = [
        "| fault | tried | ended well at once | lost | wrong | traceback |",
        "|---|---|---|---|---|---|",
    ]
    lines += [format_line(row, results) for row, results in sorted(rows.items())]
    return "\n".join([*lines, format_line("**all**", records)])


def format_line(row: str, records: list[dict]) -> str:
    well = sum(not any(record["codes"]) for record in records)
    flaws = [sum(bool(record[flaw]) for record in records) for flaw in FLAW_NAMES]
    return f"| {' | '.join(map(str, [row, len(records), well, *flaws]))} |"


if __name__ == "__main__":
    sys.exit(main())
