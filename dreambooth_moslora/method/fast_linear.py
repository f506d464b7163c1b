"""Fused linear layers with an adapter: one autograd node each, with fewer kernels than PEFT's.

    y = W0·x + U·A·x                U = s·B·M (out,r), or s·B for plain LoRA
    dx = W0ᵀ·g + Aᵀ·(Uᵀ·g)          dA = (Uᵀ·g)·xᵀ          dU = g·(A·x)ᵀ

PEFT computes the branch in further full-width tensors, in fp32 when the adapter is fp32, and
autograd keeps a cast copy of x for each projection. Here the branch is added to the base's output
in place, and autograd keeps x once and A·x (n,r). Adapters stay fp32 masters; the arithmetic is in
the base weight's dtype. The scale is folded into U: `addmm` with a factor other than 1 is outside
the fast CPU kernels.

It supports a frozen `nn.Linear`, dense or in 4 or 8 bit, with an adapter without dropout, DoRA or
bias (`explain_slow_path`). Calls that need more, and calls outside of a step, use PEFT's forward.

`WorkingCopies` casts A and U of a whole model to the base's dtype once per optimizer step, as
leaves of autograd:

    dB = s·dU·Mᵀ          dM = s·Bᵀ·dU

Their gradients are summed in fp32 over the micro-batches, and at the end of the step become those
of A, B and M. Layers of equal shapes form one batch. U is stored as Uᵀ (r,out), the form in which
its gradient is computed.
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
    """Autograd node of y = W0·x + b + U·A·x.

    x (…,in), W0 (out,in), b (out) or None, `packing` of W0, A (r,in), Uᵀ (r,out), all of one dtype
    -> y (…,out)
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, packing, down: Tensor, up: Tensor
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])

        # Compute the branch's inner product A·x (n,r), which the backward pass needs again.
        inner = rows.mm(down.t())

        # Compute the base's output W0·x + b.
        output = compute_base_output(rows, weight, bias, packing)

        # Add the branch U·(A·x) in place: this needs no second tensor of full width.
        output.addmm_(inner, up)
        ctx.packing = packing
        ctx.save_for_backward(x, inner, weight, down, up)
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, weight, down, up = ctx.saved_tensors
        needs_x, _, _, _, needs_down, needs_up = ctx.needs_input_grad
        grad = grad.reshape(-1, grad.shape[-1])

        # Compute first what reads `grad`: W0 will evict it from the cache.
        grad_inner = grad.mm(up.t())
        grad_up = inner.t().mm(grad) if needs_up else None

        # dx = W0ᵀ·g + Aᵀ·(Uᵀ·g). A packed weight is unpacked here, and freed again.
        grad_x = None
        if needs_x:
            if ctx.packing is not None:
                weight = dequantize_packed(weight, ctx.packing).to(grad.dtype)
            grad_x = grad.mm(weight).addmm_(grad_inner, down).view(x.shape)

        grad_down = grad_inner.t().mm(x.reshape(-1, x.shape[-1])) if needs_down else None
        return grad_x, None, None, None, grad_down, grad_up


def compute_base_output(x: Tensor, weight: Tensor, bias: Tensor | None, packing) -> Tensor:
    """Compute W0·x + b (n,out) of x (n,in)."""
    if packing is None:
        return F.linear(x, weight, bias)
    if isinstance(packing, Tensor):
        return F.linear(x, dequantize_weight(weight, packing), bias)
    from bitsandbytes import matmul_4bit

    return matmul_4bit(x, weight, bias=bias, quant_state=packing)


def dequantize_packed(weight: Tensor, packing) -> Tensor:
    """Return the matrix (out,in) of a packed weight."""
    if isinstance(packing, Tensor):
        return dequantize_weight(weight, packing)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight, packing)


class FusedForward:
    """Mixin of PEFT's LoRA layer whose forward uses the fused node where it is equivalent."""

    step_copies: Mapping[str, tuple[Tensor, Tensor]] = MappingProxyType({})
    """Adapter name -> its copies A (r,in) and Uᵀ (r,out), within a step."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """Compute y (…,out) of x (…,in), equal to PEFT's forward."""
        name, base = self._find_only_adapter(), self.base_layer

        # Use PEFT's forward outside of a step, and where the node would compute something else: the
        # caller chooses an adapter for each sample, not exactly one adapter is active, or x has
        # another dtype.
        if (
            args
            or kwargs
            or name not in self.step_copies
            or not _is_same_dtype(x, get_compute_dtype(base))
        ):
            return super().forward(x, *args, **kwargs)
        down, up = self.step_copies[name]

        # In the usual case, use one node for W0·x and the branch.
        x = x.to(get_compute_dtype(base))
        return _AdaptedLinear.apply(x, base.weight, base.bias, get_packing(base), down, up)

    def _find_only_adapter(self) -> str | None:
        """Return the only active adapter, or None if PEFT's forward must decide."""
        if self.disable_adapters or self.merged_adapters:
            return None
        names = [name for name in self.active_adapters if name in self.lora_A]
        return names[0] if len(names) == 1 else None


@cache
def get_fast_class(kind: type) -> type | None:
    """Return the fused class for PEFT's layer class `kind`, or None."""
    if issubclass(kind, FusedForward):
        return kind

    # Compare the name: the class can be imported only if bitsandbytes is installed.
    is_4bit = (kind.__module__, kind.__name__) == ("peft.tuners.lora.bnb", "Linear4bit")
    is_linear = kind is LoraLinear or is_4bit
    return type(f"Fast{kind.__name__}", (FusedForward, kind), {}) if is_linear else None


def get_packing(base: nn.Module):
    """Return the scales of an 8-bit weight, the quantization state of a 4-bit weight, or None."""
    return base.scales if type(base) is Int8Linear else getattr(base.weight, "quant_state", None)


def get_compute_dtype(base: nn.Module) -> torch.dtype:
    """Return the dtype of products with the frozen weight, packed or dense."""
    return getattr(base, "compute_dtype", base.weight.dtype)


def _is_same_dtype(x: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the base would get x in this dtype, which autocast may change."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device) == dtype
    return x.dtype == dtype


def explain_slow_path(layer: nn.Module, adapter_name: str = "default") -> str | None:
    """Explain in a few words why an adapted layer keeps PEFT's forward; None if it can be fused."""
    if get_fast_class(type(layer)) is None:
        return f"not a linear layer ({type(layer).__module__}.{type(layer).__name__})"

    # Check the base layer: the node reads its weight, so its kind must be supported.
    base = layer.base_layer
    if type(base) not in (nn.Linear, Int8Linear) and not is_trainable_4bit(base):
        return f"the base layer is no nn.Linear, dense or in 4 or 8 bit ({type(base).__name__})"
    if base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__:
        return "the base layer carries hooks (offloading, for one)"

    # Check the adapter: the node computes s·B·M·A·x and nothing else.
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
    """Return whether a layer is bitsandbytes' in 4 bit, ready to compute, and not packed in the
    format for inference on CPUs."""
    if type(base).__name__ != "Linear4bit":
        return False
    state = getattr(base.weight, "quant_state", None)
    if state is None or not base.compute_type_is_set:
        return False
    return not getattr(state, "packing_format_for_cpu", False)


def enable_fast_path(model: nn.Module, adapter_name: str = "default") -> int:
    """Fuse every adapted projection whose result stays the same (`explain_slow_path`). Return how
    many were fused.

    The layers' class is swapped, as PEFT has no hook for this: a `LoraVariant` gets the base's
    output, which is computed in a node of its own by then, and a layer has one variant of those
    that its class lists. PEFT ignores custom layer classes for a second adapter.
    """
    count = 0
    for layer in moslora.get_adapter_layers(model, adapter_name).values():
        if explain_slow_path(layer, adapter_name) is None:
            layer.__class__ = get_fast_class(type(layer))
            count += 1
    return count


class WorkingCopies:
    """Copies of A and U for every fused layer of some models, made anew for each step.

    models: with adapters, after `enable_fast_path`
    adapter_name: the adapter that is trained
    """

    def __init__(self, *models: nn.Module, adapter_name: str = "default"):
        self.adapter_name = adapter_name
        modules = [module for model in models for module in model.modules()]
        self.layers = [layer for layer in modules if isinstance(layer, FusedForward)]
        self.batches: list[LayerBatch] = []

    @contextmanager
    def attach_copies(self) -> Iterator["WorkingCopies"]:
        """Attach the copies to their layers within the block, in which the adapter must not change.
        Call `collect` after each backward pass. The parameters get their gradients if the block
        ends without an error."""
        # A change since the last step, such as hooks or an adapter with dropout, may send a layer
        # through PEFT. Copy the remaining ones in batches of equal shapes.
        groups: dict[tuple, list[FusedForward]] = defaultdict(list)
        for layer in self.layers:
            if explain_slow_path(layer, self.adapter_name) is None:
                groups[get_batch_key(layer, self.adapter_name)].append(layer)
        self.batches = [LayerBatch(layers, self.adapter_name) for layers in groups.values()]

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
        """Add the gradients of a backward pass to the step's sums."""
        for batch in self.batches:
            batch.collect()


def get_batch_key(layer: FusedForward, name: str) -> tuple:
    """Return the key of layers that fit into one batch: shape, scale, dtype, device, and the
    matrices that learn."""
    base, down, lora_b = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name]
    sizes = (down.shape, base.out_features, layer.scaling[name])
    options = (get_compute_dtype(base), base.weight.device)
    learns_mixer = isinstance(lora_b, mixer.MixerLinear) and lora_b.mixer.requires_grad
    return (sizes, options, type(lora_b), learns_mixer, down.requires_grad)


class LayerBatch:
    """Batch of n layers of equal shapes: A (n,r,in), B (n,out,r) and M (n,r,r), copied to A and
    Uᵀ (n,r,out), with which the layers compute afterwards."""

    def __init__(self, layers: list[FusedForward], adapter_name: str):
        self.scale = layers[0].scaling[adapter_name]

        # Collect the masters.
        lora_bs = [layer.lora_B[adapter_name] for layer in layers]
        self.downs = [layer.lora_A[adapter_name].weight for layer in layers]
        self.is_mixed = isinstance(lora_bs[0], mixer.MixerLinear)
        self.ups = [lora_b.up if self.is_mixed else lora_b.weight for lora_b in lora_bs]
        self.mixers = [lora_b.mixer for lora_b in lora_bs] if self.is_mixed else []
        self.learns_down = self.downs[0].requires_grad
        self.learns_up = self.ups[0].requires_grad

        # Sums over the step's micro-batches: dA (n,r,in) and dUᵀ (n,r,out).
        self.down_sum: Tensor | None = None
        self.up_sum: Tensor | None = None
        # An unused layer's gradient stays None, so that the optimizer skips the layer.
        self.reached: set[int] = set()

        # Make the copies: each layer's leaves are views of the batch.
        self.copies: list[tuple[Tensor, Tensor]] = []
        stacked = self._stack_matrices(get_compute_dtype(layers[0].base_layer))
        for layer, down, up in zip(layers, *stacked, strict=True):
            pair = (down.detach().requires_grad_(self.learns_down), up.detach().requires_grad_())
            self.copies.append(pair)
            layer.step_copies = {adapter_name: pair}

    @torch.no_grad()
    def _stack_matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A (n,r,in) and Uᵀ (n,r,out) in this dtype."""
        # Compute Uᵀ = s·Mᵀ·Bᵀ in fp32, all layers in one batch, and cast it afterwards.
        up = torch.stack(self.ups).mT
        if self.is_mixed:
            up = torch.stack(self.mixers).mT.bmm(up)
        if self.scale != 1:
            up = up * self.scale
        return torch.stack(self.downs).to(dtype), up.to(dtype).contiguous()

    @torch.no_grad()
    def collect(self) -> None:
        """Add the copies' gradients to the sums, in the dtype of A and B."""
        # List the layers that this backward pass used.
        reached = [index for index, (_, up) in enumerate(self.copies) if up.grad is not None]
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
        """Convert the step's sums of dA and dU to the gradients of the masters A, M and B."""
        if self.up_sum is None:
            return
        grad = self.up_sum.mT  # dU (n,out,r)

        # dA is the gradient of A.
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
        """Add to the parameters' gradients: a layer that also used PEFT's forward has one."""
        for i in self.reached:
            weight, grad = parameters[i], gradients[i]
            weight.grad = grad if weight.grad is None else weight.grad + grad


def add_in_place(total: Tensor | None, addend: Tensor) -> Tensor:
    """Add to the total in place, or return the addend if there is no total yet."""
    return addend if total is None else total.add_(addend)


def pop_gradients(leaves: tuple[Tensor, ...]) -> Tensor:
    """Remove the gradients from the leaves and return them as one tensor (n, …)."""
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return torch.stack(gradients)
