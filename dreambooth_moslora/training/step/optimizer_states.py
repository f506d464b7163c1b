"""The optimizer's states in a checkpoint, checked before PyTorch's kernels read them.

A kernel trusts the shape, type and layout of a moment: it would read and write beyond the end of a smaller one.
The expected shapes and types come from a copy of the optimizer that takes one step. Each tensor becomes a dense
copy with memory of its own.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dreambooth_moslora.core.numbers import is_number

__all__ = ["checked_states"]

RUNNING = ("d", "d_max", "d_numerator", "d_denom", "d_hat", "k", "weight_sum", "lr_max")
"""Values that Prodigy and schedule-free AdamW learn per group. All other values of a group come from the
command line."""
NOT_SET = "p0"
"""Prodigy's start of a weight. For a weight that started at zero it keeps a single number."""


def checked_states(states: Mapping[str, Any], optimizer: Optimizer, step: int, exact: bool) -> dict[str, Any]:
    """The checkpoint's states at `step`, with the settings that the optimizer's groups have now.

    `exact`: each parameter has taken all steps; otherwise at most as many. Raises ValueError for states that do
    not fit.
    """
    pattern = pattern_of(optimizer)
    groups = optimizer.state_dict()["param_groups"]
    loaded = states["param_groups"]
    if [group["params"] for group in loaded] != [group["params"] for group in groups]:
        raise ValueError("the groups of parameters are others")
    for number, state in states["state"].items():
        if number not in pattern:
            raise ValueError(f"there is no parameter {number}")
        check_state(dict(leaves_of(state)), dict(leaves_of(pattern[number])), step, exact)
    running = [{name: number_in(group, name) for name in RUNNING if name in group} for group in loaded]
    merged = [{**fresh, **kept} for fresh, kept in zip(groups, running, strict=True)]
    return {"state": dense(states["state"]), "param_groups": merged}


def pattern_of(optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """The states of every parameter after the first step of such an optimizer."""
    groups = []
    for group in optimizer.param_groups:
        params = [torch.nn.Parameter(weight.detach().clone()) for weight in group["params"]]
        for weight in params:
            weight.grad = torch.ones_like(weight)
        groups.append({**group, "params": params})
    twin = type(optimizer)(groups)
    twin.step()
    return twin.state_dict()["state"]


def leaves_of(state: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of everything in nested dicts: 8-bit AdamW nests."""
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from leaves_of(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def dense(value: Any) -> Any:
    """The same nested dicts and numbers; a file's tensor may have strides of 0, or share its memory with another."""
    if isinstance(value, Mapping):
        return {name: dense(part) for name, part in value.items()}
    return value.detach().clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value


def check_state(found: dict[str, Any], pattern: dict[str, Any], step: int, exact: bool) -> None:
    if found.keys() != pattern.keys():
        raise ValueError(f"states are {sorted(found)}, not {sorted(pattern)}")
    for name, expected in pattern.items():
        value = found[name]
        if name == "step":
            check_step(value, step, exact)
        elif isinstance(expected, Tensor):
            check_tensor(name, value, expected)
        elif type(value) is not type(expected):
            raise ValueError(f"{name} is a {type(value).__name__}")


def check_step(value: object, step: int, exact: bool) -> None:
    taken = value.item() if isinstance(value, Tensor) and value.numel() == 1 and value.dim() == 0 else value
    if not isinstance(taken, (int, float)) or not (taken == step if exact else 0 <= taken <= step):
        raise ValueError(f"it has taken {taken} steps, not {step}")


def check_tensor(name: str, value: object, expected: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dtype != expected.dtype or value.layout != expected.layout:
        raise ValueError(f"{name} is no tensor of {expected.dtype}")
    is_start = name == NOT_SET and value.dim() == 0
    if value.shape != expected.shape and not is_start and not (name == NOT_SET and expected.dim() == 0):
        raise ValueError(f"{name} is {tuple(value.shape)}, not {tuple(expected.shape)}")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} is not finite")


def number_in(group: Mapping[str, Any], name: str) -> float | int:
    value = group[name]
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.item()
    if not is_number(value):
        raise ValueError(f"{name} is not a number")
    return value
