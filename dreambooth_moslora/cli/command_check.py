"""`check DIR WORD`: how training would use a folder of photos. `caption DIR`: write name.txt beside
photos without one."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.cli import one_word, terminal, train_flags
from dreambooth_moslora.disk.paths import find_asset
from dreambooth_moslora.errors import UserError, escape_control_characters
from dreambooth_moslora.plan.validation import get_bucket_step
from dreambooth_moslora.settings import train_config
from dreambooth_moslora.settings.family_facts import SDXL_HUB_ID

if TYPE_CHECKING:
    from dreambooth_moslora.photos.folder import PhotoReport
    from dreambooth_moslora.photos.photo_file import Photo

# What `check` takes beside the settings of a training
COMMAND_FLAGS = ("folder", "word", "no_picture", "make_masks")
# Most photos in the picture of the crops
MAX_DRAWN_PHOTOS = 48


def check_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `check`: its own, and all of `train`."""
    parser.epilog = "It takes the flags of `train` too, and judges the photos as that would."
    parser.add_argument("folder", metavar="DIR", help="folder with the photos")
    parser.add_argument("word", metavar="WORD", help="what they show")
    about_picture = "draw no NAME_crops.png"
    parser.add_argument("--no_picture", action="store_true", help=about_picture)
    about_masks = "write name.mask.png beside photos without a mask"
    parser.add_argument("--make_masks", action="store_true", help=about_masks)
    train_flags.add_training_flags(parser, hidden=train_config.SETTINGS)


def run_check(args: argparse.Namespace) -> int:
    """Print how training would use the photos, and draw the crops. Raises UserError without a
    usable photo."""
    from dreambooth_moslora.photos.faces import add_faces
    from dreambooth_moslora.photos.folder import build_photo_report
    from dreambooth_moslora.photos.quality import find_photo_faults

    # What `train DIR WORD` chooses
    flags = {name: value for name, value in vars(args).items() if name not in COMMAND_FLAGS}
    given, has_recipe = train_flags.resolve_settings(flags, without_words=True)
    chosen = one_word.choose_settings([args.folder, args.word], given, has_recipe=has_recipe)
    terminal.print_lines(chosen.lines)
    config = train_config.TrainConfig.from_dict(chosen.all_settings)
    config = replace(config, **get_bucket_step(config, Base.of(config)))

    # The photos, once more when masks were made beside them
    report = chosen.photo_report
    if args.make_masks:
        write_masks(report.photos, config)
        report = build_photo_report(config)
    report = replace(report, photos=add_faces(config, report.photos))
    report = find_photo_faults(report, config.resolution)

    # The crops as training cuts them, and what was found
    crops = None
    if not args.no_picture:
        crops = draw_crops(report.photos, config, Path(config.instance_data_dir))
    print(escape_control_characters(format_report(report, describe_target(config), crops)))
    return 0


def write_masks(photos: Sequence["Photo"], config: train_config.TrainConfig) -> None:
    """Write masks beside the photos, with a line about each on stderr. Raises UserError."""
    from dreambooth_moslora.base.devices import get_best_device
    from dreambooth_moslora.photos.masks import load_segmenter, write_mask_files

    terminal.print_loading()
    terminal.disable_library_notes()
    for made in write_mask_files(photos, load_segmenter(config, get_best_device())):
        done = f"{made.path.name} is written" if made.path else ""
        line = "; ".join(filter(None, [done, made.remark]))
        print(escape_control_characters(f"  mask  {made.photo.path.name}  {line}"), file=sys.stderr)


def draw_crops(photos: Sequence["Photo"], config: train_config.TrainConfig, folder: Path) -> str:
    """Draw the picture of the crops, NAME_crops.png in the current folder; returns a line about it.
    It never lies among the photos, where it would be taken for one of them."""
    from dreambooth_moslora.photos.quality import build_crop_rows
    from dreambooth_moslora.pictures import draw_contact_sheet

    folder = folder.resolve()
    path = Path(f"{folder.name or 'photos'}_crops.png")
    if path.parent.resolve() == folder:
        path = folder.parent / path.name
    draw_contact_sheet(build_crop_rows(photos[:MAX_DRAWN_PHOTOS], config), path)
    return f"the crops: {path}"


def describe_target(config: train_config.TrainConfig) -> str:
    """The model and the size for which photos are judged. The toy's 128 px ask for less."""
    base = Base.of(config)
    said = f"for {base.name} at {config.resolution} px"
    return f"{said}; for SDXL add --base {SDXL_HUB_ID}" if base.is_toy else said


def format_report(report: "PhotoReport", target: str, crops: str | None = None) -> str:
    """The lines of an examined report, one of them about the picture of the `crops`, if it is
    there. `judged` says for which model."""
    from dreambooth_moslora.photos.photo_file import format_captions
    from dreambooth_moslora.photos.quality import list_faults

    # Each file, with what the user should know of it
    lines = []
    for photo in report.photos:
        height, width = photo.size_px
        remarks = [*photo.reasons, "has a mask"] if photo.has_mask_file else photo.reasons
        mark = "bad" if list_faults(photo) else "ok "
        line = f"  {mark}   {photo.path.name}  {width} x {height}  {'; '.join(remarks)}"
        lines += [line.rstrip(), f"        {format_captions(photo)}"]
    lines += [f"  left  {item.path.name}  {item.reason}" for item in report.skipped]

    # The whole
    usable = len(report.photos)
    left_out = len(report.skipped)
    beside = len(report.sidecars)
    lines.append(f"{usable} usable, {left_out} left out, {beside} captions and masks")
    if crops:
        lines.append(crops)
    lines.append(f"{format_verdict(report)} ({target})")
    return "\n".join(lines)


def format_verdict(report: "PhotoReport") -> str:
    """Which photos to leave out, and whether the others are enough."""
    from dreambooth_moslora.photos.quality import MIN_GOOD_PHOTOS, list_faults

    faulty = [photo.path.name for photo in filter(list_faults, report.photos)]
    good = len(report.photos) - len(faulty)
    if good < MIN_GOOD_PHOTOS:  # the others are better than none
        return f"verdict: {'; '.join(report.remarks)}"
    advice = ""
    if faulty:
        advice = f"leave out {', '.join(faulty)} (--leave_out {shlex.join(faulty)}); "
    enough = "; ".join(report.remarks) or "enough to train"
    return f"verdict: {advice}{good} good photos are there, {enough}"


def caption_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `caption`."""
    parser.add_argument("folder", metavar="DIR", help="folder with the photos")
    about_subject = 'rare word and class, "sks dog": "a photo of a sks dog …"'
    parser.add_argument("--subject", required=True, metavar="TEXT", help=about_subject)
    about_base = (
        'the base to be trained: "toy" reads places by its own CLIP; '
        "for others a language model writes"
    )
    parser.add_argument(
        *train_config.list_flags("pretrained_model_name_or_path"),
        dest="base",
        metavar="TEXT",
        default=SDXL_HUB_ID,
        help=about_base,
    )
    about_model = train_config.SETTINGS["caption_model"].metadata["help"]
    parser.add_argument("--caption_model", metavar="TEXT", help=about_model)
    about_looks = "which of its looks captions say, such as hair or clothes (default: none)"
    parser.add_argument("--describe", metavar="NAME", nargs="+", default=(), help=about_looks)


def run_caption(args: argparse.Namespace) -> int:
    """Write the missing captions, with a line about each photo. Raises UserError."""
    from dreambooth_moslora.base.devices import get_best_device
    from dreambooth_moslora.photos.captions import load_captioner, write_caption_files
    from dreambooth_moslora.photos.folder import find_photos, summarize_skipped

    # Captions are made as a training on this base makes them.
    folder = Path(find_asset(args.folder))
    config = train_config.TrainConfig(
        pretrained_model_name_or_path=args.base,
        instance_data_dir=str(folder),
        instance_prompt=f"a photo of a {args.subject.strip()}",
        caption_model=args.caption_model,
        describe=tuple(args.describe),
    )
    report = find_photos(folder, config.instance_prompt, config.resolution)
    if not report.photos:
        raise UserError(f"no usable photo in {folder}: {summarize_skipped(report)}")

    # One photo after the other, each told when its caption is there.
    terminal.print_loading()
    terminal.disable_library_notes()
    captioner = load_captioner(config, get_best_device())
    captions = write_caption_files(report.photos, captioner, config.instance_prompt)
    count = 0
    for made in captions:
        count += made.caption is not None
        print(escape_control_characters(f"  {made.photo.path.name}  {made.caption or made.remark}"))
    print(f"{len(report.photos)} photos, {count} captions written")
    return 0
