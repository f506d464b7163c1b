"""How the page looks: HTML (what came from a user or a file is escaped), CSS, theme, keys, and the
rows of photos. Nothing is fetched."""

import base64
import html
import io
import secrets
from html import escape as escape_html
from typing import Any

import gradio as gr
import PIL.Image

from dreambooth_moslora.photos.folder import MOST_BYTES

THUMBNAIL_PX = 384


def escape(text: str) -> str:
    """The text without markup, and without lone surrogates, which the server cannot send."""
    return escape_html(text.encode("utf-8", "replace").decode())


def progress_card(
    line: str,
    detail: str = "",
    fraction: float | None = None,
    picture: str = "",
    size_px: tuple[int, int] | None = None,
) -> str:
    """A line of state, a bar (`fraction` in 0…1) and a small picture (a data URL) beside them. With
    the size (width, height) that the picture will have, the page shows it in the gallery instead
    (`LARGE_PREVIEW`)."""
    look = (
        'class="large" style="--width:{};--height:{}"'.format(*size_px)
        if size_px
        else 'class="thumb"'
    )
    image = f'<img {look} alt="Preview" src="{escape(picture)}">' if picture else ""
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


def notice(text: str, kind: str = "info") -> str:
    """A notice; `kind` is info, good or bad."""
    return f'<div class="card notice {escape(kind)}">{escape(text)}</div>'


def faint(text: str) -> str:
    return f'<div class="faint">{escape(text)}</div>'


def remarks_card(lines: list[str], title: str = "") -> str:
    """A list under a title; "" for an empty list."""
    heading = f"<b>{escape(title)}</b>" if title else ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    listed = f'<ul class="remarks">{items}</ul>' if items else ""
    return f'<div class="card">{heading}{listed}</div>' if title or lines else ""


def folded_card(title: str, lines: list[str]) -> str:
    """A title, and a list that is folded below it."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    folded = f'<details><summary>Why, and what else is known</summary><ul class="remarks">{items}</ul></details>'
    return f'<div class="card"><b>{escape(title)}</b>{folded}</div>'


def facts_table(facts: list[tuple[str, str]]) -> str:
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in facts
        if value
    )
    return f'<div class="card"><table class="facts">{rows}</table></div>'


def thumbnail(pixels: PIL.Image.Image, side_px: int = THUMBNAIL_PX) -> str:
    """A JPEG data URL of at most 384 px: previews are never written to the disk."""
    small = pixels.copy()
    small.thumbnail((side_px, side_px))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


CSS = """
.gradio-container {
  --page-width: 1240px;
  --gallery-height: 240px;
  --thumbnail: 60px;
  --row-picture: 128px;
}
.gradio-container { width: 100% !important; max-width: var(--page-width) !important; margin: 0 auto !important; }
.html-container { padding: 0 !important; }
#top { align-items: baseline; justify-content: space-between; flex-wrap: nowrap; }
#top > * { width: auto; flex: none; }
#top > .block { margin: 0 !important; }
#top > #base { margin-left: auto !important; }
#top h1 { font-size: 1.25rem; margin: 0; letter-spacing: -.01em; }
.faint, .faint p { color: var(--body-text-color-subdued); font-size: .82rem; }
.tight { gap: 8px !important; align-items: end; }
.tight > button, .tight > .block > button { height: 42px; font-size: .95rem; font-weight: 550; padding: 0 12px;
  white-space: nowrap; }
.icon { font-size: 1.05rem !important; }
.step h3 { font-size: .95rem; margin: 4px 0 -4px; }
.remarks { margin: 6px 0 0 !important; padding-inline-start: 1.1rem !important; font-size: .85rem;
  color: var(--body-text-color-subdued); }
.card summary { margin-top: 4px; font-size: .85rem; color: var(--body-text-color-subdued); cursor: pointer; }
button[role="tab"] { font-weight: 500; }
.tab-container button.selected { color: var(--primary-700); }
.dark .tab-container button.selected { color: var(--primary-400); }

#generate, #train, #inspect { display: grid !important; align-items: start; gap: 16px;
  grid-template-columns: minmax(300px, 5fr) minmax(0, 8fr); }
#generate { grid-template-areas: "ask results" "settings results"; grid-template-rows: auto 1fr; }
#ask { grid-area: ask; } #results { grid-area: results; } #settings { grid-area: settings; }
#generate > div, #train > div, #inspect > div { min-width: 0 !important; width: 100%; }
[data-testid="status-tracker"] .error { display: none; }
#status, #train_status, #status .pending, #train_status .pending { opacity: 1 !important; }
#gallery, #history { min-height: var(--gallery-height); }
#results, #train_watch { scroll-margin-top: 16px; }
#preview { border: 1px solid var(--block-border-color); border-radius: var(--radius-lg);
  background: var(--block-background-fill); padding: 8px !important; }
#preview:not(:has(img)), #preview:has(img) ~ #gallery:not(:has(img)), .card .large { display: none; }
:is(#preview, :is(#gallery, #history) .grid-container:has(> :only-child)) img { display: block; margin: 0 auto;
  height: auto; width: min(100%, 2px * var(--width), max(12rem, 100vh - 20.5rem) * var(--width) / var(--height)); }
:is(#gallery, #history) .grid-container:has(> :only-child) button { aspect-ratio: auto; height: auto; border: 0; }
:is(#gallery, #history, #samples) .grid-wrap { min-height: 0 !important; max-height: none !important;
  overflow-y: auto; }
:is(#gallery, #history, #samples) .grid-container {
  grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important; }
:is(#loss, #fidelity) svg text { fill: var(--body-text-color) !important; }
:is(#loss, #fidelity) svg :is(.role-axis-grid, .role-axis-tick) line,
:is(#loss, #fidelity) svg path.background:not(.role-legend *) { stroke: var(--border-color-primary) !important; }

.row-tools, .row-pages, .row-foot { display: flex; gap: 8px; align-items: center; flex-wrap: wrap; }
.row-pages { margin-left: auto; }
.row-pages[hidden] { display: none; }
.row-range, .row-remark { font-size: .82rem; color: var(--body-text-color-subdued); }
.photo-row { display: grid; gap: 6px 10px; padding: 10px 0; border-bottom: 1px solid var(--block-border-color);
  grid-template: "picture caption" 1fr "picture foot" auto / var(--row-picture) minmax(0, 1fr); }
.photo-row:last-child { border-bottom: 0; }
.photo-row img { grid-area: picture; width: 100%; aspect-ratio: 1; object-fit: contain; align-self: start;
  border-radius: var(--radius-md); background: var(--block-background-fill); }
.photo-row textarea { grid-area: caption; width: 100%; resize: none; field-sizing: content; min-height: 4.8rem;
  font-size: .92rem; padding: 6px 8px; border: 1px solid var(--input-border-color); border-radius: var(--radius-md);
  background: var(--input-background-fill); color: var(--body-text-color); }
.photo-row textarea::placeholder { color: var(--input-placeholder-color); }
.row-foot { grid-area: foot; }
.row-remark { margin-right: auto; overflow-wrap: anywhere; }
.row-leaves { opacity: .4; }
:is(.row-tools, .row-foot) button { height: 34px; padding: 0 var(--row-padding, 12px); font-size: .85rem;
  cursor: pointer; border: 1px solid var(--border-color-primary); border-radius: var(--radius-md);
  background: var(--button-secondary-background-fill); color: var(--button-secondary-text-color); }
:is(.row-tools, .row-foot) button:hover { background: var(--button-secondary-background-fill-hover); }
body:has(#mask_box) { overflow: hidden; }
#mask_box { --mask-side: min(100vw - 20px, 100dvh - 150px); position: fixed; inset: 0; z-index: 100; overflow: auto;
  padding: 10px; gap: 8px; align-items: center; background: var(--body-background-fill); }
#mask_box > * { width: min(100%, var(--mask-side)); flex: none; }
#mask_box:not(:has(canvas))::after { content: "Opening the photo …"; color: var(--body-text-color-subdued); }
#mask_editor, #mask_editor .image-container { height: var(--mask-side) !important; }

#queued .wrap { flex-direction: column; }
#queued label { width: 100%; }

.card { border: 1px solid var(--block-border-color); border-radius: var(--radius-lg);
  background: var(--block-background-fill); padding: 12px 14px; font-size: .92rem; }
.card.run { display: flex; gap: 14px; align-items: center; min-height: 86px; }
.card .thumb { width: var(--thumbnail); height: var(--thumbnail); object-fit: cover;
  border-radius: var(--radius-md); flex: none; }
.card .words { flex: 1; min-width: 0; }
.card .line { font-weight: 550; }
.card .bar { height: 6px; border-radius: 3px; background: var(--neutral-200); margin: 7px 0; overflow: hidden; }
.dark .card .bar { background: var(--neutral-700); }
.card .bar i { display: block; height: 100%; background: var(--primary-600); transition: width .15s linear; }
.card.notice { border-left-width: 4px; }
.card.notice.good { border-left-color: var(--primary-600); }
.card.notice.bad { border-left-color: #dc2626; }
.card.notice.info { border-left-color: var(--neutral-400); }
table.facts { width: 100%; border-collapse: collapse; margin: 0 !important; }
table.facts, table.facts :is(tr, th, td) { border: 0 !important; }
table.facts tr + tr { border-top: 1px solid var(--block-border-color) !important; }
table.facts th { text-align: left; font-weight: 500; color: var(--body-text-color-subdued); width: 11rem;
  vertical-align: top; padding: 6px 12px 6px 0 !important; }
table.facts td { padding: 6px 0 !important; overflow-wrap: anywhere; white-space: pre-wrap; }
footer .divider { display: none; }
:focus-visible { outline: 2px solid var(--primary-600) !important; outline-offset: 2px; }
@media (prefers-reduced-motion: reduce) { * { transition: none !important; animation: none !important; } }
@media (max-width: 760px) {
  #top { flex-wrap: wrap; }
  #top > #base { width: 100%; }
  #results { scroll-margin-top: 66px; }
  .gradio-container main { padding: 12px !important; }
  #generate, #train, #inspect { grid-template-columns: minmax(0, 1fr); gap: 12px; }
  #generate { grid-template-areas: "ask" "results" "settings"; }
  table.facts th { width: 7.5rem; }
  .tight > button, .tight > .block > button { font-size: .88rem; padding: 0 8px; }
  .photo-row { --row-picture: 104px; --row-padding: 7px; }
  .photo-row .row-foot { gap: 5px; }
  #samples .grid-container { --grid-cols: 2 !important; }
  .tab-wrapper { height: 48px !important; }
  .tab-container:not(.visually-hidden) { height: 40px !important; }
  #result_tabs .tab-container button { padding: 0 10px !important; }
  .head .tab-like-container { height: 36px !important; margin-bottom: 0 !important; }
  input[type="range"] { height: 32px; }
  input[type="range"]::-webkit-slider-thumb { width: 22px !important; height: 22px !important;
    margin-top: -7px !important; }
}
"""


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


HEAD = """
<script>
addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, textarea, select, [contenteditable]");
  const closes = document.querySelector(".preview, .options") || document.fullscreenElement;
  const open = document.querySelector("#close_mask");
  if (event.key === "Escape" && !closes) (open || document.querySelector("#stop"))?.click();
  if (event.key === "/" && !typing) {
    const prompt = document.querySelector("#prompt textarea");
    if (prompt && prompt.offsetParent) { event.preventDefault(); prompt.focus(); }
  }
}, true);
document.addEventListener("load", ({target}) => {
  if (!target.matches(":is(#gallery, #history) img")) return;
  target.style.setProperty("--width", target.naturalWidth);
  target.style.setProperty("--height", target.naturalHeight);
}, true);
function bringIntoView(column, last) {
  const [first, end] = [column, last].map((id) => document.getElementById(id));
  const isSeen = first.getBoundingClientRect().top >= 0 && end.getBoundingClientRect().bottom <= innerHeight;
  if (!isSeen) first.scrollIntoView();
}
</script>
"""


LARGE_PREVIEW = """card => {
  const found = new DOMParser().parseFromString(card, "text/html").querySelector(".large");
  return found ? found.outerHTML : "";
}"""
NUMBERS = (gr.Slider, gr.Number)
SHOWN = {
    "show_label": False,
    "format": "png",
    "interactive": False,
    "buttons": ["download", "fullscreen"],
}
"""Options of pictures that are only looked at."""


def explain_bad_values(widget: gr.components.Component) -> None:
    """Make the widget name itself and its expected type when it cannot take a value, such as a box
    of text a list: gradio would take Python's spelling of it, and round what should be whole."""
    own = widget.preprocess

    def preprocess(value: object) -> object:
        try:
            if isinstance(widget, gr.Textbox) and isinstance(value, list | dict):
                raise TypeError
            taken = own(value)
        except gr.Error as error:
            words = f"{widget.label}: {error.message}"
        except (TypeError, ValueError, OverflowError, AttributeError):
            kind = "a number" if isinstance(widget, NUMBERS) else "text"
            words = f"{widget.label} must be {kind}, not {value!r:.30}"
        else:
            if not (isinstance(widget, gr.Number) and widget.precision == 0 and value != taken):
                return taken
            words = f"{widget.label} must be a whole number, not {value!r:.30}"
        raise gr.Error(html.escape(words, quote=False), duration=12, print_exception=False)

    widget.preprocess = preprocess


EMPTY_CAPTION = "Caption; empty: the words of step 2"
ROWS = f"""
<div class="row-tools">
  <button type="button" data-event="write" title="By a model, into the empty captions">Write captions now</button>
  <button type="button" data-event="masks" title="As the run will use them">Show masks</button>
  <span class="row-pages" hidden>
    <button type="button" data-step="-1" aria-label="Earlier photos">‹</button>
    <span class="row-range" aria-live="polite"></span>
    <button type="button" data-step="1" aria-label="Later photos">›</button>
  </span>
</div>
<div class="photo-rows"></div>
<template>
  <div class="photo-row">
    <img alt="">
    <textarea rows="3" maxlength="{MOST_BYTES}" placeholder="{escape(EMPTY_CAPTION)}"></textarea>
    <div class="row-foot">
      <span class="row-remark"></span>
      <button type="button" data-event="mask">Mask</button>
      <button type="button" data-event="drop">Remove</button>
    </div>
  </div>
</template>
"""
"""A row for each photo of a subject: as it is cropped, its caption to edit, and buttons for its
mask and to remove it.

One component holds all rows and shows twelve at a time. The server sends `cards`: {photo, picture,
remark, caption, made}, where `photo` is the digest of the clean copy, `picture` a data URL,
`caption` what was kept for it, and `made` what the captioner wrote. The browser sends back its
value, [[photo, caption], …] in the cards' order. What was typed stays with its photo whatever cards
come; `made` fills only an empty caption. A new word in `reset` drops what was typed.

Events: `written` (the value has changed), `keep` (a caption is finished), `mask` and `drop` (of
`event.photo`), `write` (captions are wanted), `masks` (masks are to be shown).
"""
ROWS_SCRIPT = r"""
const PER_PAGE = 12;
const [list, template, pages, range] = [".photo-rows", "template", ".row-pages", ".row-range"]
  .map((name) => element.querySelector(name));
const typed = new Map(props.value || []), rows = new Map();
let page = 0, reset = props.reset;

const cards = () => props.cards || [];
const inOneLine = (text) => text.replace(/[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+/g, " ");

function say() {
  props.value = cards().map(({photo}) => [photo, typed.get(photo) || ""]);
  trigger("written");
}

function rowOf(photo) {
  if (!rows.has(photo)) {
    const row = template.content.firstElementChild.cloneNode(true);
    const box = row.querySelector("textarea");
    box.addEventListener("input", () => { typed.set(photo, inOneLine(box.value)); say(); });
    box.addEventListener("change", () => trigger("keep"));
    row.addEventListener("click", ({target}) => {
      const {event} = target.closest("button")?.dataset || {};
      if (event === "mask") trigger("mask", {photo});
      if (event === "drop") { row.classList.add("row-leaves"); trigger("drop", {photo}); }
    });
    rows.set(photo, row);
  }
  return rows.get(photo);
}

function draw() {
  const last = Math.max(0, Math.ceil(cards().length / PER_PAGE) - 1), typing = document.activeElement;
  page = Math.min(Math.max(page, 0), last);
  const first = page * PER_PAGE, shown = cards().slice(first, first + PER_PAGE);
  list.replaceChildren(...shown.map(({photo, picture, remark}, place) => {
    const row = rowOf(photo), name = `photo ${first + place + 1}`, box = row.querySelector("textarea");
    row.classList.remove("row-leaves");
    Object.assign(row.querySelector("img"), {src: picture, alt: `${name}, as it is cropped`});
    if (box.value !== (typed.get(photo) || "")) box.value = typed.get(photo) || "";
    box.setAttribute("aria-label", `Caption of ${name}`);
    for (const button of row.querySelectorAll("button"))
      button.setAttribute("aria-label", `${button.textContent}: ${name}`);
    row.querySelector(".row-remark").textContent = `${first + place + 1} · ${remark}`;
    return row;
  }));
  if (list.contains(typing)) typing.focus();
  pages.hidden = last === 0;
  range.textContent = `${first + 1}–${first + shown.length} of ${cards().length}`;
}

function take(isNew) {
  if (props.reset !== reset) typed.clear();
  reset = props.reset;
  for (const {photo, caption, made} of cards()) {
    if (!typed.has(photo)) typed.set(photo, caption);
    if (!typed.get(photo) && isNew) typed.set(photo, made);
  }
  say();
  if (cards().length) trigger("keep");
  draw();
}

element.querySelector(".row-tools").addEventListener("click", ({target}) => {
  const {event, step} = target.closest("button")?.dataset || {};
  if (event === "write") trigger("write");
  if (event === "masks") trigger("masks");
  if (step) { page += Number(step); draw(); }
});
watch(Object.keys(props).filter((name) => /^(cards|reset)$/.test(name)), () => take(true));
take(!props.value);
"""
CAPTIONS = "(rows) => (rows || []).map(([photo, caption]) => `${photo}:${caption}`).join('\\n')"
"""The value as the field `captions`: a photo may be removed elsewhere, so each line names its own.
"""


def photo_rows(elem_id: str) -> gr.HTML:
    """The rows; hidden until there are photos."""
    script = {"html_template": ROWS, "js_on_load": ROWS_SCRIPT, "apply_default_css": False}
    return gr.HTML(label="Photos", visible=False, elem_id=elem_id, cards=[], reset="", **script)


def with_cards(cards: list[dict[str, Any]], *, is_reset: bool = False) -> gr.HTML:
    """The rows of these cards; with `is_reset`, their captions replace what was typed."""
    return gr.HTML(
        visible=bool(cards), cards=cards, **({"reset": secrets.token_hex(4)} if is_reset else {})
    )
