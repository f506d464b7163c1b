"""Twenty visitors at once, then two hundred pictures in a row: waiting times, correct pictures, memory.

    python -m benchmarks.concurrency [--base toy] [--clients 20] [--pictures 200] [--json FILE]
    python -m benchmarks.concurrency --minutes 60    # visitors who generate, compare, upload, train and stop

`app.py` runs as a process of its own. Every client requests its own prompt and seed; the answer's recipe must
contain them, and its pixels must equal those that a pipeline in this process draws from that recipe.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import psutil
from gradio_client import Client

from benchmarks.visitors import hour

ROOT = Path(__file__).resolve().parents[1]
CHECKED = 3
"""Number of answers whose pixels are drawn again here; the recipes of all are compared."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="toy")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--minutes", type=float, help="let visitors use all functions of the page for this time")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        server, url = start_app(args.base, Path(scratch))
        try:
            if args.minutes:
                results = hour(url, server.pid, args.clients, args.minutes, args.steps)
            else:
                results = crowd(url, args) | marathon(url, server, args)
        finally:
            server.terminate()
            server.wait()
    for name, value in results.items():
        print(f"{name:58} {value}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def start_app(base: str, scratch: Path, *options: str) -> tuple[subprocess.Popen, str]:
    """The page on a free port, ready to answer. `options` are further options of `app.py`."""
    command = [sys.executable, str(ROOT / "app.py"), "--base", base, "--runs_dir", str(scratch / "runs"), *options]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "GRADIO_TEMP_DIR": str(scratch / "cache")}
    log = (scratch / "app.log").open("w+")
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
    for _ in range(600):
        if found := re.search(r"http://127\.0\.0\.1:\d+", (scratch / "app.log").read_text()):
            return server, found[0]
        if server.poll() is not None:
            break
        time.sleep(0.2)
    raise SystemExit((scratch / "app.log").read_text())


def ask(url: str, number: int, steps: int, client: Client | None = None) -> tuple[float, str]:
    """Request a picture of visitor `number`: (seconds until it was there, its file). Exits when it is another
    picture."""
    from dreambooth_moslora.generation.params import read_recipe

    client = client or Client(url, verbose=False, download_files=tempfile.mkdtemp())
    started = time.perf_counter()
    gallery, seed, _ = client.predict(
        f"a photo of a red toy {number}", adapter="none", seed=number, steps=steps, api_name="/generate"
    )
    seconds = time.perf_counter() - started
    file = gallery[0]["image"]
    params = read_recipe(file).params
    if (seed, params.seed, params.prompt) != (number, number, f"a photo of a red toy {number}"):
        raise SystemExit(f"client {number} got the picture of {params.prompt!r}, seed {params.seed}")
    return seconds, file


def crowd(url: str, args: argparse.Namespace) -> dict[str, float | int]:
    """All clients at once. A first picture before them takes the time of loading the base."""
    ask(url, 0, args.steps)
    with ThreadPoolExecutor(args.clients) as pool:
        answers = list(pool.map(lambda number: ask(url, number, args.steps), range(1, args.clients + 1)))
    waits = sorted(seconds for seconds, _ in answers)
    check_pixels(args.base, [file for _, file in answers[:CHECKED]])
    return {
        "clients at once": args.clients,
        "errors": 0,
        "waiting, median (s)": round(statistics.median(waits), 2),
        "waiting, p95 (s)": round(float(np.percentile(waits, 95)), 2),
        "waiting, longest (s)": round(waits[-1], 2),
    }


def check_pixels(base: str, files: list[str]) -> None:
    from dreambooth_moslora.generation.params import GenerationParams, Image
    from dreambooth_moslora.generation.pipeline import SubjectPipeline

    pipeline = SubjectPipeline.from_base(base)
    for file in files:
        events = pipeline.generate(GenerationParams.from_png(file))
        expected = next(np.asarray(event.pixels) for event in events if isinstance(event, Image))
        if not np.array_equal(np.asarray(PIL.Image.open(file)), expected):
            raise SystemExit(f"{file} is not the picture of its recipe")


def marathon(url: str, server: subprocess.Popen, args: argparse.Namespace) -> dict[str, float | int]:
    """Pictures one after the other by one visitor; the server's resident memory after a fifth, and at the end."""
    client, process = Client(url, verbose=False, download_files=tempfile.mkdtemp()), psutil.Process(server.pid)
    memory = []
    for number in range(args.pictures):
        ask(url, number, args.steps, client)
        memory.append(process.memory_info().rss / 2**20)
    warm = memory[len(memory) // 5 :]
    slope = float(np.polyfit(range(len(warm)), warm, 1)[0])
    return {
        "pictures in a row": args.pictures,
        "memory after a fifth (MiB)": round(warm[0], 1),
        "memory at the end (MiB)": round(warm[-1], 1),
        "growth a picture, fitted (KiB)": round(1024 * slope, 1),
    }


if __name__ == "__main__":
    main()
