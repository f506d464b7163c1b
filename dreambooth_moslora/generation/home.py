"""Where a pipeline draws: its device, and what is done when that is short of memory."""

import torch
from diffusers import DiffusionPipeline

from dreambooth_moslora.base import machine

CPU = torch.device("cpu")
# Free memory over weights below which models take turns: 9.7 GiB for SDXL in fp16
ROOM_BESIDE_WEIGHTS = 1.5


class Home:
    """The device that a pipeline draws on, from the CPU's memory. If it is short of memory, models
    take turns on it."""

    def __init__(self, pipeline: DiffusionPipeline, device: torch.device) -> None:
        self.pipeline = pipeline
        self.device = device
        self.is_resting = pipeline.device != device

    @property
    def is_short(self) -> bool:
        """Whether the device has too little free memory for a resting pipeline's models."""
        if not self.is_resting:
            return False
        free = machine.free_gib(self.device)
        return free is not None and free < ROOM_BESIDE_WEIGHTS * weights_gib(self.pipeline)

    def enter(self) -> None:
        """Move all models to the device, or let them take turns until `leave`."""
        if self.is_short:
            self.pipeline.enable_model_cpu_offload(device=self.device)
        elif self.is_resting:
            self.pipeline.to(self.device)
            self.is_resting = False

    def leave(self) -> None:
        """Move all models back to the CPU's memory, and free the device's."""
        self.is_resting = True
        self.pipeline.remove_all_hooks()
        self.pipeline.to(CPU, silence_dtype_warnings=True)
        machine.free_unused_blocks(self.device)


def weights_gib(pipeline: DiffusionPipeline) -> float:
    """GiB of all weights, in their current dtype."""
    total_bytes = 0
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            for weight in part.parameters():
                total_bytes += weight.numel() * weight.element_size()
    return total_bytes / machine.GIB
