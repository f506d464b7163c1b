"""Adapters of the base's layers: injection, loading and gradient checkpointing."""

import logging
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from dreambooth_moslora.disk.run_folder import RAW_NAME
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora import raw_file, reader
from dreambooth_moslora.method import fast_linear, moslora
from dreambooth_moslora.seeds import compute_seed
from dreambooth_moslora.settings.family_facts import DENOISERS, FamilyFacts
from dreambooth_moslora.settings.field_facts import TEXT_PROJECTIONS, is_adapted
from dreambooth_moslora.settings.train_config import TrainConfig, get_rank_and_alpha
from dreambooth_moslora.training.gradient_checkpointing import apply_gradient_checkpointing

logger = logging.getLogger(__name__)


def get_trained_modules(
    config: TrainConfig, facts: FamilyFacts, pipeline: DiffusionPipeline
) -> dict[str, torch.nn.Module]:
    """Return the modules that get adapters, by diffusers' names."""
    names = (facts.denoiser, *(facts.adapted_encoders if config.train_text_encoder else ()))
    return {name: getattr(pipeline, name) for name in names}


def add_adapters(
    config: TrainConfig,
    components: dict[str, torch.nn.Module],
    checkpoint: Path | None = None,
    *,
    start: reader.AdapterWeights | None = None,
) -> None:
    """Add an adapter to each of the modules, in place.

    config: the run's settings
    components: the modules, by diffusers' names
    checkpoint: whose adapter is read; None for a fresh one
    start: what a fresh adapter begins with, if a file gives it

    Raises UserError for a checkpoint of other layers.
    """
    if checkpoint is None:
        inject_fresh_adapters(config, components, start)
    else:
        raw_file.load_raw(checkpoint / RAW_NAME, components)
        check_adapted_layers(config, components, checkpoint)

    # A training step skips the layers' way through PEFT.
    for module in components.values():
        apply_gradient_checkpointing(config, module)
        fast_linear.enable_fast_path(module)


def check_adapted_layers(
    config: TrainConfig, components: dict[str, torch.nn.Module], checkpoint: Path
) -> None:
    """Raise UserError for a checkpoint whose adapter is on other layers than the settings name."""
    for name, module in components.items():
        target_layers = set(list_target_paths(config, name, module))
        differing = target_layers ^ set(moslora.get_adapter_layers(module))
        if differing:
            raise UserError(
                f"--target_modules: {checkpoint.name} was trained on other layers, "
                f"first {min(differing)}: resume with the same, or start a new run."
            )


def inject_fresh_adapters(
    config: TrainConfig,
    components: dict[str, torch.nn.Module],
    start: reader.AdapterWeights | None,
) -> None:
    """Add an adapter to exactly the layers of `list_target_paths`, each with its own rank and
    alpha."""
    usual_alpha = config.rank if config.lora_alpha is None else config.lora_alpha
    for name, module in components.items():
        paths = list_target_paths(config, name, module)

        # A pattern may give a layer its own.
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        for path in paths:
            ranks[path], alphas[path] = get_rank_and_alpha(config, name, path)

        # PEFT draws A from the global generator.
        torch.manual_seed(compute_seed(config.seed, "adapter", name))
        adapter_config = moslora.build_exact_config(
            ranks,
            alphas,
            config.rank,
            usual_alpha,
            lora_dropout=config.lora_dropout,
            use_dora=config.use_dora,
            use_rslora=config.use_rslora,
            mixer=config.mixer,
            train_mixer=config.train_mixer,
            mixer_seed=config.seed,
        )
        moslora.inject(module, adapter_config)

    # The weights of the file replace the random ones.
    if start is not None:
        logger.warning("%s", reader.copy_into_adapter(start, components))


def list_target_paths(config: TrainConfig, component: str, module: torch.nn.Module) -> list[str]:
    """Return the paths of the layers of a component that get an adapter."""
    targets = config.target_modules if component in DENOISERS else TEXT_PROJECTIONS
    return [path for path in moslora.get_matrix_layers(module) if is_adapted(path, targets)]
