"""The rank and the alpha of each layer: those of all, or what `--rank_pattern` and `--alpha_pattern` give it."""

from dreambooth_moslora.core.config import TrainConfig
from dreambooth_moslora.core.targets import pattern_value

__all__ = ["rank_and_alpha"]


def rank_and_alpha(config: TrainConfig, component: str, path: str) -> tuple[int, float]:
    """Of one layer. Patterns are of the UNet's layers; without an alpha it is the layer's own rank."""
    is_unet = component == "unet"
    rank = pattern_value(config.rank_pattern if is_unet else (), "rank_pattern", path) or config.rank
    alpha = pattern_value(config.alpha_pattern if is_unet else (), "alpha_pattern", path) or config.lora_alpha
    return int(rank), float(alpha or rank)
