"""`python -m tests.helpers.python_gpu_program COMMAND …`: the program, whose trainings are on the GPU in Python."""

import os
import sys

from accelerate.state import AcceleratorState, PartialState

from dreambooth_moslora.cli.main import main
from dreambooth_moslora.plan import processes
from tests.helpers.python_gpu import DEVICE

make_accelerator = processes.make_accelerator


def accelerator_on_device(config, run_dir):
    """accelerate knows no such device: it is told."""
    accelerator = make_accelerator(config, run_dir)
    for state in (AcceleratorState, PartialState):
        state._shared_state["device"] = DEVICE
    return accelerator


processes.make_accelerator = accelerator_on_device
code = main(sys.argv[1:])
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # PyTorch's thread for the device would abort the process
