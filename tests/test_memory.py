"""`keep_freed_memory` is measured from inside a process of its own: page faults of rounds of the same allocations."""

import subprocess
import sys

import pytest

from dreambooth_moslora.memory import peak_memory_gib

ROUNDS = """
import resource, sys
from dreambooth_moslora.memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(77)
import torch
def round_of_activations():
    return [torch.full((1 << 20,), 1.0) for _ in range(40)]
round_of_activations()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    round_of_activations()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", ROUNDS, mode], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("no glibc here")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_freed_memory_is_found_again_by_the_next_round():
    """Three rounds of 160 MiB are 120 thousand pages; with the memory kept they fault in almost none."""
    assert page_faults("keep") * 20 < page_faults("default")


def test_the_peak_counts_what_was_held():
    before = peak_memory_gib()
    if before is None:
        pytest.skip("no getrusage here")
    block = bytearray(b"1" * (300 << 20))
    assert peak_memory_gib() > 0.25 and len(block)
