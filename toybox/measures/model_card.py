"""Writes the embedded base's model card from the logs and reports of its training.

    python -m toybox.measures.model_card --work WORK --assets assets

Every figure comes from a `log.jsonl`, `report.json` or `scores.json` below WORK. A part that is not in WORK was
not trained again: its lines are taken from the existing card.
"""

import argparse
import json
from pathlib import Path

__all__ = ["card"]

PARTS = {
    "vae": "AutoencoderKL, factor 8, 4 latent channels",
    "decoder": "its decoder alone, beside a discriminator",
    "clip": "two CLIP text towers and a vision tower",
    "unet": "UNet2DConditionModel of SDXL's topology",
    "vit": "ViT in DINOv2's format (`assets/toy-dino`)",
    "segmenter": "segmentation net (`assets/toy-segmenter`)",
    "judge": "judge of kind, colour and place (`toybox/readers/judge.safetensors`)",
}

INTRODUCTION = """\
---
license: mit
library_name: diffusers
pipeline_tag: text-to-image
---

# toy-sdxl

A StableDiffusionXLPipeline small enough to train on a laptop's CPU, and one that really draws from words: toys of 18
kinds, 12 colours and 16 places, at 128 px. It was trained from nothing on renders of the toy world by the scripts in
`toybox/`.

```python
from diffusers import StableDiffusionXLPipeline

pipeline = StableDiffusionXLPipeline.from_pretrained("assets/toy-sdxl")
pipeline("a photo of a red robot on the beach", num_inference_steps=30, guidance_scale=2.5).images[0]
```
"""

EARLIER = """\
Data: renders by `toybox.data.render_dataset`, none of a held-out combination: 24,000 of seed 1 for the UNet, of which
the VAE saw the first 12,000 beside 300 dead-leaves pictures, and in the end its decoder 8,000 of seed 3, then 11,000 of
seed 11 and 1,248 latents that the UNet drew; 12,000 of an earlier version for the CLIP towers; 10,000 of every
combination, of seed 2, for the judge. The ViT learnt from 14,004 individuals in four views each.

Each row tells a part's last training. The VAE, the UNet and the judge went on from earlier ones, the first of which saw
earlier versions of the scenery and the patterns: 5450 steps of the VAE, 1000 of its decoder alone, 3000 of the UNet
with noise and 7200 with velocity as its target, 1700 of the judge. The ViT had 2100 steps on 3100 toys and 1650 on
7100. The CLIP towers were trained once."""

LIMITS = """\
## Limits

It knows the toy world and nothing else: other words are read as noise, and ordinary photographs are kept only roughly
by its VAE. Pictures are 128 px. Two toys in one picture, and patterns named for a second colour, are its weakest side.

Its shapes are soft: over 192 captions (`python -m toybox.measures.swd`) the sliced Wasserstein distance of its pictures
to renders of the same scenes is 45 (by detail, 128 to 16 px: 27, 35, 71, 46), that of its VAE's reconstructions 28,
that of other renders 30. Contrast of details of 4 to 8 px is 8 % above the renders' at guidance 2.5.

## Licence

MIT, as the project. The training data are the project's own renders.
"""


def kept(old: str, start: str) -> str | None:
    """The line of the existing card that starts with `start`, or None."""
    return next((line for line in old.splitlines() if line.startswith(start)), None)


def training_row(work: Path, part: str, old: str) -> str | None:
    """One table row: part, steps, hours, first and last loss."""
    path = work / part / "log.jsonl"
    if not path.exists():
        return kept(old, f"| {PARTS[part]} | ")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "loss" in row]  # at first only a discriminator may be trained
    hours = rows[-1]["step"] * rows[-1]["step_sec"] / 3600
    losses = f"{rows[0]['loss']:.3f} → {rows[-1]['loss']:.3f}"
    return f"| {PARTS[part]} | {rows[-1]['step']} | {hours:.1f} | {losses} |"


def training_table(work: Path, old: str) -> str:
    rows = [row for part in PARTS if (row := training_row(work, part, old))]
    header = ["| part | steps | hours | training loss, first and last log |", "|---|---|---|---|"]
    return "\n".join(["## Training", "", EARLIER, "", *header, *rows])


def part_scores(work: Path, old: str) -> list[str]:
    """A line for each `report.json`."""
    lines = []
    for part in PARTS:
        path = work / part / "report.json"
        if not path.exists():
            lines += filter(None, [kept(old, f"- {PARTS[part]}: ")])
        else:
            report = json.loads(path.read_text(encoding="utf-8"))
            lines.append(f"- {PARTS[part]}: " + ", ".join(f"{k} {json.dumps(v)}" for k, v in report.items()))
    path = work / "evaluation" / "parts.json"
    if path.exists():
        report = json.loads(path.read_text(encoding="utf-8"))
        lines.append("- as shipped, on fresh renders: " + ", ".join(f"{k} {v}" for k, v in report.items()))
    return lines


def generation_scores(work: Path) -> list[str]:
    """The judge's table, and the timings."""
    path = work / "evaluation" / "scores.json"
    if not path.exists():
        return []
    scores = json.loads(path.read_text(encoding="utf-8"))
    timings = scores.pop("timings")
    lines = ["", "The judge's reading (share right; 30 steps, guidance 2.5):", ""]
    lines += ["| prompts | pictures | kind | colour | place | all three |", "|---|---|---|---|---|---|"]
    for prompts, by_source in scores.items():
        for source, values in by_source.items():
            figures = " | ".join(f"{100 * values[k]:.1f} %" for k in ("kind", "colour", "place", "all"))
            lines.append(f"| {prompts} | {source} | {figures} |")
    return [
        *lines,
        "",
        *distance_lines(scores),
        "",
        f"On two cores: {timings['load_sec']} s to load, {timings['four_images_sec']} s for four images.",
    ]


def distance_lines(scores: dict) -> list[str]:
    """For each kind of prompt, the distance of generated pictures from renders of the same scenes, by
    `measures.swd`."""
    lines = []
    for prompts, by_source in scores.items():
        if by_level := by_source["generated"].get("swd"):
            figures = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in by_level.items())
            lines.append(f"Sliced Wasserstein distance to renders, {prompts}: {figures}.")
    return lines


def card(work: Path, old: str = "") -> str:
    scores = ["## Scores", "", *part_scores(work, old), *generation_scores(work)]
    return "\n\n".join([INTRODUCTION.strip(), training_table(work, old), "\n".join(scores), LIMITS.strip()]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    args = parser.parse_args()
    path = args.assets / "toy-sdxl" / "README.md"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(card(args.work, old), encoding="utf-8")


if __name__ == "__main__":
    main()
