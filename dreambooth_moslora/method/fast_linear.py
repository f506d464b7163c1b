"""Adapted projections with fewer kernels: one autograd node each.

    y = W0·x + U·A·x                U = s·B·M (out,r), or s·B for plain LoRA
    dx = W0ᵀ·g + Aᵀ·(Uᵀ·g)          dA = (Uᵀ·g)·xᵀ          dU = g·(A·x)ᵀ

PEFT computes the branch in full-width tensors of its own, in fp32 when the adapter is fp32, and
autograd keeps a cast copy of x for each projection. Here the branch is added to the base's output
in place, and autograd keeps x once and A·x (n,r). Adapters stay fp32 masters; the arithmetic is in
the base weight's dtype. The scale is folded into U: `addmm` with a factor other than 1 is outside
the fast CPU kernels.

It is for a frozen `nn.Linear`, dense or in 4 or 8 bit, with an adapter without dropout, DoRA or
bias (`explain_slow_path`). Calls that need more, and those outside of a step, go to PEFT's own
forward.

`WorkingCopies` makes A and U of a whole model in the base's dtype once per optimizer step, as
leaves of autograd:

    dB = s·dU·Mᵀ          dM = s·Bᵀ·dU

Their gradients are summed in fp32 over the micro-batches, and at the end of the step become those
of A, B and M. Layers of equal shapes form one batch. U is held as Uᵀ (r,out), the form in which its
gradient is computed.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import MappingProxyType

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dreambooth_moslora.base.int8 import Int8Linear, dequantize_weight
from dreambooth_moslora.method import mixer, moslora


class _AdaptedLinear(torch.autograd.Function):
    """x (…,in), W0 (out,in), b (out) or None, `packing` of W0, A (r,in), Uᵀ (r,out), of one dtype
    -> y (…,out)."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, packing, down: Tensor, up: Tensor
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])

        # The branch's inner product A·x (n,r), which the backward pass needs again.
        inner = rows.mm(down.t())

        # The base's output W0·x + b.
        result = compute_base_output(rows, weight, bias, packing)

        # The branch U·(A·x) is added in place: there is no second tensor of full width.
        result.addmm_(inner, up)
        ctx.packing = packing
        ctx.save_for_backward(x, inner, weight, down, up)
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, weight, down, up = ctx.saved_tensors
        needs_x, _, _, _, needs_down, needs_up = ctx.needs_input_grad
        grad = grad.reshape(-1, grad.shape[-1])

        # First compute what reads `grad`: W0 will evict it from the cache.
        grad_inner = grad.mm(up.t())
        grad_up = inner.t().mm(grad) if needs_up else None

        # dx = W0ᵀ·g + Aᵀ·(Uᵀ·g). A packed weight is unpacked here, and not kept.
        grad_x = None
        if needs_x:
            if ctx.packing is not None:
                weight = dequantize_packed(weight, ctx.packing).to(grad.dtype)
            grad_x = grad.mm(weight).addmm_(grad_inner, down).view(x.shape)

        grad_down = grad_inner.t().mm(x.reshape(-1, x.shape[-1])) if needs_down else None
        return grad_x, None, None, None, grad_down, grad_up


def compute_base_output(x: Tensor, weight: Tensor, bias: Tensor | None, packing) -> Tensor:
    """W0·x + b of x (n,in) -> (n,out)."""
    if packing is None:
        return F.linear(x, weight, bias)
    if isinstance(packing, Tensor):
        return F.linear(x, dequantize_weight(weight, packing), bias)
    return compute_linear_4bit(x, weight, bias, packing)


def compute_linear_4bit(x: Tensor, weight: Tensor, bias: Tensor | None, packing) -> Tensor:
    from bitsandbytes import matmul_4bit

    return matmul_4bit(x, weight, bias=bias, quant_state=packing)


def dequantize_packed(weight: Tensor, packing) -> Tensor:
    """The packed weight as a matrix (out,in)."""
    if isinstance(packing, Tensor):
        return dequantize_weight(weight, packing)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight, packing)


class FusedForward:
    """PEFT's LoRA layer whose forward uses this node whenever it computes the same function."""

    step_copies: Mapping[str, tuple[Tensor, Tensor]] = MappingProxyType({})
    """Adapter name -> its copies A (r,in) and Uᵀ (r,out), while a step lends them."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """x (…,in) -> y (…,out), as PEFT's forward computes it."""
        name, base = self._find_only_adapter(), self.base_layer

        # PEFT's own forward outside of a step, and where the node would compute something else: the
        # caller chooses an adapter for each sample, there are no or several adapters, or x has
        # another dtype.
        if (
            args
            or kwargs
            or name not in self.step_copies
            or not _is_same_dtype(x, get_compute_dtype(base))
        ):
            return super().forward(x, *args, **kwargs)
        down, up = self.step_copies[name]

        # The usual case: one node for W0·x and the branch.
        x = x.to(get_compute_dtype(base))
        return _AdaptedLinear.apply(x, base.weight, base.bias, get_packing(base), down, up)

    def _find_only_adapter(self) -> str | None:
        """The only active adapter, or None when PEFT's forward must decide."""
        if self.disable_adapters or self.merged_adapters:
            return None
        names = [name for name in self.active_adapters if name in self.lora_A]
        return names[0] if len(names) == 1 else None


class FastLinear(FusedForward, LoraLinear):
    """The fused node over a dense base."""


@cache
def get_fast_class(kind: type) -> type | None:
    """The fused class for PEFT's layer class `kind`; None when there is none."""
    if kind is LoraLinear:
        return FastLinear
    if issubclass(kind, FusedForward):
        return kind

    # Its class is known by name: it can be imported only where bitsandbytes is installed.
    is_4bit = (kind.__module__, kind.__name__) == ("peft.tuners.lora.bnb", "Linear4bit")
    return type("FastLinear4bit", (FusedForward, kind), {}) if is_4bit else None


def get_packing(base: nn.Module):
    """What belongs to a packed weight: its scales in 8 bit, its shape and scales in 4 bit; None for
    a dense one."""
    return base.scales if type(base) is Int8Linear else getattr(base.weight, "quant_state", None)


def get_compute_dtype(base: nn.Module) -> torch.dtype:
    """The dtype of products with the frozen weight: packed layers have one, others use the weight's
    own."""
    return getattr(base, "compute_dtype", base.weight.dtype)


def _is_same_dtype(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the base would compute in its own `dtype`; autocast casts x to its dtype."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device) == dtype
    return x.dtype == dtype


def explain_slow_path(layer: nn.Module, adapter_name: str = "default") -> str | None:
    """Why this adapted layer keeps PEFT's forward, in a few words; None when it can be fused."""
    if get_fast_class(type(layer)) is None:
        return f"not a linear layer ({type(layer).__module__}.{type(layer).__name__})"

    # The base layer: the node reads its weight by itself, so it must be a kind that is known.
    base = layer.base_layer
    is_known = type(base) in (nn.Linear, Int8Linear) or is_trainable_4bit(base)
    if not is_known:
        return f"the base layer is no nn.Linear, dense or in 4 or 8 bit ({type(base).__name__})"
    if base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__:
        return "the base layer carries hooks (offloading, for one)"

    # The adapter: the node computes s·B·M·A·x and nothing else.
    if adapter_name in layer.lora_variant:
        return "the adapter is a variant of LoRA (DoRA or another)"
    if type(layer.lora_dropout[adapter_name]) is not nn.Identity:
        return "the adapter has dropout"
    if layer.lora_bias[adapter_name]:
        return "the adapter has a bias"

    # The node has no gradient for W0.
    if base.weight.requires_grad:
        return "the base weight is trained too"
    return None


def is_trainable_4bit(base: nn.Module) -> bool:
    """Whether it is a layer of bitsandbytes in 4 bit, ready to compute, and not packed in the
    format for CPUs, which is for inference."""
    if type(base).__name__ != "Linear4bit":
        return False
    packed = getattr(base.weight, "quant_state", None)
    if packed is None or not base.compute_type_is_set:
        return False
    return not getattr(packed, "packing_format_for_cpu", False)


def enable_fast_path(model: nn.Module, adapter_name: str = "default") -> int:
    """Fuse every injected projection whose result stays the same (`explain_slow_path`). Returns how
    many were fused."""
    count = 0
    for layer in moslora.get_adapter_layers(model, adapter_name).values():
        if explain_slow_path(layer, adapter_name) is None:
            layer.__class__ = get_fast_class(type(layer))
            count += 1
    return count


def disable_fast_path(model: nn.Module) -> None:
    """Give every fused projection its class of PEFT back."""
    for layer in model.modules():
        if isinstance(layer, FusedForward):
            layer.__class__ = type(layer).__bases__[1]


class WorkingCopies:
    """The copies of every `FusedForward` in the given models, for one step after the other.

    models: with adapters, on which `enable_fast_path` was called
    adapter_name: the adapter that is trained
    """

    def __init__(self, *models: nn.Module, adapter_name: str = "default"):
        self.adapter_name = adapter_name
        modules = [module for model in models for module in model.modules()]
        self.layers = [layer for layer in modules if isinstance(layer, FusedForward)]
        self.batches: list[LayerBatch] = []

    @contextmanager
    def attach_copies(self) -> Iterator["WorkingCopies"]:
        """Lend the copies for the block, in which the adapter is constant; `collect` after each
        backward pass. The gradients are handed over if the block ends without an error."""
        # What changed since the last step, such as hooks or an adapter with dropout, may send a
        # layer through PEFT. The others are copied in batches of alike ones.
        groups: dict[tuple, list[FusedForward]] = defaultdict(list)
        for layer in self.layers:
            if (
                isinstance(layer, FusedForward)
                and explain_slow_path(layer, self.adapter_name) is None
            ):
                groups[get_batch_key(layer, self.adapter_name)].append(layer)
        self.batches = [LayerBatch(alike, self.adapter_name) for alike in groups.values()]

        try:
            yield self
        finally:
            for layers in groups.values():
                for layer in layers:
                    del layer.step_copies
        for batch in self.batches:
            batch.set_gradients()
        self.batches = []

    def collect(self) -> None:
        """Add the gradients of a backward pass to the sums of the step."""
        for batch in self.batches:
            batch.collect()


def get_batch_key(layer: FusedForward, name: str) -> tuple:
    """Equal for layers that one batch can hold: shape, scale, dtype, device, and what learns."""
    base, down, lora_b = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name]
    sizes = (down.shape, base.out_features, layer.scaling[name])
    place = (get_compute_dtype(base), base.weight.device)
    learns_mixer = isinstance(lora_b, mixer.MixerLinear) and lora_b.mixer.requires_grad
    return (sizes, place, type(lora_b), learns_mixer, down.requires_grad)


class LayerBatch:
    """n alike layers: A (n,r,in), B (n,out,r) and M (n,r,r), copied to A and Uᵀ (n,r,out), with
    which the layers compute from then on."""

    def __init__(self, layers: list[FusedForward], adapter_name: str):
        self.scale = layers[0].scaling[adapter_name]

        # The masters.
        lora_bs = [layer.lora_B[adapter_name] for layer in layers]
        self.downs = [layer.lora_A[adapter_name].weight for layer in layers]
        self.is_mixed = isinstance(lora_bs[0], mixer.MixerLinear)
        self.ups = [one.up if self.is_mixed else one.weight for one in lora_bs]
        self.mixers = [one.mixer for one in lora_bs] if self.is_mixed else []
        self.learns_down = self.downs[0].requires_grad
        self.learns_up = self.ups[0].requires_grad

        # The sums over the step's micro-batches: dA (n,r,in) and dUᵀ (n,r,out).
        self.down_sum: Tensor | None = None
        self.up_sum: Tensor | None = None
        # An unused layer's gradient stays None, so that the optimizer skips the layer.
        self.reached: set[int] = set()

        # The copies: each layer's leaves are views of the batch.
        self.copies: list[tuple[Tensor, Tensor]] = []
        whole = self._stack_matrices(get_compute_dtype(layers[0].base_layer))
        for layer, down, up in zip(layers, *whole, strict=True):
            pair = (down.detach().requires_grad_(self.learns_down), up.detach().requires_grad_())
            self.copies.append(pair)
            layer.step_copies = {adapter_name: pair}

    @torch.no_grad()
    def _stack_matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (n,r,in) and Uᵀ (n,r,out)."""
        # Uᵀ = s·Mᵀ·Bᵀ in fp32, all layers in one batch, and only then in the base's dtype.
        up = torch.stack(self.ups).mT
        if self.is_mixed:
            up = torch.stack(self.mixers).mT.bmm(up)
        if self.scale != 1:
            up = up * self.scale
        return torch.stack(self.downs).to(dtype), up.to(dtype).contiguous()

    @torch.no_grad()
    def collect(self) -> None:
        """Add the copies' gradients to the sums, in the dtype of A and B."""
        # Which layers this backward pass came through.
        reached = [number for number, (_, up) in enumerate(self.copies) if up.grad is not None]
        if not reached:
            return
        self.reached.update(reached)

        # Sum in fp32: sums over many micro-batches would lose their small parts in half precision.
        dtype = self.downs[0].dtype
        downs, ups = zip(*self.copies, strict=True)
        self.up_sum = add_in_place(self.up_sum, pop_gradients(ups).to(dtype))
        if self.learns_down:
            self.down_sum = add_in_place(self.down_sum, pop_gradients(downs).to(dtype))

    @torch.no_grad()
    def set_gradients(self) -> None:
        """Turn the step's sums of dA and dU into the gradients of the masters A, M and B."""
        if self.up_sum is None:
            return
        grad = self.up_sum.mT  # dU (n,out,r)

        # dA is A's own gradient.
        if self.down_sum is not None:
            self._add_gradients(self.downs, self.down_sum)

        # U = s·B·M, so dM = s·Bᵀ·dU and dB = s·dU·Mᵀ.
        if self.scale != 1:
            grad = grad * self.scale
        if self.is_mixed and self.mixers[0].requires_grad:
            self._add_gradients(self.mixers, torch.stack(self.ups).mT.bmm(grad))
        if not self.learns_up:
            return
        if self.is_mixed:
            grad = grad.bmm(torch.stack(self.mixers).mT)
        self._add_gradients(self.ups, grad.contiguous())

    def _add_gradients(self, parameters: list[nn.Parameter], gradients: Tensor) -> None:
        """Add to existing gradients: a layer that PEFT's forward was called for has one."""
        for i in self.reached:
            weight, grad = parameters[i], gradients[i]
            weight.grad = grad if weight.grad is None else weight.grad + grad


def add_in_place(total: Tensor | None, more: Tensor) -> Tensor:
    """`more`, added to the total in place where there is one."""
    return more if total is None else total.add_(more)


def pop_gradients(leaves: tuple[Tensor, ...]) -> Tensor:
    """The leaves' gradients as one tensor (n, …); they are removed from the leaves."""
    found = torch.stack([torch.zeros_like(one) if one.grad is None else one.grad for one in leaves])
    for one in leaves:
        one.grad = None
    return found
