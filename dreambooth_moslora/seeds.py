"""Random numbers by name. torch is not imported until a generator is needed.

Random numbers depend on (seed, purpose, position), and not on earlier ones. So a resumed run
samples what an unbroken one would have sampled, without saved generator states, and two processes
sample what one process samples in two turns (compare NVlabs/edm2, which re-seeds each step).
"""

import hashlib
import random
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def compute_seed(*names: object) -> int:
    """Return a 63-bit seed for this combination of names and numbers."""
    digest = hashlib.blake2b("/".join(map(str, names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_rng(*names: object) -> random.Random:
    """Return Python's generator for these names, for crops and orders."""
    return random.Random(compute_seed(*names))


def seed_generator(*names: object) -> "torch.Generator":
    """Return a CPU generator for these names: its numbers do not depend on the training device."""
    import torch

    return torch.Generator().manual_seed(compute_seed(*names))


def shuffle_index(index: int, length: int, *names: object) -> tuple[int, int]:
    """Return (epoch, position) of a sample, when `length` samples are shuffled anew in each
    epoch."""
    epoch, offset = divmod(index, length)
    return epoch, shuffle_range(length, *names, epoch)[offset]


@lru_cache(maxsize=64)  # each step asks for the order of its epoch, once for each subject
def shuffle_range(length: int, *names: object) -> tuple[int, ...]:
    """Return the numbers from 0 to `length` - 1 in the order of these names."""
    return tuple(seed_rng("order", *names).sample(range(length), length))
