"""The one-word command on sample subjects: `train assets/subjects/bear bear` without tuned flags,
and its results.

python -m benchmarks.one_word [--subjects bear rocket] [--out runs/one_word] [--json one_word.json]

Each subject is trained by the command as a user types it, in its own process, and scored by
`evaluate` like `assets/studies/recipe.toml`: 8 prompts, 2 seeds. Likeness and CLIP-T are relative
to true renders, sharpness to true renders through the autoencoder, drift to the base's spread
between seeds; then the share of pictures in which the judge reads the subject's second colour and
ornaments. The interval is over the subjects. A subject already in `--out` is not run again; its
figures are those of its `evaluation/scores.json`.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dreambooth_moslora.evaluation.metrics import bootstrap_mean

__all__ = ["main", "table"]

SUBJECTS = ("bear", "rocket", "long_eared_rabbit", "train", "tall_cactus", "big_headed_dinosaur")
"""The subjects of the recipe's study."""
PHOTOS = Path("assets/subjects")
PROTOCOL = [
    "--num_prompts",
    "8",
    "--images_per_prompt",
    "2",
    "--class_images",
    "12",
    "--inference_steps",
    "20",
]
COLUMNS = {
    "likeness": "likeness, of the ceiling",
    "drift": "drift, of the base's spread",
    "clip_t": "CLIP-T, of true renders'",
    "sharpness": "sharpness, of the ceiling",
    "colour2": "second colour right",
    "ornaments": "ornaments right",
    "seconds": "training, s",
}
RECIPE = 0.947
"""Likeness of the recipe on these subjects (docs/studies.md)."""


def run_command(*arguments: str, flags: Sequence[str] = ()) -> None:
    """`python -m dreambooth_moslora …`; raises CalledProcessError when it fails."""
    subprocess.run([sys.executable, "-m", "dreambooth_moslora", *arguments, *flags], check=True)


def measured(subject: str, out: Path, flags: Sequence[str]) -> dict[str, float]:
    """The figures of one subject, by the names of COLUMNS."""
    run, facts = (
        out / subject,
        json.loads((PHOTOS / subject / "subject.json").read_text(encoding="utf-8")),
    )
    kept = out / f"{subject}.json"
    if not kept.is_file():
        started = time.perf_counter()
        folder = ["--output_dir", str(run)]
        run_command("train", str(PHOTOS / subject), facts["class_word"], *folder, flags=flags)
        seconds = time.perf_counter() - started
        run_command("evaluate", str(run), *PROTOCOL)
        kept.write_text(json.dumps({"seconds": round(seconds)}), encoding="utf-8")
    scores = json.loads((run / "evaluation" / "scores.json").read_text(encoding="utf-8"))
    return figures(scores) | {"seconds": json.loads(kept.read_text(encoding="utf-8"))["seconds"]}


def figures(scores: dict) -> dict[str, float]:
    """From the contents of `scores.json`."""
    relative, shares = scores["relative"], scores["scores"]
    return {
        "likeness": relative["dino_of_ceiling"],
        "drift": relative["drift_of_spread"],
        "clip_t": relative["clip_t_of_ceiling"],
        "sharpness": relative["sharpness_of_ceiling"],
        "colour2": shares["judge_colour2"]["mean"],
        "ornaments": shares["judge_ornaments"]["mean"],
    }


def table(found: dict[str, dict[str, float]]) -> str:
    """A row per subject, and for several the mean with its 95 % interval over them; as Markdown."""
    *shares, _ = COLUMNS
    lines = [f"| subject | {' | '.join(COLUMNS.values())} |", f"|{'---|' * (1 + len(COLUMNS))}"]
    for subject, row in found.items():
        lines.append(
            f"| {subject} | {' | '.join(f'{row[name]:.3f}' for name in shares)} | "
            f"{row['seconds']:.0f} |"
        )
    if len(found) > 1:
        means = [bootstrap_mean(np.array([row[name] for row in found.values()])) for name in shares]
        cells = [str(mean) for mean in means]
        seconds = np.mean([row["seconds"] for row in found.values()])
        lines.append(f"| mean | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=SUBJECTS)
    parser.add_argument("--out", type=Path, default=Path("runs/one_word"))
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument(
        "--flags", nargs=argparse.REMAINDER, default=[], help="flags for `train`, at the end"
    )
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    found = {subject: measured(subject, args.out, args.flags) for subject in args.subjects}
    print(table(found))
    print(f"the recipe on all six: likeness {RECIPE}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
