"""Trains the embedded base's UNet on, in the background, with what nothing else uses of the
processor (Linux).

    python -m toybox.keep_training STATE            starts the training, goes on with it, or prints
                                                    how far it is
    python -m toybox.keep_training STATE --pause    and --go_on, --stop

It begins with the weights in `assets/toy-sdxl`, or with `--anew 1` at random, learns from renders
and from `assets/toy-zimage`, which draws better, and needs nothing else. With `--teacher FOLDER` it
learns from another base of that architecture, and its latents are those of this base's autoencoder.
STATE is a folder outside the repository:

    settings.json   the numbers of the first call, which hold for all later ones
    log             what the scripts print
    toys, latents   the newest renders in shards, and a file of latents for each
    renders.jsonl   for each leg, how many pictures were made, and in how many seconds
    unet            state.pt, log.jsonl, and in model the averaged weights of the last whole leg
    sheets          the same 25 prompts and noises, drawn by the averaged weights

The steps are cut into legs. Before each leg, `--fresh` shards of pictures from new seeds are made,
and only the newest `--shards` are kept. A picture is therefore seen batch · leg / (fresh ·
pictures) times: 16 by default. Rendering and encoding a picture costs about as much as five
sightings, so 16 leave three quarters of the time to the training. The same command after a kill or
a restart of the machine goes on from the last saved step, at most 100 steps back.
"""

import argparse
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TextIO

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, multiprocessing

from dreambooth_moslora.disk.processes import keep_freed_memory
from toybox.captions import format_canonical_caption
from toybox.data.cache_latents import encode
from toybox.data.pieces import load_or_make
from toybox.data.render_dataset import Shard, write_all
from toybox.data.renders import Renders, to_uint8
from toybox.data.sample_latents import draw
from toybox.learning import train_unet
from toybox.learning.alignment import VisionTower
from toybox.learning.channels_last import to_channels_last
from toybox.learning.train_flow import FlowTeacher
from toybox.learning.training import (
    compute_dtype,
    get_rank_and_world,
    read_saved_step,
    wait_for_all,
)
from toybox.measures.evaluate_base import draw_sheet, sample_scenes

__all__ = ["Settings", "Sheets", "keep_training", "make_renders"]

ROOT = Path(__file__).parents[1]
BASE, TEACHER = ROOT / "assets" / "toy-sdxl", ROOT / "assets" / "toy-zimage"
DEFAULT_RATES = ["--decay", "0.3", "--detail", "0.5"]
RESUMED_OPTIONS = [
    "--start",
    str(BASE / "unet"),
    "--lr",
    "6e-4",
    "--muon_lr",
    "6e-3",
    "--ema_decay",
    "0.9995",
]
FRESH_OPTIONS = ["--lr", "1e-3", "--muon_lr", "1e-2", "--ema_decay", "0.999"]
COLUMNS, SAMPLER_STEPS = 5, 20
LOWEST_PRIORITY = 19
MIN_COMPILED_STEPS = 100  # pictures in a shard, or in a batch: compilation takes a minute
SIGNALS = {
    "pause": [signal.SIGSTOP],
    "go_on": [signal.SIGCONT],
    "stop": [signal.SIGTERM, signal.SIGCONT],
}


@dataclass(frozen=True)
class Settings:
    """Settings of a training.

    fresh: shards that are replaced before a leg
    shards, pictures: number of shards, and of pictures in each
    anew: 1 to begin with random weights
    narrow: 1 for renders of `render_dataset --narrow`
    teacher: folder of Z-Image's architecture
    processes: they share a step's batch. Two of one thread are faster than one of two, whose
        threads wait at each of many small operations.
    """

    steps: int = 20_000
    batch: int = 256
    leg: int = 500
    shards: int = 16
    fresh: int = 8
    pictures: int = 1000
    seed: int = 1001
    sheet_every: int = 1000
    processes: int = 2
    anew: int = 0
    narrow: int = 0
    teacher: str = str(TEACHER)

    @property
    def vae(self) -> Path:
        """Autoencoder of the latents."""
        return Path(self.teacher) / "vae"

    def __post_init__(self) -> None:
        if self.batch % self.processes:
            raise SystemExit(
                f"--batch {self.batch}: {self.processes} processes cannot share it evenly"
            )

    def list_shards(self, leg: int) -> range:
        return range(leg * self.fresh, leg * self.fresh + self.shards)

    def count_later_images(self, step: int) -> int:
        """Count the pictures that are made for the legs after the one of this step."""
        return (-(-self.steps // self.leg) - 1 - step // self.leg) * self.fresh * self.pictures


class Sheets:
    """Draw the same prompts from the same noise after each `every` steps: FOLDER/01000.png and so
    on."""

    def __init__(self, folder: Path, every: int, vae: Path):
        self.folder, self.every, self.vae = folder, every, vae
        prompts = [
            format_canonical_caption(scene)
            for scene in sample_scenes(COLUMNS**2, held_out=False, seed=0)
        ]
        self.embeds, self.pooled = train_unet.TextTowers(BASE, BASE / "tokenizer")(prompts)
        self.noise = torch.randn(
            len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(0)
        )

    def __call__(self, step: int, averaged: Callable[[], UNet2DConditionModel]) -> None:
        if step % self.every == 0:
            self.folder.mkdir(exist_ok=True)
            draw_sheet(self.generate_images(averaged()), COLUMNS).save(
                self.folder / f"{step:05d}.png"
            )

    @torch.no_grad()
    def generate_images(self, unet: UNet2DConditionModel) -> Tensor:
        """uint8 (25,128,128,3)."""
        unet.eval().to(compute_dtype(), memory_format=torch.channels_last)
        unet.set_attn_processor(AttnProcessor())
        latents = draw(unet, self.noise, self.embeds, self.pooled, SAMPLER_STEPS)
        vae = AutoencoderKL.from_pretrained(self.vae, torch_dtype=torch.float32).eval()
        vae.to(compute_dtype(), memory_format=torch.channels_last)
        return to_uint8(vae.decode(to_channels_last(latents / vae.config.scaling_factor)).sample)


def make_renders(state: Path, settings: Settings, leg: int) -> None:
    """Delete the shards that the leg does not learn from; render and encode those of it that are
    missing. The first process renders, in processes of its own; all encode."""
    began, numbers = time.monotonic(), settings.list_shards(leg)
    rendered_count = render_missing(state, settings, numbers) if get_rank_and_world()[0] == 0 else 0
    wait_for_all()
    encode_shards(state, settings, numbers)
    wait_for_all()
    if rendered_count:
        row = {"leg": leg, "pictures": rendered_count, "sec": round(time.monotonic() - began, 1)}
        with (state / "renders.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def render_missing(state: Path, settings: Settings, numbers: range) -> int:
    """Delete the shards of other numbers and render those of these that are missing; returns how
    many pictures."""
    for path in [*(state / "toys").glob("*_*"), *(state / "latents").glob("*")]:
        if int(path.stem[-4:]) not in numbers:
            path.unlink()
    (state / "toys").mkdir(parents=True, exist_ok=True)
    compiled = settings.pictures >= MIN_COMPILED_STEPS
    shape = {
        "count": settings.pictures,
        "seed": settings.seed,
        "size_px": 128,
        "device": "cpu",
        "compiled": compiled,
    }
    shape["narrow"] = bool(settings.narrow)
    missing = [
        shard for number in numbers if not (shard := Shard(state / "toys", number, **shape)).is_done
    ]
    if missing:
        write_all(missing, os.cpu_count() or 1)
    return len(missing) * settings.pictures


def encode_shards(state: Path, settings: Settings, numbers: range) -> None:
    """Write one file of latents for each shard: latents/0007.safetensors. The processes take the
    shards by turns."""
    renders, size, (rank, world) = Renders(state / "toys"), settings.pictures, get_rank_and_world()
    vae, sight = AutoencoderKL.from_pretrained(settings.vae), VisionTower(BASE / "image_encoder")
    for place, number in list(enumerate(numbers))[rank::world]:
        rows = range(place * size, (place + 1) * size)
        make = partial(encode, renders, rows, vae, sight, first=numbers.start * size)
        load_or_make(state / "latents" / f"{number:04d}.safetensors", make)


def keep_training(state: Path, settings: Settings) -> None:
    """Train all remaining legs, in this process or in one of several: the first makes the renders
    and the sheets."""
    is_first = get_rank_and_world()[0] == 0
    sheets = Sheets(state / "sheets", settings.sheet_every, settings.vae) if is_first else None
    teacher = FlowTeacher(Path(settings.teacher), compiled=settings.batch >= MIN_COMPILED_STEPS)
    while (step := read_saved_step(state / "unet")) < settings.steps:
        leg = step // settings.leg
        if is_first:
            print(f"leg {leg} begins at step {step}", flush=True)
        make_renders(state, settings, leg)
        train_unet.train(
            build_arguments(state, settings, (leg + 1) * settings.leg), sheets, teacher
        )
        wait_for_all()
    print(
        "the training has ended: the averaged weights are in", state / "unet" / "model", flush=True
    )


def run_process(rank: int, state: Path, settings: Settings, port: int) -> None:
    """`keep_training` as one of the processes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(settings.processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(max(1, torch.get_num_threads() // settings.processes))
    keep_freed_memory()
    keep_training(state, settings)


def share(state: Path, settings: Settings) -> None:
    """Run `keep_training` in processes of this one's session."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(run_process, (state, settings, port), nprocs=settings.processes)


def build_arguments(state: Path, settings: Settings, until: int) -> argparse.Namespace:
    """Build the arguments of `train_unet` for the leg that ends at step `until`."""
    paths = {"data": state / "toys", "latents": state / "latents", "out": state / "unet"}
    paths |= {"clip": BASE, "tokenizer": BASE / "tokenizer"}
    numbers = {"steps": settings.steps, "until": min(until, settings.steps), "held_back": 0}
    numbers |= {
        "batch": settings.batch // get_rank_and_world()[1],
        "log_every": min(50, settings.leg),
    }
    arguments = [word for k, v in (paths | numbers).items() for word in (f"--{k}", str(v))]
    arguments += DEFAULT_RATES + (FRESH_OPTIONS if settings.anew else RESUMED_OPTIONS)
    return train_unet.parse(arguments + ["--compiled"] * (settings.batch >= MIN_COMPILED_STEPS))


def set_lowest_priority(pid: int) -> None:
    """To the lowest, for a process that leads a session, and for all that it starts. Where the
    kernel shares the processor among sessions, `nice` counts within one only: the session's own
    priority is in /proc/PID/autogroup."""
    os.setpriority(os.PRIO_PROCESS, pid, LOWEST_PRIORITY)
    try:
        Path(f"/proc/{pid}/autogroup").write_text(str(LOWEST_PRIORITY))
    except FileNotFoundError:
        pass  # this kernel shares the processor among processes
    except OSError as error:
        print(
            f"the session keeps its priority, its processes alone have the lowest: {error}",
            flush=True,
        )


def lock_training(state: Path) -> tuple[TextIO, int | None]:
    """Open the file STATE/pid and return it with the training's process or None. The training holds
    the file's lock while it lives; if there is none, the caller has it now."""
    file = (state / "pid").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return file, int(file.read())
    return file, None


def start(state: Path, lock: TextIO) -> int:
    """Start the training's process in a session of its own, which inherits the lock."""
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())} | os.environ
    quiet = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "HF_HUB_OFFLINE": "1"}
    # in this process: others would be in a session of theirs
    quiet |= {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, "-m", "toybox.keep_training", str(state), "--here"]
    with (state / "log").open("a", encoding="utf-8") as log:
        options = {
            "stdin": subprocess.DEVNULL,
            "stdout": log,
            "stderr": subprocess.STDOUT,
            "start_new_session": True,
        }
        process = subprocess.Popen(
            command, cwd=ROOT, env=threads | quiet, pass_fds=[lock.fileno()], **options
        )
    set_lowest_priority(process.pid)
    lock.truncate(0)
    lock.write(str(process.pid))
    lock.close()
    return process.pid


def format_progress(state: Path, settings: Settings) -> str:
    """Step, pictures seen, samples a second, and the time left, with the rendering."""
    row = read_last_row(state / "unet" / "log.jsonl")
    if row is None:
        return read_last_line(state / "log")
    remaining_sec = (settings.steps - row["step"]) * settings.batch / row["samples_sec"]
    renders = read_last_row(state / "renders.jsonl") or {"sec": 0, "pictures": 1}
    remaining_sec += settings.count_later_images(row["step"]) * renders["sec"] / renders["pictures"]
    progress_line = f"{row['seen']} pictures seen, {row['samples_sec']} samples a second"
    return (
        f"step {row['step']} of {settings.steps}, {progress_line}, ETA {remaining_sec / 3600:.1f} h"
    )


def read_last_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").rstrip().rpartition("\n")[2] if path.exists() else ""


def read_last_row(path: Path) -> dict | None:
    return json.loads(line) if (line := read_last_line(path)) else None


def is_paused(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def load_settings(state: Path, options: dict[str, int | str]) -> Settings:
    """Load the settings of the first call. Raises SystemExit if this call gives another number."""
    path = state / "settings.json"
    if not path.exists():
        path.write_text(json.dumps(asdict(Settings(**options)), indent=2) + "\n", encoding="utf-8")
    settings = Settings(**json.loads(path.read_text(encoding="utf-8")))
    for name, value in options.items():
        if getattr(settings, name) != value:
            raise SystemExit(
                f"--{name} {value}: {path} has {getattr(settings, name)}; "
                "take another STATE for other numbers"
            )
    return settings


def send(action: str, pid: int | None, lock: TextIO) -> str:
    """Send the action's signals to the training's processes; --stop waits until they have ended."""
    if pid is None:
        raise SystemExit(f"--{action}: no training runs there")
    for number in SIGNALS[action]:
        os.killpg(pid, number)
    if action == "stop":
        fcntl.flock(lock, fcntl.LOCK_EX)
    return {"pause": "paused", "go_on": "goes on", "stop": "stopped"}[action]


def run_command(state: Path, action: str | None, options: dict[str, int | str]) -> str:
    """Do what the command line asks for; returns the line to print."""
    if state.is_relative_to(ROOT):
        raise SystemExit(
            f"{state}: choose a folder outside the repository, which the state would fill"
        )
    state.mkdir(parents=True, exist_ok=True)
    lock, pid = lock_training(state)
    if action:
        return send(action, pid, lock)
    settings = load_settings(state, options)
    if pid is None and read_saved_step(state / "unet") < settings.steps:
        return f"started as process {start(state, lock)}; its log is {state / 'log'}"
    word = "ended" if pid is None else "paused" if is_paused(pid) else "runs"
    return f"{word}: {format_progress(state, settings)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "state", type=Path, metavar="STATE", help="folder of the training, outside the repository"
    )
    actions = parser.add_mutually_exclusive_group()
    for name, help_text in (
        ("pause", "stop for a while"),
        ("go_on", "after a pause"),
        ("stop", "end the process"),
    ):
        actions.add_argument(
            f"--{name}", dest="action", action="store_const", const=name, help=help_text
        )
    actions.add_argument(
        "--here",
        dest="action",
        action="store_const",
        const="here",
        help="train, and wait for the end",
    )
    for field in fields(Settings):
        help_text = f"of the first call (default: {field.default})"
        parser.add_argument(f"--{field.name}", type=type(field.default), help=help_text)
    args = vars(parser.parse_args(argv))
    state, action = args.pop("state").resolve(), args.pop("action")
    settings = {name: value for name, value in args.items() if value is not None}
    if action == "here":
        share(state, load_settings(state, settings))
    else:
        print(run_command(state, action, settings))


if __name__ == "__main__":
    main()
