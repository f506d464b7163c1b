"""Training inputs made of random numbers: a UNet of SDXL's structure and one cached photo."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from dreambooth_moslora.base.load import TextCond
from dreambooth_moslora.base.random_unet import pooled_width, random_unet, text_width
from dreambooth_moslora.training.inputs.photo_encoder import EncodedView
from dreambooth_moslora.training.inputs.train_batch import TrainBatch, collate
from dreambooth_moslora.training.step.noise_schedule import noise_schedule

__all__ = ["RandomMaterials", "random_materials"]


@dataclass
class RandomMaterials:
    """Replaces `prepare.TrainInputs`: the same attributes, with full caches."""

    pipeline: SimpleNamespace
    schedule: object
    view: EncodedView
    cond: TextCond
    dtype: torch.dtype = torch.bfloat16
    start: None = None
    text_products: None = None
    basis: None = None

    def batch_at(self, micro_batch: int, size: int, next_micro_batch: int = 0) -> TrainBatch:
        return collate([(self.view, "a photo of sks dog")] * size, size)

    def prompt_embeds(self, prompts: list[str]) -> TextCond:
        """Random text embeddings (N, 77, D) and pooled ones (N, P)."""
        return TextCond(repeated(self.cond.embeds, len(prompts)), repeated(self.cond.pooled, len(prompts)))


def repeated(row: Tensor, count: int) -> Tensor:
    return row.expand(count, *row.shape[1:])


def random_materials(size: str, resolution_px: int) -> RandomMaterials:
    side = resolution_px // 8
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    ids = torch.tensor([resolution_px, resolution_px, 0, 0, resolution_px, resolution_px], dtype=torch.float32)
    embeds, pooled = torch.randn(1, 77, text_width(size)), torch.randn(1, pooled_width(size))
    return RandomMaterials(
        SimpleNamespace(unet=random_unet(size)),
        noise_schedule(scheduler),
        EncodedView(torch.randn(4, side, side), ids, None),
        TextCond(embeds.bfloat16(), pooled.bfloat16()),
    )
