"""Progress bars and notes of diffusers and transformers, which commands and the page turn off."""

import logging
import warnings


def disable_library_notes() -> None:
    """Turn off the libraries' progress bars while a base is loaded (not those of downloads), and
    notes that need no action."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    logging.getLogger("diffusers.models.modeling_utils").addFilter(is_not_empty_fp32_note)
    # `describe_black_images` reports it.
    warnings.filterwarnings("ignore", "invalid value encountered in cast")


def is_not_empty_fp32_note(record: logging.LogRecord) -> bool:
    """Return False for diffusers' note about layers to keep in fp32 whose list is empty."""
    return "should be kept in float32: []" not in record.getMessage()
