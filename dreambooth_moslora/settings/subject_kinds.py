"""Kinds of subjects: one row for each value of `--subject`, for captions, crops, prompts, scores.

A person is recognised by the face. DINO and CLIP also see the jacket and the room, so that likeness
by them alone is often that of a costume.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Config = Any
"""Stands for `settings.train_config.TrainConfig`, which imports this file."""

TRAITS = ("hair", "beard", "glasses", "make-up", "clothes")
"""Traits that a person may change from day to day. The word does not learn a trait that captions
describe."""

CLOTHES = (
    "wearing a red rain jacket",
    "wearing a black suit and a tie",
    "wearing a plain white t-shirt",
    "wearing a woollen hat and a scarf",
    "in a chef's uniform in a kitchen",
    "in medieval armour",
)
LIGHTS = (
    "in the light of a candle",
    "on the beach at sunset",
    "in a neon-lit street at night",
    "in bright midday sun in the desert",
    "in the fog of a forest",
)
PERSON_TEMPLATES = (
    *(f"a photo of a {{}} {clothes}" for clothes in CLOTHES),
    *(f"a photo of a {{}} {light}" for light in LIGHTS),
    "a close-up portrait of a {} with a grey background",
    "a head and shoulders portrait of a {} in an office",
    "a half-length photo of a {} in a library",
    "a full-body photo of a {} on a city street",
    "a photo of a {} far away in a field of snow",
)
"""Prompts that change a person's clothes, the light and the distance."""
PERSON_CONTEXTS = (
    "a close-up portrait of a {} in the light of a candle",
    "a photo of a {} wearing a red rain jacket",
    "a full-body photo of a {} on a city street",
    "a photo of a {} wearing a black suit on the beach",
)
STYLE_SUFFIX = " in {} style"
STYLE_CONTENTS = (
    "a photo of a sailing ship on the sea",
    "a photo of a cat on a sofa",
    "a photo of a city street at night",
    "a photo of an old man reading in a library",
    "a photo of a bowl of fruit on a table",
    "a photo of a steam locomotive on a bridge",
    "a photo of a woman in a field of sunflowers",
    "a photo of a lighthouse in a storm",
)
STYLE_TEMPLATES = tuple(content + STYLE_SUFFIX for content in STYLE_CONTENTS)
"""Prompts of a style: content that is hardly in its photos, then the style's name."""


@dataclass(frozen=True)
class SubjectKind:
    """Kind of subject, a value of `--subject`.

    summary: in the help, after the word
    is_style: whether it is a look of any content: it has a name and no class, and captions describe
        the content
    has_face: whether faces are found in photos and images, and compared
    class_word: is preserved; "" is the word that names the subject
    traits: captions leave them out unless `--describe` names them
    contexts: of a run's samples; () for the usual ones
    """

    summary: str
    is_style: bool = False
    has_face: bool = False
    class_word: str = ""
    traits: tuple[str, ...] = ()
    contexts: tuple[str, ...] = ()


SUBJECT_KINDS = {
    "thing": SubjectKind(summary="is known by its whole look"),
    "person": SubjectKind(
        summary=(
            "by the face, which crops show near and far, and scores compare (needs "
            "opencv-python-headless; YuNet and SFace come from the hub)"
        ),
        has_face=True,
        class_word="person",
        traits=TRAITS,
        contexts=PERSON_CONTEXTS,
    ),
    "style": SubjectKind(
        summary="by how things look, whatever they are; the word is its name",
        is_style=True,
        contexts=STYLE_TEMPLATES[:4],
    ),
}
"""By the value of `--subject`."""


def get_subject_kind(config: Config) -> SubjectKind:
    """Return the row of a run's one subject."""
    return SUBJECT_KINDS[config.subject]


def has_face_subject(subjects: Iterable[Config]) -> bool:
    """Return whether one of the runs with a single subject is of a person."""
    return any(get_subject_kind(subject).has_face for subject in subjects)


def list_omitted_traits(config: Config) -> tuple[str, ...]:
    """Return the traits of the subject that captions leave out, so that its word learns them."""
    return tuple(trait for trait in get_subject_kind(config).traits if trait not in config.describe)
