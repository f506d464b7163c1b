"""Build the captions that training shows of a photo: prefixed, with shuffled tags, and the bare
instance prompt. `[trigger]` in a caption stands for the subject's trigger words, as in ai-toolkit.

Tags of image boards have no order, so they are shuffled by the run's seed, in a fixed number of
orders for each caption:

    prefix  sks dog, red collar, on grass, side view

With `--keep_tokens 1` the first tag, `sks dog`, stays first.

If every caption of a photo names its surroundings, the bare instance prompt would not generate the
subject. So such a photo is shown with the bare prompt in a share of its exposures.
"""

from collections.abc import Sequence
from dataclasses import replace

from dreambooth_moslora.photos.photo_file import Photo
from dreambooth_moslora.seeds import seed_rng
from dreambooth_moslora.settings.prompts import join_caption, parse_subject
from dreambooth_moslora.settings.train_config import TrainConfig

TRIGGER_PLACEHOLDER = "[trigger]"
TAG_ORDERS = 16
"""Orders of each caption, including the written one."""


def prepare_captions(config: TrainConfig, photo: Photo) -> Photo:
    """Return the photo with prefixed captions, unless they contain the prefix, and with a
    `bare_prompt` if none of its captions is the instance prompt."""
    prompt = config.instance_prompt
    prefix = (config.caption_prefix or "").strip()
    trigger_words = parse_subject(config).trigger_words
    captions = []
    for caption in photo.captions:
        text = caption.replace(TRIGGER_PLACEHOLDER, trigger_words)
        is_complete = text == prompt or prefix.lower() in text.lower()
        captions.append(text if is_complete else join_caption(prefix, text))
    has_prompt = normalize_prompt(prompt) in map(normalize_prompt, captions)
    return replace(photo, captions=tuple(captions), bare_prompt=None if has_prompt else prompt)


def normalize_prompt(prompt: str) -> str:
    """Return the prompt as the text encoders read it: lower case, with single spaces, and without a
    full stop at its end."""
    return " ".join(prompt.lower().split()).rstrip(".")


def describe_bare_prompts(config: TrainConfig, photos: Sequence[Photo]) -> str | None:
    """Return a line about the photos with a `bare_prompt`; None when there are none."""
    count = sum(photo.bare_prompt is not None for photo in photos)
    if not count:
        return None
    share = config.bare_prompt_share
    effect = f"{share:.0%} of their exposures show it" if share else "they are never shown with it"
    return (
        f"captions: {count} of {len(photos)} photos have none that is the instance prompt itself; "
        f"{effect} (--instance_prompt_share)"
    )


def shuffle_captions(config: TrainConfig, captions: tuple[str, ...]) -> tuple[str, ...]:
    """Return the captions; with `--shuffle_caption` TAG_ORDERS orders of each. The prefix and the
    first `--keep_tokens` tags stay in front."""
    if not config.shuffle_caption:
        return captions
    variants = []
    for caption in captions:
        head, tags = split_tags(config, caption)
        first_tags = tags[: config.keep_tokens]

        # The written order first, then the drawn ones
        variants.append(caption)
        for number in range(1, TAG_ORDERS):
            last_tags = tags[config.keep_tokens :]
            seed_rng(config.seed, "tags", caption, number).shuffle(last_tags)
            variants.append(join_caption(head, ", ".join([*first_tags, *last_tags])))
    return tuple(variants)


def split_tags(config: TrainConfig, caption: str) -> tuple[str, list[str]]:
    """Return a caption's prefix and tags. The instance prompt has no prefix."""
    head = ""
    prefix = join_caption((config.caption_prefix or "").strip())
    if caption != config.instance_prompt and caption.startswith(prefix):
        head = prefix
    tags = [tag.strip() for tag in caption[len(head) :].split(",")]
    return head, [tag for tag in tags if tag]
