"""Texts of a UNet's prompts as batches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dreambooth_moslora.base.families import Text


def embeds_of(texts: Sequence[Text]) -> Tensor:
    return torch.stack([text["prompt_embeds"] for text in texts])


def pooled_of(texts: Sequence[Text]) -> Tensor:
    return torch.stack([text["pooled_prompt_embeds"] for text in texts])


def equal(texts: Sequence[Text], others: Sequence[Text]) -> bool:
    return all(
        one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        for one, other in zip(texts, others, strict=True)
    )
