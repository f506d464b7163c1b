"""Encodes before the first step what the run will show: the work is shared out to the processes.

Afterwards each process finds every encoding in its memory or on its machine's disk. Files are written by the process
that encodes; on a machine that does not see them, one process writes them again.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial

from dreambooth_moslora.core.config.subject_tables import each_subject
from dreambooth_moslora.core.digests import content_key
from dreambooth_moslora.core.prompts import learnt_words, word_pattern
from dreambooth_moslora.training.inputs.encoding_cache import TensorCache, Tensors
from dreambooth_moslora.training.inputs.prompt_cache import PromptCache
from dreambooth_moslora.training.inputs.subject_streams import SubjectStreams
from dreambooth_moslora.training.processes import agreed, on_each, share_out
from dreambooth_moslora.training.run_context import RunContext

__all__ = ["encode_photos", "encode_prompts"]

Entries = dict[str, Callable[[], Tensors]]
"""Keys in a cache, each with the function that computes its value."""


def encode_photos(context: RunContext, streams: list[SubjectStreams], sample_count: int) -> None:
    """Fill the cache with every crop that the run's first `sample_count` samples show.

    Raises UserError when photos cannot be read or differ between processes, and StopRequestedError.
    """
    encoder = streams[0].encoder
    if encoder.cache is None:
        return

    def crops() -> Entries:
        return dict(encoder.entry(*view) for stream in streams for view in stream.views_ahead(sample_count))

    entries = same_everywhere(context, crops, "crops")
    for _ in context.report.counted("caching", fill(encoder.cache, context, entries), len(entries)):
        pass


def encode_prompts(
    context: RunContext, streams: list[SubjectStreams], prompt_embeds: PromptCache, prompts: Iterable[str]
) -> None:
    """Fill the cache with every caption and prompt that the run will use. Raises UserError and StopRequestedError."""
    config = context.config
    captions = {*prompts, ""}
    for stream in streams:
        captions |= stream.captions
    for subject in each_subject(config):
        captions |= {subject.class_prompt, *config.prior_prompts} if subject.class_prompt else set()
    learnt = [word_pattern(word) for word in learnt_words(config)]
    plain = [caption for caption in sorted(captions) if not any(pattern.search(caption) for pattern in learnt)]
    entries = same_everywhere(context, lambda: dict(prompt_embeds.entry(caption) for caption in plain), "prompts")
    for _ in fill(prompt_embeds.cache, context, entries):
        pass


def same_everywhere(context: RunContext, find: Callable[[], Entries], kind: str) -> Entries:
    """What this process finds to encode. Raises UserError when processes find different keys."""
    return agreed(context.accelerator, find, lambda found: f"{len(found)} {kind} ({content_key(keys=[*found])[:8]})")


def fill(cache: TensorCache, context: RunContext, entries: Entries) -> Iterator[int]:
    """Compute what the cache lacks of `entries`, which all processes have alike; yields how many are done."""
    accelerator = context.accelerator
    keeps = cache.folder is None or accelerator.is_local_main_process

    def values(keys: Sequence[str]) -> Generator[Tensors, None, None]:
        for key in keys:
            context.raise_if_asked()
            yield cache.get(key, entries[key])

    found = share_out(accelerator, list(entries), values)
    for number, (key, tensors) in enumerate(zip(entries, found, strict=True), start=1):
        if accelerator.num_processes > 1:
            on_each(accelerator, partial(cache.put, key, tensors) if keeps else bool)
        yield number
