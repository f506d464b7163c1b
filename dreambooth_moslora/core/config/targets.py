"""Names of layers in `--target_modules`, `--rank_pattern` and `--alpha_pattern`, without torch.

to_q, attn1.to_q          layers whose path ends so: PEFT's own rule
up_blocks.0.attentions.1  a block: its attention projections, as in B-LoRA and diffusers' scripts
down_blocks.2.*, *conv1   `*` matches anything: every layer whose path, or the end of it, matches
blora_style               another name of a block

In a pattern a block stands for all its layers that have an adapter. A leading `unet.` is ignored.
"""

import math
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from dreambooth_moslora.core.errors import UserError

__all__ = ["ATTENTION", "BLOCKS", "full_name", "is_adapted", "is_meant", "is_target", "parse_pattern", "pattern_value"]

ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
BLOCKS = {"blora_content": "up_blocks.0.attentions.0", "blora_style": "up_blocks.0.attentions.1"}
"""B-LoRA (Frenkel et al. 2024, arXiv 2403.14572): the blocks of SDXL that hold content and style."""
PATTERN = re.compile(r"\s*(?P<name>[^=:\s]+)\s*[=:]\s*(?P<value>\S+)\s*")


def is_target(path: str, name: str) -> bool:
    """Whether `name` in `--target_modules` gives the layer at `path` an adapter."""
    name = full_name(name)
    return is_like(path, name) or (path.startswith(f"{name}.") and any(is_like(path, end) for end in ATTENTION))


def is_adapted(path: str, names: Iterable[str]) -> bool:
    """Whether the layer at `path` gets an adapter by any of the names in `--target_modules`."""
    return any(is_target(path, name) for name in names)


def is_meant(path: str, name: str) -> bool:
    """Whether `name` in a pattern matches the layer at `path`."""
    name = full_name(name)
    return is_like(path, name) or path.startswith(f"{name}.")


def full_name(name: str) -> str:
    return BLOCKS.get(name, name.removeprefix("unet."))


def is_like(path: str, name: str) -> bool:
    """Whether the path, or its end after a dot, matches the name."""
    if "*" in name:
        return fnmatchcase(path, name) or fnmatchcase(path, f"*.{name}")
    return f".{path}".endswith(f".{name}")


def parse_pattern(flag: str, text: str) -> tuple[str, float]:
    """`down_blocks.2.*=8`, or with a colon -> (name, value); a rank must be an integer. Raises UserError."""
    match = PATTERN.fullmatch(text)
    try:
        value = float(match["value"]) if match else math.nan
    except ValueError:
        value = math.nan
    is_rank = flag == "rank_pattern"
    if match is None or not 0 < value <= 1e6 or (is_rank and not (value.is_integer() and value <= 4096)):
        kind = "a whole number from 1 to 4096" if is_rank else "a number above 0"
        raise UserError(f"--{flag} {text}: expected a layer's name and {kind}, such as down_blocks.2.*=8.")
    return match["name"], value


def pattern_value(patterns: Iterable[str], flag: str, path: str) -> float | None:
    """The value of the first pattern that matches the layer; None when none does."""
    values = (parse_pattern(flag, text) for text in patterns)
    return next((value for name, value in values if is_meant(path, name)), None)


def is_text_projection(path: str) -> bool:
    """Whether the UNet's layer at `path` projects the text: to_k and to_v of cross-attention."""
    return path.endswith((".attn2.to_k", ".attn2.to_v"))
