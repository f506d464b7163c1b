"""A process whose trainings are on the GPU in Python. `python -m tests.helpers.on_python_gpu
COMMAND …` is the program. Without a command it trains what each line of JSON asks for, from a
FILE.json if one is given, whose answers are then beside it, one file for each process of a
launcher. A line in is {"base", "photos", "output", "changes"}; one line out, what was seen, or
{"error"}. `fp16_scale` among the changes trains in fp16, with a scaler that begins there; with
`free_gib` no more than that is free, and tiles are small.
"""

import contextlib
import json
import os
import sys
import traceback
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, PartialState

from dreambooth_moslora.base import devices
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.extras.lab.selftest import read_losses as losses_of_run
from dreambooth_moslora.plan import distributed
from dreambooth_moslora.training import base_loading, loop, prepare
from dreambooth_moslora.training import step as train_step
from tests.helpers.python_gpu import DEVICE, Watch
from tests.helpers.tiny import few_steps
from tests.helpers.tiny_training import logged, tiny_config

make_accelerator = distributed.make_accelerator
watches: list[Watch] = []
updates: list[Watch] = []
scales: list[float] = []
numbers: list[int] = []
pipelines: list = []
encoded: dict[str, list[str]] = {}
sides_px: list[int] = []


class WatchedTrainStep(train_step.TrainStep):
    """Counts what each micro-batch does on the device, and the numbers of the frozen UNet there."""

    def accumulate_gradients(self):
        with Watch() as watch:
            losses = super().accumulate_gradients()
        watches.append(watch)
        weights = [
            weight for weight in self.inputs.pipeline.unet.parameters() if not weight.requires_grad
        ]
        numbers.append(sum(weight.numel() for weight in weights if weight.device == DEVICE))
        return losses

    def update_adapter(self, losses):
        with Watch() as watch:
            result = super().update_adapter(losses)
        updates.append(watch)
        return result


def accelerator_on_device(config, run_dir):
    """accelerate knows no such device: it is told, each time."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = make_accelerator(config, run_dir)
    # by which several processes began; it would refuse the device
    os.environ.pop("ACCELERATE_USE_CPU", None)
    for state in (AcceleratorState, PartialState):
        state._shared_state["device"] = DEVICE
    for scale in scales:
        accelerator.state._shared_state["_mixed_precision"] = "fp16"
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=scale)
    return accelerator


def watch_encoding() -> None:
    """Note which parts are on the device when photos and when prompts have been encoded, and the
    VAE's widest input."""
    load_base = base_loading.load_base

    def load(*args, **options):
        pipelines[:] = [load_base(*args, **options)]
        sides_px.clear()
        pipelines[0].vae.encoder.register_forward_pre_hook(
            lambda _, inputs: sides_px.append(inputs[0].shape[-1])
        )
        return pipelines[0]

    base_loading.load_base = load
    for name in ("fill_latents_cache", "fill_text_cache"):
        setattr(prepare, name, noting(name, getattr(prepare, name)))


def noting(name: str, encode):
    def noted(*args):
        encode(*args)
        parts = {
            part: getattr(pipelines[0], part)
            for part in ("vae", "text_encoder", "text_encoder_2", "unet")
        }
        encoded[name] = [
            part for part, module in parts.items() if module is not None and module.device == DEVICE
        ]

    return noted


def trained(base: str, photos: str, output: str, changes: dict) -> dict:
    """The losses of the steps, and what the last step did and had on the device."""
    scales[:] = [scale for scale in [changes.pop("fp16_scale", None)] if scale]
    free_gib = changes.pop("free_gib", None)
    watches.clear()
    updates.clear()
    with contextlib.ExitStack() as stack:
        if free_gib is not None:
            stack.enter_context(patch.object(devices, "measure_free_gib", lambda device: free_gib))
            stack.enter_context(patch.object(devices, "TILES_PX", (32, 16)))
        loop.train(tiny_config(Path(base), Path(photos), Path(output), **changes))
    steps = logged(Path(output))
    last = watches[-1]
    did = {
        "encoded": encoded,
        "side_px": max(sides_px),
        "waits": last.waits,
        "copies": last.copies,
        "update_waits": updates[-1].waits,
    }
    skipped = sum(step["skipped"] for step in steps)
    return did | {
        "losses": losses_of_run(RunDir(Path(output))),
        "skipped": skipped,
        "frozen": numbers[-1],
    }


def train_what_is_asked() -> None:
    loop.TrainStep = WatchedTrainStep
    watch_encoding()
    requests_path = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    answers = (
        requests_path.with_suffix(f".{os.environ['RANK']}").open("w")
        if requests_path
        else sys.stdout
    )
    for line in requests_path.read_text().splitlines() if requests_path else sys.stdin:
        try:
            with contextlib.redirect_stdout(sys.stderr), few_steps():
                answer = trained(**json.loads(line))
        except BaseException:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


distributed.make_accelerator = accelerator_on_device
is_asked = not sys.argv[1:] or sys.argv[1].endswith(".json")
code = train_what_is_asked() if is_asked else main(sys.argv[1:])
sys.stdout.flush()
sys.stderr.flush()
os._exit(code or 0)  # PyTorch's thread for the device would abort the process
