"""Files of an evaluation: `scores.json` for programs, `report.html` for people.

Several subjects of one adapter are judged separately, against each other and together:

build_evaluators(subjects)      -> an Evaluator each, with the photos of its rivals
                                  (`metrics.confusion`)
merge_evaluations(evaluations)  -> one Evaluation over the prompts of all

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
    """Facts for the files beside the scores."""

    adapter: str
    base: str
    encoders: tuple[str, str]  # names of CLIP and DINO
    inference_steps: int
    guidance_scale: float
    adapter_scale: float = 1.0  # of the images


def build_scores_json(evaluation: scoring.Evaluation, context: ReportContext) -> dict:
    """Return all measurements, JSON-ready: means with 95 % intervals."""
    plan = evaluation.plan
    clip, dino = context.encoders
    photo_fidelity = evaluation.photo_fidelity  # NaN, which JSON does not know, for a single photo
    return {
        "format": 1,
        "version": __version__,
        "adapter": context.adapter,
        "base": context.base,
        "encoders": {"clip": clip, "dino": dino},
        # Prompts, seeds and settings of the images
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
        # Measurements
        "scores": {name: evaluation.interval(name).to_dict() for name in evaluation.tables},
        "dino_of_photos": None if math.isnan(photo_fidelity) else round(photo_fidelity, 4),
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
    """Return the page: verdict, scores, photos, images of every prompt by adapter and base, the
    image nearest to a photo."""
    # Relative scores, such as the share of the base's diversity
    relative = {**evaluation.compute_relative_scores(), "copied": evaluation.alarm.share}
    shares = [
        (row.title, f"{relative[name]:.3f}") for name, row in METRICS.items() if name in relative
    ]
    return render(
        "evaluation.html",
        title=f"Fidelity of {context.adapter}",
        evaluation=evaluation,
        context=context,
        photos=photos,
        scores=build_score_rows(evaluation),
        arms=reference_arms.build_rows(evaluation.beside) if evaluation.beside else (),
        shares=shares,
        likeness=describe_likeness(evaluation.tables),
        copied=metrics.MIN_COPY_INDEX,
        alarm_share=metrics.MIN_ALARM_SHARE,
    )


def build_score_rows(evaluation: scoring.Evaluation) -> list[tuple]:
    """Return the rows of the table of scores; "" for a missing cell.

    Title, the adapter's mean, the base's, the photos', the meaning of the measure, and which is
    better.
    """
    rows = []
    for name, row in METRICS.items():
        if not row.title or row.kind != "score" or name not in evaluation.tables:
            continue
        base = evaluation.interval(row.base) if row.base in evaluation.tables else ""
        photos = ""
        if name == "dino" and not math.isnan(evaluation.photo_fidelity):
            photos = evaluation.photo_fidelity
        if row.photos in evaluation.tables:
            photos = evaluation.interval(row.photos)
        rows.append((row.title, evaluation.interval(name), base, photos, row.help, row.better))
    return rows


def split_photos(photos: Sequence[Photo], count: int) -> list[list[Photo]]:
    """Return the photos of each of `count` subjects."""
    return [[photo for photo in photos if photo.subject == number] for number in range(count)]


def build_evaluators(
    subjects: Sequence[TrainConfig],
    photos: Sequence[Photo],
    plans: Sequence[protocol.EvaluationPlan],
    encoders: metrics.Encoders,
    size_px: int,
) -> list[scoring.Evaluator]:
    """Return an evaluator for each subject, with the photos of all others as its rivals.

    subjects: their settings
    photos: of all subjects, with the subject's number
    plans: of each subject
    encoders: CLIP and DINO, which score the images
    size_px: side of the images
    """
    # Images are compared with the subject's real photos.
    evaluators = []
    all_photos = split_photos(photos, len(subjects))
    for subject, subject_photos, plan in zip(subjects, all_photos, plans, strict=True):
        real_photos = filter_real_photos(subject_photos)
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
            photos=[open_rgb(photo) for photo in real_photos],
            masks=[open_mask(photo) for photo in real_photos],
            truth=truth,
            faces=encoders.faces if subject_kinds.get_subject_kind(subject).has_face else None,
            names=[photo.path.name for photo in real_photos],
        )
        evaluators.append(evaluator)

    # Each evaluator gets the vectors of the rivals' photos.
    for evaluator in evaluators:
        rivals = [rival for rival in evaluators if rival is not evaluator]
        evaluator.rivals = [rival.photos.dino for rival in rivals]
    return evaluators


def merge_evaluations(evaluations: Sequence[scoring.Evaluation]) -> scoring.Evaluation:
    """Return one evaluation of all: tables over the prompts of all subjects, the mean of the
    scores, the worst copy."""
    if len(evaluations) == 1:
        return evaluations[0]
    # Tables and images of all subjects, one subject after the other
    tables = {
        name: np.concatenate([evaluation.tables[name] for evaluation in evaluations])
        for name in evaluations[0].tables
        if all(name in evaluation.tables for evaluation in evaluations)
    }
    pictures = {
        name: [image for each in evaluations for image in each.pictures.get(name, [])]
        for name in evaluations[0].pictures
    }

    # The alarm of the worst copy, raised if any alarm is
    alarms = [evaluation.alarm for evaluation in evaluations]
    alarm = replace(
        max(alarms, key=lambda alarm: alarm.largest),
        share=float(np.mean([alarm.share for alarm in alarms])),
        raised=any(alarm.raised for alarm in alarms),
    )
    scores = [each.score for each in evaluations if each.score is not None]
    return scoring.Evaluation(
        plan=evaluations[0].plan,
        tables=tables,
        alarm=alarm,
        score=float(np.mean(scores)) if scores else None,
        no_score=next((each.no_score for each in evaluations if each.no_score), ""),
        seconds=sum(evaluation.seconds for evaluation in evaluations),
        pictures=pictures,
    )


def write_reports(
    folder: Path,
    evaluators: Sequence[scoring.Evaluator],
    evaluations: Sequence[scoring.Evaluation],
    context: ReportContext,
) -> list[Path]:
    """Write scores.json and report.html; for several subjects those of each in subject_1 …, and the
    scores of all.

    folder: of the files
    evaluators, evaluations: of each subject, in the same order
    context: what was evaluated

    Returns the paths of the files.
    """
    files = []
    for number, (evaluator, evaluation) in enumerate(zip(evaluators, evaluations), start=1):
        subject_folder = folder / f"subject_{number}" if len(evaluations) > 1 else folder
        scores = write_scores(subject_folder, build_scores_json(evaluation, context))
        page = subject_folder / "report.html"
        write_atomic(page, render_report(evaluation, context, evaluator.photos.pictures))
        files += [page, scores]
    if len(evaluations) > 1:
        files.append(write_scores(folder, build_subjects_json(evaluations, context)))
    return files


def write_scores(folder: Path, scores: dict) -> Path:
    """Write scores.json into the folder, which is created."""
    folder.mkdir(parents=True, exist_ok=True)
    scores["time"] = time.time()  # a copy of the folder has other dates
    file = folder / SCORES_NAME
    write_atomic(file, json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
    return file


def build_subjects_json(evaluations: Sequence[scoring.Evaluation], context: ReportContext) -> dict:
    """Return `build_scores_json` over all subjects, with that of each in `subjects`."""
    scores = build_scores_json(merge_evaluations(evaluations), context)
    del scores["subject"]
    return scores | {
        "subjects": [build_scores_json(evaluation, context) for evaluation in evaluations]
    }
