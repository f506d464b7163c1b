"""What other programs compute from DoRA in kohya's form: the file names no norm, and they take different ones.

    trained:   W' = dora_scale · (W + ΔW) / ‖W + ΔW‖       dora_scale (out, 1), the norm of each row of W + ΔW

The shapes (out, 1) and (1, in) both broadcast, so that a program that takes another norm raises no error.
"""

__all__ = ["DORA_NOTE", "DORA_READERS", "dora_table"]

DORA_READERS = {
    "this program, LyCORIS": "what was trained",
    "ComfyUI": "nearly that: it divides by the norms of W instead of W + ΔW",
    "AUTOMATIC1111, InvokeAI": "another adapter: they divide by the norms of columns",
    "diffusers, kohya's sd-scripts": "a plain LoRA: they drop the magnitudes",
    "others, such as Fooocus": "not known",
}
"""Programs -> what they compute."""

DORA_NOTE = (
    "--use_dora: the kohya file is not the same adapter in all programs ("
    + "; ".join(f"{programs}: {what}" for programs, what in DORA_READERS.items())
    + "); pytorch_lora_weights.safetensors is exact in diffusers"
)


def dora_table() -> str:
    """The same as a table in Markdown."""
    rows = "\n".join(f"| {programs} | {what} |" for programs, what in DORA_READERS.items())
    return f"| DoRA in the kohya file, read by | computes |\n|---|---|\n{rows}"
