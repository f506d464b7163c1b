"""The widgets of photos in the Train tab: a row for each, for every subject, and a brush to correct
their masks.

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
ABOUT_MASKS = "A mask, if you have one, goes along as name.mask.png beside name.jpg: its white part is learned most."
FURTHER = range(2, MOST_SUBJECTS + 1)
PRIVATE = {"api_visibility": "private", **state.GPU}
WORDS = tuple(SubjectWords.__dataclass_fields__)
PROGRESS = gr.Progress()
WRITING, FETCHED = "Writing captions", "Qwen3-VL comes from the hub once"


def photo_widgets(number: int = 1) -> dict[str, Any]:
    """The widgets in which a subject's photos are dropped and shown, and the field for those of a
    program."""
    whose = "one subject" if number == 1 else f"subject {number}"
    files = {
        "file_count": "multiple",
        "file_types": PHOTO_TYPES,
        "label": f"3 to 10 photos of {whose}",
    }
    widgets = {"added": gr.File(height=130, elem_id=named("photos", number), **files)}
    if number == 1:
        gr.HTML(html.faint(ABOUT_MASKS))
    widgets["photos"] = gr.File(visible=False, **files)
    widgets["remarks"] = gr.HTML(visible=False, elem_id=named("remarks", number))
    widgets |= (
        {"mask_remarks": gr.HTML("", visible=False, elem_id="mask_remarks")} if number == 1 else {}
    )
    widgets["crops"] = photo_rows(named("crops", number))
    return {named(name, number): widget for name, widget in widgets.items()}


def subject_widgets() -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields under the names of the API, and the other widgets. All but one button is hidden at
    first."""
    fields = {
        "subjects": gr.Number(1, visible=False, precision=0, label="Subjects", elem_id="subjects")
    }
    parts: dict[str, Any] = {}
    for number in FURTHER:
        with gr.Column(visible=False, elem_id=f"subject_{number}") as box:
            gr.Markdown(f"### Subject {number}", elem_classes="step")
            shown = photo_widgets(number)
            own = further_fields(number)
            prompts = gr.HTML(visible=False, elem_id=named("prompts", number))
        fields |= {named("photos", number): shown.pop(named("photos", number)), **own}
        parts |= shown | {f"subject_{number}": box, named("prompts", number): prompts}
    with gr.Row():
        add = gr.Button("Add another subject", size="sm", min_width=132, elem_id="add_subject")
        remove = gr.Button(
            "Remove subject 2", size="sm", min_width=132, visible=False, elem_id="remove_subject"
        )
    return fields, parts | {"add_subject": add, "remove_subject": remove}


def further_fields(number: int) -> dict[str, Any]:
    def text(name: str, label: str, placeholder: str, value: str = "", **look: Any) -> gr.Textbox:
        return gr.Textbox(
            value, label=label, placeholder=placeholder, elem_id=named(name, number), **look
        )

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
    """Those of a subject that have these names at the first."""
    return [widgets[named(name, number)] for name in names]


def connect_subjects(ctx: state.AppContext, page: gr.Blocks, fields: dict, parts: dict) -> None:
    everything = fields | parts

    def words(token: str, class_word: str) -> gr.HTML:
        try:
            instance, class_prompt = train_form.prompts_of(token, class_word)
        except UserError:
            return gr.HTML(visible=False)
        return gr.HTML(
            html.notice(f"Learns “{instance}” and tells it from “{class_prompt}”."), visible=True
        )

    for number in range(1, MOST_SUBJECTS + 1):
        token, class_word, prompts = widgets_of(
            everything, number, "token", "class_word", "prompts"
        )
        gr.on(
            [token.change, class_word.change], words, [token, class_word], prompts, **state.AT_ONCE
        )
        connect_photos(ctx, number, everything)
    concepts = [fields[named("tokens_begin_as", number)] for number in FURTHER]
    fields["new_tokens"].change(
        lambda is_set: [gr.Textbox(visible=is_set) for _ in FURTHER],
        fields["new_tokens"],
        concepts,
        **state.AT_ONCE,
    )
    connect_boxes(ctx, page, everything)


def connect_photos(ctx: state.AppContext, number: int, widgets: dict) -> None:
    """A subject's photos are added and removed, and its captions are written. The crops depend on
    the seed and on the recipe, too."""
    added, remarks, rows, captions = widgets_of(
        widgets, number, "added", "remarks", "crops", "captions"
    )
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
            return None, *review(ctx, number, seed, like, told)
        except Exception as error:
            words = state.sentence(state.as_user_error(error))
            return None, gr.HTML(html.notice(words, "bad"), visible=True), gr.skip()

    @rows.drop(inputs=crops, outputs=[remarks, rows], show_progress="hidden", **changing)
    @state.as_gradio_error
    def drop(seed: int, like: str, event: gr.EventData) -> tuple:
        train_photos.remove_photo(ctx.workspace, photo_in(event), number)
        return review(ctx, number, seed, like)

    rows.written(None, rows, captions, js=CAPTIONS, trigger_mode="multiple", **state.AT_ONCE)

    @rows.keep(inputs=rows, outputs=None, trigger_mode="always_last", **state.AT_ONCE)
    def keep(said: Any) -> None:
        train_photos.keep_captions(ctx.workspace, number, said)

    fields = {name: widgets[name] for name in ("subjects", "seed", "like")}
    words = [named(name, one) for one in range(1, number + 1) for name in WORDS]
    fields |= {name: widgets[name] for name in words}

    @rows.write(inputs_kwargs=fields, outputs=[remarks, rows], show_progress_on=remarks, **PRIVATE)
    @state.as_gradio_error
    def write(progress: gr.Progress = PROGRESS, **values) -> tuple:
        made, told = {}, []
        progress(
            (0, None),
            desc=WRITING if is_toy(ctx.base_name) else f"{WRITING}; {FETCHED}",
            unit="photos",
        )
        with ctx.turns.captioning():
            wanted = train_photos.made_captions(ctx, form_of(values), number)
            for place, (digest, caption, remark) in enumerate(wanted, 1):
                progress((place, None), desc=WRITING, unit="photos")
                made[digest] = caption
                told += [remark] if remark else []
        return review(ctx, number, values["seed"], values["like"], told, made=made)


def photo_in(event: gr.EventData) -> str:
    """The digest that a row's button sends; "" of a script that sends none."""
    return str(event._data.get("photo")) if isinstance(event._data, dict) else ""


def connect_boxes(ctx: state.AppContext, page: gr.Blocks, widgets: dict) -> None:
    """The photos that a run would use, after a reload or a change of the seed; further subjects."""
    boxes, pictures = box_widgets(widgets), review_widgets(widgets)
    gone = ("remarks", "crops", *WORDS)
    emptied = [widget for number in FURTHER for widget in widgets_of(widgets, number, *gone)]

    @page.load(inputs=widgets["seed"], outputs=[*pictures, *boxes], **state.AT_ONCE)
    @state.as_gradio_error
    def restore(seed: int) -> tuple:
        count = 0
        while count < MOST_SUBJECTS and photos_of(ctx.workspace.photos_dir, count + 1):
            count += 1
        return (*reviews(ctx, seed, max(1, count)), *boxes_for(max(1, count)))

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
        values = (gr.HTML(visible=False), with_cards([]), "", train_form.TOKENS[last - 1], "", "")
        cleared = [value if number == last else gr.skip() for number in FURTHER for value in values]
        return (*boxes_for(last - 1), *cleared)


def review_widgets(widgets: dict) -> list[Any]:
    subjects = range(1, MOST_SUBJECTS + 1)
    return [
        widget for number in subjects for widget in widgets_of(widgets, number, "remarks", "crops")
    ]


def reviews(ctx: state.AppContext, seed: int, count: int, like: str = NONE, **how: Any) -> tuple:
    """Values of `review_widgets`: the kept photos of the first `count` subjects; the others do not
    change but with `is_reset`, where they may be gone."""
    values: list[Any] = []
    for number in range(1, MOST_SUBJECTS + 1):
        is_shown = how.get("is_reset") or (
            number <= count and photos_of(ctx.workspace.photos_dir, number)
        )
        values += review(ctx, number, seed, like, **how) if is_shown else (gr.skip(), gr.skip())
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
    """Values of a subject's remarks and rows; hidden without photos."""
    if not photos_of(ctx.workspace.photos_dir, number):
        return gr.HTML(visible=False), with_cards([])
    found = train_photos.review_kept(ctx, remarks, seed, number, like, masks)
    cards = train_photos.cards_of(ctx.workspace, found, number, made or {})
    return gr.HTML(found.remarks, visible=True), with_cards(cards, is_reset=is_reset)


def box_widgets(widgets: dict) -> list[Any]:
    return [
        widgets[name]
        for name in (
            "subjects",
            "add_subject",
            "remove_subject",
            *map("subject_{}".format, FURTHER),
        )
    ]


def boxes_for(count: int) -> tuple:
    """Values of `box_widgets` for so many subjects."""
    return (
        count,
        gr.Button(visible=count < MOST_SUBJECTS),
        gr.Button(f"Remove subject {max(2, count)}", visible=count > 1),
        *(gr.Column(visible=number <= count) for number in FURTHER),
    )


BRUSH_PX, OPACITY = 24, 0.6


def mask_editor() -> gr.ImageEditor:
    """The editor of one painted layer."""
    sides = (train_photos.LEARNED, train_photos.LEFT_OUT)
    colours = [f"rgba({red}, {green}, {blue}, {OPACITY})" for red, green, blue in sides]
    brush = gr.Brush(
        default_size=BRUSH_PX, colors=colours, default_color=colours[0], color_mode="fixed"
    )
    look = {
        "label": "Mask",
        "show_label": False,
        "elem_id": "mask_editor",
        "format": "png",
        "interactive": True,
    }
    look |= {"sources": (), "transforms": (), "layers": False, "buttons": []}
    size = (train_photos.EDIT_PX, train_photos.EDIT_PX)
    return gr.ImageEditor(
        type="pil",
        image_mode="RGBA",
        canvas_size=size,
        brush=brush,
        eraser=gr.Eraser(default_size=BRUSH_PX),
        **look,
    )


PAINT = "green is learned. The brush has green to add, and red to take away."
SHOWN = "The masks are shown: what is dark is outside. “Mask” beside a photo corrects its own."


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
    """The form as it is before the photos have a word: masks need one only where a model looks for
    it."""
    first, *others = (
        replace(words, class_word=words.class_word.strip() or "subject") for words in form.subjects
    )
    return replace(form, class_word=first.class_word, others=tuple(others))


def connect_masks(ctx: state.AppContext, fields: dict, parts: dict) -> None:
    """Progress is shown only on the remarks: gradio would ask a component that shows progress, and
    all inside it, for their values at every event of the page, and the editor would answer with an
    upload."""
    of_chosen = {"chosen": parts["mask_chosen"], **fields}
    edited = [parts[name] for name in ("mask_box", "mask_about", "mask_editor", "mask_chosen")]
    corrected = [parts["mask_remarks"], parts["mask_box"], *review_widgets(parts)]
    making = {"show_progress": "minimal", "show_progress_on": parts["mask_remarks"], **PRIVATE}

    def settings(values: dict) -> TrainConfig:
        photos, form = ctx.workspace.given_photos, form_of(values)
        form = form if form.make_masks and not is_toy(ctx.base_name) else with_any_word(form)
        recipe, run_dir = train_start.recipe_of(ctx, form.like), ctx.runs_dir / "new"
        config = form.config(ctx.base_name, ctx.resolution_px, photos, run_dir, recipe)
        return TrainConfig.from_dict(config)

    def pictures(values: dict) -> tuple:
        """Values of `corrected`: the rows have the masks that a run would use, and the brush is
        away."""
        masks = list(train_photos.shown_masks(settings(values), ctx.workspace))
        lines = [f"{mask.label}: {mask.remark}" for mask in masks if mask.remark]
        of_photos = {mask.photo: mask.path for mask in masks}
        rows = reviews(ctx, values["seed"], values["subjects"], values["like"], masks=of_photos)
        return (
            gr.HTML(html.remarks_card(lines, SHOWN), visible=True),
            gr.Column(visible=False),
            *rows,
        )

    @state.as_gradio_error
    def show(**values) -> tuple:
        return pictures(values)

    def edit_of(number: int) -> Callable:
        @state.as_gradio_error
        def edit(event: gr.EventData, **values) -> tuple:
            digest = photo_in(event)
            photo = train_photos.photo_with(ctx.workspace, digest, number)
            picture = train_photos.editor_picture(ctx.workspace, photo, settings(values))
            label = train_photos.label_of(photo, number - 1, values["subjects"])
            value = {"background": picture, "layers": [], "composite": None}
            return (
                gr.Column(visible=True),
                html.notice(f"{label.capitalize()}: {PAINT}"),
                value,
                (digest, number),
            )

        return edit

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
