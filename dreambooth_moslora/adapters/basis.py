"""A frozen basis: A and B of each layer are given, and a subject is the mixer M alone (LoRA-XS, arXiv 2405.17604).

    W0 ≈ U·S·Vᵀ        A = √c·V_rᵀ (r, in)        B = √c·U_r (out, r)        c = the mean of the r largest S
    y  = W0·x + s·B·M·A·x        M (r, r) starts at zero

`SvdBasis` is of the base's own weights, as its files hold them: the same in whatever precision the base is loaded.
`FileBasis` takes A and B from a raw adapter file. The files of a run name its basis by kind and SHA-256.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dreambooth_moslora.adapters.files.raw_file import component_tensors, fill, read_raw
from dreambooth_moslora.adapters.moslora import adapter_layers, matrices_of
from dreambooth_moslora.base.headers import variants_in, weight_files
from dreambooth_moslora.core.config.training_settings import SVD
from dreambooth_moslora.core.digests import content_key, file_digest
from dreambooth_moslora.core.errors import UserError

__all__ = [
    "Basis",
    "FileBasis",
    "SvdBasis",
    "freeze_basis",
    "leading_directions",
    "put_basis",
    "read_basis",
    "svd_bases",
]

UNET = "unet"
NEGLIGIBLE = 1e-6
"""Singular values below this share of the largest are rounding: they are roots of eigenvalues in fp64."""


class Basis(Protocol):
    """A and B of a UNet's layers. `note` names the basis: its kind, a SHA-256, and the name of its file or ""."""

    note: dict[str, str]

    def layer(self, path: str, rank: int) -> tuple[Tensor, Tensor]:
        """A (rank, in, …) and B (out, rank) in fp32 on the CPU. Raises UserError for a layer that it lacks."""


class SvdBasis:
    """The leading singular directions of the weights in a diffusers folder. The SHA-256 is of the UNet's files.

    Raises UserError for `folder` None, which a single-file base has, and for weights in another format.
    """

    def __init__(self, folder: Path | None, variant: str | None = None):
        self.files = [] if folder is None else weight_files(folder / UNET, variant)
        if not self.files or any(file.suffix != ".safetensors" for file in self.files):
            raise UserError("the basis svd needs a base in a diffusers folder with .safetensors files, or a hub id")
        self.note = {"kind": SVD, "sha256": digest_of(self.files), "file": ""}

    def layer(self, path: str, rank: int) -> tuple[Tensor, Tensor]:
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
        tensors, self.metadata = read_raw(file)
        self.modules = component_tensors(tensors, UNET)

    def layer(self, path: str, rank: int) -> tuple[Tensor, Tensor]:
        parts = self.modules.get(path)
        if parts is None:
            raise UserError(f"the basis {self.file.name} has no layer {path:.100}")
        if len(parts["lora_A"]) != rank:
            raise UserError(f"the basis {self.file.name} has rank {len(parts['lora_A'])} in {path:.100}, not {rank}")
        return parts["lora_A"].float(), parts["lora_B"].float()


def read_basis(given: str, folder: Path | None, variant: str | None = None) -> Basis:
    """The basis that `--basis` names, for the base in this diffusers folder. Raises UserError."""
    return SvdBasis(folder, variant) if given == SVD else FileBasis(Path(given))


def svd_bases(folder: Path | None) -> Iterator[SvdBasis]:
    """The basis svd of the folder's plain weights, then of each variant's. Raises UserError as `SvdBasis` does."""
    yield SvdBasis(folder)
    for variant in [] if folder is None else variants_in(folder / UNET):
        yield SvdBasis(folder, variant)


def digest_of(files: list[Path]) -> str:
    """One SHA-256 of all files; of an unchanged file it is computed once."""
    digests = [known_digest(file, file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    return digests[0] if len(digests) == 1 else content_key(files=digests)


@lru_cache(maxsize=64)
def known_digest(file: Path, _mtime_ns: int, _size: int) -> str:
    return file_digest(file)


def leading_directions(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in, …) and B (out, rank) of a weight (out, in, …), computed in fp64 on the CPU.

    They come from the eigenvectors of the smaller of W·Wᵀ and Wᵀ·W, a tenth of a full SVD's time. Of each pair the
    largest entry on that side is positive. Directions beyond the rank of W are zero.
    """
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
    for path, layer in adapter_layers(unet, adapter_name).items():
        own = matrices_of(layer, adapter_name)
        down, up = basis.layer(path, len(own.down))
        if (down.shape, up.shape) != (own.down.shape, own.up.shape):
            name = basis.note["file"] or basis.note["kind"]
            raise UserError(f"the basis {name} was made for another base: {path:.100} has another size here")
        fill(layer, adapter_name, {"lora_A": down, "lora_B": up, "mixer": torch.zeros_like(own.mixer)})


def freeze_basis(unet: nn.Module, adapter_name: str = "default") -> None:
    """Let only the mixers of the adapter learn."""
    for layer in adapter_layers(unet, adapter_name).values():
        layer.lora_A[adapter_name].weight.requires_grad_(False)
        layer.lora_B[adapter_name].up.requires_grad_(False)
