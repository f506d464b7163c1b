"""The Inspect tab: drop a PNG to see its recipe, or an adapter to see its description."""

from pathlib import Path
from typing import Any

import gradio as gr

from dreambooth_moslora.core import UserError
from dreambooth_moslora.generation.params import SCHEDULERS, Recipe
from dreambooth_moslora.ui.adapters import check_upload
from dreambooth_moslora.ui.generate import GenerateTab, to_widgets
from dreambooth_moslora.ui.generate_form import recipe_of
from dreambooth_moslora.ui.html import facts_table, notice
from dreambooth_moslora.ui.state import TELLING, AppContext, as_gradio_error, import_libraries, sentence

SPELLINGS = {"size mib": "Size (MiB)", "dora": "DoRA", "rslora": "rsLoRA", "resolution px": "Resolution (px)"}
HINT = notice("Drop a PNG made here or elsewhere, or a .safetensors adapter.")


def build_inspect_tab(ctx: AppContext, tabs: gr.Tabs, generate: GenerateTab) -> None:
    with gr.Row(elem_id="inspect", equal_height=False):
        with gr.Column(min_width=280, scale=2):
            file = gr.File(
                file_types=[".png", ".safetensors"], label="PNG or adapter", height=160, elem_id="inspect_file"
            )
            use = gr.Button("Use these settings", visible=False, variant="primary", elem_id="inspect_use")
        with gr.Column(min_width=280, scale=3):
            facts = gr.HTML(HINT, elem_id="inspect_facts", label="Facts")

    @as_gradio_error
    def inspect(file: str | None) -> tuple:
        if not file:
            return HINT, gr.Button(visible=False)
        is_picture = Path(file).suffix.lower() != ".safetensors"
        return facts_table(recipe_facts(recipe_of(file)) if is_picture else adapter_facts(file)), gr.Button(
            visible=is_picture
        )

    @as_gradio_error
    def use_recipe(file: str | None, request: gr.Request) -> list:
        if not file:
            raise UserError("drop a PNG first")
        return [gr.Tabs(selected="generate"), *to_widgets(ctx, recipe_of(file), request)]

    gr.on([file.upload, file.clear], inspect, file, [facts, use], api_name="inspect", concurrency_limit=2)
    filled = [tabs, *generate.fields.values()]
    use.click(use_recipe, file, filled, show_progress_on=[*generate.fields.values()], **TELLING)


def recipe_facts(recipe: Recipe) -> list[tuple[str, str]]:
    params, origin = recipe.params, recipe.provenance
    hashes = dict(origin.adapter_sha256)
    size = f"{params.width_px} × {params.height_px} px" if params.width_px else ""
    adapters = [
        ("Adapter", f"{name}, scale {scale:g}" + (f"\nsha256 {hashes[name]}" if name in hashes else ""))
        for name, scale in params.adapters
    ]
    return [
        ("Prompt", params.prompt),
        ("Negative prompt", params.negative_prompt),
        *adapters,
        ("Seed", str(params.seed)),
        ("Steps", str(params.steps)),
        ("Guidance", "" if params.guidance_scale is None else f"{params.guidance_scale:g}"),
        ("Size", size),
        ("Scheduler", SCHEDULERS[params.scheduler].title),
        ("Base", origin.base),
        ("Made with", ", ".join(f"{name} {version}" for name, version in origin.versions)),
        ("Remarks", "\n".join(map(sentence, recipe.remarks))),
        ("Recipe", "exact" if recipe.exact else "read from another program's text"),
    ]


def adapter_facts(file: str) -> list[tuple[str, str]]:
    """The lines of `info` for any LoRA file."""
    check_upload(Path(file))
    import_libraries()
    from dreambooth_moslora.adapters.describe import describe

    return [(label_of(name), words_of(value)) for name, value in describe(file).items()]


def label_of(name: str) -> str:
    words = name.removeprefix("use_").replace("_", " ")
    return SPELLINGS.get(words) or words[:1].upper() + words[1:]


def words_of(value: Any) -> str:
    """A value as one or a few lines: lists separated by commas, tables by lines."""
    if isinstance(value, dict):
        return "\n".join(f"{key}: {words_of(inner)}" for key, inner in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(words_of, value))
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
