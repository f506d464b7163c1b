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
from dreambooth_moslora.errors import UserError, spelled_out
from dreambooth_moslora.plan.validation import own_bucket_step
from dreambooth_moslora.settings import train_config
from dreambooth_moslora.settings.family_facts import STOCK_SDXL

if TYPE_CHECKING:
    from dreambooth_moslora.photos.folder import PhotoReport
    from dreambooth_moslora.photos.photo_file import Photo

# What `check` takes beside the settings of a training
OWN_FLAGS = ("folder", "word", "no_picture", "make_masks")
# Most photos in the picture of the crops
MAX_PICTURED = 48


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
    from dreambooth_moslora.photos.faces import with_faces
    from dreambooth_moslora.photos.folder import photo_report
    from dreambooth_moslora.photos.quality import examine

    # What `train DIR WORD` chooses
    flags = {name: value for name, value in vars(args).items() if name not in OWN_FLAGS}
    given, has_recipe = train_flags.settings_of(flags, without_words=True)
    chosen = one_word.choose([args.folder, args.word], given, has_recipe=has_recipe)
    terminal.say(chosen.lines)
    config = train_config.TrainConfig.from_dict(chosen.all)
    config = replace(config, **own_bucket_step(config, Base.of(config)))

    # The photos, once more when masks were made beside them
    report = chosen.photo_report
    if args.make_masks:
        make_masks(report.photos, config)
        report = photo_report(config)
    report = replace(report, photos=with_faces(config, report.photos))
    report = examine(report, config.resolution)

    # The crops as training cuts them, and what was found
    crops = None
    if not args.no_picture:
        crops = draw(report.photos, config, Path(config.instance_data_dir))
    print(spelled_out(as_text(report, judged_for(config), crops)))
    return 0


def make_masks(photos: Sequence["Photo"], config: train_config.TrainConfig) -> None:
    """Write masks beside the photos, with a line about each on stderr. Raises UserError."""
    from dreambooth_moslora.base.devices import best_device
    from dreambooth_moslora.photos.masks import load_segmenter, make_beside

    terminal.say_loading()
    terminal.hush()
    for made in make_beside(photos, load_segmenter(config, best_device())):
        done = f"{made.path.name} is written" if made.path else ""
        line = "; ".join(filter(None, [done, made.remark]))
        print(spelled_out(f"  mask  {made.photo.path.name}  {line}"), file=sys.stderr)


def draw(photos: Sequence["Photo"], config: train_config.TrainConfig, folder: Path) -> str:
    """Draw the picture of the crops, NAME_crops.png in the current folder; returns a line about it.
    It never lies among the photos, where it would be taken for one of them."""
    from dreambooth_moslora.photos.quality import crop_rows
    from dreambooth_moslora.pictures import draw_contact_sheet

    folder = folder.resolve()
    path = Path(f"{folder.name or 'photos'}_crops.png")
    if path.parent.resolve() == folder:
        path = folder.parent / path.name
    draw_contact_sheet(crop_rows(photos[:MAX_PICTURED], config), path)
    return f"the crops: {path}"


def judged_for(config: train_config.TrainConfig) -> str:
    """The model and the size for which photos are judged. The toy's 128 px ask for less."""
    base = Base.of(config)
    said = f"for {base.name} at {config.resolution} px"
    return f"{said}; for SDXL add --base {STOCK_SDXL}" if base.is_toy else said


def as_text(report: "PhotoReport", judged: str, crops: str | None = None) -> str:
    """The lines of an examined report, one of them about the picture of the `crops`, if it is
    there. `judged` says for which model."""
    from dreambooth_moslora.photos.faults import faults_of
    from dreambooth_moslora.photos.photo_file import quoted

    # Each file, with what the user should know of it
    lines = []
    for photo in report.photos:
        height, width = photo.size_px
        remarks = [*photo.reasons, "has a mask"] if photo.has_mask_file else photo.reasons
        mark = "bad" if faults_of(photo) else "ok "
        line = f"  {mark}   {photo.path.name}  {width} x {height}  {'; '.join(remarks)}"
        lines += [line.rstrip(), f"        {quoted(photo)}"]
    lines += [f"  left  {item.path.name}  {item.reason}" for item in report.skipped]

    # The whole
    usable = len(report.photos)
    left_out = len(report.skipped)
    beside = len(report.sidecars)
    lines.append(f"{usable} usable, {left_out} left out, {beside} captions and masks")
    if crops:
        lines.append(crops)
    lines.append(f"{verdict(report)} ({judged})")
    return "\n".join(lines)


def verdict(report: "PhotoReport") -> str:
    """Which photos to leave out, and whether the others are enough."""
    from dreambooth_moslora.photos.faults import faults_of
    from dreambooth_moslora.photos.quality import FEWEST

    faulty = [photo.path.name for photo in filter(faults_of, report.photos)]
    good = len(report.photos) - len(faulty)
    if good < FEWEST:  # the others are better than none
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
        *train_config.flags_of("pretrained_model_name_or_path"),
        dest="base",
        metavar="TEXT",
        default=STOCK_SDXL,
        help=about_base,
    )
    about_model = train_config.SETTINGS["caption_model"].metadata["help"]
    parser.add_argument("--caption_model", metavar="TEXT", help=about_model)
    about_looks = "which of its looks captions say, such as hair or clothes (default: none)"
    parser.add_argument("--describe", metavar="NAME", nargs="+", default=(), help=about_looks)


def run_caption(args: argparse.Namespace) -> int:
    """Write the missing captions, with a line about each photo. Raises UserError."""
    from dreambooth_moslora.base.devices import best_device
    from dreambooth_moslora.photos.captions import load_captioner, make_beside
    from dreambooth_moslora.photos.folder import find_photos, summary_of_skipped

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
        raise UserError(f"no usable photo in {folder}: {summary_of_skipped(report)}")

    # One photo after the other, each told when its caption is there.
    terminal.say_loading()
    terminal.hush()
    captioner = load_captioner(config, best_device())
    captions = make_beside(report.photos, captioner, config.instance_prompt)
    count = 0
    for made in captions:
        count += made.caption is not None
        print(spelled_out(f"  {made.photo.path.name}  {made.caption or made.remark}"))
    print(f"{len(report.photos)} photos, {count} captions written")
    return 0
