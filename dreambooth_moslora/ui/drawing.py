"""The actions of the Generate tab: pictures, a comparison. They stream `Frame`s."""

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
"""Least seconds between two updates of the page; finished pictures are always shown."""


@dataclass(frozen=True)
class Frame:
    """One state of the result area. `pictures` is None when they have not changed."""

    status: str
    pictures: tuple[SavedImage, ...] | None = None
    params: GenerationParams | None = None


def make_pictures(
    ctx: state.AppContext, form: GenerateForm, request: gr.Request
) -> Iterator[Frame]:
    """Draw 1 to 8 pictures with consecutive seeds. Raises UserError."""
    yield from _stream_drawing(ctx, form.to_params(), request)


def compare(ctx: state.AppContext, form: GenerateForm, request: gr.Request) -> Iterator[Frame]:
    """Draw the same seed without and with the adapters: two pictures, in this order.

    Raises UserError without an adapter.
    """
    with_adapters = replace(form.to_params(), num_images=1).apply_tags()
    if not with_adapters.adapters:
        raise UserError("choose an adapter to compare the base with")
    pictures: tuple[SavedImage, ...] = ()
    halves = (
        (replace(with_adapters, adapters=()), "Without the adapter, "),
        (with_adapters, "With the adapter, "),
    )
    for number, (params, word) in enumerate(halves):
        # A half's frames have its own picture alone: the first half's stays before it.
        for frame in _stream_drawing(ctx, params, request, word=word):
            pictures = (*pictures[:number], *(frame.pictures or ()))
            yield replace(frame, pictures=pictures if frame.pictures else None)
        # It was stopped.
        if len(pictures) <= number:
            return
    line = "Without and with the adapter, at the same seed"
    yield Frame(html.render_progress(line, pictures[1].caption), pictures)


def _stream_drawing(
    ctx: state.AppContext,
    params: GenerationParams,
    request: gr.Request,
    word: str = "",
) -> Iterator[Frame]:
    """Draw, and stream the state; an error is told on the card, too.

    - `params` are those of the pictures.
    - `request` names the page, which can stop its own work.
    - `word` begins the line of state.
    """
    try:
        # Wait for the base.
        check_size(params, ctx.resolution_px)
        if ctx.get_loaded_pipeline() is None:
            line = "Loading the base …"
            yield Frame(html.render_progress(line, "the next pictures need not wait for it"))
        # Prepare the stream of events; nothing is drawn yet.
        with ctx.turns.reserve_for_images(), ctx.track_work(request) as should_stop:
            pipeline = ctx.wait_for_pipeline()
            params = ctx.load_adapters(params)
            events = pipeline.generate(params, should_stop)
            # Draw. A single picture grows in its place in the gallery.
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
        told = convert_to_user_error(error)
        yield Frame(render_mistake(told))
        raise told from error
    finally:
        # What a picture leaves of memory goes back to the system.
        processes.release_freed_memory()


def _stream_frames(
    events: Iterator,
    workspace: Workspace,
    params: GenerationParams,
    word: str,
    size_px: tuple[int, int] | None,
) -> Iterator[Frame]:
    """The state after each event.

    - `events` are a pipeline's.
    - `workspace` keeps the pictures.
    - `params` are told in the last frame.
    - `word` begins the line of state.
    - `size_px` (width, height) makes the previews large.
    """
    from dreambooth_moslora.generation import previews
    from dreambooth_moslora.generation.image_params import Image, Step

    started = shown_at = time.perf_counter()
    step = None
    total = params.num_images
    pictures = []
    images = []
    for event in events:
        # A step is told with the preview that follows it.
        if isinstance(event, Step):
            step = event
            total = event.num_images
        elif isinstance(event, Image):
            pictures.append(_save_image(event, workspace))
            images.append(event)
            yield Frame(_render_status(step, word), tuple(pictures))
        # Previews come faster than a browser can show them.
        elif isinstance(event, previews.Preview) and time.perf_counter() - shown_at > FRAME_SEC:
            shown_at = time.perf_counter()
            preview = html.encode_thumbnail(event.pixels)
            yield Frame(_render_status(step, word, preview, size_px))
    # The end: how many, how long, and whether something is wrong with them.
    status = _render_summary(pictures, total, time.perf_counter() - started)
    said = describe_black_images(images)
    if said:
        status = html.render_notice(f"The pictures are done, but {said}.", "bad")
    yield Frame(status, tuple(pictures), params)


def _save_image(image: "Image", workspace: Workspace) -> SavedImage:
    """Write the PNG to the workspace and add it to the history."""
    seed = image.params.seed
    path = image.save(workspace.folder / f"{time.time_ns():x}_seed_{seed}.png")
    scales = ", ".join(f"{name} at scale {scale:g}" for name, scale in image.params.adapters)
    caption = f"seed {seed} · {scales}" if scales else f"seed {seed}"
    picture = SavedImage(path, caption)
    workspace.add_to_history(picture)
    return picture


def _render_status(
    step: "Step", word: str, picture: str = "", size_px: tuple[int, int] | None = None
) -> str:
    """The card of a step: which picture, how far, how long still, and a preview (a data URL)."""
    which = f"picture {step.index + 1} of {step.num_images}, " if step.num_images > 1 else ""
    line = f"{word}{which}step {step.step} of {step.steps}"
    # NaN: not known yet.
    is_known = step.eta_sec == step.eta_sec
    done = step.index + step.step / step.steps
    return html.render_progress(
        line[:1].upper() + line[1:],
        detail=f"about {format_seconds(step.eta_sec)} left" if is_known else "",
        fraction=done / step.num_images,
        picture=picture,
        size_px=size_px,
    )


def _render_summary(pictures: list[SavedImage], total: int, seconds: float) -> str:
    """The card at the end; fewer pictures than `total` mean that it was stopped."""
    if len(pictures) < total:
        return html.render_progress(
            "Stopped.", f"{len(pictures)} of {total} pictures were finished and are kept"
        )
    plural = "s" if total != 1 else ""
    line = f"{total} picture{plural} in {format_seconds(seconds)}"
    return html.render_progress(line, pictures[0].caption)
