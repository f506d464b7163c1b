"""Run by torchrun in test_processes.py: train, then write this process's adapter as a hash."""

import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dreambooth_moslora import trainer
from dreambooth_moslora.config import TrainConfig
from dreambooth_moslora.learner import Learner


class Watched(Learner):
    """A Learner that can be found again when the run is over."""

    found: list[Learner] = []  # noqa: RUF012

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.found.append(self)


trainer.Learner = Watched
config = TrainConfig.from_dict(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
trainer.train(config)
learner = Watched.found[0]
digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in learner.parameters)).hexdigest()
facts = {"processes": learner.accelerator.num_processes, "adapter": digest}
rank = learner.accelerator.process_index
Path(config.output_dir, f"rank_{rank}.json").write_text(json.dumps(facts), encoding="utf-8")
