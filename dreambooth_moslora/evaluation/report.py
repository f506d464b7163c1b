"""An evaluation as files: `scores.json` for programs, `report.html` for people.

Several subjects of one adapter are judged separately, against each other, together, and in pairs in
one prompt:

evaluators_of(subjects) -> an Evaluator each, which knows the photos of its rivals (`metrics.confusion`)
pooled(evaluations)     -> one Evaluation over the prompts of all
TogetherEvaluator       -> pictures of "sks dog and a zwx cat", and how near they are to the photos of either

Their files are scores.json and report.html of all, and subject_1/, subject_2/ … with the report of
each alone.
"""

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
from PIL import Image

from dreambooth_moslora import __version__
from dreambooth_moslora.disk.atomic import atomic_write
from dreambooth_moslora.disk.run_folder import subject_name
from dreambooth_moslora.evaluation import metrics, protocol, score_tables
from dreambooth_moslora.generation.fixed_seeds import SampleRequest
from dreambooth_moslora.photos.photo_file import Photo, open_mask, open_rgb
from dreambooth_moslora.pictures import render
from dreambooth_moslora.settings.measures import MEASURES
from dreambooth_moslora.settings.prompts import MOST_PAIRS
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.explain import ScaleChoice


@dataclass(frozen=True)
class ReportContext:
    adapter: str
    base: str
    encoders: tuple[str, str]  # names of CLIP and DINO
    inference_steps: int
    guidance_scale: float
    diversity: str = "DINO distance"
    scale: ScaleChoice | None = None  # the result of --sweep_scale
    adapter_scale: float = 1.0  # of the pictures


def scores_json(found: score_tables.Evaluation, about: ReportContext) -> dict:
    """All measurements, JSON-ready: means with 95 % intervals, and each prompt's means."""
    plan = found.plan
    return {
        "format": 1,
        "version": __version__,
        "adapter": about.adapter,
        "base": about.base,
        "encoders": {**dict(zip(("clip", "dino"), about.encoders)), "diversity": about.diversity},
        "subject": asdict(plan.subject),
        "protocol": {
            "prompts": len(plan.templates),
            "seeds": list(plan.seeds),
            "class_images": plan.class_images,
            "unrelated_prompts": len(plan.unrelated),
            "inference_steps": plan.inference_steps,
            "guidance_scale": about.guidance_scale,
            "adapter_scale": about.adapter_scale,
            "interval": "95 %, crossed bootstrap over prompts and seeds",
        },
        "scores": {name: found.interval(name).to_dict() for name in found.tables},
        "dino_of_photos": None
        if math.isnan(found.photo_fidelity)
        else round(found.photo_fidelity, 4),
        "relative": found.relative(),
        "copy_alarm": asdict(found.alarm),
        "score": round(found.score, 4),
        **({"scale": asdict(about.scale)} if about.scale else {}),
        "per_prompt": per_prompt(found),
        "seconds": round(found.seconds, 1),
    }


def per_prompt(found: score_tables.Evaluation) -> list[dict]:
    """Means over the seeds for each prompt of the subject, from every table with such rows."""
    rows = [{"prompt": prompt} for prompt in found.plan.texts]
    for name, values in found.tables.items():
        has_rows = values.ndim == 2 and len(values) == len(rows)
        if has_rows and not name.startswith(("drift", "class", "dino_bare")):
            for row, own in zip(rows, values):
                row[name] = round(float(own.mean()), 4)
    return rows


def report_html(
    found: score_tables.Evaluation, about: ReportContext, photos: list[Image.Image]
) -> str:
    """The page: verdict, scores, photos, every prompt by adapter and base, the picture nearest to a
    copy."""
    relative, means = {**found.relative(), "copied": found.alarm.share}, per_prompt(found)
    names = [
        "prompt",
        *(name for name, row in MEASURES.items() if (row.title or row.truth) and name in means[0]),
    ]
    return render(
        "evaluation.html",
        title=f"Fidelity of {about.adapter}",
        found=found,
        about=about,
        photos=photos,
        scores=score_rows(found),
        shares=[
            (row.title, f"{relative[name]:.3f}")
            for name, row in MEASURES.items()
            if name in relative
        ],
        truths=rows_beside(
            found, [name for name, row in MEASURES.items() if row.truth], ("_ceiling", "_floor")
        ),
        judged=rows_beside(
            found, [name for name, row in MEASURES.items() if row.kind == "judge"], ("_ceiling",)
        ),
        by_prompt=(
            [name.replace("_", " ") for name in names],
            [[row[name] for name in names] for row in means],
        ),
        copied=metrics.COPIED,
        alarm_share=metrics.ALARM_SHARE,
    )


def score_rows(found: score_tables.Evaluation) -> list[tuple]:
    """Title, the adapter's mean, the base's, that of the photos themselves, and the meaning of each
    measure."""
    rows = []
    for name, row in MEASURES.items():
        if row.title and row.kind == "score" and name in found.tables:
            own = (
                found.photo_fidelity
                if name == "dino" and not math.isnan(found.photo_fidelity)
                else ""
            )
            base = found.interval(row.base) if row.base in found.tables else ""
            rows.append((row.title, found.interval(name), base, own, row.help))
    return rows


def rows_beside(
    found: score_tables.Evaluation, names: Sequence[str], ends: Sequence[str]
) -> list[tuple]:
    """Title, mean and the means beside it (NAME_ceiling, NAME_floor) of each measure that was
    compared with them."""
    rows = []
    for name in names:
        tables = [name + end for end in ("", *ends)]
        if all(table in found.tables for table in tables):
            rows.append(
                (MEASURES[name].truth or MEASURES[name].title, *map(found.interval, tables))
            )
    return rows


TOGETHER_TEMPLATES = 4  # Places in which two subjects are drawn together


def photos_by_subject(photos: Sequence[Photo], count: int) -> list[list[Photo]]:
    return [[photo for photo in photos if photo.subject == number] for number in range(count)]


def evaluators_of(
    subjects: Sequence[TrainConfig],
    photos: Sequence[Photo],
    plans: Sequence[protocol.EvaluationPlan],
    encoders: metrics.Encoders,
    size_px: int,
) -> list[score_tables.Evaluator]:
    """One for each subject; photos are numbered by subject."""
    found = []
    for subject, own, plan in zip(
        subjects, photos_by_subject(photos, len(subjects)), plans, strict=True
    ):
        base, folder = subject.pretrained_model_name_or_path, subject.instance_data_dir
        truth = score_tables.truth_of(base, folder, plan, encoders, size_px)
        shown = [open_rgb(photo) for photo in own], [open_mask(photo) for photo in own]
        found.append(score_tables.Evaluator(plan, encoders, *shown, truth))
    for one in found:
        others = (other for other in found if other is not one)
        one.rivals = {other.plan.subject.words: other.photos.dino for other in others}
    return found


def pooled(found: Sequence[score_tables.Evaluation]) -> score_tables.Evaluation:
    """One evaluation of all: the tables of all subjects over all their prompts, the mean score, the
    worst copy."""
    if len(found) == 1:
        return found[0]
    tables = {
        name: np.concatenate([one.tables[name] for one in found])
        for name in in_all(found, found[0].tables)
    }
    alarms = [one.alarm for one in found]
    share, worst = (
        float(np.mean([alarm.share for alarm in alarms])),
        max(alarms, key=lambda alarm: alarm.largest),
    )
    alarm = replace(worst, share=share, raised=any(alarm.raised for alarm in alarms))
    score = float(np.mean([one.score for one in found]))
    pictures = {
        name: [p for one in found for p in one.pictures.get(name, [])] for name in found[0].pictures
    }
    return score_tables.Evaluation(
        found[0].plan, tables, alarm, score, sum(one.seconds for one in found), pictures
    )


def in_all(found: Sequence[score_tables.Evaluation], names: Iterable[str]) -> list[str]:
    return [name for name in names if all(name in one.tables for one in found)]


@dataclass
class Together:
    words: tuple[str, str]  # of the two subjects
    tables: score_tables.Tables  # (prompts, seeds): DINO to each one's photos, with the base's
    pictures: list[Image.Image] = field(repr=False)
    base_pictures: list[Image.Image] = field(repr=False)

    @property
    def rows(self) -> list[tuple[str, metrics.Interval, float]]:
        return [
            (
                f"DINO to “{words}”",
                metrics.bootstrap_mean(self.tables[name]),
                float(self.tables[f"{name}_base"].mean()),
            )
            for name, words in zip(("first", "second"), self.words)
        ]


class TogetherEvaluator:
    """Judges two subjects in one prompt, in some of the first one's templates and with its seeds."""

    def __init__(self, first: score_tables.Evaluator, second: score_tables.Evaluator):
        self.pair = (first, second)
        self.plan = replace(
            first.plan, templates=protocol.spread(first.plan.templates, TOGETHER_TEMPLATES)
        )

    @property
    def picture_count(self) -> int:
        return len(self.plan.templates) * len(self.plan.seeds)

    def __call__(self, draw: score_tables.Draw) -> Together:
        words = tuple(one.plan.subject.words for one in self.pair)
        pictures = draw(self.requests(words), True)
        base = draw(self.requests([one.plan.class_word for one in self.pair]), False)
        encode = self.pair[0].encoders.dino_images
        vectors = {"": encode(pictures), "_base": encode(base)}
        shape, tables = (len(self.plan.templates), len(self.plan.seeds)), {}
        for name, one in zip(("first", "second"), self.pair):
            for end, dino in vectors.items():
                tables[name + end] = (
                    metrics.subject_fidelity(dino, one.photos.dino).numpy().reshape(shape)
                )
        return Together(words, tables, pictures, base)

    def requests(self, words: Sequence[str]) -> list[SampleRequest]:
        prompts = [
            template.replace("{}", " and a ".join(words)) for template in self.plan.templates
        ]
        return [SampleRequest(prompt, seed) for prompt in prompts for seed in self.plan.seeds]


def pairs_of(evaluators: Sequence[score_tables.Evaluator]) -> list[TogetherEvaluator]:
    return [TogetherEvaluator(*pair) for pair in list(combinations(evaluators, 2))[:MOST_PAIRS]]


SHOWN = 8  # Pictures of each subject in the common report; its own report has them all


def write_reports(
    folder: Path,
    evaluators: Sequence[score_tables.Evaluator],
    found: Sequence[score_tables.Evaluation],
    together: Sequence[Together],
    about: ReportContext,
) -> None:
    """Write `folder`/scores.json and report.html; of several subjects those for all, and each one's
    in subject_1 …"""

    def write(place: Path, scores: dict, html: str) -> None:
        place.mkdir(parents=True, exist_ok=True)
        scores["time"] = time.time()  # a copy of the folder has dates of its own
        atomic_write(place / "scores.json", json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
        atomic_write(place / "report.html", html)

    for number, (evaluator, one) in enumerate(zip(evaluators, found), start=1):
        own = folder / subject_name(number) if len(found) > 1 else folder
        write(own, scores_json(one, about), report_html(one, about, evaluator.photos.pictures))
    if len(found) > 1:
        write(
            folder,
            subjects_json(found, together, about),
            subjects_html(evaluators, found, together, about),
        )


def subjects_json(
    found: Sequence[score_tables.Evaluation], together: Sequence[Together], about: ReportContext
) -> dict:
    """`scores_json` over all subjects, with that of each in `subjects`, and `confusion` and
    `together`."""
    whole, cells = scores_json(pooled(found), about), []
    # a cell of both matrices: pictures `of` one, photos of the other
    for one, other in permutations(found, 2):
        confusion, names = (
            f"confusion_with {other.words}",
            ("confusion", "confusion_base", "dino_own", "dino_other"),
        )
        tables = zip(names, (confusion, f"{confusion}_base", "dino", f"dino_to {other.words}"))
        intervals = {name: one.interval(table).to_dict() for name, table in tables}
        cells.append({"of": one.words, "with": other.words, **intervals})
    return {
        **{name: value for name, value in whole.items() if name not in ("subject", "per_prompt")},
        "subjects": [scores_json(one, about) for one in found],
        "confusion": cells,
        "together": [
            {
                "words": list(pair.words),
                **{n: metrics.bootstrap_mean(t).to_dict() for n, t in pair.tables.items()},
            }
            for pair in together
        ],
    }


def confusion_lines(found: Sequence[score_tables.Evaluation]) -> list[str]:
    lines = []
    for one, rival in permutations(found, 2):
        own, other = one.mean("dino"), one.mean(f"dino_to {rival.words}")
        likeness = f"DINO {own:.3f} to its own photos, {other:.3f} to the other's"
        said = one.interval(f"confusion_with {rival.words}")
        lines.append(f"confusion of “{one.words}” with “{rival.words}”: {said}  ({likeness})")
    return lines


def subjects_html(
    evaluators: Sequence[score_tables.Evaluator],
    found: Sequence[score_tables.Evaluation],
    together: Sequence[Together],
    about: ReportContext,
) -> str:
    known = in_all(found, [name for name, row in MEASURES.items() if row.summary and row.title])
    confusion, likeness, scores = [], [], []
    for one in found:
        scores.append([one.words, *(one.interval(name) for name in known), one.score])
        confusion.append([one.words])
        likeness.append([one.words])
        for other in found:
            is_own, name = one is other, f"confusion_with {other.words}"
            confusion[-1].append(
                "–" if is_own else f"{one.interval(name)}, base {one.mean(name + '_base'):.3f}"
            )
            likeness[-1].append(one.interval("dino" if is_own else f"dino_to {other.words}"))
    header = ["", *(one.words for one in found)]
    return render(
        "subjects.html",
        title=f"Fidelity of {about.adapter}",
        found=found,
        about=about,
        confusion=(header, confusion),
        likeness=(header, likeness),
        scores=(["", *(MEASURES[name].title for name in known), "Score"], scores),
        subjects=list(zip(evaluators, found)),
        together=together,
        shown=SHOWN,
    )
