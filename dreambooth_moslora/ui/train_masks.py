"""The widgets of photos in the Train tab: of each subject, and of their masks with a brush to correct them.

Gradio's ImageEditor has limits here: uploads are bounded before they are decoded, and unused ones are dropped.
"""

import io
import shutil
from collections import OrderedDict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import fastapi
import gradio as gr
import PIL.Image

from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import NONE
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.ui import html, state, train_form, train_photos, train_start, train_watch, visitors

TAKING_PHOTOS = {"concurrency_limit": 4}
"""Options of events that process photos: visitors take turns photo by photo (`visitors.ONE_AT_A_TIME`)."""
ABOUT_MASKS = "A mask goes along as name.mask.png beside name.jpg: only what is white in it is learned."
FURTHER = range(2, train_form.MOST_SUBJECTS + 1)
NARROW = {"min_width": 110}


def photo_widgets(number: int = 1) -> dict[str, Any]:
    """The widgets in which a subject's photos are dropped and shown."""
    photos = gr.File(
        file_count="multiple",
        file_types=visitors.PHOTO_TYPES,
        label="4 to 10 photos of one subject" if number == 1 else f"4 to 10 photos of subject {number}",
        height=130,
        elem_id=train_form.named("photos", number),
    )
    if number == 1:
        gr.HTML(html.faint(ABOUT_MASKS))
    remarks = gr.HTML(visible=False, elem_id=train_form.named("remarks", number))
    look = {"object_fit": "contain", "buttons": ["fullscreen"], "elem_classes": "crops"}
    crops = train_watch.picture_rows("Crops", train_form.named("crops", number), **look)
    return {
        train_form.named("photos", number): photos,
        train_form.named("remarks", number): remarks,
        train_form.named("crops", number): crops,
    }


def subject_widgets() -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields under the names of the API, and the other widgets. All but one button is hidden at first."""
    fields = {"subjects": gr.Number(1, visible=False, precision=0, label="Subjects", elem_id="subjects")}
    parts: dict[str, Any] = {}
    for number in FURTHER:
        with gr.Column(visible=False, elem_id=f"subject_{number}") as box:
            gr.Markdown(f"### Subject {number}", elem_classes="step")
            shown = photo_widgets(number)
            own = further_fields(number)
            prompts = gr.HTML(visible=False, elem_id=train_form.named("prompts", number))
        fields |= {train_form.named("photos", number): shown.pop(train_form.named("photos", number)), **own}
        parts |= shown | {f"subject_{number}": box, train_form.named("prompts", number): prompts}
    with gr.Row():
        add = gr.Button("Add another subject", size="sm", min_width=132, elem_id="add_subject")
        remove = gr.Button("Remove subject 2", size="sm", min_width=132, visible=False, elem_id="remove_subject")
    return fields, parts | {"add_subject": add, "remove_subject": remove}


def further_fields(number: int) -> dict[str, Any]:
    def text(name: str, label: str, placeholder: str, value: str = "", **look: Any) -> gr.Textbox:
        return gr.Textbox(value, label=label, placeholder=placeholder, elem_id=train_form.named(name, number), **look)

    with gr.Row():
        class_word = text("class_word", "What these show", "cat", **NARROW)
        token = text("token", "Token", "a rare word", train_form.TOKENS[number - 1], **NARROW)
    captions = text("captions", "Captions", "one line for each photo, in order; may be left out", lines=1)
    begin_as = text("tokens_begin_as", "Its new tokens begin as", "words like it; or empty", visible=False)
    words = (class_word, token, captions, begin_as)
    return {
        train_form.named(name, number): widget
        for name, widget in zip(train_form.SubjectWords.__dataclass_fields__, words, strict=True)
    }


def take_given(files: Sequence[list[str] | None], visitor: visitors.Visitor) -> None:
    """Make clean copies of the added photos of each subject; other photos do not change."""
    for number, of_one in enumerate(files, 1):
        if of_one:
            train_photos.take_with_masks(of_one, visitor, number)


def connect_subjects(ctx: state.AppContext, page: gr.Blocks, fields: dict, parts: dict) -> None:
    everything = fields | parts

    def words(token: str, class_word: str) -> gr.HTML:
        try:
            instance, class_prompt = train_form.prompts_of(token, class_word)
        except UserError:
            return gr.HTML(visible=False)
        return gr.HTML(html.notice(f"Learns “{instance}” and tells it from “{class_prompt}”."), visible=True)

    for number in range(1, train_form.MOST_SUBJECTS + 1):
        token, class_word, prompts = (
            everything[train_form.named(name, number)] for name in ("token", "class_word", "prompts")
        )
        gr.on([token.change, class_word.change], words, [token, class_word], prompts, **state.AT_ONCE)
        connect_photos(ctx, number, everything)
    concepts = [fields[train_form.named("tokens_begin_as", number)] for number in FURTHER]
    fields["new_tokens"].change(
        lambda is_set: [gr.Textbox(visible=is_set) for _ in FURTHER], fields["new_tokens"], concepts, **state.AT_ONCE
    )
    connect_boxes(ctx, page, everything)


def connect_photos(ctx: state.AppContext, number: int, widgets: dict) -> None:
    """The crops depend on the seed and on the recipe, too."""
    photos, *outputs = (widgets[train_form.named(name, number)] for name in ("photos", "remarks", "crops"))

    @gr.on(
        [photos.upload, photos.delete, photos.clear],
        inputs=[photos, widgets["seed"], widgets["like"]],
        outputs=outputs,
        api_visibility="private",
        show_progress="minimal",
        **TAKING_PHOTOS,
    )
    @state.as_gradio_error
    def review(photos: list[str] | None, seed: int, like: str, request: gr.Request) -> tuple:
        visitor = ctx.visitors.of(request)
        if not photos:
            forget(visitor, number)
            return gr.HTML(visible=False), gr.Gallery(visible=False)
        return shown(
            train_photos.review_kept(
                ctx, visitor, train_photos.take_with_masks(photos, visitor, number), seed, number, like
            )
        )


def connect_boxes(ctx: state.AppContext, page: gr.Blocks, widgets: dict) -> None:
    """The photos that a run would use, after a reload or a change of the seed; further subjects."""
    boxes, pictures = box_widgets(widgets), review_widgets(widgets)
    gone = ("photos", "remarks", "crops", *train_form.SubjectWords.__dataclass_fields__)
    emptied = [widgets[train_form.named(name, number)] for number in FURTHER for name in gone]

    @page.load(inputs=widgets["seed"], outputs=[*pictures, *boxes], **state.AT_ONCE)
    @state.as_gradio_error
    def restore(seed: int, request: gr.Request) -> tuple:
        visitor, count = ctx.visitors.of(request), 0
        while count < train_form.MOST_SUBJECTS and visitors.kept_photos(
            train_form.folder_of(visitor.photos_dir, count + 1)
        ):
            count += 1
        return (*reviews(ctx, visitor, seed, max(1, count)), *boxes_for(max(1, count)))

    @widgets["seed"].blur(
        inputs=[widgets[name] for name in ("seed", "subjects", "like")], outputs=pictures, **state.TELLING
    )
    @state.as_gradio_error
    def again(seed: int, count: int, like: str, request: gr.Request) -> tuple:
        return reviews(ctx, ctx.visitors.of(request), seed, count, like)

    @widgets["add_subject"].click(inputs=widgets["subjects"], outputs=boxes, **state.AT_ONCE)
    def add(count: int) -> tuple:
        return boxes_for(min(train_form.MOST_SUBJECTS, int(count) + 1))

    @widgets["remove_subject"].click(inputs=widgets["subjects"], outputs=[*boxes, *emptied], **state.AT_ONCE)
    def remove(count: int, request: gr.Request) -> tuple:
        """Remove the last subject with its photos and words."""
        last = max(2, int(count))
        forget(ctx.visitors.of(request), last)
        values = (None, gr.HTML(visible=False), gr.Gallery(visible=False), "", train_form.TOKENS[last - 1], "", "")
        cleared = [value if number == last else gr.skip() for number in FURTHER for value in values]
        return (*boxes_for(last - 1), *cleared)


def review_widgets(widgets: dict) -> list[Any]:
    return [
        widgets[train_form.named(name, number)]
        for number in range(1, train_form.MOST_SUBJECTS + 1)
        for name in ("remarks", "crops")
    ]


def reviews(ctx: state.AppContext, visitor: visitors.Visitor, seed: int, count: int, like: str = NONE) -> tuple:
    """Values of `review_widgets`: the kept photos of the first `count` subjects; the others do not change."""
    found = []
    for number in range(1, train_form.MOST_SUBJECTS + 1):
        is_there = number <= count and visitors.kept_photos(train_form.folder_of(visitor.photos_dir, number))
        found += (
            shown(train_photos.review_kept(ctx, visitor, (), seed, number, like))
            if is_there
            else (gr.skip(), gr.skip())
        )
    return tuple(found)


def box_widgets(widgets: dict) -> list[Any]:
    return [widgets[name] for name in ("subjects", "add_subject", "remove_subject", *map("subject_{}".format, FURTHER))]


def boxes_for(count: int) -> tuple:
    """Values of `box_widgets` for so many subjects."""
    return (
        count,
        gr.Button(visible=count < train_form.MOST_SUBJECTS),
        gr.Button(f"Remove subject {max(2, count)}", visible=count > 1),
        *(gr.Column(visible=number <= count) for number in FURTHER),
    )


def forget(visitor: visitors.Visitor, number: int) -> None:
    shutil.rmtree(train_form.folder_of(visitor.photos_dir, number), ignore_errors=True)


def shown(found: train_photos.PhotoReview) -> tuple:
    return gr.HTML(found.remarks, visible=True), gr.Gallery(found.crops, visible=True)


MOST_PIXELS = 4 * train_photos.EDIT_PX**2
KEPT_BYTES = 32 * 1024**2  # Limit for all visitors' drawings between upload and the click that uses them
OWN_BYTES = KEPT_BYTES // 4
BRUSH_PX, OPACITY = 24, 0.6
TOO_LARGE = "the painted mask is no picture of the size that was shown"


class Drawings(OrderedDict):
    """(Owner, id) -> uploaded drawing. The oldest go when those of an owner exceed OWN_BYTES, or all KEPT_BYTES."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        self.drop_oldest([name for name in self if name[0] == key[0]], OWN_BYTES)
        self.drop_oldest(list(self), KEPT_BYTES)

    def drop_oldest(self, names: list, limit: int) -> None:
        """Keep the newest of these, and at most `limit` bytes."""
        total = 0
        for number, name in enumerate(reversed(names)):
            drawing = self[name]
            total += sum(map(len, filter(None, (drawing.background, drawing.composite, *drawing.layers))))
            if number and total > limit:
                del self[name]


def owner_of(request: gr.Request) -> str:
    """Whose drawings these are: the visitor's cookie, which the upload of a drawing has with a login too."""
    return visitors.secret_in(getattr(request, "cookies", None) or {})


def mask_editor() -> gr.ImageEditor:
    """The editor of a painted layer. Update only its value: else gradio makes another one, without the limits."""
    colours = [
        f"rgba({red}, {green}, {blue}, {OPACITY})" for red, green, blue in (train_photos.LEARNED, train_photos.LEFT_OUT)
    ]
    editor = gr.ImageEditor(
        label="Mask",
        show_label=False,
        elem_id="mask_editor",
        sources=(),
        transforms=(),
        layers=False,
        format="png",
        buttons=[],
        interactive=True,
        canvas_size=(train_photos.EDIT_PX, train_photos.EDIT_PX),
        brush=gr.Brush(default_size=BRUSH_PX, colors=colours, default_color=colours[0], color_mode="fixed"),
        eraser=gr.Eraser(default_size=BRUSH_PX),
    )
    editor.blob_storage = Drawings()
    accept = editor.accept_blobs

    def accept_blobs(data: Any, request: gr.Request) -> None:
        try:
            kind, index, name = (data.data[part] for part in ("type", "index", "id"))
            data.files[0][1]
        except (AttributeError, IndexError, KeyError, TypeError) as error:  # JSON in place of a form
            raise fastapi.HTTPException(400, "send the layer as a form, with type, index, id and one file") from error
        if kind != "layer":  # the server has the photo
            return
        if str(index) != "0":
            raise fastapi.HTTPException(400, "there is one layer")
        accept(SimpleNamespace(data={**data.data, "id": (owner_of(request), name)}, files=data.files))

    accept_blobs._is_server_fn = True
    editor.accept_blobs = accept_blobs
    editor.preprocess = lambda payload: payload  # `painted_of` is told whose it is
    return editor


def painted_of(editor: gr.ImageEditor, payload: Any, owner: str) -> PIL.Image.Image | None:
    """The layer that this owner sent, as RGBA. Raises gr.Error unless it is a small picture."""
    if payload is not None and payload.id is not None:
        payload = editor.blob_storage.pop((owner, payload.id), None)
    layer = next((layer for layer in payload.layers if layer), None) if payload is not None else None
    if layer is None:
        return None
    source = io.BytesIO(layer) if isinstance(layer, bytes | bytearray) else layer.path
    try:
        with PIL.Image.open(source, formats=["PNG", "WEBP"]) as image:
            if image.width * image.height <= MOST_PIXELS:
                return image.convert("RGBA")
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError):
        pass
    raise gr.Error(TOO_LARGE, duration=12, print_exception=False)


PAINT = "green is learned. The brush has green to add, and red to take away."
HOW = "Choose a picture to correct its mask."


def mask_widgets() -> dict[str, Any]:
    show = gr.Button("Show the masks", elem_id="show_masks")
    told = gr.HTML("", visible=False, elem_id="mask_remarks")
    pictures = train_watch.picture_rows("Masks", "masks", object_fit="contain", buttons=["fullscreen"])
    with gr.Column(visible=False, elem_id="mask_box") as box:
        about = gr.HTML("", elem_id="mask_about")
        editor = mask_editor()
        with gr.Row(elem_classes="tight"):
            keep = gr.Button("Keep this mask", variant="primary", min_width=120, elem_id="keep_mask")
            back = gr.Button("Put the old one back", min_width=120, elem_id="put_mask_back")
    shown = {"show_masks": show, "mask_remarks": told, "masks": pictures}
    edited = {"mask_box": box, "mask_about": about, "mask_editor": editor, "keep_mask": keep, "put_mask_back": back}
    return shown | edited | {"mask_names": gr.State([]), "mask_chosen": gr.State("")}


def connect_masks(ctx: state.AppContext, fields: dict, parts: dict) -> None:
    """Progress is shown only on the remarks: gradio would ask a component that shows progress, and all inside it, for
    their values at every event of the page, and the editor would answer with an upload."""
    inputs = {"photos": parts["photos"], **fields}
    files = [inputs[train_form.named("photos", number)] for number in range(1, train_form.MOST_SUBJECTS + 1)]
    of_chosen = {"name": parts["mask_chosen"], **inputs}
    shown = [parts[name] for name in ("mask_remarks", "masks", "mask_names", "mask_box")]
    edited = [parts[name] for name in ("mask_box", "mask_about", "mask_editor", "mask_chosen")]
    corrected = [*shown, *review_widgets(parts)]
    making = {
        "api_visibility": "private",
        "show_progress": "minimal",
        "show_progress_on": parts["mask_remarks"],
        **state.GPU,
    }

    def settings(visitor: visitors.Visitor, values: dict) -> TrainConfig:
        photos, form = visitor.given_photos, train_form.form_of(values)
        recipe, run_dir = train_start.recipe_of(ctx, form.like, visitor), ctx.runs_dir / "new"
        config = form.config(ctx.base_name, ctx.resolution_px, photos, run_dir, recipe)
        return TrainConfig.from_dict(config)

    def pictures(visitor: visitors.Visitor, values: dict) -> tuple:
        """Values for remarks, pictures, names and the editor's box, which closes."""
        masks = list(train_photos.shown_masks(settings(visitor, values), visitor))
        return (
            gr.HTML(
                html.remarks_card([f"{mask.label}: {mask.remark}" for mask in masks if mask.remark], HOW), visible=True
            ),
            gr.Gallery([(mask.picture, mask.remark or "good") for mask in masks], visible=True, selected_index=None),
            [(mask.photo, mask.label) for mask in masks],
            gr.Column(visible=False),
        )

    def after(visitor: visitors.Visitor, values: dict) -> tuple:
        return (*pictures(visitor, values), *reviews(ctx, visitor, values["seed"], values["subjects"], values["like"]))

    @parts["show_masks"].click(inputs_kwargs=inputs, outputs=shown, **making)
    @state.as_gradio_error
    def show(request: gr.Request, **values) -> tuple:
        visitor = ctx.visitors.of(request)
        take_given(
            [values[train_form.named("photos", number)] for number in range(1, train_form.MOST_SUBJECTS + 1)], visitor
        )
        return pictures(visitor, values)

    @parts["masks"].select(inputs_kwargs={"names": parts["mask_names"], **inputs}, outputs=edited, **making)
    @state.as_gradio_error
    def edit(names: list[tuple[str, str]], event: gr.SelectData, request: gr.Request, **values) -> tuple:
        visitor = ctx.visitors.of(request)
        if not isinstance(event.index, int) or not 0 <= event.index < len(names):
            raise UserError("show the masks again, and choose one")
        name, label = names[event.index]
        picture = train_photos.editor_picture(visitor, name, settings(visitor, values))
        value = {"background": picture, "layers": [], "composite": None}
        return gr.Column(visible=True), html.notice(f"{label.capitalize()}: {PAINT}"), value, name

    @parts["keep_mask"].click(inputs_kwargs={"painted": parts["mask_editor"], **of_chosen}, outputs=corrected, **making)
    @state.as_gradio_error
    def keep(name: str, painted: Any, request: gr.Request, **values) -> tuple:
        painted = painted_of(parts["mask_editor"], painted, owner_of(request))
        if painted is None:
            raise UserError(train_photos.EMPTY)
        visitor = ctx.visitors.of(request)
        train_photos.keep_mask(visitor, name, painted, settings(visitor, values))
        return after(visitor, values)

    @parts["put_mask_back"].click(inputs_kwargs=of_chosen, outputs=corrected, **making)
    @state.as_gradio_error
    def back(name: str, request: gr.Request, **values) -> tuple:
        visitor = ctx.visitors.of(request)
        train_photos.put_back(visitor, name)
        return after(visitor, values)

    gone = [event for file in files for event in (file.upload, file.delete, file.clear)]
    gone += [parts["remove_subject"].click, parts["reopen"].click]

    @gr.on(gone, inputs=None, outputs=shown, show_progress_on=parts["mask_remarks"], **state.AT_ONCE)
    def closed() -> tuple:
        return gr.HTML(visible=False), gr.Gallery(visible=False), [], gr.Column(visible=False)
