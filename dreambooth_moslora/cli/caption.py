"""`python -m dreambooth_moslora caption DIR --subject "sks dog"`: write name.txt beside photos without a caption."""

import argparse
from pathlib import Path

from dreambooth_moslora.core import UserError, find_asset, spelled_out
from dreambooth_moslora.settings.table import TrainConfig

HELP = "write captions for photos that have none: the subject's words and the surroundings"
BASE = "stabilityai/stable-diffusion-xl-base-1.0"
"""The default base: photos are assumed to be photographs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="folder with the photos")
    words = parser.add_mutually_exclusive_group(required=True)
    words.add_argument("--subject", metavar="TEXT", help='rare word and class, "sks dog": "a photo of a sks dog …"')
    words.add_argument("--instance_prompt", metavar="TEXT", help="instead, the whole beginning of each caption")
    about_base = 'the base to be trained: "toy" reads places by its own CLIP; for others a language model writes'
    parser.add_argument("--pretrained_model_name_or_path", metavar="TEXT", default=BASE, help=about_base)
    about_model = TrainConfig.__dataclass_fields__["caption_model"].metadata["help"]
    parser.add_argument("--caption_model", metavar="TEXT", help=about_model)
    about_anew = "replace captions that were made before; those that you wrote or edited always stay"
    parser.add_argument("--overwrite_made", action="store_true", help=about_anew)


def run(args: argparse.Namespace) -> int:
    from dreambooth_moslora.photos.captions import load_captioner, make_beside
    from dreambooth_moslora.photos.folder import find_photos, summary_of_skipped
    from dreambooth_moslora.photos.mask_making import best_device

    words = args.instance_prompt if args.subject is None else args.subject
    if not words.strip():
        raise UserError(f"--{'instance_prompt' if args.subject is None else 'subject'}: it has no words.")
    config = TrainConfig(
        pretrained_model_name_or_path=args.pretrained_model_name_or_path,
        instance_prompt=args.instance_prompt or f"a photo of a {args.subject.strip()}",
        caption_model=args.caption_model,
    )
    folder = Path(find_asset(args.folder))
    report = find_photos(folder, config.instance_prompt, config.resolution)
    if not report.photos:
        raise UserError(f"no usable photo in {folder}: {summary_of_skipped(report)}")
    captioner, count = load_captioner(config, best_device()), 0
    try:
        for made in make_beside(report.photos, captioner, config.instance_prompt, anew=args.overwrite_made):
            count += made.caption is not None
            print(spelled_out(f"  {made.photo.path.name}  {made.caption or made.remark}"))
    except OSError as error:
        raise UserError(f"{folder}: a caption cannot be written: {error.strerror}") from error
    print(f"{len(report.photos)} photos, {count} captions written")
    return 0
