"""A micro-batch on the device: the rows that the UNet reads, and the targets of the loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dreambooth_moslora.base.load import TextCond
from dreambooth_moslora.training.inputs.train_batch import TrainBatch
from dreambooth_moslora.training.step.objective import NoisySample

__all__ = ["MicroBatch", "UNetRows"]


@dataclass(frozen=True)
class UNetRows:
    """B images for the UNet: noisy latents, text, `time_ids` (B, 6) with sizes and crops, and the `prompts` (B)
    of the text."""

    noisy: NoisySample
    cond: TextCond
    time_ids: Tensor
    prompts: tuple[str, ...]

    @classmethod
    def joined(cls, parts: Sequence["UNetRows"]) -> "UNetRows":
        """Concatenate the rows of several parts, in their order."""
        tensors = map(torch.cat, zip(*(part.tensors() for part in parts), strict=True))
        return cls.of(*tensors, prompts=tuple(prompt for part in parts for prompt in part.prompts))

    def after(self, count: int) -> "UNetRows":
        """Without the first `count`."""
        return self.of(*(tensor[count:] for tensor in self.tensors()), prompts=self.prompts[count:])

    def tensors(self) -> tuple[Tensor, ...]:
        noisy, cond = self.noisy, self.cond
        return noisy.unet_input, noisy.latents, noisy.timesteps, noisy.index, cond.embeds, cond.pooled, self.time_ids

    @classmethod
    def of(cls, *tensors: Tensor, prompts: tuple[str, ...]) -> "UNetRows":
        return cls(NoisySample(*tensors[:4]), TextCond(*tensors[4:6]), tensors[6], prompts)


@dataclass(frozen=True)
class MicroBatch:
    """`target` (B, 4, h, w) is the loss target. Where the frozen base is the prior, the second half's target is
    its answer instead. `mask` is (B, 1, h, w) or None."""

    batch: TrainBatch
    rows: UNetRows
    target: Tensor
    mask: Tensor | None
