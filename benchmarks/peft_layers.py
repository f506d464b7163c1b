"""PEFT's layers in place of the fused ones, to compare them."""

from torch import nn

from dreambooth_moslora.method.fast_linear import FusedForward

__all__ = ["restore_peft_layers"]


def restore_peft_layers(model: nn.Module) -> None:
    """Restore PEFT's class of every fused layer. Working copies that exist already must be
    cleared."""
    for layer in model.modules():
        if isinstance(layer, FusedForward):
            layer.__class__ = type(layer).__bases__[1]
