"""Compares two published adapter files: tensors bit by bit, and the entries of their headers."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dreambooth_moslora.adapters.files.tensor_file import read_tensors

__all__ = ["FileDifference", "difference_of"]


@dataclass(frozen=True)
class FileDifference:
    """`first` says how the first differing tensor differs, "" when none does; `count` of `total` tensors differ.

    `header` names the differing entries of the header; those inside `moslora` have their own names.
    """

    first: str
    count: int
    total: int
    header: tuple[str, ...]


def difference_of(one: Path, other: Path) -> FileDifference:
    """Compare two safetensors files. Raises UserError when one cannot be read."""
    (tensors, header), (others, other_header) = read_tensors(one), read_tensors(other)
    names = sorted(tensors.keys() | others.keys())
    found = [text for name in names if (text := tensor_difference(name, tensors.get(name), others.get(name)))]
    facts, other_facts = facts_in(header), facts_in(other_header)
    keys = sorted(facts.keys() | other_facts.keys())
    differing = tuple(key for key in keys if facts.get(key) != other_facts.get(key))
    return FileDifference(found[0] if found else "", len(found), len(names), differing)


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
