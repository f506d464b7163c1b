"""Started by `test_python_gpu` in a process of its own: trains on the device, prints what it saw as JSON.

python -m tests.helpers.on_python_gpu BASE PHOTOS OUTPUT CHANGES
"""

import json
import os
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState

from dreambooth_moslora.core.run_folder import RunDir
from dreambooth_moslora.training import loop, train_step
from tests.helpers.python_gpu import DEVICE, Watch
from tests.helpers.tiny_training import tiny_config

make_accelerator = loop.make_accelerator
watches: list[Watch] = []


class WatchedTrainStep(train_step.TrainStep):
    """Counts what each micro-batch does on the device."""

    def accumulate_gradients(self):
        with Watch() as watch:
            losses = super().accumulate_gradients()
        watches.append(watch)
        return losses


def accelerator_on_device(config, run_dir):
    """accelerate knows no such device: it is told."""
    accelerator = make_accelerator(config, run_dir)
    for state in (AcceleratorState, PartialState):
        state._shared_state["device"] = DEVICE
    return accelerator


def main(base: str, photos: str, output: str, changes: str) -> None:
    loop.make_accelerator, loop.TrainStep = accelerator_on_device, WatchedTrainStep
    settings = json.loads(changes)
    Watch.has_tf32 = settings.pop("has_tf32", False)
    loop.train(tiny_config(Path(base), Path(photos), Path(output), **settings))
    losses = [event["loss"] for event in RunDir(Path(output)).read_metrics() if event["type"] == "step"]
    last = watches[-1]
    print(json.dumps({"losses": losses, "waits": last.waits, "copies": last.copies, "kernels": last.kernels}))


code = 0
try:
    main(*sys.argv[1:])
except BaseException as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    code = 1
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # PyTorch's thread for the device would abort the process
