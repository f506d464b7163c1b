"""What it costs a subject to be trained with another: six sample subjects in three pairs, each
alone and with its companion.

    python -m benchmarks.several_subjects [--out runs/several_subjects]    # 40 minutes of one core

All train by `assets/configs/two_subjects.toml`, and each subject has as many steps in both arms.
The figures are those of `evaluate`, 8 prompts with 2 seeds: likeness and CLIP-T are relative to
true renders, drift to the base's spread between seeds. Differences are paired by subject, their
intervals are over the subjects. A run that `--out` holds is not made again.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.one_word import PROTOCOL, run_command
from dreambooth_moslora.evaluation.metrics import bootstrap_mean
from dreambooth_moslora.settings.config_files import load_settings
from dreambooth_moslora.settings.subjects import prompts_of
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training.loop import train
from toybox.make_subjects import FOLDER, load

__all__ = ["PAIRS", "main", "table"]

PAIRS = (("duck", "rocket"), ("bear", "robot"), ("train", "long_eared_rabbit"))
RECIPE = Path("assets/configs/two_subjects.toml")
STEPS_OF_EACH = 240
# A relative score -> its column
COLUMNS = {
    "dino_of_ceiling": "likeness, of the ceiling",
    "clip_t_of_ceiling": "CLIP-T, of true renders'",
    "drift_of_spread": "drift, of the base's spread",
}


def figures(subjects: Sequence[str], out: Path) -> dict[str, dict]:
    """Subject -> its contents of `scores.json`, of a run of these subjects."""
    run = out / "-".join(subjects)
    scores = run / "evaluation" / "scores.json"
    if not scores.is_file():
        train(config_of(subjects, run))
        run_command("evaluate", str(run), *PROTOCOL)
    found = json.loads(scores.read_text(encoding="utf-8"))
    return dict(zip(subjects, found.get("subjects", [found]), strict=True))


def config_of(subjects: Sequence[str], run: Path) -> TrainConfig:
    """The recipe for one subject, or for two."""
    words = []
    for subject in subjects:
        sample = load(subject)
        prompts = prompts_of(sample.token, sample.class_word)
        words.append({"instance_data_dir": str(FOLDER / subject)} | prompts)
    settings = load_settings(RECIPE)
    del settings["subjects"]
    settings |= {"subjects": words} if len(words) > 1 else words[0]
    settings |= {"output_dir": str(run), "max_train_steps": STEPS_OF_EACH * len(subjects)}
    return TrainConfig.from_dict(settings)


def table(alone: dict[str, dict], together: dict[str, dict]) -> str:
    """Means with intervals over the subjects, and the paired differences; as Markdown."""
    lines = [f"| | {' | '.join(COLUMNS.values())} |", f"|{'---|' * (1 + len(COLUMNS))}"]

    # A row for each arm
    values = {}
    for name, arm in {"alone": alone, "together": together}.items():
        for key in COLUMNS:
            of_each = [arm[subject]["relative"][key] for subject in alone]
            values[name, key] = np.array(of_each)
        cells = [str(bootstrap_mean(values[name, key])) for key in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")

    # Subject by subject
    changes = [bootstrap_mean(values["together", key] - values["alone", key]) for key in COLUMNS]
    lines.append(f"| difference | {' | '.join(f'{change:+}' for change in changes)} |")
    return "\n".join(lines)


def confusion(together: dict[str, dict]) -> str:
    """How far the companions are taken for each other, after training and by the base."""
    of_each = [found["scores"] for found in together.values()]
    own, base = (
        bootstrap_mean(np.array([scores[key]["mean"] for scores in of_each]))
        for key in ("confusion", "confusion_base")
    )
    return f"confusion with the companion: {own}, of the base {base}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/several_subjects"))
    args = parser.parse_args(argv)
    alone: dict[str, dict] = {}
    together: dict[str, dict] = {}
    for pair in PAIRS:
        together |= figures(pair, args.out)
        for subject in pair:
            alone |= figures([subject], args.out)
    print(table(alone, together))
    print(confusion(together))


if __name__ == "__main__":
    main()
