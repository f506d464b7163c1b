"""CUDA graphs of a step's passes: the arm `graphed` of `benchmarks.gpu_step`.

Forward, loss and backward are recorded once for each shape, then replayed. A fast GPU otherwise
waits for the program, which hands it some thousand kernels a pass.

What is recorded reads and writes fixed addresses. Inputs are copied to buffers. Working copies and
frozen weights stay where they are; if they moved since the last pass, all is recorded anew. Nothing
in a pass may wait for the GPU or draw numbers: no dropout, no recomputation, no text from the host.
"""

from collections.abc import Callable, Sequence

import torch

from dreambooth_moslora.training.micro_batch import MicroBatch, Rows
from dreambooth_moslora.training.objective import NoisySample
from dreambooth_moslora.training.step import TrainStep

__all__ = ["CudaGraph", "record_passes"]

Work = Callable[[], list[torch.Tensor]]


class CudaGraph:
    """The `results` that some work computed on the GPU; each `replay` computes them anew, in place.

    Raises what PyTorch raises for work that cannot be recorded.
    """

    def __init__(self, work: Work):
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.results = work()
        except Exception:
            leave_capture()
            raise

    def replay(self) -> None:
        self.graph.replay()


def leave_capture() -> None:
    """After a capture that failed: PyTorch 2.13 stays on the capture's stream, with its memory."""
    torch.cuda.synchronize()
    torch.cuda.set_stream(torch.cuda.default_stream())
    torch.cuda.empty_cache()


def record_passes(train_step: TrainStep, record: Callable[[Work], CudaGraph] = CudaGraph) -> None:
    """From now on the step's passes are recorded, then replayed."""
    train_step.differentiated = Graphs(train_step, record).differentiated


class Graphs:
    """Takes the place of `TrainStep.differentiated`."""

    def __init__(self, train_step: TrainStep, record: Callable[[Work], CudaGraph]):
        self.train_step, self.record = train_step, record
        self.differentiate = train_step.differentiated
        self.frozen = [
            weight for weight in train_step.inputs.denoiser.parameters() if not weight.requires_grad
        ]
        # Shape of a pass -> its record; None after the first pass, which lets libraries prepare.
        self.known: dict[tuple, RecordedPass | None] = {}
        self.addresses: list[int] = []

    def differentiated(
        self, micros: Sequence[MicroBatch], share: float | None
    ) -> list[torch.Tensor]:
        # Records hold for these addresses alone.
        leaves = [*self.train_step.copies.before.leaves, *self.train_step.trained]
        addresses = [tensor.data_ptr() for tensor in (*leaves, *self.frozen)]
        if addresses != self.addresses:
            self.known.clear()
        self.addresses = addresses

        # The first pass of a shape is made as usual; the second is recorded.
        shape = (share, *map(shape_of, micros))
        if shape not in self.known:
            self.known[shape] = None
            return self.differentiate(micros, share)
        if self.known[shape] is None:
            work = lambda micros: self.differentiate(micros, share)  # noqa: E731
            self.known[shape] = RecordedPass(work, micros, leaves, self.record)
        return self.known[shape].replayed(micros)


class RecordedPass:
    """A pass of micro-batches of one shape.

    differentiate   makes the pass and returns its losses; the leaves get gradients
    leaves          working copies, and the parameters whose gradients grow over a step
    """

    def __init__(
        self,
        differentiate: Callable[[Sequence[MicroBatch]], list[torch.Tensor]],
        micros: Sequence[MicroBatch],
        leaves: list[torch.Tensor],
        record: Callable[[Work], CudaGraph],
    ):
        self.micros = [
            with_tensors(micro, [tensor.clone() for tensor in tensors_of(micro)])
            for micro in micros
        ]
        self.differentiate, self.leaves = differentiate, leaves
        self.reached: list[torch.Tensor] = []
        self.record = record(self.work)

    def work(self) -> list[torch.Tensor]:
        """The pass on the buffers: its losses, then the gradients of the leaves that it reached."""
        before = [leaf.grad for leaf in self.leaves]
        for leaf in self.leaves:
            leaf.grad = None
        try:
            losses = self.differentiate(self.micros)
            self.reached = [leaf for leaf in self.leaves if leaf.grad is not None]
            return [*losses, *(leaf.grad for leaf in self.reached)]
        finally:
            for leaf, gradient in zip(self.leaves, before, strict=True):
                leaf.grad = gradient

    def replayed(self, micros: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """What `differentiate` would return and leave behind for these."""
        for own, given in zip(self.micros, micros, strict=True):
            for buffer, tensor in zip(tensors_of(own), tensors_of(given), strict=True):
                buffer.copy_(tensor)
        self.record.replay()

        # The next replay overwrites the results, so what is kept is a copy.
        count = len(micros)
        losses, gradients = self.record.results[:count], self.record.results[count:]
        for leaf, gradient in zip(self.reached, gradients, strict=True):
            leaf.grad = gradient.clone() if leaf.grad is None else leaf.grad + gradient
        return [loss.clone() for loss in losses]


def tensors_of(micro: MicroBatch) -> list[torch.Tensor]:
    """All that a micro-batch is computed from."""
    texts = [tensor for text in micro.rows.texts for tensor in text.values()]
    masks = [] if micro.mask is None else [micro.mask]
    return [*micro.rows.noisy.tensors, micro.rows.time_ids, *texts, micro.target, *masks]


def with_tensors(micro: MicroBatch, tensors: Sequence[torch.Tensor]) -> MicroBatch:
    """The same with these in place of its `tensors_of`."""
    rows, given = micro.rows, iter(tensors)
    noisy = NoisySample(*(next(given) for _ in rows.noisy.tensors))
    time_ids = next(given)
    texts = tuple({name: next(given) for name in text} for text in rows.texts)
    return MicroBatch(
        rows=Rows(noisy, texts, time_ids, rows.prompts),
        target=next(given),
        mask=next(given, None),
        instance_count=micro.instance_count,
    )


def shape_of(micro: MicroBatch) -> tuple:
    """Equal for micro-batches whose passes differ only in the numbers."""
    return micro.instance_count, *((tensor.shape, tensor.dtype) for tensor in tensors_of(micro))
