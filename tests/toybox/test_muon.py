"""The Muon of processors that emulate bfloat16: the polar factor, torch's steps, and where it is
chosen."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn

from toybox.learning import training
from toybox.learning.muon import GramMuon, orthogonalize
from toybox.learning.training import MasterWeights

SHAPES = [(24, 216), (32, 32), (96, 12)]


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_become_about_one_and_vectors_stay(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left_vectors, values, right_vectors = torch.linalg.svd(matrix, full_matrices=False)
    rotated = left_vectors.mT @ orthogonalize(matrix) @ right_vectors.mT
    large = values > 0.05 * values[0]
    assert ((rotated.diagonal() > 0.6) & (rotated.diagonal() < 1.25))[large].all()
    assert (rotated - rotated.diagonal().diag()).abs().max() < 1e-3


def test_its_steps_are_those_of_torch_whose_state_it_takes():
    """torch's bfloat16 is apart by one or two hundredths of the way."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    settings = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    copies = {
        kind: [nn.Parameter(w.clone()) for w in start] for kind in (torch.optim.Muon, GramMuon)
    }
    theirs, ours = (kind(copy, **settings) for kind, copy in copies.items())
    for step in range(4):
        if step == 2:
            ours.load_state_dict(deepcopy(theirs.state_dict()))  # else both would share its tensors
        for pair in zip(*copies.values()):
            gradient = torch.randn(pair[0].shape, generator=generator)
            for copy in pair:
                copy.grad = gradient
        theirs.step()
        ours.step()
    for w, adamw_weight, muon_weight in zip(start, *copies.values()):
        assert (muon_weight - adamw_weight).norm() < 0.03 * (adamw_weight - w).norm()


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.bfloat16, torch.optim.Muon), (torch.float32, GramMuon)]
)
def test_it_is_taken_where_bfloat16_is_emulated(dtype, kind, monkeypatch):
    monkeypatch.setattr(training, "compute_dtype", lambda device: dtype)
    weights = MasterWeights(nn.Linear(8, 8), muon_lr=0.02)
    assert [type(optimizer) for optimizer in weights.optimizers] == [torch.optim.AdamW, kind]


def steps_of(rank: int, world: int, folder: Path) -> None:
    """Two steps of one of the processes, whose weights are left in the folder."""
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world
        )
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = GramMuon(weights, lr=0.02)
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    torch.save([weight.detach() for weight in weights], folder / f"{rank}-{world}.pt")


@pytest.mark.slow
def test_several_processes_get_the_weights_of_one(tmp_path):
    steps_of(0, 1, tmp_path)
    multiprocessing.spawn(steps_of, (2, tmp_path), nprocs=2)
    alone, *shared = (torch.load(tmp_path / f"{name}.pt") for name in ("0-1", "0-2", "1-2"))
    for weights in shared:
        assert all(torch.equal(weight, expected) for weight, expected in zip(weights, alone))
