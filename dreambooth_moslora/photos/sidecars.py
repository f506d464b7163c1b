"""Files beside photos: `name.txt` and `name.mask.png`, or one `metadata.jsonl` with the captions of the folder.

A mask may have any image format. `metadata.jsonl` has the format of the datasets library. Suffixes may be upper
or lower case. Each line of `name.txt` is a caption; training draws one of them for each exposure.
"""

import json
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable
from pathlib import Path

from dreambooth_moslora.photos.image_file import IMAGE_SUFFIXES

__all__ = [
    "CAPTION_SUFFIX",
    "MADE_CAPTIONS",
    "MASK_SUFFIX",
    "METADATA",
    "Captions",
    "kept_captions",
    "sidecar_of",
    "sidecars_of",
]

METADATA, MADE_CAPTIONS = "metadata.jsonl", ".made_captions.json"
CAPTION_SUFFIX, MASK_SUFFIX = ".txt", ".mask"
MOST_BYTES = 32 * 1024
"""Of one photo's captions."""
TOO_LONG = f"longer than captions may be, {MOST_BYTES // 1024} KiB"
CAPTION_KEYS = ("text", "caption", "prompt")


def sidecar_of(path: Path) -> tuple[str, str] | None:
    """`dog.Mask.PNG` -> ("dog", ".mask"); None for a file that is neither caption nor mask by its name."""
    if path.suffix.lower() == CAPTION_SUFFIX:
        return path.stem, CAPTION_SUFFIX
    inner = Path(path.stem)
    if path.suffix.lower() in IMAGE_SUFFIXES and inner.suffix.lower() == MASK_SUFFIX:
        return inner.stem, MASK_SUFFIX
    return None


def sidecars_of(paths: Iterable[Path]) -> dict[tuple[str, str], Path]:
    """{(photo's stem, suffix): file}. If both spellings exist, the lower-case file is used; it sorts last."""
    return {named: path for path in sorted(paths) if (named := sidecar_of(path))}


class Captions:
    """Captions of one folder. `complaints` are (file, reason) of what could not be read."""

    def __init__(self, folder: Path, sidecars: dict[tuple[str, str], Path]):
        self.complaints: list[tuple[Path, str]] = []
        self._sidecars = sidecars
        self._by_name = self._read_metadata(folder / METADATA)

    def of(self, photo: Path) -> tuple[str, ...]:
        """The photo's own captions, one line each; () when it has none."""
        beside = self._sidecars.get((photo.stem, CAPTION_SUFFIX))
        lines = self._captions_in(beside) if beside and beside.is_file() else ()
        named = self._by_name.get(photo.name)
        return lines or ((named,) if named else ())

    def _captions_in(self, path: Path) -> tuple[str, ...]:
        if path.stat().st_size > MOST_BYTES:
            self.complaints.append((path, f"captions not read: {TOO_LONG}"))
            return ()
        text = self._text_of(path)
        lines = tuple(filter(None, map(one_line, (text or "").split("\n"))))
        if text is not None and not lines:
            self.complaints.append((path, "empty caption: the instance prompt is used"))
        return lines

    def _text_of(self, path: Path) -> str | None:
        """Text in UTF-8, or in UTF-16 with a mark, as Windows' Notepad writes it; else None and a complaint."""
        try:
            content = path.read_bytes()
            text = content.decode("utf-16" if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig")
        except OSError as error:
            self.complaints.append((path, f"captions not read: {error.strerror}"))
        except UnicodeDecodeError:
            self.complaints.append((path, "captions not read: neither UTF-8 nor UTF-16 text; save it as UTF-8"))
        else:
            if "\0" not in text:
                return text
            self.complaints.append((path, "captions not read: it is not a text file"))
        return None

    def _read_metadata(self, path: Path) -> dict[str, str]:
        lines = ((self._text_of(path) if path.is_file() else None) or "").split("\n")
        rows = [self._row(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        return {name: caption for name, caption in rows if name and caption}

    def _row(self, path: Path, number: int, line: str) -> tuple[str, str]:
        if len(line.encode()) > MOST_BYTES:
            self.complaints.append((path, f"line {number} is {TOO_LONG}"))
            return "", ""
        try:
            row = json.loads(line)
            name = Path(str(row["file_name"])).name
            caption = next((row[key] for key in CAPTION_KEYS if isinstance(row.get(key), str)), "")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self.complaints.append((path, f'line {number} is not {{"file_name": …, "text": …}}'))
            return "", ""
        return name, one_line(caption)


def kept_captions(path: Path) -> dict[str, dict[str, str]]:
    """{photo's file name: {"caption", "made_from"}} of made captions; empty if the file is damaged."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    entries = entries if isinstance(entries, dict) else {}
    known = {}
    for name, facts in entries.items():
        texts = [facts.get(key) for key in ("caption", "made_from")] if isinstance(facts, dict) else []
        if texts and all(isinstance(text, str) and text for text in texts):
            known[name] = {"caption": one_line(texts[0]), "made_from": texts[1]}
    return known


def one_line(text: str) -> str:
    """The text on one line. JSON can spell half a character ("\\ud83d"), which cannot be encoded; it becomes a
    question mark."""
    return " ".join(text.encode("utf-8", "replace").decode().split())
