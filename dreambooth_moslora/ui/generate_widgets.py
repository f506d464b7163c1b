"""Widgets of the Generate tab: prompt and adapter, further settings, and results."""

from typing import Any

import gradio as gr

from dreambooth_moslora.disk.run_folder import NO_ADAPTER
from dreambooth_moslora.generation.image_params import SCHEDULERS
from dreambooth_moslora.ui import generate_values, state
from dreambooth_moslora.ui.adapter_summary import AdapterSummary, read_summary
from dreambooth_moslora.ui.generate_adapters import find_fitting_adapter
from dreambooth_moslora.ui.html import IMAGE_OPTIONS, render_faint, render_progress

IDLE_CARD = render_progress("Ready", "Enter starts, Esc stops")
"""Status of a page that has generated nothing yet."""


def build_prompt_widgets(ctx: state.AppContext) -> tuple[dict[str, Any], dict[str, Any]]:
    """Build the prompt's fields and the widgets beside them, both by name."""
    # An adapter for the base is selected at first, and its subject is in the prompt.
    files = ctx.catalog.list_files()
    first = find_fitting_adapter(ctx)
    summary = read_summary(files[first]) if first in files else AdapterSummary()
    sentence = summary.format_sentence()
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
    # The adapter, with buttons to refresh the list and to upload. A public page takes no files.
    with gr.Row(elem_classes="tight"):
        fields["adapter"] = gr.Dropdown(
            [NO_ADAPTER, *files],
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
        render_faint(sentence),
        visible=bool(sentence),
        elem_id="about_adapter",
        label="About the adapter",
    )
    fields["scale"] = build_slider("scale", 1.0, "Adapter scale", elem_id="scale")
    fields["num_images"] = build_slider("num_images", 1, "Pictures", elem_id="num_images")
    # Start and stop.
    with gr.Row(elem_classes="tight"):
        parts["run"] = gr.Button("Generate", variant="primary", elem_id="run", scale=3)
        parts["stop"] = gr.Button("Stop", variant="stop", elem_id="stop", scale=1, min_width=80)
    return fields, parts


def build_slider(name: str, value: float, label: str, **look: Any) -> gr.Slider:
    """Build a slider over the range of that name in `FIELD_RANGES`."""
    low, high = generate_values.FIELD_RANGES[name]
    step = {"scale": 0.05, "guidance_scale": 0.1}.get(name, 1)
    return gr.Slider(low, high, value, step=step, label=label, buttons=[], **look)


def build_settings_widgets(ctx: state.AppContext) -> dict[str, Any]:
    """Build the fields that rarely change, by name; some bases do not use all of them."""
    fields: dict[str, Any] = {}
    with gr.Accordion("Settings", open=True, elem_id="settings_box"):
        # What the image shows, and how it is sampled.
        fields["negative_prompt"] = gr.Textbox(
            "",
            label="Negative prompt",
            lines=1,
            max_lines=3,
            visible=ctx.facts.has_negative,
            elem_id="negative",
        )
        with gr.Row():
            fields["steps"] = build_slider("steps", 25, "Steps", min_width=160, elem_id="steps")
            guidance = ctx.guidance_scale
            look = {"min_width": 160, "elem_id": "guidance"}
            fields["guidance_scale"] = build_slider("guidance_scale", guidance, "Guidance", **look)
        with gr.Row():
            look = {"precision": 0, "min_width": 160, "elem_id": "seed"}
            fields["seed"] = gr.Number(-1, label="Seed", info="−1 draws one", **look)
            schedulers = [("The base's own", "")]
            schedulers += [(scheduler.title, name) for name, scheduler in SCHEDULERS.items()]
            fields["scheduler"] = gr.Dropdown(
                schedulers,
                value="",
                label="Scheduler",
                info="how noise is taken out",
                visible=ctx.facts.style == "ddpm",
                min_width=160,
            )
        # Sizes around the base's own.
        sizes = generate_values.list_size_choices(ctx.resolution_px, ctx.facts.multiple_px)
        look = {"info": "width × height", "allow_custom_value": True, "elem_id": "size"}
        fields["size"] = gr.Dropdown(sizes, value=sizes[0][1], label="Size", **look)
        gr.Markdown("Another adapter: `<lora:name:0.8>` in the prompt.", elem_classes="faint")
    return fields


def build_result_widgets(ctx: state.AppContext) -> dict[str, Any]:
    """Build the widgets of the results, by name; a public page has no history."""
    parts: dict[str, Any] = {"status": gr.HTML(IDLE_CARD, elem_id="status", label="Status")}
    # Not between the tabs, where gradio counts it as one of them.
    parts["drawn_seed"] = gr.State(-1)
    with gr.Tabs(elem_id="result_tabs", selected="pictures") as parts["tabs"]:
        # The image in progress, and the finished ones.
        with gr.Tab("Pictures", id="pictures"):
            parts["preview"] = gr.HTML("", elem_id="preview")
            parts |= _build_gallery("Pictures", "gallery")
            parts["used_seed"] = gr.Number(
                label="Seed used", interactive=False, elem_id="used_seed", visible="hidden"
            )
        # One image with and without the adapter, from the same noise.
        with gr.Tab("Compare", id="compare"):
            parts["compare"] = gr.Button("Compare at the same seed", elem_id="compare")
            gr.HTML(render_faint("Left without, right with the adapter."))
            parts["slider"] = gr.ImageSlider(
                label="Without | with the adapter",
                type="filepath",
                elem_id="slider",
                **IMAGE_OPTIONS,
            )
        if not ctx.public:
            with gr.Tab("History", id="history") as parts["history_tab"]:
                parts |= _build_gallery("History", "history")
    return parts


def _build_gallery(label: str, name: str) -> dict[str, Any]:
    """Build a gallery, the state of its selected image, and the button that reuses its settings."""
    return {
        name: gr.Gallery(
            label=label,
            columns=2,
            object_fit="contain",
            type="filepath",
            elem_id=name,
            height="auto",
            **IMAGE_OPTIONS,
        ),
        f"selected_{name}": gr.State(0),
        f"reuse_{name}": gr.Button(
            "Use these settings", size="sm", min_width=100, elem_id=f"reuse_{name}"
        ),
    }
