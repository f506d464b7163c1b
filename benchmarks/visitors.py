"""An hour of visitors: their actions on the page, their waiting times, and the page's memory.

`python -m benchmarks.concurrency --minutes 60` calls it.
"""

import random
import statistics
import tempfile
import threading
import time
from collections import Counter, defaultdict

import numpy as np
import psutil
from gradio_client import Client, handle_file

from dreambooth_moslora.core import assets_folder
from dreambooth_moslora.generation.params import read_recipe

WEIGHTS = {"generate": 50, "compare": 14, "grid": 8, "upload": 14, "stop": 10, "train": 4}
"""A visitor's next action: how often of 100 times."""
PAUSE_SEC = (0.5, 4.0)
"""Seconds that a person looks at a picture before requesting the next one."""
TRAIN_STEPS = 6
ADAPTER = "rocket"
SAMPLE_SEC = 5.0
PATIENCE_SEC = 120.0
"""Timeout of a client; its default is five seconds, while a browser waits without end."""
GOING_ON = ("starting", "running", "stopping")


class Day:
    """Results of all visitors: seconds of each action, error messages, and resident memory of the page in MiB."""

    def __init__(self, process: psutil.Process, minutes: float, steps: int) -> None:
        self.process, self.steps = process, steps
        self.ends = time.monotonic() + 60 * minutes
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.errors: Counter[str] = Counter()
        self.acted: set[int] = set()
        self.memory: list[float] = []
        self.warm_from: int | None = None
        """The first sample after which nothing is done for the first time."""
        self.training = threading.Lock()
        """Held by the visitor that trains: the page trains one run at a time, and the others do something else."""

    def is_over(self) -> bool:
        return time.monotonic() >= self.ends

    def sample(self, clients: int) -> None:
        """Note the resident memory, and since when the page is warm: every action was done, and by every visitor one.

        Until then libraries are imported, the base and the adapter loaded and sessions begun; none of it happens again.
        """
        self.memory.append(self.process.memory_info().rss / 2**20)
        if self.warm_from is None and set(WEIGHTS) <= set(self.seconds) and len(self.acted) == clients:
            self.warm_from = len(self.memory)


class Visitor:
    """A browser's requests: a cookie of its own, and random choices from its number."""

    def __init__(self, day: Day, url: str, number: int) -> None:
        self.day, self.number = day, number
        self.chance = random.Random(number)
        self.client = Client(
            url, verbose=False, download_files=tempfile.mkdtemp(), httpx_kwargs={"timeout": PATIENCE_SEC}
        )
        self.picture: str | None = None
        self.drawn = 0

    def stay(self) -> None:
        """Act until the day is over. Errors are noted, and the visitor goes on."""
        while not self.day.is_over():
            self.act(self.chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0])
            time.sleep(self.chance.uniform(*PAUSE_SEC))

    def act(self, name: str) -> None:
        if name == "train" and not self.day.training.acquire(blocking=False):
            name = "generate"
        started = time.monotonic()
        try:
            getattr(self, name)()
        except Exception as error:
            words = f"{name}: {type(error).__name__}: {error}"
            if words not in self.day.errors:
                print(f"\n{words}", flush=True)
            self.day.errors[words] += 1
        else:
            self.day.seconds[name].append(time.monotonic() - started)
            self.day.acted.add(self.number)
        finally:
            if name == "train":
                self.day.training.release()

    def asked(self) -> dict:
        self.drawn += 1
        seed = 1000 * self.number + self.drawn
        return {"prompt": f"a photo of a red toy {seed}", "seed": seed, "steps": self.day.steps}

    def generate(self) -> None:
        asked = self.asked() | {"adapter": self.chance.choice(["none", ADAPTER])}
        gallery, _, _ = self.client.predict(**asked, api_name="/generate")
        self.picture = gallery[0]["image"]
        params = read_recipe(self.picture).params
        if (params.prompt, params.seed) != (asked["prompt"], asked["seed"]):
            raise AssertionError(f"visitor {self.number} got the picture of {params.prompt!r}")

    def compare(self) -> None:
        pair, _ = self.client.predict(**self.asked(), adapter=ADAPTER, api_name="/compare")
        if len(pair) != 2:
            raise AssertionError(f"{len(pair)} pictures to compare")

    def grid(self) -> None:
        axes = {"rows": "scale", "row_values": "0, 1", "columns": "seed", "column_values": "1, 2"}
        self.client.predict(**axes, **self.asked(), adapter=ADAPTER, api_name="/grid")

    def upload(self) -> None:
        if self.picture is None:
            self.generate()
        told = self.client.predict(handle_file(self.picture), api_name="/inspect")
        if "a photo of a red toy" not in told:
            raise AssertionError("the uploaded picture's recipe is not told")

    def stop(self) -> None:
        job = self.client.submit(**(self.asked() | {"steps": 60}), num_images=4, api_name="/generate")
        time.sleep(self.chance.uniform(0.2, 2))
        self.client.predict(api_name="/stop")
        job.result(timeout=600)

    def train(self) -> None:
        photos = [handle_file(file) for file in sorted((assets_folder() / "subjects" / "robot").glob("*.jpg"))[:4]]
        chosen = {"class_word": "robot", "steps": TRAIN_STEPS, "scores": False, "make_masks": False}
        name = f"robot-{self.number}-{self.drawn}-{int(time.time())}"
        self.client.predict(photos=photos, run_name=name, **chosen, api_name="/train")
        if self.chance.random() < 0.3:
            self.client.predict(name, api_name="/stop_training")
        self.wait_for(name)

    def wait_for(self, run: str) -> None:
        while (status := self.client.predict(run, api_name="/train_status"))["state"] in GOING_ON:
            time.sleep(1)
        if status["state"] == "failed":
            raise AssertionError(f"the training of visitor {self.number} failed: {status.get('message')}")


def hour(url: str, pid: int, clients: int, minutes: float, steps: int) -> dict[str, float | int | str]:
    """Let `clients` visitors act for `minutes` on the page of process `pid`: counts, seconds, errors, memory in MiB."""
    day = Day(psutil.Process(pid), minutes, steps)
    visitors = [Visitor(day, url, number) for number in range(1, clients + 1)]
    threads = [threading.Thread(target=visitor.stay, daemon=True) for visitor in visitors]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        day.sample(clients)
        print(progress(day), end="", flush=True)
        time.sleep(SAMPLE_SEC)
    print()
    return figures(day, clients, minutes)


def progress(day: Day) -> str:
    left = max(0.0, day.ends - time.monotonic())
    done = sum(len(times) for times in day.seconds.values())
    return f"\r{done} actions, {day.errors.total()} errors, {day.memory[-1]:.0f} MiB, {left / 60:.1f} min left"


def figures(day: Day, clients: int, minutes: float) -> dict[str, float | int | str]:
    rows: dict[str, float | int | str] = {"visitors": clients, "minutes": minutes, "errors": day.errors.total()}
    for name in WEIGHTS:
        times = day.seconds[name]
        if times:
            waited = f"{statistics.median(times):.1f} / {np.percentile(times, 95):.1f} / {max(times):.1f}"
            rows[f"{name}: times, then median / p95 / longest (s)"] = f"{len(times)}, {waited}"
    rows |= memory_figures(day)
    for words, times in day.errors.most_common():
        rows[f"error: {words}"] = times
    return rows


def memory_figures(day: Day) -> dict[str, float | str]:
    """MiB; the first and the last quarter of the time since the page was warm, by their medians.

    A sample in the middle of a picture holds that picture's activations, so the median is of many samples, and the
    highest says what the machine must have.
    """
    warm = day.memory[day.warm_from :] if day.warm_from is not None else []
    if len(warm) < 4:
        return {"memory": "not compared: too short for every visitor and every action"}
    quarter = len(warm) // 4
    first, last = statistics.median(warm[:quarter]), statistics.median(warm[-quarter:])
    return {
        "memory, warm after (min)": round(day.warm_from * SAMPLE_SEC / 60, 1),
        "memory since, median of the first quarter (MiB)": round(first, 1),
        "memory since, median of the last quarter (MiB)": round(last, 1),
        "memory since, change (%)": round(100 * (last / first - 1), 2),
        "memory since, 95th percentile and highest (MiB)": f"{np.percentile(warm, 95):.1f}, {max(warm):.1f}",
    }
