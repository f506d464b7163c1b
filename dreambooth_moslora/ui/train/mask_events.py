"""Masks in the Train tab: a brush to correct them, and the events around it."""

from dataclasses import replace
from typing import Any

import gradio as gr

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.settings.toys import is_toy
from dreambooth_moslora.ui import html, state
from dreambooth_moslora.ui.events import AT_ONCE, on
from dreambooth_moslora.ui.train import mask_pictures, train_photos
from dreambooth_moslora.ui.train.photo_events import PRIVATE, photo_in, review
from dreambooth_moslora.ui.train.train_form import TrainForm
from dreambooth_moslora.ui.train.train_start import settings_of

BRUSH_PX = 24
"""Width of the brush on the square to paint on."""
OPACITY = 0.6
"""Of the brush's colours: the photo stays visible below them."""


def mask_editor() -> gr.ImageEditor:
    """The editor of one painted layer."""
    # Two colours: what becomes white in the mask, and what becomes black.
    sides = (mask_pictures.LEARNED, mask_pictures.LEFT_OUT)
    colours = [f"rgba({red}, {green}, {blue}, {OPACITY})" for red, green, blue in sides]
    brush = gr.Brush(
        default_size=BRUSH_PX,
        colors=colours,
        default_color=colours[0],
        color_mode="fixed",
    )
    # Nothing else can be done with the photo.
    return gr.ImageEditor(
        type="pil",
        image_mode="RGBA",
        canvas_size=(mask_pictures.EDIT_PX, mask_pictures.EDIT_PX),
        brush=brush,
        eraser=gr.Eraser(default_size=BRUSH_PX),
        label="Mask",
        show_label=False,
        elem_id="mask_editor",
        format="png",
        interactive=True,
        sources=(),
        transforms=(),
        layers=False,
        buttons=[],
    )


PAINT = "green is learned. The brush has green to add, and red to take away."
"""Told above the editor, after the photo's name."""
OPENED = "() => document.body.classList.remove('opens-mask')"
"""The browser no longer says that the brush opens."""
SHOWN = "What is inside the line is learned most. Click a photo and “Mask” to correct it."
"""Told above the grid while it shows masks."""


def mask_widgets() -> dict[str, Any]:
    """The brush, which fills the window while it is open."""
    parts: dict[str, Any] = {"mask_chosen": gr.State("")}
    with gr.Column(visible=False, elem_id="mask_box") as parts["mask_box"]:
        parts["mask_about"] = gr.HTML("", elem_id="mask_about")
        parts["mask_editor"] = mask_editor()
        with gr.Row(elem_classes="tight"):
            parts["keep_mask"] = gr.Button(
                "Keep this mask", variant="primary", min_width=130, elem_id="keep_mask"
            )
            parts["remove_mask"] = gr.Button(
                "Remove the mask", min_width=170, elem_id="remove_mask"
            )
            parts["close_mask"] = gr.Button("Close", min_width=64, elem_id="close_mask")
    return parts


def connect_masks(ctx: state.AppContext, fields: dict, parts: dict) -> None:
    """The masks that a run would use are shown in the rows, and corrected with a brush."""
    # Progress is shown only on the remarks: gradio would ask a component that shows progress, and
    # all inside it, for their values at every event of the page, and the editor would answer with
    # an upload.
    making = {"show_progress": "minimal", "show_progress_on": parts["mask_remarks"], **PRIVATE}
    _connect_showing(ctx, fields, parts, making)
    _connect_brush(ctx, fields, parts, making)
    _connect_closing(parts)


def shown_in(parts: dict) -> list:
    """The widgets of `pictures_of`, in its order."""
    return [parts[name] for name in ("mask_remarks", "mask_box", "remarks", "crops")]


def run_of(ctx: state.AppContext, values: dict) -> TrainConfig:
    """The settings of a run of this form. Raises UserError."""
    form = TrainForm(**values)
    # Masks need a word only where a model looks for it.
    if not form.make_masks or is_toy(ctx.base_name):
        form = replace(form, class_word=form.class_word.strip() or "subject")
    return settings_of(ctx, form)


def pictures_of(ctx: state.AppContext, values: dict) -> tuple:
    """The rows with the masks that a run of the form would use, and no brush."""
    masks = list(mask_pictures.shown_masks(run_of(ctx, values), ctx.workspace))
    lines = [
        f"photo {train_photos.number_of(mask.photo)}: {mask.remark}"
        for mask in masks
        if mask.remark
    ]
    rows = review(ctx, values, masks={mask.photo: mask.path for mask in masks})
    remarks = gr.HTML(html.remarks_card(lines, SHOWN), visible=True)
    return remarks, gr.Column(visible=False), *rows


def _connect_showing(ctx: state.AppContext, fields: dict, parts: dict, making: dict) -> None:
    """“Show masks”, and “Mask” below a photo, which opens the brush."""

    @on(parts["crops"].masks, inputs_kwargs=fields, outputs=shown_in(parts), **making)
    def show(**values) -> tuple:
        return pictures_of(ctx, values)

    # The browser says that the brush opens, until it is open.
    def edit(event: gr.EventData, **values) -> tuple:
        digest = photo_in(event)
        photo = train_photos.photo_with(ctx.workspace, digest)
        picture = mask_pictures.editor_picture(ctx.workspace, photo, run_of(ctx, values))
        told = html.notice(f"Photo {train_photos.number_of(photo)}: {PAINT}")
        value = {"background": picture, "layers": [], "composite": None}
        return gr.Column(visible=True), told, value, digest

    edited = [parts[name] for name in ("mask_box", "mask_about", "mask_editor", "mask_chosen")]
    opening = on(parts["crops"].mask, inputs_kwargs=fields, outputs=edited, **making)(edit)
    opening.then(None, js=OPENED, **AT_ONCE)


def _connect_brush(ctx: state.AppContext, fields: dict, parts: dict, making: dict) -> None:
    """What was painted is kept, or the photo left without a mask."""
    of_chosen = {"chosen": parts["mask_chosen"], **fields}
    outputs = shown_in(parts)

    @on(
        parts["keep_mask"].click,
        inputs_kwargs={"painted": parts["mask_editor"], **of_chosen},
        outputs=outputs,
        **making,
    )
    def keep(chosen: str, painted: dict | None, **values) -> tuple:
        if not (painted and painted["layers"]):
            raise UserError(mask_pictures.EMPTY)
        photo = train_photos.photo_with(ctx.workspace, chosen)
        layer = painted["layers"][0]
        mask_pictures.keep_mask(ctx.workspace, photo, layer, run_of(ctx, values))
        return pictures_of(ctx, values)

    @on(parts["remove_mask"].click, inputs_kwargs=of_chosen, outputs=outputs, **making)
    def remove(chosen: str, **values) -> tuple:
        photo = train_photos.photo_with(ctx.workspace, chosen)
        mask_pictures.beside(photo).unlink(missing_ok=True)
        return pictures_of(ctx, values)


def _connect_closing(parts: dict) -> None:
    """When the photos change, the remarks on masks and the brush are closed."""
    remarks, box = parts["mask_remarks"], parts["mask_box"]

    def closed() -> tuple:
        return gr.HTML(visible=False), gr.Column(visible=False)

    quietly = {"show_progress_on": remarks, **AT_ONCE}
    closing = {"outputs": [remarks, box], **quietly}
    parts["close_mask"].click(lambda: gr.Column(visible=False), None, box, **quietly)
    gr.on([parts["reopen"].click, parts["added"].upload], closed, None, **closing)
    parts["crops"].drop(closed, None, **closing)
