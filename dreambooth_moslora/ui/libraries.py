"""Torch, diffusers and transformers are imported by whichever thread needs them first, while the others wait.

They import each other in circles: two threads that begin at different places find half-made modules.
"""

import threading

__all__ = ["import_libraries"]

_ONE_AT_A_TIME = threading.Lock()


def import_libraries() -> None:
    """To be called before any import, inside a function of the page, of a module that needs one of them."""
    with _ONE_AT_A_TIME:
        import dreambooth_moslora.adapters.describe
        import dreambooth_moslora.generation.grids  # and by it the pipeline  # noqa: F401
