"""A batch of encoded crops with their captions, and its transfer to the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dreambooth_moslora.training.inputs.photo_encoder import EncodedView

__all__ = ["TrainBatch", "collate", "move_together"]


@dataclass(frozen=True)
class TrainBatch:
    """`latents` (B, 4, h, w), `time_ids` (B, 6), `mask` (B, 1, h, w) or None, `prompts` (B), all on the CPU.

    The first `instance_count` images are the subject's, the others are prior images.
    """

    latents: Tensor
    time_ids: Tensor
    instance_count: int
    mask: Tensor | None
    prompts: list[str]

    def with_base_as_prior(self, prompts: list[str]) -> "TrainBatch":
        """The batch twice (2B). The second half has these prompts (B); the frozen base's prediction will be its
        target."""
        size = len(self.prompts)
        return TrainBatch(
            self.latents.repeat(2, 1, 1, 1),
            self.time_ids.repeat(2, 1),
            size,
            None if self.mask is None else torch.cat([self.mask, torch.ones_like(self.mask)]),
            [*self.prompts, *prompts],
        )


def collate(samples: Sequence[tuple[EncodedView, str]], instance_count: int) -> TrainBatch:
    """Stack views and their captions into one batch, the subject's first.

    If only some views have a mask, the others get a mask of ones.
    """
    views = [view for view, _ in samples]
    masks = None
    if any(view.mask is not None for view in views):
        masks = torch.stack([torch.ones_like(v.latents[:1]) if v.mask is None else v.mask for v in views])
    return TrainBatch(
        torch.stack([view.latents for view in views]),
        torch.stack([view.time_ids for view in views]),
        instance_count,
        masks,
        [caption for _, caption in samples],
    )


def move_together(tensors: dict[str, Tensor | None], device: torch.device) -> dict[str, Tensor | None]:
    """The CPU tensors, of any shapes, on `device`, by one transfer; None stays None.

    Only a transfer to CUDA is asynchronous, from pinned memory. Apple's GPUs would read a buffer that is freed.
    They travel as fp32, which holds integers up to 2**24 and all half-precision numbers exactly.
    """
    if device.type == "cpu":
        return tensors
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    buffer = torch.cat([tensor.reshape(-1).float() for tensor in given.values()])
    is_cuda = device.type == "cuda"
    if is_cuda:
        buffer = buffer.pin_memory()
    parts = buffer.to(device, non_blocking=is_cuda).split([tensor.numel() for tensor in given.values()])
    moved = {
        name: part.view(tensor.shape).to(tensor.dtype)
        for part, (name, tensor) in zip(parts, given.items(), strict=True)
    }
    return tensors | moved
