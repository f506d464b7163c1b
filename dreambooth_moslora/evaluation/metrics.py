"""What a DreamBooth user cares about, as pure functions of unit vectors.

DreamBooth (Ruiz et al., "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation",
CVPR 2023, arXiv 2208.12242, section 4.1 and 4.3) names five measures. With u·v the cosine of two unit vectors:

    CLIP-I  mean over generated g and photos p of  clip(g)·clip(p)
    DINO    the same with DINO's vectors, which tell two subjects of one class apart
    CLIP-T  mean over generated g and its prompt t of  clip(g)·clip(t)
    PRES    mean over pictures c of the class (no token) and photos p of  dino(c)·dino(p): lower is better, a
            high value means that every member of the class has become the subject
    DIV     mean distance between pictures of one prompt; the paper uses LPIPS, here 1 - dino·dino
            may replace it

Further measures are `drift` on prompts unrelated to the subject, `copy_index` against memorised photos,
`background_leak`, `confusion` of two subjects of one adapter, and the score that picks the best checkpoint.
Most functions return one value for each picture, so that intervals can be computed over prompts and seeds.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

import torch
from torch import Tensor

__all__ = [
    "CopyAlarm",
    "background_leak",
    "checkpoint_score",
    "confusion",
    "copy_alarm",
    "copy_index",
    "diversity",
    "drift",
    "joint_vectors",
    "photo_fidelity",
    "photo_nearness",
    "prior_preservation",
    "prompt_fidelity",
    "subject_fidelity",
]

Picture = TypeVar("Picture")

COPIED = 0.5
"""A picture counts as a copy if it is more than this fraction of the way from another photo to one photo itself."""
ALARM_SHARE = 0.1
"""The alarm is raised when more than this fraction of the pictures are copies."""
LONE_PHOTO_NEARNESS = 0.8
"""Nearness assumed for a single photo, which has nothing to be compared with."""


def subject_fidelity(generated: Tensor, photos: Tensor) -> Tensor:
    """CLIP-I or DINO: generated (N, D), photos (P, D) -> (N,), mean cosine of each picture to all photos."""
    return (generated @ photos.T).mean(1)


def photo_fidelity(photos: Tensor) -> float:
    """Mean cosine between different photos (P, D): the paper's row "Real Images". NaN for a single photo."""
    similarities = photos @ photos.T
    return float(similarities[~torch.eye(len(photos), dtype=torch.bool)].mean())


def prompt_fidelity(generated: Tensor, texts: Tensor) -> Tensor:
    """CLIP-T: generated (N, D) and the text of each without the token, (N, D) -> (N,)."""
    return (generated * texts).sum(1)


def prior_preservation(class_pictures: Tensor, photos: Tensor) -> Tensor:
    """PRES: DINO vectors of pictures of the bare class (N, D), of the photos (P, D) -> (N,). Lower is better."""
    return subject_fidelity(class_pictures, photos)


def cosine_distance(a: Tensor, b: Tensor) -> float:
    return float(1 - a @ b)


def diversity(
    pictures: Sequence[Picture],
    groups: Sequence[Hashable],
    distance: Callable[[Picture, Picture], float] = cosine_distance,
) -> dict[Hashable, float]:
    """DIV of each group (such as one prompt): the mean `distance` over all pairs in it. Higher is more diverse.

    `pictures` are unit vectors for the cosine distance, the pictures themselves for LPIPS. Groups of one have
    no pair and are left out.
    """
    members: dict[Hashable, list[Picture]] = {}
    for picture, group in zip(pictures, groups, strict=True):
        members.setdefault(group, []).append(picture)
    pairs = {group: list(combinations(some, 2)) for group, some in members.items()}
    return {g: sum(distance(a, b) for a, b in some) / len(some) for g, some in pairs.items() if some}


def drift(adapted: Tensor, base: Tensor) -> Tensor:
    """1 - cosine between adapter and base at equal prompt and seed: (N, D), (N, D) -> (N,). Zero means unchanged.

    The vectors are `joint_vectors`, which see the object and its place. Compare it with the base's `diversity`,
    the distance of its own pictures between seeds.
    """
    return 1 - (adapted * base).sum(1)


def joint_vectors(clip: Tensor, dino: Tensor) -> Tensor:
    """CLIP (N, C) and DINO (N, D) concatenated to unit vectors (N, C + D): their cosine is the mean of both cosines.

    DINO sees the subject in any place, CLIP sees place and light: only a copy is near a photo in both.
    """
    return torch.cat([clip, dino], dim=1) / 2**0.5


def photo_nearness(photos: Tensor) -> float:
    """The mean over photos (P, D) of their largest cosine to another photo.

    A picture of the subject may be this near to a photo without being a copy.
    """
    if len(photos) < 2:
        return LONE_PHOTO_NEARNESS
    similarities = (photos @ photos.T).fill_diagonal_(-1)
    return float(similarities.amax(1).mean())


def copy_index(generated: Tensor, photos: Tensor) -> Tensor:
    """(m - r)/(1 - r) of each picture (N, D) -> (N,); m is its largest cosine to a photo (P, D), r `photo_nearness`.

    0: no nearer to a photo than the photos are to each other; 1: it is the photo; negative: farther.
    """
    nearness = min(photo_nearness(photos), 0.99)  # equal frames would divide by zero
    return ((generated @ photos.T).amax(1) - nearness) / (1 - nearness)


@dataclass(frozen=True)
class CopyAlarm:
    """`share` of pictures that are copies, the `largest` index, which picture and which photo, and the verdict."""

    share: float
    largest: float
    picture: int
    photo: int
    raised: bool


def copy_alarm(generated: Tensor, photos: Tensor) -> CopyAlarm:
    """Judge joint vectors of the generated pictures (N, D) against those of the photos (P, D)."""
    index = copy_index(generated, photos)
    worst = int(index.argmax())
    share = float((index > COPIED).float().mean())
    nearest = int((generated[worst] @ photos.T).argmax())
    return CopyAlarm(share, float(index[worst]), worst, nearest, share > ALARM_SHARE)


def background_leak(generated: Tensor, base: Tensor, backgrounds: Tensor) -> Tensor:
    """How much nearer to the photos' backgrounds each picture is than the base's at equal prompt and seed, (N,).

    CLIP vectors: generated (N, D), base (N, D), the photos with the subject painted over (P, D). Zero is no
    leak.
    """
    return subject_fidelity(generated, backgrounds) - subject_fidelity(base, backgrounds)


def confusion(generated: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """How far pictures of a subject went from its own photos to another subject's: (N, D), (P, D), (Q, D) -> (N,).

        confusion(g) = (m_own - m(g)) / (m_own - m_other)        m(g) = mean cos(g, own) - mean cos(g, other)

    m_own and m_other are m of the own photos and of the other's, each mean without the photo itself. 0: told
    apart as well as the photos; 1: like the other subject; 1/2: equally near to both, or to neither; below 0:
    told apart better than the photos. A single photo is assumed to be LONE_PHOTO_NEARNESS near to itself.
    """
    alike = float((own @ other.T).mean())
    within = [LONE_PHOTO_NEARNESS if len(photos) < 2 else photo_fidelity(photos) for photos in (own, other)]
    margin = subject_fidelity(generated, own) - subject_fidelity(generated, other)
    apart = max(sum(within) - 2 * alike, 0.01)  # equal series would divide by zero
    return (within[0] - alike - margin) / apart


def checkpoint_score(fidelity: float, prompt: float, base_prompt: float, copied: float) -> float:
    """fidelity × prompt × no copy, in [0, 1]; it defines the best checkpoint.

    `fidelity` is DINO (negative values count as 0). `prompt` is CLIP-T relative to the base's on the same
    prompts, at most 1. `copied` is the fraction of copies.
    """
    kept = min(prompt / base_prompt, 1.0) if base_prompt > 0 else 1.0
    return max(fidelity, 0.0) * max(kept, 0.0) * (1 - copied)
