"""Several adapters on one frozen base.

A batch has equally many rows for each adapter, which has its own A, M and B.

    y = W0·x + diag(U1·A1, …, UN·AN)·x        U = s·B·M

Each adapter is on a model of its own, and these models share the base's tensors (`twin`). During a
step the first model computes for all: one product of W0 with all rows, and the adapters' products
in batches of N. So a step launches about as many kernels for N adapters as for one. Layers other
than projections (convolutions) apply one adapter after the other; their product with W0 is joint
too.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.autograd.function import once_differentiable

from dreambooth_moslora.method import fast_linear, moslora

NAME = "default"
"""Name of the adapter on each model."""


def twin(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the modules that shares all tensors, so that it takes almost no memory."""
    # `deepcopy` takes what is in its memo for already copied
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for tensor in model.parameters():
        packed = getattr(tensor, "quant_state", None)
        if packed is not None:
            memo[id(packed)] = packed
    return copy.deepcopy(model, memo)


class _StackedLinear(torch.autograd.Function):
    """y = W0·x + b + U·A·x, for the rows of N adapters, one adapter's after the other's.

    x: (N·m, …, in)
    weight, bias: frozen W0 (out, in), and b (out) or None
    packed: bitsandbytes' description of a W0 in 4 bit; None for a dense one
    down: A (N, r, in)
    up: Uᵀ (N, r, out)

    Returns y (N·m, …, out). All are of one dtype.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, packed, down: Tensor, up: Tensor
    ) -> Tensor:
        # A·x: (N, m, r), a share of the rows for each adapter
        rows = x.reshape(len(down), -1, x.shape[-1])
        inner = rows.bmm(down.mT)

        # W0·x + b for all, to which U·(A·x) is added in place
        if packed is None:
            base_output = F.linear(rows, weight, bias)
        else:
            base_output = fast_linear.linear_4bit(rows, weight, bias, packed)
        result = base_output.baddbmm_(inner, up)

        ctx.packed = packed
        ctx.save_for_backward(x, inner, weight, down, up)
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, weight, down, up = ctx.saved_tensors
        grad = grad.reshape(*inner.shape[:2], -1)
        # What reads `grad` comes before W0 drives it out of the cache.
        grad_inner = grad.bmm(up.mT)
        grad_up = inner.mT.bmm(grad)
        grad_down = grad_inner.mT.bmm(x.reshape(*inner.shape[:2], -1))
        grad_x = None
        if ctx.needs_input_grad[0]:
            if ctx.packed is not None:
                weight = fast_linear.dense_weight(weight, ctx.packed).to(grad.dtype)
            # through W0 in one product for all, then through each adapter
            through_base = grad.flatten(0, 1).mm(weight).view(*inner.shape[:2], -1)
            grad_x = through_base.baddbmm_(grad_inner, down).view(x.shape)
        return grad_x, None, None, None, grad_down, grad_up


class StackedLayer:
    """The layers of one path in N models; the first computes for all while copies are lent. Raises
    ValueError when the frozen weights are not the same tensor, and for dropout, DoRA and biases."""

    def __init__(self, layers: tuple[LoraLayer, ...]):
        self.layers = layers
        self.base = layers[0].base_layer
        self._copies: tuple[Tensor, Tensor] | None = None
        addresses = {layer.base_layer.weight.data_ptr() for layer in layers}
        if len(addresses) > 1:
            raise ValueError("stacked adapters need models that share their frozen weights")
        if not all(map(is_plain, layers)):
            raise ValueError("stacked adapters have no dropout, no DoRA and no bias")

    def lend(self, _adapter_name: str, down: Tensor, up: Tensor) -> None:
        """Compute with these copies, A (N,r,in) and Uᵀ (N,r,out)."""
        self._copies = down, up
        self.lend_general()

    def lend_general(self) -> None:
        """Compute with the adapters' own weights, one after the other."""
        self.layers[0].forward = self.output

    def take_back(self) -> None:
        self._copies = None
        self.layers[0].__dict__.pop("forward", None)

    def output(self, x: Tensor) -> Tensor:
        """y (N·m, …, out) for x (N·m, …, in), rows in the adapters' order; the base's if they are
        off."""
        if self.layers[0].disable_adapters:
            return self.base(x)

        # all adapters in one product
        if self._copies is not None:
            packed = getattr(self.base.weight, "quant_state", None)
            x = x.to(fast_linear.compute_dtype(self.base))
            return _StackedLinear.apply(x, self.base.weight, self.base.bias, packed, *self._copies)

        # one adapter after the other
        result = self.base(x)
        branches = []
        for layer, rows in zip(self.layers, x.chunk(len(self.layers)), strict=True):
            down, up = layer.lora_A[NAME], layer.lora_B[NAME]
            branches.append(up(down(rows.to(down.weight.dtype))) * layer.scaling[NAME])
        return (result + torch.cat(branches)).to(result.dtype)


def is_plain(layer: LoraLayer) -> bool:
    """Whether the adapter only adds s·B·M·A·x to the base's output."""
    has_dropout = type(layer.lora_dropout[NAME]) is not torch.nn.Identity
    return NAME not in layer.lora_variant and not has_dropout and not layer.lora_bias[NAME]


class StackedAdapters:
    """The adapters of N >= 2 models of one base, on the same layers, of equal shapes; else
    ValueError."""

    def __init__(self, models: Sequence[torch.nn.Module]):
        if len(models) < 2:
            raise ValueError("one adapter is no stack")
        layers = [moslora.adapter_layers(model, NAME) for model in models]
        if any(found.keys() != layers[0].keys() for found in layers):
            raise ValueError("stacked adapters are on the same layers")
        stacked = [StackedLayer(tuple(found[path] for found in layers)) for path in layers[0]]

        # projections compute in one product; the others one adapter after the other
        self.fast = [
            unit for unit in stacked if fast_linear.slow_reason(unit.layers[0], NAME) is None
        ]
        self.general = [unit for unit in stacked if unit not in self.fast]

    @contextmanager
    def for_one_step(self) -> Iterator[fast_linear.StepCopies]:
        """Let the first model compute for all for the block, in which adapters are constant. A
        batch has N equal shares of rows, in order. Call `collect` after each backward pass."""
        with ExitStack() as stack:
            for unit in self.general:
                stack.callback(unit.take_back)
                unit.lend_general()
            yield stack.enter_context(fast_linear.StepCopies(self.fast, NAME).lent())
