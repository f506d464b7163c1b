"""CUDA graphs of a step's passes (`--cuda_graph`): forward, loss and backward are recorded once for each shape, then
replayed. A fast GPU otherwise waits for the program, which hands it some thousand kernels a pass.

What is recorded reads and writes fixed addresses. Inputs are copied to buffers. Working copies and frozen weights stay
where they are; if they moved since the last step, all is recorded anew. The gradients of a replay lie where those of
the record lie. Nothing in it waits for the GPU or draws numbers: a micro-batch is drawn before.

The first pass of a shape is made as usual, so that libraries can prepare; the next is recorded. If that fails, the run
goes on without graphs, and says so in one line. At most 32 shapes are recorded, as each keeps gradients of its own;
further ones are passed as usual. All graphs share one pool of memory, as one is replayed at a time.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from dreambooth_moslora.core import one_line
from dreambooth_moslora.plan.memory import unrecordable
from dreambooth_moslora.settings.table import TrainConfig

logger = logging.getLogger(__name__)

GOES_ON = "the run goes on without"
MOST_SHAPES = 32
Micro = Any  # Stands for `step.MicroBatch`, which imports this file.
Differentiate = Callable[[Sequence[Micro], float | None], list[torch.Tensor]]
"""Makes a pass of micro-batches, or of a part with its share. Returns their losses; the leaves get gradients."""


memory_pool = cache(lambda: torch.cuda.graph_pool_handle())


class CudaGraph:
    """The `results` that some work computed on the GPU; each `replay` computes them anew, in place. Raises what PyTorch
    raises for work that cannot be recorded."""

    def __init__(self, work: Callable[[], list[torch.Tensor]]):
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=memory_pool(), capture_error_mode="thread_local"):
            self.results = work()

    def replay(self) -> None:
        self.graph.replay()


Recorder = Callable[[Callable[[], list[torch.Tensor]]], CudaGraph]
RECORDERS: dict[str, Recorder] = {"cuda": CudaGraph}
"""Type of device -> what records work there: `CudaGraph`, or what has its attributes."""


def obstacle(config: TrainConfig, device_type: str) -> str | None:
    """Why this run's passes cannot be recorded, in a few words; None if it can be tried."""
    return unrecordable(config) if device_type in RECORDERS else f"there are no graphs on {device_type}"


@dataclass
class Graphs:
    """Replaces `differentiate`. `lasting` are parameters whose gradients grow over a step; those of the working copies
    are collected after each pass. `frozen` are the weights that a pass reads."""

    differentiate: Differentiate
    lasting: list[torch.Tensor]
    frozen: list[torch.Tensor]
    record: Recorder | None
    known: dict[tuple, "RecordedPass | None"] = field(default_factory=dict)  # shape -> its record; None after one pass
    addresses: list[int] = field(default_factory=list)
    leaves: list[torch.Tensor] = field(default_factory=list)

    def begun(self, copies: list[torch.Tensor]) -> Differentiate:
        """What differentiates the passes of a step with these working copies."""
        self.leaves = [*copies, *self.lasting]
        addresses = [tensor.data_ptr() for tensor in (*self.leaves, *self.frozen)]
        if addresses != self.addresses:
            self.known.clear()
        self.addresses = addresses
        return self.differentiate if self.record is None else self.differentiated

    def differentiated(self, micros: Sequence[Micro], share: float | None) -> list[torch.Tensor]:
        shape = (share, *(micro.shape for micro in micros))
        if self.record is None or (shape not in self.known and len(self.known) >= MOST_SHAPES):
            return self.differentiate(micros, share)
        if shape not in self.known:
            losses = self.differentiate(micros, share)
            self.known[shape] = None  # after it: blocks that fail to compile in it make the pass again, as their first
            return losses
        if self.known[shape] is None:
            try:
                self.known[shape] = RecordedPass(self, micros, share)
            except Exception as error:  # drivers and libraries raise what they like
                self.record = None
                self.known.clear()
                logger.warning("--cuda_graph: %s: %s", GOES_ON, one_line(f"{type(error).__name__} {error}", 200))
                return self.differentiate(micros, share)
        return self.known[shape].replayed(micros)


class RecordedPass:
    """A pass of micro-batches of one shape."""

    def __init__(self, graphs: Graphs, micros: Sequence[Micro], share: float | None):
        self.micros = [micro.with_tensors([tensor.clone() for tensor in micro.tensors]) for micro in micros]
        self.share, self.differentiate, self.leaves = share, graphs.differentiate, graphs.leaves
        self.lasting = set(map(id, graphs.lasting))
        self.reached: list[torch.Tensor] = []
        self.record = graphs.record(self.work)

    def work(self) -> list[torch.Tensor]:
        """The pass on the buffers: its losses, and the gradients of the leaves that it reached. These leaves keep the
        gradients that they had."""
        before = [leaf.grad for leaf in self.leaves]
        set_gradients(self.leaves, [None] * len(before))
        try:
            losses = self.differentiate(self.micros, self.share)
            self.reached = [leaf for leaf in self.leaves if leaf.grad is not None]
            return [*losses, *(leaf.grad for leaf in self.reached)]
        finally:
            set_gradients(self.leaves, before)

    def replayed(self, micros: Sequence[Micro]) -> list[torch.Tensor]:
        """What `differentiate` would return and leave behind for these."""
        for own, given in zip(self.micros, micros, strict=True):
            for buffer, tensor in zip(own.tensors, given.tensors, strict=True):
                buffer.copy_(tensor)
        self.record.replay()
        losses, gradients = self.record.results[: len(micros)], self.record.results[len(micros) :]
        for leaf, gradient in zip(self.reached, gradients, strict=True):
            if leaf.grad is not None:
                leaf.grad = leaf.grad + gradient
            else:  # the next replay overwrites it
                leaf.grad = gradient.clone() if id(leaf) in self.lasting else gradient
        return [loss.clone() for loss in losses]


def set_gradients(leaves: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> None:
    for leaf, gradient in zip(leaves, gradients, strict=True):
        leaf.grad = gradient
