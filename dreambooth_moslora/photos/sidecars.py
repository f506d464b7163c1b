"""The files that lie beside photos: captions and masks by their names, and what the captions say.

A photo's captions are the lines of `name.txt` beside it, else its line in `metadata.jsonl`
({"file_name", "text"}, the format of the datasets library), else a caption kept in the run folder
by `captions`, else the instance prompt. Its mask is `name.mask.png` or another image format.
"""

from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from typing_extensions import TypedDict

from dreambooth_moslora.disk.contents import parse_json, read_json
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.photos.photo_file import IMAGE_SUFFIXES

# The file of a folder that holds the captions of many photos
METADATA_NAME = "metadata.jsonl"
# `dog.txt` and `dog.mask.png` lie beside `dog.jpg`
CAPTION_SUFFIX = ".txt"
MASK_SUFFIX = ".mask"
# Of one photo's captions: more is no caption, and would keep the tokenizer busy for minutes
MAX_CAPTION_BYTES = 32 * 1024
TOO_LONG_MESSAGE = f"longer than captions may be, {MAX_CAPTION_BYTES // 1024} KiB"
# Keys of METADATA that hold a caption; the first with a text is taken
CAPTION_KEYS = ("text", "caption", "prompt")


def parse_sidecar_name(path: Path) -> tuple[str, str] | None:
    """`dog.Mask.PNG` -> ("dog", ".mask"); None for a file that is neither caption nor mask by its
    name."""
    if path.suffix.lower() == CAPTION_SUFFIX:
        return path.stem, CAPTION_SUFFIX
    inner = Path(path.stem)
    if path.suffix.lower() in IMAGE_SUFFIXES and inner.suffix.lower() == MASK_SUFFIX:
        return inner.stem, MASK_SUFFIX
    return None


def find_sidecars(paths: Iterable[Path]) -> dict[tuple[str, str], Path]:
    """{(photo's stem, suffix): file}. If both spellings exist, the lower-case file is used; it
    sorts last."""
    found = {}
    for path in sorted(paths):
        named = parse_sidecar_name(path)
        if named:
            found[named] = path
    return found


def is_sidecar_name(path: Path) -> bool:
    """Whether it is named like a file of captions or a mask."""
    return path.name == METADATA_NAME or parse_sidecar_name(path) is not None


class FolderCaptions:
    """Captions of one folder. `complaints` are (file, reason) of what could not be read."""

    def __init__(self, folder: Path, sidecars: dict[tuple[str, str], Path]):
        self.complaints: list[tuple[Path, str]] = []
        self.sidecars = sidecars
        self._by_name: dict[str, str] = {}

        # One JSON object a line; a bad line costs only itself.
        metadata = folder / METADATA_NAME
        text = self._read_text(metadata) if metadata.is_file() else ""
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                self._read_row(metadata, number, line)

    def get_captions(self, photo: Path) -> tuple[str, ...]:
        """The photo's own captions, one line each; () when it has none."""
        # The text file beside the photo
        beside = self.sidecars.get((photo.stem, CAPTION_SUFFIX))
        if beside and beside.is_file():
            lines = self._read_lines(beside)
            if lines:
                return lines

        # Else its line in METADATA
        named = self._by_name.get(photo.name)
        return (named,) if named else ()

    def _read_lines(self, path: Path) -> tuple[str, ...]:
        """The lines of a text file, without empty ones; () and a complaint when it has none."""
        if path.stat().st_size > MAX_CAPTION_BYTES:
            self.complaints.append((path, f"captions not read: {TOO_LONG_MESSAGE}"))
            return ()
        text = self._read_text(path)
        lines = tuple(filter(None, map(clean_whitespace, text.split("\n"))))
        if text and not lines:
            self.complaints.append((path, "empty caption: the instance prompt is used"))
        return lines

    def _read_text(self, path: Path) -> str:
        """Text in UTF-8, or in UTF-16 with a mark, as Windows' Notepad writes it; else "" and a
        complaint."""
        content = path.read_bytes()
        is_wide = content.startswith((BOM_UTF16_LE, BOM_UTF16_BE))
        try:
            return content.decode("utf-16" if is_wide else "utf-8-sig")
        except UnicodeDecodeError:
            reason = "neither UTF-8 nor UTF-16 text; save it as UTF-8"
            self.complaints.append((path, f"captions not read: {reason}"))
            return ""

    def _read_row(self, path: Path, number: int, line: str) -> None:
        """Keep the caption in a line of METADATA, or complain of the line."""
        row = {}
        with suppress(UserError):
            row = parse_json(line)
        texts = [row[key] for key in CAPTION_KEYS if isinstance(row.get(key), str)]
        if "file_name" in row and texts and texts[0].strip():
            self._by_name[Path(str(row["file_name"])).name] = clean_whitespace(texts[0])
        else:
            reason = f'line {number} is not {{"file_name": …, "text": …}}'
            self.complaints.append((path, reason))


class SavedCaption(TypedDict):
    """A made caption in a file, with the key of what it was made from."""

    caption: str
    made_from: str


def read_saved_captions(path: Path) -> dict[str, SavedCaption]:
    """{photo's file name: {"caption", "made_from"}} of made captions; empty if the file is damaged,
    or is none."""
    if path.is_file():
        with suppress(UserError):
            return read_json(path, dict[str, SavedCaption])
    return {}


def clean_whitespace(text: str) -> str:
    """The text on one line. Half a character, which JSON can spell, becomes a question mark."""
    return " ".join(text.encode("utf-8", "replace").decode().split())
