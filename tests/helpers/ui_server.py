"""The page on the tiny base, served in this process on a free port of the loopback."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.ui.page import build_app, build_launch_options
from dreambooth_moslora.ui.state import AppContext, PageBase
from dreambooth_moslora.ui.workspace import create_workspace
from tests.helpers.tiny_adapters import save_diffusers_lora


@dataclass(frozen=True)
class Served:
    url: str
    ctx: AppContext
    page: gr.Blocks


@contextmanager
def serve(
    tiny_base: Path, folder: Path, *, public: bool = False, further_bases=(), **launch
) -> Iterator[Served]:
    """Two adapters on the shelf, "dog" and "cat"; runs go to `folder`/runs."""
    pipeline = SubjectPipeline.from_base(tiny_base)
    (folder / "adapters").mkdir(parents=True, exist_ok=True)
    (folder / "runs").mkdir(exist_ok=True)
    for seed, name in enumerate(("dog", "cat"), 1):
        file = save_diffusers_lora(pipeline.pipeline.unet, folder / "made" / name, seed=seed)
        file.rename(folder / "adapters" / f"{name}.safetensors")
    base = PageBase("tiny", str(tiny_base), pipeline.resolution_px, lambda: pipeline)
    folders = {"adapters_dir": folder / "adapters", "runs_dir": folder / "runs"}
    ctx = AppContext(base, *further_bases, **folders, workspace=create_workspace(), public=public)
    page = build_app(ctx)
    options = build_launch_options(public=public) | launch
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **options)
    try:
        yield Served(url, ctx, page)
    finally:
        page.close()
        ctx.workspace.close()
