"""A row for each photo of a subject: as it is cropped, its caption to edit, and buttons for its mask and to remove it.

One component holds all rows and shows twelve at a time. The server sends `cards`: {photo, picture, remark, caption,
made}, where `photo` is the digest of the clean copy, `picture` a data URL, `caption` what was kept for it, and `made`
what the captioner wrote. The browser sends back its value, [[photo, caption], …] in the cards' order. What was typed
stays with its photo whatever cards come; `made` fills only an empty caption. A new word in `reset` drops what was
typed.

Events: `written` (the value has changed), `keep` (a caption is finished), `mask` and `drop` (of `event.photo`),
`write` (captions are wanted), `masks` (masks are to be shown).
"""

import secrets
from typing import Any

import gradio as gr

from dreambooth_moslora.photos.folder import MOST_BYTES
from dreambooth_moslora.ui.html import escape

EMPTY = "Caption; empty: the words of step 2"
TEMPLATE = f"""
<div class="row-tools">
  <button type="button" data-event="write" title="By a model, into the captions that are empty">Write captions</button>
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
    <textarea rows="3" maxlength="{MOST_BYTES}" placeholder="{escape(EMPTY)}"></textarea>
    <div class="row-foot">
      <span class="row-remark"></span>
      <button type="button" data-event="mask">Mask</button>
      <button type="button" data-event="drop">Remove</button>
    </div>
  </div>
</template>
"""
SCRIPT = r"""
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
CAPTIONS = "(rows) => (rows || []).map(([, caption]) => caption).join('\\n')"
"""The value as the field `captions` of the API: one line for each photo."""


def photo_rows(elem_id: str) -> gr.HTML:
    """The rows; hidden until there are photos."""
    script = {"html_template": TEMPLATE, "js_on_load": SCRIPT, "apply_default_css": False}
    return gr.HTML(label="Photos", visible=False, elem_id=elem_id, cards=[], reset="", **script)


def with_cards(cards: list[dict[str, Any]], *, is_reset: bool = False) -> gr.HTML:
    """The rows of these cards; with `is_reset`, their captions replace what was typed."""
    return gr.HTML(visible=bool(cards), cards=cards, **({"reset": secrets.token_hex(4)} if is_reset else {}))
