"""Subjects on one frozen basis: A and B are given, and a subject is its mixers M alone (LoRA-XS, arXiv 2405.17604).

    W0 ≈ U·S·Vᵀ        A = √c·V_rᵀ (r, in)        B = √c·U_r (out, r)        c = the mean of the r largest S
    y  = W0·x + s·B·M·A·x        M (r, r) starts at zero

`SvdBasis` is of the base's own weights as its files hold them, `FileBasis` takes A and B from a raw adapter file. A
subject's file holds r² numbers a layer, a few hundred kB for all:

    mixers (n,) fp16    M of all layers, in order, with the scale s included, divided by 2^exponent

Its header holds the metadata as other files do, the layers' paths and the exponent. Stock LoRA loaders refuse it.

`SwappedMixers` is a basis in a UNet as one PEFT adapter, whose mixers are views of one buffer: another subject is one
copy. Several subjects at once are the sum of their mixers, as B·(M₁ + M₂)·A = B·M₁·A + B·M₂·A.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dreambooth_moslora.adapters import raw_file
from dreambooth_moslora.adapters.metadata import HEADER, AdapterMetadata
from dreambooth_moslora.base.files import variants_in, weight_files
from dreambooth_moslora.core import UserError, content_key, file_digest
from dreambooth_moslora.settings.table import SVD, ZERO

UNET = "unet"
NEGLIGIBLE = 1e-6  # singular values below this share of the largest are rounding: roots of eigenvalues in fp64


class SvdBasis:
    """The leading singular directions of a folder's UNet, noted by its files' SHA-256. Raises UserError for None."""

    def __init__(self, folder: Path | None, variant: str | None = None):
        self.files = [] if folder is None else weight_files(folder / UNET, variant)
        if not self.files or any(file.suffix != ".safetensors" for file in self.files):
            raise UserError("the basis svd needs a base in a diffusers folder with .safetensors files, or a hub id")
        stats = [(file, file.stat()) for file in self.files]
        digests = [known_digest(file, stat.st_mtime_ns, stat.st_size) for file, stat in stats]
        digest = digests[0] if len(digests) == 1 else content_key(files=digests)
        self.note = {"kind": SVD, "sha256": digest, "file": ""}

    def layer(self, path: str, rank: int) -> tuple[Tensor, Tensor]:
        """A (rank, in, …) and B (out, rank) in fp32 on the CPU. Raises UserError for a layer that the basis lacks."""
        name = f"{path}.weight"
        for file in self.files:
            with safe_open(file, framework="pt") as opened:
                if name in opened.keys():  # noqa: SIM118
                    return leading_directions(opened.get_tensor(name), rank)
        raise UserError(f"the base's files hold no {name:.100}, of which the basis would be made")


class FileBasis:
    """A and B of a raw adapter file; its mixers are not used. Raises UserError for any other file."""

    def __init__(self, file: Path):
        self.file = file
        self.note = {"kind": "file", "sha256": file_digest(file) if file.is_file() else "", "file": file.name}
        tensors, self.metadata = raw_file.read_raw(file)
        self.modules = raw_file.by_module(tensors).get(UNET, {})

    def layer(self, path: str, rank: int) -> tuple[Tensor, Tensor]:
        parts = self.modules.get(path)
        if parts is None:
            raise UserError(f"the basis {self.file.name} has no layer {path:.100}")
        if len(parts["lora_A"]) != rank:
            raise UserError(f"the basis {self.file.name} has rank {len(parts['lora_A'])} in {path:.100}, not {rank}")
        return parts["lora_A"].float(), parts["lora_B"].float()


Basis = SvdBasis | FileBasis  # A and B of a UNet's layers


def read_basis(given: str, folder: Path | None, variant: str | None = None) -> Basis:
    """The basis that `--basis` names, for the base in this diffusers folder. Raises UserError."""
    return SvdBasis(folder, variant) if given == SVD else FileBasis(Path(given))


def svd_bases(folder: Path | None) -> Iterator[SvdBasis]:
    """The basis svd of the folder's plain weights, then of each variant's. Raises UserError as `SvdBasis` does."""
    yield SvdBasis(folder)
    for variant in [] if folder is None else variants_in(folder / UNET):
        yield SvdBasis(folder, variant)


@lru_cache(maxsize=64)
def known_digest(file: Path, _mtime_ns: int, _size: int) -> str:
    return file_digest(file)


def leading_directions(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in, …) and B (out, rank) of a weight (out, in, …), in fp64 on the CPU, by the eigenvectors of the
    smaller of W·Wᵀ and Wᵀ·W. The largest entry on that side is positive. Directions beyond the rank of W are zero."""
    flat = weight.cpu().double().flatten(1)
    is_tall = len(flat) > flat.shape[1]
    wide = flat.T if is_tall else flat
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    kept = min(rank, len(wide))
    sizes, first = squares.flip(0)[:kept].clamp(min=0).sqrt(), vectors.flip(1)[:, :kept]
    is_real = sizes > sizes[0] * NEGLIGIBLE
    first = first * first.gather(0, first.abs().argmax(0, keepdim=True)).sign() * is_real
    second = wide.T @ first / torch.where(is_real, sizes, torch.ones_like(sizes))
    out_side, in_side = (second, first) if is_tall else (first, second)
    root = sizes.mean().sqrt()
    up, down = flat.new_zeros(len(flat), rank), flat.new_zeros(rank, flat.shape[1])
    up[:, :kept], down[:kept] = root * out_side, root * in_side.T
    return down.view(rank, *weight.shape[1:]).float(), up.float()


def put_basis(basis: Basis, unet: nn.Module, adapter_name: str = "default") -> None:
    """Give the adapter the basis, with its mixers at zero. Raises UserError for a basis of another base."""
    from dreambooth_moslora.adapters import moslora

    for path, layer in moslora.adapter_layers(unet, adapter_name).items():
        own = moslora.matrices_of(layer, adapter_name)
        down, up = basis.layer(path, len(own.down))
        if (down.shape, up.shape) != (own.down.shape, own.up.shape):
            name = basis.note["file"] or basis.note["kind"]
            raise UserError(f"the basis {name} was made for another base: {path:.100} has another size here")
        raw_file.fill(layer, adapter_name, {"lora_A": down, "lora_B": up, "mixer": torch.zeros_like(own.mixer)})


def freeze_basis(unet: nn.Module, adapter_name: str = "default") -> None:
    from dreambooth_moslora.adapters import moslora

    for layer in moslora.adapter_layers(unet, adapter_name).values():
        layer.lora_A[adapter_name].weight.requires_grad_(False)
        layer.lora_B[adapter_name].up.requires_grad_(False)


MIXERS, LAYERS, EXPONENT = "mixers", "layers", "exponent"
COMPONENT = f"{UNET}."
LARGEST = 2.0**14  # of the numbers in the file: fp16 holds up to 65504, and loses precision below 6e-5


@dataclass(frozen=True, eq=False)
class Mixers:
    file_name: str
    sha256: str
    values: Tensor  # (n,) fp32: s·M of each layer after the other
    ranks: dict[str, int]  # path -> r
    metadata: AdapterMetadata
    header: dict[str, str]

    @cached_property
    def basis_key(self) -> str:
        """Equal for subjects whose mixers fit the same A and B."""
        basis = {name: value for name, value in self.metadata.basis.items() if name != "file"}
        return f"basis_{content_key(basis=basis, ranks=self.ranks)[:16]}"


def write_mixers(path: Path, unet: nn.Module, metadata: AdapterMetadata, adapter_name: str = "default") -> None:
    """Write the mixers of a live adapter on a basis. Raises UserError for values that fp16 does not hold."""
    from dreambooth_moslora.adapters import moslora, proof

    live = moslora.adapter_layers(unet, adapter_name)
    matrices = [moslora.matrices_of(layer, adapter_name) for layer in live.values()]
    mixers = [one.scale * one.mixer.detach().cpu().double() for one in matrices]
    values = torch.cat([mixer.flatten() for mixer in mixers])
    raw_file.check_finite({MIXERS: values}, "the adapter")
    largest = float(values.abs().max())
    exponent = math.ceil(math.log2(largest / LARGEST)) if largest else 0
    ranks = {name: len(mixer) for name, mixer in zip(live, mixers, strict=True)}
    others = {COMPONENT + name: rank for name, rank in ranks.items() if rank != metadata.rank}
    folded = {"alpha": metadata.rank, "alphas": others, "use_rslora": False, "structures": {}, "mixer": ZERO}
    metadata = replace(metadata, ranks=others, **folded)
    header = metadata.header | {LAYERS: json.dumps([*live]), EXPONENT: str(exponent)}
    raw_file.write_file(path, {MIXERS: (values * 2.0**-exponent).half()}, header)
    found = read_mixers(path).values.double().split([rank**2 for rank in ranks.values()])
    for name, there, here in zip(live, found, mixers, strict=True):
        if not (lost := proof.relative_difference(there, here.flatten())) <= proof.BOUNDS[torch.float16]:
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
    tensors, header = raw_file.read_tensors(path)
    values = tensors.get(MIXERS)
    if len(tensors) != 1 or values is None:
        raise UserError(f"{path.name} holds no mixers of this program")
    try:
        metadata = AdapterMetadata.from_json(header[HEADER])
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
    raw_file.check_finite({MIXERS: values}, path.name)
    return Mixers(path.name, file_digest(path), values, ranks, metadata, header)


class SwappedMixers:
    """The adapter `name` on the layers of `ranks` (path -> r), at first zero. Raises UserError if it does not fit."""

    def __init__(self, unet: nn.Module, basis: Basis, ranks: Mapping[str, int], name: str):
        from dreambooth_moslora.adapters import moslora

        known = moslora.matrix_layers(unet)
        if strange := next((path for path in ranks if path not in known), None):
            raise UserError(f"the mixers were made for another base: it has no layer {strange:.100}")
        rank = next(iter(ranks.values()))
        moslora.inject(unet, moslora.exact_config(ranks, ranks, rank, rank, mixer=ZERO), name)
        try:
            put_basis(basis, unet, name)
        except UserError:
            unet.delete_adapters(name)
            raise
        layers = moslora.adapter_layers(unet, name)
        for layer in layers.values():
            layer.lora_A[name].to(unet.dtype).requires_grad_(False)
            layer.lora_B[name].to(unet.dtype).requires_grad_(False)
        self.parts = [layers[path].lora_B[name] for path in ranks]
        self._bind()

    @torch.no_grad()
    def show(self, subjects: Sequence[tuple[Tensor, float]]) -> None:
        """Compute with the weighted sum of the subjects' mixers (n,) from now on."""
        first = self.parts[0].mixer
        if first.data_ptr() != self.buffer.data_ptr() or first.dtype != self.buffer.dtype:
            self._bind()  # the UNet has moved, and its tensors are new
        (values, scale), *others = subjects
        total = values if scale == 1 else scale * values
        for values, scale in others:
            total = total + scale * values
        self.buffer.copy_(total)

    @torch.no_grad()
    def _bind(self) -> None:
        """Put all mixers into one `buffer` (n,), of which they become views."""
        self.buffer = torch.cat([part.mixer.flatten() for part in self.parts])
        views = self.buffer.split([part.mixer.numel() for part in self.parts])
        for part, view in zip(self.parts, views, strict=True):
            part.mixer = nn.Parameter(view.view_as(part.mixer), requires_grad=False)
