"""One of several processes of a training: the second one alone hears SIGTERM while photos are encoded.

Arguments are those of train_dreambooth.py; the environment is a launcher's.
"""

import logging
import os
import signal
import sys
from collections.abc import Iterator

from dreambooth_moslora.cli.main import train_main
from dreambooth_moslora.training import prepare

encode = prepare.every_view


def every_view(*arguments) -> Iterator:
    logging.getLogger("a library").warning("this is said by every process")
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return encode(*arguments)


prepare.every_view = every_view
sys.exit(train_main())
