"""Started by `accelerate launch`: train_dreambooth.py itself, then this rank's adapter as a hash."""

import hashlib
import json
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dreambooth_moslora.training import loop  # noqa: E402
from dreambooth_moslora.training.step.train_step import TrainStep  # noqa: E402


class Watched(TrainStep):
    """A TrainStep that can be found again when the run is over."""

    found: list[TrainStep] = []  # noqa: RUF012

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.found.append(self)


loop.TrainStep = Watched
try:
    runpy.run_path(str(ROOT / "train_dreambooth.py"), run_name="__main__")
finally:
    train_step = Watched.found[0]
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in train_step.trained)).hexdigest()
    facts = {"processes": train_step.accelerator.num_processes, "adapter": digest}
    rank = train_step.accelerator.process_index
    Path(train_step.config.output_dir, f"rank_{rank}.json").write_text(json.dumps(facts), encoding="utf-8")
