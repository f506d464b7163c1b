"""`keep_freed_memory` is measured from inside a process of its own: page faults of rounds of the
same allocations."""

import os
import subprocess
import sys

import psutil
import pytest

from dreambooth_moslora.disk.processes import (
    measure_peak_memory_gib,
)

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


def printed(code: str, *words: str, **environment: str) -> list[str]:
    """The words that a program prints, in a process of its own."""
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if done.returncode == 77:
        pytest.skip("no glibc here")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_freed_memory_is_found_again_by_the_next_round():
    """Three rounds of 160 MiB are 120 thousand pages; with the memory kept they fault in almost
    none."""
    kept, default = (int(printed(ROUNDS, mode)[0]) for mode in ("keep", "default"))
    assert kept * 20 < default


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
    ("code", "own", "used"),
    [
        pytest.param(ALLOCATOR, {}, "expandable_segments:True", marks=LINUX),
        pytest.param(ALLOCATOR, {"PYTORCH_ALLOC_CONF": SPLIT}, SPLIT, marks=LINUX),
        pytest.param(ALLOCATOR, {"PYTORCH_CUDA_ALLOC_CONF": SPLIT}, "None", marks=LINUX),
        (POLICY, {}, "PASSIVE 2000 False"),
        (POLICY, {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None False"),
        (POLICY, {"GOMP_SPINCOUNT": "77"}, "None 77 False"),
    ],
)
def test_gpu_memory_has_no_holes_and_idle_threads_sleep_soon_unless_a_person_chose_otherwise(
    code, own, used
):
    command = [sys.executable, "-c", code.format("dreambooth_moslora")]
    assert subprocess.check_output(command, text=True, env=PLAIN | own).strip() == used


ORDERS = {"dreambooth_moslora, torch": 2000, "torch, dreambooth_moslora": 300_000}


@pytest.mark.slow
@pytest.mark.parametrize(("order", "spins"), ORDERS.items())
def test_torch_s_threads_obey_it_where_the_package_is_imported_first(order, spins):
    """libgomp prints what it has read as it is loaded."""
    command, told = (
        [sys.executable, "-c", POLICY.format(order)],
        PLAIN | {"OMP_DISPLAY_ENV": "VERBOSE"},
    )
    said = subprocess.run(command, capture_output=True, text=True, env=told, check=True).stderr
    if "GOMP_SPINCOUNT" not in said:
        pytest.skip("torch has another OpenMP here")
    assert f"GOMP_SPINCOUNT = '{spins}'" in said


def test_the_peak_counts_what_was_held():
    before = measure_peak_memory_gib()
    if before is None:
        pytest.skip("no getrusage here")
    block = bytearray(b"1" * (300 << 20))
    assert measure_peak_memory_gib() > 0.25 and len(block)


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
kept = resident().rss
release_freed_memory()
print(full, kept, resident().rss)
"""


@pytest.mark.slow
def test_a_phase_that_is_over_gives_its_memory_back():
    """Kept until then; 10 blocks of 20 MB, below one that stays."""
    full, kept, left = map(int, printed(PHASE))
    assert full - kept < 20e6 and kept - left > 150e6


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


def test_a_process_hears_that_its_parent_was_killed_though_nobody_has_asked_how_that_ended():
    """A zombie is no parent."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", PARENT], **pipes) as parent:
        assert parent.stdout.readline() == "has a parent\n"
        (child,) = psutil.Process(parent.pid).children()
        os.kill(parent.pid, 9)
        assert parent.stdout.readline() == "alone\n"
        child.kill()
