"""Subjects on one frozen basis: A and B are given, and a subject is its mixers M alone (LoRA-XS, arXiv 2405.17604).

    W0 ≈ U·S·Vᵀ        A = √c·V_rᵀ (r, in)        B = √c·U_r (out, r)        c = the mean of the r largest S
    y  = W0·x + s·B·M·A·x        M (r, r) starts at zero

`SvdBasis` is of the base's own weights as its files hold them, `FileBasis` takes A and B from a raw adapter file.
"""

from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dreambooth_moslora.adapters import raw_file
from dreambooth_moslora.base.files import weight_files
from dreambooth_moslora.core import UserError, content_key, file_digest
from dreambooth_moslora.settings.table import SVD

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
