"""Look of the page: HTML, CSS, theme, keys, and the grid of photos.

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
"""Folder of the CSS, scripts and markup, in files that an editor can check."""


def read_static(name: str) -> str:
    """Read the text of a file in `STATIC_DIR`."""
    return (STATIC_DIR / name).read_text(encoding="utf-8")


def escape(text: str) -> str:
    """Escape markup, and replace lone surrogates, which the server cannot send."""
    return escape_html(text.encode("utf-8", "replace").decode())


def render_progress(
    line: str,
    detail: str = "",
    fraction: float | None = None,
    preview: str = "",
    size_px: tuple[int, int] | None = None,
) -> str:
    """Render a card with the progress of some work.

    - `line` is its state, and `detail` a fainter line below.
    - `fraction` (0…1) draws a bar.
    - `preview` is the data URL of a small image beside them.
    - With `size_px` (width, height), the size of the final image, the page shows the preview in the
      gallery instead (`LARGE_PREVIEW`).
    """
    # The image, if there is one.
    attributes = 'class="thumb"'
    if size_px:
        attributes = 'class="large" style="--width:{};--height:{}"'.format(*size_px)
    image = f'<img {attributes} alt="Preview" src="{escape(preview)}">' if preview else ""
    # The bar, which a screen reader reads out in percent.
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
    """Render a notice; `kind` is info, good or bad."""
    return f'<div class="card notice {escape(kind)}">{escape(text)}</div>'


def render_faint(text: str) -> str:
    """Render a small grey line."""
    return f'<div class="faint">{escape(text)}</div>'


def render_remarks(lines: list[str], title: str = "") -> str:
    """Render a list under a title; "" if both are empty."""
    heading = f"<b>{escape(title)}</b>" if title else ""
    return f'<div class="card">{heading}{_render_items(lines)}</div>' if title or lines else ""


def render_folded(title: str, lines: list[str]) -> str:
    """Render a title with a folded list below it."""
    summary = "<summary>Why, and what else is known</summary>"
    folded = f"<details>{summary}{_render_items(lines)}</details>"
    return f'<div class="card"><b>{escape(title)}</b>{folded}</div>'


def _render_items(lines: list[str]) -> str:
    """Render an unordered list; "" if it is empty."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="remarks">{items}</ul>' if items else ""


def render_legend(title: str, entries: list[tuple[str, str]]) -> str:
    """Render (colour, text) of each curve of a plot in a line that may wrap; "" without any."""
    spans = "".join(
        f'<span><i style="background:{color}"></i>{escape(text)}</span>' for color, text in entries
    )
    return f'<div class="legend">{escape(title)} {spans}</div>' if entries else ""


def render_facts(facts: list[tuple[str, str]]) -> str:
    """Render a table of names and values, without empty values. Characters that turn a line's
    direction, which a file's values may hold, are spelled out.
    """
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(escape_control_characters(value))}</td></tr>"
        for name, value in facts
        if value
    )
    return f'<div class="card"><table class="facts">{rows}</table></div>'


def encode_thumbnail(pixels: PIL.Image.Image, side_px: int = THUMBNAIL_PX) -> str:
    """Return a JPEG data URL with sides of at most `side_px`; no preview is written to disk."""
    small = pixels.copy()
    small.thumbnail((side_px, side_px))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def format_seconds(seconds: float) -> str:
    """Format seconds as 4.2 s, 1 min 05 s or 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02d} min"


CSS = "\n" + read_static("page.css")
"""Styles of everything that the theme does not decide."""
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
"""Fonts of the user's machine: none is fetched."""
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
"""Keys, the sizes of images, and `bringIntoView`, which events call."""
LARGE_PREVIEW = read_static("large_preview.js").rstrip("\n")
"""JavaScript function from a card of `render_progress` to its large preview, or to ""."""
IMAGE_OPTIONS = {
    "show_label": False,
    "format": "png",
    "interactive": False,
    "buttons": ["download", "fullscreen"],
}
"""Options of images that the user only looks at."""
CAPTION_PLACEHOLDER = "What this photo shows. Empty: the words of step 2."
"""Grey text in an empty caption."""
PHOTO_ROWS_TEMPLATE = (
    ("\n" + read_static("photo_rows.html"))
    .replace("MOST_BYTES", str(MAX_CAPTION_BYTES))
    .replace("EMPTY_CAPTION", escape(CAPTION_PLACEHOLDER))
)
"""Grid of a subject's photos as they are cropped. A click opens a photo's caption to edit.

The server sends `cards`: {photo, picture, remark, caption}, where `photo` is the digest of the
clean copy, `picture` a data URL, and `caption` the saved one. The browser sends back its value,
[[photo, caption], …] in the cards' order. The text that was typed stays with its photo when other
cards come.

Events: `keep` (a caption is finished), `drop` (remove `event.photo`), `drop_all` (remove all
photos), `new_subject` (clear the words too), `masks` (show the masks).
"""
PHOTO_ROWS_SCRIPT = "\n" + read_static("photo_rows.js")
"""Behaviour of the grid; `element`, `props`, `trigger` and `watch` are gradio's."""


def build_photo_rows(elem_id: str) -> gr.HTML:
    """Build the grid of photos; it is hidden until there are photos."""
    return _build_card_list("Photos", elem_id, PHOTO_ROWS_TEMPLATE, PHOTO_ROWS_SCRIPT)


def _build_card_list(label: str, elem_id: str, template: str, script: str, **props: Any) -> gr.HTML:
    """Build a component without cards, which is hidden, from its template and script."""
    return gr.HTML(
        label=label,
        visible=False,
        elem_id=elem_id,
        cards=[],
        html_template=template,
        js_on_load=script,
        apply_default_css=False,
        **props,
    )


def update_cards(cards: list[dict[str, Any]]) -> gr.HTML:
    """Return the grid with these cards; without any it forgets the typed captions."""
    forgotten = {} if cards else {"value": []}
    return gr.HTML(visible=bool(cards), cards=cards, **forgotten)


def build_run_list(elem_id: str) -> gr.HTML:
    """Build the list of runs; it is hidden until there are some.

    Its value has `cards`: {run, picture, state, date, kind}, and `chosen`, the name of the
    selected run. Its event is `choose` (select `event.run`).
    """
    template, script = ("\n" + read_static(name) for name in ("runs.html", "runs.js"))
    return _build_card_list("Runs", elem_id, template, script)
