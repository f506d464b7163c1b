"""Entry point of `python -m dreambooth_moslora COMMAND …` and of `dreambooth-moslora COMMAND …`."""

import sys


def main() -> int:
    """Run the command line, and return the exit code.

    A Ctrl-C during the import ends the program like one during a command.
    """
    try:
        from dreambooth_moslora.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
