"""The summary of an adapter file, read from its header alone: it loads no tensor and imports no torch."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG
from typing import Any

from safetensors import SafetensorError, safe_open

from dreambooth_moslora.core.numbers import is_number
from dreambooth_moslora.ui.adapters.check import check_header
from dreambooth_moslora.ui.generate.form import RANGES

__all__ = ["AdapterSummary", "prompt_for", "renewed_prompt", "summary_of"]

MAX_WORD_CHARACTERS = 80
MOST_OTHERS = 8


@dataclass(frozen=True)
class AdapterSummary:
    """Values are empty if the file lacks them (an adapter of another program).

    `scale` is the recommended strength; `new_tokens` says whether it has learnt some, and `tokens` are those of
    their files that are missing; `others` are the words of further subjects.
    """

    trigger: str = ""
    class_word: str = ""
    base: str = ""
    rank: str = ""
    mixer: str = ""
    scale: float = 1.0
    tokens: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    new_tokens: bool = False

    @property
    def subject(self) -> str:
        """The words that call the subject, such as "sks dog"."""
        return f"{self.trigger} {self.class_word}".strip() if self.class_word not in self.trigger else self.trigger

    def sentence(self) -> str:
        names = " or ".join(f"“{words}”" for words in (self.subject, *self.others))
        parts = [
            f"say {names}" if self.subject else "",
            self.rank,
            f"{self.mixer} mixer" if self.mixer and self.mixer != "none" else "",
            f"for {self.base}" if self.base else "",
            f"best at scale {self.scale:g}" if self.scale != 1 else "",
            *(f"its new tokens are missing: {name} belongs beside it" for name in self.tokens),
        ]
        return " · ".join(part for part in parts if part)


def summary_of(file: Path) -> AdapterSummary:
    """The summary. It never raises: loading is the check, and the header only a hint."""
    try:
        facts = file.stat()
        found = _read(file, facts.st_mtime_ns, facts.st_size) if S_ISREG(facts.st_mode) else AdapterSummary()
        return replace(found, tokens=tuple(name for name in found.tokens if not (file.parent / name).is_file()))
    except OSError:
        return AdapterSummary()


@lru_cache(maxsize=1024)
def _read(file: Path, mtime_ns: int, size: int) -> AdapterSummary:
    try:
        check_header(file)
        with safe_open(file, framework="numpy") as opened:
            header = opened.metadata() or {}
        facts = json.loads(header.get("moslora", "{}"))
        return _from_facts(facts if isinstance(facts, dict) else {})
    except (SafetensorError, OSError, ValueError, RecursionError):
        return AdapterSummary()


def _from_facts(facts: dict[str, Any]) -> AdapterSummary:
    words = facts.get("trigger_words")
    first, *others = words if isinstance(words, list) and words else [""]
    return AdapterSummary(
        trigger=_word(first),
        class_word=_word(facts.get("class_word")),
        base=_word(facts.get("base_id")),
        rank=_rank(facts),
        mixer=_word(facts.get("mixer")),
        scale=_scale(facts.get("best_scale")),
        tokens=_tokens(facts.get("tokens")),
        others=tuple(filter(None, map(_word, others[:MOST_OTHERS]))),
        new_tokens=bool(facts.get("tokens")),
    )


def _scale(value: Any) -> float:
    """The header's scale if the slider offers it, else 1."""
    low, high = RANGES["scale"]
    return float(value) if is_number(value) and low <= value <= high else 1.0


def _tokens(notes: Any) -> tuple[str, ...]:
    """The names of the files of new tokens: the header has one note, or a list for several subjects."""
    several = notes if isinstance(notes, list) else [notes]
    names = [_word(note.get("file")) for note in several[: 1 + MOST_OTHERS] if isinstance(note, dict)]
    return tuple(name for name in names if name and Path(name).name == name)


def _rank(facts: dict[str, Any]) -> str:
    """ "rank 32", or "ranks 1 to 23" if the projections differ."""
    each = facts.get("ranks")
    found = [facts.get("rank"), *(each.values() if isinstance(each, dict) else ())]
    ranks = [rank for rank in found if type(rank) is int and rank > 0]
    if not ranks:
        return ""
    low, high = min(ranks), max(ranks)
    return f"rank {low}" if low == high else f"ranks {low} to {high}"


def _word(value: Any) -> str:
    if not isinstance(value, str):
        return ""
    return " ".join(value.encode("utf-8", "replace").decode().split())[:MAX_WORD_CHARACTERS]


def prompt_for(summary: AdapterSummary) -> str:
    return f"a photo of a {summary.subject}" if summary.subject else ""


def renewed_prompt(old: str, chosen: AdapterSummary, known: Iterable[AdapterSummary]) -> str:
    """The chosen adapter's own words, unless the user has edited the prompt that another adapter had filled in."""
    untouched = {"", *map(prompt_for, known)}
    return prompt_for(chosen) or old if (old or "").strip() in untouched else old
