"""From the Train tab's form to a run: everything is checked, the photos get a folder, and it starts or waits."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.names import free_name
from dreambooth_moslora.training.run_folders.run_queue import QueuedRun
from dreambooth_moslora.ui.app_state import AppContext
from dreambooth_moslora.ui.html_snippets import remarks_card
from dreambooth_moslora.ui.jobs.job import Job
from dreambooth_moslora.ui.jobs.jobs import Jobs, run_name_of
from dreambooth_moslora.ui.server.photo_uploads import ONE_AT_A_TIME
from dreambooth_moslora.ui.server.users import Visitor
from dreambooth_moslora.ui.train.form import TrainForm
from dreambooth_moslora.ui.train.more_subjects import folder_of, prompts_of

__all__ = ["add_to_queue", "free_run_dir", "start_run"]

BUSY = "another run is going on or waits; “Add to queue” lets this one wait for its turn"
MOST_WAITING = 20
CHOSEN = "Chosen; “More settings” changes it."


@dataclass(frozen=True)
class Prepared:
    """A new run folder with the photos in it, its settings, and what was chosen for them."""

    run_dir: Path
    settings: dict[str, Any]
    said: list[str]


def start_run(ctx: AppContext, jobs: Jobs, form: TrainForm, visitor: Visitor) -> tuple[Job, str]:
    """Check everything, move the photos into a new run folder, start the process.

    Returns the run, and what was chosen for it as HTML.
    """
    if jobs.current() or not ctx.queue.is_empty:
        raise UserError(BUSY)
    with prepared(ctx, jobs, form, visitor) as run:
        job = jobs.start(run.run_dir.name, run.settings, visitor.id)
    return job, remarks_card(run.said, CHOSEN)


def add_to_queue(ctx: AppContext, jobs: Jobs, form: TrainForm, visitor: Visitor) -> tuple[str, str]:
    """As `start_run`, but the run waits until those before it have ended. Returns its name, and HTML."""
    if sum(run.owner == visitor.id for run in ctx.queue.queue.waiting()) >= MOST_WAITING:
        raise UserError(f"{MOST_WAITING} runs of yours are waiting; remove one, or wait")
    with prepared(ctx, jobs, form, visitor, is_queued=True) as run:
        name = run.run_dir.name
        place = ctx.queue.queue.add(QueuedRun(name, visitor.id, settings=run.settings, is_new=True, queued=time.time()))
    return name, remarks_card(run.said, f"{name} waits, number {place} in the queue. {CHOSEN}")


@contextmanager
def prepared(
    ctx: AppContext, jobs: Jobs, form: TrainForm, visitor: Visitor, *, is_queued: bool = False
) -> Iterator[Prepared]:
    """The folder goes again when the block fails: photos that nobody trains would keep the name taken."""
    from dreambooth_moslora.core.config.train_config import TrainConfig

    photos = visitor.photos_dir
    if not visitor.has_photos:
        raise UserError("add some photos of your subject first")
    prompts_of(form.token, form.class_word)
    run_dir = free_run_dir(jobs, form)
    choices = form.choices(ctx.base_name, ctx.resolution_px, photos, run_dir, is_queued=is_queued)
    config = TrainConfig.from_dict(choices.all | form.photos_given(run_dir / "photos"))
    try:
        run_dir.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError("another run of that name is just being started; try again") from error
    try:
        with ONE_AT_A_TIME:
            for number in range(1, len(form.subjects) + 1):
                shutil.copytree(folder_of(photos, number), folder_of(run_dir / "photos", number))
        form.write_captions(run_dir / "photos")
        yield Prepared(run_dir, config.to_dict(), [words for words, _ in choices.said])
    except BaseException:
        shutil.rmtree(run_dir, ignore_errors=True)
        raise


def free_run_dir(jobs: Jobs, form: TrainForm) -> Path:
    """The wanted name, or one from the class words; a number is added when it is taken."""
    wanted = run_name_of(str(form.run_name or "-".join(str(words.class_word) for words in form.subjects)))
    return jobs.run_dir(free_name(wanted, lambda name: jobs.run_dir(name).exists(), "-"))
