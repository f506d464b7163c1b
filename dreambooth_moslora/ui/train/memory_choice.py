"""What a GPU of this machine has free for a run of the page, and what is said of it."""

from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.training.planning.estimate import GIB, Estimate

__all__ = ["card_lines", "free_gib"]


def card_lines(config: TrainConfig, cost: Estimate) -> list[str]:
    """On what the run will train and how, for the cost estimate; `config` with its memory plan."""
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
    """GiB for a run on the GPU: what is free, and what this process gives back when the run begins.

    None where there is no GPU. `is_later`: of the whole GPU, for a run that waits until the others have ended.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    free, whole = torch.cuda.mem_get_info()
    return (whole if is_later else free + torch.cuda.memory_reserved()) / GIB
