"""From a filled form to a run.

A run is started, queued, or told what it will cost, as `--dry_run` estimates it.
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
from dreambooth_moslora.disk.paths import free_name
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.photos.photo_file import Photo
from dreambooth_moslora.plan.memory_plans import plan_lines
from dreambooth_moslora.plan.plan import plan_steps
from dreambooth_moslora.plan.validation import own_bucket_step
from dreambooth_moslora.settings import train_config
from dreambooth_moslora.settings.subject_kinds import kind_of
from dreambooth_moslora.ui import html, state
from dreambooth_moslora.ui.jobs import MAX_RUN_NAME, Job, Jobs
from dreambooth_moslora.ui.photo_copies import kept_photos
from dreambooth_moslora.ui.train import train_form
from dreambooth_moslora.ui.train.train_form import TrainForm

BUSY = "another run is going on or waits; “Add to queue” lets this one wait for its turn"
"""Why a run is not started."""
CHOSEN = "“More settings” changes this:"
"""Told above what was chosen for a run."""


@dataclass(frozen=True)
class Prepared:
    """A new run folder with the photos in it, its settings, and what was chosen for them."""

    run_dir: Path
    settings: dict[str, Any]
    said: list[str]


def start_run(ctx: state.AppContext, form: TrainForm) -> tuple[Job, str]:
    """The started run, and what was chosen for it as HTML. Raises UserError."""
    if ctx.jobs.current() or not ctx.queue.is_empty:
        raise UserError(BUSY)
    with prepared(ctx, form) as run:
        job = ctx.jobs.start(run.run_dir.name, run.settings)
    return job, html.remarks_card(run.said, f"Chosen for {job.name}. {CHOSEN}")


def add_to_queue(ctx: state.AppContext, form: TrainForm) -> tuple[str, str]:
    """The name of the run, which waits until those before it have ended, and HTML.

    Raises UserError.
    """
    with prepared(ctx, form, is_queued=True) as run:
        name = run.run_dir.name
        queued = queue.QueuedRun(name, settings=run.settings, queued=time.time())
        place = ctx.queue.queue.add(queued)
    return name, html.remarks_card(run.said, f"{name} waits, number {place} in the queue. {CHOSEN}")


@contextmanager
def prepared(
    ctx: state.AppContext,
    form: TrainForm,
    *,
    is_queued: bool = False,
) -> Iterator[Prepared]:
    """Prepare the run folder.

    It is deleted when the block fails, which frees its name. With `is_queued` the run begins when
    all others have ended. Raises UserError.
    """
    from dreambooth_moslora.plan.validation import check_settings, family_settings

    # The settings, as the page's photos give them.
    photos = ctx.workspace.given_photos
    form.check_words()
    run_dir = free_run_dir(ctx.jobs, form)
    choices = form.choices(
        base=ctx.base_name,
        resolution_px=ctx.resolution_px,
        photos_dir=photos,
        run_dir=run_dir,
        is_queued=is_queued,
    )

    # The run reads its own copies: a queued run may begin when the photos are gone.
    copies = RunDir(run_dir).photos_dir
    config = train_config.TrainConfig.from_dict(choices.all | {"instance_data_dir": str(copies)})
    run_dir.mkdir(parents=True)
    try:
        with ctx.workspace.changing:
            shutil.copytree(photos, copies)
        # What training would refuse is refused here, where the form can still be changed.
        base = Base.of(config)
        check_settings(replace(config, **family_settings(config, base)), base)
        yield Prepared(run_dir=run_dir, settings=config.to_dict(), said=chosen_lines(config))
    except BaseException:
        shutil.rmtree(run_dir, ignore_errors=True)
        raise


def settings_of(
    ctx: state.AppContext, form: TrainForm, photos: Sequence[Photo] = ()
) -> train_config.TrainConfig:
    """The settings of a run of this form, whose folder is not made.

    `photos` are the page's usable ones, if they were read already. Raises UserError.
    """
    choices = form.choices(
        base=ctx.base_name,
        resolution_px=ctx.resolution_px,
        photos_dir=ctx.workspace.given_photos,
        run_dir=ctx.workspace.root / "run",
        photos=photos,
    )
    config = train_config.TrainConfig.from_dict(choices.all)
    return replace(config, **own_bucket_step(config, Base.of(config)))


def chosen_lines(config: train_config.TrainConfig) -> list[str]:
    """What a run of the page does, in a sentence each."""
    count = len(kept_photos(Path(config.instance_data_dir)))
    total = plan_steps(config, [max(1, count)]).total_steps
    lines = [f"{total} steps at {config.resolution} px, from {count} photo{'s' * (count != 1)}."]
    lines.append(f"“{config.instance_prompt}” will show your subject.")
    lines.append(f"Rank {config.rank}, learning rate {config.learning_rate:g}.")
    if config.with_prior_preservation and config.class_prompt:
        lines.append(f"“{config.class_prompt}” stays as the base draws it.")
    if config.masks == "auto":
        lines.append("The subject is found in photos without a mask.")
    elif not kind_of(config).is_style:
        lines.append("Photos without a mask are learned whole; “Make masks” finds the subject.")
    if config.evaluate_steps:
        lines.append(f"Likeness is measured every {config.evaluate_steps} steps; the best is kept.")
    else:
        lines.append("Likeness is not measured; “Scores” does it.")
    return lines


def free_run_dir(jobs: Jobs, form: TrainForm) -> Path:
    """The wanted name, or one from the class words; a number is added when it is taken."""
    wanted = str(form.run_name or form.class_word)
    # What a RUN_NAME may have, and dashes for the rest.
    wanted = re.sub(r"[^\w.+-]+", "-", wanted)
    wanted = re.sub(r"\.{2,}", ".", wanted)
    wanted = re.sub(r"^[\W_]+", "", wanted)
    wanted = wanted[:MAX_RUN_NAME].rstrip(".-") or "run"
    return jobs.run_dir(free_name(wanted, lambda name: jobs.run_dir(name).exists(), "-"))


def estimate_cost(ctx: state.AppContext, form: TrainForm) -> str:
    """Memory and disk as HTML, and folded below them what they follow from.

    Raises UserError for whatever training would refuse.
    """
    from dreambooth_moslora.plan.plan import make_plan
    from dreambooth_moslora.training.dry_run import advice, cost_lines, lack_of_disk

    # The run's plan. Its folder is not made.
    plan = make_plan(settings_of(ctx, form), free_gib=train_form.free_gib(), is_later=True)
    # Line by line: what it does, the memory, and what could be better.
    lines = [*lack_of_disk(plan), *chosen_lines(plan.config)]
    told = [*cost_lines(plan), *plan_lines(plan.config, plan.cost.size), *advice(plan)]
    lines += map(train_form.in_the_forms_words, told)
    # The two numbers that decide.
    memory = f"{plan.cost.peak_gib:.1f} GiB of memory"
    disk = f"{plan.cost.disk_gib:.2f} GiB on the disk"
    return html.folded_card(f"{memory} · {disk}", lines)
