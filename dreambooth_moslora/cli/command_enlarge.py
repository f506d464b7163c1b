"""`enlarge PHOTO WORD`: from one photo a folder of photos, made by a model that takes reference
pictures."""

import argparse
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.cli.terminal import create_bar, disable_library_notes, print_loading
from dreambooth_moslora.disk.atomic import write_atomic
from dreambooth_moslora.disk.contents import hash_file
from dreambooth_moslora.disk.paths import find_asset
from dreambooth_moslora.errors import UserError, escape_control_characters
from dreambooth_moslora.generation import image_params
from dreambooth_moslora.plan.validation import require_output_folder
from dreambooth_moslora.settings import family_facts, metric_kinds

if TYPE_CHECKING:
    from PIL import Image

    from dreambooth_moslora.evaluation.enlarge import Enlargement, ShotRequest

EPILOG = """examples:
  enlarge rex.jpg dog        makes the folder rex
  train rex dog"""
# Draws in a few steps; its licence allows training on what it draws
DEFAULT_EDITOR = "black-forest-labs/FLUX.2-klein-4B"
# Of models whose family has several licences
LICENCES = {
    DEFAULT_EDITOR: "Apache-2.0",
    "black-forest-labs/FLUX.2-klein-9B": "FLUX Non-Commercial",
}
# Steps and guidance of a base, and of one that is distilled to few steps
BASE_STEPS_AND_GUIDANCE = (25, None)
DISTILLED_STEPS_AND_GUIDANCE = (4, 1.0)

# Least side of a reference picture, and how many times as long the other may be: diffusers' limits
MIN_SIDE_PX = 64
MAX_SIDE_RATIO = 8


def enlarge_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `enlarge`."""

    def add(*names: str, help: str, **options: Any) -> None:
        flags = [f"--{name}" for name in names]
        parser.add_argument(*flags, dest=names[0], help=help, **options)

    # What is made of what
    parser.epilog = EPILOG
    parser.add_argument("photo", metavar="PHOTO", help="a sharp photo of the subject")
    parser.add_argument("word", metavar="WORD", help="what it shows")
    add(
        "base",
        "pretrained_model_name_or_path",
        default=DEFAULT_EDITOR,
        help=f"the model that draws, which takes reference pictures (default: {DEFAULT_EDITOR})",
    )
    add("output_dir", help="where the photos go (default: beside the photo, by its name)")

    # How it is drawn
    add("num_images", type=int, default=20, help="how many are drawn, then sorted (default 20)")
    add("seed", type=int, default=0, help="of the first one's noise (default 0); another adds more")
    add(
        "steps",
        "num_inference_steps",
        type=int,
        help=f"denoising steps (default {BASE_STEPS_AND_GUIDANCE[0]}; "
        f"{DISTILLED_STEPS_AND_GUIDANCE[0]} of a distilled model)",
    )
    add(
        "guidance_scale",
        type=float,
        help="how closely to follow prompts (default: the base's own)",
    )
    add("resolution", type=int, help="side of the pictures, px (default: the base's own)")

    # How it is sorted
    least = metric_kinds.MIN_LIKENESS
    add(
        "min_likeness",
        type=float,
        default=least,
        help=f"DINO cosine to the photo below which it is another subject (default {least})",
    )
    add(
        "dino",
        default=metric_kinds.DINO_REPO,
        help=f"a DINOv2: hub id or folder (default {metric_kinds.DINO_REPO})",
    )


def run_enlarge(args: argparse.Namespace) -> int:
    """Draw, sort and say what was kept. Raises UserError."""
    # All that can be wrong with the arguments, before torch is imported
    path = Path(find_asset(args.photo))
    photo = load_photo(path)
    base = find_editor(args.base)
    folder = require_output_folder(args.output_dir or str(path.with_suffix("")))
    validate_arguments(args, base, photo)
    check_copy_path(path, folder / path.name)
    print_loading()
    from dreambooth_moslora.evaluation import enlarge, metrics

    disable_library_notes()

    # What is to be drawn: the same again where all that decides it is the same
    steps, guidance = DISTILLED_STEPS_AND_GUIDANCE if base.distilled else BASE_STEPS_AND_GUIDANCE
    args.steps = args.steps or steps
    args.guidance_scale = guidance if args.guidance_scale is None else args.guidance_scale
    shots = enlarge.build_shots(
        args.word,
        args.num_images,
        args.seed,
        photo=hash_file(path),
        base=base.public_name,
        steps=args.steps,
        guidance=args.guidance_scale,
        resolution=args.resolution,
    )

    # The folder, with the photo in it
    sorter = enlarge.ShotSorter(metrics.load_dino(args.dino), photo, args.min_likeness)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / path.name).exists():
        write_atomic(folder / path.name, path.read_bytes())
    into = enlarge.Enlargement(
        folder=folder, sorter=sorter, base=base.public_name, licence=get_licence(base)
    )

    # Pictures and their sorting, each as soon as it is drawn
    with create_bar(len(shots), "drawing photos", "photo") as shown:
        for _ in into.generate_missing(shots, partial(generate_shots, args, base, photo)):
            shown.update()
    print(escape_control_characters(format_summary(into, shots, args.word)))
    return 0


def load_photo(path: Path) -> "Image.Image":
    """The photo as RGB. Raises UserError."""
    from dreambooth_moslora.photos.photo_file import UnreadableImageError, open_image, to_rgb

    if not path.is_file():
        raise UserError(f"{path}: there is no such photo.")
    try:
        return to_rgb(open_image(path))
    except UnreadableImageError as error:
        raise UserError(f"{path}: {error}.") from error


def validate_arguments(args: argparse.Namespace, base: Base, photo: "Image.Image") -> None:
    """Raises UserError for what could not be drawn."""
    if not args.word.strip() or "/" in args.word:
        said = "say in one word what it shows, as in `enlarge rex.jpg dog`"
        raise UserError(f"{args.photo}: {said}.")

    # The photo, as a reference
    shorter, longer = sorted(photo.size)
    if shorter < MIN_SIDE_PX or longer > MAX_SIDE_RATIO * shorter:
        width, height = photo.size
        said = (
            f"at least {MIN_SIDE_PX} px wide and high, and at most {MAX_SIDE_RATIO} times as long"
        )
        raise UserError(f"{args.photo}: {width} x {height} px: it must be {said}.")

    # Numbers, which are those of a picture
    for name in ("num_images", "resolution"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1.")
    side = args.resolution
    if side is not None:
        image_params.check_sides((side, side), base.facts)
    image_params.GenerationParams(
        prompt=args.word,
        seed=args.seed,
        steps=BASE_STEPS_AND_GUIDANCE[0] if args.steps is None else args.steps,
        guidance_scale=args.guidance_scale,
        height_px=side,
        width_px=side,
    )


def check_copy_path(path: Path, target: Path) -> None:
    """Raises UserError where another photo has the place of the photo's copy."""
    if target.exists() and hash_file(target) != hash_file(path):
        raise UserError(f"{target} is another photo: name another --output_dir.")


def find_editor(name: str) -> Base:
    """The base of that name. Raises UserError for one that is not here, and for one that takes no
    reference pictures."""
    base = Base.find(name)
    if base.unreachable:
        raise UserError(base.unreachable)
    if base.facts is None or not base.facts.takes_references:
        title = base.facts.title if base.facts else base.public_name
        able = [facts.title for facts in family_facts.FAMILIES if facts.takes_references]
        raise UserError(
            f"{title} takes no reference pictures: give --base a model that does, "
            f"of {' or '.join(able)}, such as {DEFAULT_EDITOR}."
        )
    return base


def get_licence(base: Base) -> str:
    """The model's licence; its family's where the model is not known."""
    return LICENCES.get(base.public_name, base.facts.licence)


def generate_shots(
    args: argparse.Namespace, base: Base, photo: "Image.Image", shots: "Sequence[ShotRequest]"
) -> "Iterator[Image.Image]":
    """The pictures of the shots, each drawn when it is asked for. Raises UserError."""
    from dreambooth_moslora.generation.pipeline import SubjectPipeline
    from dreambooth_moslora.generation.sampling import Sampler

    # The editor, which is shown the photo beside each prompt
    pipeline = SubjectPipeline.from_base(base)
    sampler = Sampler(
        pipeline=pipeline.pipeline,
        embed=partial(pipeline.family.encode_prompts, pipeline.pipeline),
        resolution_px=args.resolution or base.resolution_px,
        device=pipeline.home.device,
        inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        references=[photo],
    )

    # Its models are on the device while it draws, or take turns there.
    try:
        pipeline.home.enter()
        yield from sampler([shot.request for shot in shots])
    finally:
        if pipeline.home.is_resting:  # the models took turns
            pipeline.home.leave()


def format_summary(
    enlargement: "Enlargement", shots: "Sequence[ShotRequest]", class_word: str
) -> str:
    """What was kept and what was not, where to look, and what comes next."""
    found = Counter({kind: len(some) for kind, some in enlargement.collect_outcomes(shots).items()})
    kept = found.pop("kept")
    lines = [f"{kept} of {len(shots)} kept in {enlargement.folder}"]
    if found:
        reasons = ", ".join(f"{kind} {count}" for kind, count in found.items())
        lines.append(f"rejected: {reasons}")
    lines.append(f"look at {enlargement.draw_sheet(shots)}, and move what is sorted wrongly")
    if kept:
        lines.append(
            f"then: train {shlex.quote(str(enlargement.folder))} {shlex.quote(class_word)}"
        )
    return "\n".join(lines)
