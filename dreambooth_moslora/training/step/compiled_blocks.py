"""`--compile`: the UNet's transformer blocks by `torch.compile`, and the way back when that fails.

Each block is compiled where it stands, so that no module and no key of a checkpoint gets another name. Blocks of one
width share their graph: SDXL has two widths. What is compiled stays as it is with recomputation, and with the adapter
off for the prior.
"""

import logging
from contextlib import AbstractContextManager, nullcontext

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from dreambooth_moslora.core.errors import StopRequestedError, UserError, is_out_of_memory, one_line

__all__ = ["CompiledBlocks"]

logger = logging.getLogger(__name__)

BACKEND = "inductor"
GRAPHS = 32
"""Of one kind of block at most, before PyTorch leaves further sizes uncompiled. With buckets, the second size makes a
graph for all sizes."""


class CompiledBlocks:
    """The blocks of `unet`, compiled at their first call."""

    def __init__(self, unet: nn.Module):
        self.blocks = [block for block in unet.modules() if isinstance(block, BasicTransformerBlock)]
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
        for block in self.blocks:
            block.compile(backend=BACKEND)

    def paused(self) -> AbstractContextManager[None]:
        """Pictures are drawn without, for the length of a `with` block: they would need graphs of their own."""
        return torch.compiler.set_stance("force_eager") if self.blocks else nullcontext()

    def give_up(self, error: Exception) -> None:
        """Compute as without from here on, and say why. Raises an error that is no compiler's to begin with."""
        is_ours = isinstance(error, (UserError, StopRequestedError))
        if is_ours or is_out_of_memory(error) or not self.blocks:
            raise error
        for block in self.blocks:
            block._compiled_call_impl = None
        self.blocks = []
        logger.warning("--compile: the run goes on without: %s", one_line(f"{type(error).__name__} {error}", 200))
