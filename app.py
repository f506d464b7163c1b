"""Open the page: `python app.py`, then http://127.0.0.1:7860. `python app.py --help` lists the
options."""

import sys

from dreambooth_moslora.launcher import start


def load():
    from dreambooth_moslora.cli.terminal import run_to_exit_code
    from dreambooth_moslora.ui.app import main

    return lambda: run_to_exit_code(main)


if __name__ == "__main__":
    sys.exit(start(load))
