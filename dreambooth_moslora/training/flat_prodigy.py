"""Prodigy on a GPU, with each group as one long tensor.

Prodigy reads two numbers of every parameter in every step to sum them, and each read waits for the GPU: 3,360
waits for SDXL's 1,680 small matrices, besides a loop of a dozen kernels for each. The other operations are
elementwise, so one long tensor of a group's parameters gives the same step, except for the order of two sums.
Saved and loaded states are per parameter, as in Prodigy.
"""

from collections.abc import Sequence
from typing import Any

import torch
from prodigyopt import Prodigy
from torch import Tensor, nn

Weights = tuple[nn.Parameter, ...]
States = dict[str, Any]


class FlatProdigy(Prodigy):
    """Prodigy whose parameters of a group share a device and a dtype."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._long: dict[Weights, States] = {}

    def state_dict(self) -> dict[str, Any]:
        self._spread()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._long.clear()
        super().load_state_dict(state_dict)

    def step(self, closure: None = None) -> None:
        """One step of the parameters that have a gradient."""
        reached = [
            tuple(weight for weight in group["params"] if weight.grad is not None) for group in self.param_groups
        ]
        if any(weights and weights not in self._long for weights in reached):
            self._spread()
        known = [[bool(self.state.get(weight)) for weight in weights] for weights in reached]
        if not self._long and any(any(found) and not all(found) for found in known):
            super().step()  # some take their first step later than the others
            return
        longs = [long_parameter(weights) if weights else None for weights in reached]
        for weights, long in zip(reached, longs, strict=True):
            if long is not None and (states := self._long.pop(weights, None) or joined(weights, self.state)):
                self.state[long] = states
        own = [group["params"] for group in self.param_groups]
        try:
            self._take([[] if long is None else [long] for long in longs])
            super().step()
        finally:
            self._take(own)
        for weights, long in zip(reached, longs, strict=True):
            if long is not None:
                torch._foreach_copy_([weight.detach() for weight in weights], parts_of(long.detach(), weights))
                self._long[weights] = self.state.pop(long)

    def _take(self, parameters: Sequence[list[nn.Parameter]]) -> None:
        for group, own in zip(self.param_groups, parameters, strict=True):
            group["params"] = own

    def _spread(self) -> None:
        """Give each parameter its states, as views of the long ones."""
        for weights, states in self._long.items():
            for name, value in states.items():
                is_long = isinstance(value, Tensor) and value.dim() > 0
                each = parts_of(value, weights) if is_long else [value] * len(weights)
                for weight, part in zip(weights, each, strict=True):
                    self.state[weight][name] = part.flatten() if is_long and name in ("s", "p0") else part
        self._long.clear()


def long_parameter(weights: Weights) -> nn.Parameter:
    """The weights concatenated into one parameter (n,), with their gradients."""
    long = nn.Parameter(torch.cat([weight.detach().flatten() for weight in weights]))
    long.grad = torch.cat([weight.grad.flatten() for weight in weights])
    return long


def joined(weights: Weights, each: dict[nn.Parameter, States]) -> States:
    """The concatenated states of all weights, removed from `each`; {} before the first step. A weight that
    started at zero keeps one zero as its start, which is expanded here."""
    found = [each.pop(weight, {}) for weight in weights]
    long: States = {}
    for name, first in found[0].items():
        values = [states[name] for states in found]
        if isinstance(first, Tensor):
            sizes = [weight.numel() for weight in weights]
            pairs = zip(values, sizes, strict=True)
            long[name] = torch.cat([v.flatten() if v.dim() else v.expand(size) for v, size in pairs])
        else:
            long[name] = first
    return long


def parts_of(long: Tensor, weights: Weights) -> list[Tensor]:
    """Views of `long` (n,) in the shapes of `weights`."""
    parts = long.split([weight.numel() for weight in weights])
    return [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]
