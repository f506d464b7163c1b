"""Copies to a device that end as late as they may."""

from collections.abc import Callable

import torch

from dreambooth_moslora.base import streaming


class LateCopies:
    """A device whose copies end when they are waited for: what computes with a block before that
    gets NaN, and so does what reads a block after another has come in its place."""

    def __init__(self, device: torch.device | None = None):
        self.waiting, self.started, self.ended = {}, 0, 0

    def start(self, place, pieces) -> Callable[[], None]:
        place.fill_(255)  # NaN in every floating-point type

        def end() -> None:
            if self.waiting.pop(place.data_ptr(), None) is end:
                streaming.copy_pieces(place, pieces)
                self.ended += 1

        self.waiting[place.data_ptr()] = end
        self.started += 1
        return end

    def wait(self, copy: Callable[[], None] | None) -> None:
        if copy is not None:
            copy()
