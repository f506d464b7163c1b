"""Grids: one parameter varies downwards, another across. Each cell is a picture, and a captioned sheet shows all."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import PIL.Image
from PIL import ImageDraw, ImageFont

from dreambooth_moslora.core import UserError
from dreambooth_moslora.generation.params import GenerationParams, Image, Provenance, recipe_text
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.generation.progress import Preview, Step

MAX_CELLS = 64
MARGIN_PX = 12
INK, FAINT, PAPER = (20, 20, 24), (110, 110, 118), (255, 255, 255)


@dataclass(frozen=True)
class Axis:
    """`name` is one of AXES; `values` are the parameter's values, in order."""

    name: str
    values: tuple[str | int | float, ...]

    def label(self, index: int) -> str:
        value = self.values[index]
        if self.name == "prompt":
            return str(value)
        return f"{self.name} {value:g}" if isinstance(value, float) else f"{self.name} {value}"


@dataclass(frozen=True)
class Sheet:
    """All cells in one picture. `params` are the first cell's; the axes say what varied; the provenance covers all."""

    pixels: PIL.Image.Image
    params: GenerationParams
    axes: tuple[Axis, ...]
    provenance: Provenance

    def save(self, path: str | Path) -> Path:
        """Write a PNG with the first cell's recipe, the hashes of all adapters in use, and the axes."""
        text = recipe_text(self.params, self.provenance)
        text.add_itxt("dreambooth_moslora_grid", json.dumps({axis.name: axis.values for axis in self.axes}))
        self.pixels.save(path, format="PNG", pnginfo=text)
        return Path(path)


def _with_scale(params: GenerationParams, value: float) -> GenerationParams:
    if not params.adapters:
        raise UserError("a grid over the scale needs an adapter")
    return replace(params, adapters=((params.adapters[0][0], value), *params.adapters[1:]))


def _with_adapter(params: GenerationParams, value: str) -> GenerationParams:
    """Replace the first adapter, for example by a checkpoint of the same run; "none" is the base alone."""
    scale = params.adapters[0][1] if params.adapters else 1.0
    chosen = () if value == "none" else ((value, scale),)
    return replace(params, adapters=(*chosen, *(pair for pair in params.adapters[1:] if pair[0] != value)))


AXES: dict[str, tuple[type, Callable[[GenerationParams, object], GenerationParams]]] = {
    "scale": (float, _with_scale),
    "seed": (int, lambda params, value: replace(params, seed=value)),
    "prompt": (str, lambda params, value: replace(params, prompt=value)),
    "adapter": (str, _with_adapter),
    "steps": (int, lambda params, value: replace(params, steps=value)),
    "guidance": (float, lambda params, value: replace(params, guidance_scale=value)),
}
"""What a grid can vary -> the type of its values and how one is set. `scale` and `adapter` mean the first adapter."""


def parse_axis(text: str) -> Axis:
    """Parse `scale=0,0.5,1` or `prompt=a mug|a red mug` (prompts are separated by `|`, as they hold commas).
    Raises UserError."""
    name, equals, rest = text.partition("=")
    name = name.strip()
    if name not in AXES or not equals:
        raise UserError(f"{text!r:.60} is not a grid axis; write one of {', '.join(AXES)}, then = and values")
    kind = AXES[name][0]
    parts = [part.strip() for part in rest.split("|" if name == "prompt" else ",") if part.strip()]
    try:
        values = tuple(kind(part) for part in parts)
    except ValueError as error:
        raise UserError(f"the grid axis {text!r:.60} has a value that is not a number") from error
    if not values:
        raise UserError(f"the grid axis {name!r} has no values")
    return Axis(name, values)


def cells_of(params: GenerationParams, axes: tuple[Axis, ...]) -> list[list[GenerationParams]]:
    """Rows of cells: the first axis goes down, the second, if any, across. Raises UserError for an impossible grid."""
    if not 1 <= len(axes) <= 2 or len({axis.name for axis in axes}) != len(axes):
        raise UserError("a grid has one axis or two different ones")
    down, across = axes[0], axes[1] if len(axes) == 2 else None
    if (count := len(down.values) * (len(across.values) if across else 1)) > MAX_CELLS:
        raise UserError(f"the grid has {count} cells; at most {MAX_CELLS} are drawn")
    params = replace(params.apply_tags(), num_images=1)
    rows = [AXES[down.name][1](params, value) for value in down.values]
    if across is None:
        return [[row] for row in rows]
    return [[AXES[across.name][1](row, value) for value in across.values] for row in rows]


def generate_grid(
    pipeline: SubjectPipeline,
    params: GenerationParams,
    axes: tuple[Axis, ...],
    should_stop: Callable[[], bool] | None = None,
    load: Callable[[GenerationParams], GenerationParams] | None = None,
) -> Iterator[Step | Preview | Image | Sheet]:
    """The events of every cell, numbered row by row, and finally the Sheet (not if stopped).

    `load` brings a cell's adapters into the model. It is called for all cells before the first is drawn, so
    that a mistake in the last one is found early, and again before each: the model may not hold all adapters at
    once. Raises UserError.
    """
    load = load or pipeline.complete
    cells = [load(cell) for row in cells_of(params, axes) for cell in row]
    images: list[Image] = []
    for number, cell in enumerate(cells):
        for event in pipeline.generate(load(cell), should_stop=should_stop):
            yield _renumbered(event, number, len(cells))
            if isinstance(event, Image):
                images.append(event)
        if len(images) <= number:
            return
    yield Sheet(_sheet_of([image.pixels for image in images], axes), images[0].params, axes, _origin_of(images))


def _origin_of(images: list[Image]) -> Provenance:
    """The provenance of all cells: base and versions of the first, and every adapter's hash."""
    hashes = {name: sha for image in images for name, sha in image.provenance.adapter_sha256}
    return replace(images[0].provenance, adapter_sha256=tuple(hashes.items()))


def _renumbered(event: Step | Preview | Image, number: int, count: int) -> Step | Preview | Image:
    if not isinstance(event, Step):
        return replace(event, index=number)
    rest = (count - number - 1) * event.eta_sec * event.steps / max(event.steps - event.step, 1)
    return replace(event, index=number, num_images=count, eta_sec=event.eta_sec + rest)


def _sheet_of(pictures: list[PIL.Image.Image], axes: tuple[Axis, ...]) -> PIL.Image.Image:
    down = [axes[0].label(i) for i in range(len(axes[0].values))]
    if len(axes) == 1:
        return draw_sheet([pictures], [""], down)
    across = [axes[1].label(i) for i in range(len(axes[1].values))]
    width = len(across)
    return draw_sheet([pictures[i : i + width] for i in range(0, len(pictures), width)], down, across)


def draw_sheet(rows: list[list[PIL.Image.Image]], row_labels: list[str], column_labels: list[str]) -> PIL.Image.Image:
    """Pictures of equal size in rows, with a caption over each column and left of each row."""
    width, height = rows[0][0].size
    font = ImageFont.load_default(max(11, min(width, height) // 12))
    left = max((_text_width(font, label) for label in row_labels), default=0)
    left = min(left, width) + (2 * MARGIN_PX if left else MARGIN_PX)
    top = font.size + 2 * MARGIN_PX
    cell_w, cell_h = width + MARGIN_PX, height + MARGIN_PX
    sheet = PIL.Image.new("RGB", (left + cell_w * len(rows[0]), top + cell_h * len(rows)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(column_labels):
        middle = left + column * cell_w + width // 2
        draw.text((middle, top // 2), _cut(font, label, width), INK, font, anchor="mm")
    for row, (label, pictures) in enumerate(zip(row_labels, rows)):
        y = top + row * cell_h
        draw.text((left - MARGIN_PX, y + height // 2), _cut(font, label, width), INK, font, anchor="rm")
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (left + column * cell_w, y))
    return sheet


def _text_width(font: ImageFont.FreeTypeFont, text: str) -> int:
    return round(font.getlength(text))


def _cut(font: ImageFont.FreeTypeFont, text: str, width_px: int) -> str:
    """`text`, shortened with an ellipsis until it fits; newlines become spaces, as they would break the layout."""
    text = " ".join(text.split())
    if _text_width(font, text) <= width_px:
        return text
    while text and _text_width(font, text + "…") > width_px:
        text = text[:-1]
    return text + "…"
