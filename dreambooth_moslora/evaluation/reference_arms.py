"""Should one train at all? Some bases draw a subject from its photos, without any training: their
pipelines take reference pictures beside the prompt.

The same prompts and seeds are drawn in three ways:

    adapter      by the adapter, as in every evaluation
    references   by the base, with photos as references
    both         by the adapter, with photos as references

The verdict comes from differences that are paired by prompt and seed. It says no more than "not
known" while an interval holds 0.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from dreambooth_moslora.evaluation import metrics
from dreambooth_moslora.evaluation.protocol import spread
from dreambooth_moslora.evaluation.scoring import Evaluation, Evaluator
from dreambooth_moslora.settings.prompts import Subject

# Photos that are shown at once: each makes every step slower
MOST_REFERENCES = 4
# What is added to a prompt of the base, which does not know the token
SAME = ", the same {} as in the reference pictures"

TRAIN = "train: the adapter is more like your photos than references are"
DO_NOT_TRAIN = "do not train: references are more like your photos than the adapter is"
UNKNOWN = "not known from so few pictures"
MIXED = "not known: one is more like your photos, the other follows the prompts better"


@dataclass(frozen=True)
class Verdict:
    """Whether to train, and the adapter's means less those of the references."""

    words: str
    likeness: metrics.Interval
    prompt: metrics.Interval

    def __str__(self) -> str:
        differences = f"DINO {self.likeness:+}, CLIP-T {self.prompt:+}"
        return f"{self.words} (adapter less references: {differences})"


@dataclass(frozen=True)
class Comparison:
    """The three ways by their names, as evaluations of the same prompts and seeds."""

    arms: dict[str, Evaluation]
    verdict: Verdict


def compare(
    evaluator: Evaluator, by_adapter: Evaluation, judge: Callable[..., Evaluation], scale: float
) -> Comparison:
    """Draw by references, without the adapter and with it.

    evaluator: of the subject, with the photos
    by_adapter: its evaluation of the adapter
    judge: `evaluate_adapter` of the pipeline and the adapter
    scale: of the adapter
    """
    references = references_of(evaluator)
    by_references = draw_by_references(evaluator, judge)
    by_both = judge(evaluator.of_subject(), scale=scale, references=references)
    return Comparison(
        arms={"adapter": by_adapter, "references": by_references, "both": by_both},
        verdict=verdict(by_adapter.tables, by_references.tables),
    )


def draw_by_references(evaluator: Evaluator, judge: Callable[..., Evaluation]) -> Evaluation:
    """The subject's pictures by the base that is shown photos, without an adapter."""
    return judge(without_token(evaluator), scale=0.0, references=references_of(evaluator))


def references_of(evaluator: Evaluator) -> Sequence[Image.Image]:
    """The photos that are shown."""
    return spread(evaluator.photos.pictures, MOST_REFERENCES)


def without_token(evaluator: Evaluator) -> Evaluator:
    """The evaluator with prompts that ask for the subject of the reference pictures. CLIP-T and the
    base's pictures have the prompts as they were."""
    found = evaluator.of_subject()
    word = evaluator.plan.class_word
    found.plan = replace(
        found.plan,
        subject=Subject(token="", class_word=word),
        ending=SAME.format(word),
    )
    return found


def verdict(adapter: Mapping[str, np.ndarray], references: Mapping[str, np.ndarray]) -> Verdict:
    """Whether the adapter is worth its training, by tables of DINO and CLIP-T of equal prompts and
    seeds."""

    def difference(name: str) -> metrics.Interval:
        return metrics.bootstrap_mean(adapter[name] - references[name])

    likeness = difference("dino")
    prompt = difference("clip_t")
    better, follows = sign(likeness), sign(prompt)
    if better * follows < 0:
        words = MIXED
    elif better:
        words = TRAIN if better > 0 else DO_NOT_TRAIN
    else:
        words = UNKNOWN
    return Verdict(words=words, likeness=likeness, prompt=prompt)


def sign(difference: metrics.Interval) -> int:
    """1 or -1 if all of the interval is above or below 0, else 0."""
    if difference.low is None:
        return 0
    return (difference.low > 0) - (difference.high < 0)


def rows(found: Comparison) -> Sequence[tuple]:
    """Way, DINO, CLIP-T, share of copies and score of each, for a report."""
    rows = []
    for name, one in found.arms.items():
        score = "none" if one.score is None else one.score
        rows.append((name, one.interval("dino"), one.interval("clip_t"), one.alarm.share, score))
    return rows


def as_json(found: Comparison) -> dict:
    """For scores.json."""
    return {
        "verdict": str(found.verdict),
        "dino": found.verdict.likeness.to_dict(),
        "clip_t": found.verdict.prompt.to_dict(),
        "arms": {name: one.means() for name, one in found.arms.items()},
    }
