"""Actions of the Generate tab: generate images, and compare. They stream `Frame`s."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import gradio as gr

from dreambooth_moslora.disk import processes
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.image_params import (
    GenerationParams,
    check_size,
    describe_black_images,
)
from dreambooth_moslora.ui import html, state
from dreambooth_moslora.ui.events import convert_to_user_error, render_mistake
from dreambooth_moslora.ui.generate_values import GenerateForm
from dreambooth_moslora.ui.html import format_seconds
from dreambooth_moslora.ui.workspace import SavedImage, Workspace

if TYPE_CHECKING:
    from dreambooth_moslora.generation.image_params import Image, Step

FRAME_SEC = 0.12
"""Minimum seconds between two previews; finished images are always shown."""


@dataclass(frozen=True)
class Frame:
    """State of the result area. `saved_images` is None when they have not changed."""

    status: str
    saved_images: tuple[SavedImage, ...] | None = None
    params: GenerationParams | None = None


def generate_images(
    ctx: state.AppContext, form: GenerateForm, request: gr.Request
) -> Iterator[Frame]:
    """Generate 1 to 8 images with consecutive seeds. Raises UserError."""
    yield from _stream_generation(ctx, form.to_params(), request)


def compare(ctx: state.AppContext, form: GenerateForm, request: gr.Request) -> Iterator[Frame]:
    """Generate the same seed without and with the adapters: two images, in this order.

    Raises UserError without an adapter.
    """
    with_adapters = replace(form.to_params(), num_images=1).apply_tags()
    if not with_adapters.adapters:
        raise UserError("choose an adapter to compare the base with")
    saved_images: tuple[SavedImage, ...] = ()
    halves = (
        (replace(with_adapters, adapters=()), "Without the adapter, "),
        (with_adapters, "With the adapter, "),
    )
    for number, (params, word) in enumerate(halves):
        # A frame has the image of its own half alone: the first half's image stays before it.
        for frame in _stream_generation(ctx, params, request, word=word):
            saved_images = (*saved_images[:number], *(frame.saved_images or ()))
            yield replace(frame, saved_images=saved_images if frame.saved_images else None)
        # The user has stopped it.
        if len(saved_images) <= number:
            return
    line = "Without and with the adapter, at the same seed"
    yield Frame(html.render_progress(line, saved_images[1].caption), saved_images)


def _stream_generation(
    ctx: state.AppContext,
    params: GenerationParams,
    request: gr.Request,
    word: str = "",
) -> Iterator[Frame]:
    """Generate, and stream the state; an error also appears on the card.

    - `params` are those of the images.
    - `request` names the page, which can stop its own work.
    - `word` begins the status line.
    """
    try:
        # Wait for the base.
        check_size(params, ctx.resolution_px)
        if ctx.get_loaded_pipeline() is None:
            line = "Loading the base …"
            yield Frame(html.render_progress(line, "the next pictures need not wait for it"))
        # Prepare the stream of events; the first `next` starts it.
        with ctx.turns.reserve_for_images(), ctx.track_work(request) as should_stop:
            pipeline = ctx.wait_for_pipeline()
            params = ctx.load_adapters(params)
            events = pipeline.generate(params, should_stop)
            # Generate. A single image grows in its place in the gallery.
            yield Frame(html.render_progress("Starting …", fraction=0.0), (), params)
            width_px = params.width_px or ctx.resolution_px
            height_px = params.height_px or ctx.resolution_px
            yield from _stream_frames(
                events=events,
                workspace=ctx.workspace,
                params=params,
                word=word,
                size_px=None if word else (width_px, height_px),
            )
    except Exception as error:
        user_error = convert_to_user_error(error)
        yield Frame(render_mistake(user_error))
        raise user_error from error
    finally:
        # Return to the system the memory that generating has freed.
        processes.release_freed_memory()


def _stream_frames(
    events: Iterator,
    workspace: Workspace,
    params: GenerationParams,
    word: str,
    size_px: tuple[int, int] | None,
) -> Iterator[Frame]:
    """Yield the state after each event.

    - `events` are a pipeline's.
    - `workspace` stores the images.
    - `params` go into the last frame.
    - `word` begins the status line.
    - `size_px` (width, height) makes the previews large.
    """
    from dreambooth_moslora.generation import previews
    from dreambooth_moslora.generation.image_params import Image, Step

    started = shown_at = time.perf_counter()
    step = None
    total = params.num_images
    saved_images = []
    images = []
    for event in events:
        # A step is shown with the preview that follows it.
        if isinstance(event, Step):
            step = event
            total = event.num_images
        elif isinstance(event, Image):
            saved_images.append(_save_image(event, workspace))
            images.append(event)
            yield Frame(_render_status(step, word), tuple(saved_images))
        # Previews come faster than a browser can show them.
        elif isinstance(event, previews.Preview) and time.perf_counter() - shown_at > FRAME_SEC:
            shown_at = time.perf_counter()
            preview = html.encode_thumbnail(event.pixels)
            yield Frame(_render_status(step, word, preview, size_px))
    # The end: count, duration, and a warning if images are black.
    status = _render_summary(saved_images, total, time.perf_counter() - started)
    black_note = describe_black_images(images)
    if black_note:
        status = html.render_notice(f"The pictures are done, but {black_note}.", "bad")
    yield Frame(status, tuple(saved_images), params)


def _save_image(image: "Image", workspace: Workspace) -> SavedImage:
    """Write the PNG to the workspace and add it to the history."""
    seed = image.params.seed
    path = image.save(workspace.folder / f"{time.time_ns():x}_seed_{seed}.png")
    scales = ", ".join(f"{name} at scale {scale:g}" for name, scale in image.params.adapters)
    caption = f"seed {seed} · {scales}" if scales else f"seed {seed}"
    saved_image = SavedImage(path, caption)
    workspace.add_to_history(saved_image)
    return saved_image


def _render_status(
    step: "Step", word: str, preview: str = "", size_px: tuple[int, int] | None = None
) -> str:
    """Render the card of a step: image number, progress, time left and preview (a data URL)."""
    which = f"picture {step.index + 1} of {step.num_images}, " if step.num_images > 1 else ""
    line = f"{word}{which}step {step.step} of {step.steps}"
    # NaN: there is no estimate yet.
    has_eta = not math.isnan(step.eta_sec)
    images_done = step.index + step.step / step.steps
    return html.render_progress(
        line[:1].upper() + line[1:],
        detail=f"about {format_seconds(step.eta_sec)} left" if has_eta else "",
        fraction=images_done / step.num_images,
        preview=preview,
        size_px=size_px,
    )


def _render_summary(saved_images: list[SavedImage], total: int, seconds: float) -> str:
    """Render the card at the end; fewer images than `total` mean that it was stopped."""
    if len(saved_images) < total:
        return html.render_progress(
            "Stopped.", f"{len(saved_images)} of {total} pictures were finished and are kept"
        )
    plural = "s" if total != 1 else ""
    line = f"{total} picture{plural} in {format_seconds(seconds)}"
    return html.render_progress(line, saved_images[0].caption)
