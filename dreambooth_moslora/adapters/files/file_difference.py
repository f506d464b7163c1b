"""Compares two published adapter files: tensors bit by bit, and the entries of their headers."""

import json
import math
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch
from torch import Tensor

from dreambooth_moslora.adapters.files.describe import Pair, find_pairs
from dreambooth_moslora.adapters.files.tensor_file import read_tensors

__all__ = ["FileDifference", "difference_of", "update_gap"]


@dataclass(frozen=True)
class FileDifference:
    """`first` says how the first differing tensor differs, "" when none does; `count` of `total` tensors differ.

    `of_updates`: ‖ΔW − ΔW'‖ / ‖ΔW‖ over all layers, infinite if the files hold other layers or alphas, or none.
    `is_cast`: some tensor has another shape or dtype, as in a file that was exported anew. `header` names the differing
    entries of the header; those inside `moslora` have their own names.
    """

    first: str
    count: int
    total: int
    header: tuple[str, ...]
    of_updates: float = inf
    is_cast: bool = False


def difference_of(one: Path, other: Path) -> FileDifference:
    """Compare two safetensors files. Raises UserError when one cannot be read or holds NaN."""
    (tensors, header), (others, other_header) = read_tensors(one), read_tensors(other)
    names = sorted(tensors.keys() | others.keys())
    found = [text for name in names if (text := tensor_difference(name, tensors.get(name), others.get(name)))]
    facts, other_facts = facts_in(header), facts_in(other_header)
    keys = sorted(facts.keys() | other_facts.keys())
    differing = tuple(key for key in keys if facts.get(key) != other_facts.get(key))
    both = [(tensors[name], others[name]) for name in names if name in tensors and name in others]
    is_cast = any((a.shape, a.dtype) != (b.shape, b.dtype) for a, b in both)
    is_other = is_cast or len(both) < len(names) or any(a.numel() == 1 and not torch.equal(a, b) for a, b in both)
    of_updates = inf
    if found and not is_other:
        of_updates = update_gap(find_pairs(one.name, tensors), find_pairs(other.name, others))
    return FileDifference(found[0] if found else "", len(found), len(names), differing, of_updates, is_cast)


def update_gap(one: list[Pair], other: list[Pair]) -> float:
    """‖ΔW − ΔW'‖ / ‖ΔW‖ over equal layers of two files; infinite without a layer."""
    gaps = [(a.matrices.delta - b.matrices.delta).norm() for a, b in zip(one, other, strict=True)]
    size = math.hypot(*(a.matrices.delta.norm() for a in one))
    return math.hypot(*gaps) / size if size else inf


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
    gap = (one.double() - other.double()).norm() / one.double().norm().clamp_min(1e-30)
    return f"{name} differs by {float(gap):.1e} of its norm"


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
