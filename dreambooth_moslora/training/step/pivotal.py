"""Pivotal tuning: new tokens are learnt beside the adapter up to a step, the pivot, and stay fixed after it.

Only the rows of the new tokens are parameters; the encoders and their embedding tables are frozen. Prompts with
the new word are encoded at each step before the pivot, and once after it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from torch import nn

from dreambooth_moslora.adapters.new_tokens import KEYS, TOKENIZERS, AttachedTokens, NewTokens, read_tokens
from dreambooth_moslora.base.load import TextCond, encode_text
from dreambooth_moslora.core.config.subject_tables import each_subject, stream_of
from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.prompts import learnt_words
from dreambooth_moslora.core.run_files.run_folder import tokens_files
from dreambooth_moslora.core.seeding import generator
from dreambooth_moslora.training.inputs.encoding_cache import TensorCache
from dreambooth_moslora.training.inputs.prompt_cache import PromptCache

__all__ = ["LearntTokens"]


class LearntTokens:
    """The new tokens of a run's subjects. `cached` encodes the prompts without them; `pivot` is the first step at which
    they are fixed."""

    def __init__(
        self,
        config: TrainConfig,
        pipeline: StableDiffusionXLPipeline,
        cached: PromptCache,
        total_steps: int,
        checkpoint: Path | None,
    ):
        self.pipeline, self.cached = pipeline, cached
        self.pivot = max(1, round(config.train_text_encoder_ti_frac * total_steps))
        kept = [read_tokens(path) for path in tokens_files(checkpoint)] if checkpoint else []
        started = kept or fresh_tokens(config, pipeline)
        self.tokens = tuple(trainable(tokens, pipeline.text_encoder.device) for tokens in started)
        self.attached = AttachedTokens(pipeline, self.tokens)
        self.is_averaged = False
        self._encoded = PromptCache(lambda prompts: encode_text(pipeline, prompts), TensorCache(), "")

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [rows for tokens in self.tokens for rows in tokens.rows.values()]

    def fill_gradients(self) -> None:
        """Set missing gradients to zero when no prompt had the word: all processes must average the same parameters."""
        for rows in self.parameters:
            if rows.grad is None:
                rows.grad = torch.zeros_like(rows)

    @contextmanager
    def at_rest(self, step: int) -> Iterator[None]:
        """From the pivot on, undo what the optimizer does to the rows in this block: Prodigy moves even a group
        whose learning rate is 0."""
        kept = [rows.detach().clone() for rows in self.parameters] if step >= self.pivot else []
        yield
        for rows, before in zip(self.parameters, kept):
            rows.data.copy_(before)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """In this block the rows hold their average, so encodings of the rows themselves are neither used nor kept."""
        self.is_averaged = True
        try:
            yield
        finally:
            self.is_averaged = False

    def text_cond(self, prompts: list[str], step: int) -> TextCond:
        """Text embeddings of the prompts at `step`, (B, 77, 2048) and pooled (B, 1280) for SDXL; with gradients
        before the pivot."""
        mine = [prompt for prompt in dict.fromkeys(prompts) if self.attached.is_in(prompt)]
        others = [prompt for prompt in dict.fromkeys(prompts) if prompt not in mine]
        is_at_rest = step >= self.pivot and not self.is_averaged
        encode = self._encoded if is_at_rest else lambda texts: encode_text(self.pipeline, texts)
        found = {}
        for group, ask in ((mine, encode), (others, self.cached)):
            cond = ask(group) if group else None
            found |= {prompt: (cond.embeds[n], cond.pooled[n]) for n, prompt in enumerate(group)}
        device = self.parameters[0].device
        embeds, pooled = zip(*(found[prompt] for prompt in prompts))
        return TextCond(torch.stack([e.to(device) for e in embeds]), torch.stack([p.to(device) for p in pooled]))


def trainable(tokens: NewTokens, device: torch.device) -> NewTokens:
    rows = {part: nn.Parameter(found.float().to(device)) for part, found in tokens.rows.items()}
    return NewTokens(tokens.word, rows)


def fresh_tokens(config: TrainConfig, pipeline: StableDiffusionXLPipeline) -> list[NewTokens]:
    """New tokens of each subject. Raises UserError."""
    pairs = zip(learnt_words(config), each_subject(config), strict=True)
    return [
        NewTokens(word, fresh_rows(subject, pipeline, stream_of("new tokens", number)))
        for number, (word, subject) in enumerate(pairs)
    ]


def fresh_rows(config: TrainConfig, pipeline: StableDiffusionXLPipeline, stream: str) -> dict[str, torch.Tensor]:
    """Rows (n, D) of the concept's words, or random rows of the table's standard deviation.

    Raises UserError when the tokenizers make different numbers of tokens of it, or none.
    """
    rows = {}
    for part in KEYS:
        table = getattr(pipeline, part).get_input_embeddings().weight.detach().float().cpu()
        if config.initializer_concept:
            ids = getattr(pipeline, TOKENIZERS[part])(config.initializer_concept, add_special_tokens=False).input_ids
            rows[part] = table[ids].clone()
        else:
            shape = config.num_new_tokens_per_abstraction, table.shape[1]
            rows[part] = torch.randn(shape, generator=generator(config.seed, stream, part)) * table.std()
    if len({len(found) for found in rows.values()}) != 1 or not len(rows["text_encoder"]):
        raise UserError(f"--initializer_concept {config.initializer_concept}: the tokenizers make no such words of it.")
    return rows
