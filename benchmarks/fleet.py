"""Fleets: what is lost with a machine, the engine's cost per subject, and ten thousand subjects.

    python -m benchmarks.fleet --part nodes    24 small trainings on two machines; one is killed
    python -m benchmarks.fleet --part many     10,000 subjects whose trainings are empty

The machines are Ray nodes of one core each on this computer. `nodes` kills all processes of one of
them at once (SIGKILL) while it trains, lets another join, and compares the published files' SHA-256
with those of trainings without Ray. `many` does everything that a fleet does, including list,
records and adapters' files; a worker writes an empty adapter. Needs the extra `fleet`.
"""

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

from dreambooth_moslora.disk.contents import file_digest
from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME
from dreambooth_moslora.extras.cluster.fleet import Ending, Machines, begun, missing, run_fleet
from dreambooth_moslora.extras.cluster.fleet_subjects import read_subjects
from dreambooth_moslora.extras.cluster.ray_fleet import EMBEDDED, connected
from dreambooth_moslora.extras.cluster.records import Record, write_record
from dreambooth_moslora.extras.cluster.worker import Job

NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "memory": 4 * 2**30}
STEPS = 6
SETTINGS = {
    "instance_prompt": "a photo of sks dog",
    "resolution": 64,
    "target_modules": ("to_q",),
    "train_batch_size": 1,
    "max_train_steps": STEPS,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 2,
    "learning_rate": 1e-2,
    "num_validation_images": 0,
    "report_to": "none",
    "seed": 3,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("nodes", "many"), required=True)
    parser.add_argument("--subjects", type=int, help="default: 24 of nodes, 10000 of many")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args()
    os.environ.update(EMBEDDED | {"OMP_NUM_THREADS": "1"})
    with tempfile.TemporaryDirectory() as folder:
        part = {"nodes": lose_a_node, "many": many}[args.part]
        figures = part(Path(folder), args.subjects or {"nodes": 24, "many": 10_000}[args.part])
    for name, value in figures.items():
        print(f"{name}: {value}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def two_nodes() -> Iterator:
    """A connected cluster of this process; yields it and the node that may be killed."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    node = cluster.add_node(**NODE)
    try:
        with connected(cluster.address):
            yield cluster, node
    finally:
        cluster.shutdown()


@dataclass
class Killer:
    """Kills the node with all its processes, when a third of the subjects is done and it trains."""

    cluster: object
    node: object
    out: Path
    after: int
    done: int = 0
    again: list[str] = field(default_factory=list)
    killed: int = 0

    def __call__(self, ending: Ending) -> None:
        self.done += not ending.is_again
        self.again += [ending.name] if ending.is_again else []
        print(
            f"{self.done} {ending.name}: {ending.record.state} {ending.record.message}", flush=True
        )

    def when_due(self) -> bool:
        """The fleet calls it repeatedly as its `should_stop`; it never stops the fleet."""
        if self.done >= self.after and not self.killed:
            raylet = psutil.Process(self.node.all_processes["raylet"][0].process.pid)
            mine = raylet.children(recursive=True)
            steps = [
                run
                for process in mine
                if (run := self.run_of(process)) and list(run.glob("checkpoint-[1-5]"))
            ]
            if steps:
                for process in [raylet, *mine]:
                    with contextlib.suppress(psutil.Error):
                        process.kill()
                self.killed = len(mine) + 1
                print(
                    f"killed a node of {self.killed} processes while it trained {steps[0].name}",
                    flush=True,
                )
                self.cluster.add_node(wait=False, **NODE)
        return False

    def run_of(self, process: psutil.Process) -> Path | None:
        """The run folder of a running training."""
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if "dreambooth_moslora.extras.cluster.worker" in words:
                return Path(words[-1]).parent
        return None


def lose_a_node(folder: Path, count: int) -> dict:
    from tests.helpers.tiny import save_tiny_sdxl
    from tests.helpers.tiny_training import paint_photos

    base, out = save_tiny_sdxl(folder / "base"), folder / "out"
    for number in range(count):
        paint_photos(folder / "photos" / f"dog{number:02}", count=1 + number % 5)
    shared = {**SETTINGS, "pretrained_model_name_or_path": str(base)}
    subjects = read_subjects(folder / "photos", shared, out)
    with begun(out, subjects), two_nodes() as (cluster, node):
        killer, started = Killer(cluster, node, out, count // 3), time.monotonic()
        machines = Machines.of_cluster()
        run_fleet(missing(out, subjects), out, machines, killer, killer.when_due)
        seconds = time.monotonic() - started
    records = [json.loads((out / subject.name / "fleet.json").read_text()) for subject in subjects]
    equal = sum(
        digest(out / s.name) == digest(alone(folder / "alone", s.settings)) for s in subjects
    )
    trained_sec = sum(record["seconds"] for record in records)
    return {
        "subjects": count,
        "done": sum(record["state"] == "done" for record in records),
        "processes killed with the node": killer.killed,
        "trainings that went on elsewhere": ", ".join(killer.again),
        "adapters equal to those without Ray (SHA-256)": f"{equal} of {count}",
        "seconds in all": round(seconds, 1),
        "seconds of a training, median": round(median(record["seconds"] for record in records), 1),
        "two nodes' time that was no training": f"{1 - trained_sec / (2 * seconds):.0%}",
    }


def digest(run_dir: Path) -> str:
    return file_digest(run_dir / PUBLISHED_NAME)


def alone(home: Path, settings: dict) -> Path:
    """The same training in this process."""
    from dreambooth_moslora.settings.table import TrainConfig
    from dreambooth_moslora.training.loop import train

    run_dir = home / Path(settings["output_dir"]).name
    train(TrainConfig.from_dict({**settings, "output_dir": str(run_dir)}))
    return run_dir


def empty_training(job: Job) -> Record:
    run_dir = Path(job.run_dir)
    run_dir.mkdir(parents=True)
    (run_dir / PUBLISHED_NAME).touch()
    record = Record("done", job.mark, starts=1)
    write_record(run_dir, record)
    return record


@dataclass
class Meter:
    """Memory of this process in MiB, at each thousandth subject."""

    done: int = 0
    mib: list[float] = field(default_factory=list)

    def __call__(self, ending: Ending) -> None:
        self.done += ending.record.state == "done"
        if self.done % 1000 == 0:
            self.mib.append(psutil.Process().memory_info().rss / 2**20)


def many(folder: Path, count: int) -> dict:
    photos, out = folder / "photos", folder / "out"
    photos.mkdir()
    rows = (
        {"folder": str(photos), "class": "dog", "name": f"dog{number}"} for number in range(count)
    )
    (folder / "list.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    started = time.monotonic()
    subjects = read_subjects(folder / "list.jsonl", {"pretrained_model_name_or_path": "toy"}, out)
    todo = missing(out, subjects)
    read, meter = time.monotonic() - started, Meter()
    with begun(out, subjects), connected(None):
        machines = Machines.of_cluster()
        run_fleet(todo[:10], out, machines, meter, train=empty_training)  # workers and imports
        started = time.monotonic()
        run_fleet(todo[10:], out, machines, meter, train=empty_training)
        seconds = time.monotonic() - started
    return {
        "subjects": count,
        "done": meter.done,
        "still missing afterwards": len(missing(out, subjects)),
        "seconds to read the list and look for what is done": round(read, 1),
        "seconds of the fleet": round(seconds, 1),
        "subjects a second": round((count - 10) / seconds),
        "milliseconds of the engine a subject": round(1000 * seconds / (count - 10), 2),
        "MiB of the driver at each thousand": ", ".join(f"{value:.0f}" for value in meter.mib),
    }


if __name__ == "__main__":
    main()
