"""Augmentations: random changes of a crop, one row each, by the setting that asks for them.

A crop that is kept is changed once, by the parameters in its plan, and is shown so for the whole
run. By default that is one crop of a photo: `--crops_per_photo` takes more, and `--caching off` a
new one at each showing. The help of the setting has to say so, with `table.CHANGED_ONCE`.

The parameters are part of the plan, and so of the crop's key in the cache of latents. A new row
leaves the keys of crops that it does not change valid. Caches of versions before this table have
other keys: their photos are encoded anew, once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps

from dreambooth_moslora.settings import table

MIRROR = "random_flip"
"""The row that also decides from which side a plan counts."""


@dataclass(frozen=True)
class Augmentation:
    """One kind of change.

    pick: (number drawn evenly from [0, 1), the setting's value) -> the parameter of one crop; None
        leaves it unchanged
    change: (crop, parameter) -> the changed crop, of the same size and mode
    moves_pixels: whether the crop's mask is changed with it
    """

    pick: Callable[[float, Any], float | None]
    change: Callable[[Image.Image, float], Image.Image]
    moves_pixels: bool = False


# By the name of the setting. A new row stands last, so that the draws of the others stay.
AUGMENTATIONS = {
    MIRROR: Augmentation(
        pick=lambda drawn, _: 1.0 if drawn < 0.5 else None,
        change=lambda crop, _: ImageOps.mirror(crop),
        moves_pixels=True,
    ),
}

Asked = tuple[tuple[str, Any], ...]
"""(setting, its value), … of the augmentations that a run asks for."""
Changes = tuple[tuple[str, float], ...]
"""(setting, parameter), … of one crop, in the order in which they are made."""


def asked_for(config: table.TrainConfig) -> Asked:
    """Those whose settings are given."""
    values = [(name, getattr(config, name)) for name in AUGMENTATIONS]
    return tuple((name, value) for name, value in values if value)


def changes_of(asked: Asked, drawn: Sequence[float]) -> Changes:
    """The changes of one crop.

    asked: of the run
    drawn: a number from [0, 1) for each row of the table, whether it is asked for or not
    """
    numbers = dict(zip(AUGMENTATIONS, drawn, strict=True))
    found = []
    for name, value in asked:
        parameter = AUGMENTATIONS[name].pick(numbers[name], value)
        if parameter is not None:
            found.append((name, parameter))
    return tuple(found)


def changed(crop: Image.Image, changes: Changes, is_mask: bool = False) -> Image.Image:
    """The crop with its changes; of a mask those that move pixels."""
    for name, parameter in changes:
        kind = AUGMENTATIONS[name]
        if kind.moves_pixels or not is_mask:
            crop = kind.change(crop, parameter)
    return crop
