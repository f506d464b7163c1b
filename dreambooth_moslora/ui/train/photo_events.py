"""The photos in the Train tab: the field to drop them, their grid, and the events of both."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.ui import html, state
from dreambooth_moslora.ui.events import (
    GPU_EVENT,
    MESSAGE_EVENT,
    UNQUEUED_EVENT,
    on,
    render_mistake,
)
from dreambooth_moslora.ui.html import build_photo_rows, update_cards
from dreambooth_moslora.ui.photo_copies import PHOTO_TYPES, list_photo_copies
from dreambooth_moslora.ui.train import mask_pictures, train_form, train_photos
from dreambooth_moslora.ui.train.train_form import TrainForm
from dreambooth_moslora.ui.train.train_start import build_config

PHOTO_EVENT = {"concurrency_limit": 4}
"""Options of events that process photos: an estimate need not wait for a start."""
PHOTOS_HINT = (
    "Several places, sides and light. If you have masks, add them too: dog.mask.png for dog.jpg."
)
"""Told while there are no photos."""
MASKS_REMARK = "What is inside the line is learned most."
"""Told above the grid while it shows masks."""


def build_photo_widgets() -> dict[str, Any]:
    """The widgets in which photos are dropped and shown, by name."""
    widgets: dict[str, Any] = {}
    widgets["added"] = gr.File(
        file_count="multiple",
        file_types=PHOTO_TYPES,
        label="3 to 10 photos of one subject",
        height=84,
        elem_id="photos",
    )
    # What is said of the photos, and the grid itself.
    widgets["remarks"] = gr.HTML(html.render_faint(PHOTOS_HINT), elem_id="remarks")
    widgets["crops"] = build_photo_rows("crops")
    return widgets


def connect_photos(ctx: state.AppContext, page: gr.Blocks, fields: dict, parts: dict) -> None:
    """Photos are added and removed, masks shown, captions written, and the prompts told."""
    _connect_adding(ctx, page, fields, parts)
    _connect_masks(ctx, fields, parts)
    _connect_captions(ctx, parts)
    _connect_prompts(ctx, fields, parts)


def _connect_adding(ctx: state.AppContext, page: gr.Blocks, fields: dict, parts: dict) -> None:
    """The photos that are dropped, removed, or there after a reload are shown as cropped."""
    added, remarks, rows = parts["added"], parts["remarks"], parts["crops"]
    shown = [remarks, rows]
    changing = {
        "api_visibility": "private",
        "show_progress_on": remarks,
        "trigger_mode": "multiple",
        **PHOTO_EVENT,
    }

    @on(
        added.upload,
        inputs_kwargs={"files": added, **fields},
        outputs=[added, *shown],
        show_progress="minimal",
        **changing,
    )
    def add(files: list[str] | None, **values) -> tuple:
        """The dropped files leave their field in any case: whatever is dropped next comes beside
        those in the rows."""
        try:
            told = train_photos.add_photos(files or [], ctx.workspace)
            return None, *render_review(ctx, values, remarks=told)
        except Exception as error:
            return None, gr.HTML(render_mistake(error), visible=True), gr.skip()

    @on(rows.drop, inputs_kwargs=fields, outputs=shown, show_progress="hidden", **changing)
    def drop(event: gr.EventData, **values) -> tuple:
        train_photos.remove_photo(ctx.workspace, get_photo_digest(event))
        return render_review(ctx, values)

    # What decides the crops may have changed.
    changes = [page.load]
    for name, row in train_form.list_form_fields().items():
        if row.moves_crops:
            changes.append(fields[name].blur if row.is_number else fields[name].input)

    @on(changes, MESSAGE_EVENT, inputs_kwargs=fields, outputs=shown)
    def update_review(**values) -> tuple:
        return render_review(ctx, values)


def _connect_masks(ctx: state.AppContext, fields: dict, parts: dict) -> None:
    """“Show masks” draws those that a run would use into the grid."""
    remarks, rows = parts["remarks"], parts["crops"]

    @on(
        rows.masks,
        GPU_EVENT,
        inputs_kwargs=fields,
        outputs=[remarks, rows],
        show_progress="minimal",
        show_progress_on=remarks,
        api_visibility="private",
    )
    def show(**values) -> tuple:
        # Each mask lies over its photo in the grid; what is remarkable is told beside it.
        lines = [MASKS_REMARK]
        masks = {}
        config = build_config(ctx, TrainForm(**values))
        for mask in mask_pictures.collect_masks(config, ctx.workspace):
            photo = mask.photo.path
            masks[photo] = mask.path
            if mask.remark:
                lines.append(f"photo {train_photos.parse_number(photo)}: {mask.remark}")
        return render_review(ctx, values, remarks=lines, masks=masks)


def _connect_captions(ctx: state.AppContext, parts: dict) -> None:
    """Captions are kept as they are finished."""
    rows = parts["crops"]

    @on(rows.keep, UNQUEUED_EVENT, inputs=rows, outputs=None, trigger_mode="always_last")
    def keep(captions: Any) -> None:
        train_photos.write_captions(ctx.workspace, captions)


def _connect_prompts(ctx: state.AppContext, fields: dict, parts: dict) -> None:
    """What the words make of the prompts is told as they are typed."""
    names = ("token", "class_word", "subject", "prior_preservation")
    words = {name: fields[name] for name in names}
    changes = [word.change for word in words.values()]

    @on(changes, UNQUEUED_EVENT, inputs_kwargs=words, outputs=parts["prompts"])
    def describe_prompts(**values) -> gr.HTML:
        try:
            instance, class_prompt = TrainForm(**values).build_prompts(ctx.base_name)
        except UserError:
            return gr.HTML(visible=False)
        kept = f" and tells it from “{class_prompt}”" if class_prompt else ""
        return gr.HTML(html.render_faint(f"Learns “{instance}”{kept}."), visible=True)


def get_photo_digest(event: gr.EventData) -> str:
    """The digest that a row's button sends; "" of a script that sends none."""
    return str(event._data.get("photo")) if isinstance(event._data, dict) else ""


def render_review(
    ctx: state.AppContext,
    values: Mapping[str, Any],
    remarks: Sequence[str] = (),
    masks: Mapping[Path, Path | None] | None = None,
) -> tuple:
    """Values of the remarks and rows; hidden without photos.

    - `values` are the form's, which decide the crops.
    - `remarks` come before those on the photos.
    - `masks` are those that a run would use, by photo, if not those beside the photos.
    """
    if not list_photo_copies(ctx.workspace.photos_dir):
        return html.render_faint(PHOTOS_HINT), update_cards([])
    found = train_photos.build_review(ctx, TrainForm(**values), remarks=remarks, masks=masks)
    cards = train_photos.build_cards(found)
    return gr.HTML(found.remarks, visible=True), update_cards(cards)
