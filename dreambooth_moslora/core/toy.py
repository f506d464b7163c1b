"""The embedded base (a small SDXL of the toy world): how it is recognised, its prompts and its guidance."""

__all__ = ["TOY_TEMPLATES", "is_toy", "preferred_guidance"]

TOY_PLACES = (
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
TOY_TEMPLATES = tuple(f"a photo of a {{}} {place}" for place in TOY_PLACES)
"""One for each place that the embedded base knows."""
TOY_CONTEXT_TEMPLATES = tuple(
    f"a photo of a {{}} {p}" for p in ("on the beach", "in the snow", "on lava", "on the moon")
)


def is_toy(base: str) -> bool:
    """Whether the base is the embedded toy world."""
    return str(base).rstrip("/").split("/")[-1] in ("toy", "toy-sdxl")


def preferred_guidance(base: str) -> float:
    """The default classifier-free guidance of a base: 5 for SDXL. With 5, the embedded base's colours saturate,
    and adapted pictures drift further from its own (`evaluate --guidance_scale 5`)."""
    return 2.5 if is_toy(base) else 5.0
