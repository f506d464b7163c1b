"""Comparison of the adapter with the base that is shown reference images: is training worth it?

Some bases generate a subject from its photos, without any training: their pipelines have reference
images beside the prompt. The same prompts and seeds are generated in three ways:

    adapter      by the adapter, as in every evaluation
    references   by the base, with photos as references
    both         by the adapter, with photos as references

The verdict comes from differences that are paired by prompt and seed. It is "not known" while an
interval holds 0.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from dreambooth_moslora.evaluation import metrics
from dreambooth_moslora.evaluation.protocol import pick_evenly
from dreambooth_moslora.evaluation.scoring import Evaluation, Evaluator
from dreambooth_moslora.settings.prompts import SubjectWords

MAX_REFERENCES = 4
"""Photos that are shown at once: each makes every step slower."""
SAME_SUBJECT_SUFFIX = ", the same {} as in the reference pictures"
"""End of a prompt for the base, which does not know the token."""

VERDICT_TRAIN = "train: the adapter is more like your photos than references are"
VERDICT_DO_NOT_TRAIN = "do not train: references are more like your photos than the adapter is"
VERDICT_UNKNOWN = "not known from so few pictures"
VERDICT_MIXED = "not known: one is more like your photos, the other follows the prompts better"


@dataclass(frozen=True)
class TrainingVerdict:
    """Advice to train or not, and the adapter's means minus those of the references."""

    conclusion: str
    likeness: metrics.Interval
    prompt: metrics.Interval

    def __str__(self) -> str:
        differences = f"DINO {self.likeness:+}, CLIP-T {self.prompt:+}"
        return f"{self.conclusion} (adapter less references: {differences})"


@dataclass(frozen=True)
class ReferenceComparison:
    """Evaluations of the same prompts and seeds, by arm, and the verdict."""

    arms: dict[str, Evaluation]
    verdict: TrainingVerdict


def evaluate_arms(
    evaluator: Evaluator,
    adapter_evaluation: Evaluation,
    evaluate: Callable[..., Evaluation],
    scale: float,
) -> ReferenceComparison:
    """Evaluate the references without the adapter and with it.

    evaluator: of the subject, with the photos
    adapter_evaluation: its evaluation of the adapter
    evaluate: `evaluate_adapter` of the pipeline and the adapter
    scale: of the adapter
    """
    references = pick_references(evaluator)
    by_references = evaluate_references(evaluator, evaluate)
    by_both = evaluate(evaluator.copy_subject_only(), scale=scale, references=references)
    return ReferenceComparison(
        arms={"adapter": adapter_evaluation, "references": by_references, "both": by_both},
        verdict=compare_tables(adapter_evaluation.tables, by_references.tables),
    )


def evaluate_references(evaluator: Evaluator, evaluate: Callable[..., Evaluation]) -> Evaluation:
    """Evaluate the base that is shown photos, without an adapter."""
    return evaluate(
        build_reference_evaluator(evaluator), scale=0.0, references=pick_references(evaluator)
    )


def pick_references(evaluator: Evaluator) -> Sequence[Image.Image]:
    """Return the photos that are shown."""
    return pick_evenly(evaluator.photos.pictures, MAX_REFERENCES)


def build_reference_evaluator(evaluator: Evaluator) -> Evaluator:
    """Return the evaluator with prompts that ask for the subject of the reference images.

    CLIP-T's texts and the base's prompts stay as they are.
    """
    reference_evaluator = evaluator.copy_subject_only()
    class_word = evaluator.plan.class_word
    reference_evaluator.plan = replace(
        reference_evaluator.plan,
        subject=SubjectWords(token="", class_word=class_word),
        ending=SAME_SUBJECT_SUFFIX.format(class_word),
    )
    return reference_evaluator


def compare_tables(
    adapter: Mapping[str, np.ndarray], references: Mapping[str, np.ndarray]
) -> TrainingVerdict:
    """Return the verdict from the tables of DINO and CLIP-T, at equal prompts and seeds."""
    likeness, prompt = (
        metrics.bootstrap_mean(adapter[name] - references[name]) for name in ("dino", "clip_t")
    )
    likeness_sign, prompt_sign = get_sign(likeness), get_sign(prompt)
    if likeness_sign * prompt_sign < 0:
        conclusion = VERDICT_MIXED
    elif likeness_sign:
        conclusion = VERDICT_TRAIN if likeness_sign > 0 else VERDICT_DO_NOT_TRAIN
    else:
        conclusion = VERDICT_UNKNOWN
    return TrainingVerdict(conclusion=conclusion, likeness=likeness, prompt=prompt)


def get_sign(interval: metrics.Interval) -> int:
    """Return 1 or -1 if the whole interval is above or below 0, else 0."""
    if interval.low is None:
        return 0
    return (interval.low > 0) - (interval.high < 0)


def build_rows(comparison: ReferenceComparison) -> Sequence[tuple]:
    """Return arm, DINO, CLIP-T, share of copies and score of each, for a report."""
    return [
        (
            name,
            arm.interval("dino"),
            arm.interval("clip_t"),
            arm.alarm.share,
            "none" if arm.score is None else arm.score,
        )
        for name, arm in comparison.arms.items()
    ]


def to_dict(comparison: ReferenceComparison) -> dict:
    """Return the comparison for scores.json."""
    return {
        "verdict": str(comparison.verdict),
        "dino": comparison.verdict.likeness.to_dict(),
        "clip_t": comparison.verdict.prompt.to_dict(),
        "arms": {name: arm.summarize_scores() for name, arm in comparison.arms.items()},
    }
