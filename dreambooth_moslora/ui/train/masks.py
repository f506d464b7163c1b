"""The masks in the Train tab's settings: a picture of each, its warning, and a brush to correct it."""

from typing import TYPE_CHECKING, Any

import gradio as gr

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.ui.adapters.recipes import recipe_of
from dreambooth_moslora.ui.app_state import AT_ONCE, GPU, AppContext, as_gradio_error
from dreambooth_moslora.ui.html_snippets import notice, remarks_card
from dreambooth_moslora.ui.server.users import Visitor
from dreambooth_moslora.ui.train.form import form_of
from dreambooth_moslora.ui.train.mask_corrections import (
    EMPTY,
    ShownMask,
    editor_picture,
    keep_mask,
    put_back,
    shown_masks,
)
from dreambooth_moslora.ui.train.mask_editor import mask_editor
from dreambooth_moslora.ui.train.more_subjects import MOST_SUBJECTS, named
from dreambooth_moslora.ui.train.subject_widgets import review_widgets, reviews, take_given
from dreambooth_moslora.ui.train.watch import picture_rows

if TYPE_CHECKING:
    from dreambooth_moslora.core.config.train_config import TrainConfig

__all__ = ["connect_masks", "mask_widgets"]

PAINT = "green is learned. The brush has green to add, and red to take away."
HOW = "Choose a picture to correct its mask."


def mask_widgets() -> dict[str, Any]:
    show = gr.Button("Show the masks", elem_id="show_masks")
    told = gr.HTML("", visible=False, elem_id="mask_remarks")
    pictures = picture_rows("Masks", "masks", object_fit="contain", buttons=["fullscreen"])
    with gr.Column(visible=False, elem_id="mask_box") as box:
        about = gr.HTML("", elem_id="mask_about")
        editor = mask_editor()
        with gr.Row(elem_classes="tight"):
            keep = gr.Button("Keep this mask", variant="primary", min_width=120, elem_id="keep_mask")
            back = gr.Button("Put the old one back", min_width=120, elem_id="put_mask_back")
    return {
        "show_masks": show,
        "mask_remarks": told,
        "masks": pictures,
        "mask_box": box,
        "mask_about": about,
        "mask_editor": editor,
        "keep_mask": keep,
        "put_mask_back": back,
        "mask_names": gr.State([]),
        "mask_chosen": gr.State(""),
    }


def connect_masks(ctx: AppContext, fields: dict, parts: dict) -> None:
    """Connect the events. Progress is shown only on the remarks: gradio would ask a component that shows
    progress, and all inside it, for their values at every event of the page, and the editor would answer with
    an upload."""
    inputs = {"photos": parts["photos"], **fields}
    numbers = range(1, MOST_SUBJECTS + 1)
    chosen = {"name": parts["mask_chosen"], **inputs}
    shown = [parts[name] for name in ("mask_remarks", "masks", "mask_names", "mask_box")]
    edited = [parts[name] for name in ("mask_box", "mask_about", "mask_editor", "mask_chosen")]
    corrected = [*shown, *review_widgets(parts)]

    def settings(visitor: Visitor, values: dict) -> "TrainConfig":
        from dreambooth_moslora.core.config.train_config import TrainConfig

        if not visitor.has_photos:
            raise UserError("add some photos of your subject first")
        form = form_of(values)
        return TrainConfig.from_dict(
            form.config(
                ctx.base_name,
                ctx.resolution_px,
                visitor.photos_dir,
                ctx.runs_dir / "new",
                recipe_of(ctx, form.like, visitor),
            )
        )

    @as_gradio_error
    def show(request: gr.Request, **values) -> tuple:
        visitor = ctx.visitors.of(request)
        take_given([values[named("photos", number)] for number in numbers], visitor)
        return _pictures(list(shown_masks(settings(visitor, values), visitor)))

    @as_gradio_error
    def edit(names: list[tuple[str, str]], event: gr.SelectData, request: gr.Request, **values) -> tuple:
        visitor = ctx.visitors.of(request)
        if not isinstance(event.index, int) or not 0 <= event.index < len(names):
            raise UserError("show the masks again, and choose one")
        name, label = names[event.index]
        picture = editor_picture(visitor, name, settings(visitor, values))
        value = {"background": picture, "layers": [], "composite": None}
        return gr.Column(visible=True), notice(f"{label.capitalize()}: {PAINT}"), value, name

    def after(change: Any, visitor: Visitor, values: dict) -> tuple:
        warning = change()
        found = _pictures(list(shown_masks(settings(visitor, values), visitor)), warning)
        return (*found, *reviews(ctx, visitor, values["seed"], values["subjects"], values["like"]))

    @as_gradio_error
    def keep(name: str, painted: Any, request: gr.Request, **values) -> tuple:
        if painted is None:
            raise UserError(EMPTY)
        visitor = ctx.visitors.of(request)
        return after(lambda: keep_mask(visitor, name, painted, settings(visitor, values)), visitor, values)

    @as_gradio_error
    def back(name: str, request: gr.Request, **values) -> tuple:
        visitor = ctx.visitors.of(request)
        return after(lambda: put_back(visitor, name), visitor, values)

    making = {"api_visibility": "private", "show_progress": "minimal", "show_progress_on": parts["mask_remarks"], **GPU}
    parts["show_masks"].click(show, inputs_kwargs=inputs, outputs=shown, **making)
    parts["masks"].select(edit, inputs_kwargs={"names": parts["mask_names"], **inputs}, outputs=edited, **making)
    painted = {"painted": parts["mask_editor"], **chosen}
    parts["keep_mask"].click(keep, inputs_kwargs=painted, outputs=corrected, **making)
    parts["put_mask_back"].click(back, inputs_kwargs=chosen, outputs=corrected, **making)
    files = [inputs[named("photos", number)] for number in numbers]
    gone = [event for file in files for event in (file.upload, file.delete, file.clear)]
    gone += [parts["remove_subject"].click, parts["reopen"].click]
    gr.on(gone, _nothing, None, shown, show_progress_on=parts["mask_remarks"], **AT_ONCE)


def _nothing() -> tuple:
    return gr.HTML(visible=False), gr.Gallery(visible=False), [], gr.Column(visible=False)


def _pictures(masks: list[ShownMask], warning: str | None = "") -> tuple:
    """Values for remarks, pictures, names and the editor's box, which closes."""
    lines = [f"{mask.label}: {mask.remark}" for mask in masks if mask.remark]
    titled = remarks_card(lines, HOW)
    pictures = [(mask.picture, mask.remark or "good") for mask in masks]
    return (
        gr.HTML(titled, visible=True),
        gr.Gallery(pictures, visible=True, selected_index=None),
        [(mask.photo, mask.label) for mask in masks],
        gr.Column(visible=False),
    )
