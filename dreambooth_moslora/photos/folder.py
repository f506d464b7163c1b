"""Read a folder of photos into a report: the photos, their sidecars, and the skipped files with
reasons.

No file in the folder can stop the program: unusable files are listed with a reason. `sidecars`
finds a photo's captions and mask, and `caption_variants` prepares the captions for training.
"""

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from dreambooth_moslora.disk.contents import hash_file
from dreambooth_moslora.disk.paths import SUBJECT_FILE
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError, escape_control_characters
from dreambooth_moslora.photos import photo_file, quality, sidecars, synthetic
from dreambooth_moslora.photos.caption_variants import prepare_captions
from dreambooth_moslora.photos.photo_file import PhotoReport, SkippedFile
from dreambooth_moslora.settings.train_config import TrainConfig

logger = logging.getLogger(__name__)

MAX_ENLARGEMENT = 1.5
"""Enlargement above which a photo is too small; up to it the photo is only a little soft."""
JUNK_NAMES = {".ds_store", "thumbs.db", "desktop.ini", "manifest.json", sidecars.METADATA_NAME}
"""Lower-case names of files that systems and programs leave in folders."""
PROGRAM_FILES = {SUBJECT_FILE, synthetic.RECORD_NAME, synthetic.REJECTED_NAME}
"""Names that this program writes among photos, apart from captions and masks."""


def log_strays(report: PhotoReport) -> None:
    """Log the files that are no photos, in one line."""
    items = (item for item in report.skipped if not item.is_photo)
    strays = [item for item in items if not item.path.name.startswith(".")]
    if strays:
        names = summarize_skipped(PhotoReport(skipped=strays))
        logger.warning("%s", escape_control_characters(f"files not used ({len(strays)}): {names}"))


def list_usable_photos(report: PhotoReport) -> list[photo_file.Photo]:
    """Return the report's photos, and log each skipped photo with its reason."""
    for skipped in report.skipped:
        if skipped.is_photo:
            logger.warning(
                "%s",
                escape_control_characters(f"{skipped.path.name} is left out: {skipped.reason}"),
            )
    return report.photos


def build_photo_report(config: TrainConfig) -> PhotoReport:
    """Return the photos of all subjects, numbered by subject. Raises UserError for a subject
    without a usable photo."""
    merged = PhotoReport()
    for number, subject in enumerate(config.each_subject):
        report = build_subject_report(subject, number)
        merged.skipped.extend(report.skipped)
        merged.sidecars.extend(report.sidecars)

        # Photos that the user leaves out stay in the report, with that reason.
        used = [photo for photo in report.photos if photo.path.name not in config.leave_out]
        if not used:
            raise UserError("--leave_out leaves no photo; name fewer.")
        merged.photos.extend(used)
        merged.skipped.extend(
            SkippedFile(photo.path, "left out by --leave_out", size_px=photo.size_px)
            for photo in report.photos
            if photo.path.name in config.leave_out
        )
    merged.photos[:] = add_saved_sidecars(config, merged.photos)

    # A mistyped name would silently leave nothing out.
    skipped_names = {item.path.name for item in merged.skipped}
    unknown = [name for name in config.leave_out if name not in skipped_names]
    if unknown:
        raise UserError(f"--leave_out {unknown[0]}: there is no such photo.")
    return merged


def build_subject_report(config: TrainConfig, number: int) -> PhotoReport:
    """Return the photos of `--instance_data_dir` as those of subject `number`. Raises UserError
    when there is none."""
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
    """Return the photos, those of `--captions auto` and `--masks auto` with the sidecars that
    training has saved in the run folder so far."""
    photos = list(photos)
    run_dir = RunDir(config.output_dir)
    if config.captions == "auto":
        saved = sidecars.read_saved_captions(run_dir.captions_path)
        subjects = config.each_subject
        for index, photo in enumerate(photos):
            saved_caption = saved.get(photo.run_file_name)
            if saved_caption and not photo.is_captioned:
                captioned = replace(photo, captions=(saved_caption["caption"],))
                photos[index] = prepare_captions(subjects[photo.subject], captioned)
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
    """Return the first three skipped files with their reasons, photos first, and the number of
    further ones."""
    first = sorted(report.skipped, key=lambda item: not item.is_photo)[:3]
    descriptions = [f"{item.path.name} ({item.reason})" for item in first]
    remaining = len(report.skipped) - len(descriptions)
    return ("; ".join(descriptions) or "it is empty") + (
        f"; and {remaining} more." if remaining else "."
    )


def require_photo_folder(folder: Path) -> None:
    """Raise UserError when there is no such folder."""
    if not folder.is_dir():
        reason = "not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {reason}; give a folder of photos.")


def find_photos(
    folder: Path, instance_prompt: str, resolution_px: int, *, alpha: str = "mask"
) -> PhotoReport:
    """Open every file of `folder`, not of its subfolders, in the order of names. Raises UserError
    when there is no such folder."""
    require_photo_folder(folder)
    paths = sorted(folder.iterdir())
    captions = sidecars.FolderCaptions(folder, sidecars.find_sidecars(paths))
    report = PhotoReport()

    # The record of synthetic photos
    record: dict[str, synthetic.SyntheticRecord] = {}
    try:
        record = synthetic.read_record(folder)
    except UserError as error:
        report.skipped.append(SkippedFile(folder / synthetic.RECORD_NAME, f"not read: {error}"))

    # The photos. Files of this program that lie among them need no mention.
    for path in paths:
        if sidecars.is_sidecar_name(path) or path.name in PROGRAM_FILES:
            continue
        item = read_photo(
            path, captions, prompt=instance_prompt, resolution_px=resolution_px, alpha=alpha
        )
        if isinstance(item, photo_file.Photo):
            maker = synthetic.format_maker(record[path.name]) if path.name in record else ""
            report.photos.append(replace(item, made_by=maker))
        else:
            report.skipped.append(item)

    # Sidecars: in use, or without a photo of that name
    stems = {photo.path.stem for photo in report.photos}
    for path in filter(sidecars.is_sidecar_name, paths):
        parsed_name = sidecars.parse_sidecar_name(path)
        reason = explain_not_file(path)
        if reason:
            report.skipped.append(SkippedFile(path, reason))
        elif parsed_name is None or (
            parsed_name[0] in stems and captions.sidecars[parsed_name] == path
        ):
            report.sidecars.append(path)
        else:
            report.skipped.append(SkippedFile(path, "stray: belongs to no photo"))
    report.skipped.extend(SkippedFile(path, reason) for path, reason in captions.complaints)
    return report


def read_photo(
    path: Path, captions: sidecars.FolderCaptions, prompt: str, resolution_px: int, alpha: str
) -> photo_file.Photo | SkippedFile:
    """Return a file of a folder as a photo, or as skipped.

    path: of the file
    captions: of its folder
    prompt: the caption of a photo without its own
    resolution_px: shorter side that training needs; a photo far below it is skipped
    alpha: `mask` if the opaque part of a transparent photo is its mask
    """
    # Files that are no photos by name or kind are not opened.
    reason = explain_not_file(path)
    if reason is None and (path.name.lower() in JUNK_NAMES or path.name.startswith(".")):
        reason = "stray: a file of the system"
    if reason:
        return SkippedFile(path, reason)
    try:
        image = photo_file.open_image(path)
    except photo_file.UnreadableImageError as error:
        is_image_name = path.suffix.lower() in photo_file.IMAGE_SUFFIXES
        return SkippedFile(
            path, str(error) if is_image_name else "stray: not a photo", is_photo=is_image_name
        )

    # Its size: a photo that would be enlarged more than eight times shows nothing.
    height, width = photo_file.get_upright_size(image)
    is_turned = photo_file.read_orientation(image) in photo_file.ORIENTATION_TRANSPOSES
    reasons = ["rotated by EXIF: turned upright"] if is_turned else []
    if min(height, width) < max(8, resolution_px // 8):
        reason = f"tiny: {width} x {height} px for a resolution of {resolution_px}"
        return SkippedFile(path, reason, is_photo=True, size_px=(height, width))
    enlargement = resolution_px / min(height, width)
    if enlargement > MAX_ENLARGEMENT:
        reasons.append(
            quality.make_reason("too small", width=width, height=height, times=enlargement)
        )
    elif enlargement > 1:
        reasons.append(f"a little small: {width} x {height} px is enlarged {enlargement:.1f} times")

    # Its mask and captions
    mask_file = captions.sidecars.get((path.stem, sidecars.MASK_SUFFIX))
    mask_path, remarks = photo_file.find_mask(path, image, mask_file, alpha_is_mask=alpha == "mask")
    photo_captions = captions.get_captions(path)
    return photo_file.Photo(
        path=path,
        size_px=(height, width),
        captions=photo_captions or (prompt,),
        mask_path=mask_path,
        reasons=(*reasons, *remarks),
        is_captioned=bool(photo_captions),
    )


def explain_not_file(path: Path) -> str | None:
    """Return what the path is when it is not a file; None for a file. Reading a pipe might never
    end."""
    if path.is_dir():
        return "stray: a folder; photos inside it are not read"
    return None if path.is_file() else "stray: not a file"
