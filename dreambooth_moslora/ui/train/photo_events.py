"""The photos in the Train tab: the field to drop them, their grid, and the events of both."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.ui import html, state
from dreambooth_moslora.ui.events import AT_ONCE, GPU, TELLING, mistake_card, on
from dreambooth_moslora.ui.html import photo_rows, with_cards
from dreambooth_moslora.ui.photo_copies import PHOTO_TYPES, kept_photos
from dreambooth_moslora.ui.train import mask_pictures, train_form, train_photos
from dreambooth_moslora.ui.train.train_form import TrainForm
from dreambooth_moslora.ui.train.train_start import settings_of

TAKING_PHOTOS = {"concurrency_limit": 4}
"""Options of events that process photos: an estimate need not wait for a start."""
ABOUT_PHOTOS = (
    "Several places, sides and light. If you have masks, add them too: dog.mask.png for dog.jpg."
)
"""Told while there are no photos."""
SHOWN = "What is inside the line is learned most."
"""Told above the grid while it shows masks."""


def photo_widgets() -> dict[str, Any]:
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
    widgets["remarks"] = gr.HTML(html.faint(ABOUT_PHOTOS), elem_id="remarks")
    widgets["crops"] = photo_rows("crops")
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
        **TAKING_PHOTOS,
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
            return None, *review(ctx, values, remarks=told)
        except Exception as error:
            return None, gr.HTML(mistake_card(error), visible=True), gr.skip()

    @on(rows.drop, inputs_kwargs=fields, outputs=shown, show_progress="hidden", **changing)
    def drop(event: gr.EventData, **values) -> tuple:
        train_photos.remove_photo(ctx.workspace, photo_in(event))
        return review(ctx, values)

    # What decides the crops may have changed.
    changes = [page.load]
    for name, row in train_form.rows().items():
        if row.moves_crops:
            changes.append(fields[name].blur if row.is_number else fields[name].input)

    @on(changes, TELLING, inputs_kwargs=fields, outputs=shown)
    def again(**values) -> tuple:
        return review(ctx, values)


def _connect_masks(ctx: state.AppContext, fields: dict, parts: dict) -> None:
    """“Show masks” draws those that a run would use into the grid."""
    remarks, rows = parts["remarks"], parts["crops"]

    @on(
        rows.masks,
        GPU,
        inputs_kwargs=fields,
        outputs=[remarks, rows],
        show_progress="minimal",
        show_progress_on=remarks,
        api_visibility="private",
    )
    def show(**values) -> tuple:
        # Each mask lies over its photo in the grid; what is remarkable is told beside it.
        lines = [SHOWN]
        masks = {}
        config = settings_of(ctx, TrainForm(**values))
        for mask in mask_pictures.shown_masks(config, ctx.workspace):
            photo = mask.photo.path
            masks[photo] = mask.path
            if mask.remark:
                lines.append(f"photo {train_photos.number_of(photo)}: {mask.remark}")
        return review(ctx, values, remarks=lines, masks=masks)


def _connect_captions(ctx: state.AppContext, parts: dict) -> None:
    """Captions are kept as they are finished."""
    rows = parts["crops"]

    @on(rows.keep, AT_ONCE, inputs=rows, outputs=None, trigger_mode="always_last")
    def keep(said: Any) -> None:
        train_photos.keep_captions(ctx.workspace, said)


def _connect_prompts(ctx: state.AppContext, fields: dict, parts: dict) -> None:
    """What the words make of the prompts is told as they are typed."""
    names = ("token", "class_word", "subject", "prior_preservation")
    words = {name: fields[name] for name in names}
    changes = [word.change for word in words.values()]

    @on(changes, AT_ONCE, inputs_kwargs=words, outputs=parts["prompts"])
    def prompts(**values) -> gr.HTML:
        try:
            instance, class_prompt = TrainForm(**values).prompts(ctx.base_name)
        except UserError:
            return gr.HTML(visible=False)
        kept = f" and tells it from “{class_prompt}”" if class_prompt else ""
        return gr.HTML(html.faint(f"Learns “{instance}”{kept}."), visible=True)


def photo_in(event: gr.EventData) -> str:
    """The digest that a row's button sends; "" of a script that sends none."""
    return str(event._data.get("photo")) if isinstance(event._data, dict) else ""


def review(
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
    if not kept_photos(ctx.workspace.photos_dir):
        return html.faint(ABOUT_PHOTOS), with_cards([])
    found = train_photos.review_kept(ctx, TrainForm(**values), remarks=remarks, masks=masks)
    cards = train_photos.cards_of(found)
    return gr.HTML(found.remarks, visible=True), with_cards(cards)
