"""Several subjects of one adapter: judged separately, against each other, together, and in pairs in one prompt.

evaluators_of(subjects) -> an Evaluator each, which knows the photos of its rivals (`metrics.confusion`)
pooled(evaluations)     -> one Evaluation over the prompts of all
TogetherEvaluator       -> pictures of "sks dog and a zwx cat", and how near they are to the photos of either

The files:

scores.json, report.html    all subjects: likeness and confusion as matrices, pictures by subject, pairs
subject_1/, subject_2/ …    the report of each alone, as for an adapter with one subject
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from dreambooth_moslora.core.atomic_files import atomic_write
from dreambooth_moslora.core.pictures import render
from dreambooth_moslora.evaluation import metrics
from dreambooth_moslora.evaluation.encoders import Encoders
from dreambooth_moslora.evaluation.evaluate import Draw, Evaluation, Evaluator, Tables, truth_of
from dreambooth_moslora.evaluation.metrics import Interval, bootstrap_mean, photo_fidelity
from dreambooth_moslora.evaluation.protocol import EvaluationPlan, spread
from dreambooth_moslora.evaluation.report import ReportContext, scores_json, write_report
from dreambooth_moslora.generation.fixed_seeds import SampleRequest
from dreambooth_moslora.photos.masks import open_mask
from dreambooth_moslora.photos.photo import Photo, open_rgb
from dreambooth_moslora.settings.measures import MEASURES
from dreambooth_moslora.settings.prompts import MOST_PAIRS
from dreambooth_moslora.settings.table import TrainConfig

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

    @property
    def rows(self) -> list[tuple[str, Interval, float]]:
        """For the report: likeness to the photos of each, of the adapter's pictures and of the base's."""
        return [
            (f"DINO to “{words}”", bootstrap_mean(self.tables[name]), float(self.tables[f"{name}_base"].mean()))
            for name, words in zip(("first", "second"), self.words)
        ]


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


SHOWN = 8
"""Pictures of each subject in the common report; its own report has them all."""


def write_reports(
    folder: Path,
    evaluators: Sequence[Evaluator],
    found: Sequence[Evaluation],
    together: Sequence[Together],
    about: ReportContext,
) -> None:
    """Write `folder`/scores.json and report.html; of several subjects those for all, and each one's in a folder of
    its own."""
    fidelities = [photo_fidelity(one.photos.dino) for one in evaluators]
    if len(found) == 1:
        write_report(folder, found[0], about, evaluators[0].photos.pictures, fidelities[0])
        return
    for number, (evaluator, one, fidelity) in enumerate(zip(evaluators, found, fidelities), start=1):
        write_report(folder / f"subject_{number}", one, about, evaluator.photos.pictures, fidelity)
    scores = subjects_json(found, together, about, fidelities)
    atomic_write(folder / "scores.json", json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
    atomic_write(folder / "report.html", subjects_html(evaluators, found, together, about))


def subjects_json(
    found: Sequence[Evaluation], together: Sequence[Together], about: ReportContext, fidelities: Sequence[float]
) -> dict:
    """`scores_json` over all subjects, with that of each in `subjects`, and `confusion` and `together`."""
    whole = scores_json(pooled(found), about, float("nan"))
    whole = {name: value for name, value in whole.items() if name not in ("subject", "per_prompt")}
    return {
        **whole,
        "subjects": [scores_json(one, about, fidelity) for one, fidelity in zip(found, fidelities)],
        "confusion": [entry(one, words) for one in found for words in rivals_of(one, found)],
        "together": [
            {"words": list(pair.words), **{n: bootstrap_mean(t).to_dict() for n, t in pair.tables.items()}}
            for pair in together
        ],
    }


def entry(found: Evaluation, words: str) -> dict:
    """One cell of both matrices: pictures `of` a subject, compared with the photos of the subject `with`."""
    names = {
        "confusion": f"confusion_with {words}",
        "confusion_base": f"confusion_with {words}_base",
        "dino_own": "dino",
        "dino_other": f"dino_to {words}",
    }
    intervals = {key: found.interval(name).to_dict() for key, name in names.items()}
    return {"of": words_of(found), "with": words, **intervals}


def words_of(found: Evaluation) -> str:
    return found.plan.subject.words


def rivals_of(one: Evaluation, found: Sequence[Evaluation]) -> list[str]:
    return [words_of(other) for other in found if other is not one]


def confusion_lines(found: Sequence[Evaluation]) -> list[str]:
    """For the terminal: each subject against each other one."""
    lines = []
    for one in found:
        for words in rivals_of(one, found):
            own, other = one.mean("dino"), one.mean(f"dino_to {words}")
            likeness = f"DINO {own:.3f} to its own photos, {other:.3f} to the other's"
            said = one.interval(f"confusion_with {words}")
            lines.append(f"confusion of “{words_of(one)}” with “{words}”: {said}  ({likeness})")
    return lines


def subjects_html(
    evaluators: Sequence[Evaluator], found: Sequence[Evaluation], together: Sequence[Together], about: ReportContext
) -> str:
    def confusion(one: Evaluation, other: Evaluation) -> str:
        name = f"confusion_with {words_of(other)}"
        return "–" if one is other else f"{one.interval(name)}, base {one.mean(name + '_base'):.3f}"

    def likeness(one: Evaluation, other: Evaluation) -> Interval:
        return one.interval("dino" if one is other else f"dino_to {words_of(other)}")

    return render(
        "subjects.html",
        title=f"Fidelity of {about.adapter}",
        found=found,
        about=about,
        confusion=matrix(found, confusion),
        likeness=matrix(found, likeness),
        scores=score_table(found),
        subjects=list(zip(evaluators, found)),
        together=together,
        shown=SHOWN,
    )


def matrix(found: Sequence[Evaluation], cell: Callable) -> tuple[list[str], list[list]]:
    """Header and rows: `cell` of each subject (row) and each (column)."""
    rows = [[words_of(one), *(cell(one, other) for other in found)] for one in found]
    return ["", *(words_of(one) for one in found)], rows


def score_table(found: Sequence[Evaluation]) -> tuple[list[str], list[list]]:
    """Header and rows: the means of each subject."""
    known = in_all(found, [name for name, row in MEASURES.items() if row.summary and row.title])
    rows = [[words_of(one), *(one.interval(name) for name in known), one.score] for one in found]
    return ["", *(MEASURES[name].title for name in known), "Score"], rows
