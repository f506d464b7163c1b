"""Embedded bases, the places of their world, and the networks that read their images.

They are small models, each of one family, that train in minutes without a GPU. They generate toys
in sixteen places, and know no other prompts (`toybox` renders the world and trains them).
"""

from pathlib import Path

from dreambooth_moslora.disk.paths import get_assets_folder

ASSETS = get_assets_folder()
TOY_FOLDERS = {"toy": ASSETS / "toy-sdxl", "toy-zimage": ASSETS / "toy-zimage"}
"""Name -> folder of each embedded base."""
TOY_SUMMARY = (
    "a 128 px practice model of {}'s architecture: it trains in minutes without a GPU, and knows "
    "only its own toys"
)
"""Description in lists of bases; `{}` is the family."""
RESOLUTION_PX = 128
"""Side of their images."""
TOY_GUIDANCE = 1.5
"""Guidance above the value that uses the prompt alone: their family's saturates the colours."""
CLIP_FOLDER = TOY_FOLDERS["toy"]
"""CLIP that scores images and recognises surroundings, in the optional parts of that pipeline."""
DINO_FOLDER = ASSETS / "toy-dino"
"""DINO that scores likeness."""
SEGMENTER_FOLDER = ASSETS / "toy-segmenter"
"""Network that finds the toy in a photo."""

PLACES = (
    "on grass",
    "in the snow",
    "on the beach",
    "on a wooden floor",
    "on a purple rug",
    "in the desert",
    "on a checkered floor",
    "in a pink room",
    "on water",
    "in a forest",
    "on a city street",
    "on the moon",
    "in a kitchen",
    "on a stage with red curtains",
    "on autumn leaves",
    "on lava",
)
"""Places of the toy world, as prompts name them."""
PLACE_TEMPLATES = tuple(f"a photo of a {{}} {place}" for place in PLACES)
"""Prompts of the evaluation."""
CONTEXT_TEMPLATES = tuple(
    f"a photo of a {{}} {place}"
    for place in ("on the beach", "in the snow", "on lava", "on the moon")
)
"""Prompts of a run's samples."""
UNRELATED_PROMPTS = (
    ("a photo of a yellow {} on the beach", "duck"),
    ("a photo of a blue {} on a city street", "car"),
    ("a photo of a red and white striped {} in the snow", "rocket"),
    ("a photo of a green {} on a wooden floor", "dinosaur"),
    ("a photo of a white {} in a kitchen", "teapot"),
    ("a photo of a purple {} in the desert", "robot"),
)
"""(prompt, class word), to measure an adapter's effect on other toys."""


def is_toy(base: str | Path) -> bool:
    """Return whether it is the name of an embedded base, or of its folder."""
    folders = {folder.name for folder in TOY_FOLDERS.values()}
    return str(base) in TOY_FOLDERS or Path(base).name in folders
