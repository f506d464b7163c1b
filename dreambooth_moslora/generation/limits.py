"""Limits of one picture on a machine that draws for many users: a larger one would block the queue."""

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.generation.params import GenerationParams

__all__ = ["MAX_STEPS", "check_size", "check_steps"]

MAX_STEPS = 100
MAX_AREA = 4
"""Largest area relative to the base's own: larger pictures take much longer and repeat themselves."""


def check_size(params: GenerationParams, resolution_px: int) -> None:
    """Raises UserError for a picture that is too large. `resolution_px` is the base's own side."""
    height, width = params.height_px or resolution_px, params.width_px or resolution_px
    if height * width > MAX_AREA * resolution_px**2:
        side = int(MAX_AREA**0.5 * resolution_px)
        raise UserError(f"{width} x {height} px is too large for this base; at most {side} x {side} px are drawn")


def check_steps(params: GenerationParams) -> None:
    """Raises UserError for a picture with too many steps."""
    if params.steps > MAX_STEPS:
        raise UserError(f"{params.steps} steps are too many; at most {MAX_STEPS} are drawn")
