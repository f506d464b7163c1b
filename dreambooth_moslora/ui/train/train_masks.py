"""The widgets of photos in the Train tab: a row for each, and a brush to correct their masks.

What a program sends in `photos` and `captions` the page has elsewhere: photos are taken when they
are dropped, and captions are written in the rows.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from dreambooth_moslora.disk.run_folder import NONE
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.settings.toys import is_toy
from dreambooth_moslora.ui import html, state
from dreambooth_moslora.ui.html import CAPTIONS, photo_rows, with_cards
from dreambooth_moslora.ui.photo_copies import PHOTO_TYPES
from dreambooth_moslora.ui.train import train_form, train_photos, train_start
from dreambooth_moslora.ui.train.train_form import (
    MOST_SUBJECTS,
    SubjectWords,
    folder_of,
    form_of,
    named,
    photos_of,
)

TAKING_PHOTOS = {"concurrency_limit": 4}
"""Options of events that process photos: an estimate need not wait for a start."""
ABOUT_MASKS = (
    "A mask, if you have one, goes along as name.mask.png beside name.jpg: "
    "its white part is learned most."
)
"""Told below the photos of the first subject."""
FURTHER = range(2, MOST_SUBJECTS + 1)
"""Numbers of the subjects after the first."""
PRIVATE = {"api_visibility": "private", **state.GPU}
"""Options of events that compute, and that no program calls."""
WORDS = tuple(SubjectWords.__dataclass_fields__)
"""Names of a subject's fields."""
PROGRESS = gr.Progress()
"""Gradio gives a handler its bar in place of this default."""
WRITING = "Writing captions"
FETCHED = "Qwen3-VL comes from the hub once"
"""Told while captions are written."""


def photo_widgets(number: int = 1) -> dict[str, Any]:
    """The widgets in which a subject's photos are dropped and shown, by name.

    `photos` is the hidden field for those of a program.
    """
    whose = "one subject" if number == 1 else f"subject {number}"
    files = {
        "file_count": "multiple",
        "file_types": PHOTO_TYPES,
        "label": f"3 to 10 photos of {whose}",
    }
    widgets = {"added": gr.File(height=130, elem_id=named("photos", number), **files)}
    if number == 1:
        gr.HTML(html.faint(ABOUT_MASKS))
    # What is said of the photos, of their masks, and the rows themselves.
    widgets["photos"] = gr.File(visible=False, **files)
    widgets["remarks"] = gr.HTML(visible=False, elem_id=named("remarks", number))
    if number == 1:
        widgets["mask_remarks"] = gr.HTML("", visible=False, elem_id="mask_remarks")
    widgets["crops"] = photo_rows(named("crops", number))
    return {named(name, number): widget for name, widget in widgets.items()}


def subject_widgets() -> tuple[dict[str, Any], dict[str, Any]]:
    """Further subjects: fields under the names of the API, and the other widgets.

    All but one button is hidden at first.
    """
    count = gr.Number(1, visible=False, precision=0, label="Subjects", elem_id="subjects")
    fields = {"subjects": count}
    parts: dict[str, Any] = {}
    for number in FURTHER:
        with gr.Column(visible=False, elem_id=f"subject_{number}") as box:
            gr.Markdown(f"### Subject {number}", elem_classes="step")
            shown = photo_widgets(number)
            own = further_fields(number)
            prompts = gr.HTML(visible=False, elem_id=named("prompts", number))
        photos = named("photos", number)
        fields[photos] = shown.pop(photos)
        fields |= own
        parts |= shown
        parts[f"subject_{number}"] = box
        parts[named("prompts", number)] = prompts
    # One more, and one fewer.
    with gr.Row():
        add = gr.Button("Add another subject", size="sm", min_width=132, elem_id="add_subject")
        remove = gr.Button(
            "Remove subject 2", size="sm", min_width=132, visible=False, elem_id="remove_subject"
        )
    return fields, parts | {"add_subject": add, "remove_subject": remove}


def further_fields(number: int) -> dict[str, Any]:
    """The fields of a further subject's words, by name."""

    def text(name: str, label: str, placeholder: str, value: str = "", **look: Any) -> gr.Textbox:
        look |= {"placeholder": placeholder, "elem_id": named(name, number)}
        return gr.Textbox(value, label=label, **look)

    with gr.Row():
        class_word = text("class_word", "What these show", "cat", min_width=110)
        token = text("token", "Token", "a rare word", train_form.TOKENS[number - 1], min_width=110)
    captions = text(
        "captions", "Captions", "one line for each photo, in order; may be left out", visible=False
    )
    begin_as = text(
        "tokens_begin_as", "Its new tokens begin as", "words like it; or empty", visible=False
    )
    words = (class_word, token, captions, begin_as)
    return {named(name, number): widget for name, widget in zip(WORDS, words, strict=True)}


def widgets_of(widgets: dict, number: int, *names: str) -> list[Any]:
    """A subject's widgets, by the names that they have for the first subject."""
    return [widgets[named(name, number)] for name in names]


def connect_subjects(ctx: state.AppContext, page: gr.Blocks, fields: dict, parts: dict) -> None:
    """The events of all subjects' words, photos and captions."""
    everything = fields | parts

    def words(token: str, class_word: str) -> gr.HTML:
        try:
            instance, class_prompt = train_form.prompts_of(token, class_word)
        except UserError:
            return gr.HTML(visible=False)
        learns = f"Learns “{instance}” and tells it from “{class_prompt}”."
        return gr.HTML(html.notice(learns), visible=True)

    # Each subject: what its words make of the prompts, and its photos.
    for number in range(1, MOST_SUBJECTS + 1):
        names = ("token", "class_word", "prompts")
        token, class_word, prompts = widgets_of(everything, number, *names)
        changes = [token.change, class_word.change]
        gr.on(changes, words, [token, class_word], prompts, **state.AT_ONCE)
        connect_photos(ctx, number, everything)
    # What new tokens begin as is asked only where there are some.
    concepts = [fields[named("tokens_begin_as", number)] for number in FURTHER]
    fields["new_tokens"].change(
        lambda is_set: [gr.Textbox(visible=is_set) for _ in FURTHER],
        fields["new_tokens"],
        concepts,
        **state.AT_ONCE,
    )
    connect_boxes(ctx, page, everything)


def connect_photos(ctx: state.AppContext, number: int, widgets: dict) -> None:
    """A subject's photos are added and removed, and its captions are written."""
    names = ("added", "remarks", "crops", "captions")
    added, remarks, rows, captions = widgets_of(widgets, number, *names)
    # The crops depend on the seed and on the recipe, too.
    crops = [widgets["seed"], widgets["like"]]
    changing = {
        "api_visibility": "private",
        "show_progress_on": remarks,
        "trigger_mode": "multiple",
        **TAKING_PHOTOS,
    }

    @added.upload(
        inputs=[added, *crops], outputs=[added, remarks, rows], show_progress="minimal", **changing
    )
    def add(files: list[str] | None, seed: int, like: str) -> tuple:
        """The dropped files leave their field in any case: whatever is dropped next comes beside
        those in the rows."""
        try:
            told = train_photos.add_photos(files or [], ctx.workspace, number)
            return None, *review(ctx, number, seed=seed, like=like, remarks=told)
        except Exception as error:
            return None, gr.HTML(state.mistake_card(error), visible=True), gr.skip()

    @rows.drop(inputs=crops, outputs=[remarks, rows], show_progress="hidden", **changing)
    @state.as_gradio_error
    def drop(seed: int, like: str, event: gr.EventData) -> tuple:
        train_photos.remove_photo(ctx.workspace, photo_in(event), number)
        return review(ctx, number, seed, like)

    # What is typed goes into the form at once, and is kept when a caption is finished.
    rows.written(None, rows, captions, js=CAPTIONS, trigger_mode="multiple", **state.AT_ONCE)

    @rows.keep(inputs=rows, outputs=None, trigger_mode="always_last", **state.AT_ONCE)
    def keep(said: Any) -> None:
        train_photos.keep_captions(ctx.workspace, number, said)

    # Captions leave out the subject, so its words are sent, with those of the subjects before.
    fields = {name: widgets[name] for name in ("subjects", "seed", "like")}
    for one in range(1, number + 1):
        for name in WORDS:
            fields[named(name, one)] = widgets[named(name, one)]

    @rows.write(inputs_kwargs=fields, outputs=[remarks, rows], show_progress_on=remarks, **PRIVATE)
    @state.as_gradio_error
    def write(progress: gr.Progress = PROGRESS, **values) -> tuple:
        made = {}
        told = []
        line = WRITING if is_toy(ctx.base_name) else f"{WRITING}; {FETCHED}"
        progress((0, None), desc=line, unit="photos")
        with ctx.turns.captioning():
            wanted = train_photos.made_captions(ctx, form_of(values), number)
            for place, (digest, caption, remark) in enumerate(wanted, 1):
                progress((place, None), desc=WRITING, unit="photos")
                made[digest] = caption
                if remark:
                    told.append(remark)
        crops = {"seed": values["seed"], "like": values["like"]}
        return review(ctx, number, **crops, remarks=told, made=made)


def photo_in(event: gr.EventData) -> str:
    """The digest that a row's button sends; "" of a script that sends none."""
    return str(event._data.get("photo")) if isinstance(event._data, dict) else ""


def connect_boxes(ctx: state.AppContext, page: gr.Blocks, widgets: dict) -> None:
    """The photos that a run would use, after a reload or a change of the seed; further subjects."""
    boxes = box_widgets(widgets)
    pictures = review_widgets(widgets)
    # What is emptied with a subject.
    emptied = []
    for number in FURTHER:
        emptied += widgets_of(widgets, number, "remarks", "crops", *WORDS)

    # A page that is loaded again has as many subjects as have photos.
    @page.load(inputs=widgets["seed"], outputs=[*pictures, *boxes], **state.AT_ONCE)
    @state.as_gradio_error
    def restore(seed: int) -> tuple:
        count = 0
        while count < MOST_SUBJECTS and photos_of(ctx.workspace.photos_dir, count + 1):
            count += 1
        count = max(1, count)
        return (*reviews(ctx, seed, count), *boxes_for(count))

    @widgets["seed"].blur(
        inputs=[widgets[name] for name in ("seed", "subjects", "like")],
        outputs=pictures,
        **state.TELLING,
    )
    @state.as_gradio_error
    def again(seed: int, count: int, like: str) -> tuple:
        return reviews(ctx, seed, count, like)

    @widgets["add_subject"].click(inputs=widgets["subjects"], outputs=boxes, **state.AT_ONCE)
    def add(count: int) -> tuple:
        return boxes_for(min(MOST_SUBJECTS, int(count) + 1))

    @widgets["remove_subject"].click(
        inputs=widgets["subjects"], outputs=[*boxes, *emptied], **state.AT_ONCE
    )
    def remove(count: int) -> tuple:
        last = max(2, int(count))
        shutil.rmtree(folder_of(ctx.workspace.photos_dir, last), ignore_errors=True)
        # Values of `emptied`: the words of a subject are class, token, captions and concept.
        words = ("", train_form.TOKENS[last - 1], "", "")
        values = [gr.HTML(visible=False), with_cards([]), *words]
        unchanged = [gr.skip()] * len(values)
        cleared = []
        for number in FURTHER:
            cleared += values if number == last else unchanged
        return (*boxes_for(last - 1), *cleared)


def review_widgets(widgets: dict) -> list[Any]:
    """Each subject's remarks and rows."""
    shown = []
    for number in range(1, MOST_SUBJECTS + 1):
        shown += widgets_of(widgets, number, "remarks", "crops")
    return shown


def reviews(ctx: state.AppContext, seed: int, count: int, like: str = NONE, **how: Any) -> tuple:
    """Values of `review_widgets`: the kept photos of the first `count` subjects.

    - `seed` and `like` are the form's, which decide the crops.
    - `how` are options of `review`. With its `is_reset` the other subjects are shown, too, as their
      photos may be gone.
    """
    values: list[Any] = []
    for number in range(1, MOST_SUBJECTS + 1):
        is_used = number <= count and photos_of(ctx.workspace.photos_dir, number)
        if is_used or how.get("is_reset"):
            values += review(ctx, number, seed, like, **how)
        else:
            values += (gr.skip(), gr.skip())
    return tuple(values)


def review(
    ctx: state.AppContext,
    number: int,
    seed: int,
    like: str,
    remarks: Sequence[str] = (),
    made: Mapping[str, str] | None = None,
    masks: Mapping[Path, Path | None] | None = None,
    *,
    is_reset: bool = False,
) -> tuple:
    """Values of a subject's remarks and rows; hidden without photos.

    - `number` is the subject's.
    - `seed` and `like` are the form's, which decide the crops.
    - `remarks` come before those on the photos.
    - `made` are new captions, by the photos' digests.
    - `masks` are those that a run would use, by photo, if not those beside the photos.
    - With `is_reset` kept captions replace what was typed.
    """
    if not photos_of(ctx.workspace.photos_dir, number):
        return gr.HTML(visible=False), with_cards([])
    found = train_photos.review_kept(
        ctx,
        remarks=remarks,
        seed=seed,
        number=number,
        like=like,
        masks=masks,
    )
    cards = train_photos.cards_of(ctx.workspace, found, number, made or {})
    return gr.HTML(found.remarks, visible=True), with_cards(cards, is_reset=is_reset)


def box_widgets(widgets: dict) -> list[Any]:
    """What shows how many subjects there are."""
    names = ["subjects", "add_subject", "remove_subject"]
    names += [f"subject_{number}" for number in FURTHER]
    return [widgets[name] for name in names]


def boxes_for(count: int) -> tuple:
    """Values of `box_widgets` for so many subjects."""
    return (
        count,
        gr.Button(visible=count < MOST_SUBJECTS),
        gr.Button(f"Remove subject {max(2, count)}", visible=count > 1),
        *(gr.Column(visible=number <= count) for number in FURTHER),
    )


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
SHOWN = "The masks are shown: what is dark is outside. “Mask” beside a photo corrects its own."
"""Told above the rows while they show masks."""


def mask_widgets() -> dict[str, Any]:
    """The brush, which fills the window while it is open."""
    parts: dict[str, Any] = {"mask_chosen": gr.State(("", 1))}
    with gr.Column(visible=False, elem_id="mask_box") as parts["mask_box"]:
        parts["mask_about"] = gr.HTML("", elem_id="mask_about")
        parts["mask_editor"] = mask_editor()
        with gr.Row(elem_classes="tight"):
            parts["keep_mask"] = gr.Button(
                "Keep this mask", variant="primary", min_width=130, elem_id="keep_mask"
            )
            parts["put_mask_back"] = gr.Button(
                "Put the old one back", min_width=170, elem_id="put_mask_back"
            )
            parts["close_mask"] = gr.Button("Close", min_width=64, elem_id="close_mask")
    return parts


def with_any_word(form: train_form.TrainForm) -> train_form.TrainForm:
    """The form, with some word for photos that have none yet.

    Masks need one only where a model looks for it.
    """

    def word_of(words: SubjectWords) -> str:
        return words.class_word.strip() or "subject"

    first = word_of(form.subjects[0])
    others = [replace(words, class_word=word_of(words)) for words in form.others]
    return replace(form, class_word=first, others=tuple(others))


def connect_masks(ctx: state.AppContext, fields: dict, parts: dict) -> None:
    """The masks that a run would use are shown in the rows, and corrected with a brush."""
    # Inputs and outputs of the events below. Progress is shown only on the remarks: gradio would
    # ask a component that shows progress, and all inside it, for their values at every event of
    # the page, and the editor would answer with an upload.
    of_chosen = {"chosen": parts["mask_chosen"], **fields}
    edited = [parts[name] for name in ("mask_box", "mask_about", "mask_editor", "mask_chosen")]
    corrected = [parts["mask_remarks"], parts["mask_box"], *review_widgets(parts)]
    making = {"show_progress": "minimal", "show_progress_on": parts["mask_remarks"], **PRIVATE}

    def settings(values: dict) -> TrainConfig:
        """The settings of a run of this form."""
        photos = ctx.workspace.given_photos
        form = form_of(values)
        if not form.make_masks or is_toy(ctx.base_name):
            form = with_any_word(form)
        recipe = train_start.recipe_of(ctx, form.like)
        run_dir = ctx.runs_dir / "new"
        config = form.config(ctx.base_name, ctx.resolution_px, photos, run_dir, recipe=recipe)
        return TrainConfig.from_dict(config)

    def pictures(values: dict) -> tuple:
        """Values of `corrected`: the rows with the masks that a run would use, and no brush."""
        masks = list(train_photos.shown_masks(settings(values), ctx.workspace))
        lines = [f"{mask.label}: {mask.remark}" for mask in masks if mask.remark]
        of_photos = {mask.photo: mask.path for mask in masks}
        rows = reviews(ctx, values["seed"], values["subjects"], values["like"], masks=of_photos)
        remarks = gr.HTML(html.remarks_card(lines, SHOWN), visible=True)
        return remarks, gr.Column(visible=False), *rows

    @state.as_gradio_error
    def show(**values) -> tuple:
        return pictures(values)

    # “Mask” beside a photo opens the brush.
    def edit_of(number: int) -> Callable:
        @state.as_gradio_error
        def edit(event: gr.EventData, **values) -> tuple:
            digest = photo_in(event)
            photo = train_photos.photo_with(ctx.workspace, digest, number)
            picture = train_photos.editor_picture(ctx.workspace, photo, settings(values))
            label = train_photos.label_of(photo, number - 1, values["subjects"])
            told = html.notice(f"{label.capitalize()}: {PAINT}")
            value = {"background": picture, "layers": [], "composite": None}
            return gr.Column(visible=True), told, value, (digest, number)

        return edit

    # Its buttons.
    @parts["keep_mask"].click(
        inputs_kwargs={"painted": parts["mask_editor"], **of_chosen}, outputs=corrected, **making
    )
    @state.as_gradio_error
    def keep(chosen: tuple[str, int], painted: dict | None, **values) -> tuple:
        if not (painted and painted["layers"]):
            raise UserError(train_photos.EMPTY)
        photo = train_photos.photo_with(ctx.workspace, *chosen)
        train_photos.keep_mask(ctx.workspace, photo, painted["layers"][0], settings(values))
        return pictures(values)

    @parts["put_mask_back"].click(inputs_kwargs=of_chosen, outputs=corrected, **making)
    @state.as_gradio_error
    def back(chosen: tuple[str, int], **values) -> tuple:
        train_photos.put_back(ctx.workspace, train_photos.photo_with(ctx.workspace, *chosen))
        return pictures(values)

    # When the photos change, the remarks on masks and the brush are closed.
    def closed() -> tuple:
        return gr.HTML(visible=False), gr.Column(visible=False)

    quietly = {"show_progress_on": parts["mask_remarks"], **state.AT_ONCE}
    closing = {"outputs": corrected[:2], **quietly}
    parts["close_mask"].click(lambda: gr.Column(visible=False), None, parts["mask_box"], **quietly)
    gr.on([parts["remove_subject"].click, parts["reopen"].click], closed, None, **closing)
    for number in range(1, MOST_SUBJECTS + 1):
        rows, added = widgets_of(parts, number, "crops", "added")
        rows.masks(show, inputs_kwargs=fields, outputs=corrected, **making)
        rows.mask(edit_of(number), inputs_kwargs=fields, outputs=edited, **making)
        rows.drop(closed, None, **closing)
        added.upload(closed, None, **closing)
