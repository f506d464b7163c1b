"""Checkpoints, from which one a run goes on, and the files of earlier runs in its folder.

A checkpoint holds the raw adapter (A, M, B), the optimizer and the position, complete or absent.
Every draw is named by (seed, step) (see `seeds`), so the step number suffices to continue as if the
run had never stopped.

Files in the run folder that a new run does not continue, or would overwrite, are moved to
`earlier_run_1`.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dreambooth_moslora.base.devices import get_precision, get_world_size
from dreambooth_moslora.disk import events, run_folder
from dreambooth_moslora.disk.atomic import rename_with_retry, write_atomic, write_atomic_directory
from dreambooth_moslora.disk.contents import hash_file, hash_values, read_json
from dreambooth_moslora.disk.paths import find_free_name
from dreambooth_moslora.disk.run_folder import OPTIMIZER_NAME, POSITION_NAME, Position
from dreambooth_moslora.disk.safetensors_header import read_header
from dreambooth_moslora.errors import UserError, format_error
from dreambooth_moslora.lora import metadata, raw_file
from dreambooth_moslora.settings import setting_names, train_config
from dreambooth_moslora.settings.family_facts import DENOISERS
from dreambooth_moslora.training.optimizer import (
    copy_into,
    get_optimizer_name,
    merge_group_settings,
)
from dreambooth_moslora.training.prepare import COMPANION
from dreambooth_moslora.training.reporter import RunContext

logger = logging.getLogger(__name__)

SCALER_NAME = "scaler.pt"
"""State of the gradient scaler, in checkpoints of fp16 runs."""
WEIGHTS_NAME = "weights.pt"
"""The weights that training continues from, if the checkpoint's adapter is their average."""
SINGLE_START_SETTINGS = ("output_dir", "resume_from_checkpoint", "dry_run")
"""Settings of one start of a run, which say nothing of what it trains."""
MAX_LISTED_FILES = 10
"""Changed photos that are listed; more are counted."""


def save_checkpoint(
    path: Path,
    position: Position,
    components: dict[str, torch.nn.Module],
    facts: metadata.AdapterMetadata,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler | None = None,
    weights: list[torch.Tensor] | None = None,
) -> None:
    """Write a checkpoint completely, or leave the old content of its folder.

    path: the folder
    position: where the run is; its digest is computed here
    components: the modules that hold the adapter
    facts: of the adapter, for its file's header
    optimizer, scaler: whose states are written
    weights: those behind an average, if the components hold one
    """
    with write_atomic_directory(path) as folder:
        # What is learnt.
        raw_file.save_raw(components, folder / run_folder.RAW_NAME, facts)

        # What the next step needs of the steps before.
        save_states(optimizer.state_dict(), folder / OPTIMIZER_NAME)
        if scaler is not None:
            save_states(scaler.state_dict(), folder / SCALER_NAME)
        if weights is not None:
            save_states({"weights": [weight.cpu() for weight in weights]}, folder / WEIGHTS_NAME)

        # Last the position, with a digest of all the others.
        position = replace(position, digest=digest_checkpoint(folder, position))
        write_atomic(folder / POSITION_NAME, json.dumps(asdict(position)))


def digest_checkpoint(checkpoint: Path, position: Position) -> str:
    """SHA-256 of the position and of the bytes of all parts."""
    names = (run_folder.RAW_NAME, OPTIMIZER_NAME, SCALER_NAME, WEIGHTS_NAME)
    parts = [checkpoint / name for name in names]
    parts = [path for path in parts if path.is_file()]
    files = {path.name: hash_file(path) for path in parts}
    facts = asdict(replace(position, digest=""))
    # Earlier versions wrote none of these, and their digests hold.
    for name in ("settings", "photos"):
        if not facts[name]:
            del facts[name]
    return hash_values(**facts, files=files)


def verify_checkpoint(checkpoint: Path) -> Position:
    """Return the checkpoint's position. Raises UserError when that cannot be read, and when its
    files were changed or belong to different checkpoints."""
    try:
        position = read_json(checkpoint / POSITION_NAME, Position)
    except UserError as error:
        raise build_damage_error(checkpoint, POSITION_NAME, error) from error
    if position.digest != digest_checkpoint(checkpoint, position):
        raise build_damage_error(
            checkpoint,
            POSITION_NAME,
            "the files beside it were changed, or are of another checkpoint",
        )
    return position


def save_states(states: dict, path: Path) -> None:
    """Write through memory: on a full disk `torch.save` raises a RuntimeError that does not say
    so."""
    buffer = BytesIO()
    torch.save(states, buffer)
    write_atomic(path, buffer.getvalue())


def build_damage_error(checkpoint: Path, name: str, reason: object) -> UserError:
    return UserError(
        f"{checkpoint} is damaged ({name}: {format_error(reason)}); resume from another checkpoint."
    )


def load_states(checkpoint: Path, name: str) -> dict:
    """Read what `torch.save` wrote; its content cannot run code. Raises UserError when it is
    damaged."""
    try:
        states = torch.load(checkpoint / name, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise whatever they like on damaged bytes
        raise build_damage_error(checkpoint, name, error) from error
    return states


def restore_optimizer(
    checkpoint: Path,
    step: int,
    optimizer: Optimizer,
    schedule: LambdaLR,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Restore the optimizer's moments, with the current settings, and the rates of `step`.

    checkpoint: the folder to read
    step: the steps that are done
    optimizer, schedule, scaler: changed in place

    Raises UserError for a damaged file.
    """
    states = load_states(checkpoint, OPTIMIZER_NAME)
    optimizer.load_state_dict(merge_group_settings(states, optimizer))

    # The rate is computed anew, so that a resumed run may have another.
    schedule.last_epoch = step
    for group, lr, factor in zip(
        optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = lr * factor(step)

    # A run without fp16 wrote no scaler.
    if scaler is not None and (checkpoint / SCALER_NAME).is_file():
        scaler.load_state_dict(load_states(checkpoint, SCALER_NAME))


def restore_weights(checkpoint: Path, parameters: list[torch.nn.Parameter]) -> None:
    """Restore the weights behind an average."""
    copy_into(load_states(checkpoint, WEIGHTS_NAME)["weights"], parameters)


def find_checkpoint(run_dir: run_folder.RunDir, name: str | None) -> Path | None:
    """Return the checkpoint that `name` says: a path, a name in the run, or `latest`.

    `latest` is the newest that is not damaged; without one it is None, with a warning. Raises
    UserError for a name or path that is no checkpoint.
    """
    if not name:
        return None

    # A name: it may lie in another run's folder.
    if name != "latest":
        for path in (Path(name), run_dir.path / name):
            if run_folder.is_checkpoint(path):
                return path
        raise UserError(
            f"--resume_from_checkpoint {name}: no complete checkpoint there; try `latest`."
        )

    # `latest`: the newest whose files are whole.
    for checkpoint in reversed(run_dir.list_checkpoints()):
        try:
            verify_checkpoint(checkpoint)
        except UserError as error:
            logger.warning("--resume_from_checkpoint latest skips %s: %s", checkpoint.name, error)
        else:
            return checkpoint

    logger.warning(
        "--resume_from_checkpoint latest: no complete checkpoint in %s; starting at step 0.",
        run_dir.path,
    )
    return None


def find_resume_point(
    config: train_config.TrainConfig, run_dir: run_folder.RunDir
) -> tuple[Path, Position] | None:
    """Return the checkpoint to resume from and its position; None for a fresh run. Raises
    UserError."""
    checkpoint = find_checkpoint(run_dir, config.resume_from_checkpoint)
    if checkpoint is None:
        return None
    position = verify_checkpoint(checkpoint)
    check_resumed_settings(config, checkpoint, position)
    return checkpoint, position


def check_resumed_settings(
    config: train_config.TrainConfig, checkpoint: Path, position: Position
) -> None:
    """Raise UserError for the first setting that differs from the checkpoint's, and for a damaged
    adapter file."""
    facts, modules = read_adapted_modules(checkpoint)
    asked_optimizer = get_optimizer_name(config)
    if position.optimizer != asked_optimizer:
        raise UserError(
            f"{checkpoint.name} was written with {position.optimizer}; "
            f"you ask for {asked_optimizer}: "
            "resume with the same optimizer, or start a new run."
        )
    for name, saved, current in compare_settings(config, position.seed, facts, modules):
        if saved != current:
            raise UserError(
                f"--{name}: {checkpoint.name} has {format_setting(saved)}; "
                f"you ask for {format_setting(current)}: "
                "resume without it, or start a new run."
            )


def compare_bases(
    config: train_config.TrainConfig,
    checkpoint: Path | None,
    position: Position,
    base: Mapping[str, str],
) -> list[str]:
    """List the encoders and the VAE that a resumed run has otherwise than its checkpoint, a line
    each.

    config: what the run asks for
    checkpoint: what it goes on from; None for a fresh run
    position: of the checkpoint; one of an earlier version tells no digests
    base: the digests of the run's base, as `identify_base` returns them

    Raises UserError for a denoiser with other weights, and for another companion.
    """
    if checkpoint is None or isinstance(position.base, str):
        return []
    changes = compare_files(position.base, base)

    # Another variant of the same base has other bytes everywhere.
    if position.settings.get("variant") != config.variant:
        changes = {part: change for part, change in changes.items() if part == COMPANION}
    if not changes.keys().isdisjoint((*DENOISERS, COMPANION)):
        raise UserError(
            f"--base, --companion: {checkpoint.name} was trained on a base with "
            "other weights: resume with that one, or start a new run."
        )
    return [f"{part}: {change}" for part, change in changes.items()]


def compare_settings(
    config: train_config.TrainConfig,
    seed: int,
    facts: metadata.AdapterMetadata,
    modules: set[str],
) -> Iterator[tuple[str, object, object]]:
    """Yield each setting that a resumed run must share with its checkpoint.

    config: what the run asks for
    seed: of the checkpoint
    facts: in the header of the checkpoint's adapter
    modules: the modules that are adapted there, `component.path`

    Yields (name, the checkpoint's value, the command line's).
    """
    if config.seed is not None:
        yield "seed", seed, config.seed

    # What is trained beside the denoiser.
    has_text = any(module.startswith("text_encoder") for module in modules)
    yield "train_text_encoder", has_text, config.train_text_encoder

    # Rank and alpha of each module, which a pattern may give.
    rank_name = "rank_pattern" if config.rank_pattern else "rank"
    alpha_name = "alpha_pattern" if config.alpha_pattern else "lora_alpha"
    for module in sorted(modules):
        rank, alpha = train_config.get_rank_and_alpha(config, *module.split(".", 1))
        yield rank_name, facts.ranks.get(module, facts.rank), rank
        yield alpha_name, facts.alphas.get(module, facts.alpha), alpha

    # The settings that the table says have to be the same. Without a mixer none is trained.
    for name in setting_names.list_settings("same_on_resume"):
        if name != "train_mixer" or config.mixer != "none":
            yield name, getattr(facts, name), getattr(config, name)


def resolve_settings(config: train_config.TrainConfig) -> dict[str, Any]:
    """Return the settings by name, as JSON, with the precision and the processes that accelerate
    uses."""
    return config.to_dict() | {
        "mixed_precision": get_precision(config),
        "processes": get_world_size(),
    }


def list_changes(
    position: Position, config: train_config.TrainConfig, photos: Mapping[str, str]
) -> list[str]:
    """List what a resumed run trains with otherwise than its checkpoint, a line each.

    position: of the checkpoint; one of an earlier version tells no settings and no photos
    config: what the run asks for, resolved
    photos: its photos and the files beside them, as `hash_files` returns them
    """
    # Settings.
    before, now = position.settings, resolve_settings(replace(config, seed=position.seed))
    lines = []
    for name, value in now.items():
        if name in before and name not in SINGLE_START_SETTINGS and before[name] != value:
            change = f"{format_setting(before[name])} -> {format_setting(value)}"
            lines.append(f"{setting_names.get_flag_name(name)}: {change}")

    # Files, but for the photos that a changed --leave_out tells.
    if not position.photos:
        return lines
    changed_photos = {*config.leave_out} ^ {*before["leave_out"]}
    changes = compare_files(position.photos, photos)
    changes = {
        name: change for name, change in changes.items() if Path(name).name not in changed_photos
    }
    if len(changes) <= MAX_LISTED_FILES:
        return [*lines, *(f"{name}: {change}" for name, change in changes.items())]
    counts = sorted(Counter(changes.values()).items())
    summary = ", ".join(f"{count} {change}" for change, count in counts)
    return [*lines, f"photos and the files beside them: {summary}"]


def compare_files(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """Return the names whose digests differ, each with "added", "removed" or "replaced"."""
    changes = {}
    for name in sorted(before.keys() | now.keys()):
        if name not in before:
            changes[name] = "added"
        elif name not in now:
            changes[name] = "removed"
        elif now[name] != before[name]:
            changes[name] = "replaced"
    return changes


def format_setting(value: object) -> str:
    """Format a setting for a message: a number in the shorter of the forms 0.01 and 1e-4."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "not set"
    if isinstance(value, float):
        exponential = np.format_float_scientific(value, trim="-", exp_digits=1)
        return min(f"{value:g}", exponential, key=len)
    return "not set" if value is None else str(value)


def read_adapted_modules(checkpoint: Path) -> tuple[metadata.AdapterMetadata, set[str]]:
    """Return the metadata in the adapter file's header, and the adapted modules (`component.path`).
    Raises UserError."""
    try:
        header = read_header(checkpoint / run_folder.RAW_NAME)
        facts = metadata.AdapterMetadata.from_json(header.metadata["moslora"])
        return facts, {key.rpartition(".")[0] for key in header.shapes if "." in key}
    # safetensors raises its own kind, the disk another, and a header may hold anything
    except Exception as error:
        raise build_damage_error(checkpoint, run_folder.RAW_NAME, error) from None


def has_previous_run(run_dir: run_folder.RunDir) -> bool:
    """Return whether a checkpoint or an adapter exists; metrics alone come from a run without a
    result."""
    return bool(
        run_dir.list_checkpoint_folders()
        or filter_existing(run_dir.adapter_path, run_dir.kohya_path, run_dir.best_dir)
    )


def move_later_checkpoints(run_dir: run_folder.RunDir, step: int) -> None:
    """Move checkpoints after `step` away: otherwise `latest` would later resume the abandoned
    run."""
    folders = reversed(run_dir.list_checkpoint_folders())
    later = [path for path in folders if run_folder.read_checkpoint_step(path) > step]
    scored = run_dir.read_scores()
    if scored and scored[-1].best and scored[-1].best["step"] > step:
        later += filter_existing(run_dir.best_dir)
    move_to_earlier_run(
        later, run_dir, f"held checkpoints after step {step}, from which this run goes on"
    )


def filter_existing(*paths: Path) -> list[Path]:
    return [path for path in paths if path.exists()]


def move_to_earlier_run(paths: list[Path], run_dir: run_folder.RunDir, reason: str) -> None:
    """Move these into the next `earlier_run_1` of the run folder, and say so. Nothing happens
    without any paths."""
    if not paths:
        return

    def is_taken(name: str) -> bool:
        return (run_dir.path / name).exists()

    home = run_dir.path / find_free_name("earlier_run", is_taken, is_numbered=True)
    home.mkdir()
    for path in paths:
        place = home / path.relative_to(run_dir.path)
        place.parent.mkdir(parents=True, exist_ok=True)
        rename_with_retry(path, place)
    logger.warning("%s %s: moved to %s.", run_dir.path, reason, home.name)


def report_start(
    config: train_config.TrainConfig, context: RunContext, step: int, max_train_steps: int
) -> None:
    """Report the start. A folder without an earlier run is claimed at once, so that the run can be
    watched."""
    context.report(
        events.RunStarted(max_train_steps, config.to_dict(), context.accelerator.num_processes)
    )
    if step == 0 and not has_previous_run(context.run_dir):
        claim_run_folder(config, context, step)


def claim_run_folder(
    config: train_config.TrainConfig, context: RunContext, step: int, checkpoint: Path | None = None
) -> None:
    """Claim the folder when all is prepared: only then an earlier run that is not resumed is moved
    away.

    config: the run's settings, which are written there
    context: its folder, processes and reporter
    step: the steps that are done
    checkpoint: what it goes on from, if anything; it may be of another folder
    """
    run_dir, report = context.run_dir, context.report

    # A folder without an earlier run was claimed at the start.
    if report.pending_events is None or not context.accelerator.is_main_process:
        return

    # A run goes on in its own folder: what came after the checkpoint is of an abandoned run.
    is_own = checkpoint is not None and checkpoint.resolve().parent == run_dir.path.resolve()
    if is_own:
        move_later_checkpoints(run_dir, step)
    elif has_previous_run(run_dir):
        earlier = filter_existing(*list_run_files(run_dir), *report.earlier_curves)
        move_to_earlier_run(earlier, run_dir, "held an earlier run")

    # From here on the folder is this run's. Events that are left are of one that failed here.
    write_settings(config, run_dir)
    report.begin_from_step(step if is_own else 0)


def list_run_files(run_dir: run_folder.RunDir) -> list[Path]:
    """Return the paths where a run may have left results. Class images are not among them, since a
    new run can use them, nor is `train.log`, which continues."""
    weights = [*run_dir.list_checkpoint_folders(), run_dir.best_dir]
    # The folder may have had another name when kohya's file was written.
    adapter = [run_dir.adapter_path, *run_dir.path.glob(f"*{run_folder.KOHYA_SUFFIX}")]
    facts = [run_dir.metrics_path, run_dir.config_path, run_dir.card_path, run_dir.loss_plot_path]

    # The card names its images; samples and the sheet have their places.
    card_images = sorted(run_folder.list_card_pictures(run_dir.read_card() or ""))
    images = [run_dir.path / name for name in card_images]
    images += [run_dir.samples_dir, run_dir.contact_sheet_path]

    # Evaluations of the run, and of single files.
    evaluations = sorted(run_dir.path.glob(f"*{run_dir.evaluation_dir.name}"))
    return [*weights, *adapter, *facts, *images, *evaluations]


def write_settings(config: train_config.TrainConfig, run_dir: run_folder.RunDir) -> None:
    """Write `train_config.json`, whole or not at all."""
    write_atomic(run_dir.config_path, json.dumps(config.to_dict(), indent=2, default=str))
