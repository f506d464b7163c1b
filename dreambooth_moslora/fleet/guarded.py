"""`python -m dreambooth_moslora.fleet.guarded PID train …`: the training command, which does not outlive its worker.

When process PID, which started it, is gone, the training finishes its step, writes a checkpoint and ends.
"""

import os
import runpy
import signal
import sys
from functools import partial

from dreambooth_moslora.core.process import when_orphaned

if __name__ == "__main__":
    when_orphaned(int(sys.argv.pop(1)), partial(os.kill, os.getpid(), signal.SIGTERM))
    runpy.run_module("dreambooth_moslora", run_name="__main__")
