"""Measures of what a DreamBooth user cares about, as functions of unit vectors, with 95 % intervals
of their means.

CLIP and DINOv2 give the vectors, in fp32, so that an image gets the same vector in any batch: by
default openai/clip-vit-large-patch14 and facebook/dinov2-base, for the embedded base the toy
world's own.

DreamBooth (Ruiz et al., CVPR 2023, arXiv 2208.12242, sections 4.1 and 4.3) names five measures.
With u·v the cosine:

    CLIP-I  mean over generated g and photos p of  clip(g)·clip(p)
    DINO    the same with DINO's vectors, which tell two subjects of one class apart
    CLIP-T  mean over generated g and its prompt t of  clip(g)·clip(t)
    PRES    mean over images c of the class (no token) and photos p of  dino(c)·dino(p):
            lower is better, a high value means that every member of the class has become the
            subject
    DIV     mean over pairs of images of one prompt of 1 - dino·dino

Intervals are by the bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, ch.
13). A score is a table with one axis per random factor: prompts × seeds, or subjects × seeds. All
axes are resampled at once, each as a whole (the crossed bootstrap of Owen, "The pigeonhole
bootstrap", 2007). Resampling a handful of items underestimates their spread: with six subjects nine
intervals of ten hold the truth, not nineteen of twenty. The interval is therefore widened to
Student's t (the "expanded percentile interval" of Hesterberg, "What teachers should know about the
bootstrap", 2015), with Satterthwaite's degrees of freedom (1946).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from string import ascii_lowercase
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from PIL import Image
from torch.nn.functional import normalize

from dreambooth_moslora.disk.paths import get_public_name
from dreambooth_moslora.photos.faces import FaceReader, load_face_reader
from dreambooth_moslora.photos.pretrained import load_frozen, load_pretrained
from dreambooth_moslora.photos.toy_readers import ENCODER_LABEL, Clip, load_pipeline_clip
from dreambooth_moslora.settings import toy_bases
from dreambooth_moslora.settings.metric_kinds import CLIP_REPO, DINO_REPO

ENCODER_BATCH_SIZE = 16
STYLE_LAYER = 2
"""Layer of DINO whose patches tell style."""
MAX_TEXT_TOKENS = 77


@dataclass(kw_only=True)
class DinoEncoder:
    """DINO, which encodes images, and its preprocessing."""

    dino: torch.nn.Module
    dino_processor: Any
    batch_size: int = ENCODER_BATCH_SIZE

    def embed_dino_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return unit vectors (N, D) of N images of any size, on the CPU.

        They are the class token after the last layer norm.
        """

        def embed(pixels: torch.Tensor) -> torch.Tensor:
            return self.dino(pixel_values=pixels).last_hidden_state[:, 0]

        return self._embed_images(images, self.dino_processor, embed)

    def embed_styles(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return unit vectors (N, 2 D) of the style of N images of any size, on the CPU.

        They are mean and deviation of the patches' values in an early layer of DINO, which knows
        strokes and colours and not yet things.
        """

        def embed(pixels: torch.Tensor) -> torch.Tensor:
            layers = self.dino(pixel_values=pixels, output_hidden_states=True).hidden_states
            patches = layers[STYLE_LAYER][:, 1:]
            return torch.cat([patches.mean(1), patches.std(1)], dim=1)

        return self._embed_images(images, self.dino_processor, embed)

    def _embed_images(
        self, images: Sequence[Image.Image], processor: Any, embed: Callable
    ) -> torch.Tensor:
        def preprocess_images(batch: list[Image.Image]) -> torch.Tensor:
            rgb = [image.convert("RGB") for image in batch]
            return processor(rgb, return_tensors="pt").pixel_values

        return self._embed_batches(images, preprocess_images, embed)

    @torch.no_grad()
    def _embed_batches(
        self, items: Sequence, read: Callable[[list], Any], embed: Callable[[Any], torch.Tensor]
    ) -> torch.Tensor:
        """Return unit vectors (N, P) on the CPU.

        items: N images or texts
        read: prepares a batch of them
        embed: turns a batch into vectors
        """
        vectors = []
        for start in range(0, len(items), self.batch_size):
            values = read(list(items[start : start + self.batch_size])).to(self.dino.device)
            vectors.append(normalize(embed(values).float(), dim=-1).cpu())
        return torch.cat(vectors)


@dataclass(kw_only=True)
class Encoders(DinoEncoder):
    """Models that encode images and texts, and their preprocessing."""

    clip: Clip
    names: tuple[str, str] = ("clip", "dino")  # public ones, never paths
    faces: FaceReader | None = None  # for images of people

    def embed_clip_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return unit vectors (N, P) of N images of any size, on the CPU."""
        return self._embed_images(images, self.clip.processor, self.clip.embed_images)

    def embed_clip_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return unit vectors (N, P) of N texts, on the CPU. Texts are cut at the model's 77
        tokens."""
        read = partial(
            self.clip.tokenizer,
            padding=True,
            truncation=True,
            max_length=MAX_TEXT_TOKENS,
            return_tensors="pt",
        )
        return self._embed_batches(texts, read, self.clip.embed_texts)


def load_encoders(
    base: str | Path = "",
    clip: str | Path = "",
    dino: str | Path = "",
    device: str | torch.device = "cpu",
    faces: bool = False,
) -> Encoders:
    """Load CLIP and DINO, by default the toy world's for the embedded base.

    base: its name
    clip, dino: a folder or an id of the hub; "" for the usual one
    device: of the models
    faces: whether faces are compared too

    Raises UserError for a model that cannot be loaded.
    """
    is_toy = toy_bases.is_toy(base)
    reader = load_face_reader() if faces else None
    if reader:
        reader.load()

    # CLIP: the toy world's CLIP is part of its base.
    if is_toy and not clip:
        towers = load_pipeline_clip(toy_bases.CLIP_FOLDER, device)
        clip_name = f"{toy_bases.CLIP_FOLDER.name} CLIP"
    else:
        clip = clip or CLIP_REPO
        towers = load_clip(clip, device)
        clip_name = get_public_name(clip)

    # DINO
    dino = dino or (toy_bases.DINO_FOLDER if is_toy else DINO_REPO)
    return Encoders(
        **vars(load_dino(dino, device)),
        clip=towers,
        names=(clip_name, get_public_name(dino)),
        faces=reader,
    )


def load_dino(name: str | Path = DINO_REPO, device: str | torch.device = "cpu") -> DinoEncoder:
    """Load DINO alone. Raises UserError if it cannot be loaded."""
    return DinoEncoder(
        dino=load_frozen(transformers.AutoModel, name, ENCODER_LABEL, device, dtype=torch.float32),
        dino_processor=load_pretrained(transformers.AutoImageProcessor, name, ENCODER_LABEL),
    )


def load_clip(name: str | Path, device: str | torch.device) -> Clip:
    """Load a CLIP model with both halves. Raises UserError if it cannot be loaded."""
    model = load_frozen(transformers.CLIPModel, name, ENCODER_LABEL, device, dtype=torch.float32)

    # The output of either half is not projected yet.
    def embed_images(pixels: torch.Tensor) -> torch.Tensor:
        return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)

    def embed_texts(texts: Any) -> torch.Tensor:
        output = model.text_model(texts.input_ids, texts.attention_mask)
        return model.text_projection(output.pooler_output)

    return Clip(
        embed_images=embed_images,
        embed_texts=embed_texts,
        tokenizer=load_pretrained(transformers.CLIPTokenizer, name, ENCODER_LABEL),
        processor=load_pretrained(transformers.CLIPImageProcessor, name, ENCODER_LABEL),
    )


BOOTSTRAP_RESAMPLES = 4000
NORMAL_QUANTILE = 1.960
T_DEGREES = np.array([1, 2, 3, 4, 5, 6, 8, 10, 15, 30, np.inf])
T_QUANTILES = np.array(
    [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.306, 2.228, 2.131, 2.042, NORMAL_QUANTILE]
)
"""97.5 % points of Student's t at `T_DEGREES` degrees of freedom; the last is the normal's."""


@dataclass(frozen=True)
class Interval:
    """Mean and its 95 % interval; a single value has no interval."""

    mean: float
    low: float | None
    high: float | None

    @property
    def error_lengths(self) -> tuple[float, float]:
        """Distance of the interval's ends below and above the mean."""
        if self.low is None:
            return 0.0, 0.0
        # Rounding may put an end of equal values on the wrong side of the mean.
        return max(self.mean - self.low, 0.0), max(self.high - self.mean, 0.0)

    def __format__(self, sign: str) -> str:
        """Return `0.512 [0.480, 0.544]` or `0.512, no interval`; with "+", each number has its
        sign."""
        if self.low is None:
            return f"{self.mean:{sign}.3f}, no interval"
        return f"{self.mean:{sign}.3f} [{self.low:{sign}.3f}, {self.high:{sign}.3f}]"

    def __str__(self) -> str:
        return format(self)

    def to_dict(self) -> dict[str, float | None]:
        """Return the three numbers, rounded to four places."""
        return {
            name: None if value is None else round(value, 4) for name, value in asdict(self).items()
        }


def bootstrap_mean(
    values: np.ndarray, resamples: int = BOOTSTRAP_RESAMPLES, seed: int = 0
) -> Interval:
    """Return the mean of a table of any number of axes and its interval.

    Raises ValueError for a table that is empty or not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"a mean needs finite values, not a table of shape {values.shape} with gaps"
        )
    if values.size == 1:
        return Interval(float(values.mean()), None, None)

    # Frequency of each item of an axis in each resample, as its weight: (resamples, n) of each axis
    rng = np.random.default_rng(seed)
    weights = [rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n for n in values.shape]

    # The weighted mean of the whole table for each resample: "ab,Ra,Rb->R" for two axes
    axes = ascii_lowercase[: values.ndim]
    terms = ",".join(f"R{axis}" for axis in axes)
    means = np.einsum(f"{axes},{terms}->R", values, *weights, optimize=True)

    mean = values.mean()
    low, high = mean + compute_widening(values) * (np.percentile(means, (2.5, 97.5)) - mean)
    return Interval(float(mean), float(low), float(high))


def compute_widening(values: np.ndarray) -> float:
    """Return the factor that a percentile interval lacks for few items along each axis.

    It is at least 1, and 1.44 for six subjects.
    """
    # The variance of the mean by each axis, from the means of its items
    axes = [axis for axis, count in enumerate(values.shape) if count > 1]
    counts = np.array(values.shape)[axes]
    rows = [np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1) for axis in axes]
    variances = np.array([items.mean(1).var(ddof=1) for items in rows]) / counts
    if not variances.any():
        return 1.0

    # Satterthwaite's degrees of freedom, and the variance that resampling shows: (n - 1) / n of it
    degrees = variances.sum() ** 2 / (variances**2 / (counts - 1)).sum()
    resampled_variance = (variances * (counts - 1) / counts).sum()
    bias = float(np.sqrt(variances.sum() / resampled_variance))
    return compute_t_quantile(degrees) / NORMAL_QUANTILE * bias


def compute_t_quantile(degrees: float) -> float:
    """Return the 97.5 % point of Student's t; between tabulated degrees the larger side."""
    return float(np.interp(-1 / degrees, -1 / T_DEGREES, T_QUANTILES))


Vectors = TypeVar("Vectors", torch.Tensor, np.ndarray)
MIN_COPY_INDEX = 0.5
"""Fraction of the way from another photo to a photo itself, beyond which an image is a copy."""
MIN_ALARM_SHARE = 0.1
"""Fraction of copies among the images, beyond which the alarm is raised."""
SINGLE_PHOTO_SIMILARITY = 0.8
"""Cosine between photos that is assumed for a single one, which has no other to compare with."""
SINGLE_FACE_SIMILARITY = 0.6
"""Cosine between faces that is assumed for a single one."""


def subject_fidelity(generated: torch.Tensor, photos: torch.Tensor) -> torch.Tensor:
    """Return CLIP-I, DINO or, for the bare class, PRES: the mean cosine to all photos.

    generated (N, D), photos (P, D) -> (N,)
    """
    return (generated @ photos.T).mean(1)


def photo_fidelity(photos: torch.Tensor) -> float:
    """Return the mean cosine between different photos (P, D): the paper's row "Real Images".

    NaN for a single photo.
    """
    return float(compute_mutual_similarity(photos).mean())


def compute_mutual_similarity(photos: Vectors) -> Vectors:
    """Return the mean cosine of each photo, or of its face, to all others, (P, D) -> (P,).

    NaN for a single photo.
    """
    similarities = photos @ photos.T
    return (similarities.sum(1) - similarities.diagonal()) / (len(photos) - 1)


def prompt_fidelity(generated: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Return CLIP-T: generated (N, D) and the text of each without the token, (N, D) -> (N,)."""
    return (generated * texts).sum(1)


def diversity(vectors: torch.Tensor, count: int) -> np.ndarray:
    """Return DIV of each prompt: the mean of 1 - cosine over the pairs of its images.

    vectors (N, D), `count` (two or more) images of a prompt after each other -> (N / count, 1)
    """
    groups = vectors.double().reshape(-1, count, vectors.shape[-1])
    cosines = groups @ groups.mT
    rows, columns = torch.triu_indices(count, count, offset=1)
    return (1 - cosines[:, rows, columns]).mean(1, keepdim=True).numpy()


def drift(adapted: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Return 1 - cosine of the adapter's and base's `join_embeddings`, (N, D) -> (N,).

    Its scale is the base's `diversity`.
    """
    return 1 - (adapted * base).sum(1)


def join_embeddings(clip: torch.Tensor, dino: torch.Tensor) -> torch.Tensor:
    """Return CLIP (N, C) and DINO (N, D) as unit vectors (N, C + D).

    A copy is near in both, in subject and place.
    """
    return torch.cat([clip, dino], dim=1) / 2**0.5


def compute_photo_similarity(photos: torch.Tensor) -> float:
    """Return the mean over photos (P, D) of their largest cosine to another.

    An image as near as this is no copy yet.
    """
    if len(photos) < 2:
        return SINGLE_PHOTO_SIMILARITY
    similarities = (photos @ photos.T).fill_diagonal_(-1)
    return float(similarities.amax(1).mean())


def compute_copy_index(generated: torch.Tensor, photos: torch.Tensor) -> torch.Tensor:
    """Return (m - r)/(1 - r) of each image, (N, D) -> (N,).

    m is its largest cosine to a photo (P, D), r is `compute_photo_similarity`.
    """
    nearness = min(compute_photo_similarity(photos), 0.99)  # equal frames would divide by zero
    return ((generated @ photos.T).amax(1) - nearness) / (1 - nearness)


@dataclass(frozen=True)
class CopyAlarm:
    """Verdict on copies among generated images.

    share: fraction of images that are copies
    largest: largest copy index, of image number `picture` near photo number `photo`
    raised: whether `share` exceeds MIN_ALARM_SHARE
    """

    share: float
    largest: float
    picture: int
    photo: int
    raised: bool


def detect_copies(generated: torch.Tensor, photos: torch.Tensor) -> CopyAlarm:
    """Compare joint vectors of the generated images (N, D) with those of the photos (P, D)."""
    index = compute_copy_index(generated, photos)
    worst = int(index.argmax())
    share = float((index > MIN_COPY_INDEX).float().mean())
    nearest = int((generated[worst] @ photos.T).argmax())
    return CopyAlarm(
        share=share,
        largest=float(index[worst]),
        picture=worst,
        photo=nearest,
        raised=share > MIN_ALARM_SHARE,
    )


def compute_background_leak(
    generated: torch.Tensor, base: torch.Tensor, backgrounds: torch.Tensor
) -> torch.Tensor:
    """Return how much nearer to the photos' backgrounds images are than the base's, by CLIP's
    cosine.

    generated (N, D), base (N, D), backgrounds (P, D) -> (N,)
    """
    return subject_fidelity(generated, backgrounds) - subject_fidelity(base, backgrounds)


def confusion(
    generated: torch.Tensor, photos: torch.Tensor, other_photos: torch.Tensor
) -> torch.Tensor:
    """Return how far images of a subject went from its photos to another subject's.

    (N, D), (P, D), (Q, D) -> (N,)

        confusion(g) = (m_own - m(g)) / (m_own - m_other)
        m(g) = mean cos(g, own photos) - mean cos(g, other photos)

    m_own and m_other are m of the own photos and of the other's, each mean without the photo
    itself. 0: told apart as well as the photos; 1: like the other subject; 1/2: equally near to
    both, or to neither; below 0: told apart better than the photos. A single photo is assumed to be
    SINGLE_PHOTO_SIMILARITY near to itself.
    """
    # m_own = within_own - alike, m_other = alike - within_other
    alike = float((photos @ other_photos.T).mean())
    within_own = SINGLE_PHOTO_SIMILARITY if len(photos) < 2 else photo_fidelity(photos)
    within_other = (
        SINGLE_PHOTO_SIMILARITY if len(other_photos) < 2 else photo_fidelity(other_photos)
    )
    apart = max(within_own + within_other - 2 * alike, 0.01)  # equal series would divide by zero

    margin = subject_fidelity(generated, photos) - subject_fidelity(generated, other_photos)
    return (within_own - alike - margin) / apart


NO_STYLE_SCORE = (
    "the base's images are about as like the photos' style as the photos are to each other, "
    "so that noise would decide how far the images went"
)


def compute_style_share(
    generated: torch.Tensor, base: torch.Tensor, photos: torch.Tensor
) -> torch.Tensor | None:
    """Return how far images went from the base's style to the photos', (N,).

    generated, base, photos: style vectors (N, D), (M, D) and (P, D)

    0: as the base's images; 1: as like the photos as these are to each other. Returns None where
    the two ends differ by no more than they vary from image to image.
    """
    start = subject_fidelity(base, photos)
    end = compute_mutual_similarity(photos) if len(photos) > 1 else torch.ones(1)
    distance = end.mean() - start.mean()
    spread = (start.var(correction=0) + end.var(correction=0)).sqrt()
    if distance <= spread:
        return None
    return (subject_fidelity(generated, photos) - start.mean()) / distance


def find_leaked_things(
    generated: torch.Tensor, requested: torch.Tensor, things: torch.Tensor
) -> torch.Tensor:
    """Return the number of the thing that an image shows in place of what was prompted, (N,).

    generated: CLIP's vectors of images (N, D)
    requested: of the thing that each prompt names (N, D)
    things: of the things that may leak (T, D)

    -1 where the prompted thing is nearer than any other.
    """
    to_nearest, nearest = (generated @ things.T).max(1)
    to_requested = (generated * requested).sum(1)
    return torch.where(to_nearest > to_requested, nearest, -1)


def compute_identity(
    vectors: Sequence[np.ndarray | None], photos: np.ndarray, images_per_prompt: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean cosine of each image's face to the photos' faces, and which images have no
    face.

    vectors: unit vectors (D,) of N images' faces, None without one; images of a prompt after each
        other
    photos: unit vectors of the photos' faces (P, D)
    images_per_prompt: number of images of each prompt, S

    Returns the mean of each prompt with a face, (prompts with one, 1), and 1 for each image without
    a face, (N / S, S). An image without a face does not count in the mean.
    """
    likeness = [np.nan if face is None else float((photos @ face).mean()) for face in vectors]
    table = np.array(likeness).reshape(-1, images_per_prompt)
    missing = np.isnan(table)
    with_face = table[~missing.all(1)]
    means = np.nanmean(with_face, axis=1, keepdims=True) if len(with_face) else with_face[:, :1]
    return means, missing.astype(float)


def compute_face_likeness(
    identity: float, photo_identity: float, face_share: float, base_face_share: float
) -> float:
    """Return how much of a person's face the images show, in [0, 1].

    identity, photo_identity: mean cosine of images and of photos to the photos' faces
    face_share, base_face_share: share of images with a face, by adapter and base

    It is identity as a share of the photos' × face share as a share of the base's.
    """
    face_ratio = min(face_share / base_face_share, 1.0) if base_face_share > 0 else 1.0
    return min(max(identity, 0.0) / max(photo_identity, 0.01), 1.0) * face_ratio


def compute_checkpoint_score(
    fidelity: float, prompt: float, base_prompt: float, copied_share: float
) -> float:
    """Return fidelity × prompt / base_prompt (at most 1) × (1 - copied_share), in [0, 1].

    fidelity: DINO; for a person its mean with `compute_face_likeness`
    prompt, base_prompt: CLIP-T of adapter and base
    copied_share: fraction of images that are copies
    """
    prompt_ratio = min(prompt / base_prompt, 1.0) if base_prompt > 0 else 1.0
    return max(fidelity, 0.0) * max(prompt_ratio, 0.0) * (1 - copied_share)
