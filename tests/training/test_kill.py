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


def faults(out: Path, count: int) -> subprocess.CompletedProcess:
    words = ["--kinds", "kill", "--variants", "class images", "--seed", "2"]
    command = [sys.executable, "-m", "benchmarks.faults", "--faults", str(count), "--out", str(out), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_resume_after_a_kill_ends_equal_and_the_faults_go_on_where_they_were(tmp_path):
    for count in (1, 2):
        done = faults(tmp_path, count)
        assert done.returncode == 0, done.stdout + done.stderr
        records = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
        assert [record["number"] for record in records] == list(range(count))
    assert all(record["codes"] in ([-9], [0]) for record in records)
    assert "| **all** | 2 |" in done.stdout
