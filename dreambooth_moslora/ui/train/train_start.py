"""Start of a run from a filled form.

The run is started, queued, or its cost is estimated, as `--dry_run` does it.
"""

import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.disk import queue
from dreambooth_moslora.disk.paths import find_free_name
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.photos.photo_file import Photo
from dreambooth_moslora.plan.defaults import choose_bucket_step, choose_family_settings
from dreambooth_moslora.plan.memory_plans import format_chosen_plan, format_plans
from dreambooth_moslora.plan.steps import plan_steps
from dreambooth_moslora.settings import train_config
from dreambooth_moslora.settings.subject_kinds import get_subject_kind
from dreambooth_moslora.settings.toy_bases import is_toy
from dreambooth_moslora.ui import html, state
from dreambooth_moslora.ui.jobs import MAX_RUN_NAME_CHARACTERS, Job, Jobs
from dreambooth_moslora.ui.photo_copies import are_sample_photos, list_photo_copies
from dreambooth_moslora.ui.train import train_form
from dreambooth_moslora.ui.train.train_form import TrainForm

BUSY_MESSAGE = "another run is going on or waits; “Add to queue” lets this one wait for its turn"
"""Error for a run that cannot start yet."""
TOY_PHOTOS_REMARK = (
    "the practice model draws only its own toys and cannot learn what these photos show; "
    "choose another base at the top, or train it anyway to see how a run goes"
)
"""Remark on photos that are not of the toys."""
CHOICES_TITLE = "“More settings” changes this:"
"""Heading above the choices for a run."""


class BusyError(UserError):
    """Error of a start while another run is going on: it holds only until that run has ended."""


@dataclass(frozen=True)
class PreparedRun:
    """New run folder with the photos in it, its settings, and lines about them."""

    run_dir: Path
    settings: dict[str, Any]
    lines: list[str]


def start_run(ctx: state.AppContext, form: TrainForm) -> tuple[Job, str]:
    """Start the run; return it, and the choices for it as HTML. Raises UserError."""
    if ctx.jobs.find_active_job() or not ctx.queue.is_empty:
        raise BusyError(BUSY_MESSAGE)
    with prepare_run(ctx, form) as run:
        job = ctx.jobs.start(run.run_dir.name, run.settings)
    return job, html.render_remarks(run.lines, f"Chosen for {job.name}. {CHOICES_TITLE}")


def add_to_queue(ctx: state.AppContext, form: TrainForm) -> tuple[str, str]:
    """Queue the run, which waits for those before it; return its name, and HTML.

    Raises UserError.
    """
    with prepare_run(ctx, form, is_queued=True) as run:
        name = run.run_dir.name
        queued = queue.QueuedRun(name, settings=run.settings, queued=time.time())
        place = ctx.queue.queue.add(queued)
    return name, html.render_remarks(
        run.lines, f"{name} waits, number {place} in the queue. {CHOICES_TITLE}"
    )


def is_beyond_toy(ctx: state.AppContext) -> bool:
    """Return whether an embedded base would train on photos of something that it cannot draw."""
    photos = list_photo_copies(ctx.workspace.photos_dir)
    return is_toy(ctx.base_name) and not are_sample_photos(photos)


@contextmanager
def prepare_run(
    ctx: state.AppContext,
    form: TrainForm,
    *,
    is_queued: bool = False,
) -> Iterator[PreparedRun]:
    """Prepare the run folder, and delete it if the block fails, which frees its name.

    With `is_queued` the run begins when all others have ended. Raises UserError.
    """
    from dreambooth_moslora.plan.validation import check_base_settings, validate_settings

    # The settings for the page's photos.
    photos = ctx.workspace.required_photos_dir
    form.check_words()
    run_dir = free_run_dir(ctx.jobs, form)
    choices = form.choose_settings(
        base=ctx.base_name,
        resolution_px=ctx.resolution_px,
        photos_dir=photos,
        run_dir=run_dir,
        is_queued=is_queued,
    )

    # The run reads its own copies: a queued run may begin when the photos are gone.
    copies = RunDir(run_dir).photos_dir
    config = train_config.TrainConfig.from_dict(
        choices.all_settings | {"instance_data_dir": str(copies)}
    )
    run_dir.mkdir(parents=True)
    try:
        with ctx.workspace.changing:
            shutil.copytree(photos, copies)
        # Validate the settings as training will: here the form can still be changed.
        base = Base.of(config)
        check_base_settings(config, base)
        validate_settings(replace(config, **choose_family_settings(config, base)), base)
        yield PreparedRun(run_dir=run_dir, settings=config.to_dict(), lines=format_choices(config))
    except BaseException:
        shutil.rmtree(run_dir, ignore_errors=True)
        raise


def build_config(
    ctx: state.AppContext, form: TrainForm, photos: Sequence[Photo] = ()
) -> train_config.TrainConfig:
    """Build the settings of a run of this form, without its folder.

    `photos` are the page's usable ones, if they were read already. Raises UserError.
    """
    choices = form.choose_settings(
        base=ctx.base_name,
        resolution_px=ctx.resolution_px,
        photos_dir=ctx.workspace.required_photos_dir,
        run_dir=ctx.workspace.root / "run",
        photos=photos,
    )
    config = train_config.TrainConfig.from_dict(choices.all_settings)
    return replace(config, **choose_bucket_step(config, Base.of(config)))


def format_choices(config: train_config.TrainConfig) -> list[str]:
    """Describe in sentences what a run of the page does."""
    count = len(list_photo_copies(Path(config.instance_data_dir)))
    total = plan_steps(config, [max(1, count)]).total_steps
    lines = [f"{total} steps at {config.resolution} px, from {count} photo{'s' * (count != 1)}."]
    lines.append(f"“{config.instance_prompt}” will show your subject.")
    lines.append(f"Rank {config.rank}, learning rate {config.learning_rate:g}.")
    if config.with_prior_preservation and config.class_prompt:
        lines.append(f"“{config.class_prompt}” stays as the base draws it.")
    if config.masks == "auto":
        lines.append("The subject is found in photos without a mask.")
    elif not get_subject_kind(config).is_style:
        lines.append("Photos without a mask are learned whole; “Make masks” finds the subject.")
    if config.evaluate_steps:
        lines.append(f"Likeness is measured every {config.evaluate_steps} steps; the best is kept.")
    else:
        lines.append("Likeness is not measured; “Scores” does it.")
    return lines


SPEED_SETTINGS = (
    "pretrained_model_name_or_path",
    "resolution",
    "train_batch_size",
    "gradient_accumulation_steps",
    "with_prior_preservation",
)
"""Settings that decide most of a run's seconds per step."""


def describe_length(jobs: Jobs, config: train_config.TrainConfig, photos: int) -> str:
    """Return the number of steps, and the time that they take if a similar run was measured."""
    steps = plan_steps(config, [photos]).total_steps
    for job in jobs.list_jobs():
        metrics = jobs.load_metrics(job)
        start = metrics.get_last("start")
        old_config = start.get("config") or {}
        if any(old_config.get(name) != getattr(config, name) for name in SPEED_SETTINGS):
            continue
        # Its preparation, then its steps with the samples and scores between them.
        events = [event for event in metrics.list_since_start() if event.get("type") == "step"]
        times = [event["time"] for event in events]
        if len(times) > 1:
            step_sec = (times[-1] - times[0]) / (len(times) - 1)
            seconds = times[0] - start["time"] + steps * step_sec
            duration = html.format_seconds(seconds)
            return f"{steps} steps, about {duration} at the pace of the run {job.name}"
    return f"{steps} steps"


def free_run_dir(jobs: Jobs, form: TrainForm) -> Path:
    """Return a free folder by the form's name or class word; a number is added if it is in use."""
    name = str(form.run_name or form.class_word)
    # Replace characters that `RUN_NAME_PATTERN` does not allow by dashes.
    name = re.sub(r"[^\w.+-]+", "-", name)
    name = re.sub(r"\.{2,}", ".", name)
    name = re.sub(r"^[\W_]+", "", name)
    name = name[:MAX_RUN_NAME_CHARACTERS].rstrip(".-") or "run"
    return jobs.run_dir(
        find_free_name(name, lambda candidate: jobs.run_dir(candidate).exists(), "-")
    )


def estimate_cost(ctx: state.AppContext, form: TrainForm) -> str:
    """Estimate memory and disk, as HTML with the reasons folded below them.

    Raises UserError for whatever training would refuse.
    """
    from dreambooth_moslora.plan.plan import make_plan
    from dreambooth_moslora.training.dry_run import (
        describe_disk_lack,
        format_costs,
        list_plan_advice,
    )

    # The run's plan, without its folder.
    plan = make_plan(build_config(ctx, form), free_gib=train_form.measure_free_gib(), is_later=True)
    # The details: the choices, the memory plans, and advice.
    lines = [*describe_disk_lack(plan), *format_choices(plan.config)]
    details = [
        *format_costs(plan),
        *format_chosen_plan(plan.config),
        *format_plans(plan.config, plan.cost.size),
        *list_plan_advice(plan),
    ]
    lines += map(train_form.replace_flags, details)
    # The title: the two numbers that decide.
    memory = f"{plan.cost.peak_gib:.1f} GiB of memory"
    disk = f"{plan.cost.disk_gib:.2f} GiB on the disk"
    return html.render_folded(f"{memory} · {disk}", lines)
