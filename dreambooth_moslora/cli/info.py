"""`info FILE…`: what a LoRA file contains, whichever program wrote it."""

import argparse
import json
import sys

HELP = "say what a LoRA file is: kind, rank, alpha, modules, base, trigger words, the mixer's figures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="safetensors files, or folders with a published adapter"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a file instead of lines")


def run(args: argparse.Namespace) -> int:
    """Describe each file; a broken one is reported, and the others are still described."""
    from pathlib import Path

    from dreambooth_moslora.adapters.describe import describe, lines, printable
    from dreambooth_moslora.core import UserError, find_asset
    from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME

    failed = False
    for number, name in enumerate(args.files):
        path = Path(find_asset(name))
        try:
            facts = describe(path / PUBLISHED_NAME if path.is_dir() else path)
        except UserError as error:
            print(f"error: {' '.join(printable(str(error)).split())}", file=sys.stderr)
            failed = True
            continue
        separator = "\n" if number and not args.json else ""
        print(separator + (json.dumps(facts) if args.json else "\n".join(lines(facts))))
    return 2 if failed else 0
