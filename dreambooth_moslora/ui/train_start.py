"""From the form to a run: checks everything, moves the photos into its folder, and starts or queues it; or what it
will cost, as `--dry_run` estimates it.
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from dreambooth_moslora.adapters.metadata import check_start_header
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.names import free_name
from dreambooth_moslora.disk.adapter_files import NONE, header_of
from dreambooth_moslora.disk.queue import QueuedRun
from dreambooth_moslora.ui.generate_form import format_seconds, summary_of
from dreambooth_moslora.ui.html import remarks_card
from dreambooth_moslora.ui.jobs import Job, Jobs, run_name_of
from dreambooth_moslora.ui.state import AppContext
from dreambooth_moslora.ui.train_fill import LIKE, recipe_of
from dreambooth_moslora.ui.train_form import TrainForm, folder_of, free_gib, prompts_of
from dreambooth_moslora.ui.visitors import ONE_AT_A_TIME, Visitor

if TYPE_CHECKING:
    from dreambooth_moslora.plan.memory import Estimate
    from dreambooth_moslora.settings.table import TrainConfig

BUSY = "another run is going on or waits; “Add to queue” lets this one wait for its turn"
BEGUN_WITH = "begun_with"
"""Folder in a run: a copy of the adapter that it begins with."""
CHOSEN = "Chosen; “More settings” changes it."


@dataclass(frozen=True)
class Prepared:
    """A new run folder with the photos in it, its settings, and what was chosen for them."""

    run_dir: Path
    settings: dict[str, Any]
    said: list[str]


def start_run(ctx: AppContext, jobs: Jobs, form: TrainForm, visitor: Visitor) -> tuple[Job, str]:
    """Check everything, move the photos into a new run folder, start the process.

    Returns the run, and what was chosen for it as HTML. Raises UserError.
    """
    if jobs.current() or not ctx.queue.is_empty:
        raise UserError(BUSY)
    with prepared(ctx, jobs, form, visitor) as run:
        job = jobs.start(run.run_dir.name, run.settings, visitor.id)
    return job, remarks_card(run.said, f"{job.name} has started. {CHOSEN}")


def add_to_queue(ctx: AppContext, jobs: Jobs, form: TrainForm, visitor: Visitor) -> tuple[str, str]:
    """Like `start_run`, but the run waits until those before it have ended. Returns its name, and HTML. Raises
    UserError."""
    if ctx.public:
        from dreambooth_moslora.ui.public import check_room

        check_room(ctx.queue.queue.waiting(), visitor)
    with prepared(ctx, jobs, form, visitor, is_queued=True) as run:
        name = run.run_dir.name
        asked = {"settings": run.settings, "is_new": True, "queued": time.time()}
        place = ctx.queue.queue.add(QueuedRun(name, visitor.id, visitor.address, **asked))
    return name, remarks_card(run.said, f"{name} waits, number {place} in the queue. {CHOSEN}")


@contextmanager
def prepared(
    ctx: AppContext, jobs: Jobs, form: TrainForm, visitor: Visitor, *, is_queued: bool = False
) -> Iterator[Prepared]:
    """Prepare the run folder. It is deleted when the block fails, which frees its name. Raises UserError."""
    from dreambooth_moslora.plan.checks import check_settings
    from dreambooth_moslora.settings.table import TrainConfig

    photos = visitor.photos_dir
    if not visitor.has_photos:
        raise UserError("add some photos of your subject first")
    prompts_of(form.token, form.class_word)
    run_dir = free_run_dir(jobs, form)
    recipe = recipe_of(ctx, form.like, visitor)
    choices = form.choices(ctx.base_name, ctx.resolution_px, photos, run_dir, is_queued=is_queued, recipe=recipe)
    begun_with = adapter_of(ctx, form, visitor)
    places = form.photos_given(run_dir / "photos")
    if begun_with is not None:  # the run's own copy: a queued run may begin when the visitor's upload is gone
        places |= {"init_adapter": str(run_dir / BEGUN_WITH / f"{form.begin_with}.safetensors")}
    config = TrainConfig.from_dict(choices.all | places)
    try:
        run_dir.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError("another run of that name is just being started; try again") from error
    try:
        with ONE_AT_A_TIME:
            for number in range(1, len(form.subjects) + 1):
                shutil.copytree(folder_of(photos, number), folder_of(run_dir / "photos", number))
        form.write_captions(run_dir / "photos")
        if begun_with is not None:
            (run_dir / BEGUN_WITH).mkdir()
            shutil.copyfile(begun_with, config.init_adapter)
        if recipe is not None:
            (run_dir / LIKE).mkdir()
            (run_dir / LIKE / f"{form.like}.json").write_text(json.dumps(recipe.settings), encoding="utf-8")
        check_settings(config)
        yield Prepared(run_dir, config.to_dict(), [*start_lines(form), *(words for words, _ in choices.said)])
    except BaseException:
        shutil.rmtree(run_dir, ignore_errors=True)
        raise


def starts_for(ctx: AppContext, visitor: Visitor) -> list[str]:
    """The names that "Begin with" offers: adapters with new tokens are left out, as no run begins with them."""
    files = ctx.catalog.files(visitor)
    return [NONE, *(name for name, file in files.items() if not summary_of(file).new_tokens)]


def adapter_of(ctx: AppContext, form: TrainForm, visitor: Visitor) -> Path | None:
    """The file that the run goes on from. Raises UserError for a name that the visitor cannot choose, and for a
    file that no run begins with."""
    name = str(form.begin_with or NONE)
    if name == NONE:
        return None
    file = ctx.catalog.path(name, visitor)
    try:
        check_start_header(header_of(file))
    except UserError as error:
        raise UserError(f"“Begin with” {name}: {error}") from error
    return file


def start_lines(form: TrainForm) -> list[str]:
    name = str(form.begin_with or NONE)
    return [] if name == NONE else [f"begins with what the adapter {name} has learnt"]


def free_run_dir(jobs: Jobs, form: TrainForm) -> Path:
    """The wanted name, or one from the class words; a number is added when it is taken."""
    wanted = run_name_of(str(form.run_name or "-".join(str(words.class_word) for words in form.subjects)))
    return jobs.run_dir(free_name(wanted, lambda name: jobs.run_dir(name).exists(), "-"))


def estimate_cost(ctx: AppContext, jobs: Jobs, form: TrainForm, visitor: Visitor) -> str:
    """Each choice, then steps, time, memory and disk as HTML. Raises UserError for whatever training would refuse."""
    try:
        lines = _lines(ctx, jobs, form, visitor)
    except UserError as error:
        raise UserError(jobs.told(str(error))) from error
    return remarks_card([jobs.told(line) for line in lines])


def _lines(ctx: AppContext, jobs: Jobs, form: TrainForm, visitor: Visitor) -> list[str]:
    from dreambooth_moslora.plan.plan import make_plan
    from dreambooth_moslora.settings.table import TrainConfig
    from dreambooth_moslora.training.dry_run import advice, cost_lines, step_lines

    photos = visitor.photos_dir
    if not visitor.has_photos:
        raise UserError("add some photos of your subject first")
    recipe = recipe_of(ctx, form.like, visitor)
    choices = form.choices(ctx.base_name, ctx.resolution_px, photos, ctx.runs_dir / "new", recipe=recipe)
    plan = make_plan(TrainConfig.from_dict(choices.all), free_gib=free_gib(), is_later=True)
    adapter_of(ctx, form, visitor)
    return [
        *start_lines(form),
        *(words for words, _ in choices.said),
        *step_lines(plan),
        *time_line(jobs, plan.config, plan.steps.total_steps),
        *cost_lines(plan),
        *card_lines(plan.config, plan.cost),
        *advice(plan),
    ]


def card_lines(config: "TrainConfig", cost: "Estimate") -> list[str]:
    """Device and plan of the run, for the cost estimate; `config` has its memory plan."""
    import torch

    free = free_gib()
    if free is None:
        return ["GPU: none is here, so it trains on the CPU"]
    line = f"GPU: {torch.cuda.get_device_name()}, {free:.1f} GiB free for this run"
    if config.mixed_precision:
        recomputed = "with" if config.gradient_checkpointing else "without"
        line += f", so it trains in {config.mixed_precision}, {recomputed} gradient checkpointing"
    if config.base_quantization != "none":
        line += f", the base in {config.base_quantization}"
    return [line, *(["the GPU may have too little memory even so"] if cost.peak_gib > free else [])]


def time_line(jobs: Jobs, config: "TrainConfig", total_steps: int) -> list[str]:
    """The time at the pace of this machine's newest run with the same base and size."""
    alike = (
        *("pretrained_model_name_or_path", "resolution", "train_batch_size", "gradient_accumulation_steps"),
        *("with_prior_preservation", "gradient_checkpointing", "base_quantization"),
    )
    for job in jobs.all():
        metrics = jobs.metrics(job)
        earlier = metrics.last("start").get("config", {})
        paces = [event["step_sec"] for event in metrics.of("step")[-50:] if event.get("step_sec")]
        if paces and all(earlier.get(name) == getattr(config, name) for name in alike):
            return [f"time: about {format_seconds(median(paces) * total_steps)}, at the pace of the last such run here"]
    return ["time: not known before the first run here; the page shows it after a few steps"]
