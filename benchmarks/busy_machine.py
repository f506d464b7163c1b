"""A picture in a person's own program beside busy processes: what importing the package before torch changes.

    python -m benchmarks.busy_machine [--base toy] [--busy 4] [--steps 25] [--repeats 3]

The same script runs by turns in fresh processes, with `import dreambooth_moslora` before or after `import torch`:
libgomp's idle threads then spin for 2,000 or for 300,000 rounds. In the third, too late for the first, torch is told to
use one thread, which waits for no other. Medians of the picture's own seconds, without loading.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["main", "picture_sec"]

ROOT = Path(__file__).resolve().parents[1]
PICTURE = """
import sys, time
from dreambooth_moslora import GenerationParams, SubjectPipeline
pipeline = SubjectPipeline.from_base(sys.argv[1], device="cpu")
params = GenerationParams("a photo of a duck", steps=int(sys.argv[2]))
started = time.perf_counter()
pipeline.draw(params)
print(time.perf_counter() - started)
"""
PROGRAMS = {
    "the package before torch": "import dreambooth_moslora, torch",
    "torch before the package": "import torch, dreambooth_moslora",
    "torch first, one thread": "import torch, dreambooth_moslora; torch.set_num_threads(1)",
}
"""What a row is called -> how its script begins."""
CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="toy")
    parser.add_argument("--busy", type=int, default=4, help="busy processes beside it")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(arguments)
    seconds: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    with busy(args.busy):
        for _ in range(args.repeats):
            for name, found in seconds.items():
                found.append(picture_sec(PROGRAMS[name], args.base, args.steps))
    for name, found in seconds.items():
        spread = f"{min(found):.1f} to {max(found):.1f}"
        print(f"{name:26} {statistics.median(found):7.1f} s a picture ({spread})")


@contextmanager
def busy(count: int) -> Iterator[None]:
    """`count` processes that do nothing but use a core."""
    load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in load:
            process.kill()
            process.wait()


def picture_sec(beginning: str, base: str, steps: int) -> float:
    """Seconds of one picture, in a process that begins with these imports. The environment chooses nothing."""
    environment = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    command = [sys.executable, "-c", beginning + PICTURE, base, str(steps)]
    return float(subprocess.check_output(command, text=True, cwd=ROOT, env=environment).splitlines()[-1])


if __name__ == "__main__":
    main()
