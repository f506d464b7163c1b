"""A subject on a frozen basis as its mixers alone: r² numbers a layer, a few hundred kB for all.

    mixers (n,) fp16    M of all layers, in order, with the scale s included, divided by 2^exponent

The header holds the metadata as other files do (`moslora`: ranks, and the basis by kind and SHA-256), the layers'
paths and the exponent. Stock LoRA loaders refuse such a file: they know none of its names.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dreambooth_moslora.adapters.files.metadata import AdapterMetadata
from dreambooth_moslora.adapters.files.proof import BOUNDS, relative_difference
from dreambooth_moslora.adapters.files.tensor_file import check_finite, read_tensors, write_file
from dreambooth_moslora.adapters.moslora import adapter_layers, matrices_of
from dreambooth_moslora.core.config.training_settings import ZERO
from dreambooth_moslora.core.digests import content_key, file_digest
from dreambooth_moslora.core.errors import UserError

__all__ = ["Mixers", "is_mixer_file", "read_mixers", "write_mixers"]

MIXERS, LAYERS, EXPONENT = "mixers", "layers", "exponent"
COMPONENT = "unet."
LARGEST = 2.0**14
"""Of the numbers in the file: fp16 holds up to 65504, and loses precision below 6e-5."""


@dataclass(frozen=True, eq=False)
class Mixers:
    """The mixers of one subject. `values` (n,) fp32: s·M of each layer after the other; `ranks`: path -> r."""

    file_name: str
    sha256: str
    values: Tensor
    ranks: dict[str, int]
    metadata: AdapterMetadata
    header: dict[str, str]

    @cached_property
    def basis_key(self) -> str:
        """Equal for subjects whose mixers fit the same A and B."""
        basis = {name: value for name, value in self.metadata.basis.items() if name != "file"}
        return f"basis_{content_key(basis=basis, ranks=self.ranks)[:16]}"


def write_mixers(path: Path, unet: nn.Module, metadata: AdapterMetadata, adapter_name: str = "default") -> None:
    """Write the mixers of a live adapter on a basis, and read them back.

    Raises UserError for NaN or infinity, and for a mixer that fp16 does not hold.
    """
    live = {path: matrices_of(layer, adapter_name) for path, layer in adapter_layers(unet, adapter_name).items()}
    mixers = [matrices.scale * matrices.mixer.detach().cpu().double() for matrices in live.values()]
    values = torch.cat([mixer.flatten() for mixer in mixers])
    check_finite({MIXERS: values}, "the adapter")
    largest = float(values.abs().max())
    exponent = math.ceil(math.log2(largest / LARGEST)) if largest else 0
    ranks = {name: len(mixer) for name, mixer in zip(live, mixers, strict=True)}
    others = {COMPONENT + name: rank for name, rank in ranks.items() if rank != metadata.rank}
    metadata = replace(
        metadata, alpha=metadata.rank, ranks=others, alphas=others, use_rslora=False, structures={}, mixer=ZERO
    )
    header = {"moslora": metadata.to_json(), LAYERS: json.dumps([*live]), EXPONENT: str(exponent)}
    write_file(path, {MIXERS: (values * 2.0**-exponent).half()}, header)
    found = read_mixers(path).values.double().split([rank**2 for rank in ranks.values()])
    for name, there, here in zip(live, found, mixers, strict=True):
        if not (lost := relative_difference(there, here.flatten())) <= BOUNDS[torch.float16]:
            path.unlink()
            raise UserError(f"{path.name} was not published: fp16 loses {lost:.1e} of the mixer of {name}")


def is_mixer_file(file: Path) -> bool:
    """Whether it holds mixers alone; damaged files do not count."""
    try:
        with safe_open(file, framework="pt") as opened:
            return set(opened.keys()) == {MIXERS}
    except (SafetensorError, OSError, ValueError):
        return False


def read_mixers(path: Path) -> Mixers:
    """The content of a mixer file. Raises UserError for any other, and for a broken one."""
    tensors, header = read_tensors(path)
    values = tensors.get(MIXERS)
    if len(tensors) != 1 or values is None:
        raise UserError(f"{path.name} holds no mixers of this program")
    try:
        metadata = AdapterMetadata.from_json(header["moslora"])
        layers, factor = json.loads(header[LAYERS]), 2.0 ** int(header[EXPONENT])
        ranks = {name: metadata.ranks.get(COMPONENT + name, metadata.rank) for name in layers}
        count = sum(rank**2 for rank in ranks.values())
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        reason = f": {error}" if type(error) is ValueError else ""
        raise UserError(f"{path.name} has lost its header, which names the layers and the basis{reason:.100}") from None
    is_whole = isinstance(layers, list) and len(ranks) == len(layers) > 0 and metadata.basis
    if not is_whole or not values.is_floating_point() or tuple(values.shape) != (count,):
        raise UserError(f"{path.name} is broken: its mixers are not those of the layers that its header names")
    values = values.float() * factor
    check_finite({MIXERS: values}, path.name)
    return Mixers(path.name, file_digest(path), values, ranks, metadata, header)
