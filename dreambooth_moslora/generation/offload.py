"""Placement of a pipeline: its device, and offloading when that is short of memory."""

import torch
from diffusers import DiffusionPipeline

from dreambooth_moslora.base import devices
from dreambooth_moslora.base.streaming import StreamedBlocks, list_streamed_blocks

CPU = torch.device("cpu")
FREE_TO_WEIGHTS_RATIO = 1.5
"""Free memory over weights below which models take turns: 9.7 GiB for SDXL in fp16."""
MIN_FREE_BESIDE_MODEL_GIB = 1.0
"""GiB beside the largest model below which blocks are streamed: the need of two images of 1024
px."""


class Placement:
    """Mover of a pipeline from the CPU's memory to its device and back. If the device is short of
    memory, models take turns on it; if it is too small for one of them, their blocks do."""

    def __init__(self, pipeline: DiffusionPipeline, device: torch.device) -> None:
        self.pipeline = pipeline
        self.device = device
        self.is_resting = pipeline.device != device
        self.streamed: list[StreamedBlocks] = []

    @property
    def is_memory_short(self) -> bool:
        """Tell whether the device has too little free memory for a resting pipeline's models."""
        if not self.is_resting:
            return False
        free = devices.measure_free_gib(self.device)
        return free is not None and free < FREE_TO_WEIGHTS_RATIO * measure_weights_gib(
            self.pipeline
        )

    @property
    def is_too_small(self) -> bool:
        """Tell whether the device has too little free memory for one of the models alone."""
        free = devices.measure_free_gib(self.device)
        largest = max(map(measure_model_gib, list_models(self.pipeline)))
        return free is not None and free < largest + MIN_FREE_BESIDE_MODEL_GIB

    def enter(self) -> None:
        """Move all models to the device, or let them, or their blocks, take turns until `leave`."""
        if self.streamed or (self.is_memory_short and self.is_too_small):
            self.stream()
        elif self.is_memory_short:
            self.pipeline.enable_model_cpu_offload(device=self.device)
        elif self.is_resting:
            self.pipeline.to(self.device)
            self.is_resting = False

    def stream(self) -> None:
        """Keep the blocks of the denoiser and of the text encoders on the host, and move everything
        else to the device."""
        for blocks in self.streamed:
            blocks.move_to_device(self.device)
        if not self.streamed:
            for model in list_models(self.pipeline):
                if model is not self.pipeline.vae and list_streamed_blocks(model):
                    self.streamed.append(StreamedBlocks(model, self.device))
        self.pipeline.to(self.device)

    def leave(self) -> None:
        """Move all models back to the CPU's memory, and free the device's."""
        self.is_resting = True
        self.pipeline.remove_all_hooks()
        for blocks in self.streamed:
            blocks.move_to_device(CPU)
        self.pipeline.to(CPU, silence_dtype_warnings=True)
        devices.free_unused_memory(self.device)

    def end(self) -> None:
        """Leave for good, and restore the models' original form."""
        self.leave()
        for blocks in self.streamed:
            blocks.end()
        self.streamed = []


def list_models(pipeline: DiffusionPipeline) -> list[torch.nn.Module]:
    """Return the pipeline's parts that have weights."""
    return [
        component
        for component in pipeline.components.values()
        if isinstance(component, torch.nn.Module)
    ]


def measure_weights_gib(pipeline: DiffusionPipeline) -> float:
    """Return the GiB of all weights, in their current dtype."""
    return sum(map(measure_model_gib, list_models(pipeline)))


def measure_model_gib(model: torch.nn.Module) -> float:
    """Return the GiB of a model's weights, in their current dtype."""
    return sum(weight.nbytes for weight in model.parameters()) / devices.GIB
