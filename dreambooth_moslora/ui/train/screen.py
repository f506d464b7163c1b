"""Train tab: photos, a word, a button, and a view of the run, which the server owns.

Further fields are folded.
"""

from collections.abc import Callable
from typing import Any

import gradio as gr

from dreambooth_moslora.disk.run_folder import NO_ADAPTER, PUBLISHED_NAME, RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings.toy_bases import is_toy
from dreambooth_moslora.ui import html, state
from dreambooth_moslora.ui.adapter_summary import read_summary
from dreambooth_moslora.ui.events import (
    MESSAGE_EVENT,
    UNQUEUED_EVENT,
    format_message,
    on,
    render_mistake,
)
from dreambooth_moslora.ui.generate_tab import GenerateTab
from dreambooth_moslora.ui.train import (
    config_upload,
    photo_events,
    train_form,
    train_photos,
    train_start,
)
from dreambooth_moslora.ui.train.run_view import find_best_folder
from dreambooth_moslora.ui.train.train_form import TrainForm, list_form_fields, replace_flags
from dreambooth_moslora.ui.train.train_watch import SHOW_STATUS_SCRIPT, connect_watch
from dreambooth_moslora.ui.train.watch_widgets import build_watch_widgets

HUB_NOTE = "; {} from the hub once"
"""Note beside a tick box that fetches something."""


def build_train_widgets(base: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Build the fields of the form, and the other widgets, by name."""
    # Every run needs photos, and a word for their subject.
    gr.Markdown("### 1 · Photos", elem_classes="step")
    parts = photo_events.build_photo_widgets()
    gr.Markdown("### 2 · What they show", elem_classes="step")
    fields = {"class_word": build_field_widget("class_word", base)}
    prompts = gr.HTML(visible=False, elem_id="prompts")
    # The buttons.
    with gr.Row(elem_classes="tight"):
        start = gr.Button("Start training", variant="primary", elem_id="start", min_width=150)
        queue = gr.Button("Add to queue", min_width=136, scale=0, elem_id="add_to_queue")
        estimate = gr.Button("Estimate cost", min_width=136, scale=0, elem_id="estimate")
    cost = gr.HTML("", label="Cost", elem_id="cost")
    anyway = gr.Button("Train it anyway", visible=False, elem_id="train_anyway")
    parts |= {
        "prompts": prompts,
        "start": start,
        "queue": queue,
        "estimate": estimate,
        "cost": cost,
        "anyway": anyway,
    }
    # The further fields, line by line as the table has them; rarely used ones are folded again.
    lines = sorted({row.line for row in list_form_fields().values()} - {0})
    with gr.Accordion("More settings", open=False, elem_id="more_training") as more:
        parts["more"] = more
        parts["config"] = config_upload.build_config_button()
        for line in lines:
            if line < train_form.FIRST_EXPERT_LINE:
                build_line_widgets(line, fields, base)
        with gr.Accordion("For experts", open=False, elem_id="expert_training"):
            for line in lines:
                if line >= train_form.FIRST_EXPERT_LINE:
                    build_line_widgets(line, fields, base)
    return {name: fields[name] for name in list_form_fields()}, parts


def build_line_widgets(line: int, fields: dict[str, Any], base: str) -> None:
    """Build the widgets of one line of the table.

    - The widgets of its fields go into `fields`.
    - `base` is the name of the page's base.
    """
    with gr.Row():
        for name, row in list_form_fields().items():
            if row.line == line:
                fields[name] = build_field_widget(name, base)


def build_field_widget(name: str, base: str) -> gr.components.Component:
    """Build the widget of a field, by its values and the kind in the table.

    - `name` is the field's in `TrainForm`.
    - `base` is the name of the page's base, which may decide the first value.
    """
    row = list_form_fields()[name]
    first = row.get_first_value(base)
    # Options of any widget.
    look = {
        "label": row.label,
        "info": row.info or row.setting_facts.get("help"),
        "elem_id": row.elem_id or name,
        "min_width": 110,
        **row.look,
    }
    # The widget for its kind.
    if row.is_tick:
        needs_no_fetch = first if row.at_first else is_toy(base)
        if row.fetched and not needs_no_fetch:
            look["info"] += HUB_NOTE.format(row.fetched)
        return gr.Checkbox(first, **look)
    if row.is_number:
        return gr.Number(first, precision=0 if isinstance(row.default, int) else None, **look)
    if row.choices:
        choices = [(label, value) for value, label in row.choices.items()]
        return gr.Radio(choices, value=first, **look)
    if row.values:
        is_shown = not (row.hides_for_toys and is_toy(base))
        return gr.Dropdown(list(row.values), value=first, visible=is_shown, **look)
    return gr.Textbox(first, **look)


def build_train_tab(
    ctx: state.AppContext, page: gr.Blocks, tabs: gr.Tabs, generate: GenerateTab
) -> dict[str, Any]:
    """Build the tab's widgets, then connect their events.

    - `page` and `tabs` are the whole page, and its tabs.
    - `generate` is the tab in which a run's adapter is used.

    Returns the fields whose first value depends on the base, by name.
    """
    # The widgets: the form on the left, the run on the right.
    with gr.Row(elem_id="train", equal_height=False):
        with gr.Column(elem_id="train_form", min_width=280):
            fields, parts = build_train_widgets(ctx.base_name)
        with gr.Column(elem_id="train_watch", min_width=280):
            parts |= build_watch_widgets()
    # The form's events. Fields that a kind of subject does not use are hidden.
    by_kind = {name: row.unused_for for name, row in list_form_fields().items() if row.unused_for}
    fields["subject"].change(
        lambda subject: [gr.update(visible=subject not in idle) for idle in by_kind.values()],
        fields["subject"],
        [fields[name] for name in by_kind],
        **UNQUEUED_EVENT,
    )
    photo_events.connect_photos(ctx, page, fields, parts)
    _connect_start(ctx, fields, parts)
    config_upload.connect_config_button(parts["config"], fields, parts["cost"])
    # The run's events.
    connect_watch(ctx, page, parts)
    _connect_use(ctx, parts, tabs, generate)
    return {
        name: fields[name]
        for name, row in list_form_fields().items()
        if row.at_first or row.is_by_recipe or row.hides_for_toys
    }


def _connect_start(ctx: state.AppContext, fields: dict, parts: dict) -> None:
    """Connect the buttons that take the whole form: start, queue, and estimate."""
    # The settings chosen for a run appear on the card, and the run comes into view.
    choices_card = gr.State("")
    choices_card.change(lambda card: card, choices_card, parts["cost"], **UNQUEUED_EVENT).then(
        None, js=SHOW_STATUS_SCRIPT, **UNQUEUED_EVENT
    )

    def ask_and_train(form: TrainForm) -> dict:
        # Photos that the practice model cannot draw need a second click.
        has_photos = bool(ctx.workspace.required_photos_dir)
        form.check_words()
        if has_photos and train_start.is_beyond_toy(ctx):
            question = html.render_notice(format_message(train_start.TOY_PHOTOS_REMARK) + ".")
            return {parts["cost"]: question, parts["anyway"]: gr.Button(visible=True)}
        return train(form)

    def train(form: TrainForm) -> dict:
        job, choices_html = train_start.start_run(ctx, form)
        notice = html.render_notice(f"The run {job.name} is starting.")
        return {
            parts["run"]: job.name,
            parts["status"]: notice,
            choices_card: choices_html,
        }

    def queue(form: TrainForm) -> dict:
        return {parts["cost"]: train_start.add_to_queue(ctx, form)[1]}

    def estimate(form: TrainForm) -> dict:
        return {parts["cost"]: train_start.estimate_cost(ctx, form)}

    outputs = [parts["run"], parts["status"], choices_card, parts["cost"], parts["anyway"]]
    actions = {"start": ask_and_train, "anyway": train, "queue": queue, "estimate": estimate}
    for name, act in actions.items():
        _connect_form(ctx, act, fields, parts, button=parts[name], outputs=outputs)


def _connect_form(
    ctx: state.AppContext,
    act: Callable[[TrainForm], dict],
    fields: dict,
    parts: dict,
    button: gr.Button,
    outputs: list,
) -> None:
    """Connect a button whose errors appear on the card below it.

    - `act` does its work with the form, and returns values of `outputs`.
    - `fields` and `parts` are the tab's widgets.
    """

    # The question of an earlier click goes with its card.
    no_question = {parts["anyway"]: gr.update(visible=False)}

    def submit(captions: list | None, **values) -> dict:
        try:
            # The event that saves the caption typed last may not have come yet.
            train_photos.write_captions(ctx.workspace, captions or [])
            return no_question | act(TrainForm(**values))
        except train_start.BusyError as error:
            # A message that goes by itself: on the card it stayed when that run had ended.
            gr.Warning(format_message(error))
            return no_question | {parts["cost"]: ""}
        except Exception as error:
            return no_question | {parts["cost"]: render_mistake(error, replace_flags)}

    button.click(
        submit,
        inputs_kwargs={"captions": parts["crops"], **fields},
        outputs=outputs,
        api_visibility="private",
        **photo_events.PHOTO_EVENT,
    )


def _connect_use(ctx: state.AppContext, parts: dict, tabs: gr.Tabs, generate: GenerateTab) -> None:
    """Put the adapter of a finished run into the Generate tab (`tabs`, `generate`)."""
    prompt = generate.fields["prompt"]
    outputs = [tabs, generate.fields["adapter"], prompt]

    @on(
        parts["use"].click,
        MESSAGE_EVENT,
        inputs=parts["run"],
        outputs=outputs,
        show_progress_on=prompt,
    )
    def select_adapter(run: str | None) -> tuple:
        job = ctx.jobs.load_job(run or "")
        files = ctx.catalog.list_files()
        adapter = find_best_folder(RunDir(job.run_dir)) / PUBLISHED_NAME
        listed = [name for name, file in files.items() if file == adapter]
        if not listed:
            raise UserError("there is no adapter yet")
        name = listed[0]
        # Select it there, with the prompt of its subject.
        summary = read_summary(files[name])
        dropdown = gr.Dropdown(choices=[NO_ADAPTER, *files], value=name)
        return gr.Tabs(selected="generate"), dropdown, summary.prompt
