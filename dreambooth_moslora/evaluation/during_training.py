"""Scores during training: every `--evaluate_steps` for the same few prompts and seeds.

Scores are the means over several subjects. The run's best step has the highest
`metrics.checkpoint_score`.
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
SEEDS = (100, 101)


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
        of_each = report.photos_by_subject(photos, len(self.subjects))
        self.plans = [plan_of(subject, own) for subject, own in zip(self.subjects, of_each)]

        # Loaded now, so that a missing one fails before the first step
        if encoders is None and scores:
            encoders = metrics.load_encoders(
                config.pretrained_model_name_or_path,
                faces=subject_kinds.any_has_face(self.subjects),
            )
        self.encoders = encoders

    @property
    def prompts(self) -> list[str]:
        """The prompts of all subjects, each once."""
        return sorted({prompt for plan in self.plans for prompt in plan.prompts})

    @cached_property
    def photos_as_trained(self) -> list[photo_file.Photo]:
        """With the masks and captions that the run has made by now."""
        return folder.with_made(self.config, self.photos)

    @cached_property
    def evaluators(self) -> list[scoring.Evaluator]:
        """One for each subject. Encoders stay on the CPU: a dozen pictures take seconds there, and
        no GPU memory."""
        return report.evaluators_of(
            subjects=self.subjects,
            photos=self.photos_as_trained,
            plans=self.plans,
            encoders=self.encoders,
            size_px=self.config.resolution,
        )

    def __call__(self, sampler: Sampler, step: int) -> StepEvaluated:
        """Return the scores of a step, and what they cost."""
        draw = self._draw(sampler)
        of_each = [evaluator(draw) for evaluator in self.evaluators]
        found = report.pooled(of_each)
        if found.no_score:
            logger.warning("step %d has no score: %s.", step, found.no_score)

        # Subjects are numbered, as trackers must not get the user's words.
        numbered = {}
        if len(of_each) > 1:
            for number, one in enumerate(of_each, start=1):
                numbered[f"dino_subject_{number}"] = round(one.mean("dino"), 4)
        return StepEvaluated(
            step,
            scores=found.logged() | numbered,
            copy_alarm=found.alarm.raised,
            photos=self._about_photos(),
            cost={
                "seconds": round(found.seconds, 2),
                "pictures": sum(map(len, found.pictures.values())),
            },
        )

    def _about_photos(self) -> dict[str, int]:
        """What `explain` must know of the photos to judge the scores."""
        facts = {"count": len(self.photos_as_trained)}
        counts = photo_file.counts_of(self.photos_as_trained)
        if len(counts) > 1:
            facts["largest"] = max(counts)
        bare = [photo.bare_prompt for photo in self.photos_as_trained]
        facts["without_bare_prompt"] = len(bare) - bare.count(None)
        return facts

    def _draw(self, sampler: Sampler) -> scoring.Draw:
        """Draws with fewer denoising steps than samples have."""
        steps = self.plans[0].inference_steps
        return scoring.sampler_draw(replace(sampler, inference_steps=steps))


def plan_of(subject: TrainConfig, photos: list[photo_file.Photo]) -> protocol.EvaluationPlan:
    """A plan of a dozen pictures."""
    full = protocol.plan_of_subject(subject, photos, seeds=SEEDS)
    return full.smaller(templates=3, seeds=2, class_images=2, unrelated=1, inference_steps=20)
