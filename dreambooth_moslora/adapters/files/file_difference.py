"""Compares two published adapter files: tensors bit by bit, and the entries of their headers."""

import json
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch
from torch import Tensor

from dreambooth_moslora.adapters.files.tensor_file import read_tensors

__all__ = ["FileDifference", "difference_of"]


@dataclass(frozen=True)
class FileDifference:
    """`first` says how the first differing tensor differs, "" when none does; `count` of `total` tensors differ.

    `largest`: of all tensors, the largest ‖one − other‖ / ‖one‖, infinite for a tensor of one file alone and for NaN.
    `is_cast`: some tensor has another shape or dtype, as in a file that was exported anew. `header` names the differing
    entries of the header; those inside `moslora` have their own names.
    """

    first: str
    count: int
    total: int
    header: tuple[str, ...]
    largest: float = 0.0
    is_cast: bool = False


def difference_of(one: Path, other: Path) -> FileDifference:
    """Compare two safetensors files. Raises UserError when one cannot be read."""
    (tensors, header), (others, other_header) = read_tensors(one), read_tensors(other)
    names = sorted(tensors.keys() | others.keys())
    found = [text for name in names if (text := tensor_difference(name, tensors.get(name), others.get(name)))]
    facts, other_facts = facts_in(header), facts_in(other_header)
    keys = sorted(facts.keys() | other_facts.keys())
    differing = tuple(key for key in keys if facts.get(key) != other_facts.get(key))
    both = [(tensors[name], others[name]) for name in names if name in tensors and name in others]
    is_cast = any((one.shape, one.dtype) != (other.shape, other.dtype) for one, other in both)
    whole = len(both) == len(names) and not is_cast
    largest = max((gap_of(one, other) for one, other in both), default=0.0) if whole else inf
    return FileDifference(found[0] if found else "", len(found), len(names), differing, largest, is_cast)


def tensor_difference(name: str, one: Tensor | None, other: Tensor | None) -> str:
    """How two tensors of any shapes differ, in words; "" for equal bits."""
    if one is None or other is None:
        return f"{name} is in one of the files alone"
    if one.shape != other.shape:
        return f"{name} is {list(one.shape)} and {list(other.shape)}"
    if one.dtype != other.dtype:
        return f"{name} is {one.dtype} and {other.dtype}".replace("torch.", "")
    if torch.equal(bits(one), bits(other)):
        return ""
    return f"{name} differs by {gap_of(one, other):.1e} of its norm"


def gap_of(one: Tensor, other: Tensor) -> float:
    """‖one − other‖ / ‖one‖ of two tensors of one shape; infinite for NaN."""
    gap = float((one.double() - other.double()).norm() / one.double().norm().clamp_min(1e-30))
    return gap if gap == gap else inf


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def facts_in(header: dict[str, str]) -> dict[str, object]:
    """The header with the JSON object under `moslora` expanded."""
    try:
        ours = json.loads(header.get("moslora", "{}"))
    except (ValueError, RecursionError):
        ours = None
    facts = {key: value for key, value in header.items() if key != "moslora"}
    return facts | (ours if isinstance(ours, dict) else {"moslora": header.get("moslora")})
