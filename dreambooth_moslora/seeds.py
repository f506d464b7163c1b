"""Random draws by name. They import no torch before they are asked for a generator.

A draw depends on (seed, what, where), and not on earlier draws. So a resumed run draws what an
unbroken one would have drawn, without saved generator states, and two processes draw what one
process draws in two turns (compare NVlabs/edm2, which re-seeds each step).
"""

import hashlib
import random
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def compute_seed(*names: object) -> int:
    """A 63-bit seed for this combination of names and numbers."""
    digest = hashlib.blake2b("/".join(map(str, names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_rng(*names: object) -> random.Random:
    """Python's generator, for crops and orders."""
    return random.Random(compute_seed(*names))


def seed_generator(*names: object) -> "torch.Generator":
    """A CPU generator: its numbers do not depend on the device that trains."""
    import torch

    return torch.Generator().manual_seed(compute_seed(*names))


def shuffle_index(index: int, length: int, *names: object) -> tuple[int, int]:
    """(epoch, slot) at `position`, when `length` slots are shuffled anew in each epoch."""
    epoch, offset = divmod(index, length)
    return epoch, shuffle_range(length, *names, epoch)[offset]


@lru_cache(maxsize=64)  # a run asks for one epoch's many times, of each of its subjects
def shuffle_range(length: int, *names: object) -> tuple[int, ...]:
    """The numbers from 0 to `length` - 1 in the order of these names."""
    return tuple(seed_rng("order", *names).sample(range(length), length))
