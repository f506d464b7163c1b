"""Scores of an adapter: comparison of images by the adapter and by the base, at equal prompts and
seeds.

    generate(requests, with_adapter) -> images
    images --Encoders--> vectors --metrics--> tables (prompts, seeds) -> scores

`Evaluator` belongs to one subject: it generates the base's images once and then judges any number
of adapters.
"""

import math
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

Tables = dict[str, np.ndarray]
"""Name of a measure -> its table."""
ImageGenerator = Callable[[list[SampleRequest], bool], list[Image.Image]]
"""(requests, with the adapter?) -> images."""
IMAGE_BATCH_SIZE = 4
MASK_FILL_RGB = (128, 128, 128)
"""Colour that covers the subject where only the background counts."""


@dataclass
class Evaluation:
    """Measurements of an adapter for one subject."""

    plan: protocol.EvaluationPlan
    tables: Tables  # of scores, (prompts, seeds), (prompts, 1) or (images,)
    alarm: metrics.CopyAlarm
    score: float | None  # None for a style, for the reason `no_score`
    seconds: float
    pictures: dict[str, list[Image.Image]] = field(repr=False, default_factory=dict)
    photo_fidelity: float = float("nan")  # of the photos among themselves
    photo_likeness: Mapping[str, float] = field(
        default_factory=dict
    )  # file name -> DINO to all others
    no_score: str = ""
    leaked: str = ""  # the thing of a style's images that appears most often unprompted
    # a `reference_arms.ReferenceComparison`, if reference images were compared too
    beside: Any = field(repr=False, default=None)

    def mean(self, name: str) -> float:
        return float(self.tables[name].mean())

    def interval(self, name: str) -> metrics.Interval:
        return metrics.bootstrap_mean(self.tables[name])

    def summarize_scores(self) -> dict[str, float]:
        """Return all means, relative scores, copies and the score if there is one, rounded."""
        means = {name: round(float(table.mean()), 4) for name, table in self.tables.items()}
        copies = {"copied": round(self.alarm.share, 4), "copy_alarm": self.alarm.raised}
        score = {} if self.score is None else {"score": round(self.score, 4)}
        return {**means, **self.compute_relative_scores(), **copies, **score}

    def list_logged_scores(self) -> dict[str, float]:
        """Return the means that a training run writes into its events."""
        means = self.summarize_scores()
        return {
            name: float(means[name])
            for name, row in METRICS.items()
            if row.logged and name in means
        }

    def compute_relative_scores(self) -> dict[str, float]:
        """Return scores relative to the base's, to the toy's ceiling, or to the base's spread,
        where these were measured."""
        relative = {}
        for name, row in METRICS.items():
            measure, whole = row.share or ("", "")
            if whole in self.tables and measure in self.tables and self.mean(whole):
                relative[name] = round(self.mean(measure) / self.mean(whole), 4)
        return relative


class Truth(Protocol):
    """World that knows the subject's true appearance (`toybox.truth.ToyTruth`)."""

    def compute_tables(
        self,
        plan: protocol.EvaluationPlan,
        pictures: list[Image.Image],
        vectors: torch.Tensor,
        photos: torch.Tensor,
    ) -> Tables: ...


@dataclass(frozen=True)
class EmbeddedImages:
    """N images with their vectors."""

    pictures: list[Image.Image]
    clip: torch.Tensor  # (N, C)
    dino: torch.Tensor  # (N, D)

    @property
    def joint(self) -> torch.Tensor:
        """(N, C + D) vectors of `metrics.join_embeddings`."""
        return metrics.join_embeddings(self.clip, self.dino)


class Evaluator:
    """Judge of the adapters of one subject.

    plan: prompts, seeds and steps
    encoders: CLIP and DINO, which score the images
    photos: of the subject
    masks: of each photo, white on the subject; None without one
    truth: of a subject whose true appearance is known
    faces: compares faces, for a person. If no photo shows a face, identity is not scored
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
        vectors = faces.embed_faces(self.photos.pictures) if faces else []
        vectors = [vector for vector in vectors if vector is not None]
        self.photo_faces = np.stack(vectors) if vectors else None

        # The photos' backgrounds
        pairs = zip(photos, masks)
        backgrounds = [mask_subject(photo, mask) for photo, mask in pairs if mask is not None]
        self.backgrounds = encoders.embed_clip_images(backgrounds) if backgrounds else None

    def __call__(self, generate: ImageGenerator) -> Evaluation:
        """Generate the images, embed them and return the scores."""
        started = time.perf_counter()
        plan = self.plan
        for name, requests in self.base_requests.items():
            self._base[name] = self._embed_images(generate(requests, False))
        embedded = {
            name: self._embed_images(generate(requests, True))
            for name, requests in self.adapter_requests.items()
        }

        # The tables, and from them the score
        tables = self._compute_subject_tables(embedded["subject"], self._base["subject"])
        tables |= self._compute_other_tables(embedded)
        alarm = metrics.detect_copies(embedded["subject"].joint, self.photos.joint)
        has_score = "style" in tables or not plan.is_style

        # All images, for the report
        pictures = {name: embedded_images.pictures for name, embedded_images in embedded.items()}
        pictures |= {
            f"{name}_base": embedded_images.pictures for name, embedded_images in self._base.items()
        }
        likeness = metrics.compute_mutual_similarity(self.photos.dino).tolist()
        return Evaluation(
            plan=plan,
            tables=tables,
            alarm=alarm,
            score=compute_score(tables, alarm) if has_score else None,
            seconds=time.perf_counter() - started,
            pictures=pictures,
            photo_fidelity=metrics.photo_fidelity(self.photos.dino),
            photo_likeness=dict(zip(self.names, likeness)) if len(likeness) > 1 else {},
            no_score="" if has_score else metrics.NO_STYLE_SCORE,
            leaked=self.leaked,
        )

    @property
    def base_requests(self) -> dict[str, list[SampleRequest]]:
        """Requests of the base's images, which are generated once for any number of adapters."""
        requests = {"subject": self.plan.base_requests} | self._shared_requests
        return {
            name: requests[name] for name in requests if requests[name] and name not in self._base
        }

    @property
    def adapter_requests(self) -> dict[str, list[SampleRequest]]:
        """Requests of the adapter's images."""
        requests = {"subject": self.plan.subject_requests, "bare": self.plan.bare_requests}
        requests |= self._shared_requests
        return {name: requests[name] for name in requests if requests[name]}

    @property
    def _shared_requests(self) -> dict[str, list[SampleRequest]]:
        return {"class": self.plan.class_requests, "unrelated": self.plan.unrelated_requests}

    def count_batches(self, batch_size: int = IMAGE_BATCH_SIZE) -> int:
        """Return the number of batches that the next call generates."""
        groups = [*self.base_requests.values(), *self.adapter_requests.values()]
        return sum(math.ceil(len(requests) / batch_size) for requests in groups)

    def copy_subject_only(self) -> "Evaluator":
        """Return a copy for only the subject's images, which suffice for the score."""
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
        """CLIP vectors of the thing that each prompt names, without its place: (prompts × seeds,
        P)."""
        nouns = [f"a photo of a {parse_noun(text)}" for text in self.plan.texts]
        return self.encoders.embed_clip_texts(nouns).repeat_interleave(len(self.plan.seeds), 0)

    def _embed_images(self, images: list[Image.Image]) -> EmbeddedImages:
        clip = self.encoders.embed_clip_images(images)
        dino = self.encoders.embed_dino_images(images)
        return EmbeddedImages(pictures=images, clip=clip, dino=dino)

    def _compute_subject_tables(self, subject: EmbeddedImages, base: EmbeddedImages) -> Tables:
        """Return the tables (prompts, seeds) of the subject's prompts, by the adapter and by the
        base."""
        photos = self.photos

        # A value for each image, (prompts × seeds,)
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
        # The mean over the rivals
        if self.rivals:
            for end, images in (("", subject), ("_base", base)):
                confusions = [
                    metrics.confusion(images.dino, photos.dino, rival) for rival in self.rivals
                ]
                columns[f"confusion{end}"] = torch.stack(confusions).mean(0)

        seeds = len(self.plan.seeds)
        tables = {name: values.numpy().reshape(-1, seeds) for name, values in columns.items()}

        # Diversity among the images of a prompt, (prompts, 1), needs two seeds.
        if seeds > 1:
            tables["diversity"] = metrics.diversity(subject.dino, seeds)
            tables["diversity_base"] = metrics.diversity(base.dino, seeds)
        if self.plan.is_style:
            tables |= self._compute_style_tables(subject, base)
        if self.photo_faces is not None:
            tables |= self._compute_face_tables(subject.pictures, base.pictures)
        if self.truth is not None:
            true_tables = self.truth.compute_tables(
                self.plan, subject.pictures, subject.dino, photos.dino
            )
            if common_names := true_tables.keys() & tables.keys():
                raise ValueError(f"the truth has tables of the same name: {sorted(common_names)}")
            tables |= true_tables
        return tables

    def _compute_style_tables(self, subject: EmbeddedImages, base: EmbeddedImages) -> Tables:
        """Return the style share, if it can be scored, and the images with a leaked thing,
        (prompts, seeds).

        A leaked thing is one of the photos' that the prompt did not ask for.
        """
        # How far the images went to the photos' style
        shape = (len(self.plan.templates), len(self.plan.seeds))
        style = metrics.compute_style_share(
            *map(
                self.encoders.embed_styles, (subject.pictures, base.pictures, self.photos.pictures)
            )
        )
        tables = {} if style is None else {"style": style.numpy().reshape(shape)}

        # Prompted and leaked things have the same text around them.
        things = self.plan.things
        if things:
            vectors = self.encoders.embed_clip_texts([f"a photo of a {thing}" for thing in things])
            for end, images in (("_base", base), ("", subject)):
                leaked_things = metrics.find_leaked_things(
                    images.clip, self.requested_things, vectors
                )
                tables[f"leak{end}"] = (leaked_things >= 0).float().numpy().reshape(shape)
            counts = torch.bincount(leaked_things[leaked_things >= 0], minlength=len(things))
            self.leaked = things[int(counts.argmax())] if counts.any() else ""
        return tables

    def _compute_face_tables(self, images: list[Image.Image], base: list[Image.Image]) -> Tables:
        """Return the likeness of faces, (prompts with a face, 1), and the images without, (prompts,
        seeds).

        Identity is left out if no image shows a face.
        """
        tables = {}
        for end, arm_images in (("", images), ("_base", base)):
            likeness, missing = metrics.compute_identity(
                self.faces.embed_faces(arm_images), self.photo_faces, len(self.plan.seeds)
            )
            tables[f"no_face{end}"] = missing
            if likeness.size:
                tables[f"identity{end}"] = likeness
        if "identity" in tables and len(self.photo_faces) > 1:
            tables["identity_of_photos"] = metrics.compute_mutual_similarity(self.photo_faces)
        return tables

    def _compute_other_tables(self, embedded: dict[str, EmbeddedImages]) -> Tables:
        """Return the tables of the bare prompt, the bare class and unrelated things, where these
        were generated."""
        tables = {}
        photos = self.photos.dino
        if "bare" in embedded:
            fidelity = metrics.subject_fidelity(embedded["bare"].dino, photos)
            tables["dino_bare"] = fidelity.numpy()[None]

        # PRES
        if "class" in embedded:
            for end, images in (("", embedded["class"]), ("_base", self._base["class"])):
                tables[f"pres{end}"] = metrics.subject_fidelity(images.dino, photos).numpy()

        # Drift, with the base's own spread between seeds as its scale. In CLIP and DINO together:
        # DINO does not see a duck on the beach become one in a kitchen.
        if "unrelated" in embedded:
            base = self._base["unrelated"]
            seeds = len(self.plan.seeds)
            drift = metrics.drift(embedded["unrelated"].joint, base.joint)
            tables["drift"] = drift.numpy().reshape(-1, seeds)
            if seeds > 1:
                tables["drift_base_spread"] = metrics.diversity(base.joint, seeds)
        return tables


def compute_score(tables: Tables, alarm: metrics.CopyAlarm) -> float:
    """Return the score of the images, in [0, 1]."""
    return metrics.compute_checkpoint_score(
        fidelity=compute_fidelity(tables),
        prompt=float(tables["clip_t"].mean()),
        base_prompt=float(tables["clip_t_base"].mean()),
        copied_share=alarm.share,
    )


def compute_fidelity(tables: Tables) -> float:
    """Return the likeness in the score: DINO; for a person the mean with the face's, for a style
    its own."""
    dino = float(tables["dino"].mean())

    # A style: its share, × the share of images in which nothing leaked beyond the base's leaks
    if "style" in tables:
        leaks = (float(tables.get(f"leak{end}", np.zeros(1)).mean()) for end in ("", "_base"))
        leak = max(next(leaks) - next(leaks), 0.0)
        return min(max(float(tables["style"].mean()), 0.0), 1.0) * (1 - leak)
    if "no_face" not in tables:
        return dino

    # A person: if neither the base nor the adapter shows a face, only DINO can be scored.
    face_share = 1 - float(tables["no_face"].mean())
    base_face_share = 1 - float(tables["no_face_base"].mean())
    if not (face_share or base_face_share):
        return dino
    likeness = tables.get("identity", np.zeros(1)).mean()
    photo_likeness = tables.get(
        "identity_of_photos", np.full(1, metrics.SINGLE_FACE_SIMILARITY)
    ).mean()
    face = metrics.compute_face_likeness(
        float(likeness), float(photo_likeness), face_share, base_face_share
    )
    return (max(dino, 0.0) + face) / 2


def mask_subject(photo: Image.Image, mask: Image.Image) -> Image.Image:
    """Return the photo with the subject (white in the mask) covered in grey."""
    grey = Image.new("RGB", photo.size, MASK_FILL_RGB)
    return Image.composite(grey, photo.convert("RGB"), mask.convert("L").resize(photo.size))


def load_truth(
    base: str,
    photos_dir: str | Path | None,
    plan: protocol.EvaluationPlan,
    encoders: metrics.Encoders,
    size_px: int,
) -> Truth | None:
    """Return the truth about a toy in the toy world's places; None for anything else.

    Also None without the toy world, which an installed package lacks.

    base: its name
    photos_dir: folder of the toy's photos
    plan: of the evaluation
    encoders: embed the true images
    size_px: side of the images
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
    """Return a function that generates images with a Sampler, with the adapter or without it.

    sampler: for the base alone its adapters are disabled, and it gets no references
    batch_size: images that are generated at once
    on_picture: called after each image
    """
    base_sampler = replace(sampler, references=())

    def generate_requests(requests: list[SampleRequest], with_adapter: bool) -> list[Image.Image]:
        with ExitStack() as stack:
            # Disable every model that an adapter may change; no family has all of them.
            if not with_adapter:
                for name in (*DENOISERS, "text_encoder", "text_encoder_2"):
                    model = getattr(sampler.pipeline, name, None)
                    if model is not None:
                        stack.enter_context(disable_adapters(model))

            images = []
            for image in (sampler if with_adapter else base_sampler)(requests, batch_size):
                images.append(image)
                on_picture()
            return images

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
    """Score a loaded adapter, or none, on the pipeline's device.

    pipeline: the base with the adapter
    adapter: its name there; None for the base alone
    evaluator: of the subject
    batch_size: images that are generated at once
    scale: of the adapter
    guidance_scale: None is the base's
    on_picture: called after each image
    text_options: of encoding; None are those of the adapter's run
    references: images that are shown beside each prompt, if the base's family supports them
    """
    # An adapter may change the text encoders, so texts are encoded again for each one.
    names = [adapter] if adapter else []
    family = pipeline.family_for([(name, 1.0) for name in names], text_options)
    pipeline.activate(tuple((name, scale) for name in names))

    # The images are of the plan's steps, at the pipeline's size.
    sampler = Sampler(
        pipeline=pipeline.pipeline,
        embed=partial(family.encode_prompts, pipeline.pipeline),
        resolution_px=pipeline.resolution_px,
        device=pipeline.home.device,
        inference_steps=evaluator.plan.inference_steps,
        guidance_scale=pipeline.guidance_scale if guidance_scale is None else guidance_scale,
        references=references,
    )
    try:
        pipeline.home.enter()
        with torch.no_grad():
            return evaluator(build_generator(sampler, batch_size, on_picture))
    finally:
        if pipeline.home.is_resting:  # models were offloaded in turns
            pipeline.home.leave()
