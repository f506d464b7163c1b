"""The Train tab: photos, a word, a button, and a view of the run, which the server owns.

Further fields are folded.
"""

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
"""Told beside a tick that fetches something."""
NARROW = {"min_width": 110}
"""Options of widgets that stand side by side."""


def train_widgets(
    base: str, form: type[TrainForm] = TrainForm
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields under the names of the API, and the other widgets, by name."""
    # What every run needs: photos, and a word for what they show.
    gr.Markdown("### 1 · Photos", elem_classes="step")
    others = train_masks.photo_widgets() | train_masks.mask_widgets()
    gr.Markdown("### 2 · One word", elem_classes="step")
    fields = {"class_word": field_widget("class_word", form, base)}
    prompts = gr.HTML(visible=False, elem_id="prompts")
    further, boxes = train_masks.subject_widgets()
    # What can be done with the form.
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
    # The further fields, line by line as the table has them.
    with gr.Accordion("More settings", open=False, elem_id="more_training") as more:
        others["more"] = more
        others["by_recipe"] = gr.HTML("", elem_id="by_recipe")
        for line in sorted({row.line for row in rows(form).values()} - {0}):
            names = [name for name, row in rows(form).items() if row.line == line]
            others |= line_widgets(names, fields, form, base)
    in_order = {name: fields[name] for name in rows(form)}
    return in_order | further, others | boxes


def line_widgets(
    names: list[str], fields: dict[str, Any], form: type[TrainForm], base: str
) -> dict[str, Any]:
    """Make the widgets of one line.

    - `names` are the line's fields, whose widgets go into `fields`.
    - `form` has the table of fields.
    - `base` is the name of the page's base.

    Returns the line's other widgets, by name.
    """
    row = rows(form)[names[0]]
    # A file whose settings fill the form, and a line that tells what was taken.
    if names == ["like"]:
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
        said = gr.HTML("", visible=False, elem_id="like_said")
        return {"upload_like": upload, "like_said": said}
    # One field over the whole width.
    if len(names) == 1 and not row.box:
        fields[names[0]] = field_widget(names[0], form, base)
        return {}
    # Several side by side. A box is shown while the tick above that it needs is set.
    with gr.Row(visible=not row.box, elem_id=row.box or None) as box:
        fields |= {name: field_widget(name, form, base, **NARROW) for name in names}
    if row.box:
        tick = fields[row.needs]
        tick.change(lambda is_set: gr.Row(visible=is_set), tick, box, **state.AT_ONCE)
    return {}


def field_widget(
    name: str, form: type[TrainForm], base: str, **room: Any
) -> gr.components.Component:
    """The widget of a field, by its values and the kind that the table names.

    - `name` is the field's in `form`.
    - `base` is the name of the page's base, on which the first value may depend.
    - `room` are further options of the widget.
    """
    row = rows(form)[name]
    first = row.first(base)
    # How it looks, whatever it is.
    look = {
        "label": row.label,
        "info": row.info or row.row.get("help"),
        "elem_id": row.elem_id or name,
        **row.look,
        **room,
    }
    if row.of_family and not getattr(state.facts_shown(base), row.of_family):
        look["visible"] = False
    # What it is.
    if row.is_tick:
        is_here = first if row.at_first else is_toy(base)
        if row.fetched and not is_here:
            look["info"] += FROM_HUB.format(row.fetched)
        return gr.Checkbox(first, **look)
    if row.kind == "slider":
        return gr.Slider(0, row.limit, first, step=row.limit / 20, **look)
    if row.is_number:
        return gr.Number(first or 0, precision=0 if isinstance(first, int) else None, **look)
    if row.kind == "list":
        return gr.Dropdown([first], value=first, allow_custom_value=True, **look)
    if row.kind == "radio":
        return gr.Radio(list(row.values), value=first, **look)
    if row.values:
        labels = {value: value for value in row.values}
        if isinstance(row.choices, Mapping):
            labels = row.choices
        choices = [(label, value) for value, label in labels.items()]
        is_shown = not (row.of_files and is_toy(base))
        return gr.Dropdown(choices, value=first, visible=is_shown, **look)
    return gr.Textbox(None if row.required else first, **look)


SHOW_STATUS = "() => setTimeout(() => bringIntoView('train_watch', 'train_status'), 200)"
"""Once the choices are on the page: on a phone they stand above the run."""
Files = list[str] | None
"""Uploads of a subject; those of a further subject may be missing."""


def build_train_tab(
    ctx: state.AppContext, page: gr.Blocks, tabs: gr.Tabs, generate: GenerateTab
) -> dict[str, Any]:
    """Make the tab's widgets, then connect their events.

    - `page` and `tabs` are the whole page, and its tabs.
    - `generate` is the tab in which a run's adapter is used.

    Returns the fields whose first value depends on the base, by name.
    """
    # The widgets: the form on the left, the run on the right.
    with gr.Row(elem_id="train", equal_height=False):
        with gr.Column(elem_id="train_form", min_width=280):
            fields, parts = train_widgets(ctx.base_name)
        with gr.Column(elem_id="train_watch", min_width=280):
            parts |= train_watch.watch_widgets()
    # The form's events.
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
        names = [NONE]
        for name, file in ctx.catalog.files().items():
            if not generate_values.summary_of(file).new_tokens:
                names.append(name)
        return gr.Dropdown(choices=names)

    @gr.on([page.load, fields["like"].focus], inputs=None, outputs=fields["like"], **state.AT_ONCE)
    def recipes() -> gr.Dropdown:
        return gr.Dropdown(choices=train_start.recipe_names(ctx))

    _connect_like(ctx, fields, parts)
    _connect_values(ctx, page, fields, parts)
    train_masks.connect_masks(ctx, fields, parts)
    # The run's events.
    train_watch.connect_watch(ctx, page, parts)
    train_watch.connect_queue(ctx, page, parts)
    _connect_ended(ctx, fields, parts, tabs=tabs, generate=generate)
    of_base = {}
    for name, row in rows(TrainForm).items():
        if row.at_first or row.of_files or row.of_family:
            of_base[name] = fields[name]
    return of_base


def _connect_start(ctx: state.AppContext, fields: dict, parts: dict) -> None:
    """The three buttons that take the whole form: start, queue, and estimate."""

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
            # Photos come only from a program; the page has sent its own when they were dropped.
            sent = {}
            for number, files in enumerate((photos, photos_2, photos_3, photos_4), 1):
                if files:
                    sent[number] = files
                    values[named("photos", number)] = files
            form = form_of(values)
            # Without the lock, the photos of another request could be used in their place.
            with ctx.workspace.changing if sent else nullcontext():
                # The photos of the other subjects stay.
                for number, files in sent.items():
                    train_photos.take_with_masks(files, ctx.workspace, number)
                return act(form)

        return handler

    for widget in fields.values():
        if not isinstance(widget, gr.File):
            html.explain_bad_values(widget)
    how = {"inputs_kwargs": {"photos": parts["photos"], **fields}, **train_masks.TAKING_PHOTOS}
    # What was chosen for the run goes through a state, which is hidden from programs: `/train`
    # returns two values.
    chosen = gr.State("")
    chosen.change(lambda card: card, chosen, parts["cost"], **state.AT_ONCE).then(
        None, js=SHOW_STATUS, **state.AT_ONCE
    )

    @with_photos
    def train(form: TrainForm) -> tuple:
        job, chosen = train_start.start_run(ctx, form)
        names = gr.Dropdown(choices=train_watch.run_names(ctx.jobs), value=job.name)
        return names, html.notice(f"The run {job.name} is starting."), chosen

    started = [parts["run"], parts["status"], chosen]
    parts["start"].click(train, api_name="train", outputs=started, **how)

    @parts["queue"].click(api_name="add_to_queue", outputs=parts["cost"], **how)
    @with_photos
    def queue(form: TrainForm) -> str:
        return train_start.add_to_queue(ctx, form)[1]

    @parts["estimate"].click(api_name="estimate", outputs=parts["cost"], **how)
    @with_photos
    def estimate(form: TrainForm) -> str:
        return train_start.estimate_cost(ctx, form)


def _connect_like(ctx: state.AppContext, fields: dict, parts: dict) -> None:
    """An adapter's recipe goes into the form, and the photos are shown as it crops them.

    A file without a recipe is told below the list.
    """
    # Outputs of both events: the list, the line below it, the fields, and the photos.
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

    @fields["like"].input(inputs=[fields["like"], fields["subjects"]], **options)
    def choose(name: str | None, count: int) -> tuple:
        """A name without a recipe becomes “none”."""
        try:
            return like(str(name or NONE), count)
        except Exception as error:
            mistake = gr.HTML(state.mistake_card(error), visible=True)
            listed, _, *rest = like(NONE, count)
            return listed, mistake, *rest

    @parts["upload_like"].upload(inputs=[parts["upload_like"], fields["subjects"]], **options)
    def upload(file: str, count: int) -> tuple:
        """A bad file changes nothing."""
        try:
            return like(train_start.add_recipe(ctx, file), count)
        except Exception as error:
            mistake = gr.HTML(state.mistake_card(error), visible=True)
            return gr.skip(), mistake, *([gr.skip()] * len(filled))


def _connect_values(ctx: state.AppContext, page: gr.Blocks, fields: dict, parts: dict) -> None:
    """Empty fields show in grey what they stand for."""
    names = [name for name, row in rows(TrainForm).items() if row.by_recipe]
    shown = [parts["by_recipe"], *(fields[name] for name in names)]

    def values(preset: str, like: str | None) -> list:
        try:
            found = train_start.recipe_values(ctx, preset, like)
        except Exception as error:
            told = html.faint(state.sentence(state.as_user_error(error)))
            return [told, *([gr.skip()] * len(names))]
        line = (
            f"Trained at {ctx.resolution_px} px, the base's own size. "
            "An empty field has the value in grey."
        )
        return [html.faint(line), *(gr.Number(placeholder=found[name]) for name in names)]

    # Each time they may have changed: by another preset or recipe, or by the photos.
    inputs = [fields["preset"], fields["like"]]
    changes = [fields["preset"].change, fields["like"].change]
    gr.on([page.load, parts["more"].expand, *changes], values, inputs, shown, **state.AT_ONCE)
    # To a program 0 says “by recipe”: on the page these fields are empty from the start.
    page.load(
        None,
        shown[1:],
        shown[1:],
        js="(...numbers) => numbers.map((number) => number || null)",
        **state.AT_ONCE,
    )


def as_shown(values: Mapping[str, Any]) -> dict[str, Any]:
    """The form's values, where those that mean “by recipe” are empty fields."""
    shown = dict(values)
    for name, row in rows(TrainForm).items():
        if row.by_recipe and name in shown:
            shown[name] = shown[name] or None
    return shown


def said_of(name: str, recipe: FoundRecipe | None) -> gr.HTML:
    """What was taken from the recipe, and what could not be; hidden for no recipe."""
    if recipe is None:
        return gr.HTML("", visible=False)
    own = left_out(recipe)
    taken = len(recipe.settings) - len(own)
    parts = [f"Like {name}: {taken} settings, those of this form filled in"]
    if own:
        parts.append(f"left to this page: {', '.join(own)}")
    parts += recipe.remarks
    return gr.HTML(html.notice(f"{'; '.join(parts)}."), visible=True)


def _connect_ended(
    ctx: state.AppContext, fields: dict, parts: dict, tabs: gr.Tabs, generate: GenerateTab
) -> None:
    """What can be done with a run that has ended.

    Its adapter goes into the other tab (`tabs`, `generate`). Its settings, words and photos go into
    the form.
    """
    shown = [tabs, generate.adapters[0], generate.prompt, generate.fields["scale"]]

    @parts["use"].click(
        inputs=parts["run"], outputs=shown, show_progress_on=generate.prompt, **state.TELLING
    )
    @state.as_gradio_error
    def use(run: str | None) -> tuple:
        job = ctx.jobs.seen(run or "")
        files = ctx.catalog.files()
        adapter = RunDir(job.run_dir).adapter_path
        listed = [name for name, file in files.items() if file == adapter]
        if not listed:
            raise UserError("there is no adapter yet")
        name = listed[0]
        # It is chosen there, with the words that call its subject.
        summary = generate_values.summary_of(files[name])
        chosen = gr.Dropdown(choices=[NONE, *files], value=name)
        prompt = generate_values.prompt_for(summary)
        return gr.Tabs(selected="generate"), chosen, prompt, summary.scale

    names = [name for name, field in fields.items() if not isinstance(field, gr.File)]
    outputs = [*(fields[name] for name in names), *train_masks.review_widgets(parts)]
    outputs += [parts["like_said"], parts["cost"], *train_masks.box_widgets(fields | parts)[1:]]

    @parts["reopen"].click(
        inputs=parts["run"], outputs=outputs, show_progress_on=parts["cost"], **state.TELLING
    )
    @state.as_gradio_error
    def reopen(run: str | None) -> tuple:
        # What the run was made from comes back.
        job = ctx.jobs.recorded(run or "")
        settings = jobs.settings_of(job)
        form = train_start.form_of_run(settings, job.run_dir / "photos")
        count = len(form.subjects)
        train_start.take_photos_of_run(job.run_dir, ctx.workspace, count)
        name, recipe = train_start.like_of_run(job.run_dir)
        train_start.keep_recipe(ctx, name, recipe)
        train_photos.keep_captions_of(ctx.workspace, form.subjects)
        # What is said of it.
        told = (
            f"The settings, words and photos of {job.name} are in the form. Change them, and start."
        )
        base = settings["pretrained_model_name_or_path"]
        if base != ctx.base_name:
            told += (
                f" It was trained on {public_name(base)}, "
                f"and the base at the top of the page is {ctx.base}."
            )
        # The values of `outputs`, in their order.
        said = said_of(name, recipe)
        values = as_shown(values_of(form))
        in_fields = [values[field] for field in names]
        reviews = train_masks.reviews(ctx, form.seed, count, form.like, is_reset=True)
        boxes = train_masks.boxes_for(count)[1:]
        return *in_fields, *reviews, said, html.notice(told), *boxes
