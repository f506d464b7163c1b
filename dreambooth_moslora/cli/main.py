"""Entry point of the program with its commands. Exit codes: 0 done, 2 a user's mistake, 130
stopped, 1 a bug.

python -m dreambooth_moslora COMMAND …  main, as is the installed `dreambooth-moslora COMMAND …`
python train_dreambooth.py …            `command_train.train_main`
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from dreambooth_moslora import __version__
from dreambooth_moslora.cli import command_train, terminal
from dreambooth_moslora.cli.parser import CommandParser, normalize_flags
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings.field_facts import find_nearest_name

COMMANDS = {
    "check": (
        "cli.command_check",
        "judge a folder of photos and show the exact crops, before any training",
    ),
    "caption": (
        "cli.command_check",
        "write captions for photos that have none: the subject's words and the surroundings",
    ),
    "enlarge": (
        "cli.command_enlarge",
        "make a folder of photos from one, by a model that takes reference images",
    ),
    "explain": (
        "cli.command_evaluate",
        "explain a run's figures, and which flag to try next",
    ),
    "generate": (
        "cli.command_generate",
        "generate images with a base and adapters",
    ),
    "evaluate": (
        "cli.command_evaluate",
        "measure how good an adapter is: report.html and scores.json",
    ),
    "info": (
        "cli.command_export",
        "describe a LoRA file: kind, rank, alpha, modules, base, trigger words, mixer",
    ),
    "export": (
        "cli.command_export",
        "turn a checkpoint's raw weights into LoRA files for diffusers and for ComfyUI, "
        "Forge, A1111, InvokeAI",
    ),
    "convert": (
        "cli.command_convert",
        "write a configuration of ai-toolkit, kohya, OneTrainer or SimpleTuner as one of ours",
    ),
    "compare": (
        "extras.lab.command_compare",
        "train and score several kinds of adapter at an equal budget: tables, intervals, plots",
    ),
    "fleet": (
        "extras.cluster.command_fleet",
        "train many subjects on many machines (Ray); `fleet status DIR` shows their state",
    ),
    "serve": (
        "extras.serving.command_serve",
        "answer HTTP requests with images of many adapters (Ray Serve)",
    ),
    "doctor": (
        "cli.command_doctor",
        "look for problems: versions, device, disk",
    ),
    "selftest": (
        "extras.lab.command_selftest",
        "train, resume and generate on this machine's device, and compare the results with its CPU",
    ),
}
"""Command -> its module, which has `NAME_arguments(parser)` and `run_NAME(args)`, and its line of
the help."""
FIRST_STEPS = """
first steps, with a folder of photos and a word for what they show:
  check photos/dog dog
  train photos/dog dog
  generate --adapter runs/dog --prompt "a photo of a sks dog\""""
"""End of the help."""
PROGRAM_NAME = "dreambooth-moslora"
"""Name of the installed script that starts `main`."""
MODULE_PROGRAM = "python -m dreambooth_moslora"
"""Command line that starts `main` without it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's, and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return terminal.run_to_exit_code(lambda: run_command(arguments))


def run_command(argv: list[str]) -> int:
    """Run a command with its arguments and return the exit code. Raises UserError."""
    program = PROGRAM_NAME if Path(sys.argv[0]).stem == PROGRAM_NAME else MODULE_PROGRAM

    # Help, also without arguments
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {program} COMMAND …\n\ncommands (each has --help):")
        print("  train     teach a subject; the same as train_dreambooth.py")
        print("  app       open the page in the browser; the same as app.py")
        for name, (_, help_line) in COMMANDS.items():
            print(f"  {name:9} {help_line}")
        print(FIRST_STEPS)
        return terminal.EXIT_DONE if argv else terminal.EXIT_MISTAKE
    name, *arguments = argv
    if name == "--version":
        print(__version__)
        return terminal.EXIT_DONE

    # Commands that parse their own arguments, as their scripts do
    if name == "train":
        return command_train.run_train(arguments, f"{program} train")
    if name == "app":
        from dreambooth_moslora.ui import app

        return app.main(arguments, f"{program} app")

    # Other commands; only the module of this one is imported.
    if name not in COMMANDS:
        names = ("train", "app", *COMMANDS)
        nearest = find_nearest_name(name, names)
        hint = f"did you mean {nearest}?" if nearest else f"choose one of {', '.join(names)}."
        raise UserError(f"unknown command {name}: {hint}")
    add_arguments, run = load_command(name)
    parser = CommandParser(
        prog=f"{program} {name}",
        usage=f"{program} {name} [ARGUMENT …] [--FLAG VALUE …]",
        description=COMMANDS[name][1],
    )
    add_arguments(parser)
    return run(parser.parse_args(normalize_flags(arguments)))


def load_command(name: str) -> tuple[Callable, Callable]:
    """Import a command; return the functions that add its arguments to a parser and that run it."""
    module = import_module(f"dreambooth_moslora.{COMMANDS[name][0]}")
    return getattr(module, f"{name}_arguments"), getattr(module, f"run_{name}")
