"""A folder of photos as a report: the photos, the files beside them, and why a file is left out.

No file in the folder can stop the program: unusable files are listed with a reason. A photo's
captions and mask are found by `beside`, and by `caption_variants` what training shows of them.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from dreambooth_moslora.disk.contents import file_digest
from dreambooth_moslora.disk.paths import SUBJECT_FILE
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError, spelled_out
from dreambooth_moslora.photos import faults, photo_file, synthetic
from dreambooth_moslora.photos.caption_variants import with_own_captions
from dreambooth_moslora.photos.sidecars import (
    MASK_SUFFIX,
    METADATA,
    Captions,
    is_sidecar_name,
    kept_captions,
    sidecar_of,
    sidecars_of,
)
from dreambooth_moslora.settings.train_config import TrainConfig

logger = logging.getLogger(__name__)

# A photo that is enlarged more times than this is at fault; up to it only a little soft.
MAX_ENLARGED = 1.5
# Files that systems and programs leave in folders, by lower-case name
JUNK = {".ds_store", "thumbs.db", "desktop.ini", "manifest.json", METADATA}
# What this program puts among photos, beside captions and masks
OWN_FILES = {SUBJECT_FILE, synthetic.RECORD, synthetic.REJECTED}


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
    remarks: tuple[str, ...] = ()  # on all photos together, once they are examined


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
    """The photos of `--instance_data_dir`, as those of subject `number`. Raises UserError when
    there is none."""
    if not config.instance_data_dir:
        raise UserError("give the photos: --instance_data_dir FOLDER.")
    folder = Path(config.instance_data_dir)
    report = find_photos(folder, config.instance_prompt, config.resolution)
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
    if config.masks != "given":
        photos = photo_file.with_kept_masks(photos, run_dir.masks_dir)
    return photos


def hash_files(report: PhotoReport) -> dict[str, str]:
    """Return the SHA-256 of each photo, and of the captions and masks beside the photos, by file
    name; those of further subjects are in `1/` and so on. Raises OSError."""
    files = {photo.kept_name: photo.path for photo in report.photos}
    subjects = {photo.path.parent: photo.subject for photo in report.photos}
    for path in report.sidecars:
        subject = subjects[path.parent]
        files[f"{subject}/{path.name}" if subject else path.name] = path
    return {name: file_digest(path) for name, path in files.items()}


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
    """Open every file of `folder` (not of its subfolders), by name. Raises UserError when there is
    none."""
    require_folder_of_photos(folder)
    paths = sorted(folder.iterdir())
    captions = Captions(folder, sidecars_of(paths))
    report = PhotoReport()

    # Which of them a model made
    made: dict[str, synthetic.Made] = {}
    try:
        made = synthetic.read_record(folder)
    except UserError as error:
        report.skipped.append(Skipped(folder / synthetic.RECORD, f"not read: {error}"))

    # The photos. Files of this program that lie among them need no mention.
    for path in paths:
        if is_sidecar_name(path) or path.name in OWN_FILES:
            continue
        item = read_photo(
            path, captions, prompt=instance_prompt, resolution_px=resolution_px, alpha=alpha
        )
        if isinstance(item, photo_file.Photo):
            made_by = synthetic.maker(made[path.name]) if path.name in made else ""
            report.photos.append(replace(item, made_by=made_by))
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
    is_turned = photo_file.orientation(image) in photo_file.TURNS
    reasons = ["rotated by EXIF: turned upright"] if is_turned else []
    shorter = min(height, width)
    if shorter < max(8, resolution_px // 8):
        reason = f"tiny: {width} x {height} px for a resolution of {resolution_px}"
        return Skipped(path, reason, is_photo=True, size_px=(height, width))
    if shorter < resolution_px:
        times = resolution_px / shorter
        if times > MAX_ENLARGED:
            reasons.append(faults.reason("too small", width=width, height=height, times=times))
        else:
            reasons.append(f"a little small: {width} x {height} px is enlarged {times:.1f} times")

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


def no_file_reason(path: Path) -> str | None:
    """What the path is when it is not a file; None for a file. Reading a pipe might have no end."""
    if path.is_dir():
        return "stray: a folder; photos inside it are not read"
    return None if path.is_file() else "stray: not a file"
