"""Load on the service: many clients, many adapters, for minutes; and every picture compared with
that of `generate`.

    python -m benchmarks.serve --clients 50 --adapters 40 --minutes 10

It starts `python -m dreambooth_moslora serve` on the embedded base. The adapters are copies of the
sample one with changed weights. Each client requests one picture after another, of a random
adapter, prompt and seed. Afterwards each distinct picture is drawn once by the pipeline of
`generate` in this process, and compared with all files that were served for it. Memory is that of
the replicas' processes.
"""

import argparse
import hashlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from dreambooth_moslora.disk.paths import assets_folder
from dreambooth_moslora.generation.params import GenerationParams
from dreambooth_moslora.generation.pipeline import SubjectPipeline

PROMPTS = ("a photo of a red mug", "a sks rocket on grass")
SEEDS = (1, 2)
TIMEOUT_SEC = 600
SAMPLE_SEC = 5.0
MIB = 2**20


@dataclass
class Tally:
    """Results of all clients. `elapsed_sec` is from the first request to the last answer.

    `digests` has, for each (adapter, prompt, seed), those of the files that were served for it.
    """

    statuses: Counter = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    digests: dict[tuple, set[str]] = field(default_factory=dict)
    memory: list[tuple[float, int]] = field(default_factory=list)
    elapsed_sec: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, asked: tuple, status: int, body: bytes, seconds: float) -> None:
        with self.lock:
            self.statuses[status] += 1
            if status == 200:
                self.seconds.append(seconds)
                self.digests.setdefault(asked, set()).add(hashlib.sha256(body).hexdigest())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--adapters", type=int, default=40)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--resident_adapters", type=int, default=24)
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="serve-benchmark-") as folder:
        names = make_adapters(Path(folder), args.adapters)
        port = free_port()
        service = start(Path(folder), port, args)
        try:
            wait_until_ready(service, port)
            tally = load(service, port, names, args)
            metrics = get(port, "/metrics")[1].decode()
        finally:
            end(service)
        wrong = compare(Path(folder), tally, args.steps)
    report(tally, metrics, wrong, args)
    sys.exit(1 if wrong or set(tally.statuses) != {200} else 0)


def make_adapters(folder: Path, count: int) -> list[str]:
    """Copies of the sample adapter, each with other noise on its weights."""
    source = assets_folder() / "adapters" / "rocket.safetensors"
    tensors = load_file(source)
    with safe_open(source, "pt") as file:
        header = file.metadata()
    names = [f"adapter_{number:02d}" for number in range(count)]
    for number, name in enumerate(names):
        generator = torch.Generator().manual_seed(number)
        changed = {}
        for key, tensor in tensors.items():
            noise = torch.randn(tensor.shape, generator=generator)
            changed[key] = (
                tensor + tensor.float().std() * noise / 2 if tensor.ndim > 1 else tensor
            ).to(tensor.dtype)
        save_file(changed, folder / f"{name}.safetensors", metadata=header)
    return names


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(folder: Path, port: int, args: argparse.Namespace) -> subprocess.Popen:
    words = ["--adapters", str(folder), "--port", str(port), "--replicas", str(args.replicas)]
    words += [
        "--resident_adapters",
        str(args.resident_adapters),
        "--request_timeout",
        str(TIMEOUT_SEC),
    ]
    words += ["--max_waiting", str(2 * args.clients), "--threads", str(torch.get_num_threads())]
    return subprocess.Popen(
        [sys.executable, "-m", "dreambooth_moslora", "serve", *words], env=dict(os.environ)
    )


def end(service: subprocess.Popen) -> None:
    service.terminate()
    try:
        service.wait(120)
    except subprocess.TimeoutExpired:
        service.kill()


def wait_until_ready(service: subprocess.Popen, port: int) -> None:
    while service.poll() is None:
        try:
            if get(port, "/healthz")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(1)
    raise SystemExit("the service did not start")


def get(port: int, path: str) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read()


def load(service: subprocess.Popen, port: int, names: list[str], args: argparse.Namespace) -> Tally:
    tally, ends = Tally(), time.monotonic() + 60 * args.minutes
    clients = [
        threading.Thread(
            target=ask_on, args=(port, names, number, args.steps, ends, tally), daemon=True
        )
        for number in range(args.clients)
    ]
    for client in clients:
        client.start()
    started = time.monotonic()
    with tqdm(total=round(60 * args.minutes), unit="s", desc=f"{args.clients} clients") as bar:
        while time.monotonic() < ends:
            tally.memory.append((time.monotonic() - started, memory_of_replicas(service.pid)))
            time.sleep(SAMPLE_SEC)
            bar.set_postfix_str(f"{len(tally.seconds)} pictures")
            bar.update(round(time.monotonic() - started) - bar.n)
    for client in clients:
        client.join(TIMEOUT_SEC)
    tally.elapsed_sec = time.monotonic() - started
    return tally


def ask_on(port: int, names: list[str], number: int, steps: int, ends: float, tally: Tally) -> None:
    """One client: sends the next request when it has its picture, over one connection."""
    rng, connection = random.Random(number), HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SEC)
    while time.monotonic() < ends:
        asked = rng.choice(names), rng.choice(PROMPTS), rng.choice(SEEDS)
        order = {"adapter": asked[0], "prompt": asked[1], "seed": asked[2], "steps": steps}
        started = time.monotonic()
        connection.request(
            "POST", "/generate", json.dumps(order), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        tally.note(asked, answer.status, answer.read(), time.monotonic() - started)


def memory_of_replicas(service: int) -> int:
    """Resident bytes of all processes that hold the base."""
    total = 0
    for process in psutil.Process(service).children(recursive=True):
        try:
            words = process.cmdline()
            total += process.memory_info().rss if words and ":Replica" in words[0] else 0
        except psutil.Error:
            continue
    return total


def compare(folder: Path, tally: Tally, steps: int) -> int:
    """Number of distinct pictures that differ from those of `generate`, or were served in two
    versions."""
    pipeline, wrong = SubjectPipeline.from_base("toy"), 0
    for asked in tqdm(sorted(tally.digests), desc="generate", unit="picture"):
        name, prompt, seed = asked
        pipeline.load_adapter(folder / f"{name}.safetensors")
        params = GenerationParams(prompt, seed=seed, steps=steps, adapters=((name, 1.0),))
        (image,) = [event for event in pipeline.generate(params) if hasattr(event, "save")]
        expected = hashlib.sha256(image.save(folder / "one.png").read_bytes()).hexdigest()
        wrong += tally.digests[asked] != {expected}
    return wrong


def report(tally: Tally, metrics: str, wrong: int, args: argparse.Namespace) -> None:
    seconds = sorted(tally.seconds)
    cuts = statistics.quantiles(seconds, n=100)
    batch_sizes = sum_of("batch_size_sum", metrics)
    rows = {
        "clients, adapters, replicas, steps": f"{args.clients}, {args.adapters}, {args.replicas}, "
        f"{args.steps}",
        "pictures": f"{len(seconds)} in {tally.elapsed_sec / 60:.1f} minutes",
        "pictures a second": f"{len(seconds) / tally.elapsed_sec:.2f}",
        "seconds of a request, p50 and p95": f"{cuts[49]:.1f} and {cuts[94]:.1f}",
        "orders of a picture's batch, mean": f"{batch_sizes / len(seconds):.2f}",
        "adapters loaded": f"{sum_of('adapter_loads{', metrics):.0f}",
        "answers that are no picture": str(
            sum(n for status, n in tally.statuses.items() if status != 200)
        ),
        "memory of the replicas, MiB, by tenths of the time": ", ".join(tenths(tally.memory)),
        "distinct pictures compared with `generate`": str(len(tally.digests)),
        "wrong": str(wrong),
    }
    print("| | |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value} |")


def tenths(memory: list[tuple[float, int]]) -> list[str]:
    """The first sample and the last of each tenth."""
    last = memory[-1][0]
    picked = [memory[0][1]]
    for tenth in range(1, 11):
        picked.append([size for when, size in memory if when <= last * tenth / 10][-1])
    return [f"{size / MIB:.0f}" for size in picked]


def sum_of(start: str, metrics: str) -> float:
    """Sum over all values of a metric."""
    lines = [line for line in metrics.splitlines() if line.startswith(f"dreambooth_{start}")]
    return sum(float(line.split()[-1]) for line in lines)


if __name__ == "__main__":
    main()
