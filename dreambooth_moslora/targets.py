"""Whether the names in `--target_modules` are those of layers in a UNet."""

from collections.abc import Iterable

from dreambooth_moslora.config_fields import nearest
from dreambooth_moslora.errors import UserError

__all__ = ["check_dora", "check_targets", "is_target", "last_name"]


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


def check_dora(targets: Iterable[str], convolutions: Iterable[str]) -> None:
    """Raises UserError for a name with which a convolution ends: programs differ in how they read its magnitudes."""
    convolutions = list(convolutions)
    for name in targets:
        if found := next((layer for layer in convolutions if is_target(layer, name)), None):
            raise UserError(f"--use_dora: {found} is a convolution; leave {name} out of --target_modules.")


def is_target(path: str, name: str) -> bool:
    """PEFT's rule: the path itself, or its end."""
    return f".{path}".endswith(f".{name}")


def last_name(path: str) -> str:
    """`….attn1.to_q` -> `to_q`, `….attn1.to_out.0` -> `to_out.0`."""
    *_, parent, name = f".{path}".split(".")
    return f"{parent}.{name}" if name.isdigit() else name
