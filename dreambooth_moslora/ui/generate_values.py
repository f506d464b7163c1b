"""The Generate tab's values, under the API's names, and its actions, which stream their state as
`Frame`s.

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
RANGES = {
    "steps": (1, MAX_STEPS),
    "guidance_scale": (0, 30),
    "scale": (-2, 2),
    "num_images": (1, MAX_IMAGES),
}
"""Ranges of the sliders, narrower than a program's, so that usual values are easy to set."""
RATIOS = {"Square": (1, 1), "Portrait": (7 / 8, 9 / 8), "Tall": (13 / 16, 19 / 16)}


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
        return cls(
            **{field.name: values[field.name] for field in fields(cls) if field.name in values}
        )

    def params(self) -> GenerationParams:
        """A negative or empty seed is drawn here. Raises UserError for values that cannot be
        generated."""
        width, height = parse_size(self.size)
        for name in ("adapter", "adapter_2", "adapter_3", "scheduler"):
            if not isinstance(word := getattr(self, name), str | None):
                raise UserError(f"{name} must be a name, not {word!r:.30}")
        if not 1 <= _whole(self.num_images, "images") <= MAX_IMAGES:
            raise UserError(
                f"{self.num_images} images were requested; the page makes 1 to {MAX_IMAGES} at a time"
            )
        slots = (
            (self.adapter, self.scale),
            (self.adapter_2, self.scale_2),
            (self.adapter_3, self.scale_3),
        )
        return GenerationParams(
            prompt=str(self.prompt or ""),
            negative_prompt=str(self.negative_prompt or ""),
            seed=draw_seed(-1 if self.seed is None else _whole(self.seed, "seed")),
            steps=_whole(self.steps, "steps"),
            guidance_scale=self.guidance_scale,
            height_px=height,
            width_px=width,
            num_images=_whole(self.num_images, "images"),
            adapters=tuple(
                (name, scale) for name, scale in slots if name and name != run_folder.NONE
            ),
            scheduler=self.scheduler or None,
        )

    @classmethod
    def from_params(cls, params: GenerationParams) -> "GenerateForm":
        """The form that gives these parameters again. Adapters beyond the third become tags in the
        prompt."""
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
    """(label, value) of the presets around a base's own resolution, all multiples of `multiple_px`."""
    choices = []
    for name, (w, h) in RATIOS.items():
        width, height = (
            round(resolution_px * ratio / multiple_px) * multiple_px for ratio in (w, h)
        )
        choices.append((f"{name} {width} × {height}", format_size(width, height)))
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
    loads = "".join(
        f"pipeline.load_adapter({adapter_files.get(name, name + '.safetensors')!r}, name={name!r})\n"
        for name, _ in params.adapters
    )
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
MOST_OTHERS = 8


@dataclass(frozen=True)
class AdapterSummary:
    """Values are empty if the file lacks them. `tokens` are those of its files of new tokens that
    are missing; `others` are the words of further subjects."""

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
        return (
            f"{self.trigger} {self.class_word}".strip()
            if self.class_word not in self.trigger
            else self.trigger
        )

    def sentence(self) -> str:
        names = " or ".join(f"“{words}”" for words in (self.subject, *self.others))
        parts = [
            f"say {names}" if self.subject else "",
            self.rank,
            f"{self.mixer} mixer" if self.mixer and self.mixer != "none" else "",
            f"for {self.base}" if self.base else "",
            f"best at scale {self.scale:g}" if self.scale != 1 else "",
            *(f"its new tokens are missing: {name} belongs beside it" for name in self.tokens),
        ]
        return " · ".join(part for part in parts if part)


def summary_of(file: Path) -> AdapterSummary:
    """The summary. It never raises: loading is the check, and the header only a hint."""
    try:
        facts = file.stat()
        found = (
            _read(file, facts.st_mtime_ns, facts.st_size)
            if S_ISREG(facts.st_mode)
            else AdapterSummary()
        )
        return replace(
            found, tokens=tuple(name for name in found.tokens if not (file.parent / name).is_file())
        )
    except OSError:
        return AdapterSummary()


@lru_cache(maxsize=1024)
def _read(file: Path, mtime_ns: int, size: int) -> AdapterSummary:
    try:
        with safe_open(file, framework="numpy") as opened:
            header = opened.metadata() or {}
        facts = json.loads(header.get("moslora", "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        facts = {}
    if not isinstance(facts, dict):
        return AdapterSummary()
    words, scale, (low, high) = facts.get("trigger_words"), facts.get("best_scale"), RANGES["scale"]
    first, *others = words if isinstance(words, list) and words else [""]
    return AdapterSummary(
        trigger=_word(first),
        class_word=_word(facts.get("class_word")),
        base=_word(facts.get("base_id")),
        rank=_rank(facts),
        mixer=_word(facts.get("mixer")),
        # what the slider offers
        scale=float(scale) if is_number(scale) and low <= scale <= high else 1.0,
        tokens=_tokens(facts.get("tokens")),
        others=tuple(filter(None, map(_word, others[:MOST_OTHERS]))),
        new_tokens=bool(facts.get("tokens")),
    )


def _tokens(notes: Any) -> tuple[str, ...]:
    """The names of the files of new tokens: the header has one note, or a list for several
    subjects."""
    several = notes if isinstance(notes, list) else [notes]
    names = [
        _word(note.get("file")) for note in several[: 1 + MOST_OTHERS] if isinstance(note, dict)
    ]
    return tuple(name for name in names if name and Path(name).name == name)


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
    if not isinstance(value, str):
        return ""
    return " ".join(value.encode("utf-8", "replace").decode().split())[:MAX_WORD_CHARACTERS]


def prompt_for(summary: AdapterSummary) -> str:
    return f"a photo of a {summary.subject}" if summary.subject else ""


def recipe_of(file: str | Path) -> Recipe:
    """The recipe of any picture. Raises UserError for one that is damaged, or that contains
    infinite numbers."""
    try:
        return read_recipe(file)
    except UserError:
        raise
    except (ArithmeticError, TypeError, ValueError) as error:
        raise UserError("the recipe inside the picture is damaged") from error


def match_adapters(
    recipe: Recipe, files: Mapping[str, Path], base: str
) -> tuple[GenerationParams, list[str]]:
    """The parameters with this page's names of the adapters (`files`), and a remark for each
    difference."""
    wanted = dict(recipe.provenance.adapter_sha256)
    adapters, remarks = [], []
    for name, scale in recipe.params.adapters:
        found, remark = _find(name, wanted.get(name), files)
        adapters.append((found, scale))
        remarks += [remark] if remark else []
    if recipe.provenance.base and recipe.provenance.base != base:
        remarks.append(f"it was made with the base {recipe.provenance.base}; this page has {base}")
    unique = tuple(dict(adapters).items())
    return replace(recipe.params, adapters=unique), remarks


def clamp_to_widgets(
    params: GenerationParams, resolution_px: int, guidance: float
) -> tuple[GenerationParams, list[str]]:
    """The nearest parameters that the widgets accept (for no guidance the base's own), a remark for
    each change."""
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
        adapters=tuple(
            (name, near(scale, "scale", f"scale of {name}:")) for name, scale in params.adapters
        ),
    )
    try:
        check_size(params, resolution_px)
    except UserError as error:
        remarks.append(f"{error}; the base's own size is set")
        params = replace(params, width_px=None, height_px=None)
    return params, remarks


def _find(name: str, sha256: str | None, files: Mapping[str, Path]) -> tuple[str, str]:
    """(name on this page, remark). A file with the same content under another name is used."""
    if name in files and sha256 in (None, _sha256_of(files[name])):
        return name, ""
    if sha256 and (
        twin := next((n for n, file in files.items() if _sha256_of(file) == sha256), None)
    ):
        return twin, ""
    if name in files:
        return name, f"the adapter {name} here is another file than the one that made the picture"
    return name, f"the adapter {name} is not here"


def _sha256_of(file: Path) -> str:
    facts = file.stat()
    return _digest(file, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=256)
def _digest(file: Path, mtime_ns: int, size: int) -> str:
    return file_digest(file)


# Least seconds between two updates of the page; finished pictures are always shown
FRAME_SEC = 0.12


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
    """Draw 1 to 8 pictures with consecutive seeds; with `axes`, one for each cell, and the
    captioned sheet."""
    parsed = ()
    if axes:
        state.import_libraries()
        from dreambooth_moslora.generation.grids import parse_axis

        parsed = tuple(map(parse_axis, axes))
    yield from _run(ctx, form.params(), request, parsed)


def compare(ctx: state.AppContext, form: GenerateForm, request: gr.Request) -> Iterator[Frame]:
    """Draw the same seed without and with the adapters: two pictures, in this order. Raises
    UserError."""
    with_adapters = replace(form.params(), num_images=1).apply_tags()
    if not with_adapters.adapters:
        raise UserError("choose an adapter to compare the base with")
    pictures: tuple[Picture, ...] = ()
    halves = (replace(with_adapters, adapters=()), with_adapters)
    for number, (params, word) in enumerate(
        zip(halves, ("Without the adapter", "With the adapter"))
    ):
        for frame in _run(ctx, params, request, axes=(), word=f"{word}, "):
            pictures = (*pictures[:number], *(frame.pictures or ()))
            yield replace(frame, pictures=pictures if frame.pictures else None)
        if len(pictures) <= number:
            return
    yield Frame(
        html.progress_card("Without and with the adapter, at the same seed", pictures[1].caption),
        pictures,
    )


def _run(
    ctx: state.AppContext,
    params: GenerationParams,
    request: gr.Request,
    axes: tuple,
    word: str = "",
) -> Iterator[Frame]:
    """An error is told on the card; what a picture leaves of memory goes back to the system."""
    try:
        check_size(params, ctx.resolution_px)
        if ctx.loaded() is None:
            yield Frame(
                html.progress_card("Loading the base …", "the next pictures need not wait for it")
            )
        with ctx.turns.drawing(), ctx.stoppable(request) as should_stop:
            pipeline = ctx.pipeline()
            if axes:
                from dreambooth_moslora.generation.grids import generate_grid

                def load(cell: GenerationParams) -> GenerationParams:
                    check_steps(cell)  # which an axis may set beyond the slider
                    return ctx.load_adapters(cell)

                events = generate_grid(pipeline, params, axes, should_stop, load)
            else:
                params = ctx.load_adapters(params)
                events = pipeline.generate(params, should_stop)
            yield Frame(html.progress_card("Starting …", fraction=0.0), (), params)
            size_px = (params.width_px or ctx.resolution_px, params.height_px or ctx.resolution_px)
            shown_px = None if axes or word else size_px
            yield from _frames(events, ctx.workspace, params, word, shown_px)
    except Exception as error:
        told = state.as_user_error(error)
        yield Frame(html.notice(state.sentence(told), "bad"))
        raise told from error
    finally:
        processes.give_freed_memory_back()


def _frames(
    events: Iterator,
    workspace: Workspace,
    params: GenerationParams,
    word: str,
    size_px: tuple[int, int] | None,
) -> Iterator[Frame]:
    """With `size_px` the previews are large."""
    from dreambooth_moslora.generation import grids, previews
    from dreambooth_moslora.generation.params import Image, Step

    started = shown_at = time.perf_counter()
    step, pictures, total, sheet, black = None, [], params.num_images, None, []
    for event in events:
        if isinstance(event, Step):
            step, total = event, event.num_images
        elif isinstance(event, Image):
            pictures.append(_keep(event, workspace))
            black += [event] * bool(about_black([event]))
            yield Frame(_status(step, word), tuple(pictures))
        elif isinstance(event, grids.Sheet):
            for old in workspace.folder.glob("grid_*.png"):
                old.unlink(missing_ok=True)
            sheet = event.save(workspace.folder / f"grid_{time.time_ns():x}.png")
        elif isinstance(event, previews.Preview) and time.perf_counter() - shown_at > FRAME_SEC:
            shown_at = time.perf_counter()
            yield Frame(_status(step, word, html.thumbnail(event.pixels), size_px))
    status = _summary(pictures, total, time.perf_counter() - started, is_grid=sheet is not None)
    if said := about_black(black):
        status = html.notice(f"The pictures are done, but {said}.", "bad")
    yield Frame(status, tuple(pictures), params, sheet)


def _keep(image: "Image", workspace: Workspace) -> Picture:
    """Write the PNG to the workspace and add it to the history."""
    seed = image.params.seed
    path = image.save(workspace.folder / f"{time.time_ns():x}_seed_{seed}.png")
    scales = ", ".join(f"{name} at scale {scale:g}" for name, scale in image.params.adapters)
    picture = Picture(path, f"seed {seed}" + (f" · {scales}" if scales else ""))
    workspace.remember(picture)
    return picture


def _status(
    step: "Step", word: str, picture: str = "", size_px: tuple[int, int] | None = None
) -> str:
    done = step.index + step.step / step.steps
    which = f"picture {step.index + 1} of {step.num_images}, " if step.num_images > 1 else ""
    line = f"{word}{which}step {step.step} of {step.steps}"
    left = "" if step.eta_sec != step.eta_sec else f"about {format_seconds(step.eta_sec)} left"
    return html.progress_card(
        line[:1].upper() + line[1:], left, done / step.num_images, picture, size_px
    )


def _summary(pictures: list[Picture], total: int, seconds: float, is_grid: bool) -> str:
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
