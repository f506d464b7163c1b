"""Kill the real training script with SIGKILL at random moments, resume, and compare with a run that was left alone.

    python tests/helpers/kill_resume.py --kills 30

A moment is uniform over the life of a run: class images, caching, steps, saving, publishing. A run that is
killed is resumed until it ends; then the next one begins. Every resume has to succeed, and every end to be equal.
Processes are forked from one that has imported torch, which spares its import at each start. Linux and macOS.
"""

import argparse
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.helpers.tiny_training import adapter_sha256, paint_photos  # noqa: E402

MAX_STEPS = 6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return Harness(Path(folder), options.seed).run(options.kills)


class Harness:
    """`lifetime_sec` is what the last run took that was left alone: the machine's other load may change it."""

    def __init__(self, folder: Path, seed: int):
        from tests.helpers.tiny import save_tiny_sdxl

        self.folder, self.rng = folder, random.Random(seed)
        self.base, self.photos = save_tiny_sdxl(folder / "base"), paint_photos(folder / "photos")
        import dreambooth_moslora.training.loop  # noqa: F401  imported once, before the forks

        self.log, self.lifetime_sec = folder / "log.txt", 0.0

    def run(self, kills: int) -> int:
        self.kill_after(self.start("unbroken"), float("inf"))
        expected = adapter_sha256(self.folder / "unbroken")
        done = chain = 0
        while done < kills:
            chain, name = chain + 1, f"chain_{chain}"
            while done < kills and self.kill_after(self.start(name), self.rng.uniform(0, self.lifetime_sec)):
                done += 1
                print(f"kill {done}: {self.where(name)}", flush=True)
            self.finish(self.start(name))
            if adapter_sha256(self.folder / name) != expected:
                print(f"{name} ended differently")
                return 1
            shutil.rmtree(self.folder / name)
        print(f"{done} kills in {chain} runs: every resume succeeded and ended equal ({expected[:16]})")
        return 0

    def arguments(self, name: str) -> list[str]:
        flags = {
            "pretrained_model_name_or_path": self.base,
            "instance_data_dir": self.photos,
            "instance_prompt": "a photo of sks dog",
            "class_prompt": "a photo of a dog",
            "output_dir": self.folder / name,
            "resolution": 64,
            "train_batch_size": 1,
            "max_train_steps": MAX_STEPS,
            "checkpointing_steps": 1,
            "checkpoints_total_limit": 2,
            "num_class_images": 2,
            "sample_batch_size": 1,
            "num_validation_images": 0,
            "learning_rate": 1e-2,
            "seed": 1,
            "report_to": "none",
            "caching": "disk",
            "cache_dir": self.folder / f"{name}_cache",
            "target_modules": "to_q",
            "resume_from_checkpoint": "latest",
        }
        return ["--with_prior_preservation", *(f"--{flag}={value}" for flag, value in flags.items())]

    def start(self, name: str) -> int:
        """A process of `train_dreambooth.py`, exactly as a person starts it; returns its id."""
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.argv = ["train_dreambooth.py", *self.arguments(name)]
            runpy.run_path(str(ROOT / "train_dreambooth.py"), run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def finish(self, pid: int) -> None:
        self.check(os.waitpid(pid, 0)[1])

    def check(self, status: int) -> None:
        if os.waitstatus_to_exitcode(status):
            raise SystemExit(f"a run failed:\n{self.log.read_text(errors='replace')}")

    def kill_after(self, pid: int, seconds: float) -> bool:
        """Whether the process was still alive to be killed; one that failed by itself ends the harness."""
        begun = time.monotonic()
        while time.monotonic() < begun + seconds:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.check(status)
                self.lifetime_sec = time.monotonic() - begun
                return False
            time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return True

    def where(self, name: str) -> str:
        """What the run had reached, from its folder."""
        from dreambooth_moslora.core.run_folder import RunDir

        events = RunDir(self.folder / name).read_metrics()
        last = {key: value for key, value in (events[-1] if events else {}).items() if key in ("type", "phase", "step")}
        return ", ".join(f"{key} {value}" for key, value in last.items()) or "before the first event"


if __name__ == "__main__":
    sys.exit(main())
