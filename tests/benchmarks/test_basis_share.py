"""The share of an update that a frozen basis can hold."""

import pytest
import torch

from benchmarks.basis_share import share_of


def test_an_update_of_the_basis_itself_is_held_and_another_is_not():
    generator = torch.Generator().manual_seed(1)
    down, up, mixer = (torch.randn(shape, generator=generator) for shape in ((4, 30), (20, 4), (4, 4)))
    inside, random, whole = share_of(up @ mixer @ down, down, up)
    assert inside == pytest.approx(whole) and random == pytest.approx(whole * 16 / 600)
    basis = torch.linalg.qr(torch.randn(30, 30, generator=generator))[0]
    inside, _, whole = share_of(up @ basis[:4], basis[4:8], up)
    assert inside < 1e-9 * whole
