"""Kinds of fault that `faults` injects. Each is a function of a trial that makes one run fail.

After it, the same command must be able to end like an unbroken run in the trial's home.
"""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.fault_damage import PARTS, damage_file, harm_photo, list_files
from benchmarks.fault_runs import CUT, FAIL, KILL, NAME, ROOT, RUN_TIMEOUT_SEC, STEPS, TORN, RunEnd
from benchmarks.fault_trial import Trial, build_fault, pick_operation, track_operation
from dreambooth_moslora.disk.run_folder import RunDir

__all__ = ["KINDS"]


def kill_at_a_moment(trial: Trial) -> None:
    trial.create_home()
    run = trial.start()
    if not run.is_over_within(trial.sample_moment()):
        os.kill(run.pid, signal.SIGKILL)
        trial.killed = True
    trial.end(run)
    trial.row = f"kill -9 at a random moment: {trial.get_phase()}"


def kill_at_an_operation(trial: Trial) -> None:
    """Kill just before a file operation, or in the middle of a write."""
    trial.create_home()
    number, phase = pick_operation(trial)
    mode = (
        trial.rng.choice((KILL, TORN)) if trial.reference.trace[number - 1][0] == "write" else KILL
    )
    trial.killed = True
    trial.run(build_fault(trial, mode, number))
    trial.row = f"kill -9 at a file operation: {phase}"


def stop(trial: Trial) -> None:
    trial.create_home()
    run, number = trial.start(), trial.rng.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
    if not run.is_over_within(trial.sample_moment()):
        os.kill(run.pid, number)
        trial.killed = True  # as it does before there is a handler
    trial.end(run)
    trial.row = f"{number.name} at a random moment"


def fill_disk(trial: Trial) -> None:
    """From some write on the disk is full."""
    trial.create_home()
    number, phase = pick_operation(trial, ("write", "create", "mkdir", "fsync"))
    trial.run(build_fault(trial, FAIL, number, errno.ENOSPC, sticky=True))
    trial.row = f"disk full from the n-th operation on: {phase}"


REFUSALS = {
    "write": (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG),
    "read": (errno.EIO,),
    "create": (errno.EACCES, errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EROFS),
    "open": (errno.EACCES, errno.EIO, errno.EMFILE),
    "fsync": (errno.EIO, errno.ENOSPC),
    "rename": (errno.EACCES, errno.EIO, errno.ENOSPC),
    "mkdir": (errno.EACCES, errno.EIO, errno.ENOSPC, errno.EROFS),
}


def inject_error(trial: Trial) -> None:
    """Let one file operation fail once."""
    trial.create_home()
    number, _ = pick_operation(trial)
    operation, path = trial.reference.trace[number - 1]
    errors = REFUSALS.get(operation, (errno.EACCES, errno.EIO))
    # without EACCES: it is left out
    error = errno.EIO if path.startswith("photos") else trial.rng.choice(errors)
    trial.run(build_fault(trial, FAIL, number, error))
    trial.row = f"{errno.errorcode[error]} at a file operation"


def cut_operation(trial: Trial) -> None:
    """Let a write or a read handle only half of its bytes."""
    trial.create_home()
    numbers = [
        n for n, (kind, _) in enumerate(trial.reference.trace, 1) if kind in ("write", "read")
    ]
    trial.run(build_fault(trial, CUT, track_operation(trial, trial.rng.choice(numbers))))
    trial.row = "a short write or read"


def damage_part(kind: str, trial: Trial) -> None:
    """Damage a file of a stopped run before it is resumed."""
    halves = trial.workshop.halves
    having = [variant for variant, home in halves.items() if list_files(home, kind)]
    trial.variant = (
        trial.variant if trial.variant in having or not having else trial.rng.choice(having)
    )
    trial.create_half_home()
    files = list_files(trial.home, kind)
    for path in trial.rng.sample(files, min(len(files), trial.rng.choice((1, 1, 2)))):
        trial.detail += f" {damage_file(path, trial.rng)} {path.relative_to(trial.home)}"
    trial.row = f"damaged: {kind}"


def mix_checkpoints(trial: Trial) -> None:
    """Replace one file of the newest checkpoint by that of the previous one."""
    trial.create_half_home()
    older, newest = RunDir(trial.home / NAME).list_checkpoints()
    part = trial.rng.choice(sorted(path.name for path in newest.iterdir()))
    shutil.copyfile(older / part, newest / part)
    trial.row, trial.detail = "damaged: a checkpoint with a part of another", part


def replace_photo_while_caching(trial: Trial) -> None:
    """Change or remove a photo at a random moment and restore it, then run again with the same
    cache."""
    trial.create_home()
    run = trial.start()
    run.is_over_within(trial.sample_moment())
    trial.detail = harm_photo(trial.home, trial.rng)
    trial.ended.append(run.wait())  # its result may come from other photos
    restore_photos(trial)
    shutil.rmtree(trial.home / NAME)
    trial.row = "photo changed or gone at a random moment"


def replace_photo_while_training(trial: Trial) -> None:
    """Change or remove a photo after all photos have been encoded."""
    if trial.variant == "uncached":
        trial.variant = next(iter(trial.workshop.references))
    trial.create_home()
    run = trial.start()
    metrics = trial.home / NAME / "metrics.jsonl"
    while not run.is_over_within(0.01):
        if metrics.is_file() and '"type": "step"' in metrics.read_text():
            break
    trial.detail = harm_photo(trial.home, trial.rng)
    trial.end(run)
    restore_photos(trial)
    trial.row = "photo changed or gone after the caching"


def restore_photos(trial: Trial) -> None:
    shutil.rmtree(trial.home / "photos", ignore_errors=True)
    shutil.copytree(trial.workshop.photos, trial.home / "photos")


def inject_nan(trial: Trial) -> None:
    """Set a weight to NaN before a step's loss, or after it."""
    trial.create_home()
    step, before = trial.rng.randrange(STEPS), trial.rng.random() < 0.5
    trial.run(partial(set_weight_to_nan, step, before))
    trial.row, trial.detail = (
        "NaN in a step",
        f"step {step} {'before' if before else 'after'} the loss",
    )


def set_weight_to_nan(step: int, before_the_loss: bool) -> None:
    """Set a weight to NaN, in a forked child."""
    import torch

    from dreambooth_moslora.training.step import TrainStep

    honest = TrainStep.accumulate_gradients

    def accumulate(train_step: TrainStep) -> object:
        losses = None if before_the_loss else honest(train_step)
        if train_step.step == step:
            with torch.no_grad():
                train_step.parameters[0].view(-1)[0] = float("nan")
        return honest(train_step) if losses is None else losses

    TrainStep.accumulate_gradients = accumulate


def shift_clock(trial: Trial) -> None:
    trial.create_home()
    at, shift = (
        trial.rng.randint(1, 300),
        trial.rng.choice((-1, 1)) * trial.rng.choice((1, 3600, 10**6, 10**9)),
    )
    trial.run(lambda: trial.workshop.shim.shift_clock(at, shift))
    trial.row, trial.detail = "the clock jumps", f"{shift} s"


LOCALES = (
    {"LC_ALL": "C"},
    {"LC_ALL": "POSIX", "PYTHONUTF8": "0"},
    {"LANG": "tr_TR.UTF-8"},
    {"LC_ALL": "xx_YY.odd"},
)
ENCODINGS = (
    {},
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "LC_ALL": "C"},
)


LIGHT_TRAINING = """
import runpy, sys
from pathlib import Path
from benchmarks.fault_runs import make_light
make_light(Path(sys.argv.pop(1)))
runpy.run_path("train_dreambooth.py", run_name="__main__")
"""


def run_odd_locale(trial: Trial) -> None:
    """Run in a process of its own, since Python reads the locale at its start. The small encoders
    keep a plain path."""
    light = trial.workshop.folder / f"{trial.name} light"
    trial.name = f"{trial.name} {pick_odd_name(trial.rng)}"
    trial.create_home()
    environment = trial.rng.choice(LOCALES) | trial.rng.choice(ENCODINGS)
    command = [sys.executable, "-c", LIGHT_TRAINING, light]
    command += trial.workshop.build_arguments(trial.home, trial.variant)
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        capture_output=True,
        timeout=RUN_TIMEOUT_SEC,
        check=False,
        cwd=ROOT,
    )
    trial.note(RunEnd(done.returncode, (done.stdout + done.stderr).decode(errors="replace"), 0.0))
    rename_undecodable(trial)
    trial.row, trial.detail = "odd locale and path", str(environment)


NAMES = (
    *(
        "with space",
        "ünï 犬",
        "new\nline",
        "tab\t",
        "'single \"double",
        "-dash",
        "--seed=2",
        "a" * 180,
        "😀",
    ),
    *(
        "%s {} %(x)d",
        "\x1b[31mred",
        "#hash?query&more",
        "C:\\back",
        "~",
        "$HOME",
        "*",
        "[ab]",
        "\udcff\udcfe",
    ),
    *("e\u0301", " ", "...", ";ls"),
)


def pick_odd_name(rng: random.Random) -> str:
    return rng.choice(NAMES)


def run_odd_path(trial: Trial) -> None:
    """Run in a folder with an odd name and kill the run."""
    trial.name = f"{trial.name} {pick_odd_name(trial.rng)}"
    trial.create_home()
    number, _ = pick_operation(trial)
    trial.killed = True
    trial.run(build_fault(trial, KILL, number))
    rename_undecodable(trial)
    trial.row = "odd path"


def rename_undecodable(trial: Trial) -> None:
    """Rename a folder whose name is not UTF-8, as a person does after the run was refused: a run's
    files cannot contain that name."""
    name = os.fsencode(trial.home).decode("utf-8", "replace")
    if name != str(trial.home):
        trial.home = trial.home.rename(name)


def start_two_runs(trial: Trial) -> None:
    trial.create_home()
    first = trial.start()
    first.is_over_within(trial.sample_moment())
    second = trial.start(log="log 2")
    if trial.rng.random() < 0.5 and not first.is_over_within(trial.sample_moment() / 2):
        os.kill(first.pid, signal.SIGKILL)
        trial.killed = True
    trial.end(first)
    trial.end(second)
    trial.row = "two runs on one folder"


def set_process_limit(kind: str, trial: Trial) -> None:
    """Call `setrlimit` in the child."""
    trial.create_home()
    size = {"file size": (500, 60_000), "open files": (1, 20), "memory": (10**5, 10**8)}[kind]
    amount = trial.rng.randint(*size)
    trial.run(partial(set_limit, kind, amount))
    trial.row, trial.detail = f"limit of {kind}", str(amount)


def set_limit(kind: str, amount: int) -> None:
    limit_ids = {
        "file size": resource.RLIMIT_FSIZE,
        "open files": resource.RLIMIT_NOFILE,
        "memory": resource.RLIMIT_AS,
    }
    if kind == "memory":
        amount += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    if kind == "open files":
        amount += len(os.listdir("/proc/self/fd"))
    resource.setrlimit(limit_ids[kind], (amount, resource.getrlimit(limit_ids[kind])[1]))


def remove_folder(trial: Trial) -> None:
    """Remove a folder that the run is about to use."""
    trial.create_home()
    run = trial.start()
    run.is_over_within(trial.sample_moment())
    checkpoint = f"{NAME}/checkpoint-{trial.rng.randint(1, STEPS)}"
    name = trial.rng.choice((NAME, f"{NAME}/class_images", "cache", checkpoint))
    shutil.rmtree(trial.home / name, ignore_errors=True)
    trial.end(run)
    trial.row, trial.detail = "a folder removed at a random moment", name


def cut_base(trial: Trial) -> None:
    """Shorten files of the base; it is restored before the run is resumed."""
    trial.create_half_home()
    base = shutil.copytree(trial.workshop.base, trial.home / "base")
    path = trial.rng.choice(
        sorted(p for p in base.rglob("*") if p.is_file() and p.name != "README.md")
    )
    path.write_bytes(path.read_bytes()[: trial.rng.randrange(max(1, path.stat().st_size))])
    trial.ended.append(trial.start(pretrained_model_name_or_path=base).wait())
    shutil.rmtree(trial.home / NAME)
    trial.row, trial.detail = "damaged: the base", str(path.relative_to(base))


KINDS: tuple[Callable[[Trial], None], ...] = (
    *(kill_at_a_moment, kill_at_an_operation) * 4,
    *(stop, fill_disk, inject_error, inject_error) * 2,
    *(partial(damage_part, kind) for kind in PARTS),
    *(
        cut_operation,
        mix_checkpoints,
        replace_photo_while_caching,
        replace_photo_while_training,
        inject_nan,
        shift_clock,
        run_odd_path,
    ),
    *(partial(set_process_limit, kind) for kind in ("file size", "open files", "memory")),
    *(start_two_runs, remove_folder, cut_base, run_odd_locale),
)
"""Taken in turn."""
