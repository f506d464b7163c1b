"""One of several processes that train several times; in most scenes one process fails, stops or is
killed.

Its argument is a file with the scenes: [{"flags": [[FLAG, …], …], "free": [GIB, …], "place": PLACE,
"rank": R, "after": N, "end": END}, …]. The flags are each process's command line, `free` what each
is told of its GPU's free memory. In the scene, process R meets END ("full": its disk is full;
"stop": SIGTERM; "kill": SIGKILL) the N-th time it comes to PLACE (started, drawn, encoded, sampled,
averaged, reported, saved). The environment is a launcher's. Each process writes `scenes_R.json`
beside the file: of each scene the exit code, the adapter that it trained as a digest, the
micro-batches that it was shown, and what it did at each place.
"""

import errno
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from accelerate import PartialState
from diffusers import StableDiffusionXLPipeline

from dreambooth_moslora.base import devices
from dreambooth_moslora.cli.command_train import train_main
from dreambooth_moslora.disk.atomic import write_atomic
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.generation.sampling import Sampler
from dreambooth_moslora.training import checkpoint, class_images, loop
from dreambooth_moslora.training.encoding_cache import EncodingCache
from dreambooth_moslora.training.step import TrainStep

RANK = int(os.environ.get("RANK", "0"))
whole_call = StableDiffusionXLPipeline.__call__
generate, sample, keep = class_images.generate_images, Sampler._generate, EncodingCache._write
save_checkpoint, average, append = (
    checkpoint.save_checkpoint,
    TrainStep._average_gradients,
    RunDir.record_event,
)
claim, free_gib, half = write_atomic, devices.measure_free_gpu_gib, devices.choose_half_precision
PLACES = ("started", "drawn", "encoded", "sampled", "averaged", "reported", "saved")


def quick_call(self, *arguments, **options):
    """The pipeline with three denoising steps."""
    return whole_call(self, *arguments, **{**options, "num_inference_steps": 3})


class Watched(TrainStep):
    """A TrainStep that can be found again when the run is over, and notes what it was shown: of
    each micro-batch its number, its prompts, and its latents and size conditioning as a digest."""

    instances: list[TrainStep] = []  # noqa: RUF012

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.shown: list[tuple[int, list[str], str]] = []
        self.instances.append(self)

    def load_batch(self, number: int):
        batch = super().load_batch(number)
        tensors = [batch.latents, batch.photo_inputs["time_ids"]]
        self.shown.append((number, batch.prompts, digest_of(tensors)))
        return batch


def digest_of(tensors) -> str:
    return sha256(
        b"".join(tensor.detach().float().numpy().tobytes() for tensor in tensors)
    ).hexdigest()


class Scene:
    """What this process does in a scene, and where it meets its end."""

    def __init__(
        self, flags: list[list[str]], free=None, place="", rank: int = -1, after: int = 0, end=""
    ):
        self.flags, self.free = flags[RANK], free
        self.place, self.rank, self.after, self.end = place, rank, after, end
        self.done: dict[str, list] = {name: [] for name in PLACES}

    def play(self) -> dict:
        class_images.generate_images = self.noting(
            "drawn", generate, lambda pipeline, prompt, seeds, *_: seeds
        )
        Sampler._generate = self.noting(
            "sampled", sample, lambda sampler, requests: requests[0].seed
        )
        EncodingCache._write = self.noting("encoded", keep, lambda cache, key, value: key)
        checkpoint.save_checkpoint = self.noting(
            "saved", save_checkpoint, lambda path, *_: path.name
        )
        checkpoint.write_atomic = self.noting("started", claim, lambda path, text: path.name)
        TrainStep._average_gradients = self.noting("averaged", average, lambda step: step.step)
        note_step = self.noting("reported", append, lambda run_dir, event: event["step"])
        RunDir.record_event = lambda run, event: (note_step if event["type"] == "step" else append)(
            run, event
        )
        devices.measure_free_gpu_gib = (lambda **_: self.free[RANK]) if self.free else free_gib
        devices.choose_half_precision = (lambda: "bf16") if self.free else half
        Watched.instances.clear()
        code = train_main(self.flags)
        step = Watched.instances[-1] if Watched.instances else None
        learnt = (
            {"adapter": digest_of(step.parameters), "shown": step.shown}
            if step
            else {"adapter": None}
        )
        return {"code": code, **learnt, **self.done}

    def noting(self, place: str, whole: Callable, describe: Callable) -> Callable:
        """`whole`, which comes to that place first: there it does `what` its arguments say."""
        return lambda *args, **options: self.at(place, describe(*args)) or whole(*args, **options)

    def at(self, place: str, event: object) -> None:
        logging.getLogger("a library").warning("every process says: %s", place)
        if (place, RANK, len(self.done[place])) == (self.place, self.rank, self.after):
            if self.end == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place)
            os.kill(os.getpid(), signal.SIGTERM if self.end == "stop" else signal.SIGKILL)
        self.done[place].append(event)


if __name__ == "__main__":
    StableDiffusionXLPipeline.__call__ = quick_call
    # a run's end would leave the next scene without one
    PartialState.destroy_process_group = lambda *_: None
    loop.TrainStep = Watched
    file = Path(sys.argv[1])
    played = []
    for scene in json.loads(file.read_text()):
        played.append(Scene(**scene).play())
        file.with_name(f"scenes_{RANK}.json").write_text(json.dumps(played))
