"""What the header of an adapter says of it, for the lists of the page."""

from dataclasses import dataclass
from pathlib import Path

from dreambooth_moslora.disk import run_folder
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora.metadata import parse_metadata


@dataclass(frozen=True)
class AdapterSummary:
    """What a file's header says of the adapter; a value is empty if it does not say it."""

    trigger: str = ""
    class_word: str = ""
    base: str = ""

    @property
    def subject(self) -> str:
        """The words that call the subject, such as "sks dog"."""
        if self.class_word in self.trigger:
            return self.trigger
        return f"{self.trigger} {self.class_word}".strip()

    @property
    def prompt(self) -> str:
        """The prompt with which a page begins for this adapter."""
        return f"a photo of a {self.subject}" if self.subject else ""

    def format_sentence(self) -> str:
        """What one has to know to use it, in one line."""
        parts = []
        if self.subject:
            parts.append(f"say “{self.subject}”")
        if self.base:
            parts.append(f"for {self.base}")
        return " · ".join(parts)


def read_summary(file: Path) -> AdapterSummary:
    """The summary; an empty one of a file that another program wrote, or that cannot be read.

    Loading is the check, and the header only a hint.
    """
    try:
        facts = parse_metadata(run_folder.read_header(file))
    except (UserError, OSError):
        return AdapterSummary()
    if facts is None:
        return AdapterSummary()
    return AdapterSummary(
        trigger=next(iter(facts.trigger_words), ""),
        class_word=facts.class_word,
        base=facts.base_id,
    )
