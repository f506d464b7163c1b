"""How the processor's threads wait for each other; to be said before torch is imported."""

import os

__all__ = ["wait_briefly"]

SPINS = "2000"


def wait_briefly() -> None:
    """Let OpenMP's idle threads spin for a moment and then sleep, unless the person has chosen otherwise.

    Where they sleep at once, a small UNet's step takes nearly twice as long on two free cores; where they spin for long
    and other programs use the cores, ten times as long: they wait for threads that do not run.
    The number of spins is libgomp's; other runtimes sleep at once.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
