"""What fits on a GPU while pictures are drawn: all models or one at a time, and which picture size."""

import torch
from diffusers import DiffusionPipeline
from torch import nn

from dreambooth_moslora.base.gpu_memory import GIB, free_gib
from dreambooth_moslora.core.errors import UserError

__all__ = ["CPU", "Home", "max_pixels", "must_offload", "weights_gib"]

CPU = torch.device("cpu")
ROOM_BESIDE_WEIGHTS = 1.5
"""If free memory over weights is less, models take turns: SDXL in half precision needs 9.7 GiB to avoid that."""
UNET_BYTES_A_PIXEL = 400
"""Of the UNet in half precision per pixel of the picture, with and without the prompt together."""


def weights_gib(model: DiffusionPipeline | nn.Module) -> float:
    """GiB of all weights, in their current dtype."""
    parts = [model] if isinstance(model, nn.Module) else model.components.values()
    weights = [weight for part in parts if isinstance(part, nn.Module) for weight in part.parameters()]
    return sum(weight.numel() * weight.element_size() for weight in weights) / GIB


def must_offload(free_gib: float | None, all_weights_gib: float) -> bool:
    """Whether the models must take turns on the device.

    `free_gib` None means unlimited memory.
    """
    return free_gib is not None and free_gib < ROOM_BESIDE_WEIGHTS * all_weights_gib


def max_pixels(free_gib: float) -> int:
    """The largest picture that the UNet can denoise in the memory free beside its weights.

    The decoder sets no limit: it can work in tiles.
    """
    return int(max(0.0, free_gib) * GIB / UNET_BYTES_A_PIXEL)


class Home:
    """The device that a pipeline draws on. A resting pipeline is in the CPU's memory.

    If the device is short of memory, the models take turns on it, and the pipeline rests between calls.
    """

    def __init__(self, pipeline: DiffusionPipeline, device: torch.device) -> None:
        self.pipeline, self.device = pipeline, device
        self.is_resting = pipeline.device != device

    @property
    def is_short(self) -> bool:
        """Whether the device has too little free memory for a resting pipeline's models."""
        return self.is_resting and must_offload(free_gib(self.device), weights_gib(self.pipeline))

    def enter(self) -> None:
        """Move all models to the device, or let them take turns until `end_turns`."""
        if self.is_short:
            self.pipeline.enable_model_cpu_offload(device=self.device)
        elif self.is_resting:
            self.pipeline.to(self.device)
            self.is_resting = False

    def end_turns(self) -> None:
        """Remove the models that took turns."""
        if self.is_resting:
            self.leave()

    def leave(self) -> None:
        self.is_resting = True
        self.pipeline.remove_all_hooks()
        self.pipeline.to(CPU, silence_dtype_warnings=True)
        torch.cuda.empty_cache()

    def check_size(self, height_px: int, width_px: int) -> None:
        """Raises UserError for a picture that cannot fit, before its first step. Call it after `enter`."""
        free = free_gib(self.device)
        if free is None:
            return
        most = max_pixels(free - weights_gib(self.pipeline.unet) if self.is_resting else free)
        if height_px * width_px > most:
            side = int(most**0.5) // 32 * 32
            raise UserError(
                f"there is too little memory for {height_px} x {width_px} px: at most {side} x {side} px fit now"
            )
