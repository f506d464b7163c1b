"""The layers of the base that get an adapter, and the adapters themselves: fresh, from a file, or from a checkpoint."""

import logging
import re
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from torch import nn

from dreambooth_moslora.adapters.basis import Basis, freeze_basis, put_basis
from dreambooth_moslora.adapters.files.lora_file import AdapterWeights
from dreambooth_moslora.adapters.fused.fused_linear import enable_fast_path
from dreambooth_moslora.adapters.init_adapter import begin_with
from dreambooth_moslora.adapters.layers import matrix_layers, narrowest_sides, value_pattern
from dreambooth_moslora.adapters.moslora import MoSLoraConfig, adapter_layers, inject
from dreambooth_moslora.core.config.targets import is_adapted
from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.config.training_settings import ZERO
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.seeding import seed_of
from dreambooth_moslora.training.checkpoint import load_adapter
from dreambooth_moslora.training.planning.layer_sizes import rank_and_alpha, ranks_in_vain

__all__ = ["add_adapters", "target_paths", "trained_modules"]

logger = logging.getLogger(__name__)

TEXT_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def trained_modules(config: TrainConfig, pipeline: StableDiffusionXLPipeline) -> dict[str, nn.Module]:
    """The modules that get adapters, by diffusers' names."""
    names = ["unet", "text_encoder", "text_encoder_2"] if config.train_text_encoder else ["unet"]
    return {name: getattr(pipeline, name) for name in names}


def add_adapters(
    config: TrainConfig,
    components: dict[str, nn.Module],
    checkpoint: Path | None = None,
    *,
    start: AdapterWeights | None = None,
    basis: Basis | None = None,
) -> None:
    """Add an adapter to each of the modules (see `trained_modules`).

    Adapters are loaded from `checkpoint`, or else fresh; fresh ones take the weights of the file `start`, if
    given. With `basis`, the UNet's A and B are the basis's and frozen. Raises UserError for a checkpoint with an
    adapter on other layers or another basis.
    """
    if checkpoint is not None:
        facts = load_adapter(checkpoint, components)
        check_same_layers(config, checkpoint, components)
        if basis is not None and facts.basis.get("sha256") != basis.note["sha256"]:
            raise UserError(f"--basis: {checkpoint.name} has another basis: resume with the same, or start a new run.")
    for name, module in components.items():
        if checkpoint is None:
            paths, layers = target_paths(config, name, module), matrix_layers(module)
            if line := ranks_in_vain(config, name, narrowest_sides({path: layers[path] for path in paths})):
                logger.warning("%s", line)
            torch.manual_seed(seed_of(config.seed, "adapter", name))
            inject(module, adapter_config(config, name, paths))
    if checkpoint is None and start is not None:
        logger.warning("%s", begin_with(start, components).sentence())
    if basis is not None:
        begin_on_basis(basis, components["unet"], is_fresh=checkpoint is None)
    for module in components.values():
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(module)
        enable_fast_path(module)


def begin_on_basis(basis: Basis, unet: nn.Module, *, is_fresh: bool) -> None:
    """Freeze A and B, and set them to the basis if the adapter is fresh. Raises UserError for a basis that does not
    fit."""
    if is_fresh:
        try:
            put_basis(basis, unet)
        except UserError as error:
            raise UserError(f"--basis: {error}.") from error
    freeze_basis(unet)


def target_paths(config: TrainConfig, component: str, module: nn.Module) -> list[str]:
    """Paths of the component's layers that get an adapter."""
    targets = config.target_modules if component == "unet" else TEXT_PROJECTIONS
    return [path for path in matrix_layers(module) if is_adapted(path, targets)]


def check_same_layers(config: TrainConfig, checkpoint: Path, components: dict[str, nn.Module]) -> None:
    """Raises UserError when the checkpoint has an adapter on other layers than these settings ask for."""
    for name, module in components.items():
        differing = set(adapter_layers(module)) ^ set(target_paths(config, name, module))
        if differing:
            raise UserError(
                f"--target_modules: {checkpoint.name} was trained on other layers, first {min(differing)}: "
                "resume with the same, or start a new run."
            )


def adapter_config(config: TrainConfig, component: str, paths: list[str]) -> MoSLoraConfig:
    """PEFT's settings for exactly these layers, each with its own rank and alpha."""
    sizes = {path: rank_and_alpha(config, component, path) for path in paths}
    rank, alpha = config.rank, config.rank if config.lora_alpha is None else config.lora_alpha
    return MoSLoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern=value_pattern({path: r for path, (r, _) in sizes.items()}, rank),
        alpha_pattern=value_pattern({path: a for path, (_, a) in sizes.items()}, alpha),
        lora_dropout=config.lora_dropout,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        target_modules="|".join(map(re.escape, paths)),
        mixer=ZERO if config.basis else config.mixer,
        train_mixer=config.train_mixer,
        mixer_seed=config.seed,
    )


def enable_gradient_checkpointing(module: nn.Module) -> None:
    """Turn on recomputation; diffusers and transformers name the method differently."""
    name = "enable_gradient_checkpointing"
    (getattr(module, name) if hasattr(module, name) else module.gradient_checkpointing_enable)()
