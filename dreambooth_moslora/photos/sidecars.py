"""Find the captions and masks beside photos by their names, and read the captions.

A photo's captions are the lines of `name.txt` beside it, else its line in `metadata.jsonl`
({"file_name", "text"}, the format of the datasets library), else a caption that `captions` saved in
the run folder, else the instance prompt. Its mask is `name.mask.png` or another image format. Names
of other trainers are read too: `name.caption` (sd-scripts), `name-masklabel.png` (OneTrainer).
"""

from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from typing_extensions import TypedDict

from dreambooth_moslora.disk.contents import parse_json, read_json
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.photos.photo_file import IMAGE_SUFFIXES

METADATA_NAME = "metadata.jsonl"
"""File with the captions of a folder's photos; without it the first other `.jsonl` file is read."""
METADATA_SUFFIX = ".jsonl"
NAME_KEYS = ("file_name", "image_path")
"""Keys of a photo's name: of the datasets library, and of musubi-tuner."""
CAPTION_SUFFIX = ".txt"
MASK_SUFFIX = ".mask"
"""Suffixes of the sidecars: `dog.txt` and `dog.mask.png` lie beside `dog.jpg`."""
FOREIGN_CAPTION_SUFFIX = ".caption"
FOREIGN_MASK_ENDING = "-masklabel"
"""Names of sd-scripts and OneTrainer: `dog.caption`, `dog-masklabel.png`."""
MAX_CAPTION_BYTES = 32 * 1024
TOO_LONG_MESSAGE = f"longer than captions may be, {MAX_CAPTION_BYTES // 1024} KiB"
"""Maximum size of a photo's captions: more would keep the tokenizer busy for minutes."""
CAPTION_KEYS = ("text", "caption", "prompt")
"""Keys of `METADATA_NAME` that hold a caption; the first with a text is used."""


def parse_sidecar_name(path: Path) -> tuple[str, str] | None:
    """Return the photo's stem and the sidecar's kind: `dog.Mask.PNG` -> ("dog", ".mask"); None for
    a name of neither a caption nor a mask."""
    suffix = path.suffix.lower()
    if suffix in (CAPTION_SUFFIX, FOREIGN_CAPTION_SUFFIX):
        return path.stem, CAPTION_SUFFIX
    if suffix not in IMAGE_SUFFIXES:
        return None
    inner = Path(path.stem)
    if inner.suffix.lower() == MASK_SUFFIX:
        return inner.stem, MASK_SUFFIX
    if path.stem.lower().endswith(FOREIGN_MASK_ENDING):
        return path.stem[: -len(FOREIGN_MASK_ENDING)], MASK_SUFFIX
    return None


def find_sidecars(paths: Iterable[Path]) -> dict[tuple[str, str], Path]:
    """Return {(photo's stem, suffix): file}. If several spellings exist, ours in lower case is
    used: it sorts last."""
    return {key: path for path in sorted(paths) if (key := parse_sidecar_name(path))}


def is_sidecar_name(path: Path) -> bool:
    """Return whether the name is that of a file of captions or of a mask."""
    return path.suffix.lower() == METADATA_SUFFIX or parse_sidecar_name(path) is not None


class FolderCaptions:
    """Captions of one folder. `complaints` are (file, reason) of unreadable files and lines."""

    def __init__(self, folder: Path, sidecars: dict[tuple[str, str], Path]):
        self.complaints: list[tuple[Path, str]] = []
        self.sidecars = sidecars
        self._by_name: dict[str, str] = {}

        # One JSON object a line; a bad line costs only itself.
        metadata = folder / METADATA_NAME
        if not metadata.is_file():
            metadata = next(iter(sorted(folder.glob(f"[!.]*{METADATA_SUFFIX}"))), metadata)
        text = self._read_text(metadata) if metadata.is_file() else ""
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                self._read_row(metadata, number, line)

    def get_captions(self, photo: Path) -> tuple[str, ...]:
        """Return the captions of the photo's sidecar or its line of metadata; () when it has
        none."""
        # The text file beside the photo
        sidecar = self.sidecars.get((photo.stem, CAPTION_SUFFIX))
        if sidecar and sidecar.is_file() and (lines := self._read_lines(sidecar)):
            return lines

        # Else its line in METADATA_NAME
        metadata_caption = self._by_name.get(photo.name)
        return (metadata_caption,) if metadata_caption else ()

    def _read_lines(self, path: Path) -> tuple[str, ...]:
        """Return the lines of a text file, without empty ones; () and a complaint when it has
        none."""
        if path.stat().st_size > MAX_CAPTION_BYTES:
            self.complaints.append((path, f"captions not read: {TOO_LONG_MESSAGE}"))
            return ()
        text = self._read_text(path)
        lines = tuple(filter(None, map(clean_whitespace, text.split("\n"))))
        if text and not lines:
            self.complaints.append((path, "empty caption: the instance prompt is used"))
        return lines

    def _read_text(self, path: Path) -> str:
        """Return text in UTF-8, or in UTF-16 with a mark, as Windows' Notepad writes it; else ""
        and a complaint."""
        content = path.read_bytes()
        is_wide = content.startswith((BOM_UTF16_LE, BOM_UTF16_BE))
        try:
            return content.decode("utf-16" if is_wide else "utf-8-sig")
        except UnicodeDecodeError:
            self.complaints.append(
                (path, "captions not read: neither UTF-8 nor UTF-16 text; save it as UTF-8")
            )
            return ""

    def _read_row(self, path: Path, number: int, line: str) -> None:
        """Store the caption of a line of METADATA_NAME, or complain of the line."""
        row = {}
        with suppress(UserError):
            row = parse_json(line)
        texts = [row[key] for key in CAPTION_KEYS if isinstance(row.get(key), str)]
        names = [str(row[key]) for key in NAME_KEYS if row.get(key)]
        if names and texts and texts[0].strip():
            self._by_name[Path(names[0]).name] = clean_whitespace(texts[0])
        else:
            self.complaints.append((path, f'line {number} is not {{"file_name": …, "text": …}}'))


class SavedCaption(TypedDict):
    """Generated caption in a file, with the key of its photo, model and question."""

    caption: str
    made_from: str


def read_saved_captions(path: Path) -> dict[str, SavedCaption]:
    """Return the generated captions of a file, {photo's file name: {"caption", "made_from"}}; empty
    for a damaged or missing file."""
    if path.is_file():
        with suppress(UserError):
            return read_json(path, dict[str, SavedCaption])
    return {}


def clean_whitespace(text: str) -> str:
    """Return the text on one line. A lone surrogate, which JSON can spell, becomes a question
    mark."""
    return " ".join(text.encode("utf-8", "replace").decode().split())
