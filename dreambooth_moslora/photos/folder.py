"""A folder of photos as a report: the photos, the files beside them, and why a file is left out.

A photo's captions are the lines of `name.txt` beside it, else its line in `metadata.jsonl`
({"file_name", "text"}, the format of the datasets library), else a caption kept in the run folder
by `captions`, else the instance prompt. Training draws one of them for each exposure. `masks` finds
its mask, `name.mask.png` or another image format. No file in the folder can stop the program:
unusable files are listed with a reason.

`--dataset_name`: the images of a data set, on the hub or local, become such a folder, written
unchanged.

Tags of image boards have no order, so they are shuffled, in a fixed number of orders a caption, by
the run's seed:

    prefix  sks dog, red collar, on grass, side view  suffix        --keep_tokens 1 leaves `sks dog` where it is

If all captions of a photo name a place, the bare instance prompt would not draw the subject. So
such a photo is shown with it in a share of its exposures.
"""

import json
import logging
import os
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from typing_extensions import TypedDict

from dreambooth_moslora.disk.atomic import atomic_directory
from dreambooth_moslora.disk.contents import MOST_TEXT_BYTES, from_json, read_json
from dreambooth_moslora.disk.paths import SUBJECT_FILE, default_cache_dir
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError, one_line, spelled_out
from dreambooth_moslora.photos import photo_file
from dreambooth_moslora.seeds import rng
from dreambooth_moslora.settings.prompts import joined
from dreambooth_moslora.settings.rows import nearest
from dreambooth_moslora.settings.table import TrainConfig

logger = logging.getLogger(__name__)

ORDERS = 16  # Orders of each caption, including the written one
METADATA, MADE_CAPTIONS = "metadata.jsonl", ".made_captions.json"
CAPTION_SUFFIX, MASK_SUFFIX = ".txt", ".mask"
MOST_BYTES = 32 * 1024  # Of one photo's captions
TOO_LONG = f"longer than captions may be, {MOST_BYTES // 1024} KiB"
CAPTION_KEYS = ("text", "caption", "prompt")
JUNK = {".ds_store", "thumbs.db", "desktop.ini", "manifest.json", METADATA}


def bare_prompt_line(config: TrainConfig, photos: Sequence[photo_file.Photo]) -> str | None:
    """What happens to the photos with a `bare_prompt`; None when there are none."""
    count, share = sum(photo.bare_prompt is not None for photo in photos), config.bare_share
    said = f"captions: {count} of {len(photos)} photos have none that is the instance prompt itself"
    done = f"{share:.0%} of their exposures show it" if share else "they are never shown with it"
    return f"{said}; {done} (--instance_prompt_share)" if count else None


def shuffled_captions(config: TrainConfig, captions: tuple[str, ...]) -> tuple[str, ...]:
    """The captions; with `--shuffle_caption` ORDERS orders of each, without prefix, suffix and kept
    tags."""
    if not config.shuffle_caption:
        return captions
    found = []
    for caption in captions:
        ends = (
            (config.caption_prefix, config.caption_suffix)
            if caption != config.instance_prompt
            else ("", "")
        )
        prefix, suffix = (joined((end or "").strip()) for end in ends)
        head, tail = (
            prefix if caption.startswith(prefix) else "",
            suffix if caption.endswith(suffix) else "",
        )
        tags = [
            tag.strip()
            for tag in caption[len(head) : len(caption) - len(tail)].split(",")
            if tag.strip()
        ]
        found.append(caption)
        for number in range(1, ORDERS):
            others = tags[config.keep_tokens :]
            rng(config.seed, "tags", caption, number).shuffle(others)
            found.append(joined(head, ", ".join([*tags[: config.keep_tokens], *others]), tail))
    return tuple(found)


def sidecar_of(path: Path) -> tuple[str, str] | None:
    """`dog.Mask.PNG` -> ("dog", ".mask"); None for a file that is neither caption nor mask by its
    name."""
    if path.suffix.lower() == CAPTION_SUFFIX:
        return path.stem, CAPTION_SUFFIX
    inner = Path(path.stem)
    if path.suffix.lower() in photo_file.IMAGE_SUFFIXES and inner.suffix.lower() == MASK_SUFFIX:
        return inner.stem, MASK_SUFFIX
    return None


def sidecars_of(paths: Iterable[Path]) -> dict[tuple[str, str], Path]:
    """{(photo's stem, suffix): file}. If both spellings exist, the lower-case file is used; it
    sorts last."""
    return {named: path for path in sorted(paths) if (named := sidecar_of(path))}


class Captions:
    """Captions of one folder. `complaints` are (file, reason) of what could not be read."""

    def __init__(self, folder: Path, sidecars: dict[tuple[str, str], Path]):
        self.complaints: list[tuple[Path, str]] = []
        self.sidecars = sidecars
        self._by_name: dict[str, str] = {}
        metadata, text = folder / METADATA, None
        if metadata.is_file() and metadata.stat().st_size > MOST_TEXT_BYTES:
            self.complaints.append(
                (metadata, f"not read: it has more than {MOST_TEXT_BYTES // 2**20} MiB")
            )
        elif metadata.is_file():
            text = self._text_of(metadata)
        for number, line in enumerate((text or "").split("\n"), start=1):
            name, caption = self._row(metadata, number, line) if line.strip() else ("", "")
            if name and caption:
                self._by_name[name] = caption

    def of(self, photo: Path) -> tuple[str, ...]:
        """The photo's own captions, one line each; () when it has none."""
        beside, lines = self.sidecars.get((photo.stem, CAPTION_SUFFIX)), ()
        if beside and beside.is_file():
            if beside.stat().st_size > MOST_BYTES:
                self.complaints.append((beside, f"captions not read: {TOO_LONG}"))
            elif (text := self._text_of(beside)) is not None:
                lines = tuple(filter(None, map(one_space, text.split("\n"))))
                if not lines:
                    self.complaints.append((beside, "empty caption: the instance prompt is used"))
        named = self._by_name.get(photo.name)
        return lines or ((named,) if named else ())

    def _text_of(self, path: Path) -> str | None:
        """Text in UTF-8, or in UTF-16 with a mark, as Windows' Notepad writes it; else None and a
        complaint."""
        try:
            content = path.read_bytes()
            text = content.decode(
                "utf-16" if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig"
            )
        except OSError as error:
            self.complaints.append((path, f"captions not read: {error.strerror}"))
        except UnicodeDecodeError:
            self.complaints.append(
                (path, "captions not read: neither UTF-8 nor UTF-16 text; save it as UTF-8")
            )
        else:
            if "\0" not in text:
                return text
            self.complaints.append((path, "captions not read: it is not a text file"))
        return None

    def _row(self, path: Path, number: int, line: str) -> tuple[str, str]:
        if len(line.encode()) > MOST_BYTES:
            self.complaints.append((path, f"line {number} is {TOO_LONG}"))
            return "", ""
        try:
            row = from_json(line)
            name = Path(str(row["file_name"])).name
            caption = next((row[key] for key in CAPTION_KEYS if isinstance(row.get(key), str)), "")
        except (UserError, KeyError):
            self.complaints.append((path, f'line {number} is not {{"file_name": …, "text": …}}'))
            return "", ""
        if not name or not os.path.exists(path.parent / name):
            self.complaints.append((path, f"line {number} names no file of this folder"))
        elif not caption.strip():
            self.complaints.append(
                (path, f"line {number} has no text, as one of {', '.join(CAPTION_KEYS)}")
            )
        return name, one_space(caption)


class KeptCaption(TypedDict):
    caption: str
    made_from: str


def kept_captions(path: Path) -> dict[str, KeptCaption]:
    """{photo's file name: {"caption", "made_from"}} of made captions; empty if the file is damaged,
    or is none."""
    entries: dict[str, KeptCaption] = {}
    if path.is_file():
        with suppress(UserError):
            entries = read_json(path, dict[str, KeptCaption])
    whole = {name: facts for name, facts in entries.items() if all(facts.values())}
    return {name: facts | {"caption": one_space(facts["caption"])} for name, facts in whole.items()}


def one_space(text: str) -> str:
    """The text on one line. Half a character, which JSON can spell, becomes a question mark."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def dataset_folder(config: TrainConfig) -> Path:
    """The folder with the data set's images; its name is a digest of their content. Raises
    UserError."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    table = load_images(config)
    caches = [
        config.cache_dir or datasets.config.HF_DATASETS_CACHE,
        datasets.config.DOWNLOADED_DATASETS_PATH,
    ]
    local = [config.dataset_name] if Path(config.dataset_name).is_dir() else []
    # all that may hold its files
    own = [Path(folder).resolve() for folder in (*local, *caches, HF_HUB_CACHE)]
    rows, digest = [], sha256()
    for row in table:
        content = image_bytes(row[config.image_column], own)
        captions = (
            captions_in(row[config.caption_column], config.caption_column)
            if config.caption_column
            else []
        )
        if content:
            rows.append((content, captions))
            digest.update(sha256(content).digest() + "\0".join(captions).encode())
    folder = Path(config.cache_dir or default_cache_dir()) / "photos" / digest.hexdigest()[:16]
    if not folder.is_dir():
        with atomic_directory(folder) as new:
            write_rows(new, rows)
    return folder


def load_images(config: TrainConfig) -> Iterable[dict[str, Any]]:
    """The rows of the train split, with images left encoded. Raises UserError."""
    import datasets

    name, column = config.dataset_name, config.image_column
    try:
        table = datasets.load_dataset(
            name, config.dataset_config_name, cache_dir=config.cache_dir, split="train"
        )
    except Exception as error:  # raised by the library, the hub or the file formats
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--dataset_name {name}: cannot be loaded: {reason}") from error
    for flag, wanted in (("image_column", column), ("caption_column", config.caption_column)):
        if wanted is not None and wanted not in table.column_names:
            close, columns = nearest(wanted, table.column_names), ", ".join(table.column_names)
            hint = f" Did you mean {close}?" if close else ""
            raise UserError(f"--{flag} {wanted}: the data set has the columns {columns}.{hint}")
    if not isinstance(table.features[column], datasets.Image):
        raise UserError(f"--image_column {column}: that column of {name} holds no images.")
    return table.cast_column(column, datasets.Image(decode=False))


def captions_in(cell: Any, column: str) -> list[str]:
    """Those in a cell of the column: a text, or a list of texts. Raises UserError for anything
    else."""
    texts = cell if isinstance(cell, list) else [cell]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise UserError(
            f"--caption_column {column}: it holds neither texts nor lists of texts; name another."
        )
    return list(filter(None, texts))


def image_bytes(cell: dict[str, Any] | None, own: list[Path]) -> bytes:
    """The image's file, empty for an empty cell. Raises UserError for no file in `own`: anyone
    wrote the table."""
    cell = cell or {}
    content, named = cell.get("bytes") or b"", cell.get("path") or ""
    if content or not named:
        return content
    path = Path(named.replace("\0", "")).resolve()
    if (
        "\0" in named
        or not path.is_file()
        or not any(path.is_relative_to(folder) for folder in own)
    ):
        raise UserError(
            f"--dataset_name: it names {one_line(named)}, which is not a file of the data set."
        )
    return path.read_bytes()


def write_rows(folder: Path, rows: list[tuple[bytes, list[str]]]) -> None:
    """Write images, one caption each into METADATA, and several into a text file beside the image."""
    lines = []
    for number, (content, captions) in enumerate(rows):
        try:
            with Image.open(BytesIO(content)) as image:
                kind = (image.format or "img").lower()
        except Exception:  # the reader of the folder reports it
            kind = "img"
        name = f"{number:05d}.{'jpg' if kind in ('jpeg', 'mpo') else kind}"
        (folder / name).write_bytes(content)
        if len(captions) > 1:
            text = "\n".join(map(one_space, captions))
            (folder / name).with_suffix(CAPTION_SUFFIX).write_text(text, encoding="utf-8")
        elif captions:
            lines.append(json.dumps({"file_name": name, "text": captions[0]}, ensure_ascii=False))
    if lines:
        (folder / METADATA).write_text("\n".join(lines) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Skipped:
    path: Path
    reason: str
    is_photo: bool = False  # it was meant to be one
    size_px: tuple[int, int] | None = None  # None when unreadable


@dataclass(frozen=True)
class PhotoReport:
    photos: list[photo_file.Photo] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    sidecars: list[Path] = field(default_factory=list)  # captions and masks in use


def log_strays(report: PhotoReport) -> None:
    """Mention the files that are no photos in one line of the log."""
    if strays := [
        item for item in report.skipped if not item.is_photo and not item.path.name.startswith(".")
    ]:
        line = f"files not used ({len(strays)}): {summary_of_skipped(PhotoReport(skipped=strays))}"
        logger.warning("%s", spelled_out(line))


def usable_photos(report: PhotoReport) -> list[photo_file.Photo]:
    """The report's photos; each photo that was left out is logged with its reason."""
    for skipped in report.skipped:
        if skipped.is_photo:
            logger.warning("%s", spelled_out(f"{skipped.path.name} is left out: {skipped.reason}"))
    return report.photos


def photo_report(config: TrainConfig) -> PhotoReport:
    """The photos of all subjects, numbered by subject. Raises UserError for a subject without a
    usable photo."""
    found = PhotoReport()
    for number, subject in enumerate(config.each_subject):
        report, used = report_of(subject, number), len(found.photos)
        found.skipped.extend(report.skipped)
        for photo in report.photos:
            if photo.path.name in config.leave_out:
                found.skipped.append(
                    Skipped(photo.path, "left out by --leave_out", size_px=photo.size_px)
                )
            else:
                found.photos.append(photo)
        if len(found.photos) == used:
            raise UserError("--leave_out leaves no photo; name fewer.")
        found.sidecars.extend(report.sidecars)
    found.photos[:] = with_made(config, found.photos)
    named = {item.path.name for item in found.skipped}
    if unknown := [name for name in config.leave_out if name not in named]:
        raise UserError(f"--leave_out {unknown[0]}: there is no such photo.")
    return found


def report_of(config: TrainConfig, number: int) -> PhotoReport:
    """The photos of `--instance_data_dir` or `--dataset_name`, as those of subject `number`. Raises
    UserError."""
    if not (config.dataset_name or config.instance_data_dir):
        raise UserError("give the photos: --instance_data_dir FOLDER, or --dataset_name NAME.")
    folder = dataset_folder(config) if config.dataset_name else Path(config.instance_data_dir)
    report = find_photos(folder, config.instance_prompt, config.resolution, alpha=config.alpha)
    photos = [replace(with_own_captions(config, photo), subject=number) for photo in report.photos]
    if not photos:
        raise UserError(f"no usable photo in {folder}: {summary_of_skipped(report)}")
    return replace(report, photos=photos)


def with_made(config: TrainConfig, photos: Iterable[photo_file.Photo]) -> list[photo_file.Photo]:
    """The photos; with `--captions auto` and `--masks auto` with what training has made in the run
    folder by now."""
    photos, run_dir = list(photos), RunDir(config.output_dir)
    if config.captions == "auto":
        subjects, kept = config.each_subject, kept_captions(run_dir.captions_path)
        for number, photo in enumerate(photos):
            if not photo.is_captioned and (made := kept.get(photo.kept_name)):
                captioned = replace(photo, captions=(made["caption"],))
                photos[number] = with_own_captions(subjects[photo.subject], captioned)
    return (
        photo_file.with_kept_masks(photos, run_dir.masks_dir) if config.masks == "auto" else photos
    )


def with_own_captions(config: TrainConfig, photo: photo_file.Photo) -> photo_file.Photo:
    """With prefix and suffix on its own captions, and its bare prompt if none of them is the
    instance prompt."""
    prompt, found = config.instance_prompt, []
    prefix, suffix = ((end or "").strip() for end in (config.caption_prefix, config.caption_suffix))
    for caption in photo.captions:
        found.append(caption if caption == prompt else joined(prefix, caption, suffix))
    is_there = as_heard(prompt) in map(as_heard, found)
    return replace(photo, captions=tuple(found), bare_prompt=None if is_there else prompt)


def as_heard(prompt: str) -> str:
    """What the text encoders hear: neither case nor the width of spaces; and without a full stop."""
    return " ".join(prompt.lower().split()).rstrip(".")


def summary_of_skipped(report: PhotoReport) -> str:
    shown = [
        f"{item.path.name} ({item.reason})"
        for item in sorted(report.skipped, key=lambda s: not s.is_photo)[:3]
    ]
    more = len(report.skipped) - len(shown)
    return ("; ".join(shown) or "it is empty") + (f"; and {more} more." if more else ".")


def require_folder_of_photos(folder: Path) -> None:
    """Raises UserError when there is no such folder."""
    if not folder.is_dir():
        reason = "not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {reason}; give a folder of photos.")


def find_photos(
    folder: Path, instance_prompt: str, resolution_px: int, *, alpha: str = "mask"
) -> PhotoReport:
    """Open every file of `folder` (not of its subfolders), by name. Raises UserError when it cannot
    be read."""
    folder = Path(folder)
    require_folder_of_photos(folder)
    try:
        paths = sorted(folder.iterdir())
    except PermissionError:
        raise UserError(f"{folder}: cannot be read (permission denied).") from None
    captions, report = Captions(folder, sidecars_of(paths)), PhotoReport()
    for path in paths:
        if not is_sidecar_name(path) and path.name not in (MADE_CAPTIONS, SUBJECT_FILE):
            item = read_photo(path, captions, instance_prompt, resolution_px, alpha)
            (report.photos if isinstance(item, photo_file.Photo) else report.skipped).append(item)
    stems = {photo.path.stem for photo in report.photos}
    for path in filter(is_sidecar_name, paths):
        named = sidecar_of(path)
        if reason := no_file_reason(path):
            report.skipped.append(Skipped(path, reason))
        elif named is None or (named[0] in stems and captions.sidecars[named] == path):
            report.sidecars.append(path)
        else:
            report.skipped.append(Skipped(path, "stray: belongs to no photo"))
    report.skipped.extend(Skipped(path, reason) for path, reason in captions.complaints)
    return report


def read_photo(
    path: Path, captions: Captions, prompt: str, resolution_px: int, alpha: str
) -> photo_file.Photo | Skipped:
    is_system = path.name.lower() in JUNK or path.name.startswith(".")
    if reason := no_file_reason(path) or ("stray: a file of the system" if is_system else None):
        return Skipped(path, reason)
    try:
        image = photo_file.open_image(path)
    except photo_file.UnreadableImageError as error:
        claims = path.suffix.lower() in photo_file.IMAGE_SUFFIXES
        return Skipped(path, str(error) if claims else "stray: not a photo", is_photo=claims)
    height, width = photo_file.upright_size(image)
    reasons = ["rotated by EXIF: turned upright"] if photo_file.is_rotated(image) else []
    shorter = min(height, width)
    if shorter < max(8, resolution_px // 8):  # it would be enlarged more than eight times
        reason = f"tiny: {width} x {height} px for a resolution of {resolution_px}"
        return Skipped(path, reason, is_photo=True, size_px=(height, width))
    if shorter < resolution_px:
        times = resolution_px / shorter
        reasons.append(
            f"too small for the resolution: {width} x {height} px is enlarged {times:.1f} times"
        )
    beside = captions.sidecars.get((path.stem, MASK_SUFFIX))
    mask_path, remarks = photo_file.find_mask(path, image, beside, alpha_is_mask=alpha == "mask")
    own, reasons = captions.of(path), (*reasons, *remarks)
    return photo_file.Photo(path, (height, width), own or (prompt,), mask_path, reasons, bool(own))


def is_sidecar_name(path: Path) -> bool:
    return path.name == METADATA or sidecar_of(path) is not None


def no_file_reason(path: Path) -> str | None:
    """What it is if not a file, as a pipe is, of which reading might have no end."""
    if path.is_dir():
        return "stray: a folder; photos inside it are not read"
    if path.is_symlink() and not path.exists():
        return "stray: a link to nothing"
    return None if path.is_file() else "stray: not a file"
