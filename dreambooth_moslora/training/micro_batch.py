"""What one step learns from, ready for the denoiser: rows of pictures, and micro-batches of them.

A micro-batch holds `train_batch_size` pictures of the subject and as many of its prior, if it has
one. What passes through the denoiser together is decided by `--images_at_once`: whole micro-batches
of one size, or parts of one.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from dreambooth_moslora.base import families
from dreambooth_moslora.training import objective


@dataclass(frozen=True)
class DenoiserInputs:
    """B pictures with all that the denoiser is told of them.

    noisy_sample: noised latents and their noise levels
    text_embeddings: (B) texts, each by the names of the pipeline's own arguments
    time_ids: (B, 6) with sizes and crops in px
    prompts: (B) the words of the texts
    """

    noisy_sample: objective.NoisySample
    text_embeddings: tuple[families.TextEmbedding, ...]
    time_ids: torch.Tensor
    prompts: tuple[str, ...]

    @classmethod
    def concat(cls, parts: Sequence["DenoiserInputs"]) -> "DenoiserInputs":
        """The rows of all parts, one after the other. Their latents have one size."""
        noisy = [part.noisy_sample for part in parts]
        return cls(
            noisy_sample=objective.NoisySample(
                denoiser_input=torch.cat([one.denoiser_input for one in noisy]),
                latents=torch.cat([one.latents for one in noisy]),
                timesteps=torch.cat([one.timesteps for one in noisy]),
                timestep_indices=torch.cat([one.timestep_indices for one in noisy]),
            ),
            text_embeddings=tuple(text for part in parts for text in part.text_embeddings),
            time_ids=torch.cat([part.time_ids for part in parts]),
            prompts=tuple(prompt for part in parts for prompt in part.prompts),
        )

    def __getitem__(self, some: slice) -> "DenoiserInputs":
        return DenoiserInputs(
            noisy_sample=objective.NoisySample(
                denoiser_input=self.noisy_sample.denoiser_input[some],
                latents=self.noisy_sample.latents[some],
                timesteps=self.noisy_sample.timesteps[some],
                timestep_indices=self.noisy_sample.timestep_indices[some],
            ),
            text_embeddings=self.text_embeddings[some],
            time_ids=self.time_ids[some],
            prompts=self.prompts[some],
        )

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def size(self) -> tuple[int, ...]:
        """(h, w) of the latents."""
        return tuple(self.noisy_sample.latents.shape[-2:])


@dataclass(frozen=True)
class MicroBatch:
    """B pictures, the subject's first, and what the denoiser should answer.

    target: (B, C, h, w); with the base as prior, the base's answer replaces the prior's half
    mask: (B, 1, h, w) weights of places in [0, 1], or None
    instance_count: how many are the subject's
    """

    inputs: DenoiserInputs
    target: torch.Tensor
    mask: torch.Tensor | None
    instance_count: int

    def split_chunks(self, max_images: int) -> Iterator[tuple["MicroBatch", float]]:
        """Parts of at most `most` pictures. Each is the subject's alone or the prior's alone, and
        comes with its share of those."""
        instance = (0, self.instance_count)
        prior = (self.instance_count, len(self.inputs))
        for start, end in (instance, prior):
            # The last part of a half may be smaller.
            for first in range(start, end, max_images):
                some = slice(first, min(first + max_images, end))
                size = some.stop - first
                part = MicroBatch(
                    inputs=self.inputs[some],
                    target=self.target[some],
                    mask=None if self.mask is None else self.mask[some],
                    instance_count=size if start == 0 else 0,
                )
                yield part, size / (end - start)


def collect_same_size(
    micro_batches: Iterable[MicroBatch], max_count: int
) -> Iterator[list[MicroBatch]]:
    """Neighbours of one size, at most so many together. None is drawn before the full group is
    used."""
    group: list[MicroBatch] = []
    for micro in micro_batches:
        if group and group[0].inputs.size != micro.inputs.size:
            yield group
            group = []
        group.append(micro)
        if len(group) == max_count:
            yield group
            group = []
    if group:
        yield group


def forward_together(
    predict: Callable[[DenoiserInputs], torch.Tensor], parts: Sequence[DenoiserInputs]
) -> list[torch.Tensor | None]:
    """The prediction (B, C, h, w) of each part, computed in one pass; None for a part without
    rows."""
    some = [part for part in parts if len(part)]

    # A part alone needs no copy of its rows.
    if len(some) > 1:
        answers = iter(predict(DenoiserInputs.concat(some)).split([len(part) for part in some]))
    else:
        answers = map(predict, some)
    return [next(answers) if len(part) else None for part in parts]
