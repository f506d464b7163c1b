"""Command `convert`: write another trainer's configuration as a TOML file of this program."""

import argparse
from pathlib import Path

from dreambooth_moslora.cli.terminal import print_lines
from dreambooth_moslora.disk.atomic import write_atomic
from dreambooth_moslora.disk.paths import expand_user_path
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.importers.files import load_config
from dreambooth_moslora.importers.toml_file import format_toml


def convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `convert`."""
    parser.add_argument(
        "config",
        metavar="FILE",
        help="configuration of ai-toolkit, sd-scripts, musubi-tuner, OneTrainer or SimpleTuner",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="the TOML file (default: it is printed); never replaced"
    )


def run_convert(args: argparse.Namespace) -> int:
    """Write or print the file. Raises UserError for a file that is none of these, or exists."""
    path = Path(expand_user_path(args.config))
    _, translation = load_config(path)
    if translation is None:
        raise UserError(f"{path}: it is a configuration of this program already.")
    text = format_toml(translation, path.name)
    if not args.out:
        print(text, end="")
        return 0
    out = Path(expand_user_path(args.out))
    if out.exists():
        raise UserError(f"--out {out}: the file exists.")
    write_atomic(out, text.encode())
    print_lines(
        [*(f"not supported: {reason}" for reason in translation.unsupported), f"written: {out}"]
    )
    return 0
