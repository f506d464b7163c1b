"""Shuffles a caption's tags, as the tags of image boards have no order.

    prefix  sks dog, red collar, on grass, side view  suffix        --keep_tokens 1 leaves `sks dog` where it is

Each caption has a fixed number of orders, derived from the run's seed. So frozen text encoders encode each
order once, and resumed or distributed runs use the same orders as an unbroken run of one process.
"""

from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.prompts import joined
from dreambooth_moslora.core.seeding import rng

__all__ = ["shuffled_captions"]

ORDERS = 16
"""Orders of each caption, including the written one."""


def shuffled_captions(config: TrainConfig, captions: tuple[str, ...]) -> tuple[str, ...]:
    """The captions, or with `--shuffle_caption` ORDERS orders of each, so that each caption is drawn as often
    as before."""
    if not config.shuffle_caption:
        return captions
    return tuple(reordered(config, caption, number) for caption in captions for number in range(ORDERS))


def reordered(config: TrainConfig, caption: str, number: int) -> str:
    """Order `number` of a caption; 0 is the written one. The prefix, suffix and first `keep_tokens` tags stay
    in place."""
    if number == 0:
        return caption
    ends = (config.caption_prefix, config.caption_suffix) if caption != config.instance_prompt else ("", "")
    prefix, suffix = (joined((end or "").strip()) for end in ends)
    head, tail = prefix if caption.startswith(prefix) else "", suffix if caption.endswith(suffix) else ""
    tags = [tag.strip() for tag in caption[len(head) : len(caption) - len(tail)].split(",") if tag.strip()]
    kept, others = tags[: config.keep_tokens], tags[config.keep_tokens :]
    rng(config.seed, "tags", caption, number).shuffle(others)
    return joined(head, ", ".join([*kept, *others]), tail)
