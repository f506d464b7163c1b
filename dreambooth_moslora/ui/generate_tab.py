"""The Generate tab: a form, one area of results, and their events.

The results are pictures, a comparison, and the history.
"""

import html
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import gradio as gr

from dreambooth_moslora.disk.run_folder import NONE
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.params import SCHEDULERS, GenerationParams, Recipe, read_recipe
from dreambooth_moslora.settings.toys import is_toy
from dreambooth_moslora.ui import drawing, generate_values, state
from dreambooth_moslora.ui.adapter_summary import AdapterSummary, summary_of
from dreambooth_moslora.ui.events import AT_ONCE, GPU, TELLING, on, sentence
from dreambooth_moslora.ui.generate_values import GenerateForm
from dreambooth_moslora.ui.html import (
    LARGE_PREVIEW,
    SHOWN,
    faint,
    name_in_errors,
    progress_card,
)
from dreambooth_moslora.ui.workspace import Picture

IDLE = progress_card("Ready", "Enter starts, Esc stops")
"""The state of a page that has drawn nothing yet."""
PICTURES = [".png"]
"""Files that may carry a recipe."""


def ask_widgets(ctx: state.AppContext) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is asked of each drawing: the fields by name, and the other widgets by name."""
    # An adapter for the base is chosen at first, and its words are in the prompt.
    files = ctx.catalog.files()
    first = fitting_adapter(ctx)
    summary = summary_of(files[first]) if first in files else AdapterSummary()
    words = summary.sentence()
    fields: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    fields["prompt"] = gr.Textbox(
        summary.prompt,
        label="Prompt",
        placeholder="a photo of … in the snow",
        lines=1,
        max_lines=5,
        autofocus=True,
        elem_id="prompt",
    )
    # The adapter, and how it comes into the list. A public page takes no files.
    with gr.Row(elem_classes="tight"):
        fields["adapter"] = gr.Dropdown(
            [NONE, *files],
            value=first,
            label="Adapter",
            allow_custom_value=True,
            elem_id="adapter",
            scale=4,
        )
        parts["refresh"] = gr.Button(
            "↻", elem_id="refresh", scale=0, min_width=44, elem_classes="icon"
        )
        if not ctx.public:
            parts["upload"] = gr.UploadButton(
                "Upload",
                file_types=[".safetensors"],
                scale=0,
                min_width=88,
                elem_id="upload_adapter",
                size="md",
            )
    parts["about"] = gr.HTML(
        faint(words), visible=bool(words), elem_id="about_adapter", label="About the adapter"
    )
    fields["scale"] = slider("scale", summary.scale, "Adapter scale", elem_id="scale")
    fields["num_images"] = slider("num_images", 1, "Pictures", elem_id="num_images")
    # Start and stop.
    with gr.Row(elem_classes="tight"):
        parts["run"] = gr.Button("Generate", variant="primary", elem_id="run", scale=3)
        parts["stop"] = gr.Button(
            "Stop",
            variant="stop",
            interactive=False,
            elem_id="stop",
            scale=1,
            min_width=80,
        )
    return fields, parts


def fitting_adapter(ctx: state.AppContext) -> str:
    """The first adapter that may be for the page's base: a toy's is for toys alone."""
    for name, file in ctx.catalog.files().items():
        if is_toy(summary_of(file).base) == is_toy(ctx.base_name):
            return name
    return NONE


def slider(name: str, value: float, label: str, **look: Any) -> gr.Slider:
    """A slider over the range of that name in `RANGES`."""
    low, high = generate_values.RANGES[name]
    step = {"scale": 0.05, "guidance_scale": 0.1}.get(name, 1)
    return gr.Slider(low, high, value, step=step, label=label, buttons=[], **look)


def settings_widgets(ctx: state.AppContext) -> dict[str, Any]:
    """The fields that rarely change, by name. Some bases have no use for some of them."""
    fields: dict[str, Any] = {}
    with gr.Accordion("Settings", open=True, elem_id="settings_box"):
        fields["negative_prompt"] = gr.Textbox(
            "",
            label="Negative prompt",
            lines=1,
            max_lines=3,
            visible=ctx.facts.has_negative,
            elem_id="negative",
        )
        with gr.Row():
            fields["steps"] = slider("steps", 25, "Steps", min_width=160, elem_id="steps")
            guidance = ctx.guidance_scale
            look = {"min_width": 160, "elem_id": "guidance"}
            fields["guidance_scale"] = slider("guidance_scale", guidance, "Guidance", **look)
        with gr.Row():
            look = {"precision": 0, "min_width": 160, "elem_id": "seed"}
            fields["seed"] = gr.Number(-1, label="Seed", info="−1 draws one", **look)
            schedulers = [("The base's own", "")]
            schedulers += [(known.title, name) for name, known in SCHEDULERS.items()]
            fields["scheduler"] = gr.Dropdown(
                schedulers,
                value="",
                label="Scheduler",
                info="how noise is taken out",
                visible=ctx.facts.style == "ddpm",
                min_width=160,
            )
        sizes = generate_values.size_choices(ctx.resolution_px, ctx.facts.multiple_px)
        look = {"info": "width × height", "allow_custom_value": True, "elem_id": "size"}
        fields["size"] = gr.Dropdown(sizes, value=sizes[0][1], label="Size", **look)
    # Up to two more, beside the one above the button.
    with gr.Accordion("More adapters", open=False):
        names = [NONE, *ctx.catalog.files()]
        look = {"allow_custom_value": True, "min_width": 130}
        for n in (2, 3):
            with gr.Row():
                label = f"Adapter {n}"
                fields[f"adapter_{n}"] = gr.Dropdown(names, value=NONE, label=label, **look)
                fields[f"scale_{n}"] = slider("scale", 1.0, f"Scale {n}", min_width=130)
        gr.Markdown("Or write `<lora:name:0.8>` in the prompt.", elem_classes="faint")
    return fields


def result_widgets(ctx: state.AppContext) -> dict[str, Any]:
    """The widgets of the results, by name.

    A public page has no history, which is its owner's.
    """
    parts: dict[str, Any] = {"status": gr.HTML(IDLE, elem_id="status", label="Status")}
    with gr.Tabs(elem_id="result_tabs", selected="pictures") as tabs:
        with gr.Tab("Pictures", id="pictures"):
            parts["preview"] = gr.HTML("", elem_id="preview")
            parts["gallery"] = _gallery("Pictures", "gallery")
            with gr.Row(elem_classes="tight"):
                look = {"size": "sm", "min_width": 100, "interactive": False}
                parts["reuse"] = gr.Button("Use these settings", elem_id="reuse", **look)
                parts["last_seed"] = gr.Button("Keep the seed", elem_id="last_seed", **look)
            parts["used_seed"] = gr.Number(
                label="Seed used", interactive=False, elem_id="used_seed", visible="hidden"
            )
            with gr.Accordion("Use it in code", open=False):
                parts["code"] = gr.Code(
                    language="python", label="Python", buttons=["copy"], elem_id="code"
                )
        with gr.Tab("Compare", id="compare"):
            parts["compare"] = gr.Button(
                "Compare at the same seed", variant="primary", elem_id="compare"
            )
            gr.HTML(faint("Left without, right with the adapter."))
            parts["slider"] = gr.ImageSlider(
                label="Without | with the adapter", type="filepath", elem_id="slider", **SHOWN
            )
        if not ctx.public:
            with gr.Tab("History", id="history") as parts["history_tab"]:
                parts["history"] = _gallery("History", "history")
                look["elem_id"] = "reuse_history"
                parts["reuse_history"] = gr.Button("Use these settings", **look)
                parts["shown_history"] = gr.State([])
                parts["selected_history"] = gr.State(0)
    # The pictures of the gallery, and which of them is chosen.
    parts["tabs"] = tabs
    parts["shown"] = gr.State([])
    parts["selected"] = gr.State(0)
    return parts


def _gallery(label: str, elem_id: str) -> gr.Gallery:
    return gr.Gallery(
        label=label, columns=2, object_fit="contain", elem_id=elem_id, height="auto", **SHOWN
    )


@dataclass
class GenerateTab:
    """The widgets that other tabs use."""

    fields: dict[str, gr.components.Component]
    """In the order of GenerateForm."""
    adapters: list[gr.Dropdown]
    prompt: gr.Textbox
    results: gr.Tabs
    of_base: dict[str, gr.components.Component]
    """Those that show other values for another base."""


def build_generate_tab(ctx: state.AppContext, page: gr.Blocks) -> GenerateTab:
    """Make the tab's widgets, then connect their events."""
    # The widgets, in three columns of the page.
    with gr.Row(elem_id="generate", equal_height=False):
        with gr.Column(elem_id="ask", min_width=280):
            widgets, buttons = ask_widgets(ctx)
        with gr.Column(elem_id="results", min_width=280):
            results = result_widgets(ctx)
        with gr.Column(elem_id="settings", min_width=280):
            widgets |= settings_widgets(ctx)
    # What the API and the other tabs see of them.
    ordered = {field.name: widgets[field.name] for field in fields(GenerateForm)}
    for widget in ordered.values():
        name_in_errors(widget)
    named = ("adapter", "size", "guidance_scale", "negative_prompt", "scheduler")
    tab = GenerateTab(
        fields=ordered,
        adapters=[widgets[f"adapter{n}"] for n in ("", "_2", "_3")],
        prompt=widgets["prompt"],
        results=results["tabs"],
        of_base={name: widgets[name] for name in named},
    )
    # The events. A public page only draws.
    _connect_runs(ctx, tab, buttons, results)
    _connect_compare(ctx, tab, results, buttons["stop"])
    _connect_adapters(ctx, page, tab, buttons)
    _connect_reuse(ctx, tab, results)
    if not ctx.public:
        _connect_upload(ctx, tab, buttons["upload"])
        _connect_history(ctx, tab, results)
    return tab


def _items(pictures: Iterable[Picture]) -> list[tuple[str, str]]:
    """(File, caption) of each picture, as a gallery takes them."""
    return [(str(picture.path), picture.caption) for picture in pictures]


def _connect_runs(ctx: state.AppContext, tab: GenerateTab, buttons: dict, results: dict) -> None:
    """Generate draws pictures, and Stop ends whatever the page draws."""
    starts = [buttons["run"].click, tab.prompt.submit]
    outputs = [results[name] for name in ("gallery", "used_seed", "status", "shown", "selected")]

    gr.on(
        starts,
        lambda: gr.Tabs(selected="pictures"),
        inputs=None,
        outputs=results["tabs"],
        js="() => bringIntoView('results', 'gallery')",
        **AT_ONCE,
    )

    def generate(request: gr.Request, **values) -> Iterator[tuple]:
        for frame in drawing.make_pictures(ctx, GenerateForm(**values), request):
            seed = frame.params.seed if frame.params else gr.skip()
            if frame.pictures is None:
                yield gr.skip(), seed, frame.status, gr.skip(), gr.skip()
                continue
            # The gallery chooses its first when it is emptied, and keeps the choice as it fills.
            selected = gr.skip() if frame.pictures else 0
            shown = list(frame.pictures)
            yield _items(frame.pictures), seed, frame.status, shown, selected

    # The preview comes inside the card, and the browser takes it from there.
    status = results["status"]
    status.change(None, status, results["preview"], js=LARGE_PREVIEW, **AT_ONCE)
    drawn = _connect_drawing(
        ctx,
        "generate",
        starts=starts,
        handler=generate,
        results=results,
        stop=buttons["stop"],
        inputs=tab.fields,
        outputs=outputs,
    )

    # One primary button at a time: Compare has its own.
    @on(results["tabs"].select, AT_ONCE, inputs=None, outputs=buttons["run"])
    def primary(event: gr.SelectData) -> gr.Button:
        return gr.Button(variant="secondary" if event.value == "Compare" else "primary")

    # What can be done with pictures, as soon as there are some.
    of_pictures = [results["reuse"], results["last_seed"]]

    @on(results["shown"].change, AT_ONCE, inputs=results["shown"], outputs=of_pictures)
    def usable(pictures: list[Picture]) -> list[gr.Button]:
        return [gr.Button(interactive=bool(pictures))] * 2

    @on(drawn.then, AT_ONCE, inputs=results["shown"], outputs=results["code"])
    def snippet(pictures: list[Picture]) -> str:
        if not pictures:
            return ""
        params = replace(GenerationParams.from_png(pictures[0].path), num_images=len(pictures))
        # A stranger sees no folder of this machine.
        files = {
            name: file.name if ctx.public else str(file)
            for name, file in ctx.catalog.files().items()
        }
        return generate_values.code_snippet(params, ctx.public_name, files)

    # Each Stop must count: but for this mode the page drops a click while the last one is not
    # answered.
    @on(
        buttons["stop"].click,
        inputs=None,
        outputs=None,
        queue=False,
        trigger_mode="multiple",
        api_name="stop",
    )
    def stop(request: gr.Request) -> None:
        ctx.stop(request)


def _connect_drawing(
    ctx: state.AppContext,
    work: str,
    *,
    starts: list[Callable],
    handler: Callable,
    results: dict,
    stop: gr.Button,
    inputs: dict,
    outputs: list,
) -> Any:
    """Connect what draws: Stop is on from the first click, before its turn has come, to its end.

    - `work` is its name for a program, and `starts` are its events.
    - `handler` draws, with `inputs` and `outputs`.

    Returns the event.
    """

    # The page runs a trigger's events in order: the immediate one must come before the long one.
    @on(starts, AT_ONCE, inputs=None, outputs=stop)
    def announce(request: gr.Request) -> gr.Button:
        ctx.announce(request, work)
        return gr.Button(interactive=True)

    draws = on(
        starts,
        GPU,
        api_name=work,
        inputs_kwargs=inputs,
        outputs=outputs,
        show_progress="minimal",
        show_progress_on=results["status"],
    )
    drawn = draws(handler)

    # Stop is on while the page has other work left.
    def ended(request: gr.Request) -> gr.Button:
        return gr.Button(interactive=ctx.ended(request, work))

    # Gradio leaves out `then` where a stream ended in an error.
    for after in (drawn.then, drawn.failure):
        after(ended, None, stop, **AT_ONCE)
    return drawn


def _connect_compare(
    ctx: state.AppContext,
    tab: GenerateTab,
    results: dict,
    stop: gr.Button,
) -> None:
    """The same seed is drawn without and with the adapter."""

    def compare_both(request: gr.Request, **values) -> Iterator[tuple]:
        for frame in drawing.compare(ctx, GenerateForm(**values), request):
            shown = gr.skip()
            if frame.pictures and len(frame.pictures) == 2:
                shown = tuple(str(picture.path) for picture in frame.pictures)
            yield shown, frame.status

    _connect_drawing(
        ctx,
        "compare",
        starts=[results["compare"].click],
        handler=compare_both,
        results=results,
        stop=stop,
        inputs=tab.fields,
        outputs=[results["slider"], results["status"]],
    )


def _connect_adapters(
    ctx: state.AppContext, page: gr.Blocks, tab: GenerateTab, buttons: dict
) -> None:
    """The lists of adapters, and what the chosen one says of itself."""
    first = tab.adapters[0]
    prompt = tab.prompt
    about = buttons["about"]

    @on(gr.api, api_name="adapters", queue=False)
    def listed() -> list[dict]:
        """Name and summary of every adapter."""
        found = ctx.catalog.files()
        return [{"name": name, **asdict(summary_of(file))} for name, file in found.items()]

    # Runs may have written new ones.
    def adapters() -> list:
        return [gr.Dropdown(choices=[NONE, *ctx.catalog.files()])] * len(tab.adapters)

    buttons["refresh"].click(adapters, None, tab.adapters, **AT_ONCE)
    page.load(adapters, None, tab.adapters, **AT_ONCE)

    @on(first.change, AT_ONCE, inputs=[first, prompt], outputs=[about, prompt])
    def describe(name: str, old_prompt: str) -> tuple:
        files = ctx.catalog.files()
        if name not in files:
            return gr.HTML(faint(""), visible=False), gr.skip()
        summary = summary_of(files[name])
        words = summary.sentence()
        # The adapter's own words replace those that another one had filled in, not the user's.
        untouched = {"", *(summary_of(file).prompt for file in files.values())}
        is_untouched = (old_prompt or "").strip() in untouched
        renewed = summary.prompt if is_untouched else ""
        return gr.HTML(faint(words), visible=bool(words)), renewed or old_prompt

    first.input(_preset(ctx), first, tab.fields["scale"], **AT_ONCE)


def _preset(ctx: state.AppContext) -> Callable:
    """A handler that gives the scale that the chosen file recommends.

    A picture's settings have a scale of their own.
    """

    def preset(name: str) -> float:
        files = ctx.catalog.files()
        return summary_of(files[name]).scale if name in files else 1.0

    return preset


def _connect_upload(ctx: state.AppContext, tab: GenerateTab, button: gr.UploadButton) -> None:
    """An uploaded adapter is loaded at once, to say now if it does not fit the base."""

    @on(button.upload, GPU, inputs=button, outputs=tab.adapters, api_visibility="private")
    def upload(file: str) -> tuple:
        name = ctx.catalog.add_upload(file)
        try:
            ctx.pipeline().load_adapter(ctx.workspace.uploads[name], name)
        except Exception:
            # It is not offered, and its file goes.
            shutil.rmtree(ctx.workspace.uploads.pop(name).parent, ignore_errors=True)
            raise
        names = [NONE, *ctx.catalog.files()]
        chosen = gr.Dropdown(choices=names, value=name)
        return chosen, gr.Dropdown(choices=names), gr.Dropdown(choices=names)

    upload.success(_preset(ctx), tab.adapters[0], tab.fields["scale"], **AT_ONCE)


def _connect_reuse(ctx: state.AppContext, tab: GenerateTab, results: dict) -> None:
    """The shown picture's settings and seed go into the form."""
    _connect_gallery(ctx, tab, results, "gallery")
    results["last_seed"].click(
        lambda seed: seed if seed is not None else gr.skip(),
        results["used_seed"],
        tab.fields["seed"],
        **AT_ONCE,
    )


def _connect_gallery(ctx: state.AppContext, tab: GenerateTab, results: dict, name: str) -> None:
    """The settings of the picture that is chosen in a gallery go into the form."""
    end = "_history" if name == "history" else ""
    selected, shown = results[f"selected{end}"], results[f"shown{end}"]
    outputs = list(tab.fields.values())

    @on(results[name].select, AT_ONCE, inputs=None, outputs=selected)
    def select(event: gr.SelectData) -> int:
        return event.index if isinstance(event.index, int) else 0

    @on(results[f"reuse{end}"].click, TELLING, inputs=[shown, selected], outputs=outputs)
    def reuse(pictures: list[Picture], index: int) -> list:
        if not pictures:
            raise UserError("there is no picture yet")
        return to_widgets(ctx, read_recipe(pictures[min(index, len(pictures) - 1)].path))


def _connect_history(ctx: state.AppContext, tab: GenerateTab, results: dict) -> None:
    """Pictures that were drawn before."""
    _connect_gallery(ctx, tab, results, "history")
    of_history = [results[name] for name in ("history", "reuse_history", "shown_history")]

    @on(results["history_tab"].select, AT_ONCE, inputs=None, outputs=of_history)
    def history() -> tuple:
        """Pictures that are drawn later are not shown until the tab is opened again."""
        pictures = list(ctx.workspace.history)
        return _items(pictures), gr.Button(interactive=bool(pictures)), pictures


def to_widgets(ctx: state.AppContext, recipe: Recipe) -> list:
    """The values of all fields, in order, that give the recipe again.

    Differences are shown as remarks.
    """
    params = recipe.params
    if params.guidance_scale is None:
        params = replace(params, guidance_scale=ctx.guidance_scale)
    for remark in generate_values.remarks_on(recipe, ctx.catalog.files(), ctx.public_name):
        gr.Warning(html.escape(sentence(remark), quote=False))
    form = GenerateForm.from_params(params)
    return [getattr(form, field.name) for field in fields(GenerateForm)]
