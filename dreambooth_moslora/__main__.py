"""Entry point of `python -m dreambooth_moslora COMMAND …` and of `dreambooth-moslora COMMAND …`."""

import sys

from dreambooth_moslora.launcher import start


def load():
    from dreambooth_moslora.cli.main import main as run

    return run


def main() -> int:
    """Run the command line, and return the exit code."""
    return start(load)


if __name__ == "__main__":
    sys.exit(main())
