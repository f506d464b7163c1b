"""Scores an adapter: compares pictures by the adapter and by the base at equal prompts and seeds.

    draw(requests, with_adapter) -> pictures
    pictures --Encoders--> vectors --metrics--> tables (prompts, seeds) -> scores

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
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.generation.sampling import Sampler, SampleRequest
from dreambooth_moslora.method.moslora import disable_adapters
from dreambooth_moslora.photos.faces import FaceReader
from dreambooth_moslora.settings.family_facts import DENOISERS
from dreambooth_moslora.settings.metric_kinds import METRICS
from dreambooth_moslora.settings.prompts import parse_noun
from dreambooth_moslora.settings.toy_bases import is_toy

# Name of a measure -> its table
Tables = dict[str, np.ndarray]
# (requests, with the adapter?) -> pictures
ImageGenerator = Callable[[list[SampleRequest], bool], list[Image.Image]]
# Pictures drawn at once
IMAGE_BATCH_SIZE = 4
# What covers the subject where only the background counts
MASK_FILL_RGB = (128, 128, 128)


@dataclass
class Evaluation:
    """What was measured of an adapter for one subject."""

    plan: protocol.EvaluationPlan
    tables: Tables  # of scores, (prompts, seeds), (prompts, 1) or (pictures,)
    alarm: metrics.CopyAlarm
    score: float | None  # None for a style of which `no_score` says why
    seconds: float
    pictures: dict[str, list[Image.Image]] = field(repr=False, default_factory=dict)
    photo_fidelity: float = float("nan")  # of the photos among themselves
    photo_likeness: Mapping[str, float] = field(default_factory=dict)  # of each to the others, DINO
    no_score: str = ""
    leaked: str = ""  # the thing of a style's pictures that appears most often unasked
    # a `reference_arms.ReferenceComparison`, if the prompts were drawn by reference pictures too
    beside: Any = field(repr=False, default=None)

    @property
    def words(self) -> str:
        return self.plan.subject.trigger_words

    def mean(self, name: str) -> float:
        return float(self.tables[name].mean())

    def interval(self, name: str) -> metrics.Interval:
        return metrics.bootstrap_mean(self.tables[name])

    def summarize_scores(self) -> dict[str, float]:
        """All means, relative scores, copies and the score if there is one, rounded."""
        found = {name: round(float(table.mean()), 4) for name, table in self.tables.items()}
        copies = {"copied": round(self.alarm.share, 4), "copy_alarm": self.alarm.raised}
        score = {} if self.score is None else {"score": round(self.score, 4)}
        return {**found, **self.compute_relative_scores(), **copies, **score}

    def list_logged_scores(self) -> dict[str, float]:
        """The means that a training run writes into its events."""
        means = self.summarize_scores()
        found = {}
        for name, row in METRICS.items():
            if row.logged and name in means:
                found[name] = float(means[name])
        return found

    def compute_relative_scores(self) -> dict[str, float]:
        """Scores relative to the base's, the toy's ceiling, or the base's spread, where these were
        measured."""
        found = {}
        for name, row in METRICS.items():
            measure, whole = row.share or ("", "")
            if whole in self.tables and measure in self.tables and self.mean(whole):
                found[name] = round(self.mean(measure) / self.mean(whole), 4)
        return found


class Truth(Protocol):
    """A world that knows the subject's true appearance (`toybox.truth.ToyTruth`)."""

    def compute_tables(
        self,
        plan: protocol.EvaluationPlan,
        pictures: list[Image.Image],
        vectors: torch.Tensor,
        photos: torch.Tensor,
    ) -> Tables: ...


@dataclass(frozen=True)
class EmbeddedImages:
    """N pictures with their vectors."""

    pictures: list[Image.Image]
    clip: torch.Tensor  # (N, C)
    dino: torch.Tensor  # (N, D)

    @property
    def joint(self) -> torch.Tensor:
        """(N, C + D)."""
        return metrics.join_embeddings(self.clip, self.dino)


class Evaluator:
    """Judges adapters of one subject.

    plan: what is drawn
    encoders: what looks at the pictures
    photos: of the subject
    masks: of each photo, white on the subject; None without one
    truth: of a subject whose true appearance is known
    faces: what compares faces, of a person. Without a face in a photo there is no identity
    names: of the photos' files

    `rivals`, DINO vectors of the photos of each other subject, may be set later.
    """

    def __init__(
        self,
        plan: protocol.EvaluationPlan,
        encoders: metrics.Encoders,
        photos: Sequence[Image.Image],
        masks: Sequence[Image.Image | None] = (),
        truth: Truth | None = None,
        faces: FaceReader | None = None,
        names: Sequence[str] = (),
    ):
        self.plan = plan
        self.encoders = encoders
        self.truth = truth
        self.names = names
        self.photos = self._embed_images(list(photos))
        self.rivals: list[torch.Tensor] = []
        self.leaked = ""
        self._base: dict[str, EmbeddedImages] = {}  # shared with copies

        # The photos' faces, (P, D)
        self.faces = faces
        seen = faces.embed_faces(self.photos.pictures) if faces else []
        found = [vector for vector in seen if vector is not None]
        self.photo_faces = np.stack(found) if found else None

        # What the photos show beside the subject
        backgrounds = []
        for photo, mask in zip(photos, masks):
            if mask is not None:
                backgrounds.append(mask_subject(photo, mask))
        self.backgrounds = encoders.embed_clip_images(backgrounds) if backgrounds else None

    def __call__(self, draw: ImageGenerator) -> Evaluation:
        """Draw, look and measure."""
        started = time.perf_counter()
        plan = self.plan

        # The base's pictures, once for any number of adapters
        by_base = {
            "subject": plan.base_requests,
            "class": plan.class_requests,
            "unrelated": plan.unrelated_requests,
        }
        for name, requests in by_base.items():
            if requests and name not in self._base:
                self._base[name] = self._embed_images(draw(requests, False))

        # The adapter's
        by_adapter = {
            "subject": plan.subject_requests,
            "bare": plan.bare_requests,
            "class": plan.class_requests,
            "unrelated": plan.unrelated_requests,
        }
        drawn = {}
        for name, requests in by_adapter.items():
            if requests:
                drawn[name] = self._embed_images(draw(requests, True))

        # The tables, and from them the score
        tables = self._compute_subject_tables(drawn["subject"], self._base["subject"])
        tables |= self._compute_other_tables(drawn)
        alarm = metrics.detect_copies(drawn["subject"].joint, self.photos.joint)
        score, no_score = None, metrics.NO_STYLE_SCORE
        if "style" in tables or not plan.is_style:
            no_score = ""
            score = metrics.compute_checkpoint_score(
                fidelity=compute_fidelity(tables),
                prompt=float(tables["clip_t"].mean()),
                base_prompt=float(tables["clip_t_base"].mean()),
                copied_share=alarm.share,
            )
        pictures = {name: views.pictures for name, views in drawn.items()}
        pictures |= {f"{name}_base": views.pictures for name, views in self._base.items()}
        likeness = metrics.compute_mutual_similarity(self.photos.dino).tolist()
        return Evaluation(
            plan=plan,
            tables=tables,
            alarm=alarm,
            score=score,
            seconds=time.perf_counter() - started,
            pictures=pictures,
            photo_fidelity=metrics.photo_fidelity(self.photos.dino),
            photo_likeness=dict(zip(self.names, likeness)) if len(likeness) > 1 else {},
            no_score=no_score,
            leaked=self.leaked,
        )

    def copy_subject_only(self) -> "Evaluator":
        """A copy that draws only the subject's pictures, which suffice for the score."""
        smaller = copy(self)
        smaller.plan = replace(self.plan, class_images=0, unrelated=(), bare_prompt="")
        return smaller

    @cached_property
    def text_embeddings(self) -> torch.Tensor:
        """CLIP vectors of the prompts without the token, repeated for each seed: (prompts × seeds,
        P)."""
        vectors = self.encoders.embed_clip_texts(self.plan.texts)
        return vectors.repeat_interleave(len(self.plan.seeds), 0)

    @cached_property
    def requested_things(self) -> torch.Tensor:
        """CLIP vectors of what each prompt asks for, without its place: (prompts × seeds, P)."""
        nouns = [f"a photo of a {parse_noun(text)}" for text in self.plan.texts]
        return self.encoders.embed_clip_texts(nouns).repeat_interleave(len(self.plan.seeds), 0)

    def _embed_images(self, pictures: list[Image.Image]) -> EmbeddedImages:
        clip = self.encoders.embed_clip_images(pictures)
        dino = self.encoders.embed_dino_images(pictures)
        return EmbeddedImages(pictures=pictures, clip=clip, dino=dino)

    def _compute_subject_tables(self, subject: EmbeddedImages, base: EmbeddedImages) -> Tables:
        """Of the subject's prompts, (prompts, seeds), by the adapter and by the base."""
        photos = self.photos

        # One number for each picture, (prompts × seeds,)
        columns = {
            "dino": metrics.subject_fidelity(subject.dino, photos.dino),
            "clip_i": metrics.subject_fidelity(subject.clip, photos.clip),
            "clip_t": metrics.prompt_fidelity(subject.clip, self.text_embeddings),
            "dino_base": metrics.subject_fidelity(base.dino, photos.dino),
            "clip_i_base": metrics.subject_fidelity(base.clip, photos.clip),
            "clip_t_base": metrics.prompt_fidelity(base.clip, self.text_embeddings),
            "copy_index": metrics.compute_copy_index(subject.joint, photos.joint),
        }
        if self.backgrounds is not None:
            columns["background_leak"] = metrics.compute_background_leak(
                subject.clip, base.clip, self.backgrounds
            )
        # With several rivals: the mean over them
        if self.rivals:
            for end, views in (("", subject), ("_base", base)):
                of_each = [metrics.confusion(views.dino, photos.dino, one) for one in self.rivals]
                columns[f"confusion{end}"] = torch.stack(of_each).mean(0)

        shape = (len(self.plan.templates), len(self.plan.seeds))
        tables = {name: values.numpy().reshape(shape) for name, values in columns.items()}

        # Pictures of one prompt, (prompts, 1), need two seeds.
        seeds = len(self.plan.seeds)
        if seeds > 1:
            tables["diversity"] = metrics.diversity(subject.dino, seeds)
            tables["diversity_base"] = metrics.diversity(base.dino, seeds)
        if self.plan.is_style:
            tables |= self._compute_style_tables(subject, base)
        if self.photo_faces is not None:
            tables |= self._compute_face_tables(subject.pictures, base.pictures)
        if self.truth is not None:
            known = self.truth.compute_tables(
                self.plan, subject.pictures, subject.dino, photos.dino
            )
            if twice := known.keys() & tables.keys():
                raise ValueError(f"the truth has tables of the same name: {sorted(twice)}")
            tables |= known
        return tables

    def _compute_style_tables(self, subject: EmbeddedImages, base: EmbeddedImages) -> Tables:
        """How much of the style the pictures have, if that can be scored, and in which a thing of
        the style's pictures appears unasked, (prompts, seeds)."""
        shape = (len(self.plan.templates), len(self.plan.seeds))
        look = self.encoders.embed_styles
        of_base, of_photos = look(base.pictures), look(self.photos.pictures)
        style = metrics.compute_style_share(look(subject.pictures), of_base, of_photos)
        tables = {} if style is None else {"style": style.numpy().reshape(shape)}

        # What was asked for, and the things, in the same words around them
        things = self.plan.things
        if things:
            vectors = self.encoders.embed_clip_texts([f"a photo of a {thing}" for thing in things])
            for end, views in (("_base", base), ("", subject)):
                found = metrics.find_leaked_things(views.clip, self.requested_things, vectors)
                tables[f"leak{end}"] = (found >= 0).float().numpy().reshape(shape)
            counts = torch.bincount(found[found >= 0], minlength=len(things))
            self.leaked = things[int(counts.argmax())] if counts.any() else ""
        return tables

    def _compute_face_tables(self, drawn: list[Image.Image], base: list[Image.Image]) -> Tables:
        """Whose face the pictures show, (prompts that show one, 1), and which show none, (prompts,
        seeds). Without a face in any picture there is no identity."""
        tables = {}
        for end, pictures in (("", drawn), ("_base", base)):
            likeness, missing = metrics.compute_identity(
                self.faces.embed_faces(pictures), self.photo_faces, len(self.plan.seeds)
            )
            tables[f"no_face{end}"] = missing
            if likeness.size:
                tables[f"identity{end}"] = likeness
        if "identity" in tables and len(self.photo_faces) > 1:
            tables["identity_of_photos"] = metrics.compute_mutual_similarity(self.photo_faces)
        return tables

    def _compute_other_tables(self, drawn: dict[str, EmbeddedImages]) -> Tables:
        """Of the bare prompt, of the bare class and of unrelated things, where they were drawn."""
        tables = {}
        photos = self.photos.dino
        if "bare" in drawn:
            fidelity = metrics.subject_fidelity(drawn["bare"].dino, photos)
            tables["dino_bare"] = fidelity.numpy()[None]

        # PRES
        if "class" in drawn:
            for end, views in (("", drawn["class"]), ("_base", self._base["class"])):
                tables[f"pres{end}"] = metrics.subject_fidelity(views.dino, photos).numpy()

        # Drift, with the base's own spread between seeds as its scale. In CLIP and DINO together:
        # DINO does not see a duck on the beach become one in a kitchen.
        if "unrelated" in drawn:
            base = self._base["unrelated"]
            seeds = len(self.plan.seeds)
            shape = (len(self.plan.unrelated), seeds)
            drift = metrics.drift(drawn["unrelated"].joint, base.joint)
            tables["drift"] = drift.numpy().reshape(shape)
            if seeds > 1:
                tables["drift_base_spread"] = metrics.diversity(base.joint, seeds)
        return tables


def compute_fidelity(tables: Tables) -> float:
    """The likeness that the score is made of: DINO, of a person the mean with the face's, of a
    style its own."""
    dino = float(tables["dino"].mean())

    # A style: how much of it is there, and how often nothing came along with it.
    if "style" in tables:
        leaks = (float(tables.get(f"leak{end}", np.zeros(1)).mean()) for end in ("", "_base"))
        more = max(next(leaks) - next(leaks), 0.0)
        return min(max(float(tables["style"].mean()), 0.0), 1.0) * (1 - more)
    if "no_face" not in tables:
        return dino
    shown, base_shown = (1 - float(tables[name].mean()) for name in ("no_face", "no_face_base"))

    # Where neither the base nor the adapter shows a face, nobody can say whose it is.
    if not (shown or base_shown):
        return dino
    likeness = tables.get("identity", np.zeros(1)).mean()
    of_photos = tables.get("identity_of_photos", np.full(1, metrics.SINGLE_FACE_SIMILARITY)).mean()
    face = metrics.compute_face_likeness(float(likeness), float(of_photos), shown, base_shown)
    return (max(dino, 0.0) + face) / 2


def mask_subject(photo: Image.Image, mask: Image.Image) -> Image.Image:
    """The photo with the subject (white in the mask) painted grey, so that only its background is
    left."""
    grey = Image.new("RGB", photo.size, MASK_FILL_RGB)
    return Image.composite(grey, photo.convert("RGB"), mask.convert("L").resize(photo.size))


def load_truth(
    base: str,
    photos_dir: str | Path | None,
    plan: protocol.EvaluationPlan,
    encoders: metrics.Encoders,
    size_px: int,
) -> Truth | None:
    """The truth about a toy in the toy world's places; None for anything else, and without the toy
    world, which an installed package lacks.

    base: its name
    photos_dir: where the toy's photos lie
    plan: what is drawn of it
    encoders: what looks at the true pictures
    size_px: side of the pictures
    """
    if not (is_toy(base) and photos_dir and find_spec("toybox")):
        return None
    from toybox.truth import find_truth, is_known_place

    if not all(map(is_known_place, plan.templates)):
        return None
    return find_truth(Path(photos_dir), encoders, size_px)


def build_generator(
    sampler: Sampler, batch_size: int = IMAGE_BATCH_SIZE, on_picture: Callable[[], object] = bool
) -> ImageGenerator:
    """Draw through a Sampler; for the base alone the adapters are switched off, and it is shown no
    references. `on_picture` hears of each picture."""
    alone = replace(sampler, references=())

    def generate_requests(requests: list[SampleRequest], with_adapter: bool) -> list[Image.Image]:
        with ExitStack() as stack:
            # All that an adapter may change; not every family has each
            if not with_adapter:
                for name in (*DENOISERS, "text_encoder", "text_encoder_2"):
                    model = getattr(sampler.pipeline, name, None)
                    if model is not None:
                        stack.enter_context(disable_adapters(model))

            pictures = []
            for picture in (sampler if with_adapter else alone)(requests, batch_size):
                pictures.append(picture)
                on_picture()
            return pictures

    return generate_requests


def evaluate_adapter(
    pipeline: SubjectPipeline,
    adapter: str | None,
    evaluator: Evaluator,
    batch_size: int = IMAGE_BATCH_SIZE,
    scale: float = 1.0,
    guidance_scale: float | None = None,
    on_picture: Callable[[], object] = bool,
    text_options: Mapping[str, Any] | None = None,
    references: Sequence[Image.Image] = (),
) -> Evaluation:
    """Score a loaded adapter, or none. It draws on the pipeline's home, where models take turns if
    memory is short.

    pipeline: the base with the adapter
    adapter: its name there; None for the base by itself
    evaluator: of the subject
    batch_size: pictures drawn at once
    scale: of the adapter
    guidance_scale: None is the base's own
    on_picture: called after each picture
    text_options: of encoding; None are those of the adapter's run
    references: pictures that are shown beside each prompt, if the base's family takes any
    """
    # Text is encoded anew for each side, as an adapter may change the text encoders.
    names = [adapter] if adapter else []
    family = pipeline.family_for([(name, 1.0) for name in names], text_options)
    pipeline.activate(tuple((name, scale) for name in names))
    sampler = Sampler(
        pipeline=pipeline.pipeline,
        embed=partial(family.encode_prompts, pipeline.pipeline),
        resolution_px=pipeline.resolution_px,
        device=pipeline.home.device,
        inference_steps=evaluator.plan.inference_steps,
        guidance_scale=guidance_scale,
        references=references,
    )
    try:
        pipeline.home.enter()
        with torch.no_grad():
            return evaluator(build_generator(sampler, batch_size, on_picture))
    finally:
        if pipeline.home.is_resting:  # the models took turns
            pipeline.home.leave()
