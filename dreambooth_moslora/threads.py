"""How the processor's threads wait for each other; to be said before torch is imported."""

import os

__all__ = ["wait_without_spinning"]


def wait_without_spinning() -> None:
    """Let OpenMP's idle threads sleep, unless the person has chosen otherwise.

    Threads that wait by spinning made a small UNet 60 times slower wherever another program used the cores.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
