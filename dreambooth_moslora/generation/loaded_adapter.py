"""An adapter in a pipeline, and when its file has changed."""

from dataclasses import dataclass
from pathlib import Path

from dreambooth_moslora.adapters.files.metadata import notes_in
from dreambooth_moslora.adapters.files.mixer_file import Mixers
from dreambooth_moslora.adapters.new_tokens import NewTokens

__all__ = ["Adapter", "Stamp", "stamp_of"]

Stamp = tuple[Path, int, int]


@dataclass(frozen=True)
class Adapter:
    """An adapter in the model. `key` is its name inside PEFT, `header` its file's metadata, and `tokens` are those of
    the new tokens that the header names whose files are there. If it is `mixers` alone, `key` is their basis's name."""

    name: str
    key: str
    sha256: str
    header: dict[str, str]
    tokens: tuple[NewTokens, ...]
    stamp: Stamp
    mixers: Mixers | None = None

    @property
    def lacks_tokens(self) -> bool:
        return len(self.tokens) < len(notes_in(self.header))


def stamp_of(file: Path) -> Stamp:
    """Changes with the file, and needs no reading."""
    facts = file.stat()
    return file.resolve(), facts.st_mtime_ns, facts.st_size
