"""Started by `accelerate launch`: train_dreambooth.py itself, then this rank's adapter as a hash."""

import hashlib
import json
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dreambooth_moslora.training import loop  # noqa: E402
from dreambooth_moslora.training.train_step import Learner  # noqa: E402


class Watched(Learner):
    """A Learner that can be found again when the run is over."""

    found: list[Learner] = []  # noqa: RUF012

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.found.append(self)


loop.Learner = Watched
try:
    runpy.run_path(str(ROOT / "train_dreambooth.py"), run_name="__main__")
finally:
    learner = Watched.found[0]
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in learner.parameters)).hexdigest()
    facts = {"processes": learner.accelerator.num_processes, "adapter": digest}
    rank = learner.accelerator.process_index
    Path(learner.config.output_dir, f"rank_{rank}.json").write_text(json.dumps(facts), encoding="utf-8")
