"""An evaluation as files: `scores.json` for programs, `report.html` for people.

Several subjects of one adapter are judged separately, against each other and together:

evaluators_of(subjects) -> an Evaluator each, which knows the photos of its rivals
                           (`metrics.confusion`)
pooled(evaluations)     -> one Evaluation over the prompts of all

Their files are scores.json of all, and subject_1/, subject_2/ … with the scores and the report of
each.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from dreambooth_moslora import __version__
from dreambooth_moslora.disk.atomic import atomic_write
from dreambooth_moslora.disk.run_folder import SCORES_NAME
from dreambooth_moslora.evaluation import metrics, protocol, reference_arms, scoring
from dreambooth_moslora.photos.photo_file import Photo, open_mask, open_rgb
from dreambooth_moslora.photos.synthetic import real_ones
from dreambooth_moslora.pictures import render
from dreambooth_moslora.settings import subject_kinds
from dreambooth_moslora.settings.metric_kinds import MEASURES, likeness_in_words
from dreambooth_moslora.settings.train_config import TrainConfig


@dataclass(frozen=True)
class ReportContext:
    """What the files say beside the scores."""

    adapter: str
    base: str
    encoders: tuple[str, str]  # names of CLIP and DINO
    inference_steps: int
    guidance_scale: float
    adapter_scale: float = 1.0  # of the pictures


def scores_json(found: scoring.Evaluation, about: ReportContext) -> dict:
    """All measurements, JSON-ready: means with 95 % intervals."""
    plan = found.plan
    clip, dino = about.encoders
    of_photos = found.photo_fidelity  # NaN, which JSON does not know, for a single photo
    return {
        "format": 1,
        "version": __version__,
        "adapter": about.adapter,
        "base": about.base,
        "encoders": {"clip": clip, "dino": dino},
        # What was drawn, and how.
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
        # What was measured in it.
        "scores": {name: found.interval(name).to_dict() for name in found.tables},
        "dino_of_photos": None if math.isnan(of_photos) else round(of_photos, 4),
        "dino_of_each_photo": {
            name: round(value, 4) for name, value in found.photo_likeness.items()
        },
        "relative": found.relative(),
        "copy_alarm": asdict(found.alarm),
        "leaked": found.leaked,
        "references": reference_arms.as_json(found.beside) if found.beside else None,
        "score": None if found.score is None else round(found.score, 4),
        "no_score": found.no_score,
        "seconds": round(found.seconds, 1),
    }


def report_html(found: scoring.Evaluation, about: ReportContext, photos: list[Image.Image]) -> str:
    """The page: verdict, scores, photos, every prompt by adapter and base, the picture nearest to a
    copy."""
    # Shares, such as of the base's diversity
    relative = {**found.relative(), "copied": found.alarm.share}
    shares = []
    for name, row in MEASURES.items():
        if name in relative:
            shares.append((row.title, f"{relative[name]:.3f}"))

    return render(
        "evaluation.html",
        title=f"Fidelity of {about.adapter}",
        found=found,
        about=about,
        photos=photos,
        scores=score_rows(found),
        arms=reference_arms.rows(found.beside) if found.beside else (),
        shares=shares,
        likeness=likeness_in_words(found.tables),
        copied=metrics.COPIED,
        alarm_share=metrics.ALARM_SHARE,
    )


def score_rows(found: scoring.Evaluation) -> list[tuple]:
    """Title, the adapter's mean, the base's, the photos' own, the meaning of each measure, and
    what is better; "" where there is none."""
    rows = []
    for name, row in MEASURES.items():
        if not row.title or row.kind != "score" or name not in found.tables:
            continue
        base = found.interval(row.base) if row.base in found.tables else ""
        own = ""
        if name == "dino" and not math.isnan(found.photo_fidelity):
            own = found.photo_fidelity
        if row.photos in found.tables:
            own = found.interval(row.photos)
        rows.append((row.title, found.interval(name), base, own, row.help, row.better))
    return rows


def photos_by_subject(photos: Sequence[Photo], count: int) -> list[list[Photo]]:
    """The photos of each of `count` subjects."""
    return [[photo for photo in photos if photo.subject == number] for number in range(count)]


def evaluators_of(
    subjects: Sequence[TrainConfig],
    photos: Sequence[Photo],
    plans: Sequence[protocol.EvaluationPlan],
    encoders: metrics.Encoders,
    size_px: int,
) -> list[scoring.Evaluator]:
    """An evaluator for each subject, which knows the photos of the others.

    subjects: their settings
    photos: of all subjects, with the subject's number
    plans: of each subject
    encoders: what looks at the pictures
    size_px: side of the pictures
    """
    found = []
    of_each = photos_by_subject(photos, len(subjects))
    for subject, photos_of_it, plan in zip(subjects, of_each, plans, strict=True):
        own = real_ones(photos_of_it)
        truth = scoring.truth_of(
            base=subject.pretrained_model_name_or_path,
            photos_dir=subject.instance_data_dir,
            plan=plan,
            encoders=encoders,
            size_px=size_px,
        )
        evaluator = scoring.Evaluator(
            plan=plan,
            encoders=encoders,
            photos=[open_rgb(photo) for photo in own],
            masks=[open_mask(photo) for photo in own],
            truth=truth,
            faces=encoders.faces if subject_kinds.kind_of(subject).has_face else None,
            names=[photo.path.name for photo in own],
        )
        found.append(evaluator)

    # Each gets the vectors of the others' photos.
    for one in found:
        one.rivals = [other.photos.dino for other in found if other is not one]
    return found


def pooled(found: Sequence[scoring.Evaluation]) -> scoring.Evaluation:
    """One evaluation of all: the tables of all subjects over all their prompts, the mean of the
    scores there are, the worst copy."""
    if len(found) == 1:
        return found[0]
    # The prompts of all subjects below each other
    tables = {}
    for name in found[0].tables:
        if all(name in one.tables for one in found):
            tables[name] = np.concatenate([one.tables[name] for one in found])

    pictures = {}
    for name in found[0].pictures:
        pictures[name] = []
        for one in found:
            pictures[name].extend(one.pictures.get(name, []))

    # The alarm of the worst copy, raised if any is
    alarms = [one.alarm for one in found]
    alarm = replace(
        max(alarms, key=lambda alarm: alarm.largest),
        share=float(np.mean([alarm.share for alarm in alarms])),
        raised=any(alarm.raised for alarm in alarms),
    )
    scores = [one.score for one in found if one.score is not None]
    return scoring.Evaluation(
        plan=found[0].plan,
        tables=tables,
        alarm=alarm,
        score=float(np.mean(scores)) if scores else None,
        no_score=next(filter(None, (one.no_score for one in found)), ""),
        seconds=sum(one.seconds for one in found),
        pictures=pictures,
    )


def write_reports(
    folder: Path,
    evaluators: Sequence[scoring.Evaluator],
    found: Sequence[scoring.Evaluation],
    about: ReportContext,
) -> list[Path]:
    """Write scores.json and report.html; of several subjects those of each in subject_1 …, and
    the scores of all. Returns the files.

    folder: where they go
    evaluators, found: of each subject, in the same order
    about: what was evaluated
    """
    files = []
    for number, (evaluator, one) in enumerate(zip(evaluators, found), start=1):
        own = folder / f"subject_{number}" if len(found) > 1 else folder
        scores = write_scores(own, scores_json(one, about))
        page = own / "report.html"
        atomic_write(page, report_html(one, about, evaluator.photos.pictures))
        files += [page, scores]
    if len(found) > 1:
        files.append(write_scores(folder, subjects_json(found, about)))
    return files


def write_scores(folder: Path, scores: dict) -> Path:
    """Write scores.json into the folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    scores["time"] = time.time()  # a copy of the folder has dates of its own
    file = folder / SCORES_NAME
    atomic_write(file, json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
    return file


def subjects_json(found: Sequence[scoring.Evaluation], about: ReportContext) -> dict:
    """`scores_json` over all subjects, with that of each in `subjects`."""
    # Of all subjects there is no one subject.
    whole = scores_json(pooled(found), about)
    del whole["subject"]
    return {**whole, "subjects": [scores_json(one, about) for one in found]}
