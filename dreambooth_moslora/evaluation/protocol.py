"""Plan of an evaluation: fixed prompts from fixed seeds, by the adapter and by the base alone.

subject    template with "token class"    adapter  fidelity, diversity, copies
base       template with the class alone  base     what the prompt gives without the subject
bare       the instance prompt            adapter  does it show the subject without a place?
class      "a photo of a class"           both     PRES: has the class become the subject?
unrelated  other things                   both     drift
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.sampling import SampleRequest
from dreambooth_moslora.photos.photo_file import Photo
from dreambooth_moslora.settings import prompts, subject_kinds, toy_bases, train_config
from dreambooth_moslora.settings.prompts import SubjectWords

TEMPLATE_SETS = {
    "object": prompts.DREAMBOOTH_OBJECT_TEMPLATES,
    "live": prompts.DREAMBOOTH_LIVE_TEMPLATES,
    "person": subject_kinds.PERSON_TEMPLATES,
    "toy": toy_bases.PLACE_TEMPLATES,
    "style": subject_kinds.STYLE_TEMPLATES,
    "toy_style": prompts.TOY_STYLE_TEMPLATES,
}
"""Value of `--prompts` -> prompts with `{}` for the subject's trigger words."""
LIVING_WORDS = {"dog", "puppy", "cat", "kitten", "animal", "pet", "horse", "bird"}
LIVING_WORDS |= {"person", "man", "woman", "boy", "girl"}
LIFELESS_WORDS = {"stuffed", "plush", "toy", "statue", "figurine", "figure", "sculpture", "doll"}
"""A class with one of LIVING_WORDS is alive, unless it also has one of LIFELESS_WORDS."""
UNRELATED_PROMPTS = (
    "a bowl of fruit on a kitchen table",
    "a city street at night in the rain",
    "an old wooden boat on a mountain lake",
    "a portrait of an old man with a beard",
    "a field of sunflowers under a blue sky",
    "a steam locomotive crossing a bridge",
)


@dataclass(frozen=True)
class EvaluationPlan:
    """Prompts, seeds and steps for one subject. Raises UserError without seeds or usable
    templates."""

    subject: SubjectWords
    templates: tuple[str, ...]  # with `{}` for the trigger words
    unrelated: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2, 3)  # of each prompt
    class_images: int = 16
    inference_steps: int = 25
    bare_prompt: str = ""
    is_style: bool = False
    things: tuple[str, ...] = ()  # in a style's images, as their captions say
    ending: str = ""  # of the subject's prompts, not of the base's

    def __post_init__(self) -> None:
        has_gaps = bool(self.templates) and all("{}" in template for template in self.templates)
        if not has_gaps or not self.seeds:
            raise UserError(
                "an evaluation needs seeds, and prompts that hold {} for the subject's words"
            )

    @property
    def class_word(self) -> str:
        return self.subject.class_word or "subject"

    @property
    def texts(self) -> list[str]:
        """Prompts without the token: CLIP-T's texts, and the base's prompts."""
        templates = [
            template.replace(subject_kinds.STYLE_SUFFIX, "") for template in self.templates
        ]
        return [template.replace("{}", self.class_word) for template in templates]

    @property
    def subject_requests(self) -> list[SampleRequest]:
        trigger_words = self.subject.trigger_words
        texts = [template.replace("{}", trigger_words) for template in self.templates]
        return self._build_requests([text + self.ending for text in texts])

    @property
    def base_requests(self) -> list[SampleRequest]:
        return self._build_requests(self.texts)

    @property
    def bare_requests(self) -> list[SampleRequest]:
        return self._build_requests([self.bare_prompt] if self.bare_prompt else [])

    @property
    def class_requests(self) -> list[SampleRequest]:
        # Seeds that the templates do not have
        prompt = f"a photo of a {self.class_word}"
        return [SampleRequest(prompt, 1000 + number) for number in range(self.class_images)]

    @property
    def unrelated_requests(self) -> list[SampleRequest]:
        return self._build_requests(list(self.unrelated))

    @property
    def prompts(self) -> list[str]:
        """Prompts of all requests, each once."""
        requests = [
            *self.subject_requests,
            *self.base_requests,
            *self.bare_requests,
            *self.class_requests,
            *self.unrelated_requests,
        ]
        return sorted({request.prompt for request in requests})

    def _build_requests(self, prompts: list[str]) -> list[SampleRequest]:
        return [SampleRequest(prompt, seed) for prompt in prompts for seed in self.seeds]

    def reduce_plan(
        self,
        templates: int,
        seeds: int,
        class_images: int,
        unrelated: int,
        inference_steps: int | None = None,
    ) -> "EvaluationPlan":
        """Return a plan with fewer images, for scores during training.

        templates, unrelated: number of prompts, spread evenly
        seeds: number of seeds, the first ones
        class_images: at most
        inference_steps: of each image; None keeps the plan's
        """
        return replace(
            self,
            templates=pick_evenly(self.templates, templates),
            unrelated=pick_evenly(self.unrelated, unrelated),
            seeds=self.seeds[:seeds],
            class_images=min(class_images, self.class_images),
            inference_steps=inference_steps or self.inference_steps,
        )


def pick_evenly(items: Sequence[str], count: int) -> tuple[str, ...]:
    """Return `count` of the items at even distances, including the first."""
    count = min(count, len(items))
    return tuple(items[number * len(items) // count] for number in range(count))


def build_plan(
    base: str,
    subject: SubjectWords,
    templates: str = "auto",
    captions: Collection[str] = (),
    **changes,
) -> EvaluationPlan:
    """Return the full plan for a subject.

    base: its name
    subject: its token and class
    templates: a name of TEMPLATE_SETS, or "auto": the toy world's places for `toy`, else one of
        DreamBooth's sets of 25, for living things or objects (a stuffed animal is an object)
    captions: of the photos. Templates whose place is in them are left out, as a copy would score
        best there, unless no other is left
    changes: other fields of the plan

    Raises UserError for unknown templates.
    """
    if templates == "auto":
        templates = choose_templates(base, subject)
    if templates not in TEMPLATE_SETS:
        names = ", ".join(TEMPLATE_SETS)
        raise UserError(f"prompts {templates!r}: choose one of auto, {names}, or a text file")

    # Templates of places that the photos do not show
    all_captions = " | ".join(captions).lower()
    settings = {text: text.partition("{}")[2].strip().lower() for text in TEMPLATE_SETS[templates]}
    unseen = [text for text, place in settings.items() if not place or place not in all_captions]

    # Unrelated things; in the toy world these are other toys.
    unrelated = UNRELATED_PROMPTS
    if toy_bases.is_toy(base):
        unrelated = tuple(
            text.format(toy)
            for text, toy in toy_bases.UNRELATED_PROMPTS
            if toy != subject.class_word
        )
    return EvaluationPlan(
        subject=subject,
        templates=tuple(unseen) or TEMPLATE_SETS[templates],
        unrelated=unrelated,
        **changes,
    )


def choose_templates(base: str, subject: SubjectWords) -> str:
    """Return the name of the templates that suit the subject."""
    if toy_bases.is_toy(base):
        return "toy"
    class_words = set(subject.class_word.lower().split())
    return "live" if class_words & LIVING_WORDS and not class_words & LIFELESS_WORDS else "object"


def build_subject_plan(
    subject: train_config.TrainConfig, photos: Iterable[Photo], templates: str = "auto", **changes
) -> EvaluationPlan:
    """Return the plan of a subject's settings and photos, with its instance prompt as the bare one.

    Raises UserError for unknown templates.
    """
    base = subject.pretrained_model_name_or_path
    captions = [caption for photo in photos for caption in photo.captions]

    # A style is shown on other content, and has no class.
    kind = subject_kinds.get_subject_kind(subject)
    if kind.is_style:
        changes |= {"is_style": True, "class_images": 0, "things": collect_nouns(captions)}
        captions = []
        if templates == "auto":
            templates = "toy_style" if toy_bases.is_toy(base) else "style"

    # Some kinds of subjects have their own templates, but not in the toy world.
    if templates == "auto" and subject.subject in TEMPLATE_SETS and not toy_bases.is_toy(base):
        templates = subject.subject
    return build_plan(
        base,
        prompts.parse_subject(subject),
        templates,
        captions,
        bare_prompt=subject.instance_prompt,
        **changes,
    )


def collect_nouns(captions: Iterable[str]) -> tuple[str, ...]:
    """Return the things that captions name, each once: `a red duck on grass in ink style` -> `red
    duck`."""
    nouns = map(prompts.parse_noun, captions)
    return tuple(dict.fromkeys(noun for noun in nouns if noun and noun != "picture"))
