"""The rank and alpha of each layer: the common ones, or those of `--rank_pattern` and `--alpha_pattern`."""

from collections.abc import Mapping

from dreambooth_moslora.core.config.targets import pattern_value
from dreambooth_moslora.core.config.train_config import TrainConfig

__all__ = ["ranks_in_vain", "rank_and_alpha"]


def rank_and_alpha(config: TrainConfig, component: str, path: str) -> tuple[int, float]:
    """Rank and alpha of one layer. Patterns apply to the UNet only; without an alpha, it equals the layer's rank."""
    is_unet = component == "unet"
    rank = pattern_value(config.rank_pattern if is_unet else (), "rank_pattern", path) or config.rank
    alpha = pattern_value(config.alpha_pattern if is_unet else (), "alpha_pattern", path) or config.lora_alpha
    return int(rank), float(alpha or rank)


def ranks_in_vain(config: TrainConfig, component: str, narrowest: Mapping[str, int]) -> str | None:
    """A warning when a layer's rank exceeds its inputs or its outputs, whichever are fewer (`narrowest`, by
    path); else None."""
    ranks = {path: rank_and_alpha(config, component, path)[0] for path in narrowest}
    wide = [path for path, rank in ranks.items() if rank > narrowest[path]]
    if not wide:
        return None
    first = f"{wide[0]} has rank {ranks[wide[0]]} and {narrowest[wide[0]]} inputs or outputs"
    return f"A rank above the number of a layer's inputs or outputs adds nothing: {first} ({len(wide)} such layers)."
