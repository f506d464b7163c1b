"""Further subjects of the training form, from the second on: their fields, their photos' folders, their tables."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.generation.params import check_characters
from dreambooth_moslora.ui.server.photo_uploads import kept_photos

__all__ = [
    "MOST_SUBJECTS",
    "TOKENS",
    "SubjectWords",
    "folder_of",
    "named",
    "prompts_of",
    "subject_count",
    "table_of",
    "words_in",
]

MOST_SUBJECTS = 4
TOKENS = ("sks", "zwx", "ohwx", "xjy")
"""The default rare word of each further subject."""
MAX_WORD_CHARACTERS = 60


@dataclass(frozen=True)
class SubjectWords:
    """The form's values for one subject. `captions`: one line for each photo; `tokens_begin_as`: if there are any."""

    class_word: str
    token: str
    captions: str = ""
    tokens_begin_as: str = ""


def named(name: str, number: int) -> str:
    """`class_word` for the first subject, `class_word_2` for the second."""
    return name if number == 1 else f"{name}_{number}"


def folder_of(photos_dir: Path, number: int) -> Path:
    """The folder of a subject's photos; `photos_dir` is the first one's."""
    return photos_dir.with_name(named(photos_dir.name, number))


def subject_count(photos_dir: Path, most: int) -> int:
    """How many subjects in a row, from the first on, have photos; at most the given number."""
    count = 0
    while count < most and kept_photos(folder_of(photos_dir, count + 1)):
        count += 1
    return count


def words_in(values: Mapping[str, Any]) -> tuple[SubjectWords, ...]:
    """The subjects after the first; `subjects` in `values` (by name) is the number of all.

    Raises UserError for an invalid number, and for words of a subject beyond it.
    """
    count = values.get("subjects", 1)
    if isinstance(count, bool) or count not in range(1, MOST_SUBJECTS + 1):
        raise UserError(f"subjects must be a whole number from 1 to {MOST_SUBJECTS}, not {count!r:.30}")
    for number in range(int(count) + 1, MOST_SUBJECTS + 1):
        if str(values.get(named("class_word", number)) or "").strip():
            raise UserError(f"with {named('class_word', number)}, subjects must be at least {number}, not {count}")
    return tuple(
        SubjectWords(*(str(values.get(named(name, number)) or "") for name in SubjectWords.__dataclass_fields__))
        for number in range(2, int(count) + 1)
    )


def table_of(number: int, words: SubjectWords, photos_dir: Path) -> dict[str, str]:
    """The `[[subjects]]` table of subject `number`; `photos_dir` is the first one's. Raises UserError."""
    try:
        instance_prompt, class_prompt = prompts_of(words.token, words.class_word)
        check_characters(words.captions, "a caption")
    except UserError as error:
        raise UserError(f"subject {number}: {error}") from error
    folder = str(folder_of(photos_dir, number))
    return {"instance_data_dir": folder, "instance_prompt": instance_prompt, "class_prompt": class_prompt}


def prompts_of(token: str, class_word: str) -> tuple[str, str]:
    """("a photo of a sks dog", "a photo of a dog"). Raises UserError for missing or too long words."""
    token, class_word = (" ".join(str(word or "").split()) for word in (token, class_word))
    for word, name in (
        (token, "the token (a rare word, such as sks)"),
        (class_word, "the word for what the photos show (such as dog)"),
    ):
        if not word:
            raise UserError(f"{name} is missing")
        if len(word) > MAX_WORD_CHARACTERS:
            raise UserError(f"{name} is too long; one to three words are enough")
        check_characters(word, name)
    return f"a photo of a {token} {class_word}", f"a photo of a {class_word}"
