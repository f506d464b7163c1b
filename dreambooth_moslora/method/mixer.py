"""Mixture-of-Subspaces LoRA (MoSLoRA), Wu, Wang, Zhao, Wong, arXiv 2406.11909.

    y = W0·x + s·B·M·A·x        s = alpha/r

    W0 (out, in)    the layer's weight, frozen
    A  (r, in)      down to the rank, as in LoRA
    M  (r, r)       the mixer
    B  (out, r)     up again, as in LoRA

For a convolution, W0 and A are kernels (out, in, h, w) and (r, in, h, w); B and M mix the channels
of each pixel. A starts gaussian and B at zero, so the adapter starts as a no-op with any mixer. B·M
is the B of a plain LoRA: every adapter folds exactly into a plain LoRA, `LowRank`, and with M = I
it is one.

In a model, PEFT's LoRA layer computes it, with a `MixerLinear` instead of its B.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, eq=False)
class LowRank:
    """Matrices of a plain LoRA on one layer, without its scale.

    down: (r, in), or a kernel (r, in, h, w)
    up: (out, r), or a kernel (out, r, 1, 1)
    bias: of `up` (out,)
    magnitude: of DoRA (out,)
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def delta(self) -> torch.Tensor:
        """Weight change ΔW = up·down, computed in fp64, in fp32: (out, in) or (out, in, h, w)."""
        change = self.up.double().flatten(1) @ self.down.double().flatten(1)
        return change.view(len(self.up), *self.down.shape[1:]).float()


Tensors = dict[str, torch.Tensor]
Components = dict[str, torch.nn.Module]
"""Models of a pipeline, by diffusers' names, such as `unet`."""
Folded = dict[str, dict[str, LowRank]]
"""Component -> module path, as in other programs -> layer."""
PLACEHOLDER_SHAPE = (1, 1)


def compute_scale(alpha: float, rank: int, use_rslora: bool = False) -> float:
    """Compute s = alpha/r, or alpha/√r for rsLoRA."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def init_orthogonal(mixer: torch.Tensor, generator: torch.Generator) -> None:
    """Initialize M as a random orthogonal matrix."""
    torch.nn.init.orthogonal_(mixer, generator=generator)


def init_kaiming(mixer: torch.Tensor, generator: torch.Generator) -> None:
    """Initialize M as PEFT initializes A by default."""
    torch.nn.init.kaiming_uniform_(mixer, a=math.sqrt(5), generator=generator)


def init_identity(mixer: torch.Tensor, generator: torch.Generator) -> None:
    """Initialize M as I."""
    torch.nn.init.eye_(mixer)


def init_butterfly(mixer: torch.Tensor, generator: torch.Generator) -> None:
    """Initialize M as [[I, I], [I, I]]: each subspace is mixed with one of the other half."""
    mixer.copy_(torch.eye(len(mixer) // 2).repeat(2, 2))


INITIALIZERS: dict[str, Callable[[torch.Tensor, torch.Generator], None]] = {
    "orthogonal": init_orthogonal,
    "kaiming": init_kaiming,
    "identity": init_identity,
    "butterfly": init_butterfly,
}
"""Kind -> function that initializes M (r, r) in place by the generator. `setting_rows.MIXERS` lists
the kinds."""


def build_initial_mixer(kind: str, rank: int, seed: int, path: str) -> torch.Tensor:
    """Build M₀ (r, r) in fp32 on the CPU.

    kind: key of `INITIALIZERS`
    rank: r
    seed, path: of the run and of the layer. They alone decide the random numbers, so that a layer's
        mixer does not depend on which other layers are adapted

    Raises ValueError for an unknown kind.
    """
    if kind not in INITIALIZERS:
        raise ValueError(f"there is no mixer {kind!r}")

    # A seed of torch is below 2⁶³, hence the shift by one bit.
    digest = hashlib.blake2b(f"{seed}:{path}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)

    mixer = torch.empty(rank, rank, dtype=torch.float32, device="cpu")
    INITIALIZERS[kind](mixer, generator)
    return mixer


@dataclass(frozen=True, eq=False)
class MixedLowRank:
    """Matrices of MoSLoRA on one layer.

    down: A (r, in), or a kernel (r, in, h, w)
    mixer: M (r, r); None for the identity
    up: B (out, r)
    scale: s
    magnitude: of DoRA (out,)
    """

    down: torch.Tensor
    mixer: torch.Tensor | None
    up: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None

    @torch.no_grad()
    def fold(self) -> LowRank:
        """Fold into the equal plain LoRA in fp32: down = A, up = s·B·M, computed in fp64 on the
        CPU, as Apple's GPUs lack fp64."""
        up = self.up.cpu().double()
        if self.mixer is not None:
            up = up @ self.mixer.cpu().double()
        up = (self.scale * up).float()

        # For a convolution, `up` is a kernel of 1 x 1.
        up = up.view(*up.shape, *(1,) * (self.down.ndim - 2))

        # Copy them, as the live matrices go on learning.
        down = self.down.float().cpu().clone(memory_format=torch.contiguous_format)
        magnitude = None if self.magnitude is None else self.magnitude.float().cpu().clone()
        return LowRank(down=down, up=up.contiguous(), magnitude=magnitude)


class MixerLinear(torch.nn.Module):
    """Linear layer B·M in place of LoRA's B.

    up: B (out, r), a parameter
    mixer: M (r, r), a parameter
    train_mixer: False makes M a buffer, as PEFT trains every parameter

    The state dict has both, and a `weight` of one zero, which fits no plain LoRA: a reader without
    support for mixers fails instead of computing without M.
    """

    def __init__(self, up: torch.Tensor, mixer: torch.Tensor, train_mixer: bool = True):
        super().__init__()
        self.up = torch.nn.Parameter(up)
        if train_mixer:
            self.mixer = torch.nn.Parameter(mixer)
        else:
            self.register_buffer("mixer", mixer)

    def compute_product(self) -> torch.Tensor:
        """Compute B·M (out, r), in the shape of a plain LoRA's B."""
        return self.up @ self.mixer

    @property
    def weight(self) -> torch.Tensor:
        """Product B·M, which PEFT merges as a plain LoRA's weight."""
        return self.compute_product()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute B·M·x (…, out) of x (…, r)."""
        return F.linear(x, self.compute_product())

    def _save_to_state_dict(
        self, destination: dict[str, torch.Tensor], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.up.detach().new_zeros(PLACEHOLDER_SHAPE)

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ) -> None:
        plain = state_dict.pop(f"{prefix}weight", None)
        if plain is not None and plain.shape != PLACEHOLDER_SHAPE:
            errors.append(f"{prefix}weight is a plain LoRA's, and this adapter has a mixer")
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )


class MixerConv2d(MixerLinear):
    """Convolution of 1×1 with the kernel B·M. `up` and `mixer` are matrices."""

    def compute_product(self) -> torch.Tensor:
        """Compute B·M (out, r, 1, 1), in the shape of a plain LoRA's B."""
        return super().compute_product()[:, :, None, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute B·M·x (N, out, H, W) of x (N, r, H, W)."""
        return F.conv2d(x, self.compute_product())
