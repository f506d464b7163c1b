"""PEFT's rule for `target_modules`, for checks that run without torch.

A test compares it with PEFT itself.
"""

__all__ = ["is_target"]


def is_target(path: str, name: str) -> bool:
    """Whether the layer at `path` is meant by `name`: it is the path itself, or its end after a dot."""
    return f".{path}".endswith(f".{name}")
