"""The Generate tab's values, under the API's names, and its actions, which stream `Frame`s.

A picture's recipe comes back into the form: its adapters are found again by content, and
differences are remarks.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, Any

import gradio as gr
from safetensors import SafetensorError, safe_open

from dreambooth_moslora.disk import processes, run_folder
from dreambooth_moslora.disk.contents import file_digest
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.params import (
    MAX_STEPS,
    GenerationParams,
    Recipe,
    about_black,
    check_size,
    check_steps,
    draw_seed,
    read_recipe,
)
from dreambooth_moslora.ui import html, state
from dreambooth_moslora.ui.workspace import Picture, Workspace
from dreambooth_moslora.values import is_number

if TYPE_CHECKING:
    from dreambooth_moslora.generation.params import Image, Step

MAX_IMAGES = 8
"""Most pictures of one request."""
RANGES = {
    "steps": (1, MAX_STEPS),
    "guidance_scale": (0, 30),
    "scale": (-2, 2),
    "num_images": (1, MAX_IMAGES),
}
"""Ranges of the sliders, narrower than a program's, so that usual values are easy to set."""
RATIOS = {"Square": (1, 1), "Portrait": (7 / 8, 9 / 8), "Tall": (13 / 16, 19 / 16)}
"""Preset -> its width and height, as multiples of the base's own resolution."""


@dataclass(frozen=True)
class GenerateForm:
    """The fields have the names and order of the API's arguments. `size` is "width x height" px."""

    prompt: str = ""
    negative_prompt: str = ""
    adapter: str = run_folder.NONE
    scale: float = 1.0
    adapter_2: str = run_folder.NONE
    scale_2: float = 1.0
    adapter_3: str = run_folder.NONE
    scale_3: float = 1.0
    seed: int = -1
    steps: int = 25
    guidance_scale: float | None = None
    size: str = ""
    num_images: int = 1
    scheduler: str = ""  # the base's own

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "GenerateForm":
        """The form of these values; what they do not name is as at first."""
        known = [field.name for field in fields(cls) if field.name in values]
        return cls(**{name: values[name] for name in known})

    def params(self) -> GenerationParams:
        """The parameters. A negative or empty seed is drawn here.

        Raises UserError for values that cannot be generated.
        """
        # A program may send anything.
        width, height = parse_size(self.size)
        for name in ("adapter", "adapter_2", "adapter_3", "scheduler"):
            word = getattr(self, name)
            if not isinstance(word, str | None):
                raise UserError(f"{name} must be a name, not {word!r:.30}")
        if not 1 <= _whole(self.num_images, "images") <= MAX_IMAGES:
            raise UserError(
                f"{self.num_images} images were requested; "
                f"the page makes 1 to {MAX_IMAGES} at a time"
            )
        # Slots without an adapter are left out.
        slots = (
            (self.adapter, self.scale),
            (self.adapter_2, self.scale_2),
            (self.adapter_3, self.scale_3),
        )
        used = [(name, scale) for name, scale in slots if name and name != run_folder.NONE]
        return GenerationParams(
            prompt=str(self.prompt or ""),
            negative_prompt=str(self.negative_prompt or ""),
            seed=draw_seed(-1 if self.seed is None else _whole(self.seed, "seed")),
            steps=_whole(self.steps, "steps"),
            guidance_scale=self.guidance_scale,
            height_px=height,
            width_px=width,
            num_images=_whole(self.num_images, "images"),
            adapters=tuple(used),
            scheduler=self.scheduler or None,
        )

    @classmethod
    def from_params(cls, params: GenerationParams) -> "GenerateForm":
        """The form that gives these parameters again.

        Adapters beyond the third become tags in the prompt.
        """
        slots = {}
        for number, (name, scale) in enumerate(params.adapters[:3]):
            suffix = f"_{number + 1}" if number else ""
            slots |= {f"adapter{suffix}": name, f"scale{suffix}": scale}
        tags = "".join(f" <lora:{name}:{scale:g}>" for name, scale in params.adapters[3:])
        return cls(
            prompt=params.prompt + tags,
            negative_prompt=params.negative_prompt,
            seed=params.seed,
            steps=params.steps,
            guidance_scale=params.guidance_scale,
            size=format_size(params.width_px, params.height_px),
            num_images=min(params.num_images, MAX_IMAGES),
            scheduler=params.scheduler or "",
            **slots,
        )


def format_size(width: int | None, height: int | None) -> str:
    """ "832 x 1216" for these sides in px; "" for the base's own size."""
    return f"{width} x {height}" if width and height else ""


def parse_size(text: str) -> tuple[int | None, int | None]:
    """ "832 x 1216" -> (832, 1216); empty -> the base's own size. Raises UserError."""
    if text is None or text == "" or (isinstance(text, str) and not text.strip()):
        return None, None
    try:
        width, height = (int(part) for part in text.lower().replace("×", "x").split("x"))
    except (ValueError, AttributeError) as error:  # a program may send anything but text
        raise UserError(
            f"the size {text!r:.30} is not understood; write it like 832 x 1216"
        ) from error
    return width, height


def size_choices(resolution_px: int, multiple_px: int = 8) -> list[tuple[str, str]]:
    """(Label, value) of the presets around a base's own resolution.

    All sides are multiples of `multiple_px`.
    """

    def side(ratio: float) -> int:
        return round(resolution_px * ratio / multiple_px) * multiple_px

    choices = []
    for name, (across, down) in RATIOS.items():
        width, height = side(across), side(down)
        choices.append((f"{name} {width} × {height}", format_size(width, height)))
        # The same lying on its side.
        if width != height:
            wide = "Landscape" if name == "Portrait" else "Wide"
            choices.append((f"{wide} {height} × {width}", format_size(height, width)))
    return choices


def _whole(value: Any, name: str) -> int:
    """An integer: browsers send 7.0 for 7, and a client may send NaN. Raises UserError."""
    is_whole = value.is_integer() if isinstance(value, float) else isinstance(value, int)
    if isinstance(value, bool) or not is_whole:
        raise UserError(f"{name} must be a whole number, not {value!r:.30}")
    return int(value)


def code_snippet(params: GenerationParams, base: str, adapter_files: Mapping[str, str]) -> str:
    """Python that makes the same pictures. `adapter_files` gives the file name of each adapter."""
    loads = ""
    for name, _ in params.adapters:
        file = adapter_files.get(name, name + ".safetensors")
        loads += f"pipeline.load_adapter({file!r}, name={name!r})\n"
    # Only what differs from the defaults is written out.
    defaults = {field.name: field.default for field in fields(GenerationParams)}
    shown = {key: value for key, value in params.to_dict().items() if value != defaults[key]}
    shown["adapters"] = params.adapters
    arguments = "".join(f"    {key}={value!r},\n" for key, value in shown.items() if value != ())
    return (
        "from dreambooth_moslora import GenerationParams, SubjectPipeline\n\n"
        f"pipeline = SubjectPipeline.from_base({base!r})\n{loads}"
        f"params = GenerationParams(\n{arguments})\n"
        "for event in pipeline.generate(params):\n"
        '    if hasattr(event, "save"):\n'
        '        event.save(f"image_{event.params.seed}.png")\n'
    )


MAX_WORD_CHARACTERS = 80
"""Most characters that are shown of a word of a file's header."""
MOST_OTHERS = 8
"""Most further subjects that are shown."""


@dataclass(frozen=True)
class AdapterSummary:
    """What a file's header says of the adapter; a value is empty if it does not say it.

    `tokens` are the names of its missing files of new tokens. `others` are the words of further
    subjects.
    """

    trigger: str = ""
    class_word: str = ""
    base: str = ""
    rank: str = ""
    mixer: str = ""
    scale: float = 1.0
    tokens: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    new_tokens: bool = False

    @property
    def subject(self) -> str:
        """The words that call the subject, such as "sks dog"."""
        if self.class_word in self.trigger:
            return self.trigger
        return f"{self.trigger} {self.class_word}".strip()

    def sentence(self) -> str:
        """All that is known, in one line."""
        parts = []
        if self.subject:
            names = " or ".join(f"“{words}”" for words in (self.subject, *self.others))
            parts.append(f"say {names}")
        if self.rank:
            parts.append(self.rank)
        if self.mixer and self.mixer != "none":
            parts.append(f"{self.mixer} mixer")
        if self.base:
            parts.append(f"for {self.base}")
        if self.scale != 1:
            parts.append(f"best at scale {self.scale:g}")
        for name in self.tokens:
            parts.append(f"its new tokens are missing: {name} belongs beside it")
        return " · ".join(parts)


def summary_of(file: Path) -> AdapterSummary:
    """The summary. It never raises: loading is the check, and the header only a hint."""
    try:
        facts = file.stat()
        # Reading a pipe would have no end.
        if not S_ISREG(facts.st_mode):
            return AdapterSummary()
        found = _read(file, facts.st_mtime_ns, facts.st_size)
        missing = [name for name in found.tokens if not (file.parent / name).is_file()]
    except OSError:
        return AdapterSummary()
    return replace(found, tokens=tuple(missing))


@lru_cache(maxsize=1024)
def _read(file: Path, mtime_ns: int, size: int) -> AdapterSummary:
    """The summary of the file's content; `mtime_ns` and `size` tell when that is another."""
    try:
        with safe_open(file, framework="numpy") as opened:
            header = opened.metadata() or {}
        facts = json.loads(header.get("moslora", "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        facts = {}
    if not isinstance(facts, dict):
        return AdapterSummary()
    # The header may hold anything. A word for each subject:
    words = facts.get("trigger_words")
    first, *others = words if isinstance(words, list) and words else [""]
    # A scale that the slider offers, or 1.
    scale = facts.get("best_scale")
    low, high = RANGES["scale"]
    is_offered = is_number(scale) and low <= scale <= high
    return AdapterSummary(
        trigger=_word(first),
        class_word=_word(facts.get("class_word")),
        base=_word(facts.get("base_id")),
        rank=_rank(facts),
        mixer=_word(facts.get("mixer")),
        scale=float(scale) if is_offered else 1.0,
        tokens=_tokens(facts.get("tokens")),
        others=tuple(filter(None, map(_word, others[:MOST_OTHERS]))),
        new_tokens=bool(facts.get("tokens")),
    )


def _tokens(notes: Any) -> tuple[str, ...]:
    """The names of the files of new tokens.

    The header has one note, or a list for several subjects. A name that leads to another folder is
    left out.
    """
    several = notes if isinstance(notes, list) else [notes]
    names = []
    for note in several[: 1 + MOST_OTHERS]:
        name = _word(note.get("file")) if isinstance(note, dict) else ""
        if name and Path(name).name == name:
            names.append(name)
    return tuple(names)


def _rank(facts: dict[str, Any]) -> str:
    """ "rank 32", or "ranks 1 to 23" if the projections differ."""
    each = facts.get("ranks")
    found = [facts.get("rank"), *(each.values() if isinstance(each, dict) else ())]
    ranks = [rank for rank in found if type(rank) is int and rank > 0]
    if not ranks:
        return ""
    low, high = min(ranks), max(ranks)
    return f"rank {low}" if low == high else f"ranks {low} to {high}"


def _word(value: Any) -> str:
    """The beginning of a text of the header, in one line; "" of anything else."""
    if not isinstance(value, str):
        return ""
    return " ".join(value.encode("utf-8", "replace").decode().split())[:MAX_WORD_CHARACTERS]


def prompt_for(summary: AdapterSummary) -> str:
    """The prompt with which a page begins for this adapter."""
    return f"a photo of a {summary.subject}" if summary.subject else ""


def recipe_of(file: str | Path) -> Recipe:
    """The recipe of any picture.

    Raises UserError for one that is damaged, or that contains infinite numbers.
    """
    try:
        return read_recipe(file)
    except UserError:
        raise
    except (ArithmeticError, TypeError, ValueError) as error:
        raise UserError("the recipe inside the picture is damaged") from error


def match_adapters(
    recipe: Recipe, files: Mapping[str, Path], base: str
) -> tuple[GenerationParams, list[str]]:
    """The parameters with this page's names of the adapters, and a remark for each difference.

    - `files` are this page's adapters, by name.
    - `base` is the name of this page's base.
    """
    wanted = dict(recipe.provenance.adapter_sha256)
    adapters = []
    remarks = []
    for name, scale in recipe.params.adapters:
        found, remark = _find(name, wanted.get(name), files)
        adapters.append((found, scale))
        if remark:
            remarks.append(remark)
    made_with = recipe.provenance.base
    if made_with and made_with != base:
        remarks.append(f"it was made with the base {made_with}; this page has {base}")
    # Two names of the picture may be one file here.
    unique = tuple(dict(adapters).items())
    return replace(recipe.params, adapters=unique), remarks


def clamp_to_widgets(
    params: GenerationParams, resolution_px: int, guidance: float
) -> tuple[GenerationParams, list[str]]:
    """The nearest parameters that the widgets accept, and a remark for each change.

    - `resolution_px` is the base's own side.
    - `guidance` is the base's own, which stands for none.
    """
    remarks: list[str] = []

    def near(value: float, name: str, words: str) -> float:
        low, high = RANGES[name]
        if low <= value <= high:
            return value
        nearest = min(max(value, low), high)
        remarks.append(f"{words} {value:g} is beyond what the page offers; {nearest:g} is set")
        return nearest

    if params.text_options:
        names = " and ".join(f"--{name}" for name, _ in params.text_options)
        remarks.append(
            f"it was drawn with {names}, which the page cannot set: the adapter's own is taken"
        )
    wanted = guidance if params.guidance_scale is None else params.guidance_scale
    params = replace(
        params,
        steps=near(params.steps, "steps", "the number of steps"),
        guidance_scale=near(wanted, "guidance_scale", "guidance"),
    )
    adapters = []
    for name, scale in params.adapters:
        adapters.append((name, near(scale, "scale", f"scale of {name}:")))
    params = replace(params, adapters=tuple(adapters))
    # A size counts as one: if it is refused, both sides are the base's own.
    try:
        check_size(params, resolution_px)
    except UserError as error:
        remarks.append(f"{error}; the base's own size is set")
        params = replace(params, width_px=None, height_px=None)
    return params, remarks


def _find(name: str, sha256: str | None, files: Mapping[str, Path]) -> tuple[str, str]:
    """(Name on this page, remark). A file with the same content under another name is used."""
    if name in files and sha256 in (None, _sha256_of(files[name])):
        return name, ""
    if sha256:
        for twin, file in files.items():
            if _sha256_of(file) == sha256:
                return twin, ""
    if name in files:
        return name, f"the adapter {name} here is another file than the one that made the picture"
    return name, f"the adapter {name} is not here"


def _sha256_of(file: Path) -> str:
    """The digest of a file, which is read once as long as it does not change."""
    facts = file.stat()
    return _digest(file, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=256)
def _digest(file: Path, mtime_ns: int, size: int) -> str:
    return file_digest(file)


FRAME_SEC = 0.12
"""Least seconds between two updates of the page; finished pictures are always shown."""


@dataclass(frozen=True)
class Frame:
    """One state of the result area. `pictures` is None when they have not changed."""

    status: str
    pictures: tuple[Picture, ...] | None = None
    params: GenerationParams | None = None
    sheet: Path | None = None


def make_pictures(
    ctx: state.AppContext, form: GenerateForm, request: gr.Request, axes: Iterable[str] = ()
) -> Iterator[Frame]:
    """Draw 1 to 8 pictures with consecutive seeds; with `axes`, one for each cell, and a sheet.

    An axis is written like `scale=0, 0.5, 1`. Raises UserError.
    """
    parsed = ()
    if axes:
        state.import_libraries()
        from dreambooth_moslora.generation.grids import parse_axis

        parsed = tuple(map(parse_axis, axes))
    yield from _run(ctx, form.params(), request, parsed)


def compare(ctx: state.AppContext, form: GenerateForm, request: gr.Request) -> Iterator[Frame]:
    """Draw the same seed without and with the adapters: two pictures, in this order.

    Raises UserError without an adapter.
    """
    with_adapters = replace(form.params(), num_images=1).apply_tags()
    if not with_adapters.adapters:
        raise UserError("choose an adapter to compare the base with")
    pictures: tuple[Picture, ...] = ()
    halves = (
        (replace(with_adapters, adapters=()), "Without the adapter, "),
        (with_adapters, "With the adapter, "),
    )
    for number, (params, word) in enumerate(halves):
        # A half's frames have its own picture alone: the first half's stays before it.
        for frame in _run(ctx, params, request, axes=(), word=word):
            pictures = (*pictures[:number], *(frame.pictures or ()))
            yield replace(frame, pictures=pictures if frame.pictures else None)
        # It was stopped.
        if len(pictures) <= number:
            return
    line = "Without and with the adapter, at the same seed"
    yield Frame(html.progress_card(line, pictures[1].caption), pictures)


def _run(
    ctx: state.AppContext,
    params: GenerationParams,
    request: gr.Request,
    axes: tuple,
    word: str = "",
) -> Iterator[Frame]:
    """Draw, and stream the state; an error is told on the card, too.

    - `params` are those of the pictures, or of a grid's every cell.
    - `request` names the page, which can stop its own work.
    - `axes` are those of a grid; without any, pictures are drawn.
    - `word` begins the line of state.
    """
    try:
        # Wait for the base.
        check_size(params, ctx.resolution_px)
        if ctx.loaded() is None:
            line = "Loading the base …"
            yield Frame(html.progress_card(line, "the next pictures need not wait for it"))
        # Prepare the stream of events; nothing is drawn yet.
        with ctx.turns.drawing(), ctx.stoppable(request) as should_stop:
            pipeline = ctx.pipeline()
            if axes:
                from dreambooth_moslora.generation.grids import generate_grid

                def load(cell: GenerationParams) -> GenerationParams:
                    # An axis may ask for more than the slider.
                    check_steps(cell)
                    return ctx.load_adapters(cell)

                events = generate_grid(pipeline, params, axes, should_stop, load)
            else:
                params = ctx.load_adapters(params)
                events = pipeline.generate(params, should_stop)
            # Draw. A single picture grows in its place in the gallery.
            yield Frame(html.progress_card("Starting …", fraction=0.0), (), params)
            width_px = params.width_px or ctx.resolution_px
            height_px = params.height_px or ctx.resolution_px
            yield from _frames(
                events=events,
                workspace=ctx.workspace,
                params=params,
                word=word,
                size_px=None if axes or word else (width_px, height_px),
            )
    except Exception as error:
        told = state.as_user_error(error)
        yield Frame(state.mistake_card(told))
        raise told from error
    finally:
        # What a picture leaves of memory goes back to the system.
        processes.give_freed_memory_back()


def _frames(
    events: Iterator,
    workspace: Workspace,
    params: GenerationParams,
    word: str,
    size_px: tuple[int, int] | None,
) -> Iterator[Frame]:
    """The state after each event.

    - `events` are a pipeline's, or a grid's.
    - `workspace` keeps the pictures.
    - `params` are told in the last frame.
    - `word` begins the line of state.
    - `size_px` (width, height) makes the previews large.
    """
    from dreambooth_moslora.generation import grids, previews
    from dreambooth_moslora.generation.params import Image, Step

    started = shown_at = time.perf_counter()
    step = None
    total = params.num_images
    pictures = []
    black = []
    sheet = None
    for event in events:
        # A step is told with the preview that follows it.
        if isinstance(event, Step):
            step = event
            total = event.num_images
        elif isinstance(event, Image):
            pictures.append(_keep(event, workspace))
            if about_black([event]):
                black.append(event)
            yield Frame(_status(step, word), tuple(pictures))
        # One sheet is kept.
        elif isinstance(event, grids.Sheet):
            for old in workspace.folder.glob("grid_*.png"):
                old.unlink(missing_ok=True)
            sheet = event.save(workspace.folder / f"grid_{time.time_ns():x}.png")
        # Previews come faster than a browser can show them.
        elif isinstance(event, previews.Preview) and time.perf_counter() - shown_at > FRAME_SEC:
            shown_at = time.perf_counter()
            preview = html.thumbnail(event.pixels)
            yield Frame(_status(step, word, preview, size_px))
    # The end: how many, how long, and whether something is wrong with them.
    status = _summary(pictures, total, time.perf_counter() - started, is_grid=sheet is not None)
    said = about_black(black)
    if said:
        status = html.notice(f"The pictures are done, but {said}.", "bad")
    yield Frame(status, tuple(pictures), params, sheet)


def _keep(image: "Image", workspace: Workspace) -> Picture:
    """Write the PNG to the workspace and add it to the history."""
    seed = image.params.seed
    path = image.save(workspace.folder / f"{time.time_ns():x}_seed_{seed}.png")
    scales = ", ".join(f"{name} at scale {scale:g}" for name, scale in image.params.adapters)
    caption = f"seed {seed} · {scales}" if scales else f"seed {seed}"
    picture = Picture(path, caption)
    workspace.remember(picture)
    return picture


def _status(
    step: "Step", word: str, picture: str = "", size_px: tuple[int, int] | None = None
) -> str:
    """The card of a step: which picture, how far, how long still, and a preview (a data URL)."""
    which = f"picture {step.index + 1} of {step.num_images}, " if step.num_images > 1 else ""
    line = f"{word}{which}step {step.step} of {step.steps}"
    # NaN: not known yet.
    is_known = step.eta_sec == step.eta_sec
    done = step.index + step.step / step.steps
    return html.progress_card(
        line[:1].upper() + line[1:],
        detail=f"about {format_seconds(step.eta_sec)} left" if is_known else "",
        fraction=done / step.num_images,
        picture=picture,
        size_px=size_px,
    )


def _summary(pictures: list[Picture], total: int, seconds: float, is_grid: bool) -> str:
    """The card at the end; fewer pictures than `total` mean that it was stopped."""
    if len(pictures) < total:
        return html.progress_card(
            "Stopped.", f"{len(pictures)} of {total} pictures were finished and are kept"
        )
    plural = "s" if total != 1 else ""
    detail = pictures[0].caption if not is_grid else "they are in the history, too"
    return html.progress_card(f"{total} picture{plural} in {format_seconds(seconds)}", detail)


def format_seconds(seconds: float) -> str:
    """4.2 s, 1 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02d} min"
