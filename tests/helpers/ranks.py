"""Starts processes as a launcher does, but without one that would end the others with the first."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def ended_ranks(module: str, port: int, *arguments: str, count: int = 2) -> list[tuple[int, str]]:
    """Run the module in `count` processes on CPUs; returns the exit code of each, and what it said on stderr."""
    ranks = [start_rank(module, rank, count, port, arguments) for rank in range(count)]
    try:
        said = [rank.communicate(timeout=600)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, words) for rank, words in zip(ranks, said, strict=True)]


def start_rank(module: str, rank: int, count: int, port: int, arguments: tuple[str, ...]) -> subprocess.Popen[str]:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    environment = {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment, **{name: str(value) for name, value in ranks.items()}},
        stderr=subprocess.PIPE,
        text=True,
    )
