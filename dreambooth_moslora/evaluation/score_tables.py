"""Scores an adapter: compares pictures by the adapter and by the base at equal prompts and seeds.

    draw(requests, with_adapter) -> pictures --Encoders--> vectors --metrics--> tables (prompts, seeds)
        -> scores

`Evaluator` belongs to one subject: it draws the base's pictures once and then judges any number of
adapters.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from dreambooth_moslora.evaluation import metrics, protocol
from dreambooth_moslora.generation.fixed_seeds import Sampler, SampleRequest
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.method.moslora import disabled
from dreambooth_moslora.settings.families import DENOISERS
from dreambooth_moslora.settings.measures import MEASURES
from dreambooth_moslora.settings.toys import is_toy

Tables = dict[str, np.ndarray]


@dataclass
class Evaluation:
    plan: protocol.EvaluationPlan
    tables: Tables  # of scores, (prompts, seeds), (prompts, 1) or (pictures,)
    alarm: metrics.CopyAlarm
    score: float
    seconds: float
    pictures: dict[str, list[Image.Image]] = field(repr=False, default_factory=dict)
    photo_fidelity: float = float("nan")  # of the photos among themselves

    @property
    def words(self) -> str:
        return self.plan.subject.words

    def mean(self, name: str) -> float:
        return float(self.tables[name].mean())

    def interval(self, name: str) -> metrics.Interval:
        return metrics.bootstrap_mean(self.tables[name])

    def means(self) -> dict[str, float]:
        found = {name: round(float(table.mean()), 4) for name, table in self.tables.items()}
        copies = {"copied": round(self.alarm.share, 4), "copy_alarm": self.alarm.raised}
        return {**found, **self.relative(), **copies, "score": round(self.score, 4)}

    def logged(self) -> dict[str, float]:
        """The means that a training run writes into its events."""
        means = self.means()
        return {
            name: float(means[name])
            for name, row in MEASURES.items()
            if row.logged and name in means
        }

    def relative(self) -> dict[str, float]:
        """Scores relative to the base's, the toy's ceiling, or the base's spread (pres_gain: in
        deviations)."""
        found = {}
        for name, row in MEASURES.items():
            measure, whole = row.share or ("", "")
            if whole in self.tables and self.mean(whole):
                found[name] = self.mean(measure) / self.mean(whole)
        own = self.tables.get("pres_base", np.zeros(0))
        if own.size > 1 and (deviation := float(own.std(ddof=1))):
            found["pres_gain"] = (self.mean("pres") - self.mean("pres_base")) / deviation
        return {name: round(value, 4) for name, value in found.items()}

    def remarks(self) -> list[str]:
        """What a reader of the scores might overlook."""
        if not {"diversity", "diversity_base"} <= self.tables.keys():
            return []
        own, base = self.mean("diversity"), self.mean("diversity_base")
        alike = f"pictures of one prompt look alike: diversity {own:.2f}, the base's {base:.2f}; fewer steps keep more"
        return [alike] if own < LEAST_DIVERSITY * base else []


# (requests, with the adapter?) -> pictures
Draw = Callable[[list[SampleRequest], bool], list[Image.Image]]
LEAST_DIVERSITY = 0.5  # Of the base's; below it a remark is made
BATCH = 4
GREY = (128, 128, 128)
GROUPS = ("subject", "bare", "class", "unrelated")  # What the adapter draws, in this order


class Truth(Protocol):
    """A world that knows the subject's true appearance (`toybox.truth.ToyTruth`)."""

    def tables(
        self,
        plan: protocol.EvaluationPlan,
        pictures: list[Image.Image],
        vectors: torch.Tensor,
        photos: torch.Tensor,
    ) -> Tables: ...


@dataclass(frozen=True)
class Views:
    pictures: list[Image.Image]
    clip: torch.Tensor
    dino: torch.Tensor

    @property
    def joint(self) -> torch.Tensor:
        return metrics.joint_vectors(self.clip, self.dino)


class Evaluator:
    """Judges adapters of one subject by `plan`. `masks`: white = subject, or None. `rivals`:
    others' vectors."""

    def __init__(
        self,
        plan: protocol.EvaluationPlan,
        encoders: metrics.Encoders,
        photos: Sequence[Image.Image],
        masks: Sequence[Image.Image | None] = (),
        truth: Truth | None = None,
    ):
        self.plan, self.encoders, self.truth = plan, encoders, truth
        self.photos = self._views(list(photos))
        masked = [(p, m) for p, m in zip(photos, masks) if m is not None]
        self.rivals: dict[str, torch.Tensor] = {}
        self.backgrounds = (
            encoders.clip_images([paint_over(p, m) for p, m in masked]) if masked else None
        )
        self._base: dict[str, Views] | None = None

    def __call__(self, draw: Draw) -> Evaluation:
        started, plan = time.perf_counter(), self.plan
        groups = {
            "subject": plan.base_requests,
            "class": plan.class_requests,
            "unrelated": plan.unrelated_requests,
        }
        if self._base is None:
            self._base = {
                name: self._views(draw(wanted, False)) for name, wanted in groups.items() if wanted
            }
        groups |= {"subject": plan.subject_requests, "bare": plan.bare_requests}
        drawn = {name: self._views(draw(groups[name], True)) for name in GROUPS if groups[name]}
        tables = self._subject_tables(drawn["subject"], self._base["subject"]) | self._other_tables(
            drawn
        )
        alarm = metrics.copy_alarm(drawn["subject"].joint, self.photos.joint)
        means = [float(tables[name].mean()) for name in ("dino", "clip_t", "clip_t_base")]
        pictures = {name: views.pictures for name, views in drawn.items()}
        pictures |= {f"{name}_base": views.pictures for name, views in self._base.items()}
        score, seconds = (
            metrics.checkpoint_score(*means, alarm.share),
            time.perf_counter() - started,
        )
        of_photos = metrics.photo_fidelity(self.photos.dino)
        return Evaluation(plan, tables, alarm, score, seconds, pictures, of_photos)

    def of_subject(self) -> "Evaluator":
        """A copy that draws only the subject's pictures, which suffice for the score."""
        smaller = copy(self)
        smaller.plan = replace(self.plan, class_images=0, unrelated=(), bare_prompt="")
        return smaller

    @cached_property
    def texts(self) -> torch.Tensor:
        """CLIP vectors of the prompts without the token, repeated for each seed: (prompts × seeds,
        P)."""
        return self.encoders.clip_texts(self.plan.texts).repeat_interleave(len(self.plan.seeds), 0)

    def _views(self, pictures: list[Image.Image]) -> Views:
        return Views(
            pictures, self.encoders.clip_images(pictures), self.encoders.dino_images(pictures)
        )

    def _subject_tables(self, subject: Views, base: Views) -> Tables:
        photos = self.photos
        columns = {
            "dino": metrics.subject_fidelity(subject.dino, photos.dino),
            "clip_i": metrics.subject_fidelity(subject.clip, photos.clip),
            "clip_t": metrics.prompt_fidelity(subject.clip, self.texts),
            "dino_base": metrics.subject_fidelity(base.dino, photos.dino),
            "clip_i_base": metrics.subject_fidelity(base.clip, photos.clip),
            "clip_t_base": metrics.prompt_fidelity(base.clip, self.texts),
            "copy_index": metrics.copy_index(subject.joint, photos.joint),
        }
        if self.backgrounds is not None:
            columns["background_leak"] = metrics.background_leak(
                subject.clip, base.clip, self.backgrounds
            )
        for words, others in self.rivals.items():
            columns[f"dino_to {words}"] = metrics.subject_fidelity(subject.dino, others)
            columns[f"confusion_with {words}"] = metrics.confusion(
                subject.dino, photos.dino, others
            )
            columns[f"confusion_with {words}_base"] = metrics.confusion(
                base.dino, photos.dino, others
            )
        shape = (len(self.plan.templates), len(self.plan.seeds))
        tables = {name: values.numpy().reshape(shape) for name, values in columns.items()}
        if self.rivals:
            for end in ("", "_base"):
                tables[f"confusion{end}"] = np.mean(
                    [tables[f"confusion_with {w}{end}"] for w in self.rivals], axis=0
                )
        if len(self.plan.seeds) > 1:
            tables |= {
                "diversity": self._diversity(subject),
                "diversity_base": self._diversity(base),
            }
        if self.truth is not None:
            tables |= self.truth.tables(self.plan, subject.pictures, subject.dino, photos.dino)
        return tables

    def _other_tables(self, drawn: dict[str, Views]) -> Tables:
        """Of the bare prompt; PRES and DIV of the class; drift, with the base's own spread between
        seeds as its scale, in CLIP and DINO together: DINO does not see a duck on the beach become
        one in a kitchen."""
        tables = {}
        if "bare" in drawn:
            tables["dino_bare"] = metrics.subject_fidelity(
                drawn["bare"].dino, self.photos.dino
            ).numpy()[None]
        for end, views in (
            (("", drawn["class"]), ("_base", self._base["class"])) if "class" in drawn else ()
        ):
            tables[f"pres{end}"] = metrics.subject_fidelity(views.dino, self.photos.dino).numpy()
            if len(views.pictures) > 1:
                one_prompt = [0] * len(views.pictures)
                tables[f"class_diversity{end}"] = by_prompt(
                    metrics.diversity(views.dino, one_prompt)
                )
        if "unrelated" in drawn:
            base, shape = self._base["unrelated"], (len(self.plan.unrelated), len(self.plan.seeds))
            tables["drift"] = (
                metrics.drift(drawn["unrelated"].joint, base.joint).numpy().reshape(shape)
            )
            if len(self.plan.seeds) > 1:
                tables["drift_base_spread"] = by_prompt(
                    metrics.diversity(base.joint, self._prompts_of(base))
                )
        return tables

    def _diversity(self, views: Views) -> np.ndarray:
        """DIV of each prompt, (prompts, 1): by LPIPS if available, else by DINO."""
        groups, lpips = self._prompts_of(views), self.encoders.lpips
        found = (
            metrics.diversity(views.pictures, groups, lpips)
            if lpips
            else metrics.diversity(views.dino, groups)
        )
        return by_prompt(found)

    def _prompts_of(self, views: Views) -> list[int]:
        return [number // len(self.plan.seeds) for number in range(len(views.pictures))]


def by_prompt(values: dict[int, float]) -> np.ndarray:
    return np.array([list(values.values())]).T


def paint_over(photo: Image.Image, mask: Image.Image) -> Image.Image:
    """The photo with the subject (white in the mask) painted grey, so that only its background is
    left."""
    grey = Image.new("RGB", photo.size, GREY)
    return Image.composite(grey, photo.convert("RGB"), mask.convert("L").resize(photo.size))


def truth_of(
    base: str,
    photos_dir: str | Path | None,
    plan: protocol.EvaluationPlan,
    encoders: metrics.Encoders,
    size_px: int,
) -> Truth | None:
    """The truth about a toy in the toy world's places; None for anything else, and without the toy
    world (a wheel)."""
    if not (is_toy(base) and photos_dir and find_spec("toybox")):
        return None
    from toybox.truth import find_truth, is_known_place

    return (
        find_truth(Path(photos_dir), encoders, size_px)
        if all(map(is_known_place, plan.templates))
        else None
    )


def sampler_draw(
    sampler: Sampler, batch_size: int = BATCH, on_picture: Callable[[], object] = bool
) -> Draw:
    """Draw through a Sampler; for the base alone the adapters are switched off. `on_picture` hears
    of each picture."""

    def draw(requests: list[SampleRequest], with_adapter: bool) -> list[Image.Image]:
        with ExitStack() as stack:
            for name in (*DENOISERS, "text_encoder", "text_encoder_2") if not with_adapter else ():
                if (model := getattr(sampler.pipeline, name, None)) is not None:
                    stack.enter_context(disabled(model))
            pictures = []
            for picture in sampler(requests, batch_size):
                pictures.append(picture)
                on_picture()
            return pictures

    return draw


def evaluate_adapter(
    pipeline: SubjectPipeline,
    adapter: str,
    evaluator: Evaluator,
    batch_size: int = BATCH,
    scale: float = 1.0,
    guidance_scale: float | None = None,
    on_picture: Callable[[], object] = bool,
    text_options: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Score a loaded adapter at `scale`; text is encoded for each side, with the given options of
    encoding or those of the adapter's run. It draws on the pipeline's home, where models take turns
    if memory is short. `on_picture` is called after each."""
    inner, steps = pipeline.pipeline, evaluator.plan.inference_steps
    embed = partial(pipeline.family_for(((adapter, 1.0),), text_options).texts, inner)
    pipeline.activate(((adapter, scale),))
    place = pipeline.resolution_px, pipeline.home.device
    sampler = Sampler(inner, embed, *place, steps, guidance_scale=guidance_scale)
    try:
        pipeline.home.enter()
        with torch.no_grad():
            return evaluator(sampler_draw(sampler, batch_size, on_picture))
    finally:
        if pipeline.home.is_resting:  # the models took turns
            pipeline.home.leave()
