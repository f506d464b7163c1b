"""Mixture-of-Subspaces LoRA (MoSLoRA), Wu, Wang, Zhao, Wong, arXiv 2406.11909: the method on one
page.

    y = W0·x + s·B·M·A·x        W0 (out, in) frozen,  A (r, in),  M (r, r) the mixer,  B (out, r),  s = alpha/r

For a convolution, W0 and A are kernels (out, in, h, w) and (r, in, h, w); B and M mix the channels
of each pixel. A starts gaussian and B at zero, so the adapter starts as a no-op with any mixer. B·M
is the B of a plain LoRA: every adapter folds exactly into a plain LoRA, `LowRank`, and with M = I
it is one. LoKr (Yeh et al., arXiv 2309.14859) is a MoSLoRA whose A and B are tied: with W₁ (f, f),
A₂ (r/f, in/f) and B₂ (out/f, r/f),

    W₁ ⊗ (B₂·A₂) = (I ⊗ B₂) · (W₁ ⊗ I) · (I ⊗ A₂)

so the mixer "kronecker" learns W₁, A₂ and B₂. `MixedLowRank` is the formula. In a model,
PEFT's LoRA layer computes it, with a `MixerLinear` instead of its B.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings.table import KRONECKER


@dataclass(frozen=True, eq=False)
class LowRank:
    """The matrices of a plain LoRA on one layer, without its scale: `down` (r, in) and `up` (out,
    r), or kernels (r, in, h, w) and (out, r, 1, 1). `bias` (out,) is added by `up`; `magnitude`
    (out,) is DoRA's."""

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def delta(self) -> torch.Tensor:
        """ΔW = up·down (out, in) or (out, in, h, w), computed in fp64 and returned in fp32."""
        change = self.up.double().flatten(1) @ self.down.double().flatten(1)
        return change.view(len(self.up), *self.down.shape[1:]).float()


Tensors = dict[str, torch.Tensor]
Components = dict[str, torch.nn.Module]  # by diffusers' names, such as `unet`
# component -> module path, as other programs know it -> the layer
Folded = dict[str, dict[str, LowRank]]
PLACEHOLDER_SHAPE = (1, 1)  # of `lora_B.weight` in the state dict of an adapter with a mixer


def nominal_scale(alpha: float, rank: int, use_rslora: bool = False) -> float:
    """s = alpha/r, or alpha/√r for rsLoRA."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


STARTS: dict[str, Callable[[torch.Tensor, torch.Generator], object]] = {
    "orthogonal": lambda mixer, generator: torch.nn.init.orthogonal_(mixer, generator=generator),
    "kaiming": lambda mixer, generator: torch.nn.init.kaiming_uniform_(
        mixer, a=math.sqrt(5), generator=generator
    ),
    "identity": lambda mixer, _: torch.nn.init.eye_(mixer),
    # [[I, I], [I, I]]
    "butterfly": lambda mixer, _: mixer.copy_(torch.eye(len(mixer) // 2).repeat(2, 2)),
    # of W₁ (f, f)
    KRONECKER: lambda mixer, generator: torch.nn.init.orthogonal_(mixer, generator=generator),
}
"""Kind -> how M (r, r) starts, in place, from the generator alone. `settings.table.MIXERS` offers
them."""


def initial_mixer(kind: str, rank: int, seed: int, path: str) -> torch.Tensor:
    """M₀ (r, r) in fp32 on the CPU, by seed and path alone. Raises ValueError for an unknown kind."""
    digest = hashlib.blake2b(f"{seed}:{path}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
    if kind not in STARTS:
        raise ValueError(f"there is no mixer {kind!r}")
    mixer = torch.empty(rank, rank, dtype=torch.float32, device="cpu")
    STARTS[kind](mixer, generator)
    return mixer


@dataclass(frozen=True, eq=False)
class MixedLowRank:
    """One layer: A `down` (r, in, …), M `mixer` (r, r) (None: I), B `up` (out, r), s, DoRA's
    `magnitude` (out,)."""

    down: torch.Tensor
    mixer: torch.Tensor | None
    up: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """y = W0·x + s·B·M·A·x: x (…, in), W0 `weight` (out, in) -> y (…, out)."""
        inner = F.linear(x, self.down)
        mixed = inner if self.mixer is None else F.linear(inner, self.mixer)
        return F.linear(x, weight) + self.scale * F.linear(mixed, self.up)

    @torch.no_grad()
    def fold(self) -> LowRank:
        """The equal plain LoRA, down = A, up = s·B·M; fp32, computed in fp64 on the CPU, as Apple
        GPUs lack that."""
        up = self.up.cpu().double()
        if self.mixer is not None:
            up = up @ self.mixer.cpu().double()
        up = (self.scale * up).float().view(*up.shape, *(1,) * (self.down.ndim - 2))
        down = self.down.float().cpu().clone(memory_format=torch.contiguous_format)
        magnitude = None if self.magnitude is None else self.magnitude.float().cpu().clone()
        return LowRank(down, up.contiguous(), magnitude=magnitude)


def untied(down: torch.Tensor, mixer: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A₂ (r/f, in/f), W₁ (f, f), B₂ (out/f, r/f) -> A (r, in), M (r, r), B (out, r), so that B·M·A
    = W₁ ⊗ (B₂·A₂)."""
    eye = torch.eye(len(mixer), dtype=down.dtype, device=down.device)
    inner = torch.eye(len(down), dtype=down.dtype, device=down.device)
    return torch.kron(eye, down), torch.kron(mixer, inner), torch.kron(eye, up)


class ReadOnlyWeight(torch.Tensor):
    """A matrix computed at each reading. Assigning to `data`, as PEFT may, would change nothing:
    UserError."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> torch.Tensor:
        return self.detach().as_subclass(torch.Tensor)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise UserError(
            "the weight is computed here and cannot be set; fold the adapter into a plain LoRA first"
        )


class Computed(torch.nn.Module):
    """A matrix, the `product` of parameters; its state dict's `weight` of one zero fits no plain
    LoRA."""

    def product(self) -> torch.Tensor:
        raise NotImplementedError

    @property
    def weight(self) -> torch.Tensor:
        """The product, which PEFT merges as a plain LoRA's. A fake or distributed tensor keeps its
        class."""
        product = self.product()
        return product.as_subclass(ReadOnlyWeight) if type(product) is torch.Tensor else product

    def _save_to_state_dict(
        self, destination: dict[str, torch.Tensor], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = (
            next(self.parameters()).detach().new_zeros(PLACEHOLDER_SHAPE)
        )

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ) -> None:
        plain = state_dict.pop(f"{prefix}weight", None)
        if plain is not None and plain.shape != PLACEHOLDER_SHAPE:
            errors.append(f"{prefix}weight is a plain LoRA's, and this adapter has a mixer")
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )


class MixerLinear(Computed):
    """B·M as LoRA's B: parameters `up` (out, r) and `mixer` (r, r), a buffer if frozen, as PEFT
    trains parameters."""

    def __init__(self, up: torch.Tensor, mixer: torch.Tensor, train_mixer: bool = True):
        super().__init__()
        self.up = torch.nn.Parameter(up)
        if train_mixer:
            self.mixer = torch.nn.Parameter(mixer)
        else:
            self.register_buffer("mixer", mixer)

    @property
    def mixing(self) -> torch.Tensor:
        """M in the dtype of B: PEFT's `low_cpu_mem_usage` casts all to the base's, and back the
        parameters alone."""
        return self.mixer.to(self.up.dtype)

    def product(self) -> torch.Tensor:
        """B·M, in the shape of a plain LoRA's B: (out, r)."""
        return self.up @ self.mixing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, r) -> (…, out)."""
        return F.linear(x, self.product())


class MixerConv2d(MixerLinear):
    """The same for a convolution, whose B is a 1×1 convolution. `up` and `mixer` stay matrices."""

    def product(self) -> torch.Tensor:
        """B·M, in the shape of a plain LoRA's B: (out, r, 1, 1)."""
        return super().product()[:, :, None, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, r, H, W) -> (N, out, H, W)."""
        return F.conv2d(x, self.product())


class KroneckerDown(Computed):
    """A = I ⊗ A₂ (r, in): `tied` A₂ (r/f, in/f) is the parameter."""

    def __init__(self, tied: torch.Tensor, factor: int):
        super().__init__()
        self.tied, self.factor = torch.nn.Parameter(tied), factor

    def product(self) -> torch.Tensor:
        return torch.kron(
            torch.eye(self.factor, dtype=self.tied.dtype, device=self.tied.device), self.tied
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in) -> (…, r)."""
        return F.linear(x.unflatten(-1, (self.factor, -1)), self.tied).flatten(-2)


class KroneckerUp(MixerLinear):
    """B·M = W₁ ⊗ B₂ (out, r): `up` B₂ (out/f, r/f) and `mixer` W₁ (f, f)."""

    def product(self) -> torch.Tensor:
        return torch.kron(self.mixing, self.up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, r) -> (…, out)."""
        return F.linear(self.mixing @ x.unflatten(-1, (len(self.mixer), -1)), self.up).flatten(-2)
