"""The widgets of the Generate tab, without behaviour: prompt, settings and results."""

from typing import Any

import gradio as gr

from dreambooth_moslora.generation.schedulers import SCHEDULERS
from dreambooth_moslora.ui.adapters.summary import prompt_for, summary_of
from dreambooth_moslora.ui.app_state import AppContext
from dreambooth_moslora.ui.generate.form import MAX_IMAGES, NONE, RANGES, size_choices
from dreambooth_moslora.ui.html_snippets import faint, progress_card

__all__ = ["AXIS_VALUES", "ask_widgets", "extra_widgets", "result_widgets", "settings_widgets"]

IDLE = progress_card("Ready", "Enter starts, Esc stops")
AXIS_VALUES = {
    "scale": "0, 0.5, 1",
    "seed": "1, 2, 3",
    "prompt": "",
    "adapter": "",
    "guidance": "2, 5, 8",
    "steps": "5, 15, 25",
}
AXIS_LABELS = [("Adapter scale", "scale"), ("Seed", "seed"), ("Prompt", "prompt"), ("Adapter or checkpoint", "adapter")]
AXIS_LABELS += [("Guidance", "guidance"), ("Steps", "steps")]


def ask_widgets(ctx: AppContext) -> tuple[dict[str, Any], dict[str, Any]]:
    """The most used widgets: prompt, adapter, scale, number of pictures, buttons."""
    names = [NONE, *ctx.catalog.files()]
    first = names[1] if len(names) > 1 else NONE
    summary = summary_of(ctx.catalog.files()[first]) if first != NONE else None
    prompt = gr.Textbox(
        label="Prompt",
        value=prompt_for(summary) if summary else "",
        placeholder="a photo of … in the snow",
        lines=1,
        max_lines=5,
        autofocus=True,
        elem_id="prompt",
    )
    with gr.Row(elem_classes="tight"):
        adapter = gr.Dropdown(names, value=first, label="Adapter", allow_custom_value=True, elem_id="adapter", scale=4)
        refresh = gr.Button("↻", elem_id="refresh", scale=0, min_width=44, elem_classes="icon")
        upload = gr.UploadButton(
            "Upload", file_types=[".safetensors"], scale=0, min_width=88, elem_id="upload_adapter", size="md"
        )
    words = summary.sentence() if summary else ""
    about = gr.HTML(faint(words), visible=bool(words), elem_id="about_adapter", label="About the adapter")
    preset = summary.scale if summary else 1.0
    scale = gr.Slider(*RANGES["scale"], preset, step=0.05, label="Adapter scale", buttons=[], elem_id="scale")
    num_images = gr.Slider(1, MAX_IMAGES, 1, step=1, label="Pictures", buttons=[], elem_id="num_images")
    with gr.Row(elem_classes="tight"):
        run = gr.Button("Generate", variant="primary", elem_id="run", scale=3)
        stop = gr.Button("Stop", variant="stop", elem_id="stop", scale=1, min_width=80)
    widgets = {"prompt": prompt, "adapter": adapter, "scale": scale, "num_images": num_images}
    return widgets, {"run": run, "stop": stop, "refresh": refresh, "upload": upload, "about": about}


def settings_widgets(ctx: AppContext) -> dict[str, Any]:
    sizes = size_choices(ctx.resolution_px)
    with gr.Accordion("Settings", open=True, elem_id="settings_box"):
        negative = gr.Textbox("", label="Negative prompt", lines=1, max_lines=3, elem_id="negative")
        with gr.Row():
            steps = gr.Slider(*RANGES["steps"], 25, step=1, label="Steps", buttons=[], min_width=160, elem_id="steps")
            guidance = gr.Slider(
                *RANGES["guidance_scale"],
                ctx.guidance_scale,
                step=0.1,
                label="Guidance",
                buttons=[],
                min_width=160,
                elem_id="guidance",
            )
        with gr.Row():
            seed = gr.Number(-1, label="Seed", info="−1 draws one", precision=0, min_width=160, elem_id="seed")
            schedulers = [(scheduler.title, name) for name, scheduler in SCHEDULERS.items()]
            scheduler = gr.Dropdown(schedulers, value="euler", label="Scheduler", info="how it steps", min_width=160)
        size = gr.Dropdown(sizes, value=sizes[0][1], label="Size", info="width × height", allow_custom_value=True)
    widgets = {"negative_prompt": negative, "steps": steps, "guidance_scale": guidance, "seed": seed, "size": size}
    with gr.Accordion("More adapters", open=False):
        for number in (2, 3):
            with gr.Row():
                widgets[f"adapter_{number}"] = gr.Dropdown(
                    [NONE, *ctx.catalog.files()],
                    value=NONE,
                    label=f"Adapter {number}",
                    allow_custom_value=True,
                    min_width=130,
                )
                widgets[f"scale_{number}"] = gr.Slider(
                    *RANGES["scale"], 1.0, step=0.05, label=f"Scale {number}", buttons=[], min_width=130
                )
        gr.Markdown("Or write `<lora:name:0.8>` in the prompt.", elem_classes="faint")
    return widgets | {"scheduler": scheduler}


def extra_widgets(templates: list[str]) -> dict[str, Any]:
    with gr.Accordion("Prompt templates", open=False, elem_id="templates_box"):
        template = gr.Dropdown(templates, value=None, label="Template", elem_id="template")
    with gr.Accordion("Settings from a picture", open=False, elem_id="drop_box"):
        dropped = gr.File(file_types=[".png"], label="Drop a PNG", height=110, elem_id="drop_png")
    return {"template": template, "dropped": dropped}


def result_widgets(ctx: AppContext) -> dict[str, Any]:
    parts: dict[str, Any] = {"status": gr.HTML(IDLE, elem_id="status", label="Status")}
    with gr.Tabs(elem_id="result_tabs", selected="pictures") as tabs:
        with gr.Tab("Pictures", id="pictures"):
            parts["gallery"] = _gallery("Pictures", "gallery")
            with gr.Row(elem_classes="tight"):
                parts["reuse"] = gr.Button("Use these settings", size="sm", min_width=100, elem_id="reuse")
                parts["last_seed"] = gr.Button("Keep the seed", size="sm", min_width=100, elem_id="last_seed")
            parts["used_seed"] = gr.Number(label="Seed used", interactive=False, elem_id="used_seed", visible="hidden")
            with gr.Accordion("Use it in code", open=False):
                parts["code"] = gr.Code(language="python", label="Python", buttons=["copy"], elem_id="code")
        with gr.Tab("Compare", id="compare"):
            parts["compare"] = gr.Button("Compare at the same seed", elem_id="compare")
            gr.HTML(faint("Left without, right with the adapter."))
            parts["slider"] = gr.ImageSlider(
                label="Without | with the adapter",
                show_label=False,
                type="filepath",
                format="png",
                interactive=False,
                elem_id="slider",
                buttons=["download", "fullscreen"],
            )
        with gr.Tab("Grid", id="grid"):
            parts |= _grid_widgets()
        with gr.Tab("History", id="history") as history_tab:
            parts["history"] = _gallery("History", "history")
            parts["reuse_history"] = gr.Button("Use these settings", size="sm", elem_id="reuse_history")
    parts |= {"tabs": tabs, "history_tab": history_tab}
    for name in ("shown", "selected", "selected_history"):
        parts[name] = gr.State([] if name == "shown" else 0)
    return parts


def _gallery(label: str, elem_id: str) -> gr.Gallery:
    return gr.Gallery(
        label=label,
        show_label=False,
        columns=2,
        object_fit="contain",
        interactive=False,
        format="png",
        buttons=["download", "fullscreen"],
        elem_id=elem_id,
        height="auto",
    )


def _grid_widgets() -> dict[str, Any]:
    with gr.Row():
        down = gr.Dropdown(AXIS_LABELS, value="scale", label="Rows", min_width=120, elem_id="grid_rows")
        down_values = gr.Textbox(AXIS_VALUES["scale"], label="Row values", min_width=120, elem_id="grid_row_values")
    with gr.Row():
        across = gr.Dropdown(
            [("Nothing", NONE), *AXIS_LABELS], value="seed", label="Columns", min_width=120, elem_id="grid_columns"
        )
        across_values = gr.Textbox(AXIS_VALUES["seed"], label="Column values", min_width=120)
    gr.Markdown("Commas separate values; `|` separates prompts.", elem_classes="faint")
    draw = gr.Button("Draw the grid", elem_id="draw_grid")
    sheet = gr.Image(
        label="Grid",
        show_label=False,
        type="filepath",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id="sheet",
    )
    return {
        "down": down,
        "down_values": down_values,
        "across": across,
        "across_values": across_values,
        "draw": draw,
        "sheet": sheet,
    }
