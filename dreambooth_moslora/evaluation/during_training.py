"""Scores during training: every `--evaluate_steps`, for the same few prompts and seeds.

The scores of several subjects are averaged. The run's best step has the highest
`metrics.compute_checkpoint_score`.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from dreambooth_moslora.disk.events import StepEvaluated
from dreambooth_moslora.evaluation import metrics, protocol, report, scoring
from dreambooth_moslora.generation.sampling import Sampler
from dreambooth_moslora.photos import folder, photo_file
from dreambooth_moslora.settings import subject_kinds
from dreambooth_moslora.settings.train_config import TrainConfig

logger = logging.getLogger(__name__)

TRAINING_SEEDS = (100, 101)
"""Seeds that choose the best step, other than those of `evaluate`."""


class TrainingEvaluator:
    """Callable that scores a step; the trainer calls it with its sampler and step.

    config: of the run
    photos: of all subjects
    encoders: CLIP and DINO; None loads those that suit the base
    scores: False for a process that needs only the prompts

    `prompts` must be encoded before the text encoders are freed. Raises UserError for an encoder
    that cannot be loaded.
    """

    def __init__(
        self,
        config: TrainConfig,
        photos: Sequence[photo_file.Photo],
        encoders: metrics.Encoders | None = None,
        scores: bool = True,
    ):
        self.config = config
        self.photos = photos
        self.subjects = config.each_subject
        subject_photos = report.split_photos(photos, len(self.subjects))
        self.plans = list(map(build_small_plan, self.subjects, subject_photos))

        # Load the encoders now, so that a missing one fails before the first step.
        if encoders is None and scores:
            encoders = metrics.load_encoders(
                config.pretrained_model_name_or_path,
                faces=subject_kinds.has_face_subject(self.subjects),
            )
        self.encoders = encoders

    @property
    def prompts(self) -> list[str]:
        """Prompts of all subjects, each once."""
        return sorted({prompt for plan in self.plans for prompt in plan.prompts})

    @cached_property
    def trained_photos(self) -> list[photo_file.Photo]:
        """Photos with the masks and captions that the run has made by now."""
        return folder.add_saved_sidecars(self.config, self.photos)

    @cached_property
    def evaluators(self) -> list[scoring.Evaluator]:
        """Evaluator of each subject.

        Encoders stay on the CPU: a dozen images take seconds there, and no GPU memory.
        """
        return report.build_evaluators(
            subjects=self.subjects,
            photos=self.trained_photos,
            plans=self.plans,
            encoders=self.encoders,
            size_px=self.config.resolution,
        )

    def count_denoising_steps(self) -> int:
        """Return the denoising steps of the next call. A batch of images takes as many as one."""
        batches = sum(evaluator.count_batches() for evaluator in self.evaluators)
        return batches * self.plans[0].inference_steps

    def __call__(self, sampler: Sampler, step: int) -> StepEvaluated:
        """Return the scores of a step, and what they cost."""
        # Each subject is judged separately, and the scores are averaged.
        generate = self._build_generator(sampler)
        evaluations = [evaluator(generate) for evaluator in self.evaluators]
        merged = report.merge_evaluations(evaluations)
        if merged.no_score:
            logger.warning("step %d has no score: %s.", step, merged.no_score)

        # Subjects are numbered, as trackers must not get the user's prompts.
        subject_scores = {
            f"dino_subject_{number}": round(evaluation.mean("dino"), 4)
            for number, evaluation in enumerate(evaluations, start=1)
            if len(evaluations) > 1
        }
        return StepEvaluated(
            step,
            scores=merged.list_logged_scores() | subject_scores,
            no_score=merged.no_score,
            copy_alarm=merged.alarm.raised,
            photos=self._summarize_photos(),
            cost={
                "seconds": round(merged.seconds, 2),
                "pictures": sum(map(len, merged.pictures.values())),
            },
        )

    def _summarize_photos(self) -> dict[str, int]:
        """Return the facts about the photos that `advice` needs to judge the scores."""
        facts = {"count": len(self.trained_photos)}
        counts = photo_file.count_photos(self.trained_photos)
        if len(counts) > 1:
            facts["largest"] = max(counts)
        bare_prompts = [photo.bare_prompt for photo in self.trained_photos]
        facts["without_bare_prompt"] = len(bare_prompts) - bare_prompts.count(None)
        return facts

    def _build_generator(self, sampler: Sampler) -> scoring.ImageGenerator:
        """Return a generator with fewer denoising steps than samples have."""
        steps = self.plans[0].inference_steps
        return scoring.build_generator(replace(sampler, inference_steps=steps))


def build_small_plan(
    subject: TrainConfig, photos: list[photo_file.Photo]
) -> protocol.EvaluationPlan:
    """Return a plan of a dozen images."""
    full = protocol.build_subject_plan(subject, photos, seeds=TRAINING_SEEDS)
    return full.reduce_plan(templates=3, seeds=2, class_images=2, unrelated=1, inference_steps=20)
