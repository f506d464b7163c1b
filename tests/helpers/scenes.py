"""One of several processes that train several times; in most scenes one process fails, stops or is killed.

Its argument is a file with the scenes: [{"config": FILE, "place": PLACE, "rank": R, "after": N, "end": END}, …]. In the
scene, process R meets END ("full": its disk is full; "stop": SIGTERM; "kill": SIGKILL) the N-th time it comes to PLACE
(started, drawn, encoded, sampled, averaged, reported, saved). The environment is a launcher's. Each process writes
`scenes_R.json`: exit codes, and what it did at each place.
"""

import errno
import json
import os
import signal
import sys
from pathlib import Path

from accelerate import PartialState
from diffusers import StableDiffusionXLPipeline

from dreambooth_moslora import core
from dreambooth_moslora.cli.train import train_main
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.generation.fixed_seeds import Sampler
from dreambooth_moslora.training import checkpoint
from dreambooth_moslora.training import made_before as run_class_images
from dreambooth_moslora.training.frozen_base import TensorCache
from dreambooth_moslora.training.step import TrainStep

RANK = int(os.environ.get("RANK", "0"))
whole_call = StableDiffusionXLPipeline.__call__
generate, sample, keep = run_class_images.generate_images, Sampler._draw, TensorCache._keep
save_checkpoint, average, append = checkpoint.save_checkpoint, TrainStep._average_gradients, RunDir.append_metrics
claim = core.atomic_write
PLACES = ("started", "drawn", "encoded", "sampled", "averaged", "reported", "saved")


def quick_call(self, *arguments, **options):
    """The pipeline with three denoising steps."""
    return whole_call(self, *arguments, **{**options, "num_inference_steps": 3})


class Scene:
    """What this process does in a scene, and where it meets its end."""

    def __init__(self, config: str, place: str = "", rank: int = -1, after: int = 0, end: str = ""):
        self.config, self.place, self.rank, self.after, self.end = config, place, rank, after, end
        self.done: dict[str, list] = {name: [] for name in PLACES}

    def play(self) -> dict:
        run_class_images.generate_images, Sampler._draw, TensorCache._keep = self.generate, self.sample, self.keep
        checkpoint.save_checkpoint = lambda path, *parts: self.at("saved", path.name) or save_checkpoint(path, *parts)
        core.atomic_write = lambda path, text: self.at("started", path.name) or claim(path, text)
        TrainStep._average_gradients = lambda step: self.at("averaged", step.step) or average(step)
        RunDir.append_metrics = self.append
        return {"code": train_main(["--config", self.config]), **self.done}

    def at(self, place: str, what: object) -> None:
        if (place, RANK, len(self.done[place])) == (self.place, self.rank, self.after):
            if self.end == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place)
            os.kill(os.getpid(), signal.SIGTERM if self.end == "stop" else signal.SIGKILL)
        self.done[place].append(what)

    @property
    def append(self):
        """Of steps only."""
        return lambda run_dir, event: (
            (event["type"] == "step" and self.at("reported", event["step"])) or append(run_dir, event)
        )

    @property
    def generate(self):
        return lambda pipeline, prompt, seeds, *more, **options: (
            self.at("drawn", seeds) or generate(pipeline, prompt, seeds, *more, **options)
        )

    @property
    def sample(self):
        return lambda sampler, requests: self.at("sampled", requests[0].seed) or sample(sampler, requests)

    @property
    def keep(self):
        return lambda cache, key, value: self.at("encoded", key) or keep(cache, key, value)


if __name__ == "__main__":
    StableDiffusionXLPipeline.__call__ = quick_call
    PartialState.destroy_process_group = lambda *_: None  # a run's end would leave the next scene without one
    file = Path(sys.argv[1])
    played = []
    for scene in json.loads(file.read_text()):
        played.append(Scene(**scene).play())
        file.with_name(f"scenes_{RANK}.json").write_text(json.dumps(played))
