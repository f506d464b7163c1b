"""Captions beside photos: `name.txt`, or one `metadata.jsonl` for the folder (the form of the datasets library)."""

import json
from pathlib import Path

__all__ = ["METADATA", "Captions"]

METADATA = "metadata.jsonl"
CAPTION_KEYS = ("text", "caption", "prompt")


class Captions:
    """Captions of one folder. `complaints` are (file, reason) of what could not be read."""

    def __init__(self, folder: Path):
        self.complaints: list[tuple[Path, str]] = []
        self._by_name = self._read_metadata(folder / METADATA)

    def of(self, photo: Path) -> str | None:
        """The photo's own caption in one line, or None."""
        beside = photo.with_suffix(".txt")
        text = self._read_text(beside) if beside.is_file() else ""
        return text or self._by_name.get(photo.name)

    def _read_text(self, path: Path) -> str:
        try:
            text = one_line(path.read_text(encoding="utf-8-sig", errors="replace"))
        except OSError as error:
            self.complaints.append((path, f"caption not read: {error.strerror}"))
            return ""
        if not text:
            self.complaints.append((path, "empty caption: the instance prompt is used"))
        return text

    def _read_metadata(self, path: Path) -> dict[str, str]:
        if not path.is_file():
            return {}
        try:
            lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        except OSError as error:
            self.complaints.append((path, f"captions not read: {error.strerror}"))
            return {}
        rows = [self._row(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        return {name: caption for name, caption in rows if name and caption}

    def _row(self, path: Path, number: int, line: str) -> tuple[str, str]:
        try:
            row = json.loads(line)
            name = Path(str(row["file_name"])).name
            caption = next((row[key] for key in CAPTION_KEYS if isinstance(row.get(key), str)), "")
        except (ValueError, KeyError, TypeError, AttributeError):
            self.complaints.append((path, f'line {number} is not {{"file_name": …, "text": …}}'))
            return "", ""
        return name, one_line(caption)


def one_line(text: str) -> str:
    return " ".join(text.split())
