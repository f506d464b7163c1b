"""Inputs and targets of the denoiser: micro-batches, and how they share a forward pass.

A micro-batch holds `train_batch_size` images of the subject and as many of its prior, if it has
one. `--images_at_once` decides what passes through the denoiser together: whole micro-batches of
one size, or chunks of one.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch

from dreambooth_moslora.base import families
from dreambooth_moslora.training import objective


def concatenate(values: Sequence[Any]) -> Any:
    """Concatenate values of one kind along the batch: tensors (B, …), tuples (B), and dicts and
    dataclasses of these, by their keys and fields."""
    first = values[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(values))
    if isinstance(first, dict):
        return {key: concatenate([value[key] for value in values]) for key in first}
    if is_dataclass(first):
        names = [field.name for field in fields(first)]
        return type(first)(
            **{name: concatenate([getattr(value, name) for value in values]) for name in names}
        )
    return tuple(item for value in values for item in value)


def take_slice(value: Any, rows: slice) -> Any:
    """Return the rows of a value that `concatenate` takes."""
    if isinstance(value, dict):
        return {key: item[rows] for key, item in value.items()}
    if is_dataclass(value):
        names = [field.name for field in fields(value)]
        return type(value)(**{name: take_slice(getattr(value, name), rows) for name in names})
    return value[rows]


@dataclass(frozen=True)
class DenoiserInputs:
    """Inputs of the denoiser for B images. A new field is concatenated and sliced as the others.

    noisy_sample: noised latents and their timesteps
    text_embeddings: (B) dicts by the names of the pipeline's own arguments
    photo_inputs: further inputs by name, each (B, …): "time_ids" (B, 6), sizes and crops in px
    prompts: (B) the prompts of the text embeddings
    """

    noisy_sample: objective.NoisySample
    text_embeddings: tuple[families.TextEmbedding, ...]
    photo_inputs: dict[str, torch.Tensor]
    prompts: tuple[str, ...]

    def __getitem__(self, rows: slice) -> "DenoiserInputs":
        return take_slice(self, rows)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def latent_size(self) -> tuple[int, ...]:
        """(h, w) of the latents."""
        return tuple(self.noisy_sample.latents.shape[-2:])


@dataclass(frozen=True)
class MicroBatch:
    """B images, the subject's first, and the target of the denoiser's prediction.

    target: (B, C, h, w); with the base as prior, its prediction replaces the prior's half
    mask: (B, 1, h, w) loss weights of positions in [0, 1], or None
    instance_count: how many show the subject
    """

    inputs: DenoiserInputs
    target: torch.Tensor
    mask: torch.Tensor | None
    instance_count: int

    def split_chunks(self, max_images: int) -> Iterator[tuple["MicroBatch", float]]:
        """Yield chunks of at most `max_images` images. Each has images of the subject alone or of
        the prior alone, and comes with its share of those."""
        instance = (0, self.instance_count)
        prior = (self.instance_count, len(self.inputs))
        for start, end in (instance, prior):
            # The last chunk of a half may be smaller.
            for first in range(start, end, max_images):
                rows = slice(first, min(first + max_images, end))
                size = rows.stop - first
                chunk = MicroBatch(
                    inputs=self.inputs[rows],
                    target=self.target[rows],
                    mask=None if self.mask is None else self.mask[rows],
                    instance_count=size if start == 0 else 0,
                )
                yield chunk, size / (end - start)


def collect_same_size(
    micro_batches: Iterable[MicroBatch], max_count: int
) -> Iterator[list[MicroBatch]]:
    """Yield groups of at most `max_count` consecutive micro-batches of one latent size. The next
    micro-batch is built only after a full group was used, so that few are in memory."""
    group: list[MicroBatch] = []
    for micro_batch in micro_batches:
        if group and group[0].inputs.latent_size != micro_batch.inputs.latent_size:
            yield group
            group = []
        group.append(micro_batch)
        if len(group) == max_count:
            yield group
            group = []
    if group:
        yield group


def forward_together(
    predict: Callable[[DenoiserInputs], torch.Tensor], parts: Sequence[DenoiserInputs]
) -> list[torch.Tensor | None]:
    """Return the prediction (B, C, h, w) of each part, computed in one forward pass; None for a
    part without images."""
    present = [part for part in parts if len(part)]

    # A single part is not copied.
    if len(present) > 1:
        joined = predict(concatenate(present))
        predictions = iter(joined.split([len(part) for part in present]))
    else:
        predictions = map(predict, present)
    return [next(predictions) if len(part) else None for part in parts]
