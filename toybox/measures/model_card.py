"""Writes the embedded base's model card from the logs and reports of its training.

    python -m toybox.measures.model_card --work WORK --assets assets

Every figure comes from a `log.jsonl`, `report.json` or `scores.json` below WORK. A part that is not
in WORK was not trained again: its lines are taken from the existing card.
"""

import argparse
import json
from pathlib import Path

__all__ = ["render_card"]

PARTS = {
    "vae": "AutoencoderKL, factor 8, 4 latent channels",
    "decoder": "its decoder alone, beside discriminators",
    "clip": "two CLIP text towers and a vision tower",
    "unet": "UNet2DConditionModel of SDXL's topology",
    "vit": "ViT in DINOv2's format (`assets/toy-dino`)",
    "segmenter": "segmentation net (`assets/toy-segmenter`)",
    "judge": "judge of kind, colours, ornaments and place (`toybox/readers/judge.safetensors`)",
}

INTRODUCTION = """\
---
license: mit
library_name: diffusers
pipeline_tag: text-to-image
---

# toy-sdxl

A StableDiffusionXLPipeline small enough to train on a laptop's CPU, and one that really draws
from words: toys of 18 kinds, 12 colours and 16 places, at 128 px. It was trained from nothing on
renders of the toy world by the scripts in `toybox/`.

```python
from diffusers import StableDiffusionXLPipeline

pipeline = StableDiffusionXLPipeline.from_pretrained("assets/toy-sdxl")
prompt = "a photo of a red robot on the beach"
pipeline(prompt, num_inference_steps=30, guidance_scale=2.5).images[0]
```
"""

EARLIER_DATA = """\
Data: renders by `toybox.data.render_dataset`, none of a held-out combination: 24,000 of seed 1
for the UNet, then 16,000 of seed 1001 from a nearer camera, and in the end 20,000 narrow ones of
seeds 9101 and 9102 and 7,500 wide ones of seeds 9001 and 9003. Of the first the VAE saw 12,000
beside 300 dead-leaves pictures, then its decoder 8,000 of seed 3, 11,000 of seed 11 and 4,000 of
seed 101 with 1,632 latents that the UNet drew, then the whole VAE 10,000 narrow ones of seed 9101
and 1,500 wide ones of seed 9001, and in the end its decoder 4,000 of seed 9201 with 1,056 latents
that this UNet drew; 12,000 of an earlier version for the CLIP towers; 12,000 of every combination,
of seed 2, for the judge. The ViT learnt from 14,004 individuals in four views each.

Each row tells a part's last training. The VAE, the UNet and the judge went on from earlier ones,
the first of which saw earlier versions of the scenery and the patterns: 10,450 steps of the VAE and
1,683 under noise, before which its decoder alone had 5,300; 3000 of the UNet with noise and
11,900 with velocity as its target, 2900 of the judge without heads for the second colour and
ornaments and 896 with them. The ViT had 2100 steps on 3100 toys and 1650 on 7100. The CLIP towers
were trained once.

In their last training the VAE's latents had noise of up to 0.35 of their deviation, so that a
small error of the denoiser costs little. `toy-zimage` and then the UNet learnt the new latents.
In the first two thirds of the UNet's last training, half of its targets were what `toy-zimage`
predicts. These have no noise, so the loss was lower there than at the end, where all targets
have."""

LIMITS = """\
## Limits

It knows the toy world and nothing else: other words are read as noise, and ordinary photographs
are kept only roughly by its VAE. Pictures are 128 px. Two toys in one picture, patterns named
for a second colour, and above all ornaments are its weakest side.

Its shapes are soft: a robot's arms or a teapot's handle may melt into its body, and patterns
smear. Two graders gave twenty of its pictures 2.5 of 5, as much as before its decoder was finished,
and true renders 4.9 (`python -m toybox.measures.grades`, `assets/studies/grades`). The distances
above hardly show that. At which noise it loses quality, `toybox.measures.ladder` tells
(`docs/embedded-base.md`).

## Licence

MIT, as the project. The training data are the project's own renders.
"""

READING_TITLE = "The judge's reading (share right in %, with its 95 % interval"
EXPLANATION = """\
A question is asked of the pictures whose prompt tells the answer. Ornaments are read right when
all that are worn are read, and no others."""
EARLIER_JUDGE = (
    "An earlier judge, which read kind, main colour and place only (share right; "
    "30 steps, guidance 2.5):"
)
EARLIER_QUESTIONS = ("kind", "colour", "place", "all three")
DISTANCE_TITLE = "Sliced Wasserstein distance to renders, "
TIMINGS_TITLE = "On two cores: "
SHIPPED_TITLE = "- as shipped, on fresh renders: "
QUESTIONS = {
    "kind": "kind",
    "colour": "main colour",
    "colour2": "second colour",
    "ornaments": "ornaments",
    "ornaments_worn": "ornaments of toys that wear some",
    "place": "place",
    "all": "kind, main colour and place",
}


def find_old_line(old: str, start: str) -> str | None:
    """Find the line of the existing card that starts with `start`, or None."""
    return next((line for line in old.splitlines() if line.startswith(start)), None)


def format_training_row(work: Path, part: str, old: str) -> str | None:
    """Format one table row: part, steps, hours, first and last loss."""
    path = work / part / "log.jsonl"
    if not path.exists():
        return find_old_line(old, f"| {PARTS[part]} | ")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "loss" in row]  # at first only a discriminator may be trained
    hours = rows[-1]["step"] * rows[-1]["step_sec"] / 3600
    losses = f"{rows[0]['loss']:.3f} → {rows[-1]['loss']:.3f}"
    return f"| {PARTS[part]} | {rows[-1]['step']} | {hours:.1f} | {losses} |"


def format_training_table(work: Path, old: str) -> str:
    rows = [row for part in PARTS if (row := format_training_row(work, part, old))]
    header = ["| part | steps | hours | training loss, first and last log |", "|---|---|---|---|"]
    return "\n".join(["## Training", "", EARLIER_DATA, "", *header, *rows])


def format_part_scores(work: Path, old: str) -> list[str]:
    """Format a line for each `report.json`."""
    lines = []
    for part in PARTS:
        path = work / part / "report.json"
        if not path.exists():
            lines += filter(None, [find_old_line(old, f"- {PARTS[part]}: ")])
        else:
            report = json.loads(path.read_text(encoding="utf-8"))
            lines.append(
                f"- {PARTS[part]}: " + ", ".join(f"{k} {json.dumps(v)}" for k, v in report.items())
            )
    path = work / "evaluation" / "parts.json"
    if not path.exists():
        return lines + list(filter(None, [find_old_line(old, SHIPPED_TITLE)]))
    report = json.loads(path.read_text(encoding="utf-8"))
    return [*lines, SHIPPED_TITLE + ", ".join(f"{k} {v}" for k, v in report.items())]


def format_generation_scores(work: Path, old: str) -> list[str]:
    """Format the judge's tables, the distances and the timings; figures that were not measured
    again are taken from the old card."""
    path = work / "evaluation" / "scores.json"
    scores = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    timings, guidance = scores.pop("timings", None), scores.pop("guidance", None)
    clock, title = find_old_line(old, TIMINGS_TITLE), find_old_line(old, READING_TITLE)
    if timings:
        clock = (
            f"{TIMINGS_TITLE}{timings['load_sec']} s to load, "
            f"{timings['four_images_sec']} s for four images."
        )
    if scores:
        title = f"{READING_TITLE}; 30 steps, guidance {guidance}):"
    rows = [
        f"| {prompts} | {source} | {' | '.join(format_cell(values, name) for name in QUESTIONS)} |"
        for prompts, by_source in scores.items()
        for source, values in by_source.items()
    ]
    rows = format_table(
        tuple(QUESTIONS.values()), rows + list_old_rows(old, scores, len(QUESTIONS))
    )
    earlier = format_table(EARLIER_QUESTIONS, list_old_rows(old, scores, len(EARLIER_QUESTIONS)))
    return [
        *(["", title, "", *rows, "", EXPLANATION] if rows else []),
        *(["", EARLIER_JUDGE, "", *earlier] if earlier else []),
        "",
        *format_distances(scores, old),
        *(["", clock] if clock else []),
    ]


def format_table(questions: tuple[str, ...], rows: list[str]) -> list[str]:
    """Format the rows under their header; nothing if there are none."""
    header = [
        f"| prompts | pictures | {' | '.join(questions)} |",
        f"|{'---|' * (2 + len(questions))}",
    ]
    return [*header, *rows] if rows else []


def list_old_rows(old: str, scores: dict, questions: int) -> list[str]:
    """Rows of the old card's table of so many questions, of prompts that were not measured
    again."""
    rows = [
        (line, line.strip("| ").split(" | ")) for line in old.splitlines() if line.startswith("| ")
    ]
    return [
        line
        for line, cells in rows
        if len(cells) == 2 + questions
        and cells[1] in ("generated", "renders")
        and cells[0] not in scores
    ]


def format_cell(values: dict, name: str) -> str:
    """Format a share with its interval and the number of pictures, or a dash."""
    if name not in values:
        return "–"
    low, high, count = values["intervals"][name]
    return f"{100 * values[name]:.1f} [{100 * low:.1f}, {100 * high:.1f}] of {count}"


def format_distances(scores: dict, old: str) -> list[str]:
    """For each kind of prompt, the distance of generated pictures from renders of the same scenes,
    by `measures.swd`."""
    lines = []
    for prompts, by_source in scores.items():
        if by_level := by_source["generated"].get("swd"):
            figures = ", ".join(
                f"{name.replace('_', ' ')} {value}" for name, value in by_level.items()
            )
            lines.append(f"{DISTANCE_TITLE}{prompts}: {figures}.")
    before = [line for line in old.splitlines() if line.startswith(DISTANCE_TITLE)]
    return lines + [
        line for line in before if line[len(DISTANCE_TITLE) :].split(":")[0] not in scores
    ]


def render_card(work: Path, old: str = "") -> str:
    scores = ["## Scores", "", *format_part_scores(work, old), *format_generation_scores(work, old)]
    return (
        "\n\n".join(
            [
                INTRODUCTION.strip(),
                format_training_table(work, old),
                "\n".join(scores),
                LIMITS.strip(),
            ]
        )
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    args = parser.parse_args()
    path = args.assets / "toy-sdxl" / "README.md"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(render_card(args.work, old), encoding="utf-8")


if __name__ == "__main__":
    main()
