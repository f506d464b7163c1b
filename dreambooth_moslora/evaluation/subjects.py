"""Several subjects of one adapter: judged separately, against each other, together, and in pairs in one prompt.

evaluators_of(subjects) -> an Evaluator each, which knows the photos of its rivals (`metrics.confusion`)
pooled(evaluations)     -> one Evaluation over the prompts of all
TogetherEvaluator       -> pictures of "sks dog and a zwx cat", and how near they are to the photos of either
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
from PIL import Image

from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.prompts import MOST_PAIRS
from dreambooth_moslora.evaluation import metrics
from dreambooth_moslora.evaluation.encoders import Encoders
from dreambooth_moslora.evaluation.evaluate import Draw, Evaluator, truth_of
from dreambooth_moslora.evaluation.protocol import EvaluationPlan, spread
from dreambooth_moslora.evaluation.scores import Evaluation, Tables
from dreambooth_moslora.generation.fixed_seeds import SampleRequest
from dreambooth_moslora.photos.masks import open_mask
from dreambooth_moslora.photos.photo import Photo, open_rgb

__all__ = ["Together", "TogetherEvaluator", "evaluators_of", "in_all", "pairs_of", "photos_by_subject", "pooled"]

TOGETHER_TEMPLATES = 4
"""Places in which two subjects are drawn together."""


def photos_by_subject(photos: Sequence[Photo], count: int) -> list[list[Photo]]:
    return [[photo for photo in photos if photo.subject == number] for number in range(count)]


def evaluators_of(
    subjects: Sequence[TrainConfig],
    photos: Sequence[Photo],
    plans: Sequence[EvaluationPlan],
    encoders: Encoders,
    size_px: int,
) -> list[Evaluator]:
    """One for each subject; photos are numbered by subject."""
    found = []
    for subject, own, plan in zip(subjects, photos_by_subject(photos, len(subjects)), plans, strict=True):
        base, folder = subject.pretrained_model_name_or_path, subject.instance_data_dir
        truth = truth_of(base, folder, plan, encoders, size_px)
        found.append(Evaluator(plan, encoders, [open_rgb(p) for p in own], [open_mask(p) for p in own], truth))
    for one in found:
        others = (other for other in found if other is not one)
        one.rivals = {other.plan.subject.words: other.photos.dino for other in others}
    return found


def pooled(found: Sequence[Evaluation]) -> Evaluation:
    """One evaluation of all: the tables of all subjects over all their prompts, the mean score, the worst copy."""
    if len(found) == 1:
        return found[0]
    names = in_all(found, found[0].tables)
    tables = {name: np.concatenate([one.tables[name] for one in found]) for name in names}
    alarms = [one.alarm for one in found]
    share, worst = float(np.mean([alarm.share for alarm in alarms])), max(alarms, key=lambda alarm: alarm.largest)
    alarm = replace(worst, share=share, raised=any(alarm.raised for alarm in alarms))
    score = float(np.mean([one.score for one in found]))
    pictures = {name: [p for one in found for p in one.pictures.get(name, [])] for name in found[0].pictures}
    return Evaluation(found[0].plan, tables, alarm, score, sum(one.seconds for one in found), pictures)


def in_all(found: Sequence[Evaluation], names: Iterable[str]) -> list[str]:
    """The names that each evaluation has a table for."""
    return [name for name in names if all(name in one.tables for one in found)]


@dataclass
class Together:
    """Pictures of two subjects `words` in one prompt.

    `tables` (prompts, seeds): DINO to the photos of the `first` and the `second`, and the base's without the
    tokens.
    """

    words: tuple[str, str]
    prompts: list[str]
    tables: Tables
    pictures: list[Image.Image] = field(repr=False)
    base_pictures: list[Image.Image] = field(repr=False)


class TogetherEvaluator:
    """Judges two subjects in one prompt, in some of the first one's templates and with its seeds."""

    def __init__(self, first: Evaluator, second: Evaluator):
        self.pair = (first, second)
        self.plan = replace(first.plan, templates=spread(first.plan.templates, TOGETHER_TEMPLATES))

    @property
    def picture_count(self) -> int:
        """Pictures of the adapter; the base draws as many."""
        return len(self.plan.templates) * len(self.plan.seeds)

    def __call__(self, draw: Draw) -> Together:
        first, second = self.pair
        named = [one.plan.subject for one in self.pair]
        pictures = draw(self.requests([subject.words for subject in named]), True)
        base = draw(self.requests([subject.class_word or "subject" for subject in named]), False)
        vectors = {"": first.encoders.dino_images(pictures), "_base": first.encoders.dino_images(base)}
        shape = (len(self.plan.templates), len(self.plan.seeds))
        tables = {}
        for name, one in (("first", first), ("second", second)):
            for end, dino in vectors.items():
                tables[name + end] = metrics.subject_fidelity(dino, one.photos.dino).numpy().reshape(shape)
        words = (named[0].words, named[1].words)
        return Together(words, self.prompts(list(words)), tables, pictures, base)

    def prompts(self, words: list[str]) -> list[str]:
        return [template.replace("{}", " and a ".join(words)) for template in self.plan.templates]

    def requests(self, words: list[str]) -> list[SampleRequest]:
        return [SampleRequest(prompt, seed) for prompt in self.prompts(words) for seed in self.plan.seeds]


def pairs_of(evaluators: Sequence[Evaluator]) -> list[TogetherEvaluator]:
    return [TogetherEvaluator(*pair) for pair in list(combinations(evaluators, 2))[:MOST_PAIRS]]
