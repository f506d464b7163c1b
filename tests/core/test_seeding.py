"""Named randomness and the shuffled order of exposures."""

import torch

from dreambooth_moslora.core.seeding import generator, place_of, rng, seed_of


def test_seeds_depend_on_every_name_and_on_nothing_else():
    seeds = {seed_of(*names) for names in ((0, "noise", 1), (0, "noise", 2), (1, "noise", 1), (0, "crop", 1))}
    assert len(seeds) == 4
    assert torch.equal(torch.randn(4, generator=generator(7, "a")), torch.randn(4, generator=generator(7, "a")))
    assert rng(7, "a").random() == rng(7, "a").random()


def test_each_epoch_shows_every_slot_once_in_a_new_order():
    places = [place_of(position, 5, 0, "instance") for position in range(15)]
    assert [epoch for epoch, _ in places] == [0] * 5 + [1] * 5 + [2] * 5
    epochs = [tuple(slot for e, slot in places if e == epoch) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len(set(epochs)) > 1


def test_a_position_can_be_asked_out_of_order():
    forward = [place_of(position, 7, 3, "prior") for position in range(20)]
    assert [place_of(position, 7, 3, "prior") for position in reversed(range(20))] == forward[::-1]
