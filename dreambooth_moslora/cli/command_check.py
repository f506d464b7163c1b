"""`check DIR`: how training would use a folder of photos. `caption DIR`: write name.txt beside
photos without one."""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_moslora.base.base import SETTINGS, Base
from dreambooth_moslora.cli import one_word, terminal, train_flags
from dreambooth_moslora.disk.paths import find_asset
from dreambooth_moslora.errors import UserError, spelled_out
from dreambooth_moslora.plan.agreement import least_free_gib
from dreambooth_moslora.plan.checks import own_bucket_step
from dreambooth_moslora.plan.choices import (
    Choices,
    choose_recipe,
    choose_resolution,
    choose_shapes,
    choose_words,
)
from dreambooth_moslora.settings import table
from dreambooth_moslora.settings.families import STOCK_SDXL

if TYPE_CHECKING:
    from dreambooth_moslora.photos.folder import PhotoReport
    from dreambooth_moslora.photos.photo_file import Photo

# The setting of the base; without it photos are taken for photographs, and the base for SDXL
BASE = "pretrained_model_name_or_path"
# Settings that decide how photos are used
OF_PHOTOS = (*table.named("check"), *SETTINGS.values())
WITH_WORD = "`check DIR WORD` judges for the base and the size that `train DIR WORD` would choose"
# Most photos in the picture of the crops
MAX_PICTURED = 48


def check_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `check`."""
    parser.add_argument("folder", metavar="DIR", help="folder with the photos")
    about_word = (
        "what they show: judge them for the base and the size that `train DIR WORD` would choose"
    )
    parser.add_argument("word", metavar="WORD", nargs="?", help=about_word)
    about_picture = "draw no NAME_crops.png"
    parser.add_argument("--no_picture", action="store_true", help=about_picture)
    about_masks = "write name.mask.png beside photos without a mask"
    parser.add_argument("--make_masks", action="store_true", help=about_masks)
    parser.add_argument("--config", metavar="FILE", help="take the settings below from a recipe")

    # Settings that decide how photos are used
    group = parser.add_argument_group("as in training")
    for name in table.named("check"):
        train_flags.add_flag(group, table.SETTINGS[name])
    about_base = (
        'the base to be trained: "toy" has its own mask model; for others CLIPSeg makes masks'
    )
    names = table.flags_of(BASE)
    group.add_argument(
        *names, dest=BASE, metavar="TEXT", default=argparse.SUPPRESS, help=about_base
    )


def run_check(args: argparse.Namespace) -> int:
    """Print how training would use the photos, and draw the crops. Raises UserError without a
    usable photo."""
    from dreambooth_moslora.photos.examine import examine
    from dreambooth_moslora.photos.faces import with_faces
    from dreambooth_moslora.photos.folder import find_photos, summary_of_skipped

    folder = Path(find_asset(args.folder))

    # The settings: flags before the recipe, or before what `train` would choose
    given = of_photos(vars(args))
    recipe, _ = train_flags.settings_of({"config": args.config})
    if args.word:
        recipe = as_train_would(args, recipe | given)
    known = {BASE: STOCK_SDXL} | of_photos(recipe) | given
    if "instance_prompt" not in known:
        known["class_word"] = ""  # do not look for the default prompt's `object`
    sized = Choices(known)
    choose_resolution(sized)
    terminal.say(sized.lines)
    config = table.TrainConfig(**sized.all)

    # The photos, once more when masks were made beside them
    find = partial(
        find_photos, folder, config.instance_prompt, config.resolution, alpha=config.alpha
    )
    report = find()
    if args.make_masks:
        make_masks(report.photos, config)
        report = find()
    report = replace(report, photos=with_faces(config, report.photos))
    report = examine(report, config.resolution)

    # The crops, in the shapes that training would choose for these photos
    if not args.config:
        choices = Choices(given)
        choose_shapes(choices, report.photos)
        terminal.say(choices.lines)
        given |= choices.settings
    config = replace(config, **given)
    config = replace(config, **own_bucket_step(config, Base.of(config)))
    crops = None
    if report.photos and not args.no_picture:
        crops = draw(report.photos, config, folder)

    # What was found
    has_words = bool(known.get("instance_prompt"))
    print(spelled_out(as_text(report, crops, has_words)))
    if not report.photos:
        raise UserError(f"no usable photo in {folder}: {summary_of_skipped(report)}")
    if known[BASE] == STOCK_SDXL and not (args.word or "resolution" in sized.all):
        terminal.say([f"note: judged for SDXL at {config.resolution} px; {WITH_WORD}"])
    return 0


def of_photos(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that decide how photos are used."""
    return {name: value for name, value in settings.items() if name in OF_PHOTOS}


def as_train_would(args: argparse.Namespace, given: dict[str, Any]) -> dict[str, Any]:
    """The `given` settings and what `train DIR WORD` chooses; says the base. Raises UserError."""
    folder, word = one_word.folder_and_word([args.folder, args.word])
    choices = Choices(given)
    one_word.choose_base(choices, folder)
    terminal.say(choices.lines)
    if not args.config:
        choose_recipe(choices, None if choices.base.is_toy else least_free_gib())
    choose_words(choices, word)
    return of_photos(choices.all)


def make_masks(photos: Sequence["Photo"], config: table.TrainConfig) -> None:
    """Write masks beside the photos, with a line about each on stderr. Raises UserError."""
    from dreambooth_moslora.base.machine import best_device
    from dreambooth_moslora.photos.masks import load_segmenter, make_beside

    terminal.hush()
    for made in make_beside(photos, load_segmenter(config, best_device())):
        done = f"{made.path.name} is written" if made.path else ""
        line = "; ".join(filter(None, [done, made.remark]))
        print(spelled_out(f"  mask  {made.photo.path.name}  {line}"), file=sys.stderr)


def draw(photos: Sequence["Photo"], config: table.TrainConfig, folder: Path) -> str:
    """Draw the picture of the crops, NAME_crops.png in the current folder; returns a line about it.
    It never lies among the photos, where it would be taken for one of them."""
    from dreambooth_moslora.photos.examine import crop_rows
    from dreambooth_moslora.pictures import draw_contact_sheet

    folder = folder.resolve()
    path = Path(f"{folder.name or 'photos'}_crops.png")
    if path.parent.resolve() == folder:
        path = folder.parent / path.name
    draw_contact_sheet(crop_rows(photos[:MAX_PICTURED], config), path)
    is_drawn = config.random_flip or config.crop_zoom > 1 or not config.center_crop
    if is_drawn and config.seed is None:
        return f"the crops: {path} (of seed 0: without --seed, training draws others)"
    return f"the crops: {path}"


def as_text(report: "PhotoReport", crops: str | None, has_words: bool = True) -> str:
    """The report as lines.

    report: examined
    crops: a line about their picture, if there is one
    has_words: whether there are words of the subject. Without them only a photo's own captions are
        shown
    """
    from dreambooth_moslora.photos.faults import faults_of
    from dreambooth_moslora.photos.photo_file import quoted

    # Each file, with what the user should know of it
    lines = []
    for photo in report.photos:
        height, width = photo.size_px
        remarks = [*photo.reasons, "has a mask"] if photo.has_mask_file else photo.reasons
        mark = "bad" if faults_of(photo) else "ok "
        line = f"  {mark}   {photo.path.name}  {width} x {height}  {'; '.join(remarks)}"
        lines.append(line.rstrip())
        if has_words or photo.is_captioned:
            lines.append(f"        {quoted(photo)}")
    lines += [f"  left  {item.path.name}  {item.reason}" for item in report.skipped]

    # The whole
    usable = len(report.photos)
    left_out = len(report.skipped)
    beside = len(report.sidecars)
    lines.append(f"{usable} usable, {left_out} left out, {beside} captions and masks")
    if crops:
        lines.append(crops)
    if report.photos:
        lines.append(verdict(report))
    return "\n".join(lines)


def verdict(report: "PhotoReport") -> str:
    """Which photos to leave out, and whether the others are enough."""
    from dreambooth_moslora.photos.examine import FEWEST
    from dreambooth_moslora.photos.faults import faults_of

    faulty = [photo.path.name for photo in filter(faults_of, report.photos)]
    good = len(report.photos) - len(faulty)
    if not good:  # --leave_out takes no names of all
        return f"verdict: no good photo is there: take {FEWEST} to 10 of the subject"
    advice = ""
    if faulty:
        advice = f"leave out {', '.join(faulty)} (--leave_out {shlex.join(faulty)}); "
    rest = f"{good} good {'photo is' if good == 1 else 'photos are'} there"
    enough = "; ".join(report.remarks) or "enough to train"
    return f"verdict: {advice}{rest}, {enough}"


def caption_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `caption`."""
    parser.add_argument("folder", metavar="DIR", help="folder with the photos")
    about_subject = 'rare word and class, "sks dog": "a photo of a sks dog …"'
    parser.add_argument("--subject", required=True, metavar="TEXT", help=about_subject)
    about_base = (
        'the base to be trained: "toy" reads places by its own CLIP; '
        "for others a language model writes"
    )
    names = table.flags_of(BASE)
    parser.add_argument(*names, dest=BASE, metavar="TEXT", default=STOCK_SDXL, help=about_base)
    about_model = table.SETTINGS["caption_model"].metadata["help"]
    parser.add_argument("--caption_model", metavar="TEXT", help=about_model)
    train_flags.add_flag(parser, table.SETTINGS["describe"])


def run_caption(args: argparse.Namespace) -> int:
    """Write the missing captions, with a line about each photo. Raises UserError."""
    from dreambooth_moslora.base.machine import best_device
    from dreambooth_moslora.photos.captions import load_captioner, make_beside
    from dreambooth_moslora.photos.folder import find_photos, summary_of_skipped

    config = table.TrainConfig(
        pretrained_model_name_or_path=args.pretrained_model_name_or_path,
        instance_prompt=f"a photo of a {args.subject.strip()}",
        caption_model=args.caption_model,
        describe=vars(args).get("describe", ()),
    )

    folder = Path(find_asset(args.folder))
    report = find_photos(folder, config.instance_prompt, config.resolution)
    if not report.photos:
        raise UserError(f"no usable photo in {folder}: {summary_of_skipped(report)}")

    terminal.hush()
    captioner = load_captioner(config, best_device())
    captions = make_beside(report.photos, captioner, config.instance_prompt)
    count = 0
    for made in captions:
        count += made.caption is not None
        print(spelled_out(f"  {made.photo.path.name}  {made.caption or made.remark}"))
    print(f"{len(report.photos)} photos, {count} captions written")
    return 0
