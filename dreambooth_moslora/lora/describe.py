"""Describes any LoRA file, of this or another program."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from dreambooth_moslora.disk.paths import user_path
from dreambooth_moslora.errors import UserError, one_line
from dreambooth_moslora.lora import key_names, lora_settings, new_tokens, raw_file
from dreambooth_moslora.lora.key_names import ENDINGS, PAIRED, Module
from dreambooth_moslora.lora.metadata import HEADER, AdapterMetadata, metadata_in
from dreambooth_moslora.method.mixer import nominal_scale
from dreambooth_moslora.settings.families import DENOISERS


@dataclass(frozen=True)
class Pair:
    module: Module
    rank: int
    alpha: float | None
    use_rslora: bool = False


def describe(path: str | Path) -> dict[str, object]:
    """What a LoRA file is and contains, JSON-able. Raises UserError for a broken file, and for one
    without a LoRA."""
    # New tokens alone
    path = user_path(path)
    tensors, header = raw_file.read_tensors(path)
    facts = {"file": path.name, "size_mib": round(path.stat().st_size / 2**20, 3)}
    if set(tensors) == set(new_tokens.KEYS.values()):
        tokens = new_tokens.read_tokens(path)
        kind = "new tokens of SDXL's text encoders"
        return facts | {"kind": kind, "word": tokens.word, "tokens": tokens.count}

    # An adapter: a checkpoint's, or one of any program
    facts["dtypes"] = sorted(
        {str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()}
    )
    if raw_file.RAW_KEY in tensors:
        return facts | describe_raw(path)
    try:
        raw_file.check_finite(
            {k: t for k, t in tensors.items() if t.is_floating_point()}, path.name
        )
        facts |= describe_pairs(path, tensors, header)
        if bundled := new_tokens.tokens_inside(path):
            facts["new_tokens"] = "; ".join(
                f"{one.count} for the word {one.word}, in this file" for one in bundled
            )
    # torch lacks the operation for this dtype, or an alpha is no number
    except RuntimeError as error:
        raise UserError(f"{path.name} is broken: {one_line(error)}") from error
    return facts | said_by_header(header)


def describe_raw(path: Path) -> dict[str, object]:
    """The content of a raw file. Raises UserError."""
    _, metadata = raw_file.read_raw(path)
    kind = "raw MoSLoRA weights (for resuming; export it to use it elsewhere)"
    settings = ("rank", "alpha", "use_rslora", "use_dora", "mixer")
    facts = {name: getattr(metadata, name) for name in settings}
    return {"kind": kind, **facts, **said_by_metadata(metadata)}


def describe_pairs(
    path: Path, tensors: dict[str, Tensor], header: dict[str, str]
) -> dict[str, object]:
    """The content of a plain LoRA file; for other kinds of adapters only the kind. Raises
    UserError."""
    name, settings = (
        path.name,
        lora_settings.beside(path, tensors) or lora_settings.in_header(header, path.name),
    )
    pairs = with_settings(name, find_pairs(name, tensors), settings)
    keys = [key for key in map(key_names.parse, tensors) if key]
    tools = dict.fromkeys(row.tool for row in ENDINGS if row.tool in {key.tool for key in keys})
    others = [tool for tool in tools if tool not in PAIRED]
    if not pairs and not others:
        raise UserError(
            f"{name} holds no known LoRA; its first tensor is {next(iter(tensors), 'absent')!r:.80}"
        )
    sizes = [tensor for key, tensor in tensors.items() if key.endswith(".dora_scale")]
    use_dora = bool(sizes) or any("lora_magnitude_vector" in key for key in tensors)
    by_columns = "DoRA by columns, which is not read here"
    others += ["DoRA" if all(map(key_names.is_by_rows, sizes)) else by_columns] * use_dora
    kinds = ", ".join(others + sorted({key.tool for key in keys if pairs and key.part == "down"}))
    kind = "published by dreambooth_moslora, " * (HEADER in header) + kinds
    return {"kind": kind, **(geometry(pairs) if pairs else {}), "use_dora": use_dora}


def find_pairs(name: str, tensors: dict[str, Tensor]) -> list[Pair]:
    """The pairs of down (r, in, …) and up (out, r, …) matrices. Raises UserError for one without
    its partner."""
    pairs = []
    for module, parts in key_names.grouped(tensors)[0].items():
        down, up, alpha = (parts.get(part) for part in ("down", "up", "alpha"))
        if "mixer" in parts or (down is None and up is None):
            continue
        if alpha is not None and alpha.numel() != 1:
            raise UserError(f"{name} is broken: {module.name:.100}.alpha is not one number")
        has_both = down is not None and up is not None and min(up.ndim, down.ndim) >= 2
        if not has_both or not up.shape[1] == down.shape[0] > 0:
            raise UserError(
                f"{name} is broken: {module.name:.100} has no down and up matrix of one rank"
            )
        number = None if alpha is None else float(alpha)
        pairs.append(Pair(module, len(down), number))
    return pairs


def with_settings(name: str, pairs: list[Pair], settings: dict[str, object]) -> list[Pair]:
    """The pairs with the alphas of PEFT's settings, where they have none. Raises UserError."""
    result = []
    is_of_one_model = "lora_alpha" in settings
    for pair in pairs:
        component, path = pair.module.component or DENOISERS[0], pair.module.path
        prefix = "" if is_of_one_model else f"{component}."
        own = {
            key.removeprefix(prefix): value
            for key, value in settings.items()
            if key.startswith(prefix)
        }
        if own and pair.alpha is None:
            told = lora_settings.scales_of_settings(component, [path], own, name)
            lora_settings.check_alphas(told.alphas, name)
            pair = replace(pair, alpha=float(told.alphas[path]), use_rslora=told.use_rslora)
        result.append(pair)
    return result


def geometry(pairs: list[Pair]) -> dict[str, object]:
    """Modules by component, ranks, alphas and scales."""
    with_alpha = [p for p in pairs if p.alpha is not None]
    alphas = {p.alpha for p in with_alpha}
    scales = {nominal_scale(p.alpha, p.rank, p.use_rslora) for p in with_alpha}
    modules = Counter(p.module.component or "other" for p in pairs)
    return {
        "modules": dict(modules),
        "ranks": by_rank(p.rank for p in pairs),
        "alpha": ", ".join(f"{a:g}" for a in sorted(alphas))
        or "not in the file (read as alpha = rank)",
        "scale": ", ".join(f"{s:g}" for s in sorted(scales)) or "1",
    }


def by_rank(ranks: Iterable[int]) -> dict[str, int]:
    return {str(rank): number for rank, number in sorted(Counter(ranks).items())}


def said_by_header(header: dict[str, str]) -> dict[str, object]:
    """What the header says about the adapter, in keys of this program, ModelSpec or kohya."""
    if metadata := metadata_in(header):
        return {"mixer": f"{metadata.mixer}, folded"} | said_by_metadata(metadata)
    if HEADER in header:
        return {"base": "unknown: the moslora header is broken"}
    try:  # kohya's tag counts: the most frequent serve as trigger words
        counts = Counter()
        for tags in json.loads(header.get("ss_tag_frequency", "{}")).values():
            counts.update({str(tag).strip(): int(count) for tag, count in tags.items()})
        tags = [tag for tag, _ in counts.most_common(5)]
    except (AttributeError, OverflowError, RecursionError, TypeError, ValueError):
        tags = []
    facts = {
        "title": header.get("modelspec.title") or header.get("ss_output_name"),
        "base": header.get("modelspec.architecture") or header.get("ss_base_model_version"),
        "trigger_words": header.get("modelspec.trigger_phrase") or ", ".join(tags),
        "network": header.get("ss_network_module"),
    }
    return {key: value for key, value in facts.items() if value}


def said_by_metadata(metadata: AdapterMetadata) -> dict[str, object]:
    said = {
        "base": metadata.base_id,
        "trigger_words": ", ".join(metadata.trigger_words),
        "class_word": metadata.class_word,
        "resolution_px": metadata.resolution_px,
        "new_tokens": "; ".join(
            "{count} for the word {word}, in {file}".format_map(note) for note in metadata.tokens
        ),
        "versions": ", ".join(f"{name} {number}" for name, number in metadata.versions.items()),
    }
    return {key: value for key, value in said.items() if value}


SPELLINGS = {
    "size_mib": "Size (MiB)",
    "use_dora": "DoRA",
    "use_rslora": "rsLoRA",
    "resolution_px": "Resolution (px)",
}


def label(key: str) -> str:
    """How `info` and the page call a fact of `describe`."""
    return SPELLINGS.get(key) or key.replace("_", " ").capitalize()


def lines(facts: dict[str, object]) -> list[str]:
    return [
        f"{label(key) + ':':<24} {printable(as_text(key, value))}" for key, value in facts.items()
    ]


def printable(text: str) -> str:
    """The text without control characters: a file's header may contain some that affect the
    terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def as_text(key: str, value: object) -> str:
    """A fact of `describe` in one line, for `info` and the page."""
    if key == "ranks":
        return ranks_in_words(value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def ranks_in_words(counts: dict[str, int]) -> str:
    """ "rank 16 in 146 layers", or of more than three ranks "ranks 1 to 12 in 146 layers"."""
    if len(counts) > 3:
        lowest, *_, highest = counts
        return f"ranks {lowest} to {highest} in {sum(counts.values())} layers"
    return ", ".join(
        f"rank {rank} in {number} layer{'s' * (number != 1)}" for rank, number in counts.items()
    )
