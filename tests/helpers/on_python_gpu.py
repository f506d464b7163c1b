"""Started by `test_selftest` in a process of its own: trains on the device what each line of JSON asks for.

python -m tests.helpers.on_python_gpu [FILE]

One line in, of the file if one is given, whose answers are then beside it, one file for each process of a launcher.
A line in is {"base", "photos", "output", "changes"}; one line out, what was seen, or {"error"}. `fp16_scale`
among the changes trains in fp16, with a gradient scaler that begins there.
"""

import contextlib
import json
import os
import sys
import traceback
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState

from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.training import loop
from dreambooth_moslora.training import step as train_step
from dreambooth_moslora.training.selftest import losses as losses_of_run
from tests.helpers.few_steps import few_steps
from tests.helpers.python_gpu import DEVICE, Watch
from tests.helpers.tiny_training import tiny_config

make_accelerator = loop.make_accelerator
watches: list[Watch] = []
updates: list[Watch] = []
scales: list[float] = []
numbers: list[int] = []


class WatchedTrainStep(train_step.TrainStep):
    """Counts what each micro-batch does on the device, and the numbers of the frozen UNet there."""

    def accumulate_gradients(self):
        with Watch() as watch:
            losses = super().accumulate_gradients()
        watches.append(watch)
        weights = [weight for weight in self.inputs.pipeline.unet.parameters() if not weight.requires_grad]
        numbers.append(sum(weight.numel() for weight in weights if weight.device == DEVICE))
        return losses

    def update_adapter(self):
        with Watch() as watch:
            norm = super().update_adapter()
        updates.append(watch)
        return norm


def accelerator_on_device(config, run_dir):
    """accelerate knows no such device: it is told, each time."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = make_accelerator(config, run_dir)
    for state in (AcceleratorState, PartialState):
        state._shared_state["device"] = DEVICE
    for scale in scales:
        accelerator.state._shared_state["_mixed_precision"] = "fp16"
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=scale)
    return accelerator


def trained(base: str, photos: str, output: str, changes: dict) -> dict:
    """The losses of the steps, and what the last step did and had on the device."""
    Watch.has_tf32 = changes.pop("has_tf32", False)
    scales[:] = [scale for scale in [changes.pop("fp16_scale", None)] if scale]
    watches.clear()
    updates.clear()
    loop.train(tiny_config(Path(base), Path(photos), Path(output), **changes))
    steps = [event for event in RunDir(Path(output)).read_metrics() if event["type"] == "step"]
    last = watches[-1]
    did = {"waits": last.waits, "copies": last.copies, "kernels": last.kernels, "update_waits": updates[-1].waits}
    skipped = sum(step["skipped"] for step in steps)
    return did | {"losses": losses_of_run(RunDir(Path(output))), "skipped": skipped, "frozen": numbers[-1]}


def main() -> None:
    loop.make_accelerator, loop.TrainStep = accelerator_on_device, WatchedTrainStep
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    answers = given.with_suffix(f".{os.environ['RANK']}").open("w") if given else sys.stdout
    for line in given.read_text().splitlines() if given else sys.stdin:
        try:
            with contextlib.redirect_stdout(sys.stderr), few_steps():
                answer = trained(**json.loads(line))
        except BaseException:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


main()
os._exit(0)  # PyTorch's thread for the device would abort the process
