"""The mixer M of MoSLoRA (Wu, Wang, Zhao, Wong, arXiv 2406.11909): how it starts, and its place in PEFT's `lora_B`."""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreambooth_moslora.core.errors import UserError

__all__ = ["MixedUp", "MixedUpConv", "initial_mixer"]

MARK = (1, 1)  # the size of `lora_B.weight` in the state dict of an adapter with a mixer


def initial_mixer(kind: str, rank: int, seed: int, path: str) -> Tensor:
    """M₀ (r, r) in fp32 for the projection at `path`: the same whatever else was created before it."""
    digest = hashlib.blake2b(f"{seed}:{path}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
    mixer = torch.empty(rank, rank, dtype=torch.float32, device="cpu")
    if kind == "orthogonal":
        return nn.init.orthogonal_(mixer, generator=generator)
    if kind == "kaiming":
        return nn.init.kaiming_uniform_(mixer, a=math.sqrt(5), generator=generator)
    if kind == "identity":
        return torch.eye(rank)
    return torch.eye(rank // 2).repeat(2, 2)


class Product(Tensor):
    """B·M, computed on each reading. Functions of PEFT that write a new B into it would change nothing: they raise."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # what is computed from it is an ordinary tensor

    @property
    def data(self) -> Tensor:
        return self.detach().as_subclass(Tensor)

    @data.setter
    def data(self, value: Tensor) -> None:
        raise UserError("lora_B.weight is B·M here and cannot be set; fold the adapter into a plain LoRA first")


class MixedUp(nn.Module):
    """B·M in the place of LoRA's B: `up` (out, r) is a parameter, `mixer` (r, r) a parameter, or a buffer when frozen.

    A frozen mixer is a buffer because PEFT turns gradients on for every parameter of an adapter that it activates.
    In a state dict a `weight` of one zero stands beside the two: a plain LoRA then stops at its size, where it would
    otherwise leave B as it was and tell of unexpected keys at most.
    """

    def __init__(self, up: Tensor, mixer: Tensor, train_mixer: bool = True):
        super().__init__()
        self.up = nn.Parameter(up)
        if train_mixer:
            self.mixer = nn.Parameter(mixer)
        else:
            self.register_buffer("mixer", mixer)

    def product(self) -> Tensor:
        """B·M, in the shape of a plain LoRA's B: (out, r)."""
        return self.up @ self.mixer

    @property
    def weight(self) -> Tensor:
        """B·M: what PEFT merges, and what a plain LoRA would call its B.

        A tensor that is of a subclass already (a fake or a distributed one) stays what it is.
        """
        product = self.product()
        return product.as_subclass(Product) if type(product) is Tensor else product

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.up.detach().new_zeros(MARK)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        plain = state_dict.pop(f"{prefix}weight", None)
        if plain is not None and plain.shape != MARK:
            error_msgs.append(f"{prefix}weight is a plain LoRA's B, and this adapter has a mixer")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def forward(self, x: Tensor) -> Tensor:
        """(…, r) -> (…, out)."""
        return F.linear(x, self.product())


class MixedUpConv(MixedUp):
    """The same for a convolution, whose B is a convolution of 1×1: the parameters stay matrices."""

    def product(self) -> Tensor:
        """B·M, in the shape of a plain LoRA's B: (out, r, 1, 1)."""
        return super().product()[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """(N, r, H, W) -> (N, out, H, W)."""
        return F.conv2d(x, self.product())
