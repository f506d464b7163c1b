"""Checkpoints: the raw adapter (A, M, B), the optimizer and the position, complete or absent.

They need neither generator states nor the data order: every draw is named by (seed, step) (see `core.seeding`),
so the step number suffices to continue as if the run had never stopped.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dreambooth_moslora.adapters.files.metadata import AdapterMetadata
from dreambooth_moslora.adapters.files.raw_file import load_raw, save_raw
from dreambooth_moslora.adapters.new_tokens import NewTokens, notes_of, write_tokens
from dreambooth_moslora.core.atomic_files import atomic_directory, atomic_write
from dreambooth_moslora.core.digests import content_key, file_digest
from dreambooth_moslora.core.errors import UserError, one_line
from dreambooth_moslora.core.run_files.run_folder import RAW_NAME, checkpoint_step, tokens_files, tokens_name
from dreambooth_moslora.training.step.averages import put
from dreambooth_moslora.training.step.optimizer_states import check_tensor, checked_states

__all__ = [
    "Position",
    "check_whole",
    "damaged",
    "load_adapter",
    "read_position",
    "restore_optimizer",
    "restore_weights",
    "save_checkpoint",
]

OPTIMIZER, SCALER, POSITION = "optimizer.pt", "scaler.pt", "position.json"
WEIGHTS = "weights.pt"
"""The weights that training continues from, when the checkpoint's adapter is their average."""


@dataclass(frozen=True)
class Position:
    """Where a run is: the optimizer steps done, the seed that names every draw, and the kind of the saved optimizer.

    `digest` covers the position and the files beside it (`digest_of`), so that mixed or changed files are
    detected. `optimizer` (`optimizer_kind`) and `digest` may be None.
    """

    step: int
    seed: int
    optimizer: str | None = None
    digest: str | None = None


def save_checkpoint(
    path: Path,
    position: Position,
    components: dict[str, nn.Module],
    facts: AdapterMetadata,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler | None = None,
    weights: list[Tensor] | None = None,
    tokens: Sequence[NewTokens] = (),
) -> None:
    """Write the folder `path` completely, or leave its old content. `weights` are those of WEIGHTS, if any, in
    the shapes of the trained parameters."""
    with atomic_directory(path) as folder:
        for number, of_one in enumerate(tokens):
            write_tokens(folder / tokens_name(number=number), of_one)
        facts = replace(facts, tokens=notes_of(tokens))
        save_raw(components, folder / RAW_NAME, facts)
        save_states(optimizer.state_dict(), folder / OPTIMIZER)
        if scaler is not None:
            save_states(scaler.state_dict(), folder / SCALER)
        if weights is not None:
            save_states({"weights": [weight.cpu() for weight in weights]}, folder / WEIGHTS)
        position = replace(position, digest=digest_of(folder, position))
        atomic_write(folder / POSITION, json.dumps(asdict(position)))


def digest_of(checkpoint: Path, position: Position) -> str:
    """SHA-256 of the position and of the bytes of all parts."""
    names = (RAW_NAME, OPTIMIZER, SCALER, WEIGHTS)
    parts = [path for name in names if (path := checkpoint / name).is_file()]
    files = {path.name: file_digest(path) for path in [*parts, *tokens_files(checkpoint)]}
    return content_key(step=position.step, seed=position.seed, optimizer=position.optimizer, files=files)


def check_whole(checkpoint: Path) -> Position:
    """The checkpoint's position. Raises UserError when its files were changed, or belong to different checkpoints."""
    position = read_position(checkpoint)
    named = checkpoint_step(checkpoint)
    if named is not None and named != position.step:
        raise damaged(checkpoint, POSITION, f"it is of step {position.step}")
    if position.digest is not None and position.digest != digest_of(checkpoint, position):
        raise damaged(checkpoint, POSITION, "the files beside it were changed, or are of another checkpoint")
    return position


def save_states(states: dict, path: Path) -> None:
    """Write through memory: on a full disk `torch.save` raises a RuntimeError that does not say so."""
    buffer = BytesIO()
    torch.save(states, buffer)
    atomic_write(path, buffer.getvalue())


def read_position(checkpoint: Path) -> Position:
    try:
        position = Position(**json.loads((checkpoint / POSITION).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise damaged(checkpoint, POSITION, error) from error
    if any(type(value) is not int or value < 0 for value in (position.step, position.seed)):
        raise damaged(checkpoint, POSITION, "step and seed are whole numbers")
    if not all(isinstance(value, (str, type(None))) for value in (position.optimizer, position.digest)):
        raise damaged(checkpoint, POSITION, "optimizer and digest are words")
    return position


def damaged(checkpoint: Path, name: str, reason: object) -> UserError:
    return UserError(f"{checkpoint} is damaged ({name}: {one_line(reason)}); resume from another checkpoint.")


def load_states(checkpoint: Path, name: str) -> dict:
    """Read what `torch.save` wrote; its content cannot run code. Raises UserError when it is damaged."""
    try:
        states = torch.load(checkpoint / name, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise whatever they like on damaged bytes
        raise damaged(checkpoint, name, error) from error
    if not isinstance(states, dict):
        raise damaged(checkpoint, name, "no states of an optimizer")
    return states


def load_adapter(checkpoint: Path, components: dict[str, nn.Module]) -> AdapterMetadata:
    """Create the adapter on the components, bit for bit as it was saved. Raises UserError for a damaged file."""
    return load_raw(checkpoint / RAW_NAME, components)


def restore_optimizer(
    checkpoint: Path, step: int, optimizer: Optimizer, schedule: LambdaLR, scaler: torch.amp.GradScaler | None = None
) -> None:
    """Restore the optimizer's moments, with the settings of the command line, at `step` of the schedule.

    Raises UserError for states that do not fit this optimizer at that step.
    """
    exact = isinstance(optimizer, torch.optim.AdamW) and scaler is None  # early versions counted what fp16 skipped
    states = load_states(checkpoint, OPTIMIZER)
    try:
        optimizer.load_state_dict(checked_states(states, optimizer, step, exact))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise damaged(checkpoint, OPTIMIZER, error) from error
    schedule.last_epoch = step
    for group, lr, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = lr * factor(step)
    if scaler is not None and (checkpoint / SCALER).is_file():
        scaler.load_state_dict(load_states(checkpoint, SCALER))


def restore_weights(checkpoint: Path, parameters: list[nn.Parameter]) -> None:
    """Restore the weights behind an average. Raises UserError when they are not finite or belong to another adapter."""
    try:
        weights = load_states(checkpoint, WEIGHTS)["weights"]
        for number, (weight, parameter) in enumerate(zip(weights, parameters, strict=True)):
            check_tensor(f"weight {number}", weight, parameter)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(checkpoint, WEIGHTS, error) from error
    put(weights, parameters)
