"""`python -m dreambooth_moslora.extras.cluster.guarded PID train …`: a training that does not outlive its worker.

PID is the process that started it. When that is gone, the training finishes its step, writes a checkpoint and
ends.
"""

import os
import runpy
import signal
import sys
from functools import partial

from dreambooth_moslora.disk.processes import when_orphaned

if __name__ == "__main__":
    when_orphaned(int(sys.argv.pop(1)), partial(os.kill, os.getpid(), signal.SIGTERM))
    runpy.run_module("dreambooth_moslora", run_name="__main__")
