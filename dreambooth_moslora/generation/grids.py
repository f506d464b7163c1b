"""Grids: one parameter varies downwards, another across. Each cell is a picture, and a captioned
sheet shows all."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import PIL.Image
from PIL import ImageDraw, ImageFont

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.params import (
    GenerationParams,
    Image,
    Provenance,
    Step,
    recipe_text,
)
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.generation.previews import Preview

MAX_CELLS = 64
# The sheet: around the cells, and its colours
MARGIN_PX = 12
INK = (20, 20, 24)
PAPER = (255, 255, 255)
AXES = {"scale": float, "seed": int, "prompt": str, "adapter": str, "steps": int, "guidance": float}
"""What a grid can vary -> the type of its values. `scale` and `adapter` mean the first adapter; one
that is a value of `adapter` is in no other cell."""


@dataclass(frozen=True)
class Axis:
    """What varies in one direction of a grid."""

    name: str  # one of AXES
    values: tuple[str | int | float, ...]

    def label(self, index: int) -> str:
        """The caption of the value `index`."""
        value = self.values[index]
        if self.name == "prompt":
            return str(value)
        return f"{self.name} {value:g}" if isinstance(value, float) else f"{self.name} {value}"


@dataclass(frozen=True)
class Sheet:
    """All cells of a grid in one picture."""

    pixels: PIL.Image.Image
    params: GenerationParams  # of the first cell
    provenance: Provenance  # of all cells

    def save(self, path: str | Path) -> Path:
        """Write a PNG with the first cell's recipe, and the hashes of all adapters in use."""
        text = recipe_text(self.params, self.provenance)
        self.pixels.save(path, format="PNG", pnginfo=text)
        return Path(path)


def _varied(
    params: GenerationParams, axis: Axis, value: str | int | float, scales: dict
) -> GenerationParams:
    """The parameters of one cell.

    params: of the cell before it varies
    axis: what varies
    value: on the axis; the adapter "none" means none of the axis's
    scales: of the adapters that have their own
    """
    first = params.adapters[:1]
    rest = params.adapters[1:]

    # The scale of the first adapter
    if axis.name == "scale":
        if not first:
            raise UserError("a grid over the scale needs an adapter")
        name, _ = first[0]
        return replace(params, adapters=((name, value), *rest))

    # Another adapter in its place. One of the axis may also have been given beside it.
    if axis.name == "adapter":
        others = tuple(pair for pair in rest if pair[0] not in axis.values)
        if value == "none":
            return replace(params, adapters=others)
        scale = scales.get(value, first[0][1] if first else 1.0)
        return replace(params, adapters=((value, scale), *others))

    # The others are parameters themselves.
    field = "guidance_scale" if axis.name == "guidance" else axis.name
    return replace(params, **{field: value})


def parse_axis(text: str) -> Axis:
    """`scale=0,0.5,1`, or `prompt=a mug|a red mug`, as prompts hold commas. Raises UserError."""
    name, equals, rest = text.partition("=")
    name = name.strip()
    if name not in AXES or not equals:
        raise UserError(
            f"{text!r:.60} is not a grid axis; write one of {', '.join(AXES)}, then = and values"
        )
    kind = AXES[name]
    parts = [part.strip() for part in rest.split("|" if name == "prompt" else ",")]
    try:
        values = tuple(kind(part) for part in parts if part)
    except ValueError as error:
        raise UserError(f"the grid axis {text!r:.60} has a value that is not a number") from error
    if not values:
        raise UserError(f"the grid axis {name!r} has no values")
    return Axis(name, values)


def cells_of(params: GenerationParams, axes: tuple[Axis, ...]) -> list[list[GenerationParams]]:
    """Rows of cells: the first axis goes down, the second, if any, across. Raises UserError for an
    impossible grid."""
    if not 1 <= len(axes) <= 2 or len({axis.name for axis in axes}) != len(axes):
        raise UserError("a grid has one axis or two different ones")
    down = axes[0]
    across = axes[1] if len(axes) == 2 else None
    count = len(down.values) * (len(across.values) if across else 1)
    if count > MAX_CELLS:
        raise UserError(f"the grid has {count} cells; at most {MAX_CELLS} are drawn")

    # Where the scale varies, an adapter's own would undo it.
    params = replace(params.apply_tags(), num_images=1)
    scales = {} if any(axis.name == "scale" for axis in axes) else dict(params.adapters)

    # First the left column, then each of its cells to the right
    rows = [_varied(params, down, value, scales) for value in down.values]
    if across is None:
        return [[row] for row in rows]
    return [[_varied(row, across, value, scales) for value in across.values] for row in rows]


def generate_grid(
    pipeline: SubjectPipeline,
    params: GenerationParams,
    axes: tuple[Axis, ...],
    should_stop: Callable[[], bool] | None = None,
    load: Callable[[GenerationParams], GenerationParams] | None = None,
) -> Iterator[Step | Preview | Image | Sheet]:
    """The events of every cell, row by row, and finally the Sheet (not if stopped).

    pipeline: draws the cells
    params: what all cells share
    axes: one or two
    should_stop: asked after each denoising step
    load: brings a cell's adapters into the model and completes its parameters

    Raises UserError.
    """
    load = load or pipeline.complete

    # For all cells first, to find a mistake before anything is drawn
    cells = [load(cell) for row in cells_of(params, axes) for cell in row]

    images: list[Image] = []
    for number, cell in enumerate(cells):
        # Once more: the adapters of other cells may have taken its adapter's room in the model.
        for event in pipeline.generate(load(cell), should_stop=should_stop):
            yield _of_grid(event, number, len(cells))
            if isinstance(event, Image):
                images.append(event)
        if len(images) <= number:  # stopped
            return
    yield _sheet_of(images, axes)


def _of_grid(event: Step | Preview | Image, number: int, count: int) -> Step | Preview | Image:
    """The event of a single picture, as that of cell `number` of `count`."""
    if not isinstance(event, Step):
        return replace(event, index=number)

    # The time of the other cells: as much for each step as for those that are left in this one
    others = count - number - 1
    rest = others * event.eta_sec * event.steps / max(event.steps - event.step, 1)
    return replace(event, index=number, num_images=count, eta_sec=event.eta_sec + rest)


def _sheet_of(images: list[Image], axes: tuple[Axis, ...]) -> Sheet:
    """The pictures of all cells with captions. Its provenance is that of the first cell, with the
    hashes of every cell's adapters."""
    labels = [[axis.label(i) for i in range(len(axis.values))] for axis in axes]

    # A single axis is shown as one row, whose cells have their captions above.
    columns = labels[-1]
    row_labels = labels[0] if len(axes) == 2 else [""]
    pictures = [image.pixels for image in images]
    rows = [pictures[i : i + len(columns)] for i in range(0, len(pictures), len(columns))]

    hashes = {}
    for image in images:
        hashes |= dict(image.provenance.adapter_sha256)
    return Sheet(
        pixels=draw_sheet(rows, row_labels, columns),
        params=images[0].params,
        provenance=replace(images[0].provenance, adapter_sha256=tuple(hashes.items())),
    )


def draw_sheet(
    rows: list[list[PIL.Image.Image]], row_labels: list[str], column_labels: list[str]
) -> PIL.Image.Image:
    """Pictures of equal size in rows, with a caption over each column and left of each row."""
    # The margins: captions at the left may be as wide as a picture, longer ones are cut.
    width, height = rows[0][0].size
    font = ImageFont.load_default(max(11, min(width, height) // 12))
    widest = max((round(font.getlength(label)) for label in row_labels), default=0)
    left = min(widest, width) + (2 * MARGIN_PX if widest else MARGIN_PX)
    top = font.size + 2 * MARGIN_PX

    cell_w = width + MARGIN_PX
    cell_h = height + MARGIN_PX
    size = (left + cell_w * len(rows[0]), top + cell_h * len(rows))
    sheet = PIL.Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)

    # Captions over the columns
    for column, label in enumerate(column_labels):
        middle = left + column * cell_w + width // 2
        draw.text((middle, top // 2), _cut(font, label, width), INK, font, anchor="mm")

    # Each row: its caption, then its pictures
    for row, (label, pictures) in enumerate(zip(row_labels, rows)):
        y = top + row * cell_h
        place = (left - MARGIN_PX, y + height // 2)
        draw.text(place, _cut(font, label, width), INK, font, anchor="rm")
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (left + column * cell_w, y))
    return sheet


def _cut(font: ImageFont.FreeTypeFont, text: str, width_px: int) -> str:
    """`text`, shortened with an ellipsis until it fits; newlines become spaces, as they would break
    the layout."""
    text = " ".join(text.split())
    if font.getlength(text) <= width_px:
        return text
    while text and font.getlength(text + "…") > width_px:
        text = text[:-1]
    return text + "…"
