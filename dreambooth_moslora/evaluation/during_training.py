"""Scores during training: every `--evaluate_steps` for the same few prompts and seeds.

Scores are the means over several subjects. The run's best step has the highest
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

# Other seeds than those of `evaluate`: these choose the best step
TRAINING_SEEDS = (100, 101)


class TrainingEvaluator:
    """The trainer calls it with its sampler and step.

    config: of the run
    photos: of all subjects
    encoders: CLIP and DINO; None loads those that suit the base
    scores: False for a process that only has to know the prompts

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
        of_each = report.split_photos(photos, len(self.subjects))
        self.plans = [
            build_small_plan(subject, own) for subject, own in zip(self.subjects, of_each)
        ]

        # Loaded now, so that a missing one fails before the first step
        if encoders is None and scores:
            encoders = metrics.load_encoders(
                config.pretrained_model_name_or_path,
                faces=subject_kinds.has_face_subject(self.subjects),
            )
        self.encoders = encoders

    @property
    def prompts(self) -> list[str]:
        """The prompts of all subjects, each once."""
        return sorted({prompt for plan in self.plans for prompt in plan.prompts})

    @cached_property
    def trained_photos(self) -> list[photo_file.Photo]:
        """With the masks and captions that the run has made by now."""
        return folder.add_saved_sidecars(self.config, self.photos)

    @cached_property
    def evaluators(self) -> list[scoring.Evaluator]:
        """One for each subject. Encoders stay on the CPU: a dozen pictures take seconds there, and
        no GPU memory."""
        return report.build_evaluators(
            subjects=self.subjects,
            photos=self.trained_photos,
            plans=self.plans,
            encoders=self.encoders,
            size_px=self.config.resolution,
        )

    def __call__(self, sampler: Sampler, step: int) -> StepEvaluated:
        """Return the scores of a step, and what they cost."""
        draw = self._build_generator(sampler)
        of_each = [evaluator(draw) for evaluator in self.evaluators]
        found = report.merge_evaluations(of_each)
        if found.no_score:
            logger.warning("step %d has no score: %s.", step, found.no_score)

        # Subjects are numbered, as trackers must not get the user's words.
        numbered = {}
        if len(of_each) > 1:
            for number, one in enumerate(of_each, start=1):
                numbered[f"dino_subject_{number}"] = round(one.mean("dino"), 4)
        return StepEvaluated(
            step,
            scores=found.list_logged_scores() | numbered,
            copy_alarm=found.alarm.raised,
            photos=self._summarize_photos(),
            cost={
                "seconds": round(found.seconds, 2),
                "pictures": sum(map(len, found.pictures.values())),
            },
        )

    def _summarize_photos(self) -> dict[str, int]:
        """What `explain` must know of the photos to judge the scores."""
        facts = {"count": len(self.trained_photos)}
        counts = photo_file.count_photos(self.trained_photos)
        if len(counts) > 1:
            facts["largest"] = max(counts)
        bare = [photo.bare_prompt for photo in self.trained_photos]
        facts["without_bare_prompt"] = len(bare) - bare.count(None)
        return facts

    def _build_generator(self, sampler: Sampler) -> scoring.ImageGenerator:
        """Draws with fewer denoising steps than samples have."""
        steps = self.plans[0].inference_steps
        return scoring.build_generator(replace(sampler, inference_steps=steps))


def build_small_plan(
    subject: TrainConfig, photos: list[photo_file.Photo]
) -> protocol.EvaluationPlan:
    """A plan of a dozen pictures."""
    full = protocol.build_subject_plan(subject, photos, seeds=TRAINING_SEEDS)
    return full.reduce_plan(templates=3, seeds=2, class_images=2, unrelated=1, inference_steps=20)
