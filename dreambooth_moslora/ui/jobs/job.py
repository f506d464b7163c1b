"""One training run of the page: its folder, its owner and its process, as in the folder's `job.json`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from dreambooth_moslora.core.numbers import is_finite_number
from dreambooth_moslora.core.run_files.training_process import log_tail

__all__ = ["JOB_NAME", "Job", "birth_of"]

JOB_NAME = "job.json"


@dataclass(frozen=True)
class Job:
    """One run: its folder, its owner (`Visitor.id`) and its process, distinguished from a later one of the same number.

    Paths in its settings are relative to `folder`, by default the server's current folder.
    """

    run_dir: Path
    owner: str
    pid: int
    created: float
    stop_asked: float = 0.0
    birth: str = ""
    folder: str = ""

    @property
    def name(self) -> str:
        return self.run_dir.name

    def save(self) -> None:
        facts = {key: value for key, value in asdict(self).items() if key != "run_dir"}
        temporary = self.run_dir / f".{JOB_NAME}.tmp"
        temporary.write_text(json.dumps(facts), encoding="utf-8")
        temporary.replace(self.run_dir / JOB_NAME)

    @classmethod
    def load(cls, run_dir: Path) -> "Job | None":
        """The record in the folder; None when it is missing or cannot be read. Reading a pipe would have no end."""
        if not (run_dir / JOB_NAME).is_file():
            return None
        try:
            job = cls(run_dir, **json.loads((run_dir / JOB_NAME).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        texts, numbers = (job.owner, job.birth, job.folder), (job.created, job.stop_asked)
        is_sound = type(job.pid) is int and job.pid > 0 and all(isinstance(text, str) for text in texts)
        return job if is_sound and all(map(is_finite_number, numbers)) else None

    @property
    def is_alive(self) -> bool:
        """Whether the started process still exists (a zombie does not count)."""
        try:
            process = psutil.Process(self.pid)
            by_clock = abs(process.create_time() - self.created) < 1.0
            same = birth_of(self.pid) == self.birth if self.birth else by_clock
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def log_tail(self) -> str:
        return log_tail(self.run_dir)


def birth_of(pid: int) -> str:
    """The boot of the machine and the tick at which the process started; unlike a time, it does not change with
    the clock.

    Empty if the system does not tell.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        facts = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return f"{boot} {facts[19]}"
    except (OSError, IndexError):
        return ""
