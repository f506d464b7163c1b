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
from dreambooth_moslora.disk.atomic import write_atomic
from dreambooth_moslora.disk.run_folder import SCORES_NAME
from dreambooth_moslora.evaluation import metrics, protocol, reference_arms, scoring
from dreambooth_moslora.photos.photo_file import Photo, open_mask, open_rgb
from dreambooth_moslora.photos.synthetic import filter_real_photos
from dreambooth_moslora.pictures import render
from dreambooth_moslora.settings import subject_kinds
from dreambooth_moslora.settings.metric_kinds import METRICS, describe_likeness
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


def build_scores_json(evaluation: scoring.Evaluation, context: ReportContext) -> dict:
    """All measurements, JSON-ready: means with 95 % intervals."""
    plan = evaluation.plan
    clip, dino = context.encoders
    of_photos = evaluation.photo_fidelity  # NaN, which JSON does not know, for a single photo
    return {
        "format": 1,
        "version": __version__,
        "adapter": context.adapter,
        "base": context.base,
        "encoders": {"clip": clip, "dino": dino},
        # What was drawn, and how.
        "subject": asdict(plan.subject),
        "protocol": {
            "prompts": len(plan.templates),
            "seeds": list(plan.seeds),
            "class_images": plan.class_images,
            "unrelated_prompts": len(plan.unrelated),
            "inference_steps": plan.inference_steps,
            "guidance_scale": context.guidance_scale,
            "adapter_scale": context.adapter_scale,
            "interval": "95 %, crossed bootstrap over prompts and seeds",
        },
        # What was measured in it.
        "scores": {name: evaluation.interval(name).to_dict() for name in evaluation.tables},
        "dino_of_photos": None if math.isnan(of_photos) else round(of_photos, 4),
        "dino_of_each_photo": {
            name: round(value, 4) for name, value in evaluation.photo_likeness.items()
        },
        "relative": evaluation.compute_relative_scores(),
        "copy_alarm": asdict(evaluation.alarm),
        "leaked": evaluation.leaked,
        "references": reference_arms.to_dict(evaluation.beside) if evaluation.beside else None,
        "score": None if evaluation.score is None else round(evaluation.score, 4),
        "no_score": evaluation.no_score,
        "seconds": round(evaluation.seconds, 1),
    }


def render_report(
    evaluation: scoring.Evaluation, context: ReportContext, photos: list[Image.Image]
) -> str:
    """The page: verdict, scores, photos, every prompt by adapter and base, the picture nearest to a
    copy."""
    # Shares, such as of the base's diversity
    relative = {**evaluation.compute_relative_scores(), "copied": evaluation.alarm.share}
    shares = []
    for name, row in METRICS.items():
        if name in relative:
            shares.append((row.title, f"{relative[name]:.3f}"))

    return render(
        "evaluation.html",
        title=f"Fidelity of {context.adapter}",
        found=evaluation,
        about=context,
        photos=photos,
        scores=build_score_rows(evaluation),
        arms=reference_arms.build_rows(evaluation.beside) if evaluation.beside else (),
        shares=shares,
        likeness=describe_likeness(evaluation.tables),
        copied=metrics.MIN_COPY_INDEX,
        alarm_share=metrics.MIN_ALARM_SHARE,
    )


def build_score_rows(evaluation: scoring.Evaluation) -> list[tuple]:
    """Title, the adapter's mean, the base's, the photos' own, the meaning of each measure, and
    what is better; "" where there is none."""
    rows = []
    for name, row in METRICS.items():
        if not row.title or row.kind != "score" or name not in evaluation.tables:
            continue
        base = evaluation.interval(row.base) if row.base in evaluation.tables else ""
        own = ""
        if name == "dino" and not math.isnan(evaluation.photo_fidelity):
            own = evaluation.photo_fidelity
        if row.photos in evaluation.tables:
            own = evaluation.interval(row.photos)
        rows.append((row.title, evaluation.interval(name), base, own, row.help, row.better))
    return rows


def split_photos(photos: Sequence[Photo], count: int) -> list[list[Photo]]:
    """The photos of each of `count` subjects."""
    return [[photo for photo in photos if photo.subject == number] for number in range(count)]


def build_evaluators(
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
    of_each = split_photos(photos, len(subjects))
    for subject, photos_of_it, plan in zip(subjects, of_each, plans, strict=True):
        own = filter_real_photos(photos_of_it)
        truth = scoring.load_truth(
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
            faces=encoders.faces if subject_kinds.get_subject_kind(subject).has_face else None,
            names=[photo.path.name for photo in own],
        )
        found.append(evaluator)

    # Each gets the vectors of the others' photos.
    for one in found:
        one.rivals = [other.photos.dino for other in found if other is not one]
    return found


def merge_evaluations(evaluations: Sequence[scoring.Evaluation]) -> scoring.Evaluation:
    """One evaluation of all: the tables of all subjects over all their prompts, the mean of the
    scores there are, the worst copy."""
    if len(evaluations) == 1:
        return evaluations[0]
    # The prompts of all subjects below each other
    tables = {}
    for name in evaluations[0].tables:
        if all(name in one.tables for one in evaluations):
            tables[name] = np.concatenate([one.tables[name] for one in evaluations])

    pictures = {}
    for name in evaluations[0].pictures:
        pictures[name] = []
        for one in evaluations:
            pictures[name].extend(one.pictures.get(name, []))

    # The alarm of the worst copy, raised if any is
    alarms = [one.alarm for one in evaluations]
    alarm = replace(
        max(alarms, key=lambda alarm: alarm.largest),
        share=float(np.mean([alarm.share for alarm in alarms])),
        raised=any(alarm.raised for alarm in alarms),
    )
    scores = [one.score for one in evaluations if one.score is not None]
    return scoring.Evaluation(
        plan=evaluations[0].plan,
        tables=tables,
        alarm=alarm,
        score=float(np.mean(scores)) if scores else None,
        no_score=next(filter(None, (one.no_score for one in evaluations)), ""),
        seconds=sum(one.seconds for one in evaluations),
        pictures=pictures,
    )


def write_reports(
    folder: Path,
    evaluators: Sequence[scoring.Evaluator],
    evaluations: Sequence[scoring.Evaluation],
    context: ReportContext,
) -> list[Path]:
    """Write scores.json and report.html; of several subjects those of each in subject_1 …, and
    the scores of all. Returns the files.

    folder: where they go
    evaluators, evaluations: of each subject, in the same order
    context: what was evaluated
    """
    files = []
    for number, (evaluator, one) in enumerate(zip(evaluators, evaluations), start=1):
        own = folder / f"subject_{number}" if len(evaluations) > 1 else folder
        scores = write_scores(own, build_scores_json(one, context))
        page = own / "report.html"
        write_atomic(page, render_report(one, context, evaluator.photos.pictures))
        files += [page, scores]
    if len(evaluations) > 1:
        files.append(write_scores(folder, build_subjects_json(evaluations, context)))
    return files


def write_scores(folder: Path, scores: dict) -> Path:
    """Write scores.json into the folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    scores["time"] = time.time()  # a copy of the folder has dates of its own
    file = folder / SCORES_NAME
    write_atomic(file, json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
    return file


def build_subjects_json(evaluations: Sequence[scoring.Evaluation], context: ReportContext) -> dict:
    """`build_scores_json` over all subjects, with that of each in `subjects`."""
    # Of all subjects there is no one subject.
    whole = build_scores_json(merge_evaluations(evaluations), context)
    del whole["subject"]
    return {**whole, "subjects": [build_scores_json(one, context) for one in evaluations]}
