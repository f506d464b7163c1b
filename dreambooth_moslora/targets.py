"""Whether the names in `--target_modules` are those of layers in a UNet."""

from collections.abc import Iterable, Mapping

from dreambooth_moslora.config_fields import nearest
from dreambooth_moslora.errors import UserError

__all__ = ["check_layers", "check_targets", "is_target", "last_name"]


UNREADABLE = "add_embedding."
"""diffusers does not find these layers again in a kohya file, so that an adapter on them cannot be proved."""


def check_layers(targets: Iterable[str], layers: Mapping[str, int], use_dora: bool) -> None:
    """`layers` are those of `check_targets` -> dimensions of the weight: 2 of a matrix, 4 of a convolution.

    Raises UserError for what no layer is called, and for layers that cannot have such an adapter.
    """
    targets = list(targets)
    check_targets(targets, layers)
    for name in targets:
        for layer in (layer for layer in layers if is_target(layer, name)):
            if layer.startswith(UNREADABLE):
                raise UserError(f"--target_modules {name}: {layer} has no name in kohya's files; leave it out.")
            if use_dora and layers[layer] > 2:
                raise UserError(f"--use_dora: {layer} is a convolution; leave {name} out of --target_modules.")


def check_targets(targets: Iterable[str], layers: Iterable[str]) -> None:
    """`layers` are paths of layers with weights, such as `mid_block.attentions.0.proj_in`.

    Raises UserError for a name that none of them ends with, and says which one was probably meant.
    """
    layers = list(layers)
    for name in targets:
        if not any(is_target(layer, name) for layer in layers):
            close = nearest(name, sorted({last_name(layer) for layer in layers}))
            hint = f"did you mean {close}?" if close else "to_q, to_k, to_v and to_out.0 are those of attention."
            raise UserError(f"--target_modules {name}: the UNet has no such layer; {hint}")


def is_target(path: str, name: str) -> bool:
    """PEFT's rule: the path itself, or its end."""
    return f".{path}".endswith(f".{name}")


def last_name(path: str) -> str:
    """`….attn1.to_q` -> `to_q`, `….attn1.to_out.0` -> `to_out.0`."""
    *_, parent, name = f".{path}".split(".")
    return f"{parent}.{name}" if name.isdigit() else name
