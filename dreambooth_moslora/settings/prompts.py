"""Prompts: their token and class, those of samples, and the evaluation templates.

The DreamBooth templates are the 25 for objects and the 25 for animals of Ruiz et al. 2023 (arXiv
2208.12242, google/dreambooth). `{}` stands for "token class", or for the class alone.
"""

import re
from dataclasses import dataclass
from itertools import combinations, islice

from dreambooth_moslora.settings import subject_kinds, toy_bases
from dreambooth_moslora.settings.train_config import TrainConfig

PLACES = (
    "in the jungle",
    "in the snow",
    "on the beach",
    "on a cobblestone street",
    "on top of pink fabric",
    "on top of a wooden floor",
    "with a city in the background",
    "with a mountain in the background",
    "with a blue house in the background",
    "on top of a purple rug in a forest",
)
OBJECT_PLACES = (
    "with a wheat field in the background",
    "with a tree and autumn leaves in the background",
    "with the Eiffel Tower in the background",
    "floating on top of water",
    "floating in an ocean of milk",
    "on top of green grass with sunflowers around it",
    "on top of a mirror",
    "on top of the sidewalk in a crowded street",
    "on top of a dirt road",
    "on top of a white rug",
)
OUTFITS = (
    "wearing a red hat",
    "wearing a santa hat",
    "wearing a rainbow scarf",
    "wearing a black top hat and a monocle",
    "in a chef outfit",
    "in a firefighter outfit",
    "in a police outfit",
    "wearing pink glasses",
    "wearing a yellow shirt",
    "in a purple wizard outfit",
)
SUBJECT_LOOKS = ("red", "purple", "shiny", "wet", "cube shaped")
DREAMBOOTH_OBJECT_TEMPLATES = (
    *(f"a {{}} {p}" for p in PLACES + OBJECT_PLACES),
    *(f"a {look} {{}}" for look in SUBJECT_LOOKS),
)
DREAMBOOTH_LIVE_TEMPLATES = (
    *(f"a {{}} {p}" for p in PLACES + OUTFITS),
    *(f"a {look} {{}}" for look in SUBJECT_LOOKS),
)
PROMPT_OPENING = re.compile(
    r"^(?:(?:an?|the|this)\s+)?(?:photo|picture|photograph|image|painting|drawing)s?\s+of\s+", re.I
)
PROMPT_ARTICLE = re.compile(r"^(?:an?|the|one|my)\s+", re.I)
PROMPT_CONTEXT = re.compile(
    r"\s(?:in|on|at|with|near|under|beside|by|over|wearing|floating|from)\s.*$|[,.;].*$", re.I
)
"""Parts of a prompt around the subject: opening, article, and context."""
STYLE_NAME = re.compile(r"\bin (?:the )?(.+?) style\b")
CONTEXT_PLACES = ("on the beach", "in the snow", "with a city in the background", "in the jungle")
CONTEXT_TEMPLATES = tuple(f"a {{}} {place}" for place in CONTEXT_PLACES)
"""Prompts of a run's samples."""
TOY_STYLE_TEMPLATES = tuple(
    text.format(kind) + subject_kinds.STYLE_SUFFIX for text, kind in toy_bases.UNRELATED_PROMPTS
)
"""Prompts of a style's samples: content that is not in its photos."""
MAX_PAIRS = 6
"""Most pairs of subjects in a run's samples."""


@dataclass(frozen=True)
class SubjectWords:
    """Token, class word and both: `a photo of sks dog` -> `sks`, `dog`, `sks dog`. Each may be
    empty."""

    token: str
    class_word: str

    @property
    def trigger_words(self) -> str:
        return f"{self.token} {self.class_word}".strip()


def parse_subject(config: TrainConfig) -> SubjectWords:
    """Return a run's one subject: from its settings, else from its prompts.

    The token is what the instance prompt has before the class, and the class prompt tells where it
    ends.
    """
    token = (config.token or "").strip()
    # A style has a name and no class.
    if subject_kinds.get_subject_kind(config).is_style:
        match = STYLE_NAME.search(config.instance_prompt)
        style_name = match[1] if match else config.instance_prompt
        return SubjectWords(token=token or style_name, class_word="")

    noun = " ".join(parse_noun(config.instance_prompt).split())
    kind = " ".join(parse_noun(config.class_prompt or "").split())
    if token:
        # The class is the part of the instance prompt after the token.
        match = compile_word_pattern(token).search(config.instance_prompt)
        class_word = parse_noun(config.instance_prompt[match.end() :]) if match else ""
    elif kind and f" {noun}".endswith(f" {kind}"):
        # The class prompt tells where the token ends.
        token = noun.removesuffix(kind).strip()
        class_word = kind
    else:
        # Without a class prompt, the first word is the token.
        token, _, class_word = noun.partition(" ")
    if config.class_word is not None:
        class_word = config.class_word
    return SubjectWords(token=token, class_word=class_word)


def parse_noun(prompt: str) -> str:
    """Return `sks dog` of `A photo of a sks dog on the beach`."""
    for pattern in (PROMPT_OPENING, PROMPT_ARTICLE, PROMPT_CONTEXT):
        prompt = pattern.sub("", prompt.strip())
    return prompt.strip()


def get_class_word(config: TrainConfig) -> str:
    """Return the class word, of the first subject if there are several."""
    return parse_subject(config.each_subject[0]).class_word


def list_trigger_words(config: TrainConfig) -> tuple[str, ...]:
    return tuple(
        trigger_words
        for subject in config.each_subject
        if (trigger_words := parse_subject(subject).trigger_words)
    )


def compile_word_pattern(word: str) -> re.Pattern:
    """Return a pattern for the word, but not inside a longer one."""
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)")


def join_caption(*parts: str) -> str:
    """Join parts of a caption by spaces, but without a space before a comma."""
    return " ".join(filter(None, parts)).replace(" ,", ",")


def list_validation_prompts(config: TrainConfig) -> tuple[str, ...]:
    """Return the prompts of the sample images of all subjects, each once."""
    prompts: list[str] = []
    for subject in config.each_subject:
        prompts += subject.validation_prompt or [subject.instance_prompt]
    return tuple(dict.fromkeys(prompts))


def list_context_prompts(config: TrainConfig) -> tuple[str, ...]:
    """Return prompts with new contexts for each subject, beyond the photos, then pairs of
    subjects."""
    is_toy = toy_bases.is_toy(config.pretrained_model_name_or_path)
    prompts = []
    for subject in config.each_subject:
        kind = subject_kinds.get_subject_kind(subject)
        templates = kind.contexts or CONTEXT_TEMPLATES
        if is_toy:
            templates = TOY_STYLE_TEMPLATES[:4] if kind.is_style else toy_bases.CONTEXT_TEMPLATES
        name = parse_subject(subject).trigger_words or subject.instance_prompt
        prompts += [template.format(name) for template in templates if name]
    return (*prompts, *list_pair_prompts(config))


def list_pair_prompts(config: TrainConfig) -> tuple[str, ...]:
    """Return prompts with two subjects, for the first MAX_PAIRS pairs; none for one subject."""
    pairs = combinations(list_trigger_words(config), 2)
    return tuple(
        f"a photo of a {first} and a {second}" for first, second in islice(pairs, MAX_PAIRS)
    )
