"""Claims a run folder: files of an earlier run that the new one does not continue are moved to `earlier_run_1`.

set_aside                    for a new run: all that the earlier one left
archive_checkpoints_after    for a resumed run: later checkpoints, and a best step after that step

Files of other programs are moved as well, if the new run would overwrite them.
"""

import json
import logging
from pathlib import Path

from dreambooth_moslora.core.atomic_files import atomic_write
from dreambooth_moslora.core.names import free_name
from dreambooth_moslora.core.run_files.events import RunStarted, StepEvaluated, events_of
from dreambooth_moslora.core.run_files.run_folder import RunDir, pictures_named, step_of
from dreambooth_moslora.training.run_context import RunContext

__all__ = ["report_start", "claim_run_folder", "has_previous_run", "set_aside", "archive_checkpoints_after"]

logger = logging.getLogger(__name__)


def has_previous_run(run_dir: RunDir) -> bool:
    """Whether a checkpoint or an adapter exists; metrics alone come from a run without a result."""
    return bool(run_dir.named_checkpoints() or present(run_dir.adapter_path, run_dir.kohya_path, run_dir.best_dir))


def set_aside(run_dir: RunDir) -> None:
    """Move an earlier run away. Class images stay, since the new run can use them; so does the log, which continues."""
    if has_previous_run(run_dir):
        move(what_was_left(run_dir), run_dir, "held an earlier run")


def what_was_left(run_dir: RunDir) -> list[Path]:
    pictures = [run_dir.path / name for name in sorted(pictures_named(run_dir.read_card() or ""))]
    adapter = [run_dir.adapter_path, run_dir.mixers_path, *published_as(run_dir)]
    weights = [*run_dir.named_checkpoints(), run_dir.best_dir, *adapter]
    facts = [run_dir.metrics_path, run_dir.config_path, run_dir.card_path, run_dir.loss_plot_path]
    return present(*weights, *facts, *pictures, run_dir.samples_dir, run_dir.contact_sheet_path)


def published_as(run_dir: RunDir) -> list[Path]:
    """Files that have the folder's name in theirs; it may have been another when they were written."""
    return sorted(
        path for pattern in ("*.kohya.safetensors", "*_emb.safetensors") for path in run_dir.path.glob(pattern)
    )


def set_renamed_aside(run_dir: RunDir) -> None:
    """Move files away that a resumed run would not replace, as they have an earlier name of the folder."""
    own = {run_dir.kohya_path, *run_dir.tokens_paths}
    if renamed := [path for path in published_as(run_dir) if path not in own]:
        move(renamed, run_dir, "held files with an earlier name of the folder")


def archive_checkpoints_after(run_dir: RunDir, step: int) -> None:
    """Move checkpoints after `step` away: otherwise `latest` would later resume the abandoned run."""
    later = [path for path in reversed(run_dir.named_checkpoints()) if step_of(path) > step]
    scored = events_of(StepEvaluated, run_dir.read_metrics())
    if scored and scored[-1].best["step"] > step:
        later += present(run_dir.best_dir)
    if later:
        move(later, run_dir, f"held checkpoints after step {step}, from which this run goes on")


def present(*paths: Path) -> list[Path]:
    return [path for path in paths if path.exists()]


def move(paths: list[Path], run_dir: RunDir, what: str) -> None:
    home = run_dir.path / free_name("earlier_run", lambda name: (run_dir.path / name).exists(), is_numbered=True)
    home.mkdir()
    for path in paths:
        path.rename(home / path.name)
    logger.warning("%s %s: moved to %s.", run_dir.path, what, home.name)


def report_start(context: RunContext, step: int, max_train_steps: int) -> None:
    """Report the start. A folder without an earlier run is claimed at once, so that the run can be watched."""
    context.report(RunStarted(max_train_steps, context.config.to_dict()))
    if step == 0 and not has_previous_run(context.run_dir):
        claim_run_folder(context, step)


def claim_run_folder(context: RunContext, step: int, checkpoint: Path | None = None) -> None:
    """Claim the run folder. It happens late, when all is prepared: only then is an earlier run moved away.

    The resolved configuration is written. A run resumed from a `checkpoint` in this folder continues its
    metrics; for a checkpoint from elsewhere, the folder's files belong to another run.
    """
    run_dir, report = context.run_dir, context.report
    if report.has_begun or not context.accelerator.is_main_process:
        return
    goes_on = checkpoint is not None and checkpoint.resolve().parent == run_dir.path.resolve()
    if goes_on:
        archive_checkpoints_after(run_dir, step)
        set_renamed_aside(run_dir)
    else:
        set_aside(run_dir)
    atomic_write(run_dir.config_path, json.dumps(context.config.to_dict(), indent=2, default=str))
    report.begin_at(step)
