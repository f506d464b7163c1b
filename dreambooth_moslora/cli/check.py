"""`python -m dreambooth_moslora check DIR`: how training would use a folder of photos, before any training."""

import argparse
import json
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from dreambooth_moslora.cli.parser import add_flag, say
from dreambooth_moslora.core import UserError, find_asset, spelled_out
from dreambooth_moslora.plan.choices import Choices, choose_shapes
from dreambooth_moslora.settings.sources import load_settings
from dreambooth_moslora.settings.table import TrainConfig

HELP = "judge a folder of photos and show the exact crops, before any training"
BASE = "pretrained_model_name_or_path"
SETTINGS = (
    "instance_prompt",
    "resolution",
    "enable_bucket",
    "bucket_reso_steps",
    "center_crop",
    "random_flip",
    "crops_per_photo",
    "crop_zoom",
    "repeats",
    "image_interpolation_mode",
    "alpha",
    "seed",
    BASE,
    "mask_model",
    "mask_prompt",
)
UNSAID = {BASE: "stabilityai/stable-diffusion-xl-base-1.0"}
"""The default base: photos are assumed to be photographs."""
MAX_PICTURED = 48
"""Most photos in the picture of the crops."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="folder with the photos")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument(
        "--picture", metavar="FILE", help="where the picture of the crops goes (default: NAME_crops.png)"
    )
    parser.add_argument("--no_picture", action="store_true", help="draw none")
    parser.add_argument("--make_masks", action="store_true", help="write name.mask.png beside photos without a mask")
    parser.add_argument("--config", metavar="FILE", help="take the settings below from a recipe")
    group = parser.add_argument_group("as in training")
    for item in fields(TrainConfig):
        if item.name in SETTINGS and item.name != BASE:
            add_flag(group, item)
    about_base = 'the base to be trained: "toy" has its own mask model; for others CLIPSeg makes masks'
    group.add_argument(f"--{BASE}", metavar="TEXT", default=argparse.SUPPRESS, help=about_base)


def run(args: argparse.Namespace) -> int:
    from dreambooth_moslora.photos.crops import examine
    from dreambooth_moslora.photos.folder import find_photos, summary_of_skipped

    config = config_of(args)
    folder = Path(find_asset(args.folder))
    find = partial(find_photos, folder, config.instance_prompt, config.resolution, alpha=config.alpha)
    report = find()
    if args.make_masks:
        make_masks(report.photos, config)
        report = find()
    report = examine(report, config.resolution)
    given = given_settings(args)
    given |= {} if args.config else shapes_of(report.photos, given)
    config = replace(config, **given)
    picture = None if args.no_picture or not report.photos else draw(report, config, picture_path(args, folder))
    crops = crops_line(picture, config) if picture else None
    print(json.dumps(as_json(report), indent=1) if args.json else spelled_out(as_text(report, crops)))
    if not report.photos:
        raise UserError(f"no usable photo in {folder}: {summary_of_skipped(report)}")
    if args.json and crops:
        print(spelled_out(crops), file=sys.stderr)
    return 0


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name in SETTINGS}


def config_of(args: argparse.Namespace) -> TrainConfig:
    """Settings of the recipe, if any, overridden by the command line. Raises UserError."""
    recipe = load_settings(args.config) if args.config else {}
    known = {name: value for name, value in recipe.items() if name in SETTINGS} | given_settings(args)
    if "instance_prompt" not in known:
        known["class_word"] = ""  # do not look for the default prompt's `object`
    return TrainConfig(**UNSAID | known)


def shapes_of(photos: list[Any], given: dict[str, Any]) -> dict[str, Any]:
    """The settings of the crops' shapes that `train DIR WORD` chooses unless they are `given`; a choice is said."""
    choices = Choices(given)
    choose_shapes(choices, photos)
    say(choices.lines)
    return choices.settings


def make_masks(photos: list[Any], config: TrainConfig) -> None:
    """Write masks beside the photos, with a line about each on stderr. Raises UserError."""
    from dreambooth_moslora.photos.mask_making import best_device, load_segmenter, make_beside

    try:
        for made in make_beside(photos, load_segmenter(config, best_device())):
            done = f"{made.path.name} is written" if made.path else ""
            line = "; ".join(filter(None, [done, made.remark]))
            print(spelled_out(f"  mask  {made.photo.path.name}  {line}"), file=sys.stderr)
    except OSError as error:
        raise UserError(f"--make_masks: a mask cannot be written: {error.strerror}") from error


def picture_path(args: argparse.Namespace, folder: Path) -> Path:
    """The picture's file; a name without a suffix becomes a PNG."""
    path = Path(args.picture or f"{folder.resolve().name or 'photos'}_crops.png")
    return path if path.suffix else path.with_name(f"{path.name}.png")


def as_json(report: Any) -> dict[str, Any]:
    """{"photos": [{"path", "usable", "reasons", "size_px": [h, w] or null}], "usable": n}, by file name."""
    rows = [verdict(photo.path, True, list(photo.reasons), photo.size_px) for photo in report.photos]
    rows += [verdict(item.path, False, [item.reason], item.size_px) for item in report.skipped]
    return {"photos": sorted(rows, key=lambda row: row["path"]), "usable": len(report.photos)}


def verdict(path: Path, usable: bool, reasons: list[str], size_px: tuple[int, int] | None) -> dict[str, Any]:
    return {"path": str(path), "usable": usable, "reasons": reasons, "size_px": list(size_px) if size_px else None}


def crops_line(picture: Path, config: TrainConfig) -> str:
    is_drawn = config.random_flip or config.crop_zoom > 1 or not config.center_crop
    note = " (of seed 0: without --seed, training draws others)" if is_drawn and config.seed is None else ""
    return f"the crops: {picture}{note}"


def as_text(report: Any, crops: str | None) -> str:
    from dreambooth_moslora.photos.photo import quoted

    lines = []
    for photo in report.photos:
        height, width = photo.size_px
        extras = [*photo.reasons, *(["has a mask"] if photo.mask_path not in (None, photo.path) else [])]
        lines.append(f"  ok    {photo.path.name}  {width} x {height}  {'; '.join(extras)}".rstrip())
        lines.append(f"        {quoted(photo)}")
    lines += [f"  left  {item.path.name}  {item.reason}" for item in report.skipped]
    lines.append(
        f"{len(report.photos)} usable, {len(report.skipped)} left out, {len(report.sidecars)} captions and masks"
    )
    return "\n".join([*lines, *([crops] if crops else [])])


def draw(report: Any, config: TrainConfig, path: Path) -> Path | None:
    """Draw the picture of the crops and return its path; if it cannot be written, say so and return None."""
    from dreambooth_moslora.photos.crops import crop_rows
    from dreambooth_moslora.pictures import draw_contact_sheet

    try:
        if path.suffix.lower() != ".png":
            raise OSError(None, "it is drawn as a PNG; name it so")
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_contact_sheet(crop_rows(report.photos[:MAX_PICTURED], config), path)
    except OSError as error:
        print(spelled_out(f"no picture: {path}: {error.strerror}"), file=sys.stderr)
        return None
    return path
