"""`python train_dreambooth.py …` or `accelerate launch train_dreambooth.py …`; see `--help`."""

import sys

from dreambooth_moslora.launcher import start


def load():
    from dreambooth_moslora.cli.command_train import train_main

    return train_main


if __name__ == "__main__":
    sys.exit(start(load))
