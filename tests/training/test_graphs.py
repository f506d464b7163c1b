"""Passes that are recorded and replayed give the bytes of usual ones.

`CpuGraph` stands for CUDA's: it replays by doing the work again, and refuses what a graph on a GPU would do silently
wrong or not at all."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dreambooth_moslora.plan.memory import speed_of
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training import graphs
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny_training import adapter_sha256, logged, tiny_config

WAITS = ("_local_scalar_dense", "nonzero", "equal", "masked_select")
DRAWS = ("bernoulli", "dropout", "multinomial", "normal", "rand", "uniform")


class Watch(TorchDispatchMode):
    """The addresses of what is read and was there before, in their order. Refuses waits and draws."""

    def __init__(self):
        super().__init__()
        self.read: dict[int, None] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        if name.startswith(WAITS) or any(word in name for word in DRAWS):
            raise RuntimeError(f"{name} cannot be recorded")
        self.read |= dict.fromkeys(place for place in places((args, kwargs)) if place not in self.made)
        found = function(*args, **kwargs or {})
        self.made |= {place for place in places(found) if place not in self.read}
        return found


def places(values) -> list[int]:
    return [leaf.untyped_storage().data_ptr() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class CpuGraph:
    """Raises AssertionError when the work reads from other addresses than the record did."""

    made: list["CpuGraph"] = []  # noqa: RUF012

    def __init__(self, work: Callable[[], list[torch.Tensor]]):
        self.work, self.replays = work, 0
        with Watch() as watch:
            self.results = work()
        self.read = list(watch.read)
        self.made.append(self)

    def replay(self) -> None:
        with Watch() as watch:
            found = self.work()
        assert list(watch.read) == self.read, "what the graph reads is elsewhere now"
        for place, result in zip(self.results, found, strict=True):
            place.copy_(result)
        self.replays += 1


@pytest.fixture
def recorded(monkeypatch):
    """Graphs on the CPU; those that were made."""
    monkeypatch.setattr(CpuGraph, "made", [])
    monkeypatch.setitem(graphs.RECORDERS, "cpu", CpuGraph)
    return CpuGraph.made


PRIOR = {"with_prior_preservation": True, "prior": "adapter_off"}
LAYERS = {"target_modules": ("to_q", "to_k", "to_v", "to_out.0", "conv1")}
KINDS = {
    "accumulated, with a prior": (PRIOR | LAYERS | {"gradient_accumulation_steps": 2}, 1),
    "two sizes": ({"enable_bucket": True, "bucket_reso_steps": 16, "gradient_accumulation_steps": 2}, 2),
    "a prior for some": (PRIOR | {"prior_every": 2, "gradient_accumulation_steps": 3}, 2),
    "one image after the other": (PRIOR | {"train_batch_size": 2, "images_at_once": 1}, 2),
    "all together": (PRIOR | {"gradient_accumulation_steps": 2, "images_at_once": 4}, 1),
    "bf16, averaged, clipped": ({"mixed_precision": "bf16", "use_ema": True, "max_grad_norm": 0.1}, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_replayed_passes_give_the_bytes_of_usual_ones_also_after_a_resume(kind, tiny_base, photos, tmp_path, recorded):
    changes, shapes = KINDS[kind]
    config = lambda name, **more: tiny_config(tiny_base, photos, tmp_path / name, **changes, **more)  # noqa: E731
    train(config("usual"))
    assert not recorded
    done: list[int] = []
    note = lambda event: done.append(event.step if event.kind == "step" else 0)  # noqa: E731
    train(config("graphs", cuda_graph="on"), note, lambda: 3 in done)
    assert len(recorded) == shapes and all(graph.replays for graph in recorded)
    train(config("graphs", cuda_graph="on", resume_from_checkpoint="latest"))
    assert len(recorded) > shapes
    numbers, both = ("loss", "loss_instance", "loss_prior", "grad_norm"), ("usual", "graphs")
    usual, replayed = ([[step[name] for name in numbers] for step in logged(tmp_path / run)] for run in both)
    assert replayed == usual and len(usual) == 5
    assert adapter_sha256(tmp_path / "graphs") == adapter_sha256(tmp_path / "usual")


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


def test_what_cannot_be_recorded_costs_one_line(tiny_base, photos, tmp_path, monkeypatch, caplog):
    """A library that waits; and a device without graphs."""

    def refuse(work):
        work()
        raise RuntimeError("operation not permitted when stream is capturing")

    usual = {"max_train_steps": 1, "gradient_accumulation_steps": 3}
    train(tiny_config(tiny_base, photos, tmp_path / "usual", **usual))
    train(tiny_config(tiny_base, photos, tmp_path / "none", cuda_graph="on", **usual))
    monkeypatch.setitem(graphs.RECORDERS, "cpu", refuse)
    train(tiny_config(tiny_base, photos, tmp_path / "refused", cuda_graph="on", **usual))
    lines = [line for line in caplog.messages if line.startswith("--cuda_graph")]
    said = "RuntimeError operation not permitted when stream is capturing"
    assert [line.split("without: ")[1] for line in lines] == ["there are no graphs on cpu", said]
    assert len({adapter_sha256(tmp_path / run) for run in ("usual", "none", "refused")}) == 1


def test_what_differs_from_pass_to_pass_is_known_before():
    reasons = dict.fromkeys(("gradient_checkpointing", "cache_cross_attention", "train_text_encoder"), True)
    for name, value in {"lora_dropout": 0.1, **reasons}.items():
        config = TrainConfig(cuda_graph="on", **{name: value})
        assert graphs.obstacle(config, "cuda") and not speed_of(config, "cuda", 10).graphs, name
    free = TrainConfig(cuda_graph="on")
    assert graphs.obstacle(free, "cuda") is None and speed_of(free, "cuda", 10).graphs
    assert not speed_of(free, "cpu", 10).graphs and not speed_of(TrainConfig(), "cuda", 10).graphs


@dataclass
class Micro:
    shape: int
    tensors: tuple = ()
    with_tensors = lambda self, tensors: self  # noqa: E731


def test_a_shape_is_passed_as_usual_first_however_often_that_fails_and_recorded_anew_where_weights_moved(recorded):
    """A compiler that fails makes the step again. Few shapes are recorded, as each keeps gradients of its own."""
    weight, fails = torch.ones(1), [True]

    def differentiate(micros, share):
        if fails.pop() if fails else False:
            raise RuntimeError("no compiler")
        return [weight.clone()]

    found = graphs.Graphs(differentiate, [], [weight], CpuGraph)
    with pytest.raises(RuntimeError, match="no compiler"):
        found.begun([])([Micro(0)], None)
    assert found.begun([])([Micro(0)], None) == [weight] and not recorded
    for round_ in (1, 2):
        for _ in range(3):
            for shape in range(graphs.MOST_SHAPES + 2):
                assert found.begun([])([Micro(shape)], None) == [weight]
        assert len(recorded) == round_ * graphs.MOST_SHAPES
        weight.data = weight.data + 1
