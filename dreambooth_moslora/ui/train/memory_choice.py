"""GPU memory for a run of the page, and the lines about it."""

from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.training.planning.estimate import GIB, Estimate

__all__ = ["card_lines", "free_gib"]


def card_lines(config: TrainConfig, cost: Estimate) -> list[str]:
    """Device and plan of the run, for the cost estimate; `config` has its memory plan."""
    import torch

    free = free_gib()
    if free is None:
        return ["GPU: none is here, so it trains on the CPU"]
    line = f"GPU: {torch.cuda.get_device_name()}, {free:.1f} GiB free for this run"
    if config.mixed_precision:
        recomputed = "with" if config.gradient_checkpointing else "without"
        line += f", so it trains in {config.mixed_precision}, {recomputed} gradient checkpointing"
    if config.base_quantization != "none":
        line += f", the base in {config.base_quantization}"
    return [line, *(["the GPU may have too little memory even so"] if cost.peak_gib > free else [])]


def free_gib(*, is_later: bool = False) -> float | None:
    """GPU memory for a run, GiB: what is free, and what this process frees when the run begins.

    None without a GPU. `is_later`: the whole GPU's memory, for a run that waits until the others have ended.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    free, whole = torch.cuda.mem_get_info()
    return (whole if is_later else free + torch.cuda.memory_reserved()) / GIB
