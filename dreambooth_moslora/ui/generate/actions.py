"""The actions of the Generate tab's buttons: plain functions that stream their state as `Frame`s."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.process import give_freed_memory_back
from dreambooth_moslora.generation.limits import check_size
from dreambooth_moslora.generation.params import GenerationParams
from dreambooth_moslora.ui.app_state import AppContext, as_user_error, sentence
from dreambooth_moslora.ui.generate.form import GenerateForm
from dreambooth_moslora.ui.html_snippets import notice, progress_card, thumbnail
from dreambooth_moslora.ui.server.libraries import import_libraries
from dreambooth_moslora.ui.server.users import Picture, Visitor

if TYPE_CHECKING:
    from dreambooth_moslora.generation.image import Image
    from dreambooth_moslora.generation.progress import Step

__all__ = ["Frame", "compare", "draw_grid", "make_pictures"]

FRAME_SEC = 0.12
"""Least seconds between two updates of the page; finished pictures are always shown."""


@dataclass(frozen=True)
class Frame:
    """One state of the result area. `pictures` is None when they have not changed."""

    status: str
    pictures: tuple[Picture, ...] | None = None
    params: GenerationParams | None = None
    sheet: Path | None = None


def make_pictures(ctx: AppContext, form: GenerateForm, request: gr.Request) -> Iterator[Frame]:
    """Draw 1 to 8 pictures with consecutive seeds, each shown when done; a stop keeps the finished ones."""
    yield from _run(ctx, form.params(), request, axes=())


def draw_grid(ctx: AppContext, form: GenerateForm, axes: tuple[str, ...], request: gr.Request) -> Iterator[Frame]:
    """Draw a picture for each cell; the last frame has the captioned sheet of all."""
    import_libraries()
    from dreambooth_moslora.generation.grids import parse_axis

    yield from _run(ctx, form.params(), request, tuple(parse_axis(axis) for axis in axes))


def compare(ctx: AppContext, form: GenerateForm, request: gr.Request) -> Iterator[Frame]:
    """Draw the same seed without and with the adapters: two pictures, in this order. Raises UserError."""
    with_adapters = replace(form.params(), num_images=1).apply_tags()
    if not with_adapters.adapters:
        raise UserError("choose an adapter to compare the base with")
    pictures: tuple[Picture, ...] = ()
    halves = (replace(with_adapters, adapters=()), with_adapters)
    for number, (params, word) in enumerate(zip(halves, ("Without the adapter", "With the adapter"))):
        for frame in _run(ctx, params, request, axes=(), word=f"{word}, "):
            pictures = (*pictures[:number], *(frame.pictures or ()))
            yield replace(frame, pictures=pictures if frame.pictures else None)
        if len(pictures) <= number:
            return
    yield Frame(progress_card("Without and with the adapter, at the same seed", pictures[1].caption), pictures)


def _run(
    ctx: AppContext, params: GenerationParams, request: gr.Request, axes: tuple, word: str = ""
) -> Iterator[Frame]:
    """What `_drawn` yields; when it fails, the card must not go on saying that it loads or draws.

    A picture allocates and frees hundreds of MiB: what is left between two pictures goes back to the system.
    """
    try:
        yield from _drawn(ctx, params, request, axes, word)
    except Exception as error:
        told = as_user_error(error)
        yield Frame(notice(sentence(told), "bad"))
        raise told from error
    finally:
        give_freed_memory_back()


def _drawn(ctx: AppContext, params: GenerationParams, request: gr.Request, axes: tuple, word: str) -> Iterator[Frame]:
    visitor = ctx.visitors.of(request)
    check_size(params, ctx.resolution_px)
    if not ctx.is_ready:
        yield Frame(progress_card("Loading the base …", "the next pictures need not wait for it"))
    with ctx.turns.drawing(), ctx.stoppable(request) as should_stop:
        pipeline = ctx.pipeline()
        if axes:
            from dreambooth_moslora.generation.grids import generate_grid

            events = generate_grid(pipeline, params, axes, should_stop, lambda cell: ctx.load_adapters(cell, visitor))
        else:
            params = ctx.load_adapters(params, visitor)
            events = pipeline.generate(params, should_stop)
        yield Frame(progress_card("Starting …", fraction=0.0), (), params)
        yield from _frames(events, visitor, params, word)


def _frames(events: Iterator, visitor: Visitor, params: GenerationParams, word: str) -> Iterator[Frame]:
    from dreambooth_moslora.generation.grids import Sheet
    from dreambooth_moslora.generation.image import Image
    from dreambooth_moslora.generation.progress import Preview, Step

    started = shown_at = time.perf_counter()
    step, pictures, total, sheet, black = None, [], params.num_images, None, 0
    for event in events:
        if isinstance(event, Step):
            step, total = event, event.num_images
        elif isinstance(event, Image):
            pictures.append(_keep(event, visitor))
            black += event.pixels.getbbox() is None
            yield Frame(_status(step, word), tuple(pictures))
        elif isinstance(event, Sheet):
            sheet = _keep_sheet(event, visitor)
        elif isinstance(event, Preview) and time.perf_counter() - shown_at > FRAME_SEC:
            shown_at = time.perf_counter()
            yield Frame(_status(step, word, thumbnail(event.pixels)))
    summary = _summary(pictures, total, time.perf_counter() - started, is_grid=sheet is not None)
    yield Frame(notice(_of_black(black), "bad") if black else summary, tuple(pictures), params, sheet)


def _keep(image: "Image", visitor: Visitor) -> Picture:
    """Write the PNG to the visitor's folder and add it to the history."""
    seed = image.params.seed
    path = image.save(visitor.folder / f"{time.time_ns():x}_seed_{seed}.png")
    scales = ", ".join(f"{name} {scale:g}" for name, scale in image.params.adapters)
    picture = Picture(path, f"seed {seed}" + (f" · {scales}" if scales else ""))
    visitor.remember(picture)
    return picture


def _keep_sheet(sheet, visitor: Visitor) -> Path:
    for old in visitor.folder.glob("grid_*.png"):
        old.unlink(missing_ok=True)
    return sheet.save(visitor.folder / f"grid_{time.time_ns():x}.png")


def _status(step: "Step", word: str, picture: str = "") -> str:
    done = step.index + step.step / step.steps
    which = f"picture {step.index + 1} of {step.num_images}, " if step.num_images > 1 else ""
    line = f"{word}{which}step {step.step} of {step.steps}"
    left = "" if step.eta_sec != step.eta_sec else f"about {format_seconds(step.eta_sec)} left"
    return progress_card(line[:1].upper() + line[1:], left, done / step.num_images, picture)


def _summary(pictures: list[Picture], total: int, seconds: float, is_grid: bool) -> str:
    if len(pictures) < total:
        return progress_card("Stopped.", f"{len(pictures)} of {total} pictures were finished and are kept")
    plural = "s" if total != 1 else ""
    detail = pictures[0].caption if not is_grid else "they are in the history, too"
    return progress_card(f"{total} picture{plural} in {format_seconds(seconds)}", detail)


def _of_black(count: int) -> str:
    """The warning about black pictures: values that are too large for the model become black without an error."""
    which = "1 of them is" if count == 1 else f"{count} of them are"
    return f"The pictures are done, but {which} black: an adapter's values or its scale are too large for this base."


def format_seconds(seconds: float) -> str:
    """4.2 s, 1 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02d} min"
