"""What is drawn to judge an adapter: fixed prompts from fixed seeds, by the adapter and by the base
alone.

subject    template with "token class"    by the adapter    fidelity, diversity, copies
base       template with the class alone  by the base       what the prompt gives without the subject
bare       the instance prompt            by the adapter    does it draw the subject without a place?
class      "a photo of a class"           by both           PRES: has the class become the subject?
unrelated  other things                   by both           drift
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.fixed_seeds import SampleRequest
from dreambooth_moslora.photos.photo_file import Photo
from dreambooth_moslora.settings import prompts, table, toys
from dreambooth_moslora.settings.prompts import Subject

TEMPLATE_SETS = {
    "object": prompts.DREAMBOOTH_OBJECT_TEMPLATES,
    "live": prompts.DREAMBOOTH_LIVE_TEMPLATES,
    "toy": toys.TEMPLATES,
}
LIVING = {
    "dog",
    "puppy",
    "cat",
    "kitten",
    "animal",
    "pet",
    "horse",
    "bird",
    "person",
    "man",
    "woman",
    "boy",
    "girl",
}
LIFELESS = {"stuffed", "plush", "toy", "statue", "figurine", "figure", "sculpture", "doll"}
UNRELATED = (
    "a bowl of fruit on a kitchen table",
    "a city street at night in the rain",
    "an old wooden boat on a mountain lake",
    "a portrait of an old man with a beard",
    "a field of sunflowers under a blue sky",
    "a steam locomotive crossing a bridge",
)


@dataclass(frozen=True)
class EvaluationPlan:
    subject: Subject
    templates: tuple[str, ...]  # with `{}` for the subject's words
    unrelated: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2, 3)  # of each prompt
    class_images: int = 16
    inference_steps: int = 25
    bare_prompt: str = ""

    def __post_init__(self) -> None:
        if (
            not self.templates
            or not self.seeds
            or any("{}" not in template for template in self.templates)
        ):
            raise UserError(
                "an evaluation needs seeds, and prompts that hold {} for the subject's words"
            )

    @property
    def class_word(self) -> str:
        return self.subject.class_word or "subject"

    @property
    def texts(self) -> list[str]:
        """The prompts without the token: CLIP-T's texts, and the base's prompts."""
        return [template.replace("{}", self.class_word) for template in self.templates]

    @property
    def subject_requests(self) -> list[SampleRequest]:
        return self._each(
            [template.replace("{}", self.subject.words) for template in self.templates]
        )

    @property
    def base_requests(self) -> list[SampleRequest]:
        return self._each(self.texts)

    @property
    def bare_requests(self) -> list[SampleRequest]:
        return self._each([self.bare_prompt] if self.bare_prompt else [])

    @property
    def class_requests(self) -> list[SampleRequest]:
        prompt = f"a photo of a {self.class_word}"
        return [SampleRequest(prompt, 1000 + number) for number in range(self.class_images)]

    @property
    def unrelated_requests(self) -> list[SampleRequest]:
        return self._each(list(self.unrelated))

    @property
    def prompts(self) -> list[str]:
        of_subject = self.subject_requests + self.base_requests + self.bare_requests
        return sorted(
            {
                request.prompt
                for request in of_subject + self.class_requests + self.unrelated_requests
            }
        )

    def _each(self, prompts: list[str]) -> list[SampleRequest]:
        return [SampleRequest(prompt, seed) for prompt in prompts for seed in self.seeds]

    def smaller(
        self,
        templates: int,
        seeds: int,
        class_images: int,
        unrelated: int,
        inference_steps: int | None = None,
    ) -> "EvaluationPlan":
        """A plan with fewer pictures, spread evenly over the templates, for scores during training."""
        fewer = {
            "templates": spread(self.templates, templates),
            "unrelated": spread(self.unrelated, unrelated),
        }
        fewer |= {"seeds": self.seeds[:seeds], "class_images": min(class_images, self.class_images)}
        return replace(self, **fewer, inference_steps=inference_steps or self.inference_steps)


def spread(items: Sequence[str], count: int) -> tuple[str, ...]:
    """`count` of the items at even distances, including the first."""
    count = min(count, len(items))
    return tuple(items[number * len(items) // count] for number in range(count))


def plan_for(
    base: str, subject: Subject, templates: str = "auto", captions: Collection[str] = (), **changes
) -> EvaluationPlan:
    """The full protocol for a subject: the toy world's places for `toy`, DreamBooth's 25 templates
    otherwise.

    `templates`: a name of TEMPLATE_SETS, or "auto", which distinguishes living things and objects
    (a stuffed animal is an object). Those whose place is in the photos' `captions` are left out, as
    a copy would score best there, unless no other is left. `changes` sets other fields. Raises
    UserError.
    """
    if templates == "auto":
        words = set(subject.class_word.lower().split())
        templates = (
            "toy"
            if toys.is_toy(base)
            else "live"
            if words & LIVING and not words & LIFELESS
            else "object"
        )
    if templates not in TEMPLATE_SETS:
        raise UserError(
            f"prompts {templates!r}: choose one of auto, {', '.join(TEMPLATE_SETS)}, or a text file"
        )
    known, unseen = " | ".join(captions).lower(), []
    for template in TEMPLATE_SETS[templates]:
        place = template.partition("{}")[2].strip().lower()
        if not place or place not in known:
            unseen.append(template)
    others = tuple(text.format(kind) for text, kind in toys.UNRELATED if kind != subject.class_word)
    unrelated = others if toys.is_toy(base) else UNRELATED
    return EvaluationPlan(subject, tuple(unseen) or TEMPLATE_SETS[templates], unrelated, **changes)


def plan_of_subject(
    subject: table.TrainConfig, photos: Iterable[Photo], templates: str = "auto", **changes
) -> EvaluationPlan:
    """`plan_for` a subject's settings and photos, with its instance prompt as the bare one. Raises
    UserError."""
    captions = [caption for photo in photos for caption in photo.captions]
    base, bare = subject.pretrained_model_name_or_path, subject.instance_prompt
    return plan_for(
        base, prompts.subject_of(subject), templates, captions, bare_prompt=bare, **changes
    )
