"""Layout and events of the Generate tab: generating images, and reusing their settings."""

import html
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType

import gradio as gr
from gradio.utils import is_in_or_equal

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.image_params import Recipe, read_recipe
from dreambooth_moslora.ui import drawing, generate_values, state
from dreambooth_moslora.ui.drawing import Frame
from dreambooth_moslora.ui.events import (
    GPU_EVENT,
    MESSAGE_EVENT,
    UNQUEUED_EVENT,
    format_message,
    on,
)
from dreambooth_moslora.ui.generate_adapters import connect_adapters, connect_upload
from dreambooth_moslora.ui.generate_values import GenerateForm
from dreambooth_moslora.ui.generate_widgets import (
    build_prompt_widgets,
    build_result_widgets,
    build_settings_widgets,
)
from dreambooth_moslora.ui.html import LARGE_PREVIEW
from dreambooth_moslora.ui.workspace import SavedImage

IMAGE_SUFFIXES = [".png"]
"""Suffixes of files that may carry a recipe."""


@dataclass
class GenerateTab:
    """Widgets that other tabs use."""

    fields: dict[str, gr.components.Component]
    """All fields in the order of GenerateForm."""
    base_fields: dict[str, gr.components.Component]
    """Fields that have other values for another base."""


def build_generate_tab(ctx: state.AppContext, page: gr.Blocks) -> GenerateTab:
    """Build the tab's widgets, then connect their events."""
    # The widgets, in three columns of the page.
    with gr.Row(elem_id="generate", equal_height=False):
        with gr.Column(elem_id="ask", min_width=280):
            widgets, buttons = build_prompt_widgets(ctx)
        with gr.Column(elem_id="results", min_width=280):
            results = build_result_widgets(ctx)
        with gr.Column(elem_id="settings", min_width=280):
            widgets |= build_settings_widgets(ctx)
    # Those that the API and the other tabs use.
    ordered = {field.name: widgets[field.name] for field in fields(GenerateForm)}
    base_field_names = ("adapter", "size", "guidance_scale", "negative_prompt", "scheduler")
    tab = GenerateTab(
        fields=ordered, base_fields={name: widgets[name] for name in base_field_names}
    )
    # The events. A public page only generates.
    _connect_generate(ctx, tab, buttons["run"], results)
    _connect_compare(ctx, tab, results)
    _connect_stop(ctx, buttons["stop"])
    _connect_reuse(ctx, tab, results, "gallery")
    connect_adapters(ctx, page, ordered, buttons)
    if not ctx.public:
        connect_upload(ctx, ordered, buttons["upload"])
        _connect_reuse(ctx, tab, results, "history")
        _connect_history(ctx, results)
    return tab


def _format_gallery_item(saved_image: SavedImage) -> tuple[str, str]:
    """Return (file, caption), as a gallery takes it."""
    return str(saved_image.path), saved_image.caption


def _connect_generate(
    ctx: state.AppContext, tab: GenerateTab, button: gr.Button, results: dict
) -> None:
    """Generate images on a click on Generate, and on Enter in the prompt."""
    starts = [button.click, tab.fields["prompt"].submit]

    # The results come into view.
    gr.on(
        starts,
        lambda: gr.Tabs(selected="pictures"),
        inputs=None,
        outputs=results["tabs"],
        js="() => bringIntoView('results', 'gallery')",
        **UNQUEUED_EVENT,
    )

    def list_outputs(frame: Frame) -> tuple:
        seed = frame.params.seed if frame.params else gr.skip()
        if frame.saved_images is None:
            return gr.skip(), seed, frame.status, gr.skip(), seed
        # The gallery selects its first image when it is emptied, and keeps that as it fills.
        selected = gr.skip() if frame.saved_images else 0
        images = list(map(_format_gallery_item, frame.saved_images))
        return images, seed, frame.status, selected, seed

    def generate(request: gr.Request, **values) -> Iterator[tuple]:
        yield from map(list_outputs, drawing.generate_images(ctx, GenerateForm(**values), request))

    names = ("gallery", "used_seed", "status", "selected_gallery", "drawn_seed")
    outputs = [results[name] for name in names]
    _connect_generation(ctx, tab, starts, generate, outputs, results["status"])

    # The server sends the preview inside the card, from which the browser takes it.
    status = results["status"]
    status.change(None, status, results["preview"], js=LARGE_PREVIEW, **UNQUEUED_EVENT)


def _connect_compare(ctx: state.AppContext, tab: GenerateTab, results: dict) -> None:
    """Generate the same seed without and with the adapter: that of the last images, unless the form
    has one."""

    def compare(request: gr.Request, drawn_seed: int, **values) -> Iterator[tuple]:
        form = GenerateForm(**values)
        if form.seed is None or form.seed < 0:
            form = replace(form, seed=drawn_seed)
        for frame in drawing.compare(ctx, form, request):
            slider_images = gr.skip()
            if frame.saved_images and len(frame.saved_images) == 2:
                slider_images = tuple(str(image.path) for image in frame.saved_images)
            yield slider_images, frame.status

    outputs = [results["slider"], results["status"]]
    starts = [results["compare"].click]
    # A state is no argument of the API.
    seed = {"drawn_seed": results["drawn_seed"]}
    _connect_generation(ctx, tab, starts, compare, outputs, results["status"], seed)


def _connect_generation(
    ctx: state.AppContext,
    tab: GenerateTab,
    starts: list[Callable],
    handler: Callable,
    outputs: list,
    status: gr.HTML,
    more_inputs: Mapping[str, gr.State] = MappingProxyType({}),
) -> None:
    """Connect a generating handler, whose name is its API name, to the events that start it."""
    # Gradio runs a trigger's events in order: from here on a Stop counts, even before its turn.
    gr.on(starts, ctx.register_work, inputs=None, outputs=None, **UNQUEUED_EVENT)
    connect = on(
        starts,
        GPU_EVENT,
        api_name=handler.__name__,
        inputs_kwargs=tab.fields | dict(more_inputs),
        outputs=outputs,
        show_progress="minimal",
        show_progress_on=status,
    )
    connect(handler)


def _connect_stop(ctx: state.AppContext, button: gr.Button) -> None:
    """Stop what this page generates, or what waits in its queue."""

    # Without trigger_mode "multiple" the page drops a click while the last one is unanswered.
    @on(
        button.click,
        inputs=None,
        outputs=None,
        queue=False,
        trigger_mode="multiple",
        api_name="stop",
    )
    def stop(request: gr.Request) -> None:
        ctx.stop(request)


def _connect_reuse(ctx: state.AppContext, tab: GenerateTab, results: dict, name: str) -> None:
    """Put the settings of the image selected in a gallery into the form."""
    gallery, selected = results[name], results[f"selected_{name}"]

    @on(gallery.select, UNQUEUED_EVENT, inputs=None, outputs=selected)
    def select(event: gr.SelectData) -> int:
        return event.index if isinstance(event.index, int) else 0

    outputs = list(tab.fields.values())

    @on(results[f"reuse_{name}"].click, MESSAGE_EVENT, inputs=[gallery, selected], outputs=outputs)
    def restore_recipe(gallery_items: list[tuple[str, str]] | None, index: int) -> list:
        if not gallery_items:
            raise UserError("there is no picture yet: press Generate, then take its settings")
        file, _ = gallery_items[min(index, len(gallery_items) - 1)]
        # A request may name any file of this machine.
        folders = (gallery.GRADIO_CACHE, ctx.workspace.root)
        if not any(is_in_or_equal(file, folder) for folder in folders):
            raise UserError("that picture is not one of this page")
        return to_widgets(ctx, read_recipe(file))


def _connect_history(ctx: state.AppContext, results: dict) -> None:
    """List earlier images; later ones come when the tab is opened again."""

    @on(results["history_tab"].select, UNQUEUED_EVENT, inputs=None, outputs=results["history"])
    def list_history() -> list[tuple[str, str]]:
        return list(map(_format_gallery_item, list(ctx.workspace.history)))


def to_widgets(ctx: state.AppContext, recipe: Recipe) -> list:
    """Return the values of all fields, in order, that reproduce the recipe.

    Differences are shown as remarks.
    """
    params = recipe.params
    if params.guidance_scale is None:
        params = replace(params, guidance_scale=ctx.guidance_scale)
    for remark in generate_values.list_remarks(recipe, ctx.catalog.list_files(), ctx.public_name):
        gr.Warning(html.escape(format_message(remark), quote=False))
    form = GenerateForm.from_params(params)
    return [getattr(form, field.name) for field in fields(GenerateForm)]
