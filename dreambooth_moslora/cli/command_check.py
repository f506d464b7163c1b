"""Commands `check` and `caption`.

`check DIR WORD` tells how training would use a folder of photos. `caption DIR` writes name.txt
beside photos without one.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.library_notes import disable_library_notes
from dreambooth_moslora.cli import one_word, terminal, train_flags
from dreambooth_moslora.disk.paths import find_asset
from dreambooth_moslora.errors import UserError, escape_control_characters
from dreambooth_moslora.plan.defaults import choose_bucket_step
from dreambooth_moslora.settings import setting_names, train_config
from dreambooth_moslora.settings.family_facts import SDXL_HUB_ID

if TYPE_CHECKING:
    from dreambooth_moslora.photos.folder import PhotoReport
    from dreambooth_moslora.photos.photo_file import Photo

COMMAND_FLAGS = ("folder", "word", "no_picture", "make_masks")
"""Arguments of `check` besides the settings of a training."""
PHOTO_CHOICES = ("base: ", "crops: ")
"""Begins of the program's choices that decide how photos are judged and cropped."""
MAX_DRAWN_PHOTOS = 48
"""Largest number of photos on the contact sheet."""


def check_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `check`, and all of `train`."""
    parser.epilog = "It takes the flags of `train` too, and judges the photos as that would."
    parser.add_argument("folder", metavar="DIR", help="folder with the photos")
    parser.add_argument("word", metavar="WORD", help="what they show")
    parser.add_argument("--no_picture", action="store_true", help="draw no NAME_crops.png")
    parser.add_argument(
        "--make_masks",
        action="store_true",
        help="write name.mask.png beside photos without a mask",
    )
    train_flags.add_training_flags(parser, hidden=setting_names.SETTINGS)


def run_check(args: argparse.Namespace) -> int:
    """Print how training would use the photos, and draw the crops. Raises UserError without a
    usable photo."""
    from dreambooth_moslora.photos.faces import add_faces
    from dreambooth_moslora.photos.folder import build_photo_report
    from dreambooth_moslora.photos.quality import find_photo_faults

    # Choose settings as `train DIR WORD` does.
    flags = {name: value for name, value in vars(args).items() if name not in COMMAND_FLAGS}
    settings, has_recipe = train_flags.resolve_settings(flags, without_words=True)
    choices = one_word.choose_settings([args.folder, args.word], settings, has_recipe=has_recipe)
    terminal.print_lines([line for line in choices.lines if line.startswith(PHOTO_CHOICES)])
    config = train_config.TrainConfig.from_dict(choices.all_settings)
    config = replace(config, **choose_bucket_step(config, Base.of(config)))

    # Examine the photos, again if masks are written.
    report = choices.photo_report
    if args.make_masks:
        write_masks(report.photos, config)
        report = build_photo_report(config)
    report = replace(report, photos=add_faces(config, report.photos))
    report = find_photo_faults(report, config.resolution)

    # Draw the crops as training cuts them, and print the report. The toy's 128 px ask for less.
    crops = None
    if not args.no_picture:
        crops = draw_crops(report.photos, config, Path(config.instance_data_dir))
    base = Base.of(config)
    target = f"for {base.name} at {config.resolution} px"
    target += f"; for SDXL add --base {SDXL_HUB_ID}" if base.is_toy else ""
    print(escape_control_characters(format_report(report, target, crops)))
    return 0


def write_masks(photos: Sequence["Photo"], config: train_config.TrainConfig) -> None:
    """Write masks beside the photos, with a line for each on stderr. Raises UserError."""
    from dreambooth_moslora.base.devices import get_best_device
    from dreambooth_moslora.photos.masks import load_segmenter, write_mask_files

    terminal.print_loading()
    disable_library_notes()
    for mask_result in write_mask_files(photos, load_segmenter(config, get_best_device())):
        note = f"{mask_result.path.name} is written" if mask_result.path else ""
        line = "; ".join(filter(None, [note, mask_result.remark]))
        print(
            escape_control_characters(f"  mask  {mask_result.photo.path.name}  {line}"),
            file=sys.stderr,
        )


def draw_crops(photos: Sequence["Photo"], config: train_config.TrainConfig, folder: Path) -> str:
    """Draw the contact sheet of the crops, NAME_crops.png in the current folder, and return a line
    with its path. It is never put among the photos, where it would be taken for one of them."""
    from dreambooth_moslora.photos.quality import build_crop_rows
    from dreambooth_moslora.pictures import draw_contact_sheet

    folder = folder.resolve()
    path = Path(f"{folder.name or 'photos'}_crops.png")
    if path.parent.resolve() == folder:
        path = folder.parent / path.name
    draw_contact_sheet(build_crop_rows(photos[:MAX_DRAWN_PHOTOS], config), path)
    return f"the crops: {path}"


def format_report(report: "PhotoReport", target: str, crops: str | None = None) -> str:
    """Return the report of the photos as text. `target`: the model that they are judged for;
    `crops`: the line on the contact sheet."""
    from dreambooth_moslora.photos.photo_file import format_captions
    from dreambooth_moslora.photos.quality import list_faults

    # List each file with its remarks. A prompt that all photos share stands once, below.
    lines = []
    prompts = {*map(format_captions, report.photos)}
    for photo in report.photos:
        height, width = photo.size_px
        remarks = [*photo.reasons, "has a mask"] if photo.has_mask_file else photo.reasons
        mark = "bad" if list_faults(photo) else "ok "
        line = f"  {mark}   {photo.path.name}  {width} x {height}  {'; '.join(remarks)}"
        lines.append(line.rstrip())
        if len(prompts) > 1:
            lines.append(f"        {format_captions(photo)}")
    if len(prompts) == 1:
        lines.append(f"  all   {prompts.pop()}")
    lines += [f"  left  {item.path.name}  {item.reason}" for item in report.skipped]

    # Sum up.
    lines.append(
        f"{len(report.photos)} usable, {len(report.skipped)} left out, "
        f"{len(report.sidecars)} captions and masks"
    )
    lines += filter(None, [crops, f"{format_verdict(report)} ({target})"])
    return "\n".join(lines)


def format_verdict(report: "PhotoReport") -> str:
    """Return which photos to leave out, and whether the remaining ones are enough."""
    from dreambooth_moslora.photos.quality import MIN_GOOD_PHOTOS, list_faults

    faulty = [photo.path.name for photo in filter(list_faults, report.photos)]
    good = len(report.photos) - len(faulty)

    # With too few good photos, the faulty ones are better than none.
    if good < MIN_GOOD_PHOTOS:
        return f"verdict: {'; '.join(report.remarks)}"
    advice = ""
    if faulty:
        advice = f"leave out {', '.join(faulty)} (--leave_out {shlex.join(faulty)}); "
    enough = "; ".join(report.remarks) or "enough to train"
    return f"verdict: {advice}{good} good photos are there, {enough}"


def caption_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `caption`."""
    # The photos, and the subject's name in their captions.
    parser.add_argument("folder", metavar="DIR", help="folder with the photos")
    parser.add_argument(
        "--subject",
        required=True,
        metavar="TEXT",
        help='rare word and class, "sks dog": "a photo of a sks dog …"',
    )

    # The model that writes them, which the base decides, and what they name of the subject.
    parser.add_argument(
        *setting_names.list_flags("pretrained_model_name_or_path"),
        dest="base",
        metavar="TEXT",
        default=SDXL_HUB_ID,
        help='the base to be trained: "toy" names places by its own CLIP; '
        "for others a language model writes",
    )
    parser.add_argument(
        "--caption_model",
        metavar="TEXT",
        help=setting_names.SETTINGS["caption_model"].metadata["help"],
    )
    parser.add_argument(
        "--describe",
        metavar="NAME",
        nargs="+",
        default=(),
        help="the subject's looks that captions name, such as hair or clothes (default: none)",
    )


def run_caption(args: argparse.Namespace) -> int:
    """Write the missing captions, with a line for each photo. Raises UserError."""
    from dreambooth_moslora.base.devices import get_best_device
    from dreambooth_moslora.photos.captions import load_captioner, write_caption_files
    from dreambooth_moslora.photos.folder import find_photos, summarize_skipped

    # Find the photos as a training on this base does.
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

    # Caption one photo after the other, and report each at once.
    terminal.print_loading()
    disable_library_notes()
    captioner = load_captioner(config, get_best_device())
    count = 0
    for result in write_caption_files(report.photos, captioner, config.instance_prompt):
        count += result.caption is not None
        line = f"  {result.photo.path.name}  {result.caption or result.remark}"
        print(escape_control_characters(line))
    print(f"{len(report.photos)} photos, {count} captions written")
    return 0
