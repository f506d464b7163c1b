"""A and U of a whole model in the base's dtype, made once per optimizer step instead of at each call.

    U = s·B·M          dB = s·dU·Mᵀ          dM = s·Bᵀ·dU

The copies are leaves of autograd, which micro-batches and recomputation share. Their gradients are summed in
fp32 over the micro-batches. At the end of the step they become the gradients of A, B and M, so that the
optimizer and the average over processes see nothing unusual. Layers whose matrices have equal shapes form one
batch, so all of this takes a few dozen kernels for a UNet. U is held as Uᵀ (r,out), the form in which its
gradient is computed. Layers with one input share their copies (`fast_linear`).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dreambooth_moslora.adapters.fast_linear import (
    Joint,
    JointProducts,
    JointWeights,
    ShortWay,
    are_matrices,
    compute_dtype,
    projections_of_one_input,
    slow_reason,
)
from dreambooth_moslora.adapters.mixer import MixerLinear
from dreambooth_moslora.base.load import TextProjection


class Unit(Protocol):
    """Layers that compute together: a single projection, those of one input, or one projection of several models."""

    layers: tuple[ShortWay, ...]

    def lend(self, adapter_name: str, down: Tensor, up: Tensor) -> None:
        """Compute with these copies from now on: A (r,in) and Uᵀ (r,out), or for k layers (k,r,in) and (k,r,out)."""

    def take_back(self) -> None: ...


class WorkingCopies:
    """The copies of every `ShortWay` in `models`; other layers are not touched.

    `joint`: whether projections of one input are computed together. None means everywhere but on a CPU, where
    fewer kernels gain nothing and stacking would copy weights that are mapped from a file.
    """

    def __init__(self, *models: nn.Module, adapter_name: str = "default", joint: bool | None = None):
        self.adapter_name = adapter_name
        modules = [module for model in models for module in model.modules()]
        self.layers = [layer for layer in modules if isinstance(layer, ShortWay)]
        groups = [layers for layers in map(self._joinable, modules) if layers and joins(layers, joint)]
        self.joints = [joint_of(layers) for layers in groups]

    def _joinable(self, module: nn.Module) -> tuple[ShortWay, ...]:
        """The layers of an attention module that share their input and are alike; at least two, or none."""
        layers = tuple(layer for layer in projections_of_one_input(module) if self._is_fast(layer))
        kinds = {kind_of(layer, self.adapter_name) for layer in layers}
        bases = [layer.base_layer for layer in layers]
        are_joinable = are_matrices(bases) or are_one_text(bases)
        return layers if len(layers) > 1 and len(kinds) == 1 and are_joinable else ()

    def _is_fast(self, layer: nn.Module) -> bool:
        return isinstance(layer, ShortWay) and slow_reason(layer, self.adapter_name) is None

    @contextmanager
    def for_one_step(self) -> Iterator["StepCopies"]:
        """Lend the copies for the length of the block, in which the adapter must not change.

        Call `collect` after each backward pass. After a block without errors the gradients are where the
        optimizer expects them.
        """
        with StepCopies.of(self._units(), self.adapter_name).lent() as step:
            yield step

    def _units(self) -> list[Unit]:
        self.joints = [joint for joint in self.joints if joint.are_shared()]
        together = [joint for joint in self.joints if all(map(self._is_fast, joint.layers))]
        joined = {layer for joint in together for layer in joint.layers}
        alone = [Alone(layer) for layer in self.layers if layer not in joined and self._is_fast(layer)]
        return [*together, *alone]


class Alone:
    """A layer that computes alone."""

    def __init__(self, layer: ShortWay):
        self.layers = (layer,)

    def lend(self, adapter_name: str, down: Tensor, up: Tensor) -> None:
        self.layers[0].working = {adapter_name: (down, up)}

    def take_back(self) -> None:
        del self.layers[0].working


def alike(units: Iterable[Unit], adapter_name: str) -> list[list[Unit]]:
    """The units grouped by number of layers, shape, dtype, device, scale and kind of mixer."""
    groups: dict[tuple, list[Unit]] = {}
    for unit in units:
        groups.setdefault((len(unit.layers), kind_of(unit.layers[0], adapter_name)), []).append(unit)
    return list(groups.values())


@dataclass(frozen=True)
class StepCopies:
    """The copies of one step."""

    batches: list["Batch"]

    @classmethod
    def of(cls, units: Iterable[Unit], adapter_name: str) -> "StepCopies":
        return cls([Batch(found, adapter_name) for found in alike(units, adapter_name)])

    @contextmanager
    def lent(self) -> Iterator["StepCopies"]:
        """Lend the copies for the length of the block; hand the gradients over if it ends without an error."""
        try:
            yield self
        finally:
            for batch in self.batches:
                batch.take_back()
        for batch in self.batches:
            batch.hand_over()

    def collect(self) -> None:
        """Add the gradients of the last backward pass to the sums, and clear them."""
        for batch in self.batches:
            batch.collect()


def are_one_text(bases: Sequence[nn.Module]) -> bool:
    """Whether these are all text projections of one attention."""
    return all(isinstance(base, TextProjection) for base in bases) and len(bases) == bases[0].siblings


def joint_of(layers: tuple[ShortWay, ...]) -> Joint:
    return (JointProducts if isinstance(layers[0].base_layer, TextProjection) else JointWeights)(layers)


def joins(layers: tuple[ShortWay, ...], wanted: bool | None) -> bool:
    return layers[0].base_layer.weight.device.type != "cpu" if wanted is None else wanted


def kind_of(layer: ShortWay, name: str) -> tuple:
    lora_b, base = layer.lora_B[name], layer.base_layer
    learns = isinstance(lora_b, MixerLinear) and lora_b.mixer.requires_grad, layer.lora_A[name].weight.requires_grad
    sizes = layer.lora_A[name].weight.shape, base.out_features, layer.scaling[name]
    return sizes, compute_dtype(base), base.weight.device, type(lora_b), learns


class Batch:
    """n alike units of k layers each: A (nk,r,in), B (nk,out,r) and M (nk,r,r), copied to A and Uᵀ (nk,r,out)."""

    def __init__(self, units: list[Unit], adapter_name: str):
        self.units = units
        self.layers = layers = [layer for unit in units for layer in unit.layers]
        self.count = len(layers) // len(units)
        parts = [layer.lora_B[adapter_name] for layer in layers]
        self.scale = layers[0].scaling[adapter_name]
        self.downs = [layer.lora_A[adapter_name].weight for layer in layers]
        self.is_mixed = isinstance(parts[0], MixerLinear)
        self.ups = [part.up if self.is_mixed else part.weight for part in parts]
        self.mixers = [part.mixer for part in parts] if self.is_mixed else []
        self.learns_down, self.learns_up = self.downs[0].requires_grad, self.ups[0].requires_grad
        self.down_sum: Tensor | None = None
        self.up_sum: Tensor | None = None
        self.reached: set[int] = set()  # an unused layer's gradient is None: the optimizer skips it
        self.copies = self._make()
        for unit, (down, up) in zip(units, self.copies, strict=True):
            unit.lend(adapter_name, down, up)

    @torch.no_grad()
    def _make(self) -> list[tuple[Tensor, Tensor]]:
        """Leaves of each unit: A (r,in) and Uᵀ (r,out), or A (k,r,in) and Uᵀ (k,r,out)."""
        dtype = compute_dtype(self.layers[0].base_layer)
        up = torch.stack(self.ups).mT
        if self.is_mixed:
            up = torch.stack(self.mixers).mT.bmm(up)
        if self.scale != 1:
            up = up * self.scale
        down, up = torch.stack(self.downs).to(dtype), up.to(dtype).contiguous()
        if self.count > 1:
            down, up = (copies.unflatten(0, (-1, self.count)) for copies in (down, up))
        return [(leaf(down[i], self.learns_down), leaf(up[i])) for i in range(len(down))]

    @torch.no_grad()
    def collect(self) -> None:
        """Add the copies' gradients to the sums, in the dtype of A and B."""
        reached = {i for i, (_, up) in enumerate(self.copies) if up.grad is not None}
        if not reached:
            return
        self.reached |= {i * self.count + k for i in reached for k in range(self.count)}
        dtype, one = self.downs[0].dtype, (len(self.layers), len(self.downs[0]), -1)
        downs, ups = zip(*self.copies, strict=True)
        self.up_sum = added(self.up_sum, gradients_of(ups).to(dtype).view(one))
        if self.learns_down:
            self.down_sum = added(self.down_sum, gradients_of(downs).to(dtype).view(one))

    @torch.no_grad()
    def hand_over(self) -> None:
        """Set the gradients of A, B and M."""
        if self.up_sum is None:
            return
        grad = self.up_sum.mT  # dU (n,out,r)
        if self.down_sum is not None:
            self._give(self.downs, self.down_sum)
        self.down_sum = self.up_sum = None
        if self.scale != 1:
            grad = grad * self.scale
        if self.is_mixed and self.mixers[0].requires_grad:
            self._give(self.mixers, torch.stack(self.ups).mT.bmm(grad))
        if not self.learns_up:
            return
        if self.is_mixed:
            grad = grad.bmm(torch.stack(self.mixers).mT)
        self._give(self.ups, grad.contiguous())

    def _give(self, parameters: list[nn.Parameter], gradients: Tensor) -> None:
        """Add to existing gradients: a layer that was also called through PEFT's forward has one."""
        for i in self.reached:
            weight, grad = parameters[i], gradients[i]
            weight.grad = grad if weight.grad is None else weight.grad + grad

    def take_back(self) -> None:
        for unit in self.units:
            unit.take_back()
        self.copies.clear()


def leaf(copy: Tensor, learns: bool = True) -> Tensor:
    return copy.detach().requires_grad_(learns)


def added(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)


def gradients_of(leaves: tuple[Tensor, ...]) -> Tensor:
    """The leaves' gradients as one tensor (n, …); they are removed from the leaves."""
    found = torch.stack([torch.zeros_like(one) if one.grad is None else one.grad for one in leaves])
    for one in leaves:
        one.grad = None
    return found
