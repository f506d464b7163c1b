"""`--compile`: `torch.compile` of the UNet's transformer blocks, and the fallback when that fails.

Each block is compiled in place, so that no module and no checkpoint key changes its name. Blocks of one width
share a graph: SDXL has two widths. Graphs stay valid with recomputation, and with the adapter switched off for
the prior.
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
"""Most graphs of one kind of block; PyTorch does not compile further sizes. With buckets, the second size makes
one graph for all sizes."""


class CompiledBlocks:
    """The blocks of `unet`, compiled at their first call."""

    def __init__(self, unet: nn.Module):
        self.blocks = [block for block in unet.modules() if isinstance(block, BasicTransformerBlock)]
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
        for block in self.blocks:
            block.compile(backend=BACKEND)

    def paused(self) -> AbstractContextManager[None]:
        """Switch compilation off for the length of the block: pictures would need graphs of their own."""
        return torch.compiler.set_stance("force_eager") if self.blocks else nullcontext()

    def give_up(self, error: Exception) -> None:
        """Continue without compilation from now on, and log why. Raises `error` again if no compiler caused it."""
        is_ours = isinstance(error, (UserError, StopRequestedError))
        if is_ours or is_out_of_memory(error) or not self.blocks:
            raise error
        for block in self.blocks:
            block._compiled_call_impl = None
        self.blocks = []
        logger.warning("--compile: the run goes on without: %s", one_line(f"{type(error).__name__} {error}", 200))
