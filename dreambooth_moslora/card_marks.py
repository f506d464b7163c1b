"""By what a model card of ours is known, and which pictures beside it are its own."""

import re

__all__ = ["SIGNATURE", "is_card", "pictures_named"]

SIGNATURE = "Made with dreambooth_moslora"
PICTURE = re.compile(r'^  output: \{url: "(image_\d+\.png)"\}$', re.MULTILINE)


def is_card(text: str) -> bool:
    """Whether `model_card` wrote the text."""
    return SIGNATURE in text


def pictures_named(text: str) -> set[str]:
    """The files of a card's pictures; none for a text that is no card of ours."""
    return set(PICTURE.findall(text)) if is_card(text) else set()
