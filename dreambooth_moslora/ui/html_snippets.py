"""Small pieces of HTML. Everything that came from a user or a file is escaped here."""

import base64
import io
from html import escape as escape_html

import PIL.Image

__all__ = ["escape", "facts_table", "faint", "notice", "progress_card", "remarks_card", "thumbnail"]

THUMBNAIL_PX = 384


def escape(text: str) -> str:
    """The text without markup, and without lone surrogates, which the server cannot send."""
    return escape_html(text.encode("utf-8", "replace").decode())


def progress_card(line: str, detail: str = "", fraction: float | None = None, picture: str = "") -> str:
    """A line of state, a bar (`fraction` in 0…1) and a small picture (a data URL) beside them."""
    image = f'<img class="thumb" alt="Preview" src="{escape(picture)}">' if picture else ""
    bar = "" if fraction is None else _bar(fraction)
    return (
        f'<div class="card run">{image}<div class="words"><div class="line">{escape(line)}</div>'
        f'{bar}<div class="faint">{escape(detail) or "&nbsp;"}</div></div></div>'
    )


def _bar(fraction: float) -> str:
    percent = round(100 * min(max(fraction, 0.0), 1.0), 1)
    label = f'role="progressbar" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{percent:g}"'
    return f'<div class="bar" {label}><i style="width:{percent:g}%"></i></div>'


def notice(text: str, kind: str = "info") -> str:
    """A notice; `kind` is info, good or bad."""
    return f'<div class="card notice {escape(kind)}">{escape(text)}</div>'


def faint(text: str) -> str:
    """A small remark."""
    return f'<div class="faint">{escape(text)}</div>'


def remarks_card(lines: list[str], title: str = "") -> str:
    """A list under a title; "" for an empty list."""
    heading = f"<b>{escape(title)}</b>" if title else ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    listed = f'<ul class="remarks">{items}</ul>' if items else ""
    return f'<div class="card">{heading}{listed}</div>' if title or lines else ""


def facts_table(facts: list[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts if value)
    return f'<div class="card"><table class="facts">{rows}</table></div>'


def thumbnail(pixels: PIL.Image.Image) -> str:
    """A JPEG data URL of at most 384 px: previews are never written to the disk."""
    small = pixels.copy()
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
