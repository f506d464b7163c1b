"""`python -m dreambooth_moslora generate`: images without a browser."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from dreambooth_moslora.base.base import BASE_SETTINGS, Base
from dreambooth_moslora.base.library_notes import disable_library_notes
from dreambooth_moslora.cli.terminal import print_lines, print_loading
from dreambooth_moslora.disk.contents import read_json
from dreambooth_moslora.disk.paths import expand_user_path, find_asset, find_free_name
from dreambooth_moslora.disk.run_folder import RunDir, find_weights
from dreambooth_moslora.disk.safetensors_header import read_header
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation import image_params
from dreambooth_moslora.lora.metadata import parse_metadata
from dreambooth_moslora.plan.validation import require_output_folder
from dreambooth_moslora.settings import train_config

EPILOG = """examples:
  generate --adapter runs/dog --prompt "a photo of a sks dog"
  generate --adapter runs/dog:0.8 --prompt "a sks dog in the snow" --num_images 4"""


def generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `generate`. Parameters have no defaults here, so that those of
    `GenerationParams` apply."""

    def add(*names: str, **options) -> None:
        flags = [f"--{name}" for name in names]
        parser.add_argument(*flags, dest=names[0], **options)

    # The base and the adapters
    parser.epilog = EPILOG
    add(
        "base",
        "pretrained_model_name_or_path",
        metavar="BASE",
        help="the base: a folder, a hub id, a .safetensors file, or toy "
        "(default: that of the adapter's run, else toy)",
    )
    add(
        "adapter",
        action="append",
        default=[],
        metavar="PATH[:SCALE]",
        help="a LoRA file or run folder; repeatable; without SCALE it is 1",
    )

    # The parameters of the images
    add("prompt", help="what to generate; `<lora:name:0.8>` sets an adapter's scale")
    add("negative_prompt", help="what to keep out")
    add("seed", type=int, help="of an image's noise (default 0); -1: random; image i has seed + i")
    add(
        "steps",
        "num_inference_steps",
        type=int,
        metavar="N",
        help=f"denoising steps (default {image_params.GenerationParams.steps})",
    )
    add(
        "guidance_scale",
        type=float,
        help="how closely to follow the prompt (default: the base's own, 5 for SDXL)",
    )
    add("height", type=int, help="of an image, px (default: the base's own size)")
    add("width", type=int, help="of an image, px (default: the base's own size)")
    add(
        "num_images",
        "num_images_per_prompt",
        type=int,
        metavar="N",
        help="how many, with consecutive seeds (default 1)",
    )
    add(
        "scheduler",
        choices=list(image_params.SCHEDULERS),
        help="how steps remove noise (default: the base's own)",
    )
    add("output_dir", default="outputs", help="where the PNG files go (default outputs)")


def run_generate(args: argparse.Namespace) -> int:
    """Generate the images and print their paths. Raises UserError."""
    # Check the arguments before torch is imported.
    params = image_params.GenerationParams.from_dict(_collect_params(args))
    base = find_runs_base(args.adapter, args.base)
    check_paths(args)
    print_lines(list_missing_triggers(args.adapter, params.prompt))
    print_loading()
    from dreambooth_moslora.generation.pipeline import SubjectPipeline

    disable_library_notes()

    # Load the base and the adapters.
    pipeline = SubjectPipeline.from_base(base)
    if not args.adapter:
        print_lines(["note: without --adapter the base generates alone"])
    adapters = [
        (pipeline.load_adapter(find_asset(path)), scale)
        for path, scale in map(_split_scale, args.adapter)
    ]

    events = pipeline.generate(replace(params, adapters=adapters))
    return _save_all(events, expand_user_path(args.output_dir))


def find_runs_base(adapters: list[str], base_name: str | None = None) -> Base:
    """Return the base with that name, or else that of the first adapter in a run's folder, or else
    the embedded one. Raises UserError for a damaged file of the run and for a missing base."""
    if base_name:
        return Base.find(base_name)

    # An adapter may be a run's folder, a folder in it, such as best/, or a file there.
    for path, _ in map(_split_scale, adapters):
        adapter_path = Path(find_asset(path))
        for folder in (adapter_path, *adapter_path.parents[:2]):
            file = RunDir(folder).config_path
            if file.is_file():
                # Read only the settings of the base.
                settings = read_json(file)
                names = settings.keys() & {*BASE_SETTINGS.values()}
                config = train_config.TrainConfig.from_dict(
                    {name: settings[name] for name in names}
                )
                base = Base.of_run(config)
                print_lines(
                    [f"base: {base.name}, which the run in {folder} was trained on (--base)"]
                )
                return base
    return Base.find("toy")


def check_paths(args: argparse.Namespace) -> None:
    """Raise UserError for a missing file or a folder that cannot be written, before torch is
    imported."""
    for path, _ in map(_split_scale, args.adapter):
        find_weights(find_asset(path))
    require_output_folder(args.output_dir)


def list_missing_triggers(adapters: list[str], prompt: str) -> list[str]:
    """Return a line for each adapter of this program whose trigger words the prompt lacks."""
    lines = []
    for path, _ in map(_split_scale, adapters):
        metadata = parse_metadata(read_header(find_weights(find_asset(path))).metadata)
        triggers = metadata.trigger_words if metadata else ()
        if triggers and not any(trigger.lower() in prompt.lower() for trigger in triggers):
            names = " or ".join(f"“{trigger}”" for trigger in triggers)
            lines.append(f"note: {path} was trained on {names}, which the prompt lacks")
    return lines


def _split_scale(text: str) -> tuple[str, float]:
    """Split `runs/dog:0.8` into ("runs/dog", 0.8). A colon inside the path belongs to it; the
    default scale is 1."""
    path, colon, scale = text.rpartition(":")
    try:
        return (path, float(scale)) if colon and path else (text, 1.0)
    except ValueError:
        return text, 1.0


def _collect_params(args: argparse.Namespace) -> dict[str, object]:
    """Return the user's parameters, by their names in `GenerationParams`. Raises UserError without
    a prompt."""
    if args.prompt is None:
        raise UserError("say what to generate with --prompt")
    values = {
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
    return {name: value for name, value in values.items() if value is not None}


def _save_all(events: Iterator, folder: Path) -> int:
    """Write each image under a free name and print its path."""
    folder.mkdir(parents=True, exist_ok=True)
    black = []
    with tqdm(desc="generating", unit="step", disable=not sys.stderr.isatty()) as bar:
        for event in events:
            if isinstance(event, image_params.Step):
                bar.total = event.steps * event.num_images
                bar.update()
            elif isinstance(event, image_params.Image):
                stem = f"image_{event.params.seed}"
                name = find_free_name(
                    stem, lambda candidate: (folder / f"{candidate}.png").exists()
                )
                tqdm.write(str(event.save(folder / f"{name}.png")))
                if image_params.describe_black_images([event]):
                    black.append(event)

    # A black image is no error, but must not go unnoticed.
    remark = image_params.describe_black_images(black)
    if remark:
        print_lines([f"note: of the images, {remark}."])
    return 0
