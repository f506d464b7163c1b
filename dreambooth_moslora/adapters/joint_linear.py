"""Adapted projections of one input as one autograd node: q, k and v of self-attention, k and v of cross-attention.

    [q k v] = x·Wᵀ + (x·Aᵀ)·diag(Uqᵀ, Ukᵀ, Uvᵀ)        W = [Wq; Wk; Wv] frozen,  A = [Aq; Ak; Av],  U = s·B·M

It takes three kernels for k projections, where each projection alone takes three. The block diagonal is never
built: it is a batch of k products, on columns of the wide tensors. W is one buffer, and the layers' own weights
become views of it, so the base takes no more memory and each layer can still be called alone. Where k and v of
cross-attention are `TextProjection`s, W·x is known already.
"""

from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Sequence

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _JointLinear(torch.autograd.Function):
    """x (…,in), frozen W (k·out,in), A (k,r,in), Uᵀ (k,r,out), all of one dtype -> k tensors (…,out)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        rows, count = x.reshape(-1, x.shape[-1]), len(up)
        inner = rows.mm(down.flatten(0, 1).t())
        result = add_blocks(F.linear(rows, weight), inner, up)
        ctx.save_for_backward(x, inner, weight, down, up)
        return result.view(*x.shape[:-1], -1).chunk(count, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, weight, down, up = ctx.saved_tensors
        count, needs_x = len(up), ctx.needs_input_grad[0]
        grad = torch.cat(grads, -1).view(len(inner), -1)
        grad_inner = add_blocks(None, grad, up.mT)
        grad_up = parts(inner, count).mT.bmm(parts(grad, count))
        grad_x = grad.mm(weight).addmm_(grad_inner, down.flatten(0, 1)).view(x.shape) if needs_x else None
        return grad_x, None, grad_inner.t().mm(x.reshape(-1, x.shape[-1])).view(down.shape), grad_up


class _JointBeside(torch.autograd.Function):
    """A text x (…,in), W·x (…,k·out), A (k,r,in), Uᵀ (k,r,out), all of one dtype -> k tensors (…,out). x has no
    gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, products: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        rows, count = x.reshape(-1, x.shape[-1]), len(up)
        inner = rows.mm(down.flatten(0, 1).t())
        ctx.save_for_backward(rows, inner, up)
        result = torch.baddbmm(parts(products.reshape(len(rows), -1), count), parts(inner, count), up)
        return result.view(count, *x.shape[:-1], -1).unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, up = ctx.saved_tensors
        grad = torch.stack(grads).view(len(up), len(rows), -1)
        grad_down = grad.bmm(up.mT).mT.bmm(rows.expand(len(up), *rows.shape))
        return None, None, grad_down, parts(inner, len(up)).mT.bmm(grad)


def parts(wide: Tensor, count: int) -> Tensor:
    """(n, count·width) -> a view (count, n, width) of its columns."""
    return wide.unflatten(-1, (count, -1)).transpose(0, 1)


def add_blocks(wide: Tensor | None, x: Tensor, blocks: Tensor) -> Tensor:
    """`wide` (n,k·w), changed in place, or zero for None, plus x (n,k·v) times the block diagonal of `blocks`
    (k,v,w)."""
    count = len(blocks)
    if torch.compiler.is_compiling():  # the compiler fuses it, and cannot trace in-place changes of such a view
        product = parts(x, count).bmm(blocks).transpose(0, 1).flatten(1)
        return product if wide is None else wide + product
    beta = 0 if wide is None else 1
    if wide is None:
        wide = torch.empty(len(x), count * blocks.shape[-1], dtype=x.dtype, device=x.device)
    parts(wide, count).baddbmm_(parts(x, count), blocks, beta=beta)
    return wide


class Joint(ABC):
    """Layers with one input, which compute together."""

    def __init__(self, layers: tuple[LoraLinear, ...]):
        self.layers = layers

    def lend(self, adapter_name: str, down: Tensor, up: Tensor) -> None:
        """Let the layers compute together with these copies, A (k,r,in) and Uᵀ (k,r,out)."""
        together = LentTogether(self, down, up)
        for place, layer in enumerate(self.layers):
            layer.working = {adapter_name: (together, place)}

    def take_back(self) -> None:
        for layer in self.layers:
            del layer.working

    @abstractmethod
    def outputs(self, x: Tensor, down: Tensor, up: Tensor) -> Sequence[Tensor]:
        """y (…,out) of each layer for x (…,in), with A (k,r,in) and Uᵀ (k,r,out)."""

    def are_shared(self) -> bool:
        """Whether the layers can still compute together."""
        return True


class JointProducts(Joint):
    """Text projections of one attention, whose products with the text are there."""

    def outputs(self, x: Tensor, down: Tensor, up: Tensor) -> Sequence[Tensor]:
        first = self.layers[0].base_layer
        first(x)  # its products may be of another text
        return _JointBeside.apply(x, first.of_attention, down, up)


class JointWeights(Joint):
    """The frozen weights of the layers below one another in one buffer of their own size.

    W (k·out,in), k = the number of `layers`.
    """

    def __init__(self, layers: tuple[LoraLinear, ...]):
        super().__init__(layers)
        self.weight = laid_together([layer.base_layer for layer in layers])

    def outputs(self, x: Tensor, down: Tensor, up: Tensor) -> Sequence[Tensor]:
        return _JointLinear.apply(x.to(self.weight.dtype), self.weight, down, up)

    def are_shared(self) -> bool:
        """Whether the layers still use the buffer; not after one was moved, cast or given other weights."""
        weights = [layer.base_layer.weight for layer in self.layers]
        places = [(view.data_ptr(), view.dtype) for view in self.weight.chunk(len(weights))]
        return places == [(weight.data_ptr(), weight.dtype) for weight in weights]


def laid_together(linears: Sequence[nn.Linear]) -> Tensor:
    """One buffer (k·out,in) with the stacked frozen weights (out,in); each weight becomes a view of it.

    Nothing is copied if they are stacked already, as in models that share their weights.
    """
    weights = [linear.weight.detach() for linear in linears]
    first, step = weights[0], weights[0].nbytes
    has_storage = first.device.type != "meta" and all(weight.is_contiguous() for weight in weights)
    ends = [weight.data_ptr() - number * step for number, weight in enumerate(weights)]
    storages = {weight.untyped_storage().data_ptr() for weight in weights}
    if has_storage and len(storages) == 1 and set(ends) == {first.data_ptr()}:
        return first.as_strided((len(weights) * len(first), first.shape[1]), first.stride())
    whole = torch.cat(weights)
    for linear, view in zip(linears, whole.chunk(len(weights)), strict=True):
        linear.weight = nn.Parameter(view, requires_grad=False)
    return whole


def are_matrices(layers: Iterable[nn.Module]) -> bool:
    """Whether each layer is a plain matrix: not quantised, and without a bias."""
    return all(type(layer) is nn.Linear and layer.bias is None for layer in layers)


def lay_together(model: nn.Module, adapted: Container[str]) -> None:
    """Stack the `adapted` projections (paths) that models with shared weights will compute jointly."""
    for path, module in model.named_modules():
        names = {layer: name for name, layer in module.named_children()}
        layers = [x for x in projections_of_one_input(module) if f"{path}.{names[x]}" in adapted]
        kinds = {(type(x), x.weight.shape, x.weight.dtype) for x in layers}
        if len(layers) > 1 and len(kinds) == 1 and are_matrices(layers):
            laid_together(layers)


class LentTogether:
    """The working copies of layers with one input, for one step: A (k,r,in) and Uᵀ (k,r,out), leaves of autograd.

    The first layer that is called computes all of them. The others' results wait until they are called with the
    same input.
    """

    def __init__(self, joint: Joint, down: Tensor, up: Tensor):
        self.joint, self.down, self.up = joint, down, up
        self._input: tuple | None = None
        self._waiting: list[Tensor | None] = []

    def output(self, place: int, x: Tensor) -> Tensor:
        """y (…,out) of the layer at `place` for x (…,in)."""
        if not self._is_waiting_for(x) or self._waiting[place] is None:
            found = self.joint.outputs(x, self.down, self.up)
            self._input, self._waiting = (x, torch.is_grad_enabled()), list(found)
        result, self._waiting[place] = self._waiting[place], None
        if all(other is None for other in self._waiting):
            self._input = None
        return result

    def _is_waiting_for(self, x: Tensor) -> bool:
        """Whether x is the tensor object of the previous call, with the same gradient mode.

        Changing it in place in between raises an error in autograd, which has saved it.
        """
        return self._input is not None and self._input[0] is x and self._input[1] == torch.is_grad_enabled()


def projections_of_one_input(attention: nn.Module) -> list[nn.Module]:
    """The projections of one tensor in diffusers' attention: to_q, to_k, to_v, or the last two in cross-attention.

    Empty for any other module.
    """
    is_cross = getattr(attention, "is_cross_attention", None)
    if is_cross is None:
        return []
    names = ("to_k", "to_v") if is_cross else ("to_q", "to_k", "to_v")
    return [layer for layer in (getattr(attention, name, None) for name in names) if layer is not None]
