"""Writes `docs/formats.md`, which LoRA files are read and written, from the tables of their keys.

    python -m tools.formats_table

A test fails while the page differs from the tables, and reads a file for each cell.
"""

from pathlib import Path

from dreambooth_moslora.lora import key_names
from dreambooth_moslora.lora.key_names import DIFFUSERS, KOHYA, PREFIXES
from dreambooth_moslora.settings.family_facts import FAMILIES, FamilyFacts

__all__ = ["KINDS", "TOOLS", "is_read", "is_written", "main", "render_page"]

OUT_PATH = Path(__file__).resolve().parents[1] / "docs" / "formats.md"
PAGE_HEAD = """# Files of other tools

`python -m tools.formats_table` writes this page from the tables of keys in
`dreambooth_moslora/lora/key_names.py`. A test reads a file for each cell, and compares each layer's
ΔW with what the tool means by it.

What is read can be drawn with, described, exported, and begun with (`--init_adapter`). Layers may
have diffusers' names or those of the family's original files. The kohya column is musubi-tuner's
too, and ComfyUI's is ai-toolkit's. DoRA is read by its rows. “all” is LoRA, LoKr, LoHa and DoRA,
read; what is written too is **bold**.
Of transformers no file in kohya's names is written: ComfyUI reads diffusers' names too.
PEFT's own LoKr and LoHa, beside which their `adapter_config.json` lies, are refused.
"""
TOOLS = tuple(dict.fromkeys(row.tool for row in PREFIXES))
PARTS = {
    "LoRA": {"down", "up"},
    "LoKr": {row.part for row in key_names.ENDINGS if row.tool == key_names.LOKR},
    "LoHa": {row.part for row in key_names.ENDINGS if row.tool == key_names.LOHA},
    "DoRA": {"down", "up", "dora_scale", "magnitude"},
}
KINDS = tuple(PARTS)
WRITTEN_KINDS = ("LoRA", "DoRA")


def main() -> None:
    OUT_PATH.write_text(render_page(), encoding="utf-8")
    print(f"written: {OUT_PATH}")


def render_page() -> str:
    rows = [" | ".join(["family", *TOOLS]), " | ".join(["---"] * (1 + len(TOOLS)))]
    for facts in FAMILIES:
        rows.append(" | ".join([facts.title, *(format_cell(tool, facts) for tool in TOOLS)]))
    return "\n".join([PAGE_HEAD, *rows, ""])


def format_cell(tool: str, facts: FamilyFacts) -> str:
    """Format the kinds that are read, those that are written too in bold; "all" for four that are
    read."""
    names = []
    for kind in KINDS:
        if is_read(tool, facts, kind):
            names.append(f"**{kind}**" if is_written(tool, facts, kind) else kind)
    return "all" if names == list(KINDS) else ", ".join(names) or "–"


def is_read(tool: str, facts: FamilyFacts, kind: str) -> bool:
    """Return whether the tool has a prefix of the family's denoiser, and the kind's endings are
    supported."""
    known_parts = {row.part for row in key_names.ENDINGS}
    names = any(row.tool == tool and facts.denoiser in row.components for row in PREFIXES)
    return names and known_parts >= PARTS[kind]


def is_written(tool: str, facts: FamilyFacts, kind: str) -> bool:
    """Every run writes diffusers' keys, and one of a UNet kohya's too."""
    is_kohya = tool == KOHYA and facts.denoiser in key_names.WRITTEN_PREFIXES
    return kind in WRITTEN_KINDS and (tool == DIFFUSERS or is_kohya)


if __name__ == "__main__":
    main()
