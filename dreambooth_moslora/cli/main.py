"""The programs' entry point with commands. Exit codes: 0 done, 2 a user's mistake, 130 stopped, 1 a
bug.

python -m dreambooth_moslora COMMAND …  main, as is the installed `dreambooth-moslora COMMAND …`
python train_dreambooth.py …            `train.train_main`
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
        "make a folder of photos from one, by a model that takes reference pictures",
    ),
    "explain": (
        "cli.command_evaluate",
        "say what a run's figures mean, and which flag to try next",
    ),
    "generate": (
        "cli.command_generate",
        "make pictures with a base and adapters",
    ),
    "evaluate": (
        "cli.command_evaluate",
        "measure how good an adapter is: report.html and scores.json",
    ),
    "info": (
        "cli.command_export",
        "say what a LoRA file is: kind, rank, alpha, modules, base, trigger words, "
        "the mixer's figures",
    ),
    "export": (
        "cli.command_export",
        "turn a checkpoint's raw weights into LoRA files for diffusers and for ComfyUI, "
        "Forge, A1111, InvokeAI",
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
        "answer HTTP requests with pictures of many adapters (Ray Serve)",
    ),
    "doctor": (
        "cli.command_doctor",
        "look for problems: versions, device, disk",
    ),
    "selftest": (
        "extras.lab.command_selftest",
        "train, resume and draw on this machine's device, and compare the results with its CPU",
    ),
}
"""Each command: its module, which has `NAME_arguments(parser)` and `run_NAME(args)`, and its line
of the help."""
# The end of the help
FIRST_STEPS = """
first steps, with a folder of photos and a word for what they show:
  check photos/dog dog
  train photos/dog dog
  generate --adapter runs/dog --prompt "a photo of a sks dog\""""
# The two ways to start `main`
PROGRAM_NAME = "dreambooth-moslora"
MODULE_PROGRAM = "python -m dreambooth_moslora"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's own; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return terminal.run_to_exit_code(lambda: run_command(words))


def run_command(argv: list[str]) -> int:
    """Run a command with its arguments; returns the exit code. Raises UserError."""
    program = PROGRAM_NAME if Path(sys.argv[0]).stem == PROGRAM_NAME else MODULE_PROGRAM

    # The help, also for no words at all
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {program} COMMAND …\n\ncommands (each has --help):")
        print("  train     teach a subject; the same as train_dreambooth.py")
        print("  app       open the page in the browser; the same as app.py")
        for name, (_, about) in COMMANDS.items():
            print(f"  {name:9} {about}")
        print(FIRST_STEPS)
        return terminal.EXIT_DONE if argv else terminal.EXIT_MISTAKE
    name, *rest = argv
    if name == "--version":
        print(__version__)
        return terminal.EXIT_DONE

    # Commands that parse their own arguments, as their scripts do
    if name == "train":
        return command_train.run_train(rest, f"{program} train")
    if name == "app":
        from dreambooth_moslora.ui import app

        return app.main(rest, f"{program} app")

    # The others; only the module of the command is imported.
    if name not in COMMANDS:
        known = ("train", "app", *COMMANDS)
        close = find_nearest_name(name, known)
        hint = f"did you mean {close}?" if close else f"choose one of {', '.join(known)}."
        raise UserError(f"unknown command {name}: {hint}")
    add_arguments, run = load_command(name)
    parser = CommandParser(
        prog=f"{program} {name}",
        usage=f"{program} {name} [ARGUMENT …] [--FLAG VALUE …]",
        description=COMMANDS[name][1],
    )
    add_arguments(parser)
    return run(parser.parse_args(normalize_flags(rest)))


def load_command(name: str) -> tuple[Callable, Callable]:
    """What adds the command's arguments to a parser, and what runs it."""
    place, _ = COMMANDS[name]
    module = import_module(f"dreambooth_moslora.{place}")
    return getattr(module, f"{name}_arguments"), getattr(module, f"run_{name}")
