"""The Generate tab: a form, one result area (pictures, comparison, grid, history), and their events."""

import html
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import gradio as gr

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.generation.params import GenerationParams, Recipe
from dreambooth_moslora.ui.adapters.summary import renewed_prompt, summary_of
from dreambooth_moslora.ui.app_state import AT_ONCE, GPU, TELLING, AppContext, as_gradio_error, sentence
from dreambooth_moslora.ui.generate.actions import compare, draw_grid, make_pictures
from dreambooth_moslora.ui.generate.form import NONE, GenerateForm, code_snippet
from dreambooth_moslora.ui.generate.recipe_to_form import clamp_to_widgets, match_adapters, recipe_of
from dreambooth_moslora.ui.generate.widgets import (
    AXIS_VALUES,
    ask_widgets,
    extra_widgets,
    result_widgets,
    settings_widgets,
)
from dreambooth_moslora.ui.html_snippets import faint
from dreambooth_moslora.ui.input_errors import explain_bad_values
from dreambooth_moslora.ui.server.users import Picture, Visitor

__all__ = ["GenerateTab", "build_generate_tab"]


@dataclass
class GenerateTab:
    """The widgets that other tabs use. `fields` are in the order of GenerateForm."""

    fields: dict[str, gr.components.Component]
    adapters: list[gr.Dropdown]
    prompt: gr.Textbox
    results: gr.Tabs


def build_generate_tab(ctx: AppContext, page: gr.Blocks, templates: list[str]) -> GenerateTab:
    with gr.Row(elem_id="generate", equal_height=False):
        with gr.Column(elem_id="ask", min_width=280):
            widgets, buttons = ask_widgets(ctx)
        with gr.Column(elem_id="results", min_width=280):
            results = result_widgets(ctx)
        with gr.Column(elem_id="settings", min_width=280):
            widgets |= settings_widgets(ctx)
            extras = extra_widgets(templates)
    ordered = {field.name: widgets[field.name] for field in fields(GenerateForm)}
    for widget in ordered.values():
        explain_bad_values(widget)
    tab = GenerateTab(ordered, [widgets[f"adapter{n}"] for n in ("", "_2", "_3")], widgets["prompt"], results["tabs"])
    _connect_runs(ctx, tab, buttons, results)
    _connect_adapters(ctx, page, tab, buttons)
    _connect_reuse(ctx, tab, results, extras)
    return tab


def _items(pictures: tuple[Picture, ...] | list[Picture]) -> list[tuple[str, str]]:
    return [(str(picture.path), picture.caption) for picture in pictures]


def _connect_runs(ctx: AppContext, tab: GenerateTab, buttons: dict, results: dict) -> None:
    options = dict(GPU, show_progress="minimal", show_progress_on=results["status"])
    shown_state = results["shown"]

    @as_gradio_error
    def generate(request: gr.Request, **values) -> Iterator[tuple]:
        for frame in make_pictures(ctx, GenerateForm.of(values), request):
            seed = frame.params.seed if frame.params else gr.skip()
            if frame.pictures is None:
                yield gr.skip(), seed, frame.status, gr.skip()
            else:
                yield _items(frame.pictures), seed, frame.status, list(frame.pictures)

    def announce(request: gr.Request) -> gr.Tabs:
        ctx.announce(request)
        return gr.Tabs(selected="pictures")

    def stop(request: gr.Request) -> None:
        ctx.stop(request)

    def snippet(pictures: list[Picture], request: gr.Request) -> str:
        visitor = ctx.visitors.of(request)
        return _snippet(ctx, _own(pictures, visitor), visitor)

    starts = [buttons["run"].click, tab.prompt.submit]
    outputs = [results["gallery"], results["used_seed"], results["status"], shown_state]
    # The page runs a trigger's events in order: the immediate ones must come before the long one.
    gr.on(starts, announce, None, results["tabs"], **AT_ONCE)
    gr.on([results["compare"].click, results["draw"].click], ctx.announce, None, None, **AT_ONCE)
    made = gr.on(starts, generate, inputs_kwargs=tab.fields, outputs=outputs, api_name="generate", **options)
    made.then(lambda: 0, None, results["selected"], **AT_ONCE)
    made.then(snippet, shown_state, results["code"], **AT_ONCE)
    buttons["stop"].click(stop, None, None, queue=False, api_name="stop")
    _connect_compare(ctx, tab, results, options)
    _connect_grid(ctx, tab, results, options)


def _connect_compare(ctx: AppContext, tab: GenerateTab, results: dict, options: dict) -> None:
    @as_gradio_error
    def compare_both(request: gr.Request, **values) -> Iterator[tuple]:
        for frame in compare(ctx, GenerateForm.of(values), request):
            pair = frame.pictures and len(frame.pictures) == 2
            yield tuple(str(p.path) for p in frame.pictures) if pair else gr.skip(), frame.status

    outputs = [results["slider"], results["status"]]
    results["compare"].click(compare_both, inputs_kwargs=tab.fields, outputs=outputs, api_name="compare", **options)


def _connect_grid(ctx: AppContext, tab: GenerateTab, results: dict, options: dict) -> None:
    @as_gradio_error
    def grid(
        rows: str, row_values: str, columns: str, column_values: str, request: gr.Request, **values
    ) -> Iterator[tuple]:
        axes = [f"{rows}={row_values}"] + ([f"{columns}={column_values}"] if columns != NONE else [])
        for frame in draw_grid(ctx, GenerateForm.of(values), tuple(axes), request):
            yield str(frame.sheet) if frame.sheet else gr.skip(), frame.status

    def axis_values(name: str, adapter: str, prompt: str, request: gr.Request) -> str:
        return _axis_values(ctx, name, adapter, prompt, request)

    axis = {"rows": "down", "row_values": "down_values", "columns": "across", "column_values": "across_values"}
    fields_of_grid = {name: results[widget] for name, widget in axis.items()} | tab.fields
    outputs = [results["sheet"], results["status"]]
    results["draw"].click(grid, inputs_kwargs=fields_of_grid, outputs=outputs, api_name="grid", **options)
    for box, values in ((results["down"], results["down_values"]), (results["across"], results["across_values"])):
        inputs = [box, tab.adapters[0], tab.prompt]
        box.input(axis_values, inputs, values, **AT_ONCE)


def _axis_values(ctx: AppContext, name: str, adapter: str, prompt: str, request: gr.Request) -> str:
    """Default values for an axis; for checkpoints, all of the chosen adapter's run."""
    if name == "prompt":
        return f"{prompt}|"
    if name != "adapter":
        return AXIS_VALUES.get(name, "")
    names = list(ctx.catalog.files(ctx.visitors.of(request)))
    run = [n for n in reversed(names) if n.split("@")[0] == str(adapter).split("@")[0]]
    return ", ".join(["none", *(run if len(run) > 1 else names[:3])])


def _snippet(ctx: AppContext, pictures: list[Picture], visitor: Visitor) -> str:
    if not pictures:
        return ""
    params = GenerationParams.from_png(pictures[0].path)
    return code_snippet(params, ctx.base, ctx.catalog.public_paths(visitor))


def _connect_adapters(ctx: AppContext, page: gr.Blocks, tab: GenerateTab, buttons: dict) -> None:
    first, prompt, about = tab.adapters[0], tab.prompt, buttons["about"]

    def adapters(request: gr.Request) -> list:
        names = [NONE, *ctx.catalog.files(ctx.visitors.of(request))]
        return [gr.Dropdown(choices=names)] * len(tab.adapters)

    def describe(name: str, old_prompt: str, request: gr.Request) -> tuple:
        files = ctx.catalog.files(ctx.visitors.of(request))
        summary = summary_of(files[name]) if name in files else None
        words = summary.sentence() if summary else ""
        about = gr.HTML(faint(words), visible=bool(words))
        if summary is None:
            return about, gr.skip()
        return about, renewed_prompt(old_prompt, summary, map(summary_of, files.values()))

    def preset(name: str, request: gr.Request) -> float:
        """The chosen file's recommended scale. A picture's settings do not call this: they have their own scale."""
        files = ctx.catalog.files(ctx.visitors.of(request))
        return summary_of(files[name]).scale if name in files else 1.0

    @as_gradio_error
    def upload(file: str, request: gr.Request) -> tuple:
        visitor = ctx.visitors.of(request)
        name = ctx.catalog.add_upload(file, visitor)
        try:
            ctx.pipeline().load_adapter(visitor.uploads[name], name)
        except Exception:
            shutil.rmtree(visitor.uploads.pop(name).parent, ignore_errors=True)
            raise
        names = [NONE, *ctx.catalog.files(visitor)]
        return gr.Dropdown(choices=names, value=name), gr.Dropdown(choices=names), gr.Dropdown(choices=names)

    def listed(request: gr.Request) -> list[dict]:
        """Name and summary of every adapter that the user may use."""
        files = ctx.catalog.files(ctx.visitors.of(request))
        return [{"name": name, **asdict(summary_of(file))} for name, file in files.items()]

    gr.api(listed, api_name="adapters", queue=False)
    buttons["refresh"].click(adapters, None, tab.adapters, **AT_ONCE)
    page.load(adapters, None, tab.adapters, **AT_ONCE)
    first.change(describe, [first, prompt], [about, prompt], **AT_ONCE)
    first.input(preset, first, tab.fields["scale"], **AT_ONCE)
    uploaded = buttons["upload"].upload(upload, buttons["upload"], tab.adapters, api_visibility="private", **GPU)
    uploaded.then(preset, first, tab.fields["scale"], **AT_ONCE)


def _connect_reuse(ctx: AppContext, tab: GenerateTab, results: dict, extras: dict) -> None:
    outputs = list(tab.fields.values())

    def select(event: gr.SelectData) -> int:
        return event.index if isinstance(event.index, int) else 0

    def history(request: gr.Request) -> list:
        return _items(list(ctx.visitors.of(request).history))

    @as_gradio_error
    def reuse_shown(pictures: list[Picture], index: int, request: gr.Request) -> list:
        own = _own(pictures, ctx.visitors.of(request))
        return to_widgets(ctx, recipe_of(_picked(own, index)), request)

    @as_gradio_error
    def reuse_history(index: int, request: gr.Request) -> list:
        return to_widgets(ctx, recipe_of(_picked(list(ctx.visitors.of(request).history), index)), request)

    @as_gradio_error
    def reuse_dropped(file: str | None, request: gr.Request) -> list:
        return to_widgets(ctx, recipe_of(file), request) if file else [gr.skip()] * len(outputs)

    def from_template(template: str | None, adapter: str, request: gr.Request) -> Any:
        files = ctx.catalog.files(ctx.visitors.of(request))
        subject = summary_of(files[adapter]).subject if adapter in files else ""
        return template.replace("{}", subject or "…") if template else gr.skip()

    results["gallery"].select(select, None, results["selected"], **AT_ONCE)
    results["history"].select(select, None, results["selected_history"], **AT_ONCE)
    results["history_tab"].select(history, None, results["history"], **AT_ONCE)
    results["reuse"].click(reuse_shown, [results["shown"], results["selected"]], outputs, **TELLING)
    results["reuse_history"].click(reuse_history, results["selected_history"], outputs, **TELLING)
    results["last_seed"].click(
        lambda seed: seed if seed is not None else gr.skip(), results["used_seed"], tab.fields["seed"], **AT_ONCE
    )
    extras["dropped"].upload(reuse_dropped, extras["dropped"], outputs, **TELLING)
    extras["template"].input(from_template, [extras["template"], tab.adapters[0]], tab.prompt, **TELLING)


def _own(pictures: list[Picture], visitor: Visitor) -> list[Picture]:
    """Only pictures in the visitor's folder: the page's state belongs to a session, whose name anyone may send."""
    return [picture for picture in pictures if picture.path.is_relative_to(visitor.folder)]


def _picked(pictures: list[Picture], index: int) -> Path:
    if not pictures:
        raise UserError("there is no picture yet")
    return pictures[min(max(int(index), 0), len(pictures) - 1)].path


def to_widgets(ctx: AppContext, recipe: Recipe, request: gr.Request) -> list:
    """The values of all fields, in order, that give the recipe again; differences are shown as remarks."""
    settled, remarks = match_adapters(recipe, ctx.catalog.files(ctx.visitors.of(request)), ctx.base)
    params, changes = clamp_to_widgets(settled, ctx.resolution_px, ctx.guidance_scale)
    for remark in (*remarks, *changes):
        gr.Warning(html.escape(sentence(remark), quote=False))
    form = GenerateForm.from_params(params)
    return [getattr(form, field.name) for field in fields(GenerateForm)]
