"""Checkpoints: the raw adapter (A, M, B), the optimizer, and the position. Complete or absent.

Neither generator states nor the data order are in them: every draw is named by (seed, step) (see `seeding`), so the
step number is all that a run needs to go on as if it had never stopped.
"""

import json
import logging
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dreambooth_moslora.adapter_facts import AdapterFacts
from dreambooth_moslora.adapter_file import load_raw, save_raw
from dreambooth_moslora.errors import UserError, one_line
from dreambooth_moslora.rundir import RAW_NAME, RunDir, atomic_directory, atomic_write, is_checkpoint

__all__ = [
    "Position",
    "damaged",
    "find_checkpoint",
    "load_adapter",
    "read_position",
    "restore_optimizer",
    "save_checkpoint",
]

logger = logging.getLogger(__name__)

OPTIMIZER, SCALER, POSITION = "optimizer.pt", "scaler.pt", "position.json"


@dataclass(frozen=True)
class Position:
    """Where a run is: optimizer steps done, the seed that names every draw, and whose states are beside it.

    `optimizer` (`optimizer_kind`) is None in the files of early versions.
    """

    step: int
    seed: int
    optimizer: str | None = None


def save_checkpoint(
    path: Path,
    position: Position,
    components: dict[str, nn.Module],
    facts: AdapterFacts,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Write the folder `path` whole, or leave what was there."""
    with atomic_directory(path) as folder:
        save_raw(components, folder / RAW_NAME, facts)
        save_states(optimizer.state_dict(), folder / OPTIMIZER)
        if scaler is not None:
            save_states(scaler.state_dict(), folder / SCALER)
        atomic_write(folder / POSITION, json.dumps(asdict(position)))


def save_states(states: dict, path: Path) -> None:
    """By way of memory: `torch.save` to a full disk raises a RuntimeError that does not say so."""
    buffer = BytesIO()
    torch.save(states, buffer)
    atomic_write(path, buffer.getvalue())


def find_checkpoint(run_dir: RunDir, wanted: str | None) -> Path | None:
    """The folder to resume from: `latest` of the run (None, and a warning, if there is none), a path, or a name in it.

    Raises UserError when a named checkpoint is missing or incomplete.
    """
    if not wanted:
        return None
    if wanted == "latest":
        latest = run_dir.latest_checkpoint()
        if latest is None:
            logger.warning("--resume_from_checkpoint latest: %s", nothing_to_resume(run_dir))
        return latest
    for path in (Path(wanted), run_dir.path / wanted):
        if is_checkpoint(path):
            return path
    raise UserError(f"--resume_from_checkpoint {wanted}: no complete checkpoint there; try `latest`.")


def nothing_to_resume(run_dir: RunDir) -> str:
    incomplete = ", ".join(path.name for path in run_dir.named_checkpoints())
    there = f" ({incomplete}: not complete, or another program's)" if incomplete else ""
    return f"no complete checkpoint in {run_dir.path}{there}; starting at step 0."


def read_position(checkpoint: Path) -> Position:
    try:
        position = Position(**json.loads((checkpoint / POSITION).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise damaged(checkpoint, POSITION, error) from error
    if any(type(value) is not int or value < 0 for value in (position.step, position.seed)):
        raise damaged(checkpoint, POSITION, "step and seed are whole numbers")
    if not isinstance(position.optimizer, (str, type(None))):
        raise damaged(checkpoint, POSITION, "the optimizer is a name")
    return position


def damaged(checkpoint: Path, name: str, reason: object) -> UserError:
    return UserError(f"{checkpoint} is damaged ({name}: {one_line(reason)}); resume from another checkpoint.")


def load_states(checkpoint: Path, name: str) -> dict:
    """What `torch.save` wrote; nothing in it can run code. Raises UserError."""
    try:
        states = torch.load(checkpoint / name, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise whatever they like on damaged bytes
        raise damaged(checkpoint, name, error) from error
    if not isinstance(states, dict):
        raise damaged(checkpoint, name, "no states of an optimizer")
    return states


def load_adapter(checkpoint: Path, components: dict[str, nn.Module]) -> AdapterFacts:
    """Create the adapter on the components, bit for bit as it was saved."""
    return load_raw(checkpoint / RAW_NAME, components)


def restore_optimizer(
    checkpoint: Path, step: int, optimizer: Optimizer, schedule: LambdaLR, scaler: torch.amp.GradScaler | None = None
) -> None:
    """Moments as they were; learning rate and weight decay as the command line says now, at `step` of the schedule."""
    asked = [dict(group) for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(load_states(checkpoint, OPTIMIZER))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise damaged(checkpoint, OPTIMIZER, error) from error
    for group, fresh in zip(optimizer.param_groups, asked, strict=True):
        group.update({key: fresh[key] for key in ("name", "initial_lr", "weight_decay") if key in fresh})
    schedule.last_epoch = step
    for group, lr, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = lr * factor(step)
    if scaler is not None and (checkpoint / SCALER).is_file():
        scaler.load_state_dict(load_states(checkpoint, SCALER))
