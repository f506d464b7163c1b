"""Describes any LoRA file, of this or another program."""

from collections import Counter
from pathlib import Path

from torch import Tensor

from dreambooth_moslora.disk.paths import expand_user_path
from dreambooth_moslora.errors import UserError, format_error, format_escape
from dreambooth_moslora.lora import key_names, lora_settings, raw_file
from dreambooth_moslora.lora.key_names import PAIRED_TOOLS
from dreambooth_moslora.lora.metadata import METADATA_KEY, AdapterMetadata, parse_metadata


def describe(path: str | Path) -> dict[str, object]:
    """What a LoRA file is and contains, JSON-able. Raises UserError for a broken file, and for one
    without a LoRA."""
    path = expand_user_path(path)
    tensors, header = raw_file.read_tensors(path)
    facts = {"file": path.name, "size_mib": round(path.stat().st_size / 2**20, 3)}
    facts["dtypes"] = sorted(
        {str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()}
    )
    if raw_file.RAW_KEY in tensors:
        return facts | describe_raw(path)
    try:
        raw_file.check_finite(tensors, path.name)
        facts |= describe_layers(path, tensors, header)
    except UserError:
        raise
    # torch lacks the operation for this dtype, or an alpha is no number
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path.name} is broken: {format_error(error)}") from error
    return facts | describe_header(header)


def describe_raw(path: Path) -> dict[str, object]:
    """The content of a raw file. Raises UserError."""
    _, metadata = raw_file.read_raw(path)
    kind = "raw MoSLoRA weights (for resuming; export it to use it elsewhere)"
    settings = ("rank", "alpha", "use_rslora", "use_dora", "mixer")
    facts = {name: getattr(metadata, name) for name in settings}
    return {"kind": kind, **facts, **describe_metadata(metadata)}


def describe_layers(
    path: Path, tensors: dict[str, Tensor], header: dict[str, str]
) -> dict[str, object]:
    """The layers of a LoRA file; of other kinds of adapters only the kind. Raises UserError."""
    # The layers with a down matrix are those of a plain LoRA; of the others the tool is told.
    keys = [key for key in map(key_names.parse_key, tensors) if key]
    modules, _ = key_names.parse_keys(tensors)
    pairs = {}
    for module, parts in modules.items():
        if "down" in parts and "mixer" not in parts:
            pairs[module] = parts
    kinds = sorted({key.tool for key in keys} - PAIRED_TOOLS)
    if not pairs and not kinds:
        raise UserError(
            f"{path.name} holds no known LoRA; "
            f"its first tensor is {next(iter(tensors), 'absent')!r:.80}"
        )

    # The kind: whose keys they are, and whether it is DoRA.
    sizes = [tensor for key, tensor in tensors.items() if key.endswith(".dora_scale")]
    use_dora = bool(sizes) or any("lora_magnitude_vector" in key for key in tensors)
    if use_dora:
        is_read = all(map(key_names.is_row_magnitude, sizes))
        kinds.append("DoRA" if is_read else "DoRA by columns, which is not read here")
    kinds += sorted({key.tool for key in keys if key.part == "down" and key.module in pairs})
    kind = ("published by dreambooth_moslora, " if METADATA_KEY in header else "") + ", ".join(
        kinds
    )
    if not pairs:
        return {"kind": kind, "use_dora": use_dora}

    # How many layers there are, and of which ranks and alphas.
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
    """The alphas in PEFT's settings, of any component."""
    found = set()
    for name, value in settings.items():
        if name.endswith("lora_alpha"):
            found.add(value)
        if name.endswith("alpha_pattern"):
            found |= {*(value or {}).values()}
    return found


def describe_header(header: dict[str, str]) -> dict[str, object]:
    """What the header says about the adapter, in keys of this program, ModelSpec or kohya."""
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
    said = {
        "base": metadata.base_id,
        "trigger_words": ", ".join(metadata.trigger_words),
        "class_word": metadata.class_word,
        "resolution_px": metadata.resolution_px,
        "versions": ", ".join(f"{name} {number}" for name, number in metadata.versions.items()),
    }
    return {key: value for key, value in said.items() if value}


LABELS = {
    "size_mib": "Size (MiB)",
    "use_dora": "DoRA",
    "use_rslora": "rsLoRA",
    "resolution_px": "Resolution (px)",
}


def format_label(key: str) -> str:
    """How `info` and the page call a fact of `describe`."""
    return LABELS.get(key) or key.replace("_", " ").capitalize()


def format_lines(facts: dict[str, object]) -> list[str]:
    return [
        f"{format_label(key) + ':':<24} {escape_nonprintable(format_value(key, value))}"
        for key, value in facts.items()
    ]


def escape_nonprintable(text: str) -> str:
    """Return the text with what is no printable character escaped, as `\\x1b`: a file's header may
    hold some that affect the terminal, or turn a line's direction."""
    return "".join(c if c.isprintable() else format_escape(ord(c)) for c in text)


def format_value(key: str, value: object) -> str:
    """A fact of `describe` in one line, for `info` and the page."""
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
    """ "rank 16 in 146 layers", or of more than three ranks "ranks 1 to 12 in 146 layers"."""
    if len(counts) > 3:
        lowest, *_, highest = counts
        return f"ranks {lowest} to {highest} in {sum(counts.values())} layers"
    return ", ".join(
        f"rank {rank} in {number} layer{'s' * (number != 1)}" for rank, number in counts.items()
    )
