"""A process whose trainings are on the GPU in Python. `python -m tests.helpers.on_python_gpu COMMAND …` is the
program. Without a command it trains what each line of JSON asks for: one line in, {"base", "photos", "output",
"changes"}; one line out, what was seen, or {"error"}."""

import contextlib
import json
import os
import sys
import traceback
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState

from dreambooth_moslora.cli.main import main
from dreambooth_moslora.plan import processes
from dreambooth_moslora.training import loop
from dreambooth_moslora.training import step as train_step
from tests.helpers.python_gpu import DEVICE, Watch
from tests.helpers.tiny import few_steps
from tests.helpers.tiny_training import logged, tiny_config

make_accelerator = processes.make_accelerator
watches: list[Watch] = []
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


def accelerator_on_device(config, run_dir):
    """accelerate knows no such device: it is told, each time."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = make_accelerator(config, run_dir)
    for state in (AcceleratorState, PartialState):
        state._shared_state["device"] = DEVICE
    return accelerator


def trained(base: str, photos: str, output: str, changes: dict) -> dict:
    """The losses of the steps, and what the last step did and had on the device."""
    watches.clear()
    loop.train(tiny_config(Path(base), Path(photos), Path(output), **changes))
    losses = [event["loss"] for event in logged(Path(output))]
    did = {"waits": watches[-1].waits, "copies": watches[-1].copies}
    return did | {"losses": losses, "frozen": numbers[-1]}


def train_what_is_asked() -> None:
    loop.TrainStep = WatchedTrainStep
    for line in sys.stdin:
        try:
            with contextlib.redirect_stdout(sys.stderr), few_steps():
                answer = trained(**json.loads(line))
        except BaseException:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


processes.make_accelerator = accelerator_on_device
code = main(sys.argv[1:]) if sys.argv[1:] else train_what_is_asked()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code or 0)  # PyTorch's thread for the device would abort the process
