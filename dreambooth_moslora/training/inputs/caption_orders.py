"""Which captions a photo's exposures draw from: tags in changing orders, and the instance prompt in a share of them.

Tags of image boards have no order, so they are shuffled:

    prefix  sks dog, red collar, on grass, side view  suffix        --keep_tokens 1 leaves `sks dog` where it is

Each caption has a fixed number of orders, derived from the run's seed. So frozen text encoders encode each
order once, and resumed or distributed runs use the same orders as an unbroken run of one process.

A photo whose captions all name a place, say, would never be shown with the bare instance prompt, and prior
preservation holds the class prompt, its neighbour, where it was: the bare prompt would not draw the subject.
"""

from collections.abc import Sequence

from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.prompts import joined
from dreambooth_moslora.core.seeding import rng
from dreambooth_moslora.photos.photo import Photo

__all__ = ["bare_prompt_line", "shuffled_captions"]

ORDERS = 16
"""Orders of each caption, including the written one."""


def bare_prompt_line(config: TrainConfig, photos: Sequence[Photo]) -> str | None:
    """What happens to the photos with a `bare_prompt`; None when there are none."""
    count, share = sum(photo.bare_prompt is not None for photo in photos), config.bare_share
    if not count:
        return None
    said = f"captions: {count} of {len(photos)} photos have none that is the instance prompt itself"
    done = f"{share:.0%} of their exposures show it" if share else "they are never shown with it"
    return f"{said}; {done} (--instance_prompt_share)"


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
