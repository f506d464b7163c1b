"""`python -m dreambooth_moslora generate`: pictures without a browser."""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from dreambooth_moslora.base.base import SETTINGS, Base
from dreambooth_moslora.cli.terminal import hush, say, say_loading
from dreambooth_moslora.disk.contents import read_json
from dreambooth_moslora.disk.paths import find_asset, free_name, user_path
from dreambooth_moslora.disk.run_folder import RunDir, find_weights
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation import params
from dreambooth_moslora.plan.checks import output_folder
from dreambooth_moslora.settings import table
from dreambooth_moslora.settings.families import TEXT_OPTIONS, text_options_of

EPILOG = """examples:
  generate --adapter runs/dog --prompt "a photo of a sks dog"
  generate --adapter runs/dog:0.8 --prompt "a sks dog in the snow" --num_images 4
  generate --from_png outputs/image_0.png --seed 7"""
ADAPTER_HELP = "a LoRA file or run folder; repeatable; without SCALE it is 1, or that of --from_png"
# Parameter -> its value when nothing is said
DEFAULTS = {field.name: field.default for field in fields(params.GenerationParams)}


def generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `generate`. Parameters have no defaults here: those that are not given
    are the recipe's of `--from_png`, or else `GenerationParams`'s own."""

    def add(*names: str, **options) -> None:
        flags = [f"--{name}" for name in names]
        parser.add_argument(*flags, dest=names[0], **options)

    parser.epilog = EPILOG
    about_base = (
        "the base: a folder, a hub id, a .safetensors file, or toy "
        "(default: that of the adapter's run, else toy)"
    )
    add("base", "pretrained_model_name_or_path", metavar="BASE", help=about_base)
    add("adapter", action="append", default=[], metavar="PATH[:SCALE]", help=ADAPTER_HELP)
    add("prompt", help="what to draw; `<lora:name:0.8>` sets an adapter's scale")
    add("negative_prompt", help="what to keep out")
    add(
        "from_png",
        metavar="FILE",
        help="take all parameters from a PNG; other options override them",
    )
    add("seed", type=int, help="of a picture's noise (default 0); -1: any; image i has seed + i")
    add(
        "steps",
        "num_inference_steps",
        type=int,
        metavar="N",
        help=f"denoising steps (default {DEFAULTS['steps']})",
    )
    add(
        "guidance_scale",
        type=float,
        help="how closely to follow the prompt (default: the base's own, 5 for SDXL)",
    )
    add("height", type=int, help="of a picture, px (default: the base's own size)")
    add("width", type=int, help="of a picture, px (default: the base's own size)")
    about_number = "how many, with consecutive seeds (default 1)"
    add("num_images", "num_images_per_prompt", type=int, metavar="N", help=about_number)
    add(
        "scheduler",
        choices=list(params.SCHEDULERS),
        help="how steps remove noise (default: the base's own)",
    )
    text_option_arguments(parser)
    add("output_dir", default="outputs", help="where the PNG files go (default outputs)")


def text_option_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the settings that say how prompts are encoded."""
    for name in TEXT_OPTIONS:
        what = table.SETTINGS[name].metadata["help"].partition(" (default")[0]
        about = f"{what} (default: as in the adapter's training)"
        count = "+" if table.FIELD_TYPES[name][0] is tuple else None
        parser.add_argument(f"--{name}", nargs=count, help=about)


def run_generate(args: argparse.Namespace) -> int:
    """Draw the pictures and print their paths. Raises UserError."""
    # All that can be wrong with the arguments, before torch is imported
    recipe = params.read_recipe(user_path(args.from_png)) if args.from_png else None
    values = _recipe_values(args, recipe)
    base = base_of_runs(args.adapter, args.base)
    check_paths(args)
    say_loading()
    from dreambooth_moslora.generation.adapter_files import adapters_of_picture, given_adapter
    from dreambooth_moslora.generation.pipeline import SubjectPipeline

    hush()

    # The adapters: those of the picture, or the given ones
    if recipe and not args.adapter:
        adapters = adapters_of_picture(recipe)
        base = base_of_runs([str(item.file) for item in adapters], args.base)
    else:
        adapters = []
        for text in args.adapter:
            path, scale = _split_scale(text)
            adapters.append(given_adapter(path, scale, recipe))
    if not adapters:
        say(["note: without --adapter the base draws alone"])

    # The base
    pipeline = SubjectPipeline.from_base(base)
    if recipe and recipe.provenance.base not in ("", pipeline.base_name):
        made_with = f"the picture was made with the base {recipe.provenance.base}"
        say([f"note: {made_with}, and this is {pipeline.base_name}"])

    chosen = tuple((pipeline.load_adapter(item.file, item.name), item.scale) for item in adapters)
    wanted = params.GenerationParams.from_dict(values | {"adapters": chosen})
    return _save_all(pipeline.generate(wanted), user_path(args.output_dir))


def base_of_runs(adapters: list[str], given: str | None = None) -> Base:
    """The given base; else that of the first adapter which lies in its run's folder, or in a folder
    there; else the embedded one. Raises UserError for a damaged file of its run, and for a base
    that is missing."""
    if given:
        return Base.find(given)
    for path, _ in map(_split_scale, adapters):
        place = Path(find_asset(path))

        # A run's folder, or one in it, such as best/
        folders = place.parents[:2] if place.is_file() else (place, place.parent)
        for folder in folders:
            file = RunDir(folder).config_path
            if not file.is_file():
                continue
            known = read_json(file)
            base = known.get("pretrained_model_name_or_path")
            if not base:
                continue
            if base != "toy":
                say([f"base: {base}, which the run in {folder} was trained on (--base)"])
            told = {name: known[name] for name in SETTINGS.values() if name in known}
            return Base.of_run(table.TrainConfig.from_dict(told))
    return Base.find("toy")


def check_paths(args: argparse.Namespace) -> None:
    """Raises UserError for a file that is not there or a folder that cannot be written, before
    torch is imported."""
    for path, _ in map(_split_scale, args.adapter):
        find_weights(find_asset(path))
    output_folder(args.output_dir)


def _split_scale(text: str) -> tuple[str, float | None]:
    """`runs/dog:0.8` -> ("runs/dog", 0.8); a colon inside the path is kept. None: no scale was
    given."""
    path, colon, scale = text.rpartition(":")
    try:
        return (path, float(scale)) if colon and path else (text, None)
    except ValueError:
        return text, None


def _recipe_values(args: argparse.Namespace, recipe: params.Recipe | None) -> dict:
    """Parameters of the picture, overridden by the given ones. Raises UserError without a
    prompt."""
    values = recipe.params.to_dict() if recipe else {}
    given = {
        "prompt": args.prompt,
        "negative_prompt": args.negative_prompt,
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "height_px": args.height,
        "width_px": args.width,
        "num_images": args.num_images,
        "scheduler": args.scheduler,
    }
    for name, value in given.items():
        if value is not None:
            values[name] = value
    if args.seed is not None:
        values["seed"] = params.draw_seed(args.seed)

    # A single option of the command line leaves the picture's others as they are.
    values["text_options"] = dict(values.get("text_options", ())) | text_options_of(args)
    if "prompt" not in values:
        raise UserError("say what to draw with --prompt, or give a picture with --from_png")
    return values


def _save_all(events: Iterator, folder: Path) -> int:
    """Write each picture under a free name and print its path."""
    folder.mkdir(parents=True, exist_ok=True)
    clear = "\r\033[K" if sys.stderr.isatty() else ""  # erases the line of a terminal
    black = []
    for event in events:
        # One line of progress that overwrites itself; none in a file
        if isinstance(event, params.Step) and clear:
            image = f"image {event.index + 1}/{event.num_images}"
            step = f"step {event.step}/{event.steps}"
            eta = "" if math.isnan(event.eta_sec) else f", {event.eta_sec:.0f} s left"
            print(f"{clear}{image}, {step}{eta}", end="", file=sys.stderr, flush=True)
        elif isinstance(event, params.Image):
            print(clear, end="", file=sys.stderr, flush=True)
            stem = f"image_{event.params.seed}"
            name = free_name(stem, lambda taken: (folder / f"{taken}.png").exists())
            print(event.save(folder / f"{name}.png"))
            if params.about_black([event]):
                black.append(event)

    # What went wrong in a picture is no error, but must not go unnoticed.
    said = params.about_black(black)
    if said:
        print(f"note: of the pictures, {said}.", file=sys.stderr)
    return 0
