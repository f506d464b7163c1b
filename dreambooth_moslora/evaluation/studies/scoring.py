"""Scores of a study's cells. A process keeps the base, the encoders and each subject's base pictures in memory."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from dreambooth_moslora.core.config.subject_tables import each_subject
from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.prompts import subject_of
from dreambooth_moslora.core.toy import is_toy
from dreambooth_moslora.evaluation.encoders import Encoders, load_encoders
from dreambooth_moslora.evaluation.evaluate import Evaluator, evaluate_adapter, truth_of
from dreambooth_moslora.evaluation.protocol import plan_for
from dreambooth_moslora.evaluation.scores import Evaluation
from dreambooth_moslora.evaluation.studies.stats import JUDGED
from dreambooth_moslora.evaluation.studies.study import Cell, Study
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.photos.folder import instance_photos
from dreambooth_moslora.photos.masks import open_mask
from dreambooth_moslora.photos.photo import open_rgb

__all__ = ["evaluate_cell", "per_picture", "pipeline_of"]


def evaluate_cell(study: Study, cell: Cell, run_dir: Path) -> Evaluation:
    pipeline = pipeline_of(study.base)
    pipeline.load_adapter(run_dir, "cell")
    try:
        return evaluate_adapter(pipeline, "cell", evaluator_of(study, cell.subject), batch_size=8)
    finally:
        pipeline.unload_adapter("cell")


@lru_cache(maxsize=1)
def pipeline_of(base: str) -> SubjectPipeline:
    return SubjectPipeline.from_base(base)


@lru_cache(maxsize=1)
def encoders_of(base: str, clip: str, dino: str) -> Encoders:
    return load_encoders(base if is_toy(base) else "", clip, dino)


EVALUATORS: dict[str, Evaluator] = {}
"""This process's evaluators by subject; each holds the base's pictures of its prompts."""


def evaluator_of(study: Study, name: str) -> Evaluator:
    key = f"{study.base} {study.subject(name)} {study.protocol}"
    if key not in EVALUATORS:
        EVALUATORS[key] = make_evaluator(study, name)
    return EVALUATORS[key]


def make_evaluator(study: Study, name: str) -> Evaluator:
    """Of the subject alone, whatever an arm trains beside it; it knows the photos of its companions."""
    config = alone(study, study.reference, name)
    protocol, encoders = study.protocol, encoders_of(study.base, study.protocol.clip, study.protocol.dino)
    photos = instance_photos(config).photos
    captions, seeds = [c for photo in photos for c in photo.captions], tuple(range(protocol.images_per_prompt))
    plan = plan_for(study.base, subject_of(config), captions=captions, seeds=seeds).smaller(
        protocol.num_prompts,
        protocol.images_per_prompt,
        protocol.class_images,
        protocol.unrelated,
        protocol.inference_steps,
    )
    truth = truth_of(study.base, config.instance_data_dir, plan, encoders, pipeline_of(study.base).resolution_px)
    made = Evaluator(plan, encoders, [open_rgb(p) for p in photos], [open_mask(p) for p in photos], truth)
    for one in study.subject(name).beside:
        theirs = instance_photos(replace(config, **one.settings)).photos
        made.rivals[one.subject.words] = encoders.dino_images([open_rgb(photo) for photo in theirs])
    return made


def alone(study: Study, arm: str, name: str) -> TrainConfig:
    """The arm's settings for this one subject."""
    return each_subject(study.config_of(Cell("test", arm, 1, name, 0, 1.0), 1, Path("unused")))[0]


def per_picture(found: Evaluation) -> dict[str, list[float]]:
    """The scores by which pictures are judged."""
    return {name: [round(float(v), 5) for v in found.tables[name].ravel()] for name in JUDGED}
