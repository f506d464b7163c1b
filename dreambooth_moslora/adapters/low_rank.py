"""The two matrices of a plain LoRA, as files hold them and adapters fold into."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["LowRank"]


@dataclass(frozen=True, eq=False)
class LowRank:
    """The two matrices of a plain LoRA on one layer; its scale or alpha is kept elsewhere.

    `down` (r, in) and `up` (out, r), or kernels (r, in, h, w) and (out, r, 1, 1) of a convolution. `bias`
    (out,) is added by `up`, and `magnitude` (out,) is DoRA's.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def delta(self) -> Tensor:
        """ΔW = up·down (out, in) or (out, in, h, w), computed in fp64 and returned in fp32."""
        change = self.up.double().flatten(1) @ self.down.double().flatten(1)
        return change.view(len(self.up), *self.down.shape[1:]).float()
