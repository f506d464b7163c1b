"""Subjects on one frozen basis: A and B are given, and a subject is its mixers M alone.

LoRA-XS, arXiv 2405.17604:

    W0 ≈ U·S·Vᵀ        A = √c·V_rᵀ (r, in)        B = √c·U_r (out, r)
    y  = W0·x + s·B·M·A·x        M (r, r) starts at zero
    c  = the mean of the r largest S

A basis is the word svd, for the denoiser's own weights, or a raw adapter file, whose A and B are
taken.
"""

from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor, nn

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora import raw_file
from dreambooth_moslora.method import moslora
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.loop import TrainResult, advanced, training

SVD = "svd"
"""The word for the basis of the denoiser's own weights."""
ADAPTER = "default"
"""The adapter's name in the model."""
NEGLIGIBLE = 1e-6
"""Singular values below this share of the largest are rounding: roots of eigenvalues in fp64."""


def train_on_basis(config: TrainConfig, basis: str) -> TrainResult:
    """`loop.train` of a new run, in which only the mixers learn. Raises UserError."""
    with closing(training(config)) as steps:
        try:
            run = next(steps)  # all is prepared, and no step is done
            components = run.train_step.components
            put_basis(basis, components)
            freeze_basis(components)
            while True:
                run = advanced(steps, run.accumulate_gradients)
        except StopIteration as end:
            return end.value


def put_basis(basis: str, components: dict[str, nn.Module]) -> None:
    """Give the adapter of the denoiser, the first of the components, this A and B, and mixers of
    zeros.

    Raises UserError for a basis of other layers or sizes, and for an adapter without mixers.
    """
    name, denoiser = next(iter(components.items()))
    kept = {}
    if basis != SVD:
        tensors, _ = raw_file.read_raw(Path(basis))
        kept = raw_file.by_module(tensors).get(name, {})

    for path, layer in moslora.adapter_layers(denoiser, ADAPTER).items():
        # A and B of this layer
        down, mixer, up = moslora.stored_matrices(layer, ADAPTER)
        if basis == SVD:
            new_down, new_up = leading_directions(layer.get_base_layer().weight, len(down))
        elif path in kept:
            new_down = kept[path]["lora_A"]
            new_up = kept[path]["lora_B"]
        else:
            raise UserError(f"the basis {basis} has no layer {path:.100}.")
        if mixer is None or (new_down.shape, new_up.shape) != (down.shape, up.shape):
            raise UserError(
                f"the basis {basis} is no A and B for the mixer of {path:.100}: "
                "give its rank and base."
            )

        parts = {"lora_A": new_down, "lora_B": new_up, "mixer": torch.zeros_like(mixer)}
        raw_file.fill(layer, ADAPTER, parts)


def freeze_basis(components: dict[str, nn.Module]) -> None:
    """Let only the mixers of the denoiser, the first of the components, learn."""
    denoiser = next(iter(components.values()))
    for name, parameter in moslora.adapter_parameters(denoiser, ADAPTER):
        parameter.requires_grad_(name.endswith(".mixer"))


def leading_directions(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in, …) and B (out, rank) of a weight (out, in, …), in fp32.

    They are computed in fp64 on the CPU, by the eigenvectors of the smaller of W·Wᵀ and Wᵀ·W. The
    largest entry on that side is positive. Directions beyond the rank of W are zero.
    """
    # eigenvectors of the smaller side; `eigh` sorts from the smallest
    flat = weight.detach().cpu().double().flatten(1)
    is_tall = len(flat) > flat.shape[1]
    wide = flat.T if is_tall else flat
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    kept = min(rank, len(wide))
    sizes = squares.flip(0)[:kept].clamp(min=0).sqrt()
    first = vectors.flip(1)[:, :kept]

    # a direction's sign is free: choose it, so that every machine has the same
    is_real = sizes > sizes[0] * NEGLIGIBLE
    largest = first.gather(0, first.abs().argmax(0, keepdim=True))
    first = first * largest.sign() * is_real

    # the other side, without a division by what is only rounding
    second = wide.T @ first / torch.where(is_real, sizes, torch.ones_like(sizes))
    out_side, in_side = (second, first) if is_tall else (first, second)

    # both scaled by √c; a rank above that of W leaves zeros
    root = sizes.mean().sqrt()
    up = flat.new_zeros(len(flat), rank)
    down = flat.new_zeros(rank, flat.shape[1])
    up[:, :kept] = root * out_side
    down[:kept] = root * in_side.T
    return down.view(rank, *weight.shape[1:]).float(), up.float()
