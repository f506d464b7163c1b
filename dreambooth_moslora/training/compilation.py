"""Compiles a denoiser's transformer blocks (`--compile`), dense or packed, each in place, so that
no checkpoint key changes its name.

Blocks of one width share a graph, which stays valid with recomputation and without the adapter.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn
from torch.fx.subgraph_rewriter import replace_pattern

from dreambooth_moslora.base.families import list_block_classes

BACKEND = "inductor"
"""PyTorch's own compiler."""
MAX_GRAPHS = 32
"""Of one kind of block. With buckets, the second size makes one graph for all sizes."""


def compile_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """Compile the transformer blocks in place, each at its first call. Returns them."""
    kinds = list_block_classes(denoiser)
    blocks = [block for block in denoiser.modules() if type(block).__name__ in kinds]
    for block in blocks:
        block.compile(backend=compile_graph)
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, MAX_GRAPHS)
    return blocks


def compile_graph(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable:
    """Return the compiled function of a traced block. Complex rotary embeddings are replaced by
    real ones, since the compiler would compute complex ones apart from what is before and after."""
    replace_pattern(graph, rotate_complex, rotate_real)
    return torch._dynamo.lookup_backend(BACKEND)(graph, inputs)


def rotate_complex(pairs: Tensor, turns: Tensor) -> Tensor:
    """Pairs (…, d, 2), each turned as a complex number: how diffusers writes it for Z-Image,
    Qwen-Image and Lumina 2. `turns` (…, d) are complex."""
    return torch.view_as_real(torch.view_as_complex(pairs) * turns)


def rotate_real(pairs: Tensor, turns: Tensor) -> Tensor:
    """Rotate as `rotate_complex` does, in real numbers."""
    x, y = pairs[..., 0], pairs[..., 1]
    turns = torch.view_as_real(turns)
    cos, sin = turns[..., 0], turns[..., 1]
    return torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1)
