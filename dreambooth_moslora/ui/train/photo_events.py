"""Photos in the Train tab: the field to drop them, their grid, and the events of both."""

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
    get_event_value,
    on,
    render_mistake,
)
from dreambooth_moslora.ui.html import build_photo_rows, update_cards
from dreambooth_moslora.ui.photo_copies import DROPPED_TYPES, list_photo_copies
from dreambooth_moslora.ui.train import mask_pictures, train_form, train_photos
from dreambooth_moslora.ui.train.train_form import TrainForm
from dreambooth_moslora.ui.train.train_start import build_config

PHOTO_EVENT = {"concurrency_limit": 4}
"""Options of events that process photos: four at once, so an estimate need not wait for a start."""
PHOTOS_HINT = (
    "Several places, sides and light. Captions and masks can be dropped with their photos: "
    "dog.txt and dog.mask.png for dog.jpg."
)
"""Hint while there are no photos."""
MASKS_REMARK = "What is inside the line is learned most."
"""Remark above the grid while it shows masks."""


def build_photo_widgets() -> dict[str, Any]:
    """Build the widgets in which photos are dropped and shown, by name."""
    widgets: dict[str, Any] = {}
    widgets["added"] = gr.File(
        file_count="multiple",
        file_types=DROPPED_TYPES,
        label="3 to 10 photos of one subject",
        height=84,
        elem_id="photos",
    )
    # The remarks on the photos, and the grid itself.
    widgets["remarks"] = gr.HTML(html.render_faint(PHOTOS_HINT), elem_id="remarks")
    widgets["crops"] = build_photo_rows("crops")
    return widgets


def connect_photos(ctx: state.AppContext, page: gr.Blocks, fields: dict, parts: dict) -> None:
    """Connect adding and removing photos, masks, captions, and the prompts' preview."""
    _connect_adding(ctx, page, fields, parts)
    _connect_subject(ctx, page, fields, parts)
    _connect_masks(ctx, fields, parts)
    _connect_captions(ctx, parts)
    _connect_prompts(ctx, fields, parts)


def _connect_adding(ctx: state.AppContext, page: gr.Blocks, fields: dict, parts: dict) -> None:
    """Show photos as cropped when they are dropped or removed, or the page is loaded."""
    added, remarks, rows = parts["added"], parts["remarks"], parts["crops"]
    review_outputs = [remarks, rows]
    changing = {
        "api_visibility": "private",
        "show_progress_on": remarks,
        "trigger_mode": "multiple",
        **PHOTO_EVENT,
    }

    @on(
        added.upload,
        inputs_kwargs={"files": added, **fields},
        outputs=[added, *review_outputs],
        show_progress="minimal",
        **changing,
    )
    def add(files: list[str] | None, **values) -> tuple:
        """Add the dropped files, and empty their field in any case: what is dropped next comes
        beside those in the rows.
        """
        try:
            add_remarks = train_photos.add_photos(files or [], ctx.workspace)
            return None, *render_review(ctx, values, remarks=add_remarks)
        except Exception as error:
            return None, gr.HTML(render_mistake(error), visible=True), gr.skip()

    @on(rows.drop, inputs_kwargs=fields, outputs=review_outputs, show_progress="hidden", **changing)
    def drop(event: gr.EventData, **values) -> tuple:
        train_photos.remove_photo(ctx.workspace, get_event_value(event, "photo"))
        return render_review(ctx, values)

    @on(rows.drop_all, inputs=None, outputs=review_outputs, show_progress="hidden", **changing)
    def drop_all() -> tuple:
        train_photos.remove_all_photos(ctx.workspace)
        return render_review(ctx, {})

    # Update the grid when the page is loaded, or a field has changed that decides crops or steps.
    changes = [page.load]
    for name, row in train_form.list_form_fields().items():
        if row.updates_photos:
            changes.append(fields[name].blur if row.is_number else fields[name].input)

    @on(changes, MESSAGE_EVENT, inputs_kwargs=fields, outputs=review_outputs)
    def update_review(**values) -> tuple:
        return render_review(ctx, values)


def _connect_subject(ctx: state.AppContext, page: gr.Blocks, fields: dict, parts: dict) -> None:
    """Keep what the form says of the subject with its photos, on the server, and clear both for a
    new subject."""
    named_fields = {
        name: fields[name]
        for name, row in train_form.list_form_fields().items()
        if row.names_subject
    }
    outputs = list(named_fields.values())
    # A pasted word is no `input` to gradio: it is kept when its field is left.
    changes = [widget.input for widget in outputs]
    changes += [widget.blur for widget in outputs if isinstance(widget, gr.Textbox)]

    @on(changes, UNQUEUED_EVENT, inputs_kwargs=named_fields, trigger_mode="always_last")
    def keep_subject(**values) -> None:
        ctx.workspace.subject_fields.update(values)

    def list_values() -> list:
        values = vars(TrainForm()) | ctx.workspace.subject_fields
        return [values[name] for name in named_fields]

    page.load(list_values, None, outputs, **UNQUEUED_EVENT)

    @on(
        parts["crops"].new_subject,
        MESSAGE_EVENT,
        inputs=None,
        outputs=[*(parts[name] for name in ("remarks", "crops", "cost", "anyway")), *outputs],
    )
    def clear_subject() -> list:
        ctx.workspace.subject_fields.clear()
        train_photos.remove_all_photos(ctx.workspace)
        return [*render_review(ctx, {}), "", gr.Button(visible=False), *list_values()]


def _connect_masks(ctx: state.AppContext, fields: dict, parts: dict) -> None:
    """Draw the masks that a run would use into the grid on “Show masks”."""
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
        # Each mask lies over its photo in the grid; the remarks on masks stand above.
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
    """Save each caption when it is finished."""
    rows = parts["crops"]

    @on(rows.keep, UNQUEUED_EVENT, inputs=rows, outputs=None, trigger_mode="always_last")
    def keep(captions: Any) -> None:
        train_photos.write_captions(ctx.workspace, captions)


def _connect_prompts(ctx: state.AppContext, fields: dict, parts: dict) -> None:
    """Show the prompts that follow from the form as it is filled."""
    names = ("token", "class_word", "subject", "prior_preservation")
    prompt_fields = {name: fields[name] for name in names}
    changes = [widget.change for widget in prompt_fields.values()]

    @on(changes, UNQUEUED_EVENT, inputs_kwargs=prompt_fields, outputs=parts["prompts"])
    def describe_prompts(**values) -> gr.HTML:
        try:
            instance, class_prompt = TrainForm(**values).build_prompts(ctx.base_name)
        except UserError:
            return gr.HTML(visible=False)
        class_note = f" and tells it from “{class_prompt}”" if class_prompt else ""
        return gr.HTML(html.render_faint(f"Learns “{instance}”{class_note}."), visible=True)


def render_review(
    ctx: state.AppContext,
    values: Mapping[str, Any],
    remarks: Sequence[str] = (),
    masks: Mapping[Path, Path | None] | None = None,
) -> tuple:
    """Return values of the remarks and rows; the rows are hidden without photos.

    - `values` are the form's, which decide the crops.
    - `remarks` come before those on the photos.
    - `masks` maps photos to the masks of a run (default: those beside the photos).
    """
    if not list_photo_copies(ctx.workspace.photos_dir):
        return html.render_faint(PHOTOS_HINT), update_cards([])
    review = train_photos.build_review(ctx, TrainForm(**values), remarks=remarks, masks=masks)
    cards = train_photos.build_cards(review)
    return gr.HTML(review.remarks, visible=True), update_cards(cards)
