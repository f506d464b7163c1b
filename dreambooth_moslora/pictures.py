"""Pictures as files: PNGs, contact sheets, and HTML pages of the templates in
`dreambooth_moslora/templates`.

The contact sheet of a run holds the user's photos, so it stays in the run folder. A page is one
file: styles and pictures are embedded, and opening it fetches nothing.
"""

import base64
import re
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps

from dreambooth_moslora.disk.atomic import atomic_write


def write_png(path: Path, image: Image.Image) -> None:
    """Write a PNG, whatever the path's suffix. The folder must exist."""
    atomic_write(path, png_bytes(image))


def png_bytes(image: Image.Image) -> bytes:
    """The picture as the content of a PNG file."""
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


# Colours of a contact sheet: titles, captions, the sheet.
INK = "#1b1b1f"
FAINT = "#6a6a72"
PAPER = "#ffffff"
GAP_PX = 8  # Between its pictures.
MARGIN_PX = 20  # Around them.
MAX_COLUMNS = 6  # Most pictures on a line.


@dataclass(frozen=True)
class Row:
    """One row of a contact sheet: pictures under a title."""

    title: str
    images: list[Image.Image]
    captions: tuple[str, ...] = ()  # drawn under the pictures, one each, if any


def draw_contact_sheet(rows: list[Row], path: Path, tile_px: int = 192) -> None:
    """Write the rows that have pictures, at most MAX_COLUMNS of them on a line, as one PNG."""
    # The sheet is as large as its rows need.
    rows = [row for row in rows if row.images]
    columns = min(MAX_COLUMNS, max(len(row.images) for row in rows))
    width = 2 * MARGIN_PX + columns * (tile_px + GAP_PX) - GAP_PX
    height = 2 * MARGIN_PX + sum(row_height(row, columns, tile_px) for row in rows)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = font_of(tile_px)
    line_px = line_height(tile_px)
    top = MARGIN_PX
    for row in rows:
        # The title, in one line or two.
        titles = two_lines(row.title, font, width - 2 * MARGIN_PX)
        for line, text in enumerate(titles):
            draw.text((MARGIN_PX, top + line * line_px), text, fill=INK, font=font)
        # The pictures, each cut to a square, with its caption below.
        first = top + max(1, len(titles)) * line_px
        step = tile_px + GAP_PX + (2 * line_px if row.captions else 0)
        for number, image in enumerate(row.images):
            line, column = divmod(number, columns)
            left = MARGIN_PX + column * (tile_px + GAP_PX)
            y = first + line * step
            tile = ImageOps.fit(image.convert("RGB"), (tile_px, tile_px))
            sheet.paste(tile, (left, y))
            caption = two_lines(row.captions[number], font, tile_px) if row.captions else []
            for part, text in enumerate(caption):
                place = (left, y + tile_px + 2 + part * line_px)
                draw.text(place, text, fill=FAINT, font=font)
        top += row_height(row, columns, tile_px)
    write_png(path, sheet)


def font_of(tile_px: int) -> ImageFont.FreeTypeFont:
    """The font for pictures of such a side."""
    return ImageFont.load_default(max(11, tile_px // 14))


def line_height(tile_px: int) -> int:
    return font_of(tile_px).size + 8


def row_height(row: Row, columns: int, tile_px: int) -> int:
    """Of a row with its title, its captions and the gap below it, px."""
    line_px = line_height(tile_px)
    width = columns * (tile_px + GAP_PX) - GAP_PX
    titles = two_lines(row.title, font_of(tile_px), width)
    title = max(1, len(titles)) * line_px

    caption = 2 * line_px if row.captions else 0
    lines = -(-len(row.images) // columns)
    return title + lines * (tile_px + GAP_PX + caption) + GAP_PX


def two_lines(text: str, font: ImageFont.FreeTypeFont, width_px: int) -> list[str]:
    """The text in at most two lines of `width_px`, broken at spaces; an ellipsis ends it if cut."""
    lines = []
    words = text.split()
    while words and len(lines) < 2:
        # As many words as fit; a single one is never broken.
        count = len(words)
        while count > 1 and font.getlength(" ".join(words[:count])) > width_px:
            count -= 1
        lines.append(" ".join(words[:count]))
        words = words[count:]
    if words:
        lines[-1] += " …"
    return lines


# A cell of a table that is set like a number: one, or several with their signs.
NUMERIC = re.compile(r"[-+\d., /%()\[\]e]+")


def render(template: str, **values: object) -> str:
    """The page that a template makes of the values. Their text is escaped, but not for Markdown."""
    return environment().get_template(template).render(values)


@cache
def environment() -> Environment:
    """The templates, with `image | jpeg(side_px)` and `figure | png` for pictures, and `text is
    numeric`."""
    found = Environment(
        loader=PackageLoader("dreambooth_moslora", "templates"),
        autoescape=lambda name: not name.endswith(".md"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    found.filters |= {"jpeg": jpeg_url, "png": png_url}
    found.tests["numeric"] = NUMERIC.fullmatch
    return found


def jpeg_url(image: Image.Image, side_px: int) -> str:
    """The picture, at most `side_px` large, as the address of an <img>."""
    small = image.convert("RGB")
    small.thumbnail((side_px, side_px))
    buffer = BytesIO()
    small.save(buffer, "JPEG", quality=88)
    return data_url("jpeg", buffer)


def png_url(plot: Figure) -> str:
    """The plot as the address of an <img>."""
    buffer = BytesIO()
    plot.savefig(buffer, format="png", dpi=110)
    return data_url("png", buffer)


def data_url(kind: str, buffer: BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
