"""Memory, threads and parent of processes, each measured in a process of its own."""

import os
import subprocess
import sys

import psutil
import pytest

from dreambooth_moslora.disk.processes import measure_peak_memory_gib

ROUNDS = """
import resource, sys
from dreambooth_moslora.disk.processes import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(77)
def round_of_activations():
    return [bytearray(b"1") * (4 << 20) for _ in range(40)]
round_of_activations()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    round_of_activations()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run_python(code: str, *arguments: str) -> list[str]:
    """Run a program in a process of its own, and return the words that it prints."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("no glibc here")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_freed_memory_is_reused():
    """Three rounds of 160 MiB are 120 thousand pages; kept memory faults in almost none."""
    faults, default_faults = (int(run_python(ROUNDS, mode)[0]) for mode in ("keep", "default"))
    assert faults * 20 < default_faults


ALLOCATOR = """
import os
from dreambooth_moslora.disk.processes import enable_expandable_segments
enable_expandable_segments()
print(os.environ.get("PYTORCH_ALLOC_CONF"))
"""
POLICY = """
import os, sys
import {}
print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
"""
SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
PLAIN = {name: value for name, value in os.environ.items() if name not in SETTINGS}
LINUX = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="elsewhere PyTorch has no such blocks"
)
SPLIT = "max_split_size_mb:64"


@pytest.mark.parametrize(
    ("code", "environment", "printed"),
    [
        pytest.param(ALLOCATOR, {}, "expandable_segments:True", marks=LINUX),
        pytest.param(ALLOCATOR, {"PYTORCH_ALLOC_CONF": SPLIT}, SPLIT, marks=LINUX),
        pytest.param(ALLOCATOR, {"PYTORCH_CUDA_ALLOC_CONF": SPLIT}, "None", marks=LINUX),
        (POLICY, {}, "PASSIVE 2000 False"),
        (POLICY, {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None False"),
        (POLICY, {"GOMP_SPINCOUNT": "77"}, "None 77 False"),
    ],
)
def test_allocator_and_openmp_defaults_yield_to_the_environment(code, environment, printed):
    command = [sys.executable, "-c", code.format("dreambooth_moslora")]
    assert subprocess.check_output(command, text=True, env=PLAIN | environment).strip() == printed


ORDERS = {"dreambooth_moslora, torch": 2000, "torch, dreambooth_moslora": 300_000}


@pytest.mark.slow
@pytest.mark.parametrize(("order", "spins"), ORDERS.items())
def test_openmp_defaults_act_if_torch_is_imported_later(order, spins):
    """Read the report that libgomp prints when it is loaded."""
    command = [sys.executable, "-c", POLICY.format(order)]
    environment = PLAIN | {"OMP_DISPLAY_ENV": "VERBOSE"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch has another OpenMP here")
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


def test_peak_memory_includes_freed_blocks():
    bytearray(b"1" * (300 << 20))
    assert measure_peak_memory_gib() > 0.25


PHASE = """
import sys
import psutil
from dreambooth_moslora.disk.processes import release_freed_memory, keep_freed_memory
import torch
if not keep_freed_memory():
    sys.exit(77)
resident = psutil.Process().memory_info
blocks = [torch.ones(5_000_000) for _ in range(10)]
stays = torch.ones(1000)
full = resident().rss
del blocks
freed = resident().rss
release_freed_memory()
print(full, freed, resident().rss)
"""


@pytest.mark.slow
def test_freed_memory_is_released_after_a_phase():
    """Free 10 blocks of 20 MB, below one that stays."""
    full, freed, released = map(int, run_python(PHASE))
    assert full - freed < 20e6 and freed - released > 150e6


CHILD = """
import sys, time
from functools import partial
from dreambooth_moslora.disk.processes import watch_parent
watch_parent(int(sys.argv[1]), partial(print, "alone", flush=True))
print("has a parent", flush=True)
time.sleep(30)
"""
PARENT = f"""
import os, subprocess, sys
subprocess.Popen([sys.executable, "-c", {CHILD!r}, str(os.getpid())])
sys.stdin.read()
"""


def test_the_end_of_a_parent_is_noticed():
    """Count a zombie as an ended parent."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", PARENT], **pipes) as parent:
        assert parent.stdout.readline() == "has a parent\n"
        (child,) = psutil.Process(parent.pid).children()
        os.kill(parent.pid, 9)
        assert parent.stdout.readline() == "alone\n"
        child.kill()
