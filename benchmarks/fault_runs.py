"""Short real trainings for `faults`, forked from a process that has imported everything; results
are compared by SHA-256.

A run's home is a folder with `photos/`, `cache/` and the run folder `dog/`. The training is real,
but class images take four denoising steps instead of fifty, and the encoders of scores are small
random ones. Linux.
"""

import ctypes
import importlib
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import RLock

from tqdm import tqdm

from dreambooth_moslora.disk.contents import hash_file
from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME

__all__ = [
    "COUNT",
    "CUT",
    "FAIL",
    "KILL",
    "NAME",
    "STEPS",
    "TORN",
    "VARIANTS",
    "RunEnd",
    "Run",
    "Shim",
    "Workshop",
]

ROOT = Path(__file__).resolve().parents[1]
NAME, STEPS, HALF = "dog", 4, 2
RUN_TIMEOUT_SEC = 300.0
COUNT, FAIL, CUT, KILL, TORN = 1, 2, 3, 4, 5
"""What the shim does at the chosen file operation."""

COMMON_SETTINGS = {
    "instance_prompt": "a photo of sks dog",
    "resolution": 64,
    "train_batch_size": 1,
    "max_train_steps": STEPS,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 2,
    "num_validation_images": 0,
    "learning_rate": 1e-2,
    "seed": 1,
    "report_to": "none",
    "target_modules": "to_q",
    "resume_from_checkpoint": "latest",
}
CLASS_SETTINGS = {"with_prior_preservation": "true", "class_prompt": "a photo of a dog"}
VARIANTS = {
    "class images": {
        **CLASS_SETTINGS,
        "num_class_images": 2,
        "sample_batch_size": 1,
        "caching": "disk",
    },
    "text encoders": {
        **CLASS_SETTINGS,
        "prior": "adapter_off",
        "train_text_encoder": "true",
        "caching": "disk",
    },
    "scored": {
        "evaluate_steps": 2,
        "num_validation_images": 1,
        "validation_steps": 2,
        "caching": "disk",
    },
    "uncached": {"caching": "off", "random_flip": "true"},
}


@dataclass(frozen=True)
class RunEnd:
    """`code` is negative for a signal, and None for a run that had to be killed because it hung."""

    code: int | None
    text: str
    seconds: float


class Shim:
    """Preloaded library (`fault_shim.c`) in one armed child."""

    def __init__(self, library: Path):
        self.path, self.library = library, ctypes.CDLL(str(library))

    def inject_fault(
        self, mode: int, at: int, error: int, sticky: bool, below: Path, trace: Path | None = None
    ) -> None:
        names = [os.fsencode(below), os.fsencode(trace or "")]
        self.library.fault_arm(mode, ctypes.c_long(at), error, int(sticky), *names)

    def shift_clock(self, at: int, shift_sec: int) -> None:
        """From the `at`-th reading of the wall clock on it is wrong by `shift_sec`."""
        self.library.fault_clock(ctypes.c_long(at), ctypes.c_long(shift_sec))


def build_shim(folder: Path) -> Path:
    """Compile the shim with `cc`."""
    library, source = folder / "fault_shim.so", Path(__file__).with_name("fault_shim.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


@dataclass
class Run:
    """Running training. `log` has its terminal output."""

    pid: int
    log: Path
    begun: float = field(default_factory=time.monotonic)

    def is_over_within(self, seconds: float) -> bool:
        """Wait at most `seconds`. An ended run can still be waited for."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return True
            time.sleep(0.005)
        return False

    def wait(self) -> RunEnd:
        in_time = self.is_over_within(RUN_TIMEOUT_SEC)
        if not in_time:
            os.kill(self.pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return RunEnd(code if in_time else None, text, time.monotonic() - self.begun)


@dataclass(frozen=True)
class Reference:
    """Results of unbroken runs of a variant.

    `final` has the digests of the published files, `steps` those of the adapter after each step,
    `best` that of the best step's; `trace` has (operation, path in the home) of each file operation
    in order.
    """

    final: dict[str, str]
    steps: set[str]
    best: str | None
    trace: list[tuple[str, str]]
    seconds: float


class Workshop:
    """Makes homes, starts runs in them, and holds the results of unbroken ones."""

    def __init__(self, folder: Path, shim: Shim):
        from tests.helpers.tiny import save_tiny_sdxl
        from tests.helpers.tiny_training import paint_photos

        self.folder, self.shim = folder, shim
        self.base, self.photos = save_tiny_sdxl(folder / "base"), paint_photos(folder / "photos")
        self.references: dict[str, Reference] = {}
        self.halves: dict[str, Path] = {}

    def prepare(self, variants: list[str]) -> None:
        """Import what a run imports, and run each variant unbroken."""
        make_light(self.folder)
        self.run_unbroken(
            self.create_home("warm"),
            "scored",
            before=partial(note_modules, self.folder / "modules"),
        )
        for name in (self.folder / "modules").read_text().split():
            import_quietly(name)
        disable_collection()
        for variant in variants:
            self.references[variant] = self.make_reference(variant)

    def create_home(self, name: str) -> Path:
        """Create a home with photos."""
        home = self.folder / name
        shutil.copytree(self.photos, home / "photos")
        return home

    def create_half_home(self, name: str, variant: str) -> Path:
        """Create a home with a run that was stopped after two of its four steps."""
        return Path(shutil.copytree(self.halves[variant], self.folder / name))

    def build_arguments(self, home: Path, variant: str, **changes: object) -> list[str]:
        """Build the command line of a run in `home`."""
        flags = {"pretrained_model_name_or_path": self.base, "instance_data_dir": home / "photos"}
        flags |= {
            "cache_dir": home / "cache",
            "output_dir": home / NAME,
            **COMMON_SETTINGS,
            **VARIANTS[variant],
            **changes,
        }
        plain = [f"--{flag}={value}" for flag, value in flags.items() if value != "true"]
        return [*plain, *(f"--{flag}" for flag, value in flags.items() if value == "true")]

    def start(
        self,
        home: Path,
        variant: str,
        before: Callable[[], object] = bool,
        log: str = "log",
        **changes: object,
    ) -> Run:
        """Start a process of `train_dreambooth.py`, which first calls `before`."""
        path, arguments = home / f"{log}.txt", self.build_arguments(home, variant, **changes)
        path.touch()  # the run may be killed before it opens its log
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            pid = os.fork()
            if not pid:
                run_training(arguments, path, before)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return Run(pid, path)

    def run_unbroken(self, home: Path, variant: str, **options: object) -> RunEnd:
        return self.run_until(STEPS, home, variant, **options)

    def run_until(
        self, step: int, home: Path, variant: str, before: Callable[[], object] = bool
    ) -> RunEnd:
        """Run until the step and stop, by a file that contains the number of steps; a run ends by
        itself at its last step."""

        def prepare_child() -> None:
            before()
            if step < STEPS:
                stop_at(step)

        ended, expected_code = (
            self.start(home, variant, before=prepare_child).wait(),
            130 if step < STEPS else 0,
        )
        if ended.code != expected_code:
            raise SystemExit(
                f"a run ({variant}) until step {step} ended with {ended.code}:\n{ended.text}"
            )
        return ended

    def make_reference(self, variant: str) -> Reference:
        """Stopped after each step; that of two steps is the half."""
        steps = set()
        for step in range(1, STEPS + 1):
            home = self.create_home(f"{variant} {step}")
            trace = home / "trace.txt"
            count = partial(self.shim.inject_fault, COUNT, 0, 0, False, home, trace)
            ended = self.run_until(step, home, variant, before=count)
            steps.add(hash_file(home / NAME / PUBLISHED_NAME))
            if step == HALF:
                self.halves[variant] = home
        operations = [line.split("\t") for line in trace.read_text().splitlines()]
        relative_operations = [(kind, os.path.relpath(path, home)) for kind, path in operations]
        return Reference(
            hash_published(home), steps, hash_best(home), relative_operations, ended.seconds
        )


def hash_published(home: Path) -> dict[str, str]:
    """Name -> SHA-256 of the existing adapter files."""
    names = (PUBLISHED_NAME, f"{NAME}.kohya.safetensors")
    return {name: hash_file(home / NAME / name) for name in names if (home / NAME / name).is_file()}


def hash_best(home: Path) -> str | None:
    path = home / NAME / "best" / PUBLISHED_NAME
    return hash_file(path) if path.is_file() else None


def run_training(arguments: list[str], log: Path, before: Callable[[], object]) -> None:
    """Turn this forked process into a training, exactly as a user starts it."""
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        tqdm.set_lock(RLock())  # its own is shared by all processes, and a killed one may hold it
        sys.argv = ["train_dreambooth.py", *arguments]
        before()
        end_if_interrupted()
        runpy.run_path(str(ROOT / "train_dreambooth.py"), run_name="__main__")
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def end_if_interrupted() -> None:
    """Handle a Ctrl-C from before the script's first line, which was blocked until here: no program
    could have answered it."""
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    except KeyboardInterrupt:
        sys.exit(130)


def stop_at(step: int) -> None:
    """Stop the run after `step` steps; called in a forked child."""
    from dreambooth_moslora.training.reporter import RunContext

    RunContext.is_stop_requested = lambda context: context.report.step >= step


def make_light(folder: Path) -> None:
    """Use fewer denoising steps and small encoders, in this process and its children."""
    from diffusers import StableDiffusionXLPipeline

    from dreambooth_moslora.evaluation import metrics
    from tests.helpers.tiny_encoders import tiny_encoders

    encoders, original_call = tiny_encoders(folder / "encoders"), StableDiffusionXLPipeline.__call__
    metrics.load_encoders = lambda *_, **__: encoders

    def draw(self: StableDiffusionXLPipeline, *args: object, **options: object) -> object:
        return original_call(self, *args, **{**options, "num_inference_steps": 4})

    StableDiffusionXLPipeline.__call__ = draw


def note_modules(path: Path) -> None:
    """At its end, write which modules this forked child has imported."""
    leave = os._exit

    def note_and_leave(code: int) -> None:
        path.write_text("\n".join(sys.modules))
        leave(code)

    os._exit = note_and_leave


def import_quietly(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception:  # a module made by another one, without a file
        return


def disable_collection() -> None:
    """Exclude all present objects from the children's garbage collection."""
    import gc

    gc.collect()
    gc.freeze()
