"""`python train_dreambooth.py …` or `accelerate launch train_dreambooth.py …`; see `--help`."""

import sys

from dreambooth_moslora.cli.main import train_main

if __name__ == "__main__":
    sys.exit(train_main())
