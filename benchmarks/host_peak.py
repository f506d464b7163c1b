"""Peak resident memory of whole processes that train full-size SDXL on a CPU: from the command to
the end.

    python -m benchmarks.random_sdxl --out base && python -m benchmarks.host_peak --base base
    python -m benchmarks.host_peak --base base --arms kept floor

Random bf16 weights, batch 1, rank 4, a few steps without samples. `floor` and `diffusers` are those
of `train_step`: they make their weights instead of reading them. One process after the other; the
kernel's own figure (getrusage).
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

__all__ = ["ARMS", "build_command", "measure_peak_gb"]

TRAINER_ARMS = {
    "kept": [],
    "recomputed": ["--gradient_checkpointing"],
}
OTHER_ARMS = ("floor", "diffusers", "diffusers-checkpointing")
ARMS = (*TRAINER_ARMS, *OTHER_ARMS)
PHOTOS = 3


def build_command(
    arm: str, base: Path, folder: Path, resolution_px: int, steps: int, size: str = "sdxl"
) -> list[str]:
    """`folder` is empty; photos and the run go there."""
    if arm in OTHER_ARMS:
        settings = [
            f"--alone={arm}:{resolution_px}",
            "--rank=4",
            "--warmup=0",
            f"--steps={steps}",
            f"--size={size}",
        ]
        return [sys.executable, "-m", "benchmarks.train_step", *settings]
    (folder / "photos").mkdir()
    for number in range(PHOTOS):
        Image.new("RGB", (resolution_px, resolution_px), (60 * number, 90, 200)).save(
            folder / f"photos/{number}.png"
        )
    settings = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": folder / "photos",
        "instance_prompt": "a photo of sks dog",
        "output_dir": folder / "run",
        "resolution": resolution_px,
        "train_batch_size": 1,
        "max_train_steps": steps,
        "mixed_precision": "bf16",
        "num_validation_images": 0,
        "report_to": "none",
        "seed": 0,
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "train_dreambooth.py", *flags, *TRAINER_ARMS[arm]]


def measure_peak_gb(command: list[str]) -> float:
    """Run the command and return its peak memory in GB. It is at least the peak of this process,
    which must be small. Raises CalledProcessError where the command fails."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base", type=Path, required=True, help="a folder that benchmarks.random_sdxl made"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    for arm in args.arms:
        with tempfile.TemporaryDirectory() as folder:
            peak = measure_peak_gb(
                build_command(arm, args.base, Path(folder), args.resolution, args.steps)
            )
        print(f"{arm:26} {peak:6.2f} GB", flush=True)


if __name__ == "__main__":
    main()
