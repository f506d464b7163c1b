"""One base in memory for several runs: each gets a pipeline whose UNet has its own modules and shared weights."""

import copy

import torch
from diffusers import StableDiffusionXLPipeline

from dreambooth_moslora.adapters.fused.joint_linear import lay_together
from dreambooth_moslora.adapters.fused.stacked_adapters import twin
from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.training.frozen_base import LoadBase, load_base
from dreambooth_moslora.training.step.add_adapters import target_paths

__all__ = ["SharedBase"]


class SharedBase:
    """Replaces `frozen_base.load_base` for runs with the same base, precision and layers.

    The UNet stays on the device. Text encoders and VAE are lent to one run after the other.
    """

    def __init__(self, load: LoadBase = load_base):
        self._load = load
        self._pipeline: StableDiffusionXLPipeline | None = None

    def __call__(self, config: TrainConfig, dtype: torch.dtype, device: torch.device) -> StableDiffusionXLPipeline:
        """The pipeline of one run. Its adapter and the components it removes do not affect other runs."""
        if self._pipeline is None:
            pipeline = self._load(config, dtype, device)
            pipeline.unet.to(device)
            if device.type != "cpu":
                lay_together(pipeline.unet, target_paths(config, "unet", pipeline.unet))
            self._pipeline = pipeline
        own = copy.copy(self._pipeline)
        own.register_modules(unet=twin(self._pipeline.unet), scheduler=copy.deepcopy(self._pipeline.scheduler))
        return own

    def rest(self) -> None:
        """Move the text encoders and the VAE off the device, until a run moves them back."""
        if self._pipeline is not None:
            for part in (self._pipeline.text_encoder, self._pipeline.text_encoder_2, self._pipeline.vae):
                part.to("cpu")
