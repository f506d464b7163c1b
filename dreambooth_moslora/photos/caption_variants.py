"""Which captions training shows of a photo: with a prefix, tags in several orders, and the bare
instance prompt.

Tags of image boards have no order, so they are shuffled, in a fixed number of orders a caption, by
the run's seed:

    prefix  sks dog, red collar, on grass, side view

With `--keep_tokens 1` the first tag, `sks dog`, stays where it is.

If all captions of a photo name a place, the bare instance prompt would not draw the subject. So
such a photo is shown with it in a share of its exposures.
"""

from collections.abc import Sequence
from dataclasses import replace

from dreambooth_moslora.photos.photo_file import Photo
from dreambooth_moslora.seeds import seed_rng
from dreambooth_moslora.settings.prompts import join_caption
from dreambooth_moslora.settings.train_config import TrainConfig

# Orders of each caption, including the written one
TAG_ORDERS = 16


def prepare_captions(config: TrainConfig, photo: Photo) -> Photo:
    """The photo, with the prefix on its own captions, and with its bare prompt if none of
    them is the instance prompt."""
    prompt = config.instance_prompt
    prefix = (config.caption_prefix or "").strip()
    found = []
    for caption in photo.captions:
        found.append(caption if caption == prompt else join_caption(prefix, caption))
    is_there = normalize_prompt(prompt) in map(normalize_prompt, found)
    return replace(photo, captions=tuple(found), bare_prompt=None if is_there else prompt)


def normalize_prompt(prompt: str) -> str:
    """The prompt as the text encoders hear it: they know neither case nor the width of spaces. A
    full stop at its end is left out too."""
    return " ".join(prompt.lower().split()).rstrip(".")


def describe_bare_prompts(config: TrainConfig, photos: Sequence[Photo]) -> str | None:
    """What happens to the photos with a `bare_prompt`; None when there are none."""
    count = sum(photo.bare_prompt is not None for photo in photos)
    if not count:
        return None
    share = config.bare_prompt_share
    said = f"captions: {count} of {len(photos)} photos have none that is the instance prompt itself"
    done = f"{share:.0%} of their exposures show it" if share else "they are never shown with it"
    return f"{said}; {done} (--instance_prompt_share)"


def shuffle_captions(config: TrainConfig, captions: tuple[str, ...]) -> tuple[str, ...]:
    """The captions; with `--shuffle_caption` ORDERS orders of each, without the prefix and kept
    tags."""
    if not config.shuffle_caption:
        return captions
    found = []
    for caption in captions:
        head, tags = split_tags(config, caption)
        kept = tags[: config.keep_tokens]

        # The written order first, then the drawn ones
        found.append(caption)
        for number in range(1, TAG_ORDERS):
            others = tags[config.keep_tokens :]
            seed_rng(config.seed, "tags", caption, number).shuffle(others)
            found.append(join_caption(head, ", ".join([*kept, *others])))
    return tuple(found)


def split_tags(config: TrainConfig, caption: str) -> tuple[str, list[str]]:
    """A caption's prefix and tags. The instance prompt got no prefix."""
    head = ""
    prefix = join_caption((config.caption_prefix or "").strip())
    if caption != config.instance_prompt and caption.startswith(prefix):
        head = prefix
    tags = [tag.strip() for tag in caption[len(head) :].split(",")]
    return head, [tag for tag in tags if tag]
