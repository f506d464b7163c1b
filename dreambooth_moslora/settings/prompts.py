"""Prompts: their token and class, what to draw during training, and the evaluation templates.

The DreamBooth templates are the 25 for objects and the 25 for animals of Ruiz et al. 2023 (arXiv
2208.12242, google/dreambooth). `{}` stands for "token class", or for the class alone.
"""

import re
from dataclasses import dataclass
from itertools import combinations, islice

from dreambooth_moslora.settings import subject_kinds, toy_bases
from dreambooth_moslora.settings.train_config import TrainConfig

# What the templates are made of: places for both, more places for objects, outfits for animals.
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
# What a prompt has around the subject: how it opens, the article, and the context behind it.
PROMPT_OPENING = re.compile(
    r"^(?:(?:an?|the|this)\s+)?(?:photo|picture|photograph|image|painting|drawing)s?\s+of\s+", re.I
)
PROMPT_ARTICLE = re.compile(r"^(?:an?|the|one|my)\s+", re.I)
PROMPT_CONTEXT = re.compile(
    r"\s(?:in|on|at|with|near|under|beside|by|over|wearing|floating|from)\s.*$|[,.;].*$", re.I
)
STYLE_NAME = re.compile(r"\bin (?:the )?(.+?) style\b")  # How a prompt names a style
# The words of a run's samples.
CONTEXT_PLACES = ("on the beach", "in the snow", "with a city in the background", "in the jungle")
CONTEXT_TEMPLATES = tuple(f"a {{}} {place}" for place in CONTEXT_PLACES)
# A style is drawn on things that it does not know.
TOY_STYLE_TEMPLATES = tuple(
    text.format(kind) + subject_kinds.STYLE_SUFFIX for text, kind in toy_bases.UNRELATED_PROMPTS
)
MAX_PAIRS = 6  # Most pairs of subjects that are drawn together.


@dataclass(frozen=True)
class SubjectWords:
    """`a photo of sks dog` -> token `sks`, class word `dog`, words `sks dog`. Each may be empty."""

    token: str
    class_word: str

    @property
    def trigger_words(self) -> str:
        return f"{self.token} {self.class_word}".strip()


def parse_subject(config: TrainConfig) -> SubjectWords:
    """A run's one subject: as given, else the words of the instance prompt that the class prompt
    lacks."""
    # A style has a name and no class.
    if subject_kinds.get_subject_kind(config).is_style:
        named = STYLE_NAME.search(config.instance_prompt)
        found = named[1] if named else config.instance_prompt
        return SubjectWords(token=(config.token or "").strip() or found, class_word="")

    words = parse_noun(config.instance_prompt).split()
    kind = parse_noun(config.class_prompt).split() if config.class_prompt else []
    token = (config.token or "").strip()
    if token:
        # The class is what the instance prompt says after the token.
        place = compile_word_pattern(token).search(config.instance_prompt)
        class_word = parse_noun(config.instance_prompt[place.end() :]) if place else ""
    elif kind and words[-len(kind) :] == kind:
        # The class prompt tells where the token ends.
        token = " ".join(words[: -len(kind)])
        class_word = " ".join(kind)
    else:
        # Nothing tells: the first word is the token.
        token = " ".join(words[:1])
        class_word = " ".join(words[1:])
    if config.class_word is not None:
        class_word = config.class_word
    return SubjectWords(token=token, class_word=class_word)


def parse_noun(prompt: str) -> str:
    """`A photo of a sks dog on the beach` -> `sks dog`."""
    return PROMPT_CONTEXT.sub(
        "", PROMPT_ARTICLE.sub("", PROMPT_OPENING.sub("", prompt.strip()))
    ).strip()


def get_class_word(config: TrainConfig) -> str:
    """The class word, of the first subject if there are several."""
    return parse_subject(config.each_subject[0]).class_word


def list_trigger_words(config: TrainConfig) -> tuple[str, ...]:
    found = (parse_subject(subject).trigger_words for subject in config.each_subject)
    return tuple(words for words in found if words)


def compile_word_pattern(word: str) -> re.Pattern:
    """Matches the word, but not inside a longer one."""
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)")


def join_caption(*parts: str) -> str:
    """Join parts of a caption by spaces, but without a space before a comma."""
    return " ".join(filter(None, parts)).replace(" ,", ",")


def list_validation_prompts(config: TrainConfig) -> tuple[str, ...]:
    prompts = (one.validation_prompt or one.instance_prompt for one in config.each_subject)
    return tuple(dict.fromkeys(prompts))


def list_context_prompts(config: TrainConfig) -> tuple[str, ...]:
    """New contexts for each subject, which show what the adapter can do beyond the photos; then
    pairs of subjects."""
    is_toy = toy_bases.is_toy(config.pretrained_model_name_or_path)
    alone = []
    for one in config.each_subject:
        kind = subject_kinds.get_subject_kind(one)
        templates = kind.contexts or CONTEXT_TEMPLATES
        if is_toy:
            templates = TOY_STYLE_TEMPLATES[:4] if kind.is_style else toy_bases.CONTEXT_TEMPLATES
        name = parse_subject(one).trigger_words or one.instance_prompt
        alone += [template.format(name) for template in templates if name]
    return (*alone, *list_pair_prompts(config))


def list_pair_prompts(config: TrainConfig) -> tuple[str, ...]:
    """Prompts with two subjects, for the first MOST_PAIRS pairs; none for one subject."""
    pairs = combinations(list_trigger_words(config), 2)
    return tuple(f"a photo of a {one} and a {other}" for one, other in islice(pairs, MAX_PAIRS))
