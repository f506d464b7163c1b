"""Started by `accelerate launch`: train_dreambooth.py itself; what this rank was shown, and its adapter as a hash."""

import hashlib
import json
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dreambooth_moslora.training import loop  # noqa: E402
from dreambooth_moslora.training.step import TrainStep  # noqa: E402


def note_of(micro_batch: int, batch) -> tuple[int, list[str], str]:
    """The number of a micro-batch, its prompts, and its latents and size conditioning as a hash."""
    content = batch.latents.numpy().tobytes() + batch.time_ids.numpy().tobytes()
    return micro_batch, batch.prompts, hashlib.sha256(content).hexdigest()


class Watched(TrainStep):
    """A TrainStep that can be found again when the run is over, and notes what it was shown."""

    found: list[TrainStep] = []  # noqa: RUF012

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.shown: list[tuple[int, list[str], str]] = []
        self.found.append(self)

    def batch_at(self, micro_batch: int):
        batch = super().batch_at(micro_batch)
        self.shown.append(note_of(micro_batch, batch))
        return batch


loop.TrainStep = Watched
try:
    runpy.run_path(str(ROOT / "train_dreambooth.py"), run_name="__main__")
finally:
    train_step = Watched.found[0]
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in train_step.trained)).hexdigest()
    facts = {"processes": train_step.accelerator.num_processes, "adapter": digest}
    rank = train_step.accelerator.process_index
    for name, value in (("rank", facts), ("shown", train_step.shown)):
        Path(train_step.config.output_dir, f"{name}_{rank}.json").write_text(json.dumps(value), encoding="utf-8")
