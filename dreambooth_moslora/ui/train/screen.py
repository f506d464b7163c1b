"""The Train tab: photos, a word, a button, and a view of the run, which the server owns; further
fields are folded."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import gradio as gr

from dreambooth_moslora.disk.paths import public_name
from dreambooth_moslora.disk.run_folder import NONE, RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings.sources import FoundRecipe
from dreambooth_moslora.settings.toys import is_toy
from dreambooth_moslora.ui import generate_values, html, jobs, state
from dreambooth_moslora.ui.generate_tab import GenerateTab
from dreambooth_moslora.ui.train import train_masks, train_photos, train_start, train_watch
from dreambooth_moslora.ui.train.train_form import (
    TrainForm,
    form_of,
    left_out,
    named,
    rows,
    values_like,
    values_of,
)

FROM_HUB = "; {} from the hub once"
NARROW = {"min_width": 110}


def train_widgets(
    base: str, form: type[TrainForm] = TrainForm
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields under the names of the API, and the other widgets."""
    gr.Markdown("### 1 · Photos", elem_classes="step")
    others = train_masks.photo_widgets() | train_masks.mask_widgets()
    gr.Markdown("### 2 · One word", elem_classes="step")
    fields = {"class_word": field_widget("class_word", form, base)}
    prompts = gr.HTML(visible=False, elem_id="prompts")
    further, boxes = train_masks.subject_widgets()
    with gr.Row(elem_classes="tight"):
        start = gr.Button("Start training", variant="primary", elem_id="start")
    with gr.Row(elem_classes="tight"):
        queue = gr.Button("Add to queue", min_width=132, elem_id="add_to_queue")
        estimate = gr.Button("Estimate cost", min_width=132, elem_id="estimate")
    cost = gr.HTML("", label="Cost", elem_id="cost")
    others |= {
        "prompts": prompts,
        "start": start,
        "queue": queue,
        "estimate": estimate,
        "cost": cost,
    }
    with gr.Accordion("More settings", open=False, elem_id="more_training") as more:
        others["more"] = more
        others["by_recipe"] = gr.HTML("", elem_id="by_recipe")
        for line in sorted({row.line for row in rows(form).values()} - {0}):
            names = [name for name, row in rows(form).items() if row.line == line]
            others |= line_widgets(names, fields, form, base)
    return {name: fields[name] for name in rows(form)} | further, others | boxes


def line_widgets(
    names: list[str], fields: dict[str, Any], form: type[TrainForm], base: str
) -> dict[str, Any]:
    """Widgets of one line, into `fields`; returns others. A box is shown while the tick above that
    it needs is set."""
    row = rows(form)[names[0]]
    if names == ["like"]:  # a file whose settings fill the form, and the line about it
        with gr.Row(elem_classes="tight"):
            fields["like"] = field_widget("like", form, base)
            upload = gr.UploadButton(
                "Upload",
                file_types=[".safetensors"],
                scale=0,
                min_width=88,
                elem_id="upload_like",
                size="md",
            )
        return {"upload_like": upload, "like_said": gr.HTML("", visible=False, elem_id="like_said")}
    if len(names) == 1 and not row.box:
        fields[names[0]] = field_widget(names[0], form, base)
        return {}
    with gr.Row(visible=not row.box, elem_id=row.box or None) as box:
        fields |= {name: field_widget(name, form, base, **NARROW) for name in names}
    if row.box:
        tick = fields[row.needs]
        tick.change(lambda is_set: gr.Row(visible=is_set), tick, box, **state.AT_ONCE)
    return {}


def field_widget(
    name: str, form: type[TrainForm], base: str, **room: Any
) -> gr.components.Component:
    """The widget of a field, by its values and the kind that the table names."""
    row = rows(form)[name]
    first = row.first(base)
    told = {
        "label": row.label,
        "info": row.info or row.row.get("help"),
        "elem_id": row.elem_id or name,
    }
    is_of_family = not row.of_family or getattr(state.facts_shown(base), row.of_family)
    look = told | dict(row.look) | room | ({} if is_of_family else {"visible": False})
    if row.is_tick:
        is_off = row.fetched and not (first if row.at_first else is_toy(base))
        return gr.Checkbox(
            first,
            **look | {"info": told["info"] + (FROM_HUB.format(row.fetched) if is_off else "")},
        )
    if row.kind == "slider":
        return gr.Slider(0, row.limit, first, step=row.limit / 20, **look)
    if row.is_number:
        return gr.Number(first or 0, precision=0 if isinstance(first, int) else None, **look)
    if row.kind == "list":
        return gr.Dropdown([first], value=first, allow_custom_value=True, **look)
    if row.kind == "radio":
        return gr.Radio(list(row.values), value=first, **look)
    if row.values:
        labels = (
            row.choices
            if isinstance(row.choices, Mapping)
            else {value: value for value in row.values}
        )
        visible = not (row.of_files and is_toy(base))
        return gr.Dropdown(
            [(label, value) for value, label in labels.items()],
            value=first,
            visible=visible,
            **look,
        )
    return gr.Textbox(None if row.required else first, **look)


SHOW_STATUS = "() => setTimeout(() => bringIntoView('train_watch', 'train_status'), 200)"
"""Once the choices are on the page: on a phone they stand above the run."""
Files = list[str] | None  # Uploads of a subject; those of a further subject may be missing


def build_train_tab(
    ctx: state.AppContext, page: gr.Blocks, tabs: gr.Tabs, generate: GenerateTab
) -> dict[str, Any]:
    """Returns the fields whose first value depends on the base."""
    with gr.Row(elem_id="train", equal_height=False):
        with gr.Column(elem_id="train_form", min_width=280):
            fields, parts = train_widgets(ctx.base_name)
        with gr.Column(elem_id="train_watch", min_width=280):
            parts |= train_watch.watch_widgets()
    train_masks.connect_subjects(ctx, page, fields, parts)
    _connect_start(ctx, fields, parts)

    @gr.on(
        [page.load, fields["begin_with"].focus],
        inputs=None,
        outputs=fields["begin_with"],
        **state.AT_ONCE,
    )
    def starts() -> gr.Dropdown:
        """Adapters with new tokens are left out, as no run begins with them."""
        files = ctx.catalog.files()
        return gr.Dropdown(
            choices=[
                NONE,
                *(
                    name
                    for name, file in files.items()
                    if not generate_values.summary_of(file).new_tokens
                ),
            ]
        )

    @gr.on([page.load, fields["like"].focus], inputs=None, outputs=fields["like"], **state.AT_ONCE)
    def recipes() -> gr.Dropdown:
        return gr.Dropdown(choices=train_start.recipe_names(ctx))

    _connect_like(ctx, fields, parts)
    _connect_values(ctx, page, fields, parts)
    train_masks.connect_masks(ctx, fields, parts)
    train_watch.connect_watch(ctx, page, parts)
    train_watch.connect_queue(ctx, page, parts)
    _connect_ended(ctx, fields, parts, tabs, generate)
    return {
        name: fields[name]
        for name, row in rows(TrainForm).items()
        if row.at_first or row.of_files or row.of_family
    }


def _connect_start(ctx: state.AppContext, fields: dict, parts: dict) -> None:
    def with_photos(act: Callable[[TrainForm], Any]) -> Callable:
        """A handler of the form's values, after the photos were taken."""

        @state.as_gradio_error
        def handler(
            photos: Files,
            photos_2: Files = None,
            photos_3: Files = None,
            photos_4: Files = None,
            **values,
        ) -> Any:
            sent = {
                n: files
                for n, files in enumerate((photos, photos_2, photos_3, photos_4), 1)
                if files
            }
            form = form_of(
                values | {named("photos", number): files for number, files in sent.items()}
            )
            # else the photos of another request would be used in their place
            with ctx.workspace.changing if sent else nullcontext():
                for number, files in sent.items():  # the photos of the other subjects stay
                    train_photos.take_with_masks(files, ctx.workspace, number)
                return act(form)

        return handler

    for widget in fields.values():
        if not isinstance(widget, gr.File):
            html.explain_bad_values(widget)
    how = {"inputs_kwargs": {"photos": parts["photos"], **fields}, **train_masks.TAKING_PHOTOS}
    chosen = gr.State("")  # hidden from programs: `/train` returns two values
    chosen.change(lambda card: card, chosen, parts["cost"], **state.AT_ONCE).then(
        None, js=SHOW_STATUS, **state.AT_ONCE
    )

    @with_photos
    def train(form: TrainForm) -> tuple:
        job, chosen = train_start.start_run(ctx, form)
        names = gr.Dropdown(choices=train_watch.run_names(ctx.jobs), value=job.name)
        return names, html.notice(f"The run {job.name} is starting."), chosen

    parts["start"].click(
        train, api_name="train", outputs=[parts["run"], parts["status"], chosen], **how
    )

    @parts["queue"].click(api_name="add_to_queue", outputs=parts["cost"], **how)
    @with_photos
    def queue(form: TrainForm) -> str:
        return train_start.add_to_queue(ctx, form)[1]

    @parts["estimate"].click(api_name="estimate", outputs=parts["cost"], **how)
    @with_photos
    def estimate(form: TrainForm) -> str:
        return train_start.estimate_cost(ctx, form)


def _connect_like(ctx: state.AppContext, fields: dict, parts: dict) -> None:
    """An adapter's recipe into the form, and the crops as it makes them. A file without one is told
    below the list."""
    names = list(values_like(None, ctx.base_name))
    filled = [*(fields[name] for name in names), *train_masks.review_widgets(parts)]
    outputs = [fields["like"], parts["like_said"], *filled]
    options = {"outputs": outputs, "show_progress_on": parts["like_said"], **state.TELLING}

    def like(name: str, count: int) -> tuple:
        recipe = train_start.recipe_of(ctx, name)
        values = as_shown(values_like(recipe, ctx.base_name))
        listed = gr.Dropdown(choices=train_start.recipe_names(ctx), value=name)
        pictures = train_masks.reviews(ctx, values["seed"], count, name)
        return listed, said_of(name, recipe), *(values[field] for field in names), *pictures

    def mistake(error: Exception) -> gr.HTML:
        return gr.HTML(html.notice(state.sentence(state.as_user_error(error)), "bad"), visible=True)

    @fields["like"].input(inputs=[fields["like"], fields["subjects"]], **options)
    def choose(name: str | None, count: int) -> tuple:
        """A name without a recipe becomes “none”."""
        try:
            return like(str(name or NONE), count)
        except Exception as error:
            listed, _, *rest = like(NONE, count)
            return listed, mistake(error), *rest

    @parts["upload_like"].upload(inputs=[parts["upload_like"], fields["subjects"]], **options)
    def upload(file: str, count: int) -> tuple:
        """A bad file changes nothing."""
        try:
            return like(train_start.add_recipe(ctx, file), count)
        except Exception as error:
            return gr.skip(), mistake(error), *([gr.skip()] * len(filled))


def _connect_values(ctx: state.AppContext, page: gr.Blocks, fields: dict, parts: dict) -> None:
    """Shows in empty fields what they stand for. To a program 0 says so, which the page empties
    when it is loaded."""
    names = [name for name, row in rows(TrainForm).items() if row.by_recipe]
    shown = [parts["by_recipe"], *(fields[name] for name in names)]

    def values(preset: str, like: str | None) -> list:
        try:
            found = train_start.recipe_values(ctx, preset, like)
        except Exception as error:
            return [
                html.faint(state.sentence(state.as_user_error(error))),
                *([gr.skip()] * len(names)),
            ]
        line = f"Trained at {ctx.resolution_px} px, the base's own size. An empty field has the value in grey."
        return [html.faint(line), *(gr.Number(placeholder=found[name]) for name in names)]

    inputs, changes = (
        [fields["preset"], fields["like"]],
        [fields["preset"].change, fields["like"].change],
    )
    gr.on([page.load, parts["more"].expand, *changes], values, inputs, shown, **state.AT_ONCE)
    page.load(
        None,
        shown[1:],
        shown[1:],
        js="(...numbers) => numbers.map((number) => number || null)",
        **state.AT_ONCE,
    )


def as_shown(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of the form's values, those that mean “by recipe” as empty fields."""
    by_recipe = {name for name, row in rows(TrainForm).items() if row.by_recipe}
    return {name: value or None if name in by_recipe else value for name, value in values.items()}


def said_of(name: str, recipe: FoundRecipe | None) -> gr.HTML:
    """What was taken, and what could not be; hidden for no recipe."""
    if recipe is None:
        return gr.HTML("", visible=False)
    own = left_out(recipe)
    parts = [
        f"Like {name}: {len(recipe.settings) - len(own)} settings, those of this form filled in"
    ]
    parts += [f"left to this page: {', '.join(own)}"] if own else []
    return gr.HTML(html.notice(f"{'; '.join([*parts, *recipe.remarks])}."), visible=True)


def _connect_ended(
    ctx: state.AppContext, fields: dict, parts: dict, tabs: gr.Tabs, generate: GenerateTab
) -> None:
    """A run's adapter into the other tab; its settings, words and photos into the form."""
    shown = [tabs, generate.adapters[0], generate.prompt, generate.fields["scale"]]

    @parts["use"].click(
        inputs=parts["run"], outputs=shown, show_progress_on=generate.prompt, **state.TELLING
    )
    @state.as_gradio_error
    def use(run: str | None) -> tuple:
        job = ctx.jobs.seen(run or "")
        files, adapter = ctx.catalog.files(), RunDir(job.run_dir).adapter_path
        if (name := next((name for name, file in files.items() if file == adapter), None)) is None:
            raise UserError("there is no adapter yet")
        summary = generate_values.summary_of(files[name])
        chosen = gr.Dropdown(choices=[NONE, *files], value=name)
        return (
            gr.Tabs(selected="generate"),
            chosen,
            generate_values.prompt_for(summary),
            summary.scale,
        )

    names = [name for name, field in fields.items() if not isinstance(field, gr.File)]
    outputs = [*(fields[name] for name in names), *train_masks.review_widgets(parts)]
    outputs += [parts["like_said"], parts["cost"], *train_masks.box_widgets(fields | parts)[1:]]

    @parts["reopen"].click(
        inputs=parts["run"], outputs=outputs, show_progress_on=parts["cost"], **state.TELLING
    )
    @state.as_gradio_error
    def reopen(run: str | None) -> tuple:
        job = ctx.jobs.recorded(run or "")
        settings = jobs.settings_of(job)
        form = train_start.form_of_run(settings, job.run_dir / "photos")
        count = len(form.subjects)
        train_start.take_photos_of_run(job.run_dir, ctx.workspace, count)
        name, recipe = train_start.like_of_run(job.run_dir)
        train_start.keep_recipe(ctx, name, recipe)
        train_photos.keep_captions_of(ctx.workspace, form.subjects)
        values = as_shown(values_of(form))
        told = (
            f"The settings, words and photos of {job.name} are in the form. Change them, and start."
        )
        if (base := settings["pretrained_model_name_or_path"]) != ctx.base_name:
            told += f" It was trained on {public_name(base)}, and the base at the top of the page is {ctx.base}."
        reviews = train_masks.reviews(ctx, form.seed, count, form.like, is_reset=True)
        shown = (
            *reviews,
            said_of(name, recipe),
            html.notice(told),
            *train_masks.boxes_for(count)[1:],
        )
        return (*(values[name] for name in names), *shown)
