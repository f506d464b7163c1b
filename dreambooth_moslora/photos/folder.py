"""A folder of photos as a report: the photos, the files beside them, and why a file is left out.

No file in the folder can stop the program: unusable files are listed with a reason. A photo's
captions and mask are found by `beside`, and by `caption_variants` what training shows of them.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from dreambooth_moslora.disk.contents import hash_file
from dreambooth_moslora.disk.paths import SUBJECT_FILE
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError, escape_control_characters
from dreambooth_moslora.photos import faults, photo_file, synthetic
from dreambooth_moslora.photos.caption_variants import prepare_captions
from dreambooth_moslora.photos.sidecars import (
    MASK_SUFFIX,
    METADATA_NAME,
    FolderCaptions,
    find_sidecars,
    is_sidecar_name,
    parse_sidecar_name,
    read_saved_captions,
)
from dreambooth_moslora.settings.train_config import TrainConfig

logger = logging.getLogger(__name__)

# A photo that is enlarged more times than this is at fault; up to it only a little soft.
MAX_ENLARGEMENT = 1.5
# Files that systems and programs leave in folders, by lower-case name
JUNK_NAMES = {".ds_store", "thumbs.db", "desktop.ini", "manifest.json", METADATA_NAME}
# What this program puts among photos, beside captions and masks
PROGRAM_FILES = {SUBJECT_FILE, synthetic.RECORD_NAME, synthetic.REJECTED_NAME}


@dataclass(frozen=True)
class SkippedFile:
    """A file of the folder that is not used."""

    path: Path
    reason: str
    is_photo: bool = False  # it was meant to be one
    size_px: tuple[int, int] | None = None  # None when unreadable


@dataclass(frozen=True)
class PhotoReport:
    """What was found in a folder, or in those of all subjects."""

    photos: list[photo_file.Photo] = field(default_factory=list)
    skipped: list[SkippedFile] = field(default_factory=list)
    sidecars: list[Path] = field(default_factory=list)  # captions and masks in use
    remarks: tuple[str, ...] = ()  # on all photos together, once they are examined


def log_strays(report: PhotoReport) -> None:
    """Mention the files that are no photos in one line of the log."""
    strays = []
    for item in report.skipped:
        if not item.is_photo and not item.path.name.startswith("."):
            strays.append(item)
    if strays:
        names = summarize_skipped(PhotoReport(skipped=strays))
        logger.warning("%s", escape_control_characters(f"files not used ({len(strays)}): {names}"))


def list_usable_photos(report: PhotoReport) -> list[photo_file.Photo]:
    """The report's photos; each photo that was left out is logged with its reason."""
    for skipped in report.skipped:
        if skipped.is_photo:
            logger.warning(
                "%s",
                escape_control_characters(f"{skipped.path.name} is left out: {skipped.reason}"),
            )
    return report.photos


def build_photo_report(config: TrainConfig) -> PhotoReport:
    """The photos of all subjects, numbered by subject. Raises UserError for a subject without a
    usable photo."""
    found = PhotoReport()
    for number, subject in enumerate(config.each_subject):
        report = build_subject_report(subject, number)
        found.skipped.extend(report.skipped)
        found.sidecars.extend(report.sidecars)

        # Photos that the user leaves out stay in the report, with that reason.
        used = []
        for photo in report.photos:
            if photo.path.name in config.leave_out:
                reason = "left out by --leave_out"
                found.skipped.append(SkippedFile(photo.path, reason, size_px=photo.size_px))
            else:
                used.append(photo)
        if not used:
            raise UserError("--leave_out leaves no photo; name fewer.")
        found.photos.extend(used)
    found.photos[:] = add_saved_sidecars(config, found.photos)

    # A mistyped name would silently leave nothing out.
    named = {item.path.name for item in found.skipped}
    unknown = [name for name in config.leave_out if name not in named]
    if unknown:
        raise UserError(f"--leave_out {unknown[0]}: there is no such photo.")
    return found


def build_subject_report(config: TrainConfig, number: int) -> PhotoReport:
    """The photos of `--instance_data_dir`, as those of subject `number`. Raises UserError when
    there is none."""
    if not config.instance_data_dir:
        raise UserError("give the photos: --instance_data_dir FOLDER.")
    folder = Path(config.instance_data_dir)
    report = find_photos(folder, config.instance_prompt, config.resolution)
    photos = [replace(prepare_captions(config, photo), subject=number) for photo in report.photos]
    if not photos:
        raise UserError(f"no usable photo in {folder}: {summarize_skipped(report)}")
    return replace(report, photos=photos)


def add_saved_sidecars(
    config: TrainConfig, photos: Iterable[photo_file.Photo]
) -> list[photo_file.Photo]:
    """The photos; with `--captions auto` and `--masks auto` with what training has made in the run
    folder by now."""
    photos = list(photos)
    run_dir = RunDir(config.output_dir)
    if config.captions == "auto":
        kept = read_saved_captions(run_dir.captions_path)
        subjects = config.each_subject
        for number, photo in enumerate(photos):
            made = kept.get(photo.run_file_name)
            if made and not photo.is_captioned:
                captioned = replace(photo, captions=(made["caption"],))
                photos[number] = prepare_captions(subjects[photo.subject], captioned)
    if config.masks != "given":
        photos = photo_file.add_saved_masks(photos, run_dir.masks_dir)
    return photos


def hash_files(report: PhotoReport) -> dict[str, str]:
    """Return the SHA-256 of each photo, and of the captions and masks beside the photos, by file
    name; those of further subjects are in `1/` and so on. Raises OSError."""
    files = {photo.run_file_name: photo.path for photo in report.photos}
    subjects = {photo.path.parent: photo.subject for photo in report.photos}
    for path in report.sidecars:
        subject = subjects[path.parent]
        files[f"{subject}/{path.name}" if subject else path.name] = path
    return {name: hash_file(path) for name, path in files.items()}


def summarize_skipped(report: PhotoReport) -> str:
    """The first three skipped files with their reasons, photos first, and how many more there
    are."""
    first = sorted(report.skipped, key=lambda item: not item.is_photo)[:3]
    shown = [f"{item.path.name} ({item.reason})" for item in first]
    more = len(report.skipped) - len(shown)
    return ("; ".join(shown) or "it is empty") + (f"; and {more} more." if more else ".")


def require_photo_folder(folder: Path) -> None:
    """Raises UserError when there is no such folder."""
    if not folder.is_dir():
        reason = "not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {reason}; give a folder of photos.")


def find_photos(
    folder: Path, instance_prompt: str, resolution_px: int, *, alpha: str = "mask"
) -> PhotoReport:
    """Open every file of `folder` (not of its subfolders), by name. Raises UserError when there is
    none."""
    require_photo_folder(folder)
    paths = sorted(folder.iterdir())
    captions = FolderCaptions(folder, find_sidecars(paths))
    report = PhotoReport()

    # Which of them a model made
    made: dict[str, synthetic.SyntheticRecord] = {}
    try:
        made = synthetic.read_record(folder)
    except UserError as error:
        report.skipped.append(SkippedFile(folder / synthetic.RECORD_NAME, f"not read: {error}"))

    # The photos. Files of this program that lie among them need no mention.
    for path in paths:
        if is_sidecar_name(path) or path.name in PROGRAM_FILES:
            continue
        item = read_photo(
            path, captions, prompt=instance_prompt, resolution_px=resolution_px, alpha=alpha
        )
        if isinstance(item, photo_file.Photo):
            made_by = synthetic.format_maker(made[path.name]) if path.name in made else ""
            report.photos.append(replace(item, made_by=made_by))
        else:
            report.skipped.append(item)

    # The files beside them: in use, or without a photo of their name
    stems = {photo.path.stem for photo in report.photos}
    for path in filter(is_sidecar_name, paths):
        named = parse_sidecar_name(path)
        reason = explain_not_file(path)
        if reason:
            report.skipped.append(SkippedFile(path, reason))
        elif named is None or (named[0] in stems and captions.sidecars[named] == path):
            report.sidecars.append(path)
        else:
            report.skipped.append(SkippedFile(path, "stray: belongs to no photo"))
    report.skipped.extend(SkippedFile(path, reason) for path, reason in captions.complaints)
    return report


def read_photo(
    path: Path, captions: FolderCaptions, prompt: str, resolution_px: int, alpha: str
) -> photo_file.Photo | SkippedFile:
    """One file of a folder.

    path: of the file
    captions: of its folder
    prompt: the caption of a photo without its own
    resolution_px: shorter side that training needs; a photo far below it is skipped
    alpha: `mask` if the opaque part of a transparent photo is its mask
    """
    # What is no photo by its name or kind is not opened.
    reason = explain_not_file(path)
    if reason is None and (path.name.lower() in JUNK_NAMES or path.name.startswith(".")):
        reason = "stray: a file of the system"
    if reason:
        return SkippedFile(path, reason)
    try:
        image = photo_file.open_image(path)
    except photo_file.UnreadableImageError as error:
        claims = path.suffix.lower() in photo_file.IMAGE_SUFFIXES
        return SkippedFile(path, str(error) if claims else "stray: not a photo", is_photo=claims)

    # Its size: a photo that would be enlarged more than eight times shows nothing.
    height, width = photo_file.get_upright_size(image)
    is_turned = photo_file.read_orientation(image) in photo_file.ORIENTATION_TRANSPOSES
    reasons = ["rotated by EXIF: turned upright"] if is_turned else []
    shorter = min(height, width)
    if shorter < max(8, resolution_px // 8):
        reason = f"tiny: {width} x {height} px for a resolution of {resolution_px}"
        return SkippedFile(path, reason, is_photo=True, size_px=(height, width))
    if shorter < resolution_px:
        times = resolution_px / shorter
        if times > MAX_ENLARGEMENT:
            reasons.append(faults.make_reason("too small", width=width, height=height, times=times))
        else:
            reasons.append(f"a little small: {width} x {height} px is enlarged {times:.1f} times")

    # What lies beside it
    beside = captions.sidecars.get((path.stem, MASK_SUFFIX))
    mask_path, remarks = photo_file.find_mask(path, image, beside, alpha_is_mask=alpha == "mask")
    own = captions.get_captions(path)
    return photo_file.Photo(
        path=path,
        size_px=(height, width),
        captions=own or (prompt,),
        mask_path=mask_path,
        reasons=(*reasons, *remarks),
        is_captioned=bool(own),
    )


def explain_not_file(path: Path) -> str | None:
    """What the path is when it is not a file; None for a file. Reading a pipe might have no end."""
    if path.is_dir():
        return "stray: a folder; photos inside it are not read"
    return None if path.is_file() else "stray: not a file"
