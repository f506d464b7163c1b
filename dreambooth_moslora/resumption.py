"""What a checkpoint fixes: settings that a resumed run cannot change, because they made the adapter that it loads.

A flag that says otherwise would do nothing, and the card and the configuration would tell what was not trained.
"""

from pathlib import Path

from safetensors import safe_open

from dreambooth_moslora.adapter_facts import AdapterFacts
from dreambooth_moslora.checkpoint import Position, damaged, find_checkpoint, read_position
from dreambooth_moslora.config import TrainConfig
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.optimization import optimizer_kind
from dreambooth_moslora.rundir import RAW_NAME, RunDir
from dreambooth_moslora.targets import is_target, last_name

__all__ = ["check_resumed", "resume_point", "trained_modules"]


def resume_point(config: TrainConfig, run_dir: RunDir) -> tuple[Path, Position] | None:
    """The checkpoint to go on from and where it stands; None for a run from the beginning. Raises UserError."""
    checkpoint = find_checkpoint(run_dir, config.resume_from_checkpoint)
    if checkpoint is None:
        return None
    position = read_position(checkpoint)
    check_resumed(config, checkpoint, position)
    return checkpoint, position


def check_resumed(config: TrainConfig, checkpoint: Path, position: Position) -> None:
    """Raises UserError for the first setting that the checkpoint has otherwise, and for a damaged adapter file."""
    facts, modules = trained_modules(checkpoint)
    if position.optimizer not in (None, optimizer_kind(config)):
        raise UserError(
            f"{checkpoint.name} was written with {position.optimizer}; you ask for {optimizer_kind(config)}: "
            "resume with the same optimizer, or start a new run."
        )
    if config.seed is not None:
        require(checkpoint, "seed", position.seed, config.seed)
    require(
        checkpoint, "train_text_encoder", any(not m.startswith("unet.") for m in modules), config.train_text_encoder
    )
    require(checkpoint, "rank", facts.rank, config.rank)
    require(
        checkpoint, "lora_alpha", facts.alpha, float(config.rank if config.lora_alpha is None else config.lora_alpha)
    )
    names = ["use_rslora", "use_dora", "mixer", "lora_dropout"] + (["train_mixer"] if config.mixer != "none" else [])
    for name in names:
        require(checkpoint, name, getattr(facts, name), getattr(config, name))
    require_targets(checkpoint, [m.removeprefix("unet.") for m in modules if m.startswith("unet.")], config)


def trained_modules(checkpoint: Path) -> tuple[AdapterFacts, set[str]]:
    """The facts in the adapter file's header, and the modules (`component.path`) that it adapts."""
    try:
        with safe_open(checkpoint / RAW_NAME, framework="pt") as file:
            facts = AdapterFacts.from_json((file.metadata() or {})["moslora"])
            return facts, {key.rpartition(".")[0] for key in file.keys() if "." in key}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own kind, the disk another, and a header may hold anything
        raise damaged(checkpoint, RAW_NAME, error) from None


def require(checkpoint: Path, name: str, there: object, asked: object) -> None:
    if there != asked:
        raise UserError(
            f"--{name}: {checkpoint.name} has {shown(there)}; you ask for {shown(asked)}: "
            "resume without it, or start a new run."
        )


def shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def require_targets(checkpoint: Path, modules: list[str], config: TrainConfig) -> None:
    """Each target has its modules and each module its target, by PEFT's rule."""
    asked = config.target_modules
    strange = [module for module in modules if not any(is_target(module, target) for target in asked)]
    unmet = [target for target in asked if not any(is_target(module, target) for module in modules)]
    if strange or unmet:
        require(checkpoint, "target_modules", " ".join(sorted({last_name(m) for m in modules})), " ".join(asked))
