"""The Train tab: photos, a word, a button, and a view of the run.

The left half of the Train tab: photos, a word and a button; other fields, named as in `TrainForm`, are folded.

The Train tab: photos, a word, a button, and a view of the run. The server owns the run; the page only shows it.
"""

from collections.abc import Callable
from typing import Any

import gradio as gr

from dreambooth_moslora.core.names import is_toy
from dreambooth_moslora.disk.adapter_files import NONE
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.plan.choices import TOKEN, encoders_are_here
from dreambooth_moslora.settings.sources import FoundRecipe
from dreambooth_moslora.settings.table import MEMORY_WORDS, MIXERS
from dreambooth_moslora.ui.generate import GenerateTab
from dreambooth_moslora.ui.generate_form import prompt_for, summary_of
from dreambooth_moslora.ui.html import explain_bad_values, notice
from dreambooth_moslora.ui.jobs import Jobs, settings_of
from dreambooth_moslora.ui.state import AT_ONCE, TELLING, AppContext, as_gradio_error, as_user_error, sentence
from dreambooth_moslora.ui.train_form import (
    OWN_FIELDS,
    PRESETS,
    TOKENS_RATE,
    TrainForm,
    add_recipe,
    form_of,
    keep_recipe,
    like_line,
    recipe_names,
    recipe_of,
)
from dreambooth_moslora.ui.train_masks import (
    TAKING_PHOTOS,
    box_widgets,
    boxes_for,
    connect_masks,
    connect_subjects,
    mask_widgets,
    photo_widgets,
    review_widgets,
    reviews,
    subject_widgets,
    take_given,
)
from dreambooth_moslora.ui.train_reopen import form_of_run, like_of_run, take_photos_of_run, values_like, values_of
from dreambooth_moslora.ui.train_start import add_to_queue, estimate_cost, start_run, starts_for
from dreambooth_moslora.ui.train_watch import connect_queue, connect_watch, queue_widgets, run_names, watch_widgets
from dreambooth_moslora.ui.visitors import Visitor

FINDS_SUBJECT = "finds the subject in photos that have none"
SAYS_PLACE = "says the surroundings of photos that have no line"
FROM_HUB = "; {} from the hub once"
PRIOR_LABELS = [("the base", "adapter_off"), ("class images", "class_images")]
NARROW = {"min_width": 110}


def train_widgets(base: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields under the names of TrainForm, and the other widgets."""
    gr.Markdown("### 1 · Photos", elem_classes="step")
    others = photo_widgets()
    gr.Markdown("### 2 · One word", elem_classes="step")
    class_word = gr.Textbox(label="What the photos show", placeholder="dog", elem_id="class_word")
    prompts = gr.HTML(visible=False, elem_id="prompts")
    further, boxes = subject_widgets()
    with gr.Row(elem_classes="tight"):
        start = gr.Button("Start training", variant="primary", elem_id="start")
    with gr.Row(elem_classes="tight"):
        queue = gr.Button("Add to queue", min_width=132, elem_id="add_to_queue")
        estimate = gr.Button("Estimate cost", min_width=132, elem_id="estimate")
    cost = gr.HTML("", label="Cost", elem_id="cost")
    with gr.Accordion("More settings", open=False, elem_id="more_training"):
        others |= (like := like_widgets())
        more = {"like": like["like"]} | word_fields(base) | class_fields() | mask_fields(base)
        masks = mask_widgets()
        more |= adapter_fields(base)
    fields = {"class_word": class_word, **more}
    others |= {"prompts": prompts, "start": start, "queue": queue, "estimate": estimate, "cost": cost}
    return {name: fields[name] for name in OWN_FIELDS} | further, others | boxes | masks


def like_widgets() -> dict[str, Any]:
    """A file whose settings fill the form, and the line about it."""
    with gr.Row(elem_classes="tight"):
        like = gr.Dropdown(
            [NONE],
            value=NONE,
            label="Train like",
            info="an adapter whose settings fill this form",
            allow_custom_value=True,
            elem_id="train_like",
            scale=4,
        )
        upload = gr.UploadButton(
            "Upload", file_types=[".safetensors"], scale=0, min_width=88, elem_id="upload_like", size="md"
        )
    said = gr.HTML("", visible=False, elem_id="like_said")
    return {"like": like, "upload_like": upload, "like_said": said}


def word_fields(base: str) -> dict[str, Any]:
    with gr.Row():
        token = gr.Textbox(TOKEN, label="Token", info="a rare word", elem_id="token", **NARROW)
        run_name = gr.Textbox("", label="Name of the run", info="may be empty", elem_id="run_name", **NARROW)
    captions = gr.Textbox(
        "", label="Captions", info="one line for each photo, in order; may be left out", lines=2, elem_id="captions"
    )
    fetched = "" if is_toy(base) else FROM_HUB.format("Qwen3-VL comes")
    make_captions = gr.Checkbox(False, label="Write captions", info=SAYS_PLACE + fetched, elem_id="make_captions")
    preset = gr.Radio(
        list(PRESETS), value="standard", label="Length", info="half, once, twice the recipe's", elem_id="preset"
    )
    with gr.Row():
        steps = gr.Number(0, label="Steps", info="0: by length", precision=0, elem_id="train_steps", **NARROW)
        seed = gr.Number(0, label="Seed", info="also of the crops", precision=0, elem_id="train_seed", **NARROW)
    return {
        "token": token,
        "run_name": run_name,
        "captions": captions,
        "make_captions": make_captions,
        "preset": preset,
        "steps": steps,
        "seed": seed,
    }


def class_fields() -> dict[str, Any]:
    prior = gr.Checkbox(
        True, label="Keep the class", info="without it, its whole kind turns into yours; slower", elem_id="prior"
    )
    with gr.Row():
        source = gr.Dropdown(
            PRIOR_LABELS, value="adapter_off", label="Kept by", info="what it is held to", elem_id="prior_by", **NARROW
        )
        weight = gr.Number(0, label="Prior weight", info="0: by recipe", elem_id="prior_weight", **NARROW)
    return {"prior_preservation": prior, "prior": source, "prior_weight": weight}


def mask_fields(base: str) -> dict[str, Any]:
    fetched = "" if is_toy(base) else FROM_HUB.format("CLIPSeg comes")
    make_masks = gr.Checkbox(is_toy(base), label="Make masks", info=FINDS_SUBJECT + fetched, elem_id="make_masks")
    outside = gr.Slider(
        0,
        1,
        TrainForm.unmasked_weight,
        step=0.05,
        label="Weight outside the mask",
        info="0: the surroundings are not learned at all",
        elem_id="unmasked_weight",
    )
    return {"make_masks": make_masks, "unmasked_weight": outside}


def adapter_fields(base: str) -> dict[str, Any]:
    is_here = encoders_are_here(base)
    fetched = "" if is_here else FROM_HUB.format("CLIP and DINOv2 are not here and come, 2 GB,")
    scores = gr.Checkbox(
        is_here, label="Scores", info=f"measures on the way and keeps the best step{fetched}", elem_id="scores"
    )
    tokens = token_fields()
    start = gr.Dropdown(
        [NONE],
        value=NONE,
        label="Begin with",
        info="an adapter to go on from, with these photos; “none”: from nothing",
        allow_custom_value=True,
        elem_id="begin_with",
    )
    with gr.Row():
        rank = gr.Number(0, label="Rank", info="0: by recipe", precision=0, elem_id="rank", **NARROW)
        learning_rate = gr.Number(0, label="Learning rate", info="0: by recipe", elem_id="learning_rate", **NARROW)
    with gr.Row():
        mixer = gr.Dropdown(
            list(MIXERS), value="orthogonal", label="Mixer", info="“none”: LoRA", elem_id="mixer", **NARROW
        )
        memory = gr.Dropdown(
            list(MEMORY_WORDS),
            value="auto",
            label="Memory",
            info="nf4 needs least",
            visible=not is_toy(base),
            elem_id="memory",
            **NARROW,
        )
    fields = {"scores": scores, "rank": rank, "learning_rate": learning_rate, "mixer": mixer, "memory": memory}
    return tokens | fields | {"begin_with": start}


def token_fields() -> dict[str, Any]:
    """Pivotal tuning: the tick, and what belongs to it while it is set."""
    tick = gr.Checkbox(
        False,
        label="New tokens",
        info="learns the token anew in both text encoders, beside the adapter; on the toys likeness did not rise",
        elem_id="new_tokens",
    )
    with gr.Row(visible=False, elem_id="token_box") as box:
        words = gr.Textbox(
            "", label="They begin as", info="words like it; or empty", elem_id="tokens_begin_as", **NARROW
        )
        rate = gr.Number(
            TOKENS_RATE,
            label="Their learning rate",
            info="1e-4 to 1e-3",
            elem_id="tokens_rate",
            **NARROW,
        )
    tick.change(lambda is_set: gr.Row(visible=is_set), tick, box, **AT_ONCE)
    return {"new_tokens": tick, "tokens_begin_as": words, "tokens_learning_rate": rate}


SHOW_STATUS = """() => {
  if (innerWidth <= 760) document.getElementById("train_status").scrollIntoView({block: "center"});
}"""
"""On a phone the run stands below the whole form."""
Files = list[str] | None
"""Uploads of a subject; those of a further subject may be missing."""


def build_train_tab(ctx: AppContext, jobs: Jobs, page: gr.Blocks, tabs: gr.Tabs, generate: GenerateTab) -> None:
    with gr.Row(elem_id="train", equal_height=False):
        with gr.Column(elem_id="train_form", min_width=280):
            fields, parts = train_widgets(ctx.base_name)
        with gr.Column(elem_id="train_watch", min_width=280):
            parts |= watch_widgets(queue_widgets)
    connect_subjects(ctx, page, fields, parts)
    _connect_start(ctx, jobs, fields, parts)
    _connect_names(ctx, page, fields)
    _connect_like(ctx, fields, parts)
    connect_masks(ctx, fields, parts)
    connect_watch(ctx, jobs, page, parts)
    connect_queue(ctx, jobs, page, parts)
    _connect_use(ctx, jobs, parts, tabs, generate)
    _connect_reopen(ctx, jobs, fields, parts)


def _connect_start(ctx: AppContext, jobs: Jobs, fields: dict, parts: dict) -> None:
    def with_photos(request: gr.Request, *files: Files) -> Visitor:
        visitor = ctx.visitors.of(request)
        take_given(files, visitor)
        return visitor

    @as_gradio_error
    def train(
        photos: Files,
        request: gr.Request,
        photos_2: Files = None,
        photos_3: Files = None,
        photos_4: Files = None,
        **values,
    ) -> tuple:
        visitor = with_photos(request, photos, photos_2, photos_3, photos_4)
        job, chosen = start_run(ctx, jobs, form_of(values), visitor)
        names = gr.Dropdown(choices=run_names(jobs, visitor.id), value=job.name)
        return names, notice(f"The run {job.name} is starting."), chosen

    @as_gradio_error
    def queue(
        photos: Files,
        request: gr.Request,
        photos_2: Files = None,
        photos_3: Files = None,
        photos_4: Files = None,
        **values,
    ) -> str:
        visitor = with_photos(request, photos, photos_2, photos_3, photos_4)
        return add_to_queue(ctx, jobs, form_of(values), visitor)[1]

    @as_gradio_error
    def estimate(
        photos: Files,
        request: gr.Request,
        photos_2: Files = None,
        photos_3: Files = None,
        photos_4: Files = None,
        **values,
    ) -> str:
        return estimate_cost(ctx, jobs, form_of(values), with_photos(request, photos, photos_2, photos_3, photos_4))

    for widget in fields.values():
        if not isinstance(widget, gr.File):
            explain_bad_values(widget)
    inputs = {"photos": parts["photos"], **fields}
    chosen = gr.State("")  # hidden from programs: `/train` returns two values
    started = [parts["run"], parts["status"], chosen]
    chosen.change(lambda card: card, chosen, parts["cost"], **AT_ONCE)
    click = parts["start"].click(train, inputs_kwargs=inputs, outputs=started, api_name="train", **TAKING_PHOTOS)
    click.success(None, js=SHOW_STATUS, **AT_ONCE)
    parts["queue"].click(queue, inputs_kwargs=inputs, outputs=parts["cost"], api_name="add_to_queue", **TAKING_PHOTOS)
    parts["estimate"].click(estimate, inputs_kwargs=inputs, outputs=parts["cost"], api_name="estimate", **TAKING_PHOTOS)


def _connect_names(ctx: AppContext, page: gr.Blocks, fields: dict) -> None:
    """The lists of adapters."""

    def connect(listed: Callable[[AppContext, Visitor], list[str]], widget: gr.Dropdown) -> None:
        def names(request: gr.Request) -> gr.Dropdown:
            return gr.Dropdown(choices=listed(ctx, ctx.visitors.of(request)))

        gr.on([page.load, widget.focus], names, None, widget, **AT_ONCE)

    connect(starts_for, fields["begin_with"])
    connect(recipe_names, fields["like"])


def _connect_like(ctx: AppContext, fields: dict, parts: dict) -> None:
    """An adapter's recipe into the form, and the crops as it makes them. A file without one is told below the list."""
    names = list(values_like(None, ctx.base_name))
    filled = [*(fields[name] for name in names), *review_widgets(parts)]
    outputs = [fields["like"], parts["like_said"], *filled]

    def choose(name: str | None, count: int, request: gr.Request) -> tuple:
        """A name without a recipe becomes “none”."""
        try:
            return like(str(name or NONE), count, ctx.visitors.of(request))
        except Exception as error:
            listed, _, *rest = like(NONE, count, ctx.visitors.of(request))
            return listed, mistake(error), *rest

    def upload(file: str, count: int, request: gr.Request) -> tuple:
        """A bad file changes nothing."""
        visitor = ctx.visitors.of(request)
        try:
            return like(add_recipe(ctx, file, visitor), count, visitor)
        except Exception as error:
            return gr.skip(), mistake(error), *([gr.skip()] * len(filled))

    def like(name: str, count: int, visitor: Visitor) -> tuple:
        recipe = recipe_of(ctx, name, visitor)
        values = values_like(recipe, ctx.base_name)
        listed = gr.Dropdown(choices=recipe_names(ctx, visitor), value=name)
        pictures = reviews(ctx, visitor, values["seed"], count, name)
        return listed, said_of(name, recipe), *(values[field] for field in names), *pictures

    def mistake(error: Exception) -> gr.HTML:
        return gr.HTML(notice(ctx.jobs.told(sentence(as_user_error(error))), "bad"), visible=True)

    options = {"show_progress_on": parts["like_said"], **TELLING}
    fields["like"].input(choose, [fields["like"], fields["subjects"]], outputs, **options)
    parts["upload_like"].upload(upload, [parts["upload_like"], fields["subjects"]], outputs, **options)


def said_of(name: str, recipe: FoundRecipe | None) -> gr.HTML:
    return gr.HTML(notice(like_line(name, recipe)) if recipe else "", visible=recipe is not None)


def _connect_use(ctx: AppContext, jobs: Jobs, parts: dict, tabs: gr.Tabs, generate: GenerateTab) -> None:
    @as_gradio_error
    def use(run: str | None, request: gr.Request) -> tuple:
        visitor = ctx.visitors.of(request)
        job = jobs.owned(run or "", visitor.id)
        name = ctx.catalog.name_of(RunDir(job.run_dir).adapter_path, visitor)
        files = ctx.catalog.files(visitor)
        summary = summary_of(files[name])
        chosen = gr.Dropdown(choices=[NONE, *files], value=name)
        return gr.Tabs(selected="generate"), chosen, prompt_for(summary), summary.scale

    shown = [tabs, generate.adapters[0], generate.prompt, generate.fields["scale"]]
    parts["use"].click(use, parts["run"], shown, show_progress_on=generate.prompt, **TELLING)


def _connect_reopen(ctx: AppContext, jobs: Jobs, fields: dict, parts: dict) -> None:
    """A run's settings, words and photos into the form."""
    names = [name for name, field in fields.items() if not isinstance(field, gr.File)]
    files = [field for field in fields.values() if isinstance(field, gr.File)]
    shown = [*review_widgets(parts), parts["like_said"], parts["cost"]]
    outputs = [*(fields[name] for name in names), parts["photos"], *files, *shown]
    boxes = box_widgets(fields | parts)[1:]

    @as_gradio_error
    def reopen(run: str | None, request: gr.Request) -> tuple:
        visitor = ctx.visitors.of(request)
        job = jobs.owned(run or "", visitor.id)
        form = form_of_run(settings_of(job), job.run_dir / "photos")
        count = len(form.subjects)
        take_photos_of_run(job.run_dir, visitor, count)
        name, recipe = like_of_run(job.run_dir)
        keep_recipe(ctx, name, recipe, visitor)
        values = values_of(form)
        emptied = [None] * (1 + len(files))
        told = notice(f"The settings, words and photos of {job.name} are in the form. Change them, and start.")
        shown = (*reviews(ctx, visitor, form.seed, count, form.like), said_of(name, recipe), told)
        return (*(values[name] for name in names), *emptied, *shown, *boxes_for(count)[1:])

    parts["reopen"].click(reopen, parts["run"], [*outputs, *boxes], show_progress_on=parts["cost"], **TELLING)
