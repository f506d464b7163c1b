"""Values of the Generate tab under the API's names, and where they come from: sizes and recipes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dreambooth_moslora.disk import run_folder
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.image_params import (
    MAX_STEPS,
    GenerationParams,
    Recipe,
    resolve_seed,
)

MAX_IMAGES = 8
"""Images of one request at most."""
FIELD_RANGES = {
    "steps": (1, MAX_STEPS),
    "guidance_scale": (0, 30),
    "scale": (-2, 2),
    "num_images": (1, MAX_IMAGES),
}
"""Ranges of the sliders, narrower than the API's, so that usual values are easy to set."""
ASPECT_RATIOS = {"Square": (1, 1), "Portrait": (7 / 8, 9 / 8), "Tall": (13 / 16, 19 / 16)}
"""Preset -> its width and height, as multiples of the base's own resolution."""


@dataclass(frozen=True)
class GenerateForm:
    """Arguments of the API, in its names and order. `size` is "width x height" px."""

    prompt: str = ""
    negative_prompt: str = ""
    adapter: str = run_folder.NO_ADAPTER
    scale: float = 1.0
    seed: int = -1
    steps: int = 25
    guidance_scale: float | None = None
    size: str = ""
    num_images: int = 1
    scheduler: str = ""
    """Name in SCHEDULERS; "" is the base's own."""

    def to_params(self) -> GenerationParams:
        """Return the parameters; a negative or empty seed is sampled here.

        Raises UserError for values that cannot be generated.
        """
        width, height = parse_size(self.size)
        has_adapter = bool(self.adapter) and self.adapter != run_folder.NO_ADAPTER
        return GenerationParams(
            prompt=str(self.prompt or ""),
            negative_prompt=str(self.negative_prompt or ""),
            seed=resolve_seed(-1 if self.seed is None else int(self.seed)),
            steps=int(self.steps),
            guidance_scale=self.guidance_scale,
            height_px=height,
            width_px=width,
            num_images=int(self.num_images),
            adapters=((self.adapter, self.scale),) if has_adapter else (),
            scheduler=self.scheduler or None,
        )

    @classmethod
    def from_params(cls, params: GenerationParams) -> "GenerateForm":
        """Return the form that gives these parameters again.

        Adapters beyond the first become tags in the prompt.
        """
        adapter, scale = params.adapters[0] if params.adapters else (run_folder.NO_ADAPTER, 1.0)
        tags = "".join(f" <lora:{name}:{scale:g}>" for name, scale in params.adapters[1:])
        return cls(
            prompt=params.prompt + tags,
            negative_prompt=params.negative_prompt,
            adapter=adapter,
            scale=scale,
            seed=params.seed,
            steps=params.steps,
            guidance_scale=params.guidance_scale,
            size=format_size(params.width_px, params.height_px),
            num_images=min(params.num_images, MAX_IMAGES),
            scheduler=params.scheduler or "",
        )


def format_size(width: int | None, height: int | None) -> str:
    """Return "832 x 1216" for these sides in px; "" for the base's own size."""
    return f"{width} x {height}" if width and height else ""


def parse_size(text: str) -> tuple[int | None, int | None]:
    """Parse "832 x 1216" to (832, 1216), empty text to the base's own size. Raises UserError."""
    if not (text or "").strip():
        return None, None
    try:
        width, height = (int(part) for part in text.lower().replace("×", "x").split("x"))
    except ValueError as error:
        raise UserError(
            f"the size {text!r:.30} is not understood; write it like 832 x 1216"
        ) from error
    return width, height


def list_size_choices(resolution_px: int, multiple_px: int = 8) -> list[tuple[str, str]]:
    """Return (label, value) of the presets around a base's own resolution.

    All sides are multiples of `multiple_px`.
    """

    def compute_side(ratio: float) -> int:
        return round(resolution_px * ratio / multiple_px) * multiple_px

    choices = []
    for name, (across, down) in ASPECT_RATIOS.items():
        width, height = compute_side(across), compute_side(down)
        choices.append((f"{name} {width} × {height}", format_size(width, height)))
        # The same size turned by 90 degrees.
        if width != height:
            wide = "Landscape" if name == "Portrait" else "Wide"
            choices.append((f"{wide} {height} × {width}", format_size(height, width)))
    return choices


def list_remarks(recipe: Recipe, files: Mapping[str, Path], base: str) -> list[str]:
    """List how a recipe's adapters and base differ from this page's.

    - `files` are this page's adapters, by name.
    - `base` is the name of this page's base.
    """
    remarks = []
    for name, _ in recipe.params.adapters:
        if name not in files:
            remarks.append(f"the adapter {name} is not here")
    made_with = recipe.provenance.base
    if made_with and made_with != base:
        remarks.append(f"it was made with the base {made_with}; this page has {base}")
    return remarks
