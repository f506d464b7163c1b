"""The adapted projection as one autograd node: PEFT's function with fewer launches and fewer saved tensors.

    y = W0·x + U·A·x                U = s·B·M (out,r), or s·B for plain LoRA
    dx = W0ᵀ·g + Aᵀ·(Uᵀ·g)          dA = (Uᵀ·g)·xᵀ          dU = g·(A·x)ᵀ

PEFT computes the branch in full-width tensors of its own, in fp32 when the adapter is fp32, and autograd keeps
a cast copy of x for each projection. Here the branch is added to the base's output in place. Autograd keeps x
once, uncast (q, k and v share it), and only A·x (n,r) of the branch. Adapters stay fp32 masters; the arithmetic
is in the base weight's dtype, on A and Uᵀ in that dtype. During a training step these are the layer's `working`
copies, which `working_copies` makes once; any other call makes its own. The scale is folded into U: `addmm`
with a factor other than 1 is outside the fast CPU kernels.

It is used for a frozen `nn.Linear`, dense or in 4 bit, with an adapter without dropout, DoRA or bias. In 4 bit,
W0 is made dense only for dx, one layer at a time; a `TextProjection` gives W0·x, and needs no dx. Calls that
need more (disabled, merged, several active adapters, mixed batches, autocast) go to PEFT's own forward.
"""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dreambooth_moslora.adapters.joint_linear import LentTogether
from dreambooth_moslora.adapters.moslora import adapter_layers
from dreambooth_moslora.base.load import TextProjection

Copies = tuple[Tensor, Tensor]
"""A (r,in) and Uᵀ (r,out) of one layer, in the base's dtype."""


class _AdaptedLinear(torch.autograd.Function):
    """x (…,in), frozen W0 (out,in) and b (out) or None, A (r,in), Uᵀ (r,out), all of one dtype -> y (…,out).

    `packed` is bitsandbytes' description of a W0 in 4 bit, None for a dense one.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, packed, down: Tensor, up: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows.mm(down.t())
        result = F.linear(rows, weight, bias) if packed is None else linear_4bit(rows, weight, bias, packed)
        result.addmm_(inner, up)
        ctx.packed = packed
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
        if ctx.packed is not None and needs_x:
            weight = dense_weight(weight, ctx.packed).to(grad.dtype)
        grad_x = grad.mm(weight).addmm_(grad_inner, down).view(x.shape) if needs_x else None
        grad_down = grad_inner.t().mm(x.reshape(-1, x.shape[-1])) if needs_down else None
        return grad_x, None, None, None, grad_down, grad_up


class _BesideProduct(torch.autograd.Function):
    """A text x (…,in), W0·x (…,out), A (r,in), Uᵀ (r,out), all of one dtype -> y (…,out). x has no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, product: Tensor, down: Tensor, up: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows.mm(down.t())
        ctx.save_for_backward(rows, inner, up)
        return torch.addmm(product.reshape(len(rows), -1), inner, up).view(product.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, up = ctx.saved_tensors
        grad = grad.reshape(len(rows), -1)
        return None, None, grad.mm(up.t()).t().mm(rows), inner.t().mm(grad)


def linear_4bit(x: Tensor, weight: Tensor, bias: Tensor | None, packed) -> Tensor:
    from bitsandbytes import matmul_4bit

    return matmul_4bit(x, weight, bias=bias, quant_state=packed)


def dense_weight(weight: Tensor, packed) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight, packed)


class ShortWay:
    """PEFT's LoRA layer whose forward uses this node whenever it computes the same function."""

    working: Mapping[str, Copies | tuple[LentTogether, int]] = MappingProxyType({})
    """Adapter name -> its working copies, while a training step lends them (`working_copies`). Projections of
    one input share theirs, each with its index."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        name, base = self._only_adapter(), self.base_layer
        if args or kwargs or name is None or not _same_dtype(x, compute_dtype(base)):
            return super().forward(x, *args, **kwargs)
        copies = self.working.get(name)
        if copies is not None and isinstance(copies[0], LentTogether):
            together, place = copies
            return together.output(place, x)
        if copies is None:
            if slow_reason(self, name):
                return super().forward(x)
            copies = self._own_copies(name)
        if isinstance(base, TextProjection):
            return _BesideProduct.apply(x, base(x), *copies)
        packed = getattr(base.weight, "quant_state", None)
        return _AdaptedLinear.apply(x.to(compute_dtype(base)), base.weight, base.bias, packed, *copies)

    def _own_copies(self, name: str) -> Copies:
        """Copies of the current weights; gradients reach the fp32 masters."""
        dtype, scale = compute_dtype(self.base_layer), self.scaling[name]
        up = self.lora_B[name].weight
        return self.lora_A[name].weight.to(dtype), (up if scale == 1 else up * scale).to(dtype).t()

    def _only_adapter(self) -> str | None:
        """The only active adapter, or None when PEFT's forward must decide."""
        if self.disable_adapters or self.merged_adapters:
            return None
        names = [name for name in self.active_adapters if name in self.lora_A]
        return names[0] if len(names) == 1 else None


class FastLinear(ShortWay, LoraLinear):
    """The fused node over a dense base."""


@cache
def fast_class(kind: type) -> type | None:
    """The fused class for PEFT's layer class `kind`; None when there is none."""
    if kind is LoraLinear or issubclass(kind, ShortWay):
        return FastLinear if kind is LoraLinear else kind
    is_4bit = (kind.__module__, kind.__name__) == ("peft.tuners.lora.bnb", "Linear4bit")
    return type("FastLinear4bit", (ShortWay, kind), {}) if is_4bit else None


def is_frozen_linear(base: nn.Module) -> bool:
    """Whether the base is dense, or in 4 bit as bitsandbytes packs it for training; on CPUs it has another form
    for inference."""
    packed = getattr(getattr(base, "weight", None), "quant_state", None)
    is_4bit = type(base).__name__ == "Linear4bit" and packed is not None and base.compute_type_is_set
    is_for_training = is_4bit and not getattr(packed, "packing_format_for_cpu", False)
    return type(base) in (nn.Linear, TextProjection) or is_for_training


def compute_dtype(base: nn.Module) -> torch.dtype:
    """The dtype of products with the frozen weight: bitsandbytes' layers set one, others use the weight's own."""
    return getattr(base, "compute_dtype", base.weight.dtype)


def _same_dtype(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the base would compute in its own `dtype`; autocast casts x to its dtype."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device) == dtype
    return x.dtype == dtype


def slow_reason(layer: nn.Module, adapter_name: str = "default") -> str | None:
    """Why this adapted layer keeps PEFT's forward, in a few words; None when it can be fused."""
    if fast_class(type(layer)) is None:
        return f"not a linear layer ({type(layer).__module__}.{type(layer).__name__})"
    base = layer.base_layer
    if not is_frozen_linear(base):
        return f"the base layer is no nn.Linear, dense or in 4 bit ({type(base).__name__})"
    if base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__:
        return "the base layer carries hooks (offloading, for one)"
    if adapter_name in layer.lora_variant:
        return "the adapter is a variant of LoRA (DoRA or another)"
    if type(layer.lora_dropout[adapter_name]) is not nn.Identity:
        return "the adapter has dropout"
    if layer.lora_bias[adapter_name]:
        return "the adapter has a bias"
    if base.weight.requires_grad:
        return "the base weight is trained too"
    return None


def enable_fast_path(model: nn.Module, adapter_name: str = "default") -> int:
    """Fuse every projection of `adapter_name` whose result stays the same; returns how many were fused.

    Call it after `inject`. `slow_reason` says why another keeps its own forward.
    """
    switched = [m for m in adapter_layers(model, adapter_name).values() if slow_reason(m, adapter_name) is None]
    for layer in switched:
        layer.__class__ = fast_class(type(layer))
    return len(switched)


def disable_fast_path(model: nn.Module) -> None:
    """Give every layer back to PEFT's own forward."""
    for layer in model.modules():
        if isinstance(layer, ShortWay):
            layer.__class__ = type(layer).__bases__[1]
