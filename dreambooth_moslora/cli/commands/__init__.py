"""The sub-commands of `python -m dreambooth_moslora`, one module each.

A command module has `HELP` (one line), `add_arguments(parser)` and `run(args) -> int` (the exit code). It
imports torch and the rest of the package inside `run`, so that `--help` is instant.
"""
