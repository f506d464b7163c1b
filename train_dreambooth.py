"""`python train_dreambooth.py …` or `accelerate launch train_dreambooth.py …`; see `--help`."""

import sys

if __name__ == "__main__":
    try:
        from dreambooth_moslora.cli.command_train import train_main

        sys.exit(train_main())
    except KeyboardInterrupt:  # also while the imports above run
        print("interrupted", file=sys.stderr)
        sys.exit(130)
