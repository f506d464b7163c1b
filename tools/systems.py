"""List uses of the standard library that one of the three systems does not have: `python -m
tools.systems`, a part of the lint.

It is what mypy finds on some of them and not on all: `os.sysconf` is an error on Windows alone.
What mypy says of all three is of types, and not asked here. The exit code is 1 if anything is
found.
"""

import subprocess
import sys
from pathlib import Path

SYSTEMS = ("linux", "darwin", "win32")
ROOT = Path(__file__).parents[1]


def check_system(system: str, target: str) -> set[str]:
    """mypy's lines about the target on that system. Raises RuntimeError when mypy cannot run."""
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--platform", system]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, target],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1):
        raise RuntimeError(f"mypy: {done.stdout}{done.stderr}")
    return {line for line in done.stdout.splitlines() if ": error: " in line}


def list_problems(target: str) -> list[str]:
    """List mypy's lines, each with its systems."""
    errors = {system: check_system(system, target) for system in SYSTEMS}
    partial = set.union(*errors.values()) - set.intersection(*errors.values())
    return [
        f"{line} ({', '.join(s for s in SYSTEMS if line in errors[s])})" for line in sorted(partial)
    ]


if __name__ == "__main__":
    lines = list_problems(str(ROOT / "dreambooth_moslora"))
    print("\n".join(lines) or "nothing is missing on Linux, macOS or Windows")
    sys.exit(bool(lines))
