"""The embedded bases, and what belongs to their world: its places, and the networks that read its
pictures.

They are small models, each of one family, that train in minutes without a GPU. What they draw are
toys in sixteen places, and they know no other words (`toybox` renders the world and trains them).
"""

from pathlib import Path

from dreambooth_moslora.disk.paths import get_assets_folder
from dreambooth_moslora.settings.family_facts import FamilyFacts

ASSETS = get_assets_folder()
TOY_FOLDERS = {"toy": ASSETS / "toy-sdxl", "toy-zimage": ASSETS / "toy-zimage"}
"""Their names and folders."""
# For the lists of bases; the name of the family goes in.
TOY_SUMMARY = (
    "a 128 px practice model of {}'s architecture: it trains in minutes without a GPU, and knows "
    "only its own toys"
)
RESOLUTION_PX = 128  # Side of their pictures.
# Above the value that uses the prompt alone: with the family's, their colours saturate.
TOY_GUIDANCE = 1.5
CLIP_FOLDER = TOY_FOLDERS["toy"]
"""The CLIP that scores pictures and reads the surroundings in photos: the optional parts of that
pipeline."""
DINO_FOLDER = ASSETS / "toy-dino"
SEGMENTER_FOLDER = ASSETS / "toy-segmenter"
"""What scores likeness, and what finds the toy in a photo."""

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
"""The places of the toy world, in the words of its prompts."""
# Prompts for evaluation, one in each place, and those of a run's samples.
PLACE_TEMPLATES = tuple(f"a photo of a {{}} {place}" for place in PLACES)
CONTEXT_TEMPLATES = tuple(
    f"a photo of a {{}} {place}"
    for place in ("on the beach", "in the snow", "on lava", "on the moon")
)
UNRELATED_PROMPTS = (
    ("a photo of a yellow {} on the beach", "duck"),
    ("a photo of a blue {} on a city street", "car"),
    ("a photo of a red and white striped {} in the snow", "rocket"),
    ("a photo of a green {} on a wooden floor", "dinosaur"),
    ("a photo of a white {} in a kitchen", "teapot"),
    ("a photo of a purple {} in the desert", "robot"),
)
"""(prompt, class word), to see what an adapter does to other toys."""


def is_toy(base: str | Path) -> bool:
    """Whether it is the name of an embedded base, or of such a folder."""
    folders = {folder.name for folder in TOY_FOLDERS.values()}
    return str(base) in TOY_FOLDERS or Path(base).name in folders


def get_base_guidance(base: str | Path, facts: FamilyFacts) -> float:
    """A base's default guidance: its family's, unless it is embedded."""
    return facts.no_guidance + TOY_GUIDANCE if is_toy(base) else facts.guidance
