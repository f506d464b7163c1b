"""Summary that an adapter's file header gives, for the lists of the page."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dreambooth_moslora.disk.safetensors_header import read_header
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora.metadata import parse_metadata


@dataclass(frozen=True)
class AdapterSummary:
    """Facts from a file's header; a value is empty where the header has none."""

    trigger: str = ""
    class_word: str = ""
    base: str = ""

    @property
    def subject(self) -> str:
        """Return the trigger and class word, such as "sks dog"."""
        if self.class_word in self.trigger:
            return self.trigger
        return f"{self.trigger} {self.class_word}".strip()

    @property
    def prompt(self) -> str:
        """Return the first prompt that the page offers for this adapter."""
        return f"a photo of a {self.subject}" if self.subject else ""

    def format_sentence(self) -> str:
        """Return in one line how the adapter is used."""
        prompt_hint = f"say “{self.subject}”" if self.subject else ""
        base_hint = f"for {self.base}" if self.base else ""
        return " · ".join(filter(None, (prompt_hint, base_hint)))


def read_summary(file: Path) -> AdapterSummary:
    """Read the summary; it is empty for a file of another program, or an unreadable one.

    The header is only a hint: the file is checked when it is loaded.
    """
    facts = None
    with suppress(UserError, OSError):
        facts = parse_metadata(read_header(file).metadata)
    if facts is None:
        return AdapterSummary()
    return AdapterSummary(
        trigger=next(iter(facts.trigger_words), ""),
        class_word=facts.class_word,
        base=facts.base_id,
    )
