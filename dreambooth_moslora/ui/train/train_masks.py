"""The widgets of photos in the Train tab: a grid of them, and a brush to correct their masks.

What a program sends in `photos` and `captions` the page has taken before: photos when they are
dropped, and captions when they are written below the grid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.settings.toys import is_toy
from dreambooth_moslora.ui import html, state
from dreambooth_moslora.ui.events import AT_ONCE, GPU, TELLING, mistake_card, on
from dreambooth_moslora.ui.html import photo_rows, with_cards
from dreambooth_moslora.ui.photo_copies import PHOTO_TYPES, kept_photos
from dreambooth_moslora.ui.train import train_form, train_photos

TAKING_PHOTOS = {"concurrency_limit": 4}
"""Options of events that process photos: an estimate need not wait for a start."""
ABOUT_MASKS = (
    "Several places, sides and light. If you have masks, add them too: dog.mask.png for dog.jpg."
)
"""Told while there are no photos."""
PRIVATE = {"api_visibility": "private", **GPU}
"""Options of events that compute, and that no program calls."""
PROGRESS = gr.Progress()
"""Gradio gives a handler its bar in place of this default."""
WRITING = "Writing captions"
FETCHED = "Qwen3-VL comes from the hub once"
"""Told while captions are written."""


def photo_widgets() -> dict[str, Any]:
    """The widgets in which photos are dropped and shown, by name.

    `photos` is the hidden field for those of a program.
    """
    files = {
        "file_count": "multiple",
        "file_types": PHOTO_TYPES,
        "label": "3 to 10 photos of one subject",
    }
    widgets = {"added": gr.File(height=84, elem_id="photos", **files)}
    # What is said of the photos, of their masks, and the grid itself.
    widgets["photos"] = gr.File(visible=False, **files)
    widgets["remarks"] = gr.HTML(html.faint(ABOUT_MASKS), elem_id="remarks")
    widgets["mask_remarks"] = gr.HTML("", visible=False, elem_id="mask_remarks")
    widgets["crops"] = photo_rows("crops")
    return widgets


def connect_photos(ctx: state.AppContext, page: gr.Blocks, widgets: dict) -> None:
    """Photos are added and removed, captions written, and the prompts told."""
    added, remarks, rows = (widgets[name] for name in ("added", "remarks", "crops"))
    seed = widgets["seed"]
    shown = [remarks, rows]
    changing = {
        "api_visibility": "private",
        "show_progress_on": remarks,
        "trigger_mode": "multiple",
        **TAKING_PHOTOS,
    }

    @on(
        added.upload,
        inputs=[added, seed],
        outputs=[added, *shown],
        show_progress="minimal",
        **changing,
    )
    def add(files: list[str] | None, seed: int) -> tuple:
        """The dropped files leave their field in any case: whatever is dropped next comes beside
        those in the rows."""
        try:
            told = train_photos.add_photos(files or [], ctx.workspace)
            return None, *review(ctx, seed, remarks=told)
        except Exception as error:
            return None, gr.HTML(mistake_card(error), visible=True), gr.skip()

    @on(rows.drop, inputs=seed, outputs=shown, show_progress="hidden", **changing)
    def drop(seed: int, event: gr.EventData) -> tuple:
        train_photos.remove_photo(ctx.workspace, photo_in(event))
        return review(ctx, seed)

    # The photos that a run would use, after a reload or a change of the seed.
    @on([page.load, seed.blur], TELLING, inputs=seed, outputs=shown)
    def again(seed: int) -> tuple:
        return review(ctx, seed)

    # A caption is kept when it is finished.
    @on(rows.keep, AT_ONCE, inputs=rows, outputs=None, trigger_mode="always_last")
    def keep(said: Any) -> None:
        train_photos.keep_captions(ctx.workspace, said)

    # Captions leave out the subject, so its words are sent.
    words = {name: widgets[name] for name in ("token", "class_word")}

    @on(
        rows.write,
        inputs_kwargs={"seed": seed, **words},
        outputs=[*shown, widgets["prompts"]],
        show_progress_on=remarks,
        **PRIVATE,
    )
    def write(seed: int, token: str, class_word: str, progress: gr.Progress = PROGRESS) -> tuple:
        try:
            train_form.prompts_of(token, class_word)
        except UserError as error:
            return gr.skip(), gr.skip(), gr.HTML(mistake_card(error), visible=True)
        made = {}
        told = []
        line = WRITING if is_toy(ctx.base_name) else f"{WRITING}; {FETCHED}"
        progress((0, None), desc=line, unit="photos")
        with ctx.turns.captioning():
            wanted = train_photos.made_captions(ctx, token, class_word, seed)
            for place, (digest, caption, remark) in enumerate(wanted, 1):
                progress((place, None), desc=WRITING, unit="photos")
                made[digest] = caption
                if remark:
                    told.append(remark)
        return *review(ctx, seed, remarks=told, made=made), gr.skip()

    # What the words make of the prompts.
    @on(
        [word.change for word in words.values()],
        AT_ONCE,
        inputs=list(words.values()),
        outputs=widgets["prompts"],
    )
    def prompts(token: str, class_word: str) -> gr.HTML:
        try:
            instance, class_prompt = train_form.prompts_of(token, class_word)
        except UserError:
            return gr.HTML(visible=False)
        learns = f"Learns “{instance}” and tells it from “{class_prompt}”."
        return gr.HTML(html.faint(learns), visible=True)


def photo_in(event: gr.EventData) -> str:
    """The digest that a row's button sends; "" of a script that sends none."""
    return str(event._data.get("photo")) if isinstance(event._data, dict) else ""


def review(
    ctx: state.AppContext,
    seed: int,
    remarks: Sequence[str] = (),
    made: Mapping[str, str] | None = None,
    masks: Mapping[Path, Path | None] | None = None,
    *,
    is_reset: bool = False,
) -> tuple:
    """Values of the remarks and rows; hidden without photos.

    - `seed` is the form's, which decides the crops.
    - `remarks` come before those on the photos.
    - `made` are new captions, by the photos' digests.
    - `masks` are those that a run would use, by photo, if not those beside the photos.
    - With `is_reset` kept captions replace what was typed.
    """
    if not kept_photos(ctx.workspace.photos_dir):
        return html.faint(ABOUT_MASKS), with_cards([])
    found = train_photos.review_kept(ctx, remarks=remarks, seed=seed, masks=masks)
    cards = train_photos.cards_of(found, made or {})
    return gr.HTML(found.remarks, visible=True), with_cards(cards, is_reset=is_reset)


BRUSH_PX = 24
"""Width of the brush on the square to paint on."""
OPACITY = 0.6
"""Of the brush's colours: the photo stays visible below them."""


def mask_editor() -> gr.ImageEditor:
    """The editor of one painted layer."""
    # Two colours: what becomes white in the mask, and what becomes black.
    sides = (train_photos.LEARNED, train_photos.LEFT_OUT)
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
        canvas_size=(train_photos.EDIT_PX, train_photos.EDIT_PX),
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
    # Inputs and outputs of the events below. Progress is shown only on the remarks: gradio would
    # ask a component that shows progress, and all inside it, for their values at every event of
    # the page, and the editor would answer with an upload.
    of_chosen = {"chosen": parts["mask_chosen"], **fields}
    edited = [parts[name] for name in ("mask_box", "mask_about", "mask_editor", "mask_chosen")]
    corrected = [parts[name] for name in ("mask_remarks", "mask_box", "remarks", "crops")]
    making = {"show_progress": "minimal", "show_progress_on": parts["mask_remarks"], **PRIVATE}

    def settings(values: dict) -> TrainConfig:
        """The settings of a run of this form."""
        photos = ctx.workspace.given_photos
        form = train_form.TrainForm(**values)
        # Masks need a word only where a model looks for it.
        if not form.make_masks or is_toy(ctx.base_name):
            form = replace(form, class_word=form.class_word.strip() or "subject")
        config = form.config(ctx.base_name, ctx.resolution_px, photos, ctx.runs_dir / "new")
        return TrainConfig.from_dict(config)

    def pictures(values: dict) -> tuple:
        """Values of `corrected`: the rows with the masks that a run would use, and no brush."""
        masks = list(train_photos.shown_masks(settings(values), ctx.workspace))
        lines = [
            f"photo {train_photos.number_of(mask.photo)}: {mask.remark}"
            for mask in masks
            if mask.remark
        ]
        of_photos = {mask.photo: mask.path for mask in masks}
        rows = review(ctx, values["seed"], masks=of_photos)
        remarks = gr.HTML(html.remarks_card(lines, SHOWN), visible=True)
        return remarks, gr.Column(visible=False), *rows

    @on(parts["crops"].masks, inputs_kwargs=fields, outputs=corrected, **making)
    def show(**values) -> tuple:
        return pictures(values)

    # “Mask” below a photo opens the brush. The browser says so until it is open.
    def edit(event: gr.EventData, **values) -> tuple:
        digest = photo_in(event)
        photo = train_photos.photo_with(ctx.workspace, digest)
        picture = train_photos.editor_picture(ctx.workspace, photo, settings(values))
        told = html.notice(f"Photo {train_photos.number_of(photo)}: {PAINT}")
        value = {"background": picture, "layers": [], "composite": None}
        return gr.Column(visible=True), told, value, digest

    opening = on(parts["crops"].mask, inputs_kwargs=fields, outputs=edited, **making)(edit)
    opening.then(None, js=OPENED, **AT_ONCE)

    # Its buttons.
    @on(
        parts["keep_mask"].click,
        inputs_kwargs={"painted": parts["mask_editor"], **of_chosen},
        outputs=corrected,
        **making,
    )
    def keep(chosen: str, painted: dict | None, **values) -> tuple:
        if not (painted and painted["layers"]):
            raise UserError(train_photos.EMPTY)
        photo = train_photos.photo_with(ctx.workspace, chosen)
        train_photos.keep_mask(ctx.workspace, photo, painted["layers"][0], settings(values))
        return pictures(values)

    @on(parts["remove_mask"].click, inputs_kwargs=of_chosen, outputs=corrected, **making)
    def remove(chosen: str, **values) -> tuple:
        photo = train_photos.photo_with(ctx.workspace, chosen)
        train_photos.beside(photo).unlink(missing_ok=True)
        return pictures(values)

    # When the photos change, the remarks on masks and the brush are closed.
    def closed() -> tuple:
        return gr.HTML(visible=False), gr.Column(visible=False)

    quietly = {"show_progress_on": parts["mask_remarks"], **AT_ONCE}
    closing = {"outputs": corrected[:2], **quietly}
    parts["close_mask"].click(lambda: gr.Column(visible=False), None, parts["mask_box"], **quietly)
    gr.on([parts["reopen"].click, parts["added"].upload], closed, None, **closing)
    parts["crops"].drop(closed, None, **closing)
