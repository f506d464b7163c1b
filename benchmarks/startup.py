"""Startup times: imports, `--help`, and the quick start from the command to its first step and end.

    python -m benchmarks.startup [--json startup.json] [--skip-quick-start]

Each command runs in a fresh process; short ones run `--repeats` times, and the median counts. The
quick start writes to a temporary folder; its times are read from the run's own `metrics.jsonl`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

__all__ = ["main", "moments"]

SHORT_COMMANDS = {
    "import dreambooth_moslora": ["-c", "import dreambooth_moslora"],
    "train_dreambooth.py --help": ["train_dreambooth.py", "--help"],
    "python -m dreambooth_moslora --help": ["-m", "dreambooth_moslora", "--help"],
    "app.py --help": ["app.py", "--help"],
}
QUICK_START = "assets/configs/quickstart.toml"


def seconds_of(arguments: list[str], log: Path | None = None) -> float:
    """Wall seconds of `python ARGUMENTS`; raises CalledProcessError when it fails."""
    start = time.perf_counter()
    with open(log or "/dev/null", "w", encoding="utf-8") as output:
        subprocess.run(
            [sys.executable, *arguments], check=True, stdout=output, stderr=subprocess.STDOUT
        )
    return time.perf_counter() - start


def moments(events: list[dict], started: float) -> dict[str, float]:
    """Seconds after `started` (time.time) of the first step and the end, and the seconds of each
    phase."""
    first = next(e["time"] for e in events if e["type"] == "step")
    found = {"first step": first - started, "end": events[-1]["time"] - started}
    begins = [(e["phase"], e["time"]) for e in events if e["type"] == "phase"]
    steps = [e["step_sec"] for e in events if e["type"] == "step"]
    phases: dict[str, float] = {"training": sum(steps)}
    for (name, begin), (_, end) in pairwise([*begins, ("", events[-1]["time"])]):
        between = sum(
            e["step_sec"] for e in events if e["type"] == "step" and begin < e["time"] <= end
        )
        phases[name] = phases.get(name, 0) + end - begin - between
    return found | {f"in {name}": sec for name, sec in phases.items()}


def quick_start(config: str, extra: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        started = time.time()
        total = seconds_of(
            ["train_dreambooth.py", "--config", config, "--output_dir", str(run), *extra],
            Path(folder) / "log",
        )
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return moments([json.loads(line) for line in lines], started) | {"whole command": total}


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--config", default=QUICK_START)
    options.add_argument("--skip-quick-start", action="store_true")
    options.add_argument("--json", type=Path)
    options, extra = options.parse_known_args(arguments)
    results = {
        name: statistics.median(seconds_of(command) for _ in range(options.repeats))
        for name, command in SHORT_COMMANDS.items()
    }
    if not options.skip_quick_start:
        results |= {
            f"quick start, {name}": sec for name, sec in quick_start(options.config, extra).items()
        }
    for name, sec in results.items():
        print(f"{name:44} {sec:8.2f} s")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
