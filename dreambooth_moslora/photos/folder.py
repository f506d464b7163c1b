"""Reads a folder of photos into a `PhotoReport`: the photos, and the files that were left out.

A photo's captions are the lines of `name.txt` beside it, else its line in `metadata.jsonl` ({"file_name",
"text"}), else a caption kept in the run folder by `caption_making`, else the instance prompt. `masks` finds its
mask. No file in the folder can stop the program: unusable files are listed with a reason.
"""

import logging
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from PIL import Image

from dreambooth_moslora.core.config.subject_tables import each_subject
from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.errors import UserError, spelled_out
from dreambooth_moslora.core.names import SUBJECT_FILE
from dreambooth_moslora.core.prompts import joined
from dreambooth_moslora.core.run_files.run_folder import RunDir
from dreambooth_moslora.photos.image_file import (
    IMAGE_SUFFIXES,
    UnreadableImageError,
    is_rotated,
    open_image,
    upright_size,
)
from dreambooth_moslora.photos.masks import find_mask, with_kept_masks
from dreambooth_moslora.photos.photo import Photo
from dreambooth_moslora.photos.sidecars import (
    MADE_CAPTIONS,
    MASK_SUFFIX,
    METADATA,
    Captions,
    kept_captions,
    sidecar_of,
    sidecars_of,
)

__all__ = [
    "PhotoReport",
    "Skipped",
    "find_photos",
    "instance_photos",
    "photo_report",
    "require_folder_of_photos",
    "smallest_side_px",
    "usable_photos",
    "with_kept_captions",
]

logger = logging.getLogger(__name__)

JUNK = {".ds_store", "thumbs.db", "desktop.ini", "manifest.json", METADATA}


@dataclass(frozen=True)
class Skipped:
    """A file that is not used. `is_photo`: it was meant to be a photo. `size_px` is None when unreadable."""

    path: Path
    reason: str
    is_photo: bool = False
    size_px: tuple[int, int] | None = None


@dataclass(frozen=True)
class PhotoReport:
    """`sidecars` are the captions and masks in use."""

    photos: list[Photo] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    sidecars: list[Path] = field(default_factory=list)


def smallest_side_px(resolution_px: int) -> int:
    """A smaller photo is not used: it would be enlarged more than eight times."""
    return max(8, resolution_px // 8)


def instance_photos(config: TrainConfig) -> PhotoReport:
    """The `photo_report`; files that are no photos are mentioned in one line of the log. Raises UserError."""
    report = photo_report(config)
    strays = [item for item in report.skipped if not item.is_photo and not item.path.name.startswith(".")]
    if strays:
        say_once(f"files not used ({len(strays)}): {summary_of_skipped(PhotoReport(skipped=strays))}")
    return report


def usable_photos(report: PhotoReport) -> list[Photo]:
    """The report's photos; each photo that was left out is logged with its reason."""
    for skipped in report.skipped:
        if skipped.is_photo:
            logger.warning("%s", spelled_out(f"{skipped.path.name} is left out: {skipped.reason}"))
    return report.photos


@cache
def say_once(line: str) -> None:
    """Log the line once, as a run may read its photos several times."""
    logger.warning("%s", spelled_out(line))


def photo_report(config: TrainConfig) -> PhotoReport:
    """The photos of all subjects, numbered by subject. Raises UserError for a subject without a usable photo."""
    found = PhotoReport()
    for number, subject in enumerate(each_subject(config)):
        report = without(report_of(subject, number), config.leave_out)
        found.photos.extend(report.photos)
        found.skipped.extend(report.skipped)
        found.sidecars.extend(report.sidecars)
    named = {item.path.name for item in found.skipped}
    if unknown := [name for name in config.leave_out if name not in named]:
        raise UserError(f"--leave_out {unknown[0]}: there is no such photo.")
    return found


def without(report: PhotoReport, names: Collection[str]) -> PhotoReport:
    """Leave out the photos of these names. Raises UserError for an unknown name, and when no photo stays."""
    photos = [photo for photo in report.photos if photo.path.name not in names]
    if not photos:
        raise UserError("--leave_out leaves no photo; name fewer.")
    gone = [photo for photo in report.photos if photo.path.name in names]
    chosen = [Skipped(photo.path, "left out by --leave_out", False, photo.size_px) for photo in gone]
    return replace(report, photos=photos, skipped=[*report.skipped, *chosen])


def report_of(config: TrainConfig, number: int) -> PhotoReport:
    """The photos of `--instance_data_dir` or `--dataset_name`, as those of subject `number`. Raises UserError."""
    if config.dataset_name:
        from dreambooth_moslora.photos.hub_dataset import dataset_folder

        folder = dataset_folder(config)
    elif config.instance_data_dir:
        folder = Path(config.instance_data_dir)
    else:
        raise UserError("give the photos: --instance_data_dir FOLDER, or --dataset_name NAME.")
    report = find_photos(folder, config.instance_prompt, config.resolution, alpha=config.alpha)
    photos = [replace(with_own_captions(config, photo), subject=number) for photo in report.photos]
    report = replace(report, photos=photos)
    if not report.photos:
        raise UserError(f"no usable photo in {folder}: {summary_of_skipped(report)}")
    if config.captions == "auto":
        report = replace(report, photos=with_kept_captions(config, report.photos))
    if config.masks == "auto":
        return replace(report, photos=with_kept_masks(report.photos, RunDir(config.output_dir).masks_dir))
    return report


def with_kept_captions(config: TrainConfig, photos: list[Photo]) -> list[Photo]:
    """The photos; those without a caption get the one that training made."""
    kept, found = kept_captions(RunDir(config.output_dir).captions_path), []
    for photo in photos:
        made = None if photo.is_captioned else kept.get(photo.kept_name)
        if made is not None:
            photo = with_own_captions(config, replace(photo, captions=(made["caption"],)))
        found.append(photo)
    return found


def with_own_captions(config: TrainConfig, photo: Photo) -> Photo:
    """The photo with framed captions, and the instance prompt as its bare prompt if none of them is it."""
    captions, prompt = framed(config, photo), config.instance_prompt
    is_there = as_heard(prompt) in map(as_heard, captions)
    return replace(photo, captions=captions, bare_prompt=None if is_there else prompt)


def as_heard(prompt: str) -> str:
    """What the text encoders hear: neither case nor the width of spaces; and without a full stop."""
    return " ".join(prompt.lower().split()).rstrip(".")


def framed(config: TrainConfig, photo: Photo) -> tuple[str, ...]:
    """The photo's own captions with prefix and suffix; the instance prompt is unchanged."""
    prefix, suffix = ((end or "").strip() for end in (config.caption_prefix, config.caption_suffix))
    found = []
    for caption in photo.captions:
        is_own = caption != config.instance_prompt
        found.append(joined(prefix, caption, suffix) if is_own else caption)
    return tuple(found)


def summary_of_skipped(report: PhotoReport) -> str:
    """The first few reasons, in one line."""
    if not report.skipped:
        return "it is empty."
    shown = [f"{item.path.name} ({item.reason})" for item in sorted(report.skipped, key=lambda s: not s.is_photo)[:3]]
    more = len(report.skipped) - len(shown)
    return "; ".join(shown) + (f"; and {more} more." if more else ".")


def require_folder_of_photos(folder: Path) -> None:
    """Raises UserError when there is no such folder."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; give a folder of photos."
        )


def find_photos(folder: Path, instance_prompt: str, resolution_px: int, *, alpha: str = "mask") -> PhotoReport:
    """Open every file of `folder` (not of its subfolders), by name. Raises UserError when it cannot be read."""
    folder = Path(folder)
    require_folder_of_photos(folder)
    try:
        paths = sorted(folder.iterdir())
    except PermissionError:
        raise UserError(f"{folder}: cannot be read (permission denied).") from None
    reader = FolderReader(folder, paths, instance_prompt, resolution_px, alpha)
    return reader.read()


class FolderReader:
    """Sorts the files of one folder into photos, sidecars and the rest."""

    def __init__(self, folder: Path, paths: list[Path], instance_prompt: str, resolution_px: int, alpha: str):
        self.paths, self.prompt, self.resolution_px, self.alpha = paths, instance_prompt, resolution_px, alpha
        self.sidecars = sidecars_of(paths)
        self.captions = Captions(folder, self.sidecars)

    def read(self) -> PhotoReport:
        report = PhotoReport()
        for path in self.paths:
            if not is_sidecar_name(path) and path.name not in (MADE_CAPTIONS, SUBJECT_FILE):
                item = self._read_one(path)
                (report.photos if isinstance(item, Photo) else report.skipped).append(item)
        stems = {photo.path.stem for photo in report.photos}
        for path in self.paths:
            if is_sidecar_name(path):
                self._sort_sidecar(path, stems, report)
        report.skipped.extend(Skipped(path, reason) for path, reason in self.captions.complaints)
        return report

    def _sort_sidecar(self, path: Path, stems: set[str], report: PhotoReport) -> None:
        named = sidecar_of(path)
        if reason := no_file_reason(path):
            report.skipped.append(Skipped(path, reason))
        elif named is None or (named[0] in stems and self.sidecars[named] == path):
            report.sidecars.append(path)
        else:
            report.skipped.append(Skipped(path, "stray: belongs to no photo"))

    def _read_one(self, path: Path) -> Photo | Skipped:
        claims = path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
        if reason := stray_reason(path):
            return Skipped(path, reason)
        try:
            image = open_image(path)
        except UnreadableImageError as error:
            return Skipped(path, str(error) if claims else "stray: not a photo", is_photo=claims)
        return self._judge(path, image)

    def _judge(self, path: Path, image: Image.Image) -> Photo | Skipped:
        height, width = upright_size(image)
        reasons = ["rotated by EXIF: turned upright"] if is_rotated(image) else []
        if min(height, width) < smallest_side_px(self.resolution_px):
            reason = f"tiny: {width} x {height} px for a resolution of {self.resolution_px}"
            return Skipped(path, reason, is_photo=True, size_px=(height, width))
        if min(height, width) < self.resolution_px:
            times = self.resolution_px / min(height, width)
            reasons.append(f"too small for the resolution: {width} x {height} px is enlarged {times:.1f} times")
        beside = self.sidecars.get((path.stem, MASK_SUFFIX))
        mask_path, remarks = find_mask(path, image, beside, alpha_is_mask=self.alpha == "mask")
        own = self.captions.of(path)
        return Photo(path, (height, width), own or (self.prompt,), mask_path, (*reasons, *remarks), bool(own))


def is_sidecar_name(path: Path) -> bool:
    return path.name == METADATA or sidecar_of(path) is not None


def stray_reason(path: Path) -> str | None:
    if path.name.lower() in JUNK or path.name.startswith("."):
        return no_file_reason(path) or "stray: a file of the system"
    return no_file_reason(path)


def no_file_reason(path: Path) -> str | None:
    """What it is if not a file, as a pipe is, of which reading might have no end."""
    if path.is_dir():
        return "stray: a folder; photos inside it are not read"
    if path.is_symlink() and not path.exists():
        return "stray: a link to nothing"
    return None if path.is_file() else "stray: not a file"
