"""Facts about any LoRA file, of this or another program, for `info` and the web page."""

from collections import Counter
from pathlib import Path

from torch import Tensor

from dreambooth_moslora.disk.paths import expand_user_path
from dreambooth_moslora.errors import UserError, format_error, format_escape
from dreambooth_moslora.lora import key_names, lora_settings, raw_file, safetensors_file
from dreambooth_moslora.lora.key_names import PAIRED_TOOLS
from dreambooth_moslora.lora.metadata import METADATA_KEY, AdapterMetadata, parse_metadata


def describe(path: str | Path) -> dict[str, object]:
    """Return what a LoRA file is and contains, JSON-able.

    Raises UserError for a broken file, and for a file without a LoRA.
    """
    path = expand_user_path(path)
    tensors, header = safetensors_file.read_tensors(path)
    facts = {"file": path.name, "size_mib": round(path.stat().st_size / 2**20, 3)}
    facts["dtypes"] = sorted(
        {str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()}
    )
    if raw_file.RAW_KEY in tensors:
        return facts | describe_raw(path)
    try:
        safetensors_file.check_finite(tensors, path.name)
        facts |= describe_layers(path, tensors, header)
    except UserError:
        raise
    # PyTorch lacks the operation for this dtype, or an alpha is not a number.
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path.name} is broken: {format_error(error)}") from error
    return facts | describe_header(header)


def describe_raw(path: Path) -> dict[str, object]:
    """Return the facts of a raw file. Raises UserError for a broken one."""
    _, metadata = raw_file.read_raw(path)
    settings = ("rank", "alpha", "use_rslora", "use_dora", "mixer")
    return {
        "kind": "raw MoSLoRA weights (for resuming; export it to use it elsewhere)",
        **{name: getattr(metadata, name) for name in settings},
        **describe_metadata(metadata),
    }


def describe_layers(
    path: Path, tensors: dict[str, Tensor], header: dict[str, str]
) -> dict[str, object]:
    """Return the kind of a LoRA file, and the number, ranks and alphas of its layers.

    Other kinds of adapters get only their kind. Raises UserError for a file without an adapter.
    """
    # A plain LoRA's layers have a down matrix; any other kind is described by its tool alone.
    keys = [key for key in map(key_names.parse_key, tensors) if key]
    modules, _ = key_names.parse_keys(tensors)
    pairs = {
        module: parts
        for module, parts in modules.items()
        if "down" in parts and "mixer" not in parts
    }
    kinds = sorted({key.tool for key in keys} - PAIRED_TOOLS)
    if not pairs and not kinds:
        raise UserError(
            f"{path.name} holds no known LoRA; "
            f"its first tensor is {next(iter(tensors), 'absent')!r:.80}"
        )

    # The kind: the tool that spells its keys so, and whether it is DoRA.
    dora_scales = [tensor for key, tensor in tensors.items() if key.endswith(".dora_scale")]
    use_dora = bool(dora_scales) or any("lora_magnitude_vector" in key for key in tensors)
    if use_dora:
        is_read = all(map(key_names.is_row_magnitude, dora_scales))
        kinds.append("DoRA" if is_read else "DoRA by columns, which is not read here")
    kinds += sorted({key.tool for key in keys if key.part == "down" and key.module in pairs})
    kind = ("published by dreambooth_moslora, " if METADATA_KEY in header else "") + ", ".join(
        kinds
    )
    if not pairs:
        return {"kind": kind, "use_dora": use_dora}

    # The number of layers, their ranks and alphas.
    settings = lora_settings.read_sidecar_settings(
        path, tensors
    ) or lora_settings.read_header_settings(header, path.name)
    alphas = list_alphas(settings) | {float(p["alpha"]) for p in pairs.values() if "alpha" in p}
    ranks = Counter(len(parts["down"]) for parts in pairs.values())
    return {
        "kind": kind,
        "modules": dict(Counter(module.component or "other" for module in pairs)),
        "ranks": {str(rank): number for rank, number in sorted(ranks.items())},
        "alpha": ", ".join(f"{alpha:g}" for alpha in sorted(alphas))
        or "not in the file (read as alpha = rank)",
        "use_dora": use_dora,
    }


def list_alphas(settings: dict[str, object]) -> set[float]:
    """Return the alphas in PEFT's settings, of any component."""
    alphas = {value for name, value in settings.items() if name.endswith("lora_alpha")}
    patterns = [value or {} for name, value in settings.items() if name.endswith("alpha_pattern")]
    return alphas.union(*(pattern.values() for pattern in patterns))


def describe_header(header: dict[str, str]) -> dict[str, object]:
    """Return the facts in the header, in keys of this program, ModelSpec or kohya."""
    if metadata := parse_metadata(header):
        return {"mixer": f"{metadata.mixer}, folded"} | describe_metadata(metadata)
    if METADATA_KEY in header:
        return {"base": "unknown: the moslora header is broken"}
    facts = {
        "title": header.get("modelspec.title") or header.get("ss_output_name"),
        "base": header.get("modelspec.architecture") or header.get("ss_base_model_version"),
        "trigger_words": header.get("modelspec.trigger_phrase"),
        "network": header.get("ss_network_module"),
    }
    return {key: value for key, value in facts.items() if value}


def describe_metadata(metadata: AdapterMetadata) -> dict[str, object]:
    """Return the facts in this program's metadata, without empty ones."""
    facts = {
        "base": metadata.base_id,
        "trigger_words": ", ".join(metadata.trigger_words),
        "class_word": metadata.class_word,
        "resolution_px": metadata.resolution_px,
        "versions": ", ".join(f"{name} {number}" for name, number in metadata.versions.items()),
    }
    return {key: value for key, value in facts.items() if value}


LABELS = {
    "size_mib": "Size (MiB)",
    "use_dora": "DoRA",
    "use_rslora": "rsLoRA",
    "resolution_px": "Resolution (px)",
}
"""Facts whose label is not their key in words."""


def format_label(key: str) -> str:
    """Return the label of a fact of `describe`, for `info` and the page."""
    return LABELS.get(key) or key.replace("_", " ").capitalize()


def format_lines(facts: dict[str, object]) -> list[str]:
    """Return the facts as lines of text: label, then value."""
    return [
        f"{format_label(key) + ':':<24} {escape_nonprintable(format_value(key, value))}"
        for key, value in facts.items()
    ]


def escape_nonprintable(text: str) -> str:
    """Return the text with each nonprintable character escaped, as `\\x1b`.

    A file's header may hold characters that control the terminal or reverse a line.
    """
    return "".join(c if c.isprintable() else format_escape(ord(c)) for c in text)


def format_value(key: str, value: object) -> str:
    """Return a fact of `describe` as one line, for `info` and the page."""
    if key == "ranks":
        return format_ranks(value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_ranks(counts: dict[str, int]) -> str:
    """Return "rank 16 in 146 layers", or for more than three ranks "ranks 1 to 12 in 146
    layers"."""
    if len(counts) > 3:
        lowest, *_, highest = counts
        return f"ranks {lowest} to {highest} in {sum(counts.values())} layers"
    return ", ".join(
        f"rank {rank} in {number} layer{'s' * (number != 1)}" for rank, number in counts.items()
    )
