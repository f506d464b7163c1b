"""Writes an adapter's best scale into an existing published file. Its tensors are not changed."""

from dataclasses import replace
from pathlib import Path

from dreambooth_moslora.adapters.files.metadata import AdapterMetadata
from dreambooth_moslora.adapters.files.tensor_file import read_tensors, write_file

__all__ = ["note_scale"]


def note_scale(path: Path, best: float, usable: tuple[float, float]) -> bool:
    """Write the scale; returns False, without writing, unless this program published the file.

    Raises UserError for a broken file, and OSError when it cannot be written.
    """
    tensors, header = read_tensors(path)
    try:
        facts = AdapterMetadata.from_json(header["moslora"])
    except (KeyError, TypeError, ValueError):
        return False
    if "raw_format" in tensors:
        return False
    facts = replace(facts, best_scale=best, usable_scales=usable)
    write_file(path, tensors, header | {"moslora": facts.to_json()})
    return True
