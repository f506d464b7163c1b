"""A frozen basis in a UNet as one PEFT adapter, whose mixers are views of one buffer: another subject is one copy.

Several subjects at once are the sum of their mixers, as B·(M₁ + M₂)·A = B·M₁·A + B·M₂·A.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dreambooth_moslora.adapters.basis import Basis, put_basis
from dreambooth_moslora.adapters.layers import matrix_layers, value_pattern
from dreambooth_moslora.adapters.moslora import MoSLoraConfig, adapter_layers, inject
from dreambooth_moslora.core.config.training_settings import ZERO
from dreambooth_moslora.core.errors import UserError

__all__ = ["SwappedMixers"]


class SwappedMixers:
    """The adapter `name` on the layers of `ranks` (path -> r), in the UNet's dtype. Its mixers are zero at first.

    Raises UserError for a basis that does not fit the UNet, which is then unchanged.
    """

    def __init__(self, unet: nn.Module, basis: Basis, ranks: Mapping[str, int], name: str):
        known = matrix_layers(unet)
        if strange := next((path for path in ranks if path not in known), None):
            raise UserError(f"the mixers were made for another base: it has no layer {strange:.100}")
        inject(unet, config_of(ranks), name)
        try:
            put_basis(basis, unet, name)
        except UserError:
            unet.delete_adapters(name)
            raise
        layers = adapter_layers(unet, name)
        for layer in layers.values():
            layer.lora_A[name].to(unet.dtype).requires_grad_(False)
            layer.lora_B[name].to(unet.dtype).requires_grad_(False)
        self.parts = [layers[path].lora_B[name] for path in ranks]
        self.buffer = self._bound()

    @torch.no_grad()
    def show(self, subjects: Sequence[tuple[Tensor, float]]) -> None:
        """Compute with the weighted sum of the subjects' mixers (n,) from now on."""
        first = self.parts[0].mixer
        if first.data_ptr() != self.buffer.data_ptr() or first.dtype != self.buffer.dtype:
            self.buffer = self._bound()  # the UNet has moved, and its tensors are new
        (values, scale), *others = subjects
        total = values if scale == 1 else scale * values
        for values, scale in others:
            total = total + scale * values
        self.buffer.copy_(total)

    @torch.no_grad()
    def _bound(self) -> Tensor:
        """One buffer (n,) with all mixers, which become views of it."""
        buffer = torch.cat([part.mixer.flatten() for part in self.parts])
        views = buffer.split([part.mixer.numel() for part in self.parts])
        for part, view in zip(self.parts, views, strict=True):
            part.mixer = nn.Parameter(view.view_as(part.mixer), requires_grad=False)
        return buffer


def config_of(ranks: Mapping[str, int]) -> MoSLoraConfig:
    """A config for exactly these layers, at scale 1."""
    rank = next(iter(ranks.values()))
    pattern = value_pattern(dict(ranks), rank)
    return MoSLoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=pattern,
        target_modules="|".join(map(re.escape, ranks)),
        mixer=ZERO,
    )
