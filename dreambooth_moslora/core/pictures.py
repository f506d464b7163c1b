"""Pictures as files: PNGs written whole, contact sheets, and HTML pages that hold their pictures.

Writes pictures as PNG files, completely or not at all, and draws the contact sheet of a run.

The sheet shows the photos, step 0 beside the end at the same seeds, and new contexts. As it holds the user's
photos, it stays in the run folder and is never uploaded.

Parts of a self-contained HTML file: styles and pictures are embedded, and opening it fetches nothing.
"""

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps

from dreambooth_moslora.core.atomic_files import atomic_write


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
    """A titled row; `captions`, if any, are drawn under the pictures, one each."""

    title: str
    images: list[Image.Image]
    captions: tuple[str, ...] = ()


def draw_contact_sheet(rows: list[Row], path: Path, tile_px: int = 192) -> None:
    """Write the rows that have pictures, at most six pictures on a line, as one PNG."""
    rows = [row for row in rows if row.images]
    columns = min(MAX_COLUMNS, max(len(row.images) for row in rows))
    width = 2 * MARGIN_PX + columns * (tile_px + GAP_PX) - GAP_PX
    height = 2 * MARGIN_PX + sum(row_height(row, columns, tile_px) for row in rows)
    sheet = Image.new("RGB", (width, height), PAPER)
    top = MARGIN_PX
    for row in rows:
        draw_row(sheet, row, top, columns, tile_px)
        top += row_height(row, columns, tile_px)
    write_png(path, sheet)


def font_of(tile_px: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(max(11, tile_px // 14))


def line_height(tile_px: int) -> int:
    return font_of(tile_px).size + 8


def row_height(row: Row, columns: int, tile_px: int) -> int:
    lines = -(-len(row.images) // columns)
    caption = 2 * line_height(tile_px) if row.captions else 0
    return line_height(tile_px) + lines * (tile_px + GAP_PX + caption) + GAP_PX


def draw_row(sheet: Image.Image, row: Row, top: int, columns: int, tile_px: int) -> None:
    draw, font = ImageDraw.Draw(sheet), font_of(tile_px)
    draw.text((MARGIN_PX, top), row.title, fill=INK, font=font)
    step = tile_px + GAP_PX + (2 * line_height(tile_px) if row.captions else 0)
    for number, image in enumerate(row.images):
        line, column = divmod(number, columns)
        left, y = MARGIN_PX + column * (tile_px + GAP_PX), top + line_height(tile_px) + line * step
        sheet.paste(ImageOps.fit(image.convert("RGB"), (tile_px, tile_px)), (left, y))
        for part, text in enumerate(two_lines(row.captions[number], font, tile_px) if row.captions else ()):
            draw.text((left, y + tile_px + 2 + part * line_height(tile_px)), text, fill=FAINT, font=font)


def two_lines(text: str, font: ImageFont.FreeTypeFont, width_px: int) -> list[str]:
    """The text in at most two lines of `width_px`, broken at spaces; the rest becomes an ellipsis."""
    lines, words = [], text.split()
    while words and len(lines) < 2:
        count = next((n for n in range(len(words), 1, -1) if font.getlength(" ".join(words[:n])) <= width_px), 1)
        lines.append(" ".join(words[:count]))
        words = words[count:]
    if words:
        lines[-1] += " …"
    return lines


STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --faint: #6a6a72; --paper: #fff; --line: #ddd;
  --good: #1a7f37; --bad: #b42318 }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf0; --faint: #a0a0aa; --paper: #17171a; --line: #3a3a40;
  --good: #4ac26b; --bad: #ff8b7d } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1100px;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
table { border-collapse: collapse; display: block; overflow-x: auto } th, td { padding: .3rem .7rem; text-align: left;
  border-bottom: 1px solid var(--line); vertical-align: top } td.number { font-variant-numeric: tabular-nums;
  white-space: nowrap } .faint { color: var(--faint) } .good { color: var(--good) } .bad { color: var(--bad) }
img { border-radius: 4px; vertical-align: top } .tiles { display: flex; flex-wrap: wrap; gap: 6px; margin: .3rem 0 }
.tiles img { width: 128px; height: 128px; object-fit: cover } .plot img { max-width: 100%; background: #fff }
"""
NUMERIC = re.compile(r"[-+\d., /%()\[\]e]+")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, parts: Iterable[str]) -> str:
    """The whole document. `parts` are HTML; `title` is text."""
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title><style>{STYLE}</style>'
    )
    body = f"<h1>{escape(title)}</h1>" + "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def section(title: str, *parts: str) -> str:
    return f"<h2>{escape(title)}</h2>" + "\n".join(parts)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows of text and numbers, escaped; numbers do not wrap."""

    def cell(value: object) -> str:
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        kind = ' class="number"' if NUMERIC.fullmatch(text) else ""
        return f"<td{kind}>{escape(text)}</td>"

    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def picture(image: Image.Image, caption: str = "", side_px: int = 256) -> str:
    """An <img> with the embedded picture, at most `side_px` large; the caption is its alternative text."""
    small = image.convert("RGB")
    small.thumbnail((side_px, side_px))
    buffer = BytesIO()
    small.save(buffer, "JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{escape(caption)}" title="{escape(caption)}">'


def pictures(images: Sequence[Image.Image], caption: str = "") -> str:
    return f'<div class="tiles">{"".join(picture(image, caption) for image in images)}</div>'


def figure(plot: Figure, caption: str) -> str:
    """A matplotlib figure as a picture in the page."""
    buffer = BytesIO()
    plot.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<div class="plot"><img src="data:image/png;base64,{data}" alt="{escape(caption)}"></div>'
