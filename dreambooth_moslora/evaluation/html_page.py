"""Parts of a self-contained HTML file: styles and pictures are embedded, and opening it fetches nothing."""

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO

from matplotlib.figure import Figure
from PIL import Image

__all__ = ["figure", "page", "picture", "pictures", "section", "table"]

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
