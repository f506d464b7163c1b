"""Commands `info` and `export`.

`info FILE…` describes LoRA files, whichever program wrote them. `export RAW_OR_CHECKPOINT --out
DIR` turns raw weights into files for diffusers, ComfyUI and others; it needs no base.
"""

import argparse
import json
from pathlib import Path

from dreambooth_moslora.cli.terminal import print_loading
from dreambooth_moslora.disk.paths import expand_user_path, find_asset
from dreambooth_moslora.disk.run_folder import (
    BEST_NAME,
    PUBLISHED_NAME,
    RAW_NAME,
    RunDir,
    check_name,
)
from dreambooth_moslora.errors import UserError


def info_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `info`."""
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="safetensors files, or folders with a published adapter",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object a file instead of lines"
    )


def run_info(args: argparse.Namespace) -> int:
    """Describe each file. Raises UserError for the first that is missing or broken."""
    for number, name in enumerate(args.files):
        path = Path(find_asset(name))
        file = path / PUBLISHED_NAME if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"there is no file {file}")

        # Import torch only for files that exist.
        print_loading()
        from dreambooth_moslora.lora.describe import describe, format_lines

        facts = describe(file)
        separator = "\n" if number and not args.json else ""
        print(separator + (json.dumps(facts) if args.json else "\n".join(format_lines(facts))))
    return 0


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `export`."""
    # The file with A, M and B, and the folder of the files that are made of it.
    parser.add_argument(
        "source",
        metavar="RAW_OR_CHECKPOINT",
        help="moslora_weights.safetensors, a checkpoint folder or a run folder",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="folder of the two files; created if missing",
    )

    # The name and the precision of these files.
    parser.add_argument(
        "--name", help="title and name of the kohya file; by default that of the output folder"
    )
    parser.add_argument(
        "--dtype",
        choices=["fp32", "fp16", "bf16"],
        default="fp32",
        help="dtype of the tensors (fp32)",
    )


def run_export(args: argparse.Namespace) -> int:
    """Write the published files. Raises UserError."""
    # Check the paths before torch is imported.
    source = find_raw_file(expand_user_path(args.source))
    out = expand_user_path(args.out)
    refuse_to_replace(out)
    name = args.name or out.resolve().name or "adapter"
    check_name(name)
    print_loading()
    from dreambooth_moslora.lora import empty_models, raw_file, writer

    _, facts = raw_file.read_raw(source)

    # Build models with the adapter's layers; the files need none of the base's weights.
    components = {
        part: empty_models.build_empty_model(structure)
        for part, structure in facts.structures.items()
    }
    raw_file.load_raw(source, components)
    proof = writer.publish(components, out, name, facts, writer.FILE_DTYPES[args.dtype])

    # Report the files, and their comparison with the raw weights.
    for file in proof.files:
        size = (out / file).stat().st_size / 2**20
        print(f"{out / file}  {size:.2f} MiB")
    print(f"{proof.describe()}.")
    for note in proof.notes:
        print(f"Note: {note}.")
    return 0


def refuse_to_replace(out: Path) -> None:
    """Raise UserError if `out` is a run or its best/: the run's adapter would be replaced."""
    run_dir = RunDir(out.parent if out.name == BEST_NAME else out)
    if run_dir.config_path.is_file():
        raise UserError(
            f"--out {out}: it is a run's folder, and its {PUBLISHED_NAME} would be replaced; "
            f"give another folder, such as {run_dir.path}_export."
        )


def find_raw_file(path: Path) -> Path:
    """Return the raw file: the path itself, or the file in a checkpoint's folder or in a run's last
    complete checkpoint. Raises UserError."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"there is no file or folder {path}")
    folder = path if (path / RAW_NAME).is_file() else RunDir(path).find_latest_checkpoint()
    if folder is None:
        raise UserError(f"{path} holds neither {RAW_NAME} nor a checkpoint")
    return folder / RAW_NAME
