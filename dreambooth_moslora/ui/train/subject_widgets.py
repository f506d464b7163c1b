"""“Add another subject”: photos, a word and a token for each further subject, shown only on request."""

import shutil
from collections.abc import Sequence
from typing import Any

import gradio as gr

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.run_files.adapter_files import NONE
from dreambooth_moslora.ui.app_state import AT_ONCE, TELLING, AppContext, as_gradio_error
from dreambooth_moslora.ui.html_snippets import faint, notice
from dreambooth_moslora.ui.server.photo_uploads import PHOTO_TYPES, kept_photos
from dreambooth_moslora.ui.server.users import Visitor
from dreambooth_moslora.ui.train.actions import PhotoReview, review_kept, review_photos
from dreambooth_moslora.ui.train.mask_corrections import take_with_masks
from dreambooth_moslora.ui.train.more_subjects import (
    MOST_SUBJECTS,
    TOKENS,
    SubjectWords,
    folder_of,
    named,
    prompts_of,
    subject_count,
)
from dreambooth_moslora.ui.train.watch import picture_rows

__all__ = [
    "TAKING_PHOTOS",
    "box_widgets",
    "boxes_for",
    "connect_subjects",
    "photo_widgets",
    "review_widgets",
    "reviews",
    "subject_widgets",
    "take_given",
]

TAKING_PHOTOS = {"concurrency_limit": 4}
"""Options of events that process photos: visitors take turns photo by photo (`photo_uploads.ONE_AT_A_TIME`)."""
ABOUT_MASKS = "A mask goes along as name.mask.png beside name.jpg: only what is white in it is learned."
FURTHER = range(2, MOST_SUBJECTS + 1)
NARROW = {"min_width": 110}


def photo_widgets(number: int = 1) -> dict[str, Any]:
    """The widgets in which a subject's photos are dropped and shown."""
    photos = gr.File(
        file_count="multiple",
        file_types=PHOTO_TYPES,
        label="4 to 10 photos of one subject" if number == 1 else f"4 to 10 photos of subject {number}",
        height=130,
        elem_id=named("photos", number),
    )
    if number == 1:
        gr.HTML(faint(ABOUT_MASKS))
    remarks = gr.HTML(visible=False, elem_id=named("remarks", number))
    look = {"object_fit": "contain", "buttons": ["fullscreen"], "elem_classes": "crops"}
    crops = picture_rows("Crops", named("crops", number), **look)
    return {
        named("photos", number): photos,
        named("remarks", number): remarks,
        named("crops", number): crops,
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
            prompts = gr.HTML(visible=False, elem_id=named("prompts", number))
        fields |= {named("photos", number): shown.pop(named("photos", number)), **own}
        parts |= shown | {f"subject_{number}": box, named("prompts", number): prompts}
    with gr.Row():
        add = gr.Button("Add another subject", size="sm", min_width=132, elem_id="add_subject")
        remove = gr.Button("Remove subject 2", size="sm", min_width=132, visible=False, elem_id="remove_subject")
    return fields, parts | {"add_subject": add, "remove_subject": remove}


def further_fields(number: int) -> dict[str, Any]:
    with gr.Row():
        class_word = gr.Textbox(
            "", label="What these show", placeholder="cat", elem_id=named("class_word", number), **NARROW
        )
        token = gr.Textbox(
            TOKENS[number - 1], label="Token", placeholder="a rare word", elem_id=named("token", number), **NARROW
        )
    captions = gr.Textbox(
        "",
        label="Captions",
        placeholder="one line for each photo, in order; may be left out",
        lines=1,
        elem_id=named("captions", number),
    )
    begin_as = gr.Textbox(
        "",
        label="Its new tokens begin as",
        placeholder="words like it; or empty",
        visible=False,
        elem_id=named("tokens_begin_as", number),
    )
    words = (class_word, token, captions, begin_as)
    return {named(name, number): widget for name, widget in zip(SubjectWords.__dataclass_fields__, words, strict=True)}


def take_given(files: Sequence[list[str] | None], visitor: Visitor) -> None:
    """Make clean copies of the added photos of each subject; other photos do not change."""
    for number, of_one in enumerate(files, 1):
        if of_one:
            take_with_masks(of_one, visitor, number)


def connect_words(token: gr.Textbox, class_word: gr.Textbox, prompts: gr.HTML) -> None:
    def words(token: str, class_word: str) -> gr.HTML:
        try:
            instance, class_prompt = prompts_of(token, class_word)
        except UserError:
            return gr.HTML(visible=False)
        return gr.HTML(notice(f"Learns “{instance}” and tells it from “{class_prompt}”."), visible=True)

    gr.on([token.change, class_word.change], words, [token, class_word], prompts, **AT_ONCE)


def connect_subjects(ctx: AppContext, page: gr.Blocks, fields: dict, parts: dict) -> None:
    everything = fields | parts
    for number in range(1, MOST_SUBJECTS + 1):
        widgets = [everything[named(name, number)] for name in ("token", "class_word", "prompts")]
        connect_words(*widgets)
        connect_photos(ctx, number, everything, [fields["seed"], fields["like"]])
    concepts = [fields[named("tokens_begin_as", number)] for number in FURTHER]
    fields["new_tokens"].change(
        lambda is_set: [gr.Textbox(visible=is_set) for _ in FURTHER], fields["new_tokens"], concepts, **AT_ONCE
    )
    connect_kept(ctx, page, everything)
    connect_count(ctx, everything)


def connect_photos(ctx: AppContext, number: int, widgets: dict, how: list) -> None:
    """`how` are the widgets of the seed and of the recipe, on which the crops depend."""

    @as_gradio_error
    def review(photos: list[str] | None, seed: int, like: str, request: gr.Request) -> tuple:
        visitor = ctx.visitors.of(request)
        if not photos:
            forget(visitor, number)
            return gr.HTML(visible=False), gr.Gallery(visible=False)
        return shown(review_photos(ctx, photos, visitor, seed, number, like))

    photos, *outputs = (widgets[named(name, number)] for name in ("photos", "remarks", "crops"))
    gr.on(
        [photos.upload, photos.delete, photos.clear],
        review,
        [photos, *how],
        outputs,
        api_visibility="private",
        show_progress="minimal",
        **TAKING_PHOTOS,
    )


def connect_kept(ctx: AppContext, page: gr.Blocks, widgets: dict) -> None:
    """After a reload or a change of the seed: the photos that a run would use."""
    pictures = review_widgets(widgets)

    @as_gradio_error
    def again(seed: int, count: int, like: str, request: gr.Request) -> tuple:
        return reviews(ctx, ctx.visitors.of(request), seed, count, like)

    @as_gradio_error
    def restore(seed: int, request: gr.Request) -> tuple:
        visitor = ctx.visitors.of(request)
        count = max(1, subject_count(visitor.photos_dir, MOST_SUBJECTS))
        return (*reviews(ctx, visitor, seed, count), *boxes_for(count))

    page.load(restore, widgets["seed"], [*pictures, *box_widgets(widgets)], **AT_ONCE)
    widgets["seed"].blur(again, [widgets["seed"], widgets["subjects"], widgets["like"]], pictures, **TELLING)


def review_widgets(widgets: dict) -> list[Any]:
    return [widgets[named(name, number)] for number in range(1, MOST_SUBJECTS + 1) for name in ("remarks", "crops")]


def reviews(ctx: AppContext, visitor: Visitor, seed: int, count: int, like: str = NONE) -> tuple:
    """Values of `review_widgets`: the kept photos of the first `count` subjects; the others do not change."""
    found = []
    for number in range(1, MOST_SUBJECTS + 1):
        is_there = number <= count and kept_photos(folder_of(visitor.photos_dir, number))
        found += shown(review_kept(ctx, visitor, (), seed, number, like)) if is_there else (gr.skip(), gr.skip())
    return tuple(found)


def connect_count(ctx: AppContext, widgets: dict) -> None:
    outputs = box_widgets(widgets)
    gone = ("photos", "remarks", "crops", *SubjectWords.__dataclass_fields__)
    emptied = [widgets[named(name, number)] for number in FURTHER for name in gone]

    def add(count: int) -> tuple:
        return boxes_for(min(MOST_SUBJECTS, int(count) + 1))

    def remove(count: int, request: gr.Request) -> tuple:
        """Remove the last subject with its photos and words."""
        last = max(2, int(count))
        forget(ctx.visitors.of(request), last)
        values = (None, gr.HTML(visible=False), gr.Gallery(visible=False), "", TOKENS[last - 1], "", "")
        cleared = [value if number == last else gr.skip() for number in FURTHER for value in values]
        return (*boxes_for(last - 1), *cleared)

    widgets["add_subject"].click(add, widgets["subjects"], outputs, **AT_ONCE)
    widgets["remove_subject"].click(remove, widgets["subjects"], [*outputs, *emptied], **AT_ONCE)


def box_widgets(widgets: dict) -> list[Any]:
    return [widgets[name] for name in ("subjects", "add_subject", "remove_subject", *map("subject_{}".format, FURTHER))]


def boxes_for(count: int) -> tuple:
    """Values of `box_widgets` for so many subjects."""
    return (
        count,
        gr.Button(visible=count < MOST_SUBJECTS),
        gr.Button(f"Remove subject {max(2, count)}", visible=count > 1),
        *(gr.Column(visible=number <= count) for number in FURTHER),
    )


def forget(visitor: Visitor, number: int) -> None:
    shutil.rmtree(folder_of(visitor.photos_dir, number), ignore_errors=True)


def shown(found: PhotoReview) -> tuple:
    return gr.HTML(found.remarks, visible=True), gr.Gallery(found.crops, visible=True)
