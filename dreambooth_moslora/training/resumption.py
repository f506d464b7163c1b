"""Which checkpoint a run resumes from, and whether its settings equal those that it was written with."""

import logging
from pathlib import Path

from safetensors import safe_open

from dreambooth_moslora.adapters.files.metadata import AdapterMetadata
from dreambooth_moslora.core.config.subject_tables import each_subject
from dreambooth_moslora.core.config.targets import is_adapted, is_target
from dreambooth_moslora.core.config.train_config import REMOVED, TrainConfig
from dreambooth_moslora.core.config.training_settings import SCHEDULE_FREE, SVD
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.prompts import learnt_words
from dreambooth_moslora.core.run_files.run_folder import RAW_NAME, RunDir, is_checkpoint, tokens_name
from dreambooth_moslora.training.checkpoint import WEIGHTS, Position, check_whole, damaged
from dreambooth_moslora.training.planning.checks import last_name
from dreambooth_moslora.training.planning.layer_sizes import rank_and_alpha
from dreambooth_moslora.training.step.optimizer import optimizer_kind

__all__ = ["check_resumed", "find_checkpoint", "resume_point"]

logger = logging.getLogger(__name__)


def find_checkpoint(run_dir: RunDir, wanted: str | None) -> Path | None:
    """The checkpoint to resume from: `latest` of the run (None and a warning if there is none), a path, or a
    name in the run.

    Raises UserError when a named checkpoint is missing or incomplete.
    """
    if not wanted:
        return None
    if wanted == "latest":
        latest = newest_whole(run_dir)
        if latest is None:
            logger.warning("--resume_from_checkpoint latest: %s", nothing_to_resume(run_dir))
        return latest
    for path in (Path(wanted), run_dir.path / wanted):
        if is_checkpoint(path):
            return path
    raise UserError(f"--resume_from_checkpoint {wanted}: no complete checkpoint there; try `latest`.")


def newest_whole(run_dir: RunDir) -> Path | None:
    """The newest checkpoint that is not damaged. Each damaged one is logged."""
    for checkpoint in reversed(run_dir.checkpoints()):
        try:
            check_whole(checkpoint)
        except UserError as error:
            logger.warning("--resume_from_checkpoint latest skips %s: %s", checkpoint.name, error)
        else:
            return checkpoint
    return None


def nothing_to_resume(run_dir: RunDir) -> str:
    incomplete = ", ".join(path.name for path in run_dir.named_checkpoints())
    there = f" ({incomplete}: not complete, or another program's)" if incomplete else ""
    return f"no complete checkpoint in {run_dir.path}{there}; starting at step 0."


def resume_point(config: TrainConfig, run_dir: RunDir) -> tuple[Path, Position] | None:
    """The checkpoint to resume from and its position; None for a fresh run. Raises UserError."""
    checkpoint = find_checkpoint(run_dir, config.resume_from_checkpoint)
    if checkpoint is None:
        return None
    position = check_whole(checkpoint)
    check_resumed(config, checkpoint, position)
    return checkpoint, position


def check_resumed(config: TrainConfig, checkpoint: Path, position: Position) -> None:
    """Raises UserError for the first setting that differs from the checkpoint's, and for a damaged adapter file.
    Settings of the checkpoint in REMOVED are logged."""
    facts, modules = trained_modules(checkpoint)
    for name in REMOVED.keys() & facts.recipe.keys():
        logger.warning("%s was trained with --%s, %s; the run goes on without.", checkpoint.name, name, REMOVED[name])
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
    require(checkpoint, "train_text_encoder_ti", bool(facts.tokens), config.train_text_encoder_ti)
    if facts.tokens:
        require_tokens(checkpoint, facts, config)
    require_sizes(checkpoint, facts, modules, config)
    if config.optimizer != SCHEDULE_FREE:
        require(checkpoint, "use_ema", (checkpoint / WEIGHTS).is_file(), config.use_ema)
    require(checkpoint, "basis", facts.basis.get("kind"), config.basis and basis_kind(config.basis))
    names = ["use_rslora", "use_dora", "lora_dropout"] + (["mixer"] if not config.basis else [])
    names += ["train_mixer"] if config.mixer != "none" else []
    for name in names:
        require(checkpoint, name, getattr(facts, name), getattr(config, name))
    require_targets(checkpoint, [m.removeprefix("unet.") for m in modules if m.startswith("unet.")], config)


def basis_kind(given: str) -> str:
    return SVD if given == SVD else "file"


def require_tokens(checkpoint: Path, facts: AdapterMetadata, config: TrainConfig) -> None:
    words = " ".join(note["word"] for note in facts.tokens)
    require(checkpoint, "token_abstraction", words, " ".join(learnt_words(config)))
    for number, (note, subject) in enumerate(zip(facts.tokens, each_subject(config), strict=True)):
        if not subject.initializer_concept:
            asked = config.num_new_tokens_per_abstraction
            require(checkpoint, "num_new_tokens_per_abstraction", note["count"], asked)
        if not (checkpoint / tokens_name(number=number)).is_file():
            raise damaged(checkpoint, tokens_name(number=number), "it is missing")


def require_sizes(checkpoint: Path, facts: AdapterMetadata, modules: set[str], config: TrainConfig) -> None:
    """Raises UserError unless each module has the rank and alpha that the settings give it."""
    for module in sorted(modules):
        rank, alpha = rank_and_alpha(config, *module.split(".", 1))
        name = "rank_pattern" if config.rank_pattern else "rank"
        require(checkpoint, name, facts.ranks.get(module, facts.rank), rank)
        name = "alpha_pattern" if config.alpha_pattern else "lora_alpha"
        require(checkpoint, name, facts.alphas.get(module, facts.alpha), alpha)


def trained_modules(checkpoint: Path) -> tuple[AdapterMetadata, set[str]]:
    """The metadata in the adapter file's header, and the modules (`component.path`) that it adapts. Raises
    UserError."""
    try:
        with safe_open(checkpoint / RAW_NAME, framework="pt") as file:
            facts = AdapterMetadata.from_json((file.metadata() or {})["moslora"])
            return facts, {key.rpartition(".")[0] for key in file.keys() if "." in key}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own kind, the disk another, and a header may hold anything
        raise damaged(checkpoint, RAW_NAME, error) from None


def require(checkpoint: Path, name: str, there: object, asked: object) -> None:
    """Raises UserError when a setting differs from the checkpoint's."""
    if there != asked:
        raise UserError(
            f"--{name}: {checkpoint.name} has {shown(there)}; you ask for {shown(asked)}: "
            "resume without it, or start a new run."
        )


def shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def require_targets(checkpoint: Path, modules: list[str], config: TrainConfig) -> None:
    """Raises UserError unless each target matches a module and each module a target, by PEFT's rule."""
    asked = config.target_modules
    strange = [module for module in modules if not is_adapted(module, asked)]
    unmet = [target for target in asked if not any(is_target(module, target) for module in modules)]
    if strange or unmet:
        require(checkpoint, "target_modules", " ".join(sorted({last_name(m) for m in modules})), " ".join(asked))
