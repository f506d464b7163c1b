"""Scores during training: every `--evaluate_steps` for the same few prompts and seeds, and the best
step.

Scores are the means over several subjects. The best step has the highest
`metrics.checkpoint_score`.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property

import torch

from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.evaluation import metrics, protocol, report, score_tables
from dreambooth_moslora.generation.fixed_seeds import Sampler
from dreambooth_moslora.method.moslora import set_scale
from dreambooth_moslora.photos import folder, photo_file
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.explain import SCALES, ScaleChoice, best_of, choose_scale

SEEDS = (100, 101)  # other seeds than `evaluate`: these choose the best step


class TrainingEvaluator:
    """The trainer calls it with its sampler and step. `prompts` must be encoded before the text
    encoders are freed. Raises UserError for an encoder that cannot be loaded; without `scores`
    there are only prompts."""

    def __init__(
        self,
        config: TrainConfig,
        photos: Sequence[photo_file.Photo],
        encoders: metrics.Encoders | None = None,
        scores: bool = True,
    ):
        self.config, self.photos = config, photos
        self.subjects = config.each_subject
        of_each = report.photos_by_subject(photos, len(self.subjects))
        self.plans = [plan_of(subject, own) for subject, own in zip(self.subjects, of_each)]
        if encoders is None and scores:
            # fail now, not late in the run
            encoders = metrics.load_encoders(config.pretrained_model_name_or_path)
        self.encoders = encoders

    @property
    def prompts(self) -> list[str]:
        return sorted({prompt for plan in self.plans for prompt in plan.prompts})

    @cached_property
    def photos_as_trained(self) -> list[photo_file.Photo]:
        """With the masks and captions that the run has made by now."""
        return folder.with_made(self.config, self.photos)

    @cached_property
    def evaluators(self) -> list[score_tables.Evaluator]:
        """One for each subject. Encoders stay on the CPU: a dozen pictures take seconds there, and
        no GPU memory."""
        photos = self.photos_as_trained
        return report.evaluators_of(
            self.subjects, photos, self.plans, self.encoders, self.config.resolution
        )

    def __call__(self, sampler: Sampler, step: int) -> dict:
        """The fields of the `evaluation` event: scores as plain numbers, `best` so far, `cost` of
        this evaluation."""
        draw = self._draw(sampler)
        of_each = [evaluator(draw) for evaluator in self.evaluators]
        found = report.pooled(of_each)
        # Numbered, as trackers must not get the user's words.
        numbered = {
            f"dino_subject_{n}": round(one.mean("dino"), 4)
            for n, one in enumerate(of_each, start=1)
        }
        photos = torch.cat([evaluator.photos.joint for evaluator in self.evaluators])
        best = best_of([*self._earlier(step), (step, round(found.score, 4))])
        near = {"nearness": round(metrics.photo_nearness(photos), 4)} if len(photos) > 1 else {}
        bare = sum(photo.bare_prompt is not None for photo in self.photos_as_trained)
        counts = photo_file.counts_of(self.photos_as_trained)
        largest = {"largest": max(counts)} if len(counts) > 1 else {}
        return {
            **found.logged(),
            **(numbered if len(of_each) > 1 else {}),
            "copy_alarm": found.alarm.raised,
            "photos": {"count": len(photos), **near, **largest, "without_bare_prompt": bare},
            "best": asdict(best),
            "cost": {
                "seconds": round(found.seconds, 2),
                "pictures": sum(map(len, found.pictures.values())),
            },
        }

    def _draw(self, sampler: Sampler) -> score_tables.Draw:
        return score_tables.sampler_draw(
            replace(sampler, inference_steps=self.plans[0].inference_steps)
        )

    def find_scale(
        self, sampler: Sampler, components: dict[str, torch.nn.Module]
    ) -> ScaleChoice | None:
        """Score the live adapter at several scales; afterwards it has the trained scale again."""
        draw, of_subject = (
            self._draw(sampler),
            [evaluator.of_subject() for evaluator in self.evaluators],
        )

        def score(scale: float) -> float:
            for model in components.values():
                set_scale(model, scale)
            return report.pooled([one(draw) for one in of_subject]).score

        try:
            return choose_scale({scale: score(scale) for scale in SCALES})
        finally:
            for model in components.values():
                set_scale(model, 1.0)

    def _earlier(self, step: int) -> list[tuple[int, float]]:
        scored = RunDir(self.config.output_dir).read_scores()
        scores = {event.step: event.scores["score"] for event in scored if "score" in event.scores}
        return sorted((at, score) for at, score in scores.items() if at < step)


def plan_of(subject: TrainConfig, photos: list[photo_file.Photo]) -> protocol.EvaluationPlan:
    full = protocol.plan_of_subject(subject, photos, seeds=SEEDS)
    return full.smaller(templates=3, seeds=2, class_images=2, unrelated=1, inference_steps=20)
