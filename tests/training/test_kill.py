"""Two kills of `benchmarks/faults.py`: `.ci/run` tries thirty faults of all kinds, and a person a thousand."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and cc"),
]
ROOT = Path(__file__).parents[2]
TWICE = """
import sys
from contextlib import nullcontext
from benchmarks import faults

words = sys.argv[1:]
args = faults.parse(words)
with faults.prepared(args) as workshop:
    faults.prepared = lambda _: nullcontext(workshop)
    for count in ("1", "2"):
        sys.argv[1:] = [*words, "--faults", count]
        print("ended", faults.main(), [record["number"] for record in faults.read_records(args.out)], flush=True)
"""
"""The command for one fault, then for two, in one process: its unbroken runs take longer than the faults."""


def test_every_resume_after_a_kill_ends_equal_and_the_faults_go_on_where_they_were(tmp_path):
    from benchmarks.fault_runs import build_shim
    from benchmarks.faults import preloading

    words = ["--kinds", "kill", "--variants", "class images", "--seed", "2", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-c", TWICE, *words]
    environment = preloading(build_shim(tmp_path))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ends = [line for line in done.stdout.splitlines() if line.startswith("ended")]
    assert ends == ["ended 0 [0]", "ended 0 [0, 1]"], done.stdout + done.stderr
    records = [json.loads(line) for line in (tmp_path / "out" / "faults.jsonl").read_text().splitlines()]
    assert all(record["codes"] in ([-9], [0]) for record in records)
    assert "| **all** | 2 |" in done.stdout
