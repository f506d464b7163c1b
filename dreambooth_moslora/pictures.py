"""Image files: PNGs, contact sheets, and HTML pages of `dreambooth_moslora/templates`.

The contact sheet of a run holds the user's photos, so it stays in the run folder. A page is one
file: styles and images are embedded, and opening it fetches nothing.
"""

import base64
import re
import textwrap
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps

from dreambooth_moslora.disk.atomic import write_atomic


def write_png(path: Path, image: Image.Image) -> None:
    """Write a PNG, whatever the path's suffix. The folder must exist."""
    write_atomic(path, encode_png(image))


def encode_png(image: Image.Image) -> bytes:
    """Return the image as the content of a PNG file."""
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


TITLE_COLOUR = "#1b1b1f"
CAPTION_COLOUR = "#6a6a72"
SHEET_COLOUR = "#ffffff"
GAP_PX = 8
"""Distance of a contact sheet's images."""
MARGIN_PX = 20
"""Border around a contact sheet."""
SPACING_PX = 8
"""Distance of two lines of text."""
MAX_COLUMNS = 6


@dataclass(frozen=True)
class SheetRow:
    """Row of a contact sheet: images under a title."""

    title: str
    images: list[Image.Image]
    captions: tuple[str, ...] = ()  # one below each image, or none


def draw_contact_sheet(rows: list[SheetRow], path: Path, tile_px: int = 192) -> None:
    """Write the rows that have images, at most MAX_COLUMNS of them in a line, as one PNG."""
    rows = [row for row in rows if row.images]
    columns = min(MAX_COLUMNS, max(len(row.images) for row in rows))
    strips = [draw_row(row, columns, tile_px) for row in rows]
    # Paste the rows below each other.
    width = 2 * MARGIN_PX + strips[0].width
    height = 2 * MARGIN_PX + sum(strip.height for strip in strips)
    sheet = Image.new("RGB", (width, height), SHEET_COLOUR)
    top = MARGIN_PX
    for strip in strips:
        sheet.paste(strip, (MARGIN_PX, top))
        top += strip.height
    write_png(path, sheet)


def draw_row(row: SheetRow, columns: int, tile_px: int) -> Image.Image:
    """Draw a row with its title, its captions, and a gap below it."""
    font = ImageFont.load_default(max(11, tile_px // 14))
    line_px = font.size + SPACING_PX
    width = columns * (tile_px + GAP_PX) - GAP_PX
    # Draw the title, in one line or two.
    title = wrap_text(row.title, font, width)
    title_px = (title.count("\n") + 1) * line_px
    step = tile_px + GAP_PX + (2 * line_px if row.captions else 0)
    lines = -(-len(row.images) // columns)
    strip = Image.new("RGB", (width, title_px + lines * step + GAP_PX), SHEET_COLOUR)
    draw = ImageDraw.Draw(strip)
    draw.text((0, 0), title, fill=TITLE_COLOUR, font=font, spacing=SPACING_PX)
    # Draw each image, whole in a square, with its caption below.
    for number, image in enumerate(row.images):
        line, column = divmod(number, columns)
        x = column * (tile_px + GAP_PX)
        y = title_px + line * step
        tile = ImageOps.pad(image.convert("RGB"), (tile_px, tile_px), color=SHEET_COLOUR)
        strip.paste(tile, (x, y))
        if row.captions:
            caption = wrap_text(row.captions[number], font, tile_px)
            draw.text((x, y + tile_px + 2), caption, CAPTION_COLOUR, font=font, spacing=SPACING_PX)
    return strip


def wrap_text(text: str, font: ImageFont.FreeTypeFont, width_px: int) -> str:
    """Return the text in at most two lines of about `width_px`; an ellipsis ends it if cut."""
    character_px = font.getlength(text) / max(1, len(text))
    max_characters = int(width_px / max(1, character_px))
    return textwrap.fill(
        text, max_characters, max_lines=2, placeholder=" …", break_long_words=False
    )


NUMERIC_CELL = re.compile(r"[-+\d., /%()\[\]e]+")
"""Cell of a table that is aligned like a number."""


def render(template: str, **values: object) -> str:
    """Return the page of a template and its values. Their text is escaped, except in Markdown."""
    return build_environment().get_template(template).render(values)


@cache
def build_environment() -> Environment:
    """Load the templates; `image | jpeg(side_px)`, `figure | png` and `text is numeric` extend
    Jinja."""
    environment = Environment(
        loader=PackageLoader("dreambooth_moslora", "templates"),
        autoescape=lambda name: not name.endswith(".md"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"jpeg": encode_image_url, "png": encode_figure_url}
    environment.tests["numeric"] = NUMERIC_CELL.fullmatch
    return environment


def encode_image_url(image: Image.Image, side_px: int) -> str:
    """Return the image, at most `side_px` large, as the address of an <img>."""
    small = image.convert("RGB")
    small.thumbnail((side_px, side_px))
    buffer = BytesIO()
    small.save(buffer, "JPEG", quality=88)
    return format_data_url("jpeg", buffer)


def encode_figure_url(plot: Figure) -> str:
    """Return the plot as the address of an <img>."""
    buffer = BytesIO()
    plot.savefig(buffer, format="png", dpi=110)
    return format_data_url("png", buffer)


def format_data_url(kind: str, buffer: BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
