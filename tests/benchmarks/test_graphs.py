"""Passes that are recorded and replayed give the bytes of usual ones.

`CpuGraph` stands for CUDA's: it replays by doing the work again, and refuses what a graph on a GPU
would do silently wrong or not at all."""

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.graphs import record_passes
from benchmarks.precision import bf16_accelerator
from dreambooth_moslora.extras.lab.full_step import random_materials
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.step import TrainStep

WAITS = ("_local_scalar_dense", "nonzero", "equal", "masked_select")
DRAWS = ("bernoulli", "dropout", "multinomial", "normal", "rand", "uniform")


class Watch(TorchDispatchMode):
    """The addresses of what is read and was there before, in their order. Refuses waits and
    draws."""

    def __init__(self):
        super().__init__()
        self.read: dict[int, None] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        if name.startswith(WAITS) or any(word in name for word in DRAWS):
            raise RuntimeError(f"{name} cannot be recorded")
        self.read |= dict.fromkeys(
            place for place in places((args, kwargs)) if place not in self.made
        )
        found = function(*args, **kwargs or {})
        self.made |= {place for place in places(found) if place not in self.read}
        return found


def places(values) -> list[int]:
    return [
        leaf.untyped_storage().data_ptr()
        for leaf in tree_leaves(values)
        if isinstance(leaf, torch.Tensor)
    ]


class CpuGraph:
    """Raises AssertionError when the work reads from other addresses than the record did."""

    def __init__(self, work: Callable[[], list[torch.Tensor]]):
        self.work, self.replays = work, 0
        with Watch() as watch:
            self.results = work()
        self.read = list(watch.read)

    def replay(self) -> None:
        with Watch() as watch:
            found = self.work()
        assert list(watch.read) == self.read, "what the graph reads is elsewhere now"
        for place, result in zip(self.results, found, strict=True):
            place.copy_(result)
        self.replays += 1


def test_the_stand_in_refuses_what_a_graph_cannot_hold():
    for fault in (lambda: [torch.ones(2) * torch.ones(2).sum().item()], lambda: [torch.rand(2)]):
        with pytest.raises(RuntimeError, match="cannot be recorded"):
            CpuGraph(fault)
    kept = [torch.ones(2), torch.ones(2)]
    graph = CpuGraph(lambda: [kept[0] + 1])
    graph.replay()
    kept.reverse()
    with pytest.raises(AssertionError, match="elsewhere"):
        graph.replay()


def stepped(record=None) -> tuple[list[float], list[torch.Tensor], list[CpuGraph]]:
    """The losses and gradients' norms of four steps of two micro-batches, the adapter after them,
    and the records."""
    torch.manual_seed(0)
    config = TrainConfig(
        resolution=64, rank=2, mixed_precision="bf16", gradient_accumulation_steps=2, seed=0
    )
    step = TrainStep(config, random_materials("small", 64), bf16_accelerator(), max_train_steps=4)
    recorded = []
    if record:
        record_passes(step, lambda work: recorded.append(record(work)) or recorded[-1])
    numbers = [
        number
        for _ in range(4)
        for number in (step.accumulate_gradients().total, step.update_adapter())
    ]
    return numbers, [parameter.detach() for parameter in step.trained], recorded


@pytest.mark.slow
def test_replayed_passes_give_the_bytes_of_usual_ones():
    numbers, weights, _ = stepped()
    replayed, others, (graph,) = stepped(CpuGraph)
    assert replayed == numbers and graph.replays == 7  # of eight passes the first is a usual one
    assert all(map(torch.equal, others, weights))


def test_what_cannot_be_recorded_raises():
    def refuse(work):
        work()
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        stepped(refuse)
