"""Open the page: `python app.py`, then http://127.0.0.1:7860. `python app.py --help` lists the
options."""

import sys

if __name__ == "__main__":
    try:
        from dreambooth_moslora.cli.terminal import run_to_exit_code
        from dreambooth_moslora.ui.app import main

        sys.exit(run_to_exit_code(main))
    except KeyboardInterrupt:  # also while the imports above run
        print("interrupted", file=sys.stderr)
        sys.exit(130)
