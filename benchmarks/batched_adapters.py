"""Several adapters on one frozen base: the cost of a subject when N are trained together in one
process.

    python -m benchmarks.batched_adapters                    # both parts
    python -m benchmarks.batched_adapters --part toy --counts 1 2 4 8 --steps 12
    python -m benchmarks.batched_adapters --part sdxl

`toy` trains N of the sample subjects on the embedded base, each N in a process of its own, with the
settings of `assets/configs/toy.toml` and with small micro-batches (one photo, no prior, projections
of attention only). Seconds are those of the steps. Processor seconds are more reliable while other
programs use the machine. Memory is the largest resident set of the process. `sdxl` counts a step of
SDXL's UNet at 1024 px, in bf16 and rank 16, one photo per subject, on the meta device: kernels and
GiB (`benchmarks.gpu_memory` says what is counted).
"""

import argparse
import itertools
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dreambooth_moslora.settings.table import TrainConfig

__all__ = ["main"]

COUNTS = (1, 2, 4, 8)
KINDS = ("recipe", "small")
SMALL = {
    "train_batch_size": 1,
    "with_prior_preservation": False,
    "target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
}
HOUR_STEPS = 480
"""Steps of a whole training by the recipe, from which subjects per hour are computed."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("toy", "sdxl"), help="default: both")
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS), metavar="N")
    parser.add_argument(
        "--steps", type=int, default=12, help="steps of each `toy` training, two of them not timed"
    )
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.alone:
        print(json.dumps(trained(options.alone[0], int(options.alone[1]), options.steps)))
        return
    figures = {}
    for part in (options.part,) if options.part else ("toy", "sdxl"):
        figures[part] = {"toy": toy, "sdxl": sdxl}[part](options)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def toy(options: argparse.Namespace) -> list[dict]:
    print(
        f"{'embedded base':14} {'N':>2} {'s a step':>9} {'cpu s':>7} {'a subject: s':>12} "
        f"{'cpu s':>7}",
        end="",
    )
    print(f" {'subjects an hour':>17} {'peak GiB':>9} {'a subject':>10}")
    found = []
    for kind in KINDS:
        for count in options.counts:
            command = [
                sys.executable,
                "-m",
                "benchmarks.batched_adapters",
                "--alone",
                kind,
                str(count),
            ]
            done = subprocess.run(
                [*command, f"--steps={options.steps}"],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            found.append(figures := json.loads(done.stdout.splitlines()[-1]))
            step, cpu, peak = figures["step_sec"], figures["cpu_sec"], figures["peak_gib"]
            each = f"{step:9.3f} {cpu:7.2f} {step / count:12.3f} {cpu / count:7.2f}"
            print(
                f"{kind:14} {count:2} {each} {figures['an_hour']:17.1f} {peak:9.2f} "
                f"{peak / count:10.2f}",
                flush=True,
            )
    return found


def trained(kind: str, count: int, steps: int) -> dict:
    """Train N subjects on the embedded base, in this process."""
    from dreambooth_moslora.disk.processes import avoid_fragmentation, peak_memory_gib

    avoid_fragmentation()
    logging.basicConfig(level=logging.ERROR)
    from dreambooth_moslora.disk.events import Event
    from dreambooth_moslora.extras.cluster.together import Member, train_together
    from dreambooth_moslora.plan.plan import make_plan

    laps: list[tuple[float, float]] = []

    def note(event: Event) -> None:
        """Note the first subject's steps; between two of them each other subject takes one."""
        if event.kind == "step":
            laps.append((time.perf_counter(), time.process_time()))

    ended = []
    with tempfile.TemporaryDirectory() as folder:
        members = [
            Member(make_plan(config)) for config in configs(kind, count, steps, Path(folder))
        ]
        members[0] = replace(members[0], on_event=note)
        train_together(members, count, lambda _, result: ended.append(result))
    if failed := [result for result in ended if isinstance(result, Exception)]:
        raise failed[0]
    laps = laps[1:]  # the first step allocates memory that the others reuse
    walls, cpus = (
        [after[n] - before[n] for before, after in itertools.pairwise(laps)] for n in (0, 1)
    )
    step_sec = statistics.median(walls)
    return {
        "kind": kind,
        "count": count,
        "step_sec": step_sec,
        "cpu_sec": statistics.median(cpus),
        "an_hour": count * 3600 / (HOUR_STEPS * step_sec),
        "peak_gib": peak_memory_gib(),
    }


def configs(kind: str, count: int, steps: int, out: Path) -> Iterator[TrainConfig]:
    from dreambooth_moslora.extras.cluster.fleet_subjects import read_subjects
    from dreambooth_moslora.settings.sources import load_settings

    own = ("instance_data_dir", "output_dir", "instance_prompt", "class_prompt")
    shared = {
        name: value
        for name, value in load_settings("assets/configs/toy.toml").items()
        if name not in own
    }
    shared |= {
        "max_train_steps": steps,
        "num_validation_images": 0,
        "report_to": "none",
        "crops_per_photo": 1,
    }
    shared |= SMALL if kind == "small" else {}
    for subject in read_subjects(Path("assets/subjects"), shared, out)[:count]:
        yield TrainConfig.from_dict(subject.settings)


def sdxl(options: argparse.Namespace) -> list[dict]:
    from benchmarks.gpu_memory import run_config
    from benchmarks.meta_count import GIB

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    print(
        f"{'SDXL, meta':14} {'N':>2} {'kernels':>8} {'a subject':>10} {'step GiB':>9} "
        f"{'total GiB':>10}",
        end="",
    )
    print(f" {'a subject':>10}")
    found = []
    for count in options.counts:
        kernels, peak, total = counted(run_config(), count)
        found.append(
            {"count": count, "kernels": kernels, "step_gib": peak / GIB, "total_gib": total}
        )
        each = (
            f"{kernels:8,} {kernels / count:10,.0f} {peak / GIB:9.2f} {total:10.2f} "
            f"{total / count:10.2f}"
        )
        print(f"{'':14} {count:2} {each}", flush=True)
    return found


def counted(config: TrainConfig, count: int) -> tuple[int, int, float]:
    """Kernels of a step of N subjects, the largest bytes of its tensors, and GiB with weights, Adam
    and CUDA."""
    import torch

    from benchmarks.gpu_memory import (
        POOLED_WIDTH,
        TEXT_WIDTH,
        TOKENS,
        adapted_unet,
        counted_total_gib,
        empty,
    )
    from benchmarks.meta_count import GIB, Count, Counter, flash_attention
    from benchmarks.sdxl_structure import sdxl_unet
    from dreambooth_moslora.extras.cluster.stacked_adapters import StackedAdapters, twin
    from dreambooth_moslora.method.fast_linear import WorkingCopies

    base = sdxl_unet().to(torch.bfloat16).requires_grad_(False).train()
    models = [adapted_unet(config, unet=twin(base)) for _ in range(count)]
    adapters = StackedAdapters(models) if count > 1 else WorkingCopies(models[0])
    side = config.resolution // 8
    noisy, times, words = (
        empty(count, 4, side, side),
        empty(count),
        empty(count, TOKENS, TEXT_WIDTH),
    )
    added = {"text_embeds": empty(count, POOLED_WIDTH), "time_ids": empty(count, 6)}
    with Counter() as counter, flash_attention(), adapters.for_one_step() as step:
        output = models[0](noisy, times, words, added_cond_kwargs=added).sample.float()
        sum(of_one.square().mean() for of_one in output.split(1)).backward()
        step.collect()
    trained = sum(p.numel() * p.element_size() for p in models[0].parameters() if p.requires_grad)
    others = 3 * trained * (count - 1) / GIB  # weights and Adam's two moments
    peak = Count(0, counter.peak / GIB, counter.kernels)
    return counter.kernels, counter.peak, counted_total_gib(models[0], peak) + others


if __name__ == "__main__":
    main()
