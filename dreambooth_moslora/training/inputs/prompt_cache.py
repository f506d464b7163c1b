"""Prompts as embeddings: the frozen text encoders encode each prompt once."""

from collections.abc import Callable, Sequence

import torch

from dreambooth_moslora.base.load import TextCond
from dreambooth_moslora.core.digests import content_key
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.training.inputs.encoding_cache import TensorCache, Tensors

__all__ = ["PromptCache"]


class PromptCache:
    """Prompts -> TextCond. Frozen encoders encode each prompt once; `release_encoders` then frees their memory."""

    def __init__(self, encode: Callable[[list[str]], TextCond], cache: TensorCache | None, identity: str):
        self.encode, self.cache, self.identity = encode, cache, identity

    def __call__(self, prompts: Sequence[str]) -> TextCond:
        found = [self._one(prompt) for prompt in prompts]
        return TextCond(torch.stack([f["embeds"] for f in found]), torch.stack([f["pooled"] for f in found]))

    def _one(self, prompt: str) -> Tensors:
        if self.cache is None:
            return self._compute(prompt)
        return self.cache.get(*self.entry(prompt))

    def entry(self, prompt: str) -> tuple[str, Callable[[], Tensors]]:
        """The prompt's key in the cache, and the function that encodes it."""
        return content_key(prompt=prompt, encoders=self.identity), lambda: self._compute(prompt)

    @torch.no_grad()
    def _compute(self, prompt: str) -> Tensors:
        cond = self.encode([prompt])
        return {"embeds": cond.embeds[0].cpu(), "pooled": cond.pooled[0].cpu()}

    def release_encoders(self) -> None:
        """Drop the encoders. From now on a new prompt raises RuntimeError; with a cache on disk, an unreadable
        file raises UserError."""
        is_on_disk = self.cache is not None and self.cache.folder is not None

        def gone(prompts: list[str]) -> TextCond:
            if is_on_disk:
                raise UserError(
                    f"{self.cache.folder}: the encoding of {prompts[0]!r:.60} cannot be read any more, and the text "
                    "encoders have left memory; resume the run, which encodes it anew."
                )
            raise RuntimeError(f"the text encoders have left memory; {prompts} was not encoded before")

        self.encode = gone
