"""One of several processes that train several times; in most scenes one process fails, stops or is killed.

Its argument is a file with the scenes: [{"config": FILE, "place": PLACE, "rank": R, "after": N, "end": END}, …]. In the
scene, process R meets END ("full": its disk is full; "stop": SIGTERM; "kill": SIGKILL) the N-th time it comes to PLACE
(drawn, encoded, sampled, saved). The environment is a launcher's. Each process writes `scenes_R.json`: exit codes, and
what it drew, encoded, sampled and saved.
"""

import errno
import json
import os
import signal
import sys
from pathlib import Path

from accelerate import PartialState
from diffusers import StableDiffusionXLPipeline

from dreambooth_moslora.cli.main import train_main
from dreambooth_moslora.generation.fixed_seeds import Sampler
from dreambooth_moslora.training import run
from dreambooth_moslora.training.inputs import run_class_images
from dreambooth_moslora.training.inputs.encoding_cache import TensorCache

RANK = int(os.environ.get("RANK", "0"))
whole_call = StableDiffusionXLPipeline.__call__
generate, sample, keep = run_class_images.generate_images, Sampler._draw, TensorCache._keep
save_checkpoint = run.save_checkpoint


def quick_call(self, *arguments, **options):
    """The pipeline with three denoising steps."""
    return whole_call(self, *arguments, **{**options, "num_inference_steps": 3})


class Scene:
    """What this process does in a scene, and where it meets its end."""

    def __init__(self, config: str, place: str = "", rank: int = -1, after: int = 0, end: str = ""):
        self.config, self.place, self.rank, self.after, self.end = config, place, rank, after, end
        self.done: dict[str, list] = {"drawn": [], "encoded": [], "sampled": [], "saved": []}

    def play(self) -> dict:
        run_class_images.generate_images, Sampler._draw, TensorCache._keep = self.generate, self.sample, self.keep
        run.save_checkpoint = lambda path, *parts: self.at("saved", path.name) or save_checkpoint(path, *parts)
        return {"code": train_main(["--config", self.config]), **self.done}

    def at(self, place: str, what: object) -> None:
        if (place, RANK, len(self.done[place])) == (self.place, self.rank, self.after):
            if self.end == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place)
            os.kill(os.getpid(), signal.SIGTERM if self.end == "stop" else signal.SIGKILL)
        self.done[place].append(what)

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
