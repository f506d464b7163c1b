"""`--memory`: one word for precision, recomputation, caching and quantisation.

full               nothing is recomputed
full_cached        full, and cross-attention's to_k and to_v leave the GPU (--cache_cross_attention)
recompute          activations are recomputed in the backward pass (--gradient_checkpointing)
recompute_cached   both
nf4                recompute, and the frozen UNet is kept in 4 bit (--base_quantization nf4)
auto               the first of these that is possible and fits the GPU's free memory; full without a GPU

A plan only adds to the given flags. On a GPU it also chooses half precision, unless a precision was given.
"""

import json
from collections.abc import Collection
from dataclasses import replace
from importlib.util import find_spec

from dreambooth_moslora.base.locate import base_folder
from dreambooth_moslora.core.config.checks import needs_live_projections
from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.half_precision import half_precision
from dreambooth_moslora.core.run_files.run_folder import RunDir
from dreambooth_moslora.training.planning.common_settings import least_free_gib
from dreambooth_moslora.training.planning.estimate import (
    BaseSize,
    estimate,
    free_gib_of_gpu,
    precision_of,
    size_of_base,
)

__all__ = ["PLANS", "USABLE", "costs", "plan_lines", "planned"]

PLANS: dict[str, dict[str, object]] = {
    "full": {},
    "full_cached": {"cache_cross_attention": True},
    "recompute": {"gradient_checkpointing": True},
    "recompute_cached": {"gradient_checkpointing": True, "cache_cross_attention": True},
    "nf4": {"gradient_checkpointing": True, "base_quantization": "nf4"},
}
"""From the fastest to the leanest."""
CHOSEN = ("mixed_precision", "gradient_checkpointing", "base_quantization", "cache_cross_attention")
USABLE = 0.9
"""Usable fraction of the free memory: libraries' workspaces and fragmentation take the rest."""


def planned(config: TrainConfig, free_gib: float | None = None) -> TrainConfig:
    """`config` with the settings of its `--memory`; unchanged without that option.

    `free_gib` is the GPU's, if another process will train; else all processes of the run must call it. A resumed run
    keeps its first plan, since another would change the result's bytes. Raises UserError for a missing base.
    """
    if config.memory is None:
        return config
    free = least_free_gib() if free_gib is None else free_gib
    if config.resume_from_checkpoint and (before := settings_before(config)):
        return replace(config, **before)
    config = in_half_precision(config) if free is not None else config
    size = size_of_base(base_folder(config), config.target_modules, config.variant)
    name = config.memory if config.memory != "auto" else fitting(config, size, free)
    return with_plan(config, name)


def settings_before(config: TrainConfig) -> dict[str, object]:
    try:
        saved = json.loads(RunDir(config.output_dir).config_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: saved[name] for name in CHOSEN if name in saved} if isinstance(saved, dict) else {}


def in_half_precision(config: TrainConfig) -> TrainConfig:
    return config if precision_of(config) != "no" else replace(config, mixed_precision=half_precision())


def with_plan(config: TrainConfig, name: str) -> TrainConfig:
    """Add the plan to the given settings: int8 stays int8, and no setting is turned off. Raises UserError for a
    plan that the other settings exclude."""
    changes = dict(PLANS[name])
    if config.base_quantization != "none":
        changes.pop("base_quantization", None)
    return replace(config, **changes)


def fitting(config: TrainConfig, size: BaseSize, free_gib: float | None, names: Collection[str] = tuple(PLANS)) -> str:
    """The first of `names` that fits, or else the leanest possible plan; a later check refuses that."""
    if free_gib is None:
        return "full"
    needs = costs(config, size, names)
    return next((name for name, cost in needs.items() if cost <= USABLE * free_gib), list(needs)[-1])


def costs(config: TrainConfig, size: BaseSize, names: Collection[str] = tuple(PLANS)) -> dict[str, float]:
    """Plan -> peak memory in GiB, for the plans that are possible here with these settings."""
    possible = [name for name in names if is_possible(config, name)]
    return {name: estimate(with_plan(config, name), size, 1).peak_gib for name in possible}


def is_possible(config: TrainConfig, name: str) -> bool:
    """Whether the plan can be used: nf4 needs bitsandbytes and excludes caching, as other settings may."""
    if name == "nf4" and (config.cache_cross_attention or not find_spec("bitsandbytes")):
        return False
    return "cache_cross_attention" not in PLANS[name] or not needs_live_projections(config)


def plan_lines(config: TrainConfig, size: BaseSize) -> list[str]:
    """For `--dry_run`: what each plan would need, and what the GPU has free."""
    free = free_gib_of_gpu() if config.memory else None
    if config.memory is None:
        return []
    bare = replace(config, gradient_checkpointing=False, base_quantization="none", cache_cross_attention=False)
    needs = ", ".join(f"{name} {cost:.1f} GiB" for name, cost in costs(bare, size).items())
    has = "there is no GPU here" if free is None else f"{free:.1f} GiB are free"
    return [f"memory plans: {needs}; {has} (--memory {config.memory})"]
