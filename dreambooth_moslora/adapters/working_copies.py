"""A and U of a whole model in the base's dtype, made once for an optimizer step instead of at each call.

    U = s·B·M          dB = s·dU·Mᵀ          dM = s·Bᵀ·dU

The copies are leaves of autograd. Micro-batches and recomputation read the same ones. Their gradients are
summed in fp32 over the micro-batches; at the end of the step they become those of A, B and M, which the
optimizer and the average over processes see as ever. Layers whose matrices have equal shapes form one batch,
so all of this takes a few dozen kernels for a UNet. U is held as Uᵀ (r,out): so is its gradient computed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dreambooth_moslora.adapters.fused_linear import FastLinear, slow_reason
from dreambooth_moslora.adapters.mixer import MixerLinear

__all__ = ["WorkingCopies"]


class WorkingCopies:
    """The copies of every `FastLinear` of `models`. Layers on the general path are left alone."""

    def __init__(self, *models: nn.Module, adapter_name: str = "default"):
        self.adapter_name = adapter_name
        self.layers = [layer for model in models for layer in model.modules() if type(layer) is FastLinear]

    @contextmanager
    def for_one_step(self) -> Iterator["StepCopies"]:
        """Lend the copies for the length of a `with` block, in which the adapter must not change.

        `collect` is due after each backward pass. The gradients are where the optimizer looks for them when the
        block has ended without an error.
        """
        step = StepCopies([Batch(layers, self.adapter_name) for layers in self._alike()])
        try:
            yield step
        finally:
            for batch in step.batches:
                batch.take_back()
        for batch in step.batches:
            batch.hand_over()

    def _alike(self) -> list[list[FastLinear]]:
        """Layers in groups of one shape, dtype, device, scale and kind of mixer."""
        groups: dict[tuple, list[FastLinear]] = {}
        for layer in self.layers:
            if type(layer) is FastLinear and slow_reason(layer, self.adapter_name) is None:
                groups.setdefault(kind_of(layer, self.adapter_name), []).append(layer)
        return list(groups.values())


@dataclass(frozen=True)
class StepCopies:
    """The copies of one step."""

    batches: list["Batch"]

    def collect(self) -> None:
        """Add the gradients of the backward pass that has just ended, and forget them."""
        for batch in self.batches:
            batch.collect()


def kind_of(layer: FastLinear, name: str) -> tuple:
    lora_b, weight = layer.lora_B[name], layer.base_layer.weight
    learns = isinstance(lora_b, MixerLinear) and lora_b.mixer.requires_grad
    sizes = layer.lora_A[name].weight.shape, weight.shape[0], layer.scaling[name]
    return sizes, weight.dtype, weight.device, type(lora_b), learns


class Batch:
    """n layers alike: A (n,r,in), B (n,out,r) and M (n,r,r), copied to A and Uᵀ (n,r,out)."""

    def __init__(self, layers: list[FastLinear], adapter_name: str):
        self.layers, parts = layers, [layer.lora_B[adapter_name] for layer in layers]
        self.scale = layers[0].scaling[adapter_name]
        self.downs = [layer.lora_A[adapter_name].weight for layer in layers]
        self.is_mixed = isinstance(parts[0], MixerLinear)
        self.ups = [part.up if self.is_mixed else part.weight for part in parts]
        self.mixers = [part.mixer for part in parts] if self.is_mixed else []
        self.down_sum: Tensor | None = None
        self.up_sum: Tensor | None = None
        self.reached: set[int] = set()  # an unused layer's gradient is None, not zero: the optimizer passes it by
        self.copies = self._make()
        for layer, copies in zip(layers, self.copies, strict=True):
            layer.working = {adapter_name: copies}

    @torch.no_grad()
    def _make(self) -> list[tuple[Tensor, Tensor]]:
        dtype = self.layers[0].base_layer.weight.dtype
        up = torch.stack(self.ups).mT
        if self.is_mixed:
            up = torch.stack(self.mixers).mT.bmm(up)
        if self.scale != 1:
            up = up * self.scale
        down, up = torch.stack(self.downs).to(dtype), up.to(dtype).contiguous()
        return [(leaf(down[i]), leaf(up[i])) for i in range(len(self.layers))]

    @torch.no_grad()
    def collect(self) -> None:
        """Sum the copies' gradients in the dtype of A and B."""
        reached = {i for i, (_, up) in enumerate(self.copies) if up.grad is not None}
        if not reached:
            return
        self.reached |= reached
        dtype = self.downs[0].dtype
        sums = [gradients_of(leaves).to(dtype) for leaves in zip(*self.copies, strict=True)]
        if self.up_sum is None:
            self.down_sum, self.up_sum = sums
        else:
            self.down_sum += sums[0]
            self.up_sum += sums[1]

    @torch.no_grad()
    def hand_over(self) -> None:
        """Give A, B and M their gradients, once."""
        if self.up_sum is None or self.down_sum is None:
            return
        grad = self.up_sum.mT  # dU (n,out,r)
        self._give(self.downs, self.down_sum)
        self.down_sum = self.up_sum = None
        if self.scale != 1:
            grad = grad * self.scale
        if self.is_mixed and self.mixers[0].requires_grad:
            self._give(self.mixers, torch.stack(self.ups).mT.bmm(grad))
        if self.is_mixed:
            grad = grad.bmm(torch.stack(self.mixers).mT)
        self._give(self.ups, grad.contiguous())

    def _give(self, parameters: list[nn.Parameter], gradients: Tensor) -> None:
        """A layer that was also called on the general path has a gradient already."""
        for i in self.reached:
            weight, grad = parameters[i], gradients[i]
            weight.grad = grad if weight.grad is None else weight.grad + grad

    def take_back(self) -> None:
        for layer in self.layers:
            del layer.working
        self.copies.clear()


def leaf(copy: Tensor) -> Tensor:
    return copy.detach().requires_grad_()


def gradients_of(leaves: tuple[Tensor, ...]) -> Tensor:
    """One tensor (n, …) of the leaves' gradients, which they lose."""
    found = torch.stack([torch.zeros_like(one) if one.grad is None else one.grad for one in leaves])
    for one in leaves:
        one.grad = None
    return found
