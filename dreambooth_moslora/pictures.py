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
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


INK, FAINT, PAPER = "#1b1b1f", "#6a6a72", "#ffffff"
GAP_PX, MARGIN_PX = 8, 20
MAX_COLUMNS = 6


@dataclass(frozen=True)
class Row:
    title: str
    images: list[Image.Image]
    captions: tuple[str, ...] = ()  # drawn under the pictures, one each, if any


def draw_contact_sheet(rows: list[Row], path: Path, tile_px: int = 192) -> None:
    """Write the rows that have pictures, at most six pictures on a line, as one PNG."""
    rows = [row for row in rows if row.images]
    columns = min(MAX_COLUMNS, max(len(row.images) for row in rows))
    width = 2 * MARGIN_PX + columns * (tile_px + GAP_PX) - GAP_PX
    height = 2 * MARGIN_PX + sum(row_height(row, columns, tile_px) for row in rows)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw, font, line_px = ImageDraw.Draw(sheet), font_of(tile_px), line_height(tile_px)
    top = MARGIN_PX
    for row in rows:
        titles = two_lines(row.title, font, width - 2 * MARGIN_PX)
        for line, text in enumerate(titles):
            draw.text((MARGIN_PX, top + line * line_px), text, fill=INK, font=font)
        first = top + max(1, len(titles)) * line_px
        step = tile_px + GAP_PX + (2 * line_px if row.captions else 0)
        for number, image in enumerate(row.images):
            line, column = divmod(number, columns)
            left, y = MARGIN_PX + column * (tile_px + GAP_PX), first + line * step
            sheet.paste(ImageOps.fit(image.convert("RGB"), (tile_px, tile_px)), (left, y))
            for part, text in enumerate(
                two_lines(row.captions[number], font, tile_px) if row.captions else ()
            ):
                draw.text((left, y + tile_px + 2 + part * line_px), text, fill=FAINT, font=font)
        top += row_height(row, columns, tile_px)
    write_png(path, sheet)


def font_of(tile_px: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(max(11, tile_px // 14))


def line_height(tile_px: int) -> int:
    return font_of(tile_px).size + 8


def row_height(row: Row, columns: int, tile_px: int) -> int:
    lines = -(-len(row.images) // columns)
    caption = 2 * line_height(tile_px) if row.captions else 0
    titles = two_lines(row.title, font_of(tile_px), columns * (tile_px + GAP_PX) - GAP_PX)
    return (
        max(1, len(titles)) * line_height(tile_px) + lines * (tile_px + GAP_PX + caption) + GAP_PX
    )


def two_lines(text: str, font: ImageFont.FreeTypeFont, width_px: int) -> list[str]:
    """The text in at most two lines of `width_px`, broken at spaces; the rest becomes an ellipsis."""
    lines, words = [], text.split()
    while words and len(lines) < 2:
        count = next(
            (
                n
                for n in range(len(words), 1, -1)
                if font.getlength(" ".join(words[:n])) <= width_px
            ),
            1,
        )
        lines.append(" ".join(words[:count]))
        words = words[count:]
    if words:
        lines[-1] += " …"
    return lines


NUMERIC = re.compile(r"[-+\d., /%()\[\]e]+")


def render(template: str, **values: object) -> str:
    """The page that a template makes of the values. Text in them is escaped, but not for Markdown."""
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
    small, buffer = image.convert("RGB"), BytesIO()
    small.thumbnail((side_px, side_px))
    small.save(buffer, "JPEG", quality=88)
    return data_url("jpeg", buffer)


def png_url(plot: Figure) -> str:
    buffer = BytesIO()
    plot.savefig(buffer, format="png", dpi=110)
    return data_url("png", buffer)


def data_url(kind: str, buffer: BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
