"""One of several processes that train several times; each says of its own GPU's free memory what it is told to say.

Its argument is a file with the scenes: [{"free": [GIB, …], "flags": [[FLAG, …], …]}, …], each with a figure and a
command line for each process. The environment is a launcher's. Each process writes `cards_R.json` beside the file: of
each scene the exit code, and a digest of the adapter that it trained, None where it trained none.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

from accelerate import PartialState

from dreambooth_moslora.plan import memory as estimate

RANK = int(os.environ["RANK"])
said: dict[str, float] = {}
estimate.free_gib_of_gpu = lambda **_: said["free"]  # before the modules that take it from there

from dreambooth_moslora.cli.train import train_main  # noqa: E402
from dreambooth_moslora.plan import memory as memory_plan  # noqa: E402
from dreambooth_moslora.training import loop  # noqa: E402
from dreambooth_moslora.training.step import TrainStep  # noqa: E402

steps: list[TrainStep] = []


class Watched(TrainStep):
    """A TrainStep that can be found again when the run is over."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        steps.append(self)


def play(free: list[float], flags: list[list[str]]) -> dict:
    said["free"] = free[RANK]
    steps.clear()
    code = train_main(flags[RANK])
    trained = b"".join(p.detach().float().numpy().tobytes() for step in steps for p in step.trained)
    return {"code": code, "adapter": hashlib.sha256(trained).hexdigest() if trained else None}


if __name__ == "__main__":
    PartialState.destroy_process_group = lambda *_: None  # a run's end would leave the next scene without one
    memory_plan.half_precision = lambda: "bf16"
    loop.TrainStep = Watched
    file = Path(sys.argv[1])
    played = []
    for scene in json.loads(file.read_text()):
        played.append(play(**scene))
        file.with_name(f"cards_{RANK}.json").write_text(json.dumps(played))
