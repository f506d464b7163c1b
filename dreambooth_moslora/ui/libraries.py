"""Torch, diffusers and transformers are imported by the first thread that needs them, while the others wait.

They import each other in circles: two threads that start at different places would find half-made modules.
"""

import logging
import threading

_ONE_AT_A_TIME = threading.Lock()
TELLS_PROMPTS = "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl"
"""The logger whose warning repeats the end of a prompt that is too long."""


def import_libraries() -> None:
    """Call it before importing, inside a function of the page, a module that needs one of them."""
    with _ONE_AT_A_TIME:
        import dreambooth_moslora.adapters.describe
        import dreambooth_moslora.generation.grids  # and by it the pipeline  # noqa: F401

        logging.getLogger(TELLS_PROMPTS).addFilter(_tells_no_prompt)


def _tells_no_prompt(record: logging.LogRecord) -> bool:
    return "your input was truncated" not in str(record.msg)
