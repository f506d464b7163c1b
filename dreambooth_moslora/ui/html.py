"""How the page looks: HTML, CSS, theme, keys, and the grid of photos.

What came from a user or a file is escaped. The browser fetches nothing from elsewhere.
"""

import base64
import io
from html import escape as escape_html
from pathlib import Path
from typing import Any

import gradio as gr
import PIL.Image

from dreambooth_moslora.errors import escape_control_characters
from dreambooth_moslora.photos.sidecars import MAX_CAPTION_BYTES

THUMBNAIL_PX = 384
"""Longer side of a small preview."""
STATIC_DIR = Path(__file__).parent / "static"
"""CSS, scripts and markup, as files of their own that an editor checks."""


def read_static(name: str) -> str:
    """The text of a file in `STATIC_DIR`."""
    return (STATIC_DIR / name).read_text(encoding="utf-8")


def escape(text: str) -> str:
    """The text without markup, and without lone surrogates, which the server cannot send."""
    return escape_html(text.encode("utf-8", "replace").decode())


def render_progress(
    line: str,
    detail: str = "",
    fraction: float | None = None,
    picture: str = "",
    size_px: tuple[int, int] | None = None,
) -> str:
    """A card that says how far some work is.

    `line` is its state, and `detail` a fainter line below. `fraction` (0…1) draws a bar. `picture`
    is the data URL of a small picture beside them. With `size_px` (width, height), the size that
    the picture will have, the page shows it in the gallery instead (`LARGE_PREVIEW`).
    """
    look = 'class="thumb"'
    if size_px:
        look = 'class="large" style="--width:{};--height:{}"'.format(*size_px)
    image = f'<img {look} alt="Preview" src="{escape(picture)}">' if picture else ""
    # A screen reader hears the bar as a number of percent.
    bar = ""
    if fraction is not None:
        percent = round(100 * min(max(fraction, 0.0), 1.0), 1)
        label = (
            f'role="progressbar" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{percent:g}"'
        )
        bar = f'<div class="bar" {label}><i style="width:{percent:g}%"></i></div>'
    return (
        f'<div class="card run">{image}<div class="words"><div class="line">{escape(line)}</div>'
        f'{bar}<div class="faint">{escape(detail) or "&nbsp;"}</div></div></div>'
    )


def render_notice(text: str, kind: str = "info") -> str:
    """A notice; `kind` is info, good or bad."""
    return f'<div class="card notice {escape(kind)}">{escape(text)}</div>'


def render_faint(text: str) -> str:
    """A small grey line."""
    return f'<div class="faint">{escape(text)}</div>'


def render_log(text: str) -> str:
    """Lines of a log. The page opens it at its newest line: `#log` is scrolled from its end."""
    return f"<pre>{escape(text)}</pre>"


def render_remarks(lines: list[str], title: str = "") -> str:
    """A list under a title; "" for an empty list."""
    heading = f"<b>{escape(title)}</b>" if title else ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    listed = f'<ul class="remarks">{items}</ul>' if items else ""
    return f'<div class="card">{heading}{listed}</div>' if title or lines else ""


def render_folded(title: str, lines: list[str]) -> str:
    """A title, and a list that is folded below it."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    folded = (
        "<details><summary>Why, and what else is known</summary>"
        f'<ul class="remarks">{items}</ul></details>'
    )
    return f'<div class="card"><b>{escape(title)}</b>{folded}</div>'


def render_facts(facts: list[tuple[str, str]]) -> str:
    """Return a table of names and values, without those that have no value. A file's values may
    hold characters that turn a line's direction, so these are spelled out."""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(escape_control_characters(value))}</td></tr>"
        for name, value in facts
        if value
    )
    return f'<div class="card"><table class="facts">{rows}</table></div>'


def encode_thumbnail(pixels: PIL.Image.Image, side_px: int = THUMBNAIL_PX) -> str:
    """A JPEG data URL whose longer side is at most `side_px`, so that no preview is written to the
    disk."""
    small = pixels.copy()
    small.thumbnail((side_px, side_px))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def format_seconds(seconds: float) -> str:
    """4.2 s, 1 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02d} min"


CSS = "\n" + read_static("page.css")
"""The looks of everything that the theme does not decide."""


FONTS = [
    "ui-sans-serif",
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "Roboto",
    "Helvetica",
    "Arial",
    "sans-serif",
]
"""The fonts of the machine: none is fetched."""
THEME = gr.themes.Base(
    primary_hue=gr.themes.colors.teal,
    neutral_hue=gr.themes.colors.zinc,
    radius_size=gr.themes.sizes.radius_md,
    font=FONTS,
    font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
).set(
    body_background_fill="*neutral_50",
    body_background_fill_dark="*neutral_950",
    body_text_color_subdued="*neutral_500",
    input_placeholder_color="*neutral_500",
    block_background_fill="white",
    block_background_fill_dark="*neutral_900",
    block_border_color="*neutral_200",
    block_border_color_dark="*neutral_800",
    block_label_background_fill="transparent",
    block_label_background_fill_dark="transparent",
    block_label_border_width="0px",
    block_title_text_weight="500",
    block_title_text_size="*text_sm",
    input_background_fill="*neutral_50",
    input_background_fill_dark="*neutral_950",
    input_border_color="*neutral_200",
    input_border_color_dark="*neutral_700",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_hover_dark="*primary_500",
    slider_color="*primary_600",
    slider_color_dark="*primary_500",
)
"""Colours and shapes, in light and dark."""


HEAD = f"\n<script>\n{read_static('page.js')}</script>\n"
"""Keys, the sides of shown pictures, and `bringIntoView`, which events call."""


LARGE_PREVIEW = read_static("large_preview.js").rstrip("\n")
"""From a `render_progress` to its large preview, or to ""."""
IMAGE_OPTIONS = {
    "show_label": False,
    "format": "png",
    "interactive": False,
    "buttons": ["download", "fullscreen"],
}
"""Options of pictures that are only looked at."""


CAPTION_PLACEHOLDER = "What this photo shows. Empty: the words of step 2."
"""What an empty caption shows in grey."""
PHOTO_ROWS_TEMPLATE = (
    ("\n" + read_static("photo_rows.html"))
    .replace("MOST_BYTES", str(MAX_CAPTION_BYTES))
    .replace("EMPTY_CAPTION", escape(CAPTION_PLACEHOLDER))
)
"""The photos of a subject as a grid, each as it is cropped. A click opens the caption to edit.

One component holds all. The server sends `cards`: {photo, picture, remark, caption}, where `photo`
is the digest of the clean copy, `picture` a data URL, and `caption` what was kept for it. The
browser sends back its value, [[photo, caption], …] in the cards' order. What was typed stays with
its photo whatever cards come.

Events: `keep` (a caption is finished), `drop` (of `event.photo`), `masks` (masks are to be shown).
"""
PHOTO_ROWS_SCRIPT = "\n" + read_static("photo_rows.js")
"""What moves in the grid; `element`, `props`, `trigger` and `watch` are gradio's."""


def build_photo_rows(elem_id: str) -> gr.HTML:
    """The grid; hidden until there are photos."""
    script = {
        "html_template": PHOTO_ROWS_TEMPLATE,
        "js_on_load": PHOTO_ROWS_SCRIPT,
        "apply_default_css": False,
    }
    return gr.HTML(label="Photos", visible=False, elem_id=elem_id, cards=[], **script)


def update_cards(cards: list[dict[str, Any]]) -> gr.HTML:
    """The grid of these cards."""
    return gr.HTML(visible=bool(cards), cards=cards)


def build_run_list(elem_id: str) -> gr.HTML:
    """The list of runs; hidden until there are some.

    The server sends `cards`: {run, picture, state, date, kind}, and which is `chosen`. Its event is
    `choose` (of `event.run`).
    """
    script = {
        "html_template": "\n" + read_static("runs.html"),
        "js_on_load": "\n" + read_static("runs.js"),
        "apply_default_css": False,
    }
    return gr.HTML(label="Runs", visible=False, elem_id=elem_id, cards=[], chosen="", **script)
