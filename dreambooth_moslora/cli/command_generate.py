"""`python -m dreambooth_moslora generate`: pictures without a browser."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

from tqdm import tqdm

from dreambooth_moslora.base.base import BASE_SETTINGS, Base
from dreambooth_moslora.cli.terminal import disable_library_notes, print_lines, print_loading
from dreambooth_moslora.disk.contents import read_json
from dreambooth_moslora.disk.paths import expand_user_path, find_asset, find_free_name
from dreambooth_moslora.disk.run_folder import RunDir, find_weights
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation import image_params
from dreambooth_moslora.plan.validation import require_output_folder
from dreambooth_moslora.settings import train_config

EPILOG = """examples:
  generate --adapter runs/dog --prompt "a photo of a sks dog"
  generate --adapter runs/dog:0.8 --prompt "a sks dog in the snow" --num_images 4"""
# Parameter -> its value when nothing is said
PARAM_DEFAULTS = {field.name: field.default for field in fields(image_params.GenerationParams)}


def generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `generate`. Parameters have no defaults here: those that are not given
    are `GenerationParams`'s own."""

    def add(*names: str, **options) -> None:
        flags = [f"--{name}" for name in names]
        parser.add_argument(*flags, dest=names[0], **options)

    # What draws
    parser.epilog = EPILOG
    about_base = (
        "the base: a folder, a hub id, a .safetensors file, or toy "
        "(default: that of the adapter's run, else toy)"
    )
    add("base", "pretrained_model_name_or_path", metavar="BASE", help=about_base)
    about_adapter = "a LoRA file or run folder; repeatable; without SCALE it is 1"
    add("adapter", action="append", default=[], metavar="PATH[:SCALE]", help=about_adapter)

    # What is drawn, and how
    about_prompt = "what to draw; `<lora:name:0.8>` sets an adapter's scale"
    add("prompt", help=about_prompt)
    add("negative_prompt", help="what to keep out")
    add("seed", type=int, help="of a picture's noise (default 0); -1: any; image i has seed + i")
    add(
        "steps",
        "num_inference_steps",
        type=int,
        metavar="N",
        help=f"denoising steps (default {PARAM_DEFAULTS['steps']})",
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
        choices=list(image_params.SCHEDULERS),
        help="how steps remove noise (default: the base's own)",
    )
    add("output_dir", default="outputs", help="where the PNG files go (default outputs)")


def run_generate(args: argparse.Namespace) -> int:
    """Draw the pictures and print their paths. Raises UserError."""
    # All that can be wrong with the arguments, before torch is imported
    wanted = image_params.GenerationParams.from_dict(_collect_params(args))
    base = find_runs_base(args.adapter, args.base)
    check_paths(args)
    print_loading()
    from dreambooth_moslora.generation.pipeline import SubjectPipeline

    disable_library_notes()

    # The base and the adapters
    pipeline = SubjectPipeline.from_base(base)
    if not args.adapter:
        print_lines(["note: without --adapter the base draws alone"])
    adapters = []
    for path, scale in map(_split_scale, args.adapter):
        adapters.append((pipeline.load_adapter(find_asset(path)), scale))

    events = pipeline.generate(replace(wanted, adapters=adapters))
    return _save_all(events, expand_user_path(args.output_dir))


def find_runs_base(adapters: list[str], base_name: str | None = None) -> Base:
    """The given base; else that of the first adapter which lies in its run's folder, or in a folder
    there; else the embedded one. Raises UserError for a damaged file of its run, and for a base
    that is missing."""
    if base_name:
        return Base.find(base_name)

    # Of a file, a run's folder or one in it, such as best/
    for path, _ in map(_split_scale, adapters):
        place = Path(find_asset(path))
        for folder in (place, *place.parents[:2]):
            file = RunDir(folder).config_path
            if file.is_file():
                # Its base, by the settings that find it
                known = read_json(file)
                told = {name: known[name] for name in BASE_SETTINGS.values() if name in known}
                base = Base.of_run(train_config.TrainConfig.from_dict(told))
                print_lines(
                    [f"base: {base.name}, which the run in {folder} was trained on (--base)"]
                )
                return base
    return Base.find("toy")


def check_paths(args: argparse.Namespace) -> None:
    """Raises UserError for a file that is not there or a folder that cannot be written, before
    torch is imported."""
    for path, _ in map(_split_scale, args.adapter):
        find_weights(find_asset(path))
    require_output_folder(args.output_dir)


def _split_scale(text: str) -> tuple[str, float]:
    """`runs/dog:0.8` -> ("runs/dog", 0.8); a colon inside the path is kept. Without a scale it is
    1."""
    path, colon, scale = text.rpartition(":")
    try:
        return (path, float(scale)) if colon and path else (text, 1.0)
    except ValueError:
        return text, 1.0


def _collect_params(args: argparse.Namespace) -> dict[str, object]:
    """The given parameters, by their names in `GenerationParams`. Raises UserError without a
    prompt."""
    if args.prompt is None:
        raise UserError("say what to draw with --prompt")
    given = {
        "prompt": args.prompt,
        "negative_prompt": args.negative_prompt,
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "height_px": args.height,
        "width_px": args.width,
        "num_images": args.num_images,
        "scheduler": args.scheduler,
        "seed": None if args.seed is None else image_params.resolve_seed(args.seed),
    }
    return {name: value for name, value in given.items() if value is not None}


def _save_all(events: Iterator, folder: Path) -> int:
    """Write each picture under a free name and print its path."""
    folder.mkdir(parents=True, exist_ok=True)
    black = []
    with tqdm(desc="drawing", unit="step", disable=not sys.stderr.isatty()) as bar:
        for event in events:
            if isinstance(event, image_params.Step):
                bar.total = event.steps * event.num_images
                bar.update()
            elif isinstance(event, image_params.Image):
                stem = f"image_{event.params.seed}"
                name = find_free_name(stem, lambda taken: (folder / f"{taken}.png").exists())
                tqdm.write(str(event.save(folder / f"{name}.png")))
                if image_params.describe_black_images([event]):
                    black.append(event)

    # What went wrong in a picture is no error, but must not go unnoticed.
    said = image_params.describe_black_images(black)
    if said:
        print_lines([f"note: of the pictures, {said}."])
    return 0
