"""What a DreamBooth user cares about, as functions of unit vectors, with 95 % intervals of their
means.

CLIP and DINOv2 give the vectors, in fp32, so that a picture gets the same vector in any batch: by
default openai/clip-vit-large-patch14 and facebook/dinov2-base, for the embedded base the toy
world's own.

DreamBooth (Ruiz et al., CVPR 2023, arXiv 2208.12242, sections 4.1 and 4.3) names five measures.
With u·v the cosine:

    CLIP-I  mean over generated g and photos p of  clip(g)·clip(p)
    DINO    the same with DINO's vectors, which tell two subjects of one class apart
    CLIP-T  mean over generated g and its prompt t of  clip(g)·clip(t)
    PRES    mean over pictures c of the class (no token) and photos p of  dino(c)·dino(p):
            lower is better, a high value means that every member of the class has become the
            subject
    DIV     mean over pairs of pictures of one prompt of 1 - dino·dino

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

from dreambooth_moslora.disk.paths import public_name
from dreambooth_moslora.photos.faces import FaceReader, load_faces
from dreambooth_moslora.photos.pretrained import frozen, loaded
from dreambooth_moslora.settings import toy_bases
from dreambooth_moslora.settings.metric_kinds import CLIP, DINO

# Pictures or texts that are encoded at once
BATCH = 16
# How errors call a model of this module
FLAG = "the encoder"
# Of DINO, whose patches tell style
STYLE_LAYER = 2
# Most tokens of a text that CLIP reads
TOKENS = 77


@dataclass(frozen=True)
class Clip:
    """Both halves of a CLIP model as functions to vectors (N, P), with their preprocessing."""

    embed_images: Callable[[torch.Tensor], torch.Tensor]
    embed_texts: Callable[[Any], torch.Tensor]
    tokenizer: Any
    processor: Any


@dataclass(kw_only=True)
class DinoEncoder:
    """DINO, which looks at pictures, and its preprocessing."""

    dino: torch.nn.Module
    dino_processor: Any
    batch_size: int = BATCH

    def dino_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """N pictures of any size -> unit vectors (N, D) of the class token after the last layer
        norm, on the CPU."""

        def embed(pixels: torch.Tensor) -> torch.Tensor:
            return self.dino(pixel_values=pixels).last_hidden_state[:, 0]

        return self._images(images, self.dino_processor, embed)

    def style_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """N pictures of any size -> unit vectors (N, 2 D) of their style, on the CPU: mean and
        deviation of the patches' values in an early layer of DINO, which knows strokes and
        colours and not yet things."""

        def embed(pixels: torch.Tensor) -> torch.Tensor:
            layers = self.dino(pixel_values=pixels, output_hidden_states=True).hidden_states
            patches = layers[STYLE_LAYER][:, 1:]
            return torch.cat([patches.mean(1), patches.std(1)], dim=1)

        return self._images(images, self.dino_processor, embed)

    def _images(
        self, images: Sequence[Image.Image], processor: Any, embed: Callable
    ) -> torch.Tensor:
        def read(some: list[Image.Image]) -> torch.Tensor:
            rgb = [image.convert("RGB") for image in some]
            return processor(rgb, return_tensors="pt").pixel_values

        return self._vectors(images, read, embed)

    @torch.no_grad()
    def _vectors(
        self, items: Sequence, read: Callable[[list], Any], embed: Callable[[Any], torch.Tensor]
    ) -> torch.Tensor:
        """Unit vectors (N, P) on the CPU.

        items: N pictures or texts
        read: prepares a batch of them
        embed: a batch to vectors
        """
        found = []
        for start in range(0, len(items), self.batch_size):
            values = read(list(items[start : start + self.batch_size])).to(self.dino.device)
            found.append(normalize(embed(values).float(), dim=-1).cpu())
        return torch.cat(found)


@dataclass(kw_only=True)
class Encoders(DinoEncoder):
    """The models that look at pictures, and their preprocessing."""

    clip: Clip
    names: tuple[str, str] = ("clip", "dino")  # public ones, never paths
    faces: FaceReader | None = None  # for pictures of people

    def clip_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """N pictures of any size -> unit vectors (N, P), on the CPU."""
        return self._images(images, self.clip.processor, self.clip.embed_images)

    def clip_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """N texts -> unit vectors (N, P), on the CPU. Texts are cut at the model's 77 tokens."""
        read = partial(
            self.clip.tokenizer,
            padding=True,
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        )
        return self._vectors(texts, read, self.clip.embed_texts)


def load_encoders(
    base: str | Path = "",
    clip: str | Path = "",
    dino: str | Path = "",
    device: str | torch.device = "cpu",
    faces: bool = False,
) -> Encoders:
    """The toy world's encoders for the embedded base, else CLIP and DINOv2, or those named.

    base: its name
    clip, dino: a folder or an id of the hub; "" for the usual one
    device: of the models
    faces: whether faces are compared too

    Raises UserError for one that cannot be loaded.
    """
    is_toy = toy_bases.is_toy(base)
    reader = load_faces() if faces else None
    if reader:
        reader.load()

    # CLIP: the toy world's own is part of its base.
    if is_toy and not clip:
        towers = clip_in_pipeline(toy_bases.CLIP_FOLDER, device)
        clip_name = f"{toy_bases.CLIP_FOLDER.name} CLIP"
    else:
        clip = clip or CLIP
        towers = load_clip(clip, device)
        clip_name = public_name(clip)

    # DINO
    dino = dino or (toy_bases.DINO_FOLDER if is_toy else DINO)
    return Encoders(
        **vars(load_dino(dino, device)),
        clip=towers,
        names=(clip_name, public_name(dino)),
        faces=reader,
    )


def load_dino(name: str | Path = DINO, device: str | torch.device = "cpu") -> DinoEncoder:
    """DINO alone. Raises UserError."""
    return DinoEncoder(
        dino=frozen(transformers.AutoModel, name, FLAG, device, dtype=torch.float32),
        dino_processor=loaded(transformers.AutoImageProcessor, name, FLAG),
    )


def load_clip(name: str | Path, device: str | torch.device) -> Clip:
    """A CLIP model with both halves. Raises UserError."""
    # Its output of either half is not projected yet.
    model = frozen(transformers.CLIPModel, name, FLAG, device, dtype=torch.float32)

    def embed_images(pixels: torch.Tensor) -> torch.Tensor:
        return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)

    def embed_texts(words: Any) -> torch.Tensor:
        read = model.text_model(words.input_ids, words.attention_mask)
        return model.text_projection(read.pooler_output)

    return Clip(
        embed_images=embed_images,
        embed_texts=embed_texts,
        tokenizer=loaded(transformers.CLIPTokenizer, name, FLAG),
        processor=loaded(transformers.CLIPImageProcessor, name, FLAG),
    )


def clip_in_pipeline(folder: Path, device: str | torch.device) -> Clip:
    """The CLIP of a pipeline's folder: its image encoder, and its second text encoder."""
    # Its two halves lie in folders of their own, as parts of the pipeline.
    vision = frozen(
        transformers.CLIPVisionModelWithProjection,
        folder / "image_encoder",
        FLAG,
        device,
        dtype=torch.float32,
    )
    text = frozen(
        transformers.CLIPTextModelWithProjection,
        folder / "text_encoder_2",
        FLAG,
        device,
        dtype=torch.float32,
    )

    def embed_images(pixels: torch.Tensor) -> torch.Tensor:
        return vision(pixel_values=pixels).image_embeds

    def embed_texts(words: Any) -> torch.Tensor:
        return text(words.input_ids, attention_mask=words.attention_mask).text_embeds

    return Clip(
        embed_images=embed_images,
        embed_texts=embed_texts,
        tokenizer=loaded(transformers.CLIPTokenizer, folder / "tokenizer_2", FLAG),
        processor=loaded(transformers.CLIPImageProcessor, folder / "feature_extractor", FLAG),
    )


# Of the bootstrap
RESAMPLES = 4000
# The 97.5 % points of the normal distribution, and of Student's t with so many degrees of freedom
NORMAL = 1.960
DEGREES = np.array([1, 2, 3, 4, 5, 6, 8, 10, 15, 30, np.inf])
STUDENT = np.array([12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.306, 2.228, 2.131, 2.042, NORMAL])


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval; a single value has none."""

    mean: float
    low: float | None
    high: float | None

    @property
    def reach(self) -> tuple[float, float]:
        """How far the interval goes below the mean and above it."""
        if self.low is None:
            return 0.0, 0.0
        # Of equal values the ends are the mean but for rounding.
        return max(self.mean - self.low, 0.0), max(self.high - self.mean, 0.0)

    def __format__(self, sign: str) -> str:
        """`0.512 [0.480, 0.544]` or `0.512, no interval`; with "+", each number has its sign."""
        if self.low is None:
            return f"{self.mean:{sign}.3f}, no interval"
        return f"{self.mean:{sign}.3f} [{self.low:{sign}.3f}, {self.high:{sign}.3f}]"

    def __str__(self) -> str:
        return format(self)

    def to_dict(self) -> dict[str, float | None]:
        """The three numbers, rounded to four places."""
        found = {}
        for name, value in asdict(self).items():
            found[name] = None if value is None else round(value, 4)
        return found


def bootstrap_mean(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean of a table of any number of axes and its interval. Raises ValueError when empty or
    not finite."""
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"a mean needs finite values, not a table of shape {values.shape} with gaps"
        )
    if values.size == 1:
        return Interval(float(values.mean()), None, None)

    # How often each item of an axis is drawn, as its weight: (resamples, n) of each axis
    rng = np.random.default_rng(seed)
    weights = [rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n for n in values.shape]

    # The weighted mean of the whole table for each resample: "ab,Ra,Rb->R" for two axes
    axes = ascii_lowercase[: values.ndim]
    terms = ",".join(f"R{axis}" for axis in axes)
    means = np.einsum(f"{axes},{terms}->R", values, *weights, optimize=True)

    mean = values.mean()
    low, high = mean + widening(values) * (np.percentile(means, (2.5, 97.5)) - mean)
    return Interval(float(mean), float(low), float(high))


def widening(values: np.ndarray) -> float:
    """The factor that a percentile interval lacks for few items along each axis: at least 1, 1.44
    for six subjects."""
    # The variance of the mean by each axis, from the means of its items
    variances = []
    counts = []
    for axis, count in enumerate(values.shape):
        if count < 2:
            continue
        others = tuple(other for other in range(values.ndim) if other != axis)
        variances.append(values.mean(axis=others).var(ddof=1) / count)
        counts.append(count)
    variances = np.array(variances)
    counts = np.array(counts)
    if not variances.any():
        return 1.0

    # Satterthwaite's degrees of freedom, and the variance that resampling shows: (n - 1) / n of it
    degrees = variances.sum() ** 2 / (variances**2 / (counts - 1)).sum()
    shown = (variances * (counts - 1) / counts).sum()
    return student(degrees) / NORMAL * float(np.sqrt(variances.sum() / shown))


def student(degrees: float) -> float:
    """The 97.5 % point of Student's t. Between tabulated degrees it errs to the wide side."""
    return float(np.interp(-1 / degrees, -1 / DEGREES, STUDENT))


Vectors = TypeVar("Vectors", torch.Tensor, np.ndarray)
# A copy is more than this fraction of the way from another photo to one photo itself
COPIED = 0.5
# The alarm is raised when more than this fraction of the pictures are copies
ALARM_SHARE = 0.1
# Nearness assumed for a single photo, which has nothing to be compared with, and of its face
LONE_PHOTO_NEARNESS = 0.8
LONE_FACE_LIKENESS = 0.6


def subject_fidelity(generated: torch.Tensor, photos: torch.Tensor) -> torch.Tensor:
    """CLIP-I, DINO or (of the bare class) PRES: (N, D), photos (P, D) -> (N,), mean cosine to all
    photos."""
    return (generated @ photos.T).mean(1)


def photo_fidelity(photos: torch.Tensor) -> float:
    """Mean cosine between different photos (P, D): the paper's row "Real Images". NaN for a single
    photo."""
    return float(likeness_to_others(photos).mean())


def likeness_to_others(photos: Vectors) -> Vectors:
    """The mean cosine of each photo, or of its face, to the others, (P, D) -> (P,). NaN for a
    single photo."""
    similarities = photos @ photos.T
    return (similarities.sum(1) - similarities.diagonal()) / (len(photos) - 1)


def prompt_fidelity(generated: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """CLIP-T: generated (N, D) and the text of each without the token, (N, D) -> (N,)."""
    return (generated * texts).sum(1)


def diversity(vectors: torch.Tensor, count: int) -> np.ndarray:
    """DIV of each prompt: the mean of 1 - cosine over the pairs of its pictures. (N, D), `count`
    (two or more) pictures of a prompt after each other -> (N / count, 1)."""
    groups = vectors.double().reshape(-1, count, vectors.shape[-1])
    cosines = groups @ groups.mT
    one, other = torch.triu_indices(count, count, offset=1)
    return (1 - cosines[:, one, other]).mean(1, keepdim=True).numpy()


def drift(adapted: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """1 - cosine of the adapter's and base's `joint_vectors` (N, D) -> (N,); the base's `diversity`
    is its scale."""
    return 1 - (adapted * base).sum(1)


def joint_vectors(clip: torch.Tensor, dino: torch.Tensor) -> torch.Tensor:
    """CLIP (N, C) and DINO (N, D) as unit vectors (N, C + D): a copy is near in both, subject and
    place."""
    return torch.cat([clip, dino], dim=1) / 2**0.5


def photo_nearness(photos: torch.Tensor) -> float:
    """The mean over photos (P, D) of their largest cosine to another; a picture this near is no
    copy yet."""
    if len(photos) < 2:
        return LONE_PHOTO_NEARNESS
    similarities = (photos @ photos.T).fill_diagonal_(-1)
    return float(similarities.amax(1).mean())


def copy_index(generated: torch.Tensor, photos: torch.Tensor) -> torch.Tensor:
    """(m - r)/(1 - r) of each picture (N, D) -> (N,): m its largest cosine to a photo (P, D), r
    `photo_nearness`."""
    nearness = min(photo_nearness(photos), 0.99)  # equal frames would divide by zero
    return ((generated @ photos.T).amax(1) - nearness) / (1 - nearness)


@dataclass(frozen=True)
class CopyAlarm:
    """`share` of pictures that are copies, the `largest` index, which picture and which photo, and
    the verdict."""

    share: float
    largest: float
    picture: int
    photo: int
    raised: bool


def copy_alarm(generated: torch.Tensor, photos: torch.Tensor) -> CopyAlarm:
    """Judge joint vectors of the generated pictures (N, D) against those of the photos (P, D)."""
    index = copy_index(generated, photos)
    worst = int(index.argmax())
    share = float((index > COPIED).float().mean())
    nearest = int((generated[worst] @ photos.T).argmax())
    return CopyAlarm(
        share=share,
        largest=float(index[worst]),
        picture=worst,
        photo=nearest,
        raised=share > ALARM_SHARE,
    )


def background_leak(
    generated: torch.Tensor, base: torch.Tensor, backgrounds: torch.Tensor
) -> torch.Tensor:
    """How much nearer to the photos' backgrounds (P, D) in CLIP pictures (N, D) are than the base's
    (N, D): (N,)."""
    return subject_fidelity(generated, backgrounds) - subject_fidelity(base, backgrounds)


def confusion(generated: torch.Tensor, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """How far pictures of a subject went from its own photos to another subject's: (N, D), (P, D),
    (Q, D) -> (N,).

        confusion(g) = (m_own - m(g)) / (m_own - m_other)
        m(g) = mean cos(g, own) - mean cos(g, other)

    m_own and m_other are m of the own photos and of the other's, each mean without the photo
    itself. 0: told apart as well as the photos; 1: like the other subject; 1/2: equally near to
    both, or to neither; below 0: told apart better than the photos. A single photo is assumed to be
    LONE_PHOTO_NEARNESS near to itself.
    """
    # m of the own photos is within_own - alike, that of the other's alike - within_other.
    alike = float((own @ other.T).mean())
    within_own = LONE_PHOTO_NEARNESS if len(own) < 2 else photo_fidelity(own)
    within_other = LONE_PHOTO_NEARNESS if len(other) < 2 else photo_fidelity(other)
    apart = max(within_own + within_other - 2 * alike, 0.01)  # equal series would divide by zero

    margin = subject_fidelity(generated, own) - subject_fidelity(generated, other)
    return (within_own - alike - margin) / apart


NO_STYLE_SCORE = (
    "the base's pictures are about as like the photos' style as the photos are to each other, "
    "so that noise would decide how far the pictures went"
)
"""Why a style has no score."""


def style_share(
    generated: torch.Tensor, base: torch.Tensor, photos: torch.Tensor
) -> torch.Tensor | None:
    """Return how far pictures went from the base's style to the photos': 0: as the base's; 1: as
    like the photos as these are to each other.

    generated, base, photos: style vectors (N, D), (M, D) and (P, D)

    Returns (N,); None where the two ends differ by no more than they vary from picture to picture.
    """
    start = subject_fidelity(base, photos)
    end = likeness_to_others(photos) if len(photos) > 1 else torch.ones(1)
    distance = end.mean() - start.mean()
    spread = (start.var(correction=0) + end.var(correction=0)).sqrt()
    if distance <= spread:
        return None
    return (subject_fidelity(generated, photos) - start.mean()) / distance


def leaked_things(
    generated: torch.Tensor, asked: torch.Tensor, things: torch.Tensor
) -> torch.Tensor:
    """Which thing a picture shows in place of what was asked for: CLIP's vectors of pictures (N,
    D), of what each was asked for (N, D) and of the things (T, D) -> (N,), the number of the
    nearest thing; -1 where what was asked for is nearer."""
    to_things, nearest = (generated @ things.T).max(1)
    own = (generated * asked).sum(1)
    return torch.where(to_things > own, nearest, -1)


def identity(
    vectors: Sequence[np.ndarray | None], photos: np.ndarray, of_each: int
) -> tuple[np.ndarray, np.ndarray]:
    """The mean cosine of each picture's face to the photos' faces, and where none was found.

    vectors: unit vectors (D,) of N pictures' faces, None without one; `of_each` of a prompt after
        each other
    photos: those of the photos' faces (P, D)

    Returns the mean of each prompt that shows a face, (prompts with one, 1), and 1 for each picture
    without one, (N / of_each, of_each). A picture without a face says nothing of whose it is.
    """
    likeness = [np.nan if one is None else float((photos @ one).mean()) for one in vectors]
    table = np.array(likeness).reshape(-1, of_each)
    missing = np.isnan(table)
    seen = table[~missing.all(1)]
    means = np.nanmean(seen, axis=1, keepdims=True) if len(seen) else seen[:, :1]
    return means, missing.astype(float)


def face_likeness(identity: float, of_photos: float, shown: float, base_shown: float) -> float:
    """How much of a person's face the pictures show, in [0, 1]: `identity` as a share of the
    photos' own, × the share of pictures with a face, as a share of the base's at the same
    prompts."""
    kept = min(shown / base_shown, 1.0) if base_shown > 0 else 1.0
    return min(max(identity, 0.0) / max(of_photos, 0.01), 1.0) * kept


def checkpoint_score(fidelity: float, prompt: float, base_prompt: float, copied: float) -> float:
    """fidelity (DINO; of a person its mean with `face_likeness`) × prompt (CLIP-T to the base's, at
    most 1) × (1 - fraction `copied`), in [0, 1]."""
    kept = min(prompt / base_prompt, 1.0) if base_prompt > 0 else 1.0
    return max(fidelity, 0.0) * max(kept, 0.0) * (1 - copied)
