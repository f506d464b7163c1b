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

    prefix  sks dog, red collar, on grass, side view  suffix

With `--keep_tokens 1` the first tag, `sks dog`, stays where it is.

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

# Orders of each caption, including the written one
ORDERS = 16
# Files of a folder that hold captions: the user's, and the list of the made ones
METADATA = "metadata.jsonl"
MADE_CAPTIONS = ".made_captions.json"
# `dog.txt` and `dog.mask.png` lie beside `dog.jpg`
CAPTION_SUFFIX = ".txt"
MASK_SUFFIX = ".mask"
# Of one photo's captions: more is no caption, and would be read whole
MOST_BYTES = 32 * 1024
TOO_LONG = f"longer than captions may be, {MOST_BYTES // 1024} KiB"
# Keys of METADATA that hold a caption; the first with a text is taken
CAPTION_KEYS = ("text", "caption", "prompt")
# Files that systems and programs leave in folders, by lower-case name
JUNK = {".ds_store", "thumbs.db", "desktop.ini", "manifest.json", METADATA}


def bare_prompt_line(config: TrainConfig, photos: Sequence[photo_file.Photo]) -> str | None:
    """What happens to the photos with a `bare_prompt`; None when there are none."""
    count = sum(photo.bare_prompt is not None for photo in photos)
    if not count:
        return None
    share = config.bare_share
    said = f"captions: {count} of {len(photos)} photos have none that is the instance prompt itself"
    done = f"{share:.0%} of their exposures show it" if share else "they are never shown with it"
    return f"{said}; {done} (--instance_prompt_share)"


def shuffled_captions(config: TrainConfig, captions: tuple[str, ...]) -> tuple[str, ...]:
    """The captions; with `--shuffle_caption` ORDERS orders of each, without prefix, suffix and kept
    tags."""
    if not config.shuffle_caption:
        return captions
    found = []
    for caption in captions:
        head, tags, tail = tags_in(config, caption)
        kept = tags[: config.keep_tokens]

        # The written order first, then the drawn ones
        found.append(caption)
        for number in range(1, ORDERS):
            others = tags[config.keep_tokens :]
            rng(config.seed, "tags", caption, number).shuffle(others)
            found.append(joined(head, ", ".join([*kept, *others]), tail))
    return tuple(found)


def tags_in(config: TrainConfig, caption: str) -> tuple[str, list[str], str]:
    """A caption's prefix, tags and suffix. The instance prompt got neither prefix nor suffix."""
    head = tail = ""
    if caption != config.instance_prompt:
        prefix = joined((config.caption_prefix or "").strip())
        suffix = joined((config.caption_suffix or "").strip())
        head = prefix if caption.startswith(prefix) else ""
        tail = suffix if caption.endswith(suffix) else ""
    middle = caption[len(head) : len(caption) - len(tail)]
    tags = [tag.strip() for tag in middle.split(",")]
    return head, [tag for tag in tags if tag], tail


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
    found = {}
    for path in sorted(paths):
        named = sidecar_of(path)
        if named:
            found[named] = path
    return found


class Captions:
    """Captions of one folder. `complaints` are (file, reason) of what could not be read."""

    def __init__(self, folder: Path, sidecars: dict[tuple[str, str], Path]):
        self.complaints: list[tuple[Path, str]] = []
        self.sidecars = sidecars
        self._by_name: dict[str, str] = {}
        metadata = folder / METADATA

        # A pipe or a folder of that name is not read, nor a file of any length.
        text = None
        if metadata.is_file() and metadata.stat().st_size > MOST_TEXT_BYTES:
            most = f"{MOST_TEXT_BYTES // 2**20} MiB"
            self.complaints.append((metadata, f"not read: it has more than {most}"))
        elif metadata.is_file():
            text = self._text_of(metadata)

        # One JSON object a line; a bad line costs only itself.
        for number, line in enumerate((text or "").split("\n"), start=1):
            if not line.strip():
                continue
            name, caption = self._row(metadata, number, line)
            if name and caption:
                self._by_name[name] = caption

    def of(self, photo: Path) -> tuple[str, ...]:
        """The photo's own captions, one line each; () when it has none."""
        # The text file beside the photo
        beside = self.sidecars.get((photo.stem, CAPTION_SUFFIX))
        if beside and beside.is_file():
            lines = self._lines_of(beside)
            if lines:
                return lines

        # Else its line in METADATA
        named = self._by_name.get(photo.name)
        return (named,) if named else ()

    def _lines_of(self, path: Path) -> tuple[str, ...]:
        """The lines of a text file, without empty ones; () and a complaint when it has none."""
        if path.stat().st_size > MOST_BYTES:
            self.complaints.append((path, f"captions not read: {TOO_LONG}"))
            return ()
        text = self._text_of(path)
        if text is None:
            return ()
        lines = tuple(filter(None, map(one_space, text.split("\n"))))
        if not lines:
            self.complaints.append((path, "empty caption: the instance prompt is used"))
        return lines

    def _text_of(self, path: Path) -> str | None:
        """Text in UTF-8, or in UTF-16 with a mark, as Windows' Notepad writes it; else None and a
        complaint."""
        try:
            content = path.read_bytes()
            is_wide = content.startswith((BOM_UTF16_LE, BOM_UTF16_BE))
            text = content.decode("utf-16" if is_wide else "utf-8-sig")
        except OSError as error:
            reason = error.strerror
        except UnicodeDecodeError:
            reason = "neither UTF-8 nor UTF-16 text; save it as UTF-8"
        else:
            if "\0" not in text:
                return text
            reason = "it is not a text file"
        self.complaints.append((path, f"captions not read: {reason}"))
        return None

    def _row(self, path: Path, number: int, line: str) -> tuple[str, str]:
        """(file name, caption) in a line of METADATA; both are empty when it is damaged, and a
        complaint says so."""
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

        # What can be read is still used where it fits.
        if not name or not os.path.exists(path.parent / name):
            self.complaints.append((path, f"line {number} names no file of this folder"))
        elif not caption.strip():
            keys = ", ".join(CAPTION_KEYS)
            self.complaints.append((path, f"line {number} has no text, as one of {keys}"))
        return name, one_space(caption)


class KeptCaption(TypedDict):
    """A made caption in a file, with the key of what it was made from."""

    caption: str
    made_from: str


def kept_captions(path: Path) -> dict[str, KeptCaption]:
    """{photo's file name: {"caption", "made_from"}} of made captions; empty if the file is damaged,
    or is none."""
    entries: dict[str, KeptCaption] = {}
    if path.is_file():
        with suppress(UserError):
            entries = read_json(path, dict[str, KeptCaption])

    # Someone may have edited the file.
    kept = {}
    for name, facts in entries.items():
        if all(facts.values()):
            kept[name] = facts | {"caption": one_space(facts["caption"])}
    return kept


def one_space(text: str) -> str:
    """The text on one line. Half a character, which JSON can spell, becomes a question mark."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def dataset_folder(config: TrainConfig) -> Path:
    """The folder with the data set's images; its name is a digest of their content. Raises
    UserError."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    table = load_images(config)

    # All folders that may hold its files: a row may name no file outside of them.
    places = [
        config.cache_dir or datasets.config.HF_DATASETS_CACHE,
        datasets.config.DOWNLOADED_DATASETS_PATH,
        HF_HUB_CACHE,
    ]
    if Path(config.dataset_name).is_dir():
        places.append(config.dataset_name)
    own = [Path(place).resolve() for place in places]

    # Collect images and captions, and the digest that names the folder.
    rows = []
    digest = sha256()
    for row in table:
        content = image_bytes(row[config.image_column], own)
        captions = []
        if config.caption_column:
            captions = captions_in(row[config.caption_column], config.caption_column)
        if content:
            rows.append((content, captions))
            digest.update(sha256(content).digest() + "\0".join(captions).encode())

    # The same data set is written once; another revision gets another folder.
    folder = Path(config.cache_dir or default_cache_dir()) / "photos" / digest.hexdigest()[:16]
    if not folder.is_dir():
        with atomic_directory(folder) as new:
            write_rows(new, rows)
    return folder


def load_images(config: TrainConfig) -> Iterable[dict[str, Any]]:
    """The rows of the train split, with images left encoded. Raises UserError."""
    import datasets

    name = config.dataset_name
    try:
        table = datasets.load_dataset(
            name, config.dataset_config_name, cache_dir=config.cache_dir, split="train"
        )
    except Exception as error:  # raised by the library, the hub or the file formats
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--dataset_name {name}: cannot be loaded: {reason}") from error

    # Both columns must be there, with the nearest name for a mistyped one.
    for flag in ("image_column", "caption_column"):
        wanted = getattr(config, flag)
        if wanted is not None and wanted not in table.column_names:
            columns = ", ".join(table.column_names)
            close = nearest(wanted, table.column_names)
            hint = f" Did you mean {close}?" if close else ""
            raise UserError(f"--{flag} {wanted}: the data set has the columns {columns}.{hint}")

    # The files' bytes, not decoded pixels: the folder gets them unchanged.
    column = config.image_column
    if not isinstance(table.features[column], datasets.Image):
        raise UserError(f"--image_column {column}: that column of {name} holds no images.")
    return table.cast_column(column, datasets.Image(decode=False))


def captions_in(cell: Any, column: str) -> list[str]:
    """The captions in a cell of the column: a text, or a list of texts. Raises UserError for
    anything else."""
    texts = cell if isinstance(cell, list) else [cell]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise UserError(
            f"--caption_column {column}: it holds neither texts nor lists of texts; name another."
        )
    return list(filter(None, texts))


def image_bytes(cell: dict[str, Any] | None, own: list[Path]) -> bytes:
    """The image's file, empty for an empty cell. Raises UserError for a file outside of the folders
    `own`."""
    cell = cell or {}
    content = cell.get("bytes") or b""
    named = cell.get("path") or ""
    if content or not named:
        return content

    # Anyone may have written the table: it could name a private file of this machine.
    path = Path(named.replace("\0", "")).resolve()
    is_own = any(path.is_relative_to(folder) for folder in own)
    if "\0" in named or not path.is_file() or not is_own:
        raise UserError(
            f"--dataset_name: it names {one_line(named)}, which is not a file of the data set."
        )
    return path.read_bytes()


def write_rows(folder: Path, rows: list[tuple[bytes, list[str]]]) -> None:
    """Write images, one caption each into METADATA, and several into a text file beside the
    image."""
    lines = []
    for number, (content, captions) in enumerate(rows):
        name = f"{number:05d}.{suffix_of(content)}"
        (folder / name).write_bytes(content)
        if len(captions) > 1:
            text = "\n".join(map(one_space, captions))
            (folder / name).with_suffix(CAPTION_SUFFIX).write_text(text, encoding="utf-8")
        elif captions:
            lines.append(json.dumps({"file_name": name, "text": captions[0]}, ensure_ascii=False))
    if lines:
        (folder / METADATA).write_text("\n".join(lines) + "\n", encoding="utf-8")


def suffix_of(content: bytes) -> str:
    """The suffix for an image file, without the dot; "img" for one that cannot be read, which the
    reader of the folder reports."""
    try:
        with Image.open(BytesIO(content)) as image:
            kind = (image.format or "img").lower()
    except Exception:  # decoders raise any error on damaged bytes
        return "img"
    return "jpg" if kind in ("jpeg", "mpo") else kind


@dataclass(frozen=True)
class Skipped:
    """A file of the folder that is not used."""

    path: Path
    reason: str
    is_photo: bool = False  # it was meant to be one
    size_px: tuple[int, int] | None = None  # None when unreadable


@dataclass(frozen=True)
class PhotoReport:
    """What was found in a folder, or in those of all subjects."""

    photos: list[photo_file.Photo] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    sidecars: list[Path] = field(default_factory=list)  # captions and masks in use


def log_strays(report: PhotoReport) -> None:
    """Mention the files that are no photos in one line of the log."""
    strays = []
    for item in report.skipped:
        if not item.is_photo and not item.path.name.startswith("."):
            strays.append(item)
    if strays:
        names = summary_of_skipped(PhotoReport(skipped=strays))
        logger.warning("%s", spelled_out(f"files not used ({len(strays)}): {names}"))


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
        report = report_of(subject, number)
        found.skipped.extend(report.skipped)
        found.sidecars.extend(report.sidecars)

        # Photos that the user leaves out stay in the report, with that reason.
        used = []
        for photo in report.photos:
            if photo.path.name in config.leave_out:
                reason = "left out by --leave_out"
                found.skipped.append(Skipped(photo.path, reason, size_px=photo.size_px))
            else:
                used.append(photo)
        if not used:
            raise UserError("--leave_out leaves no photo; name fewer.")
        found.photos.extend(used)
    found.photos[:] = with_made(config, found.photos)

    # A mistyped name would silently leave nothing out.
    named = {item.path.name for item in found.skipped}
    unknown = [name for name in config.leave_out if name not in named]
    if unknown:
        raise UserError(f"--leave_out {unknown[0]}: there is no such photo.")
    return found


def report_of(config: TrainConfig, number: int) -> PhotoReport:
    """The photos of `--instance_data_dir` or `--dataset_name`, as those of subject `number`. Raises
    UserError when there is none."""
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
    photos = list(photos)
    run_dir = RunDir(config.output_dir)
    if config.captions == "auto":
        kept = kept_captions(run_dir.captions_path)
        subjects = config.each_subject
        for number, photo in enumerate(photos):
            made = kept.get(photo.kept_name)
            if made and not photo.is_captioned:
                captioned = replace(photo, captions=(made["caption"],))
                photos[number] = with_own_captions(subjects[photo.subject], captioned)
    if config.masks == "auto":
        photos = photo_file.with_kept_masks(photos, run_dir.masks_dir)
    return photos


def with_own_captions(config: TrainConfig, photo: photo_file.Photo) -> photo_file.Photo:
    """The photo, with prefix and suffix on its own captions, and with its bare prompt if none of
    them is the instance prompt."""
    prompt = config.instance_prompt
    prefix = (config.caption_prefix or "").strip()
    suffix = (config.caption_suffix or "").strip()
    found = []
    for caption in photo.captions:
        found.append(caption if caption == prompt else joined(prefix, caption, suffix))
    is_there = as_heard(prompt) in map(as_heard, found)
    return replace(photo, captions=tuple(found), bare_prompt=None if is_there else prompt)


def as_heard(prompt: str) -> str:
    """The prompt as the text encoders hear it: they know neither case nor the width of spaces. A
    full stop at its end is left out too."""
    return " ".join(prompt.lower().split()).rstrip(".")


def summary_of_skipped(report: PhotoReport) -> str:
    """The first three skipped files with their reasons, photos first, and how many more there
    are."""
    first = sorted(report.skipped, key=lambda item: not item.is_photo)[:3]
    shown = [f"{item.path.name} ({item.reason})" for item in first]
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
    captions = Captions(folder, sidecars_of(paths))
    report = PhotoReport()

    # The photos. Files of this program that lie among them need no mention.
    for path in paths:
        if is_sidecar_name(path) or path.name in (MADE_CAPTIONS, SUBJECT_FILE):
            continue
        item = read_photo(
            path, captions, prompt=instance_prompt, resolution_px=resolution_px, alpha=alpha
        )
        if isinstance(item, photo_file.Photo):
            report.photos.append(item)
        else:
            report.skipped.append(item)

    # The files beside them: in use, or without a photo of their name
    stems = {photo.path.stem for photo in report.photos}
    for path in filter(is_sidecar_name, paths):
        named = sidecar_of(path)
        reason = no_file_reason(path)
        if reason:
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
    """One file of a folder.

    path: of the file
    captions: of its folder
    prompt: the caption of a photo without its own
    resolution_px: shorter side that training needs; a photo far below it is skipped
    alpha: `mask` if the opaque part of a transparent photo is its mask
    """
    # What is no photo by its name or kind is not opened.
    reason = no_file_reason(path)
    if reason is None and (path.name.lower() in JUNK or path.name.startswith(".")):
        reason = "stray: a file of the system"
    if reason:
        return Skipped(path, reason)
    try:
        image = photo_file.open_image(path)
    except photo_file.UnreadableImageError as error:
        claims = path.suffix.lower() in photo_file.IMAGE_SUFFIXES
        return Skipped(path, str(error) if claims else "stray: not a photo", is_photo=claims)

    # Its size: a photo that would be enlarged more than eight times shows nothing.
    height, width = photo_file.upright_size(image)
    reasons = ["rotated by EXIF: turned upright"] if photo_file.is_rotated(image) else []
    shorter = min(height, width)
    if shorter < max(8, resolution_px // 8):
        reason = f"tiny: {width} x {height} px for a resolution of {resolution_px}"
        return Skipped(path, reason, is_photo=True, size_px=(height, width))
    if shorter < resolution_px:
        enlarged = f"{width} x {height} px is enlarged {resolution_px / shorter:.1f} times"
        reasons.append(f"too small for the resolution: {enlarged}")

    # What lies beside it
    beside = captions.sidecars.get((path.stem, MASK_SUFFIX))
    mask_path, remarks = photo_file.find_mask(path, image, beside, alpha_is_mask=alpha == "mask")
    own = captions.of(path)
    return photo_file.Photo(
        path=path,
        size_px=(height, width),
        captions=own or (prompt,),
        mask_path=mask_path,
        reasons=(*reasons, *remarks),
        is_captioned=bool(own),
    )


def is_sidecar_name(path: Path) -> bool:
    """Whether it is named like a file of captions or a mask."""
    return path.name == METADATA or sidecar_of(path) is not None


def no_file_reason(path: Path) -> str | None:
    """What the path is when it is not a file; None for a file. Reading a pipe might have no end."""
    if path.is_dir():
        return "stray: a folder; photos inside it are not read"
    if path.is_symlink() and not path.exists():
        return "stray: a link to nothing"
    return None if path.is_file() else "stray: not a file"
