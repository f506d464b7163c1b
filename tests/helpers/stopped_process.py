"""One of several processes of a training: the second one alone hears SIGTERM while photos are encoded.

Arguments are those of train_dreambooth.py; the environment is a launcher's.
"""

import logging
import os
import signal
import sys

from dreambooth_moslora.cli.train import train_main
from dreambooth_moslora.training import prepare

encode = prepare.encode_photos


def encode_photos(*arguments) -> None:
    logging.getLogger("a library").warning("this is said by every process")
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    encode(*arguments)


prepare.encode_photos = encode_photos
sys.exit(train_main())
