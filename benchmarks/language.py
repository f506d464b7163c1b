"""MoSLoRA beside LoRA on language: a small LLaMA is trained on thirteen tasks, then adapted to eight shifted ones.

    python -m benchmarks.language [--seeds 5] [--rank 8] [--out runs/language] [--minutes 40]

The table has the form of table 1 of Wu, Wang, Zhao, Wong, arXiv 2406.11909: accuracy by arm, averaged over eight
tasks. An answer counts if all of its symbols are right under greedy decoding, on 200 fresh examples. Arms share the
base, A's start, the examples, and the number of steps. Each arm's learning rate is chosen on two other tasks and
other seeds; the grid is widened until the best rate is not at its edge.

Every cell is kept in `--out`; the command given again goes on where it was. It needs no download and one core.
"""

import argparse
import copy
import itertools
import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from benchmarks.language_report import Cell, write_report
from benchmarks.language_tasks import KNOWN, LENGTH, NO_LABEL, SHIFTED, TUNING, VOCABULARY, Task, draw, mixture
from dreambooth_moslora.adapters.moslora import MoSLoraConfig, adapter_parameters, inject, mixer_parameters
from dreambooth_moslora.core import atomic_directory, atomic_write, generator, seed_of

__all__ = ["ARMS", "FURTHER", "Arm", "Plan", "adapt", "chosen_rate", "learn_base", "main"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WIDTH, LAYERS, HEADS = 96, 3, 4
BASE_RATE, BASE_WARMUP, BASE_EACH = 3e-3, 100, 6
BATCH, WARMUP, TESTS = 16, 5, 200
FACTOR = 2.0  # between neighbouring learning rates
TUNING_SEEDS = (100,)


@dataclass(frozen=True)
class Arm:
    """What differs from plain LoRA, and the learning rate in the middle of its first grid."""

    rate: float = 1.6e-2
    mixer: str = "none"
    train_mixer: bool = True
    mixer_lr_scale: float = 1.0
    use_rslora: bool = False
    use_dora: bool = False
    full: bool = False

    def config(self, rank: int, seed: int) -> MoSLoraConfig:
        """The adapter's settings, with alpha = rank."""
        return MoSLoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=list(PROJECTIONS),
            mixer=self.mixer,
            train_mixer=self.train_mixer,
            mixer_seed=seed,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )


ARMS: dict[str, Arm] = {
    "LoRA": Arm(),
    "LoRA, rsLoRA's scale": Arm(rate=8e-3, use_rslora=True),
    "DoRA": Arm(use_dora=True),
    "orthogonal": Arm(mixer="orthogonal"),
    "orthogonal, M's rate × 10": Arm(mixer="orthogonal", mixer_lr_scale=10),
    "identity": Arm(mixer="identity"),
    "butterfly, frozen": Arm(rate=8e-3, mixer="butterfly", train_mixer=False),
}
FULL = "all weights"
FURTHER: dict[str, Arm] = {
    "orthogonal, M's rate × 3": Arm(mixer="orthogonal", mixer_lr_scale=3),
    "orthogonal, frozen": Arm(mixer="orthogonal", train_mixer=False),
    FULL: Arm(rate=1e-3, full=True),
}
"""On request, by docs/mixer_theory.md: the rate × √r, and a frozen mixer, which is LoRA with another seed. All weights
are trained to show that a task can be learnt."""


@dataclass(frozen=True)
class Plan:
    """How long and how often. `steps` multiplies the length of each adaptation."""

    out: Path
    rank: int = 8
    seeds: int = 5
    base_steps: int = 1500
    steps: float = 1.0
    arms: tuple[str, ...] = tuple(ARMS)


def new_model() -> LlamaForCausalLM:
    """A LLaMA of 0.3 M parameters with random weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def answers(model: nn.Module, inputs: Tensor) -> Tensor:
    """Logits (n, 6, vocabulary) of the answer's places, from inputs (n, 13)."""
    return model(input_ids=inputs, logits_to_keep=LENGTH).logits


def fit(
    model: nn.Module, groups: list[dict], batches: Iterable[tuple[Tensor, Tensor]], steps: int, warmup: int
) -> None:
    """AdamW; the rates rise over `warmup` steps and fall to zero as a cosine."""
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    parameters = [parameter for group in groups for parameter in group["params"]]
    for inputs, labels in itertools.islice(batches, steps):
        F.cross_entropy(answers(model, inputs).flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, task: Task, *names: object) -> float:
    """Share of fresh examples whose answer is right in every symbol.

    With the true beginning shown, all places are right exactly when greedy decoding gives the whole answer.
    """
    inputs, labels = draw(task, TESTS, generator("test", *names))
    right = (answers(model, inputs).argmax(dim=-1) == labels) | (labels == NO_LABEL)
    return right.all(dim=1).float().mean().item()


def learn_base(plan: Plan) -> LlamaForCausalLM:
    """The base of `plan.out`, which is trained on the known tasks if it is not there."""
    folder = plan.out / "base"
    if not folder.is_dir():
        torch.manual_seed(0)
        model, examples = new_model(), torch.Generator().manual_seed(0)
        batches = (mixture(KNOWN, BASE_EACH, examples) for _ in itertools.count())
        group = {"params": list(model.parameters()), "lr": BASE_RATE, "weight_decay": 0.01}
        fit(model, [group], batches, plan.base_steps, BASE_WARMUP)
        with atomic_directory(folder) as unfinished:
            model.save_pretrained(unfinished)
    return LlamaForCausalLM.from_pretrained(folder).requires_grad_(False)


def trained_groups(model: nn.Module, arm: Arm, rate: float) -> list[dict]:
    """Parameters with their rates; the mixer's own is `mixer_lr_scale` times the others'. Nothing decays."""
    mixers = [] if arm.full else [parameter for _, parameter in mixer_parameters(model)]
    known = {id(parameter) for parameter in mixers}
    trained = model.requires_grad_(True).named_parameters() if arm.full else adapter_parameters(model)
    others = [parameter for _, parameter in trained if id(parameter) not in known]
    rates = {rate: others, rate * arm.mixer_lr_scale: mixers} if arm.mixer_lr_scale != 1 else {rate: others + mixers}
    return [{"params": params, "lr": lr, "weight_decay": 0.0} for lr, params in rates.items()]


def adapt(base: nn.Module, plan: Plan, arm_name: str, task_name: str, seed: int, rate: float) -> Cell:
    """Adapt a copy of the base to one task, or read what an earlier run kept of it."""
    words = [arm_name, f"r{plan.rank}", task_name, f"{rate:.3g}", str(seed)]
    file = plan.out / "cells" / ("_".join(words).replace(" ", "-").replace(",", "").replace("'", "") + ".json")
    if file.is_file():
        return Cell(**json.loads(file.read_text(encoding="utf-8")))
    arm, task, started = (ARMS | FURTHER)[arm_name], (SHIFTED | TUNING)[task_name], time.process_time()
    model, examples = copy.deepcopy(base), generator("examples", task_name, seed)
    torch.manual_seed(seed_of("adapter", task_name, seed))
    if not arm.full:
        inject(model, arm.config(plan.rank, seed))
    groups = trained_groups(model, arm, rate)
    steps = max(round(task.steps * plan.steps), 2)
    fit(model, groups, (draw(task, BATCH, examples) for _ in itertools.count()), steps, WARMUP)
    found = Cell(
        arm=arm_name,
        task=task_name,
        seed=seed,
        rate=rate,
        accuracy=accuracy(model, task, task_name, seed),
        parameters=sum(parameter.numel() for group in groups for parameter in group["params"]),
        seconds=round(time.process_time() - started, 2),
    )
    atomic_write(file, json.dumps(vars(found)))
    return found


def chosen_rate(base: nn.Module, plan: Plan, arm_name: str) -> tuple[float, dict[float, float]]:
    """The rate with the best mean accuracy on the tuning tasks, inside its grid; and the mean at every rate."""
    middle, curve = (ARMS | FURTHER)[arm_name].rate, {}
    wanted = [middle / FACTOR, middle, middle * FACTOR]
    while wanted:
        for rate in wanted:
            cells = [adapt(base, plan, arm_name, task, s, rate) for task in TUNING for s in TUNING_SEEDS]
            curve[rate] = sum(cell.accuracy for cell in cells) / len(cells)
        best = max(curve, key=curve.get)
        wanted = [rate for rate in (best / FACTOR, best * FACTOR) if rate not in curve]
    return best, dict(sorted(curve.items()))


def run(plan: Plan, deadline: float) -> str:
    """Everything that is not done yet, seeds outermost; after the deadline, the report of the seeds that are whole."""
    (plan.out / "cells").mkdir(parents=True, exist_ok=True)
    base = learn_base(plan)
    tuning = {name: chosen_rate(base, plan, name) for name in plan.arms}
    cells = []
    for seed, task, name in itertools.product(range(plan.seeds), SHIFTED, plan.arms):
        if time.monotonic() > deadline:
            break
        cells.append(adapt(base, plan, name, task, seed, tuning[name][0]))
    known = {name: accuracy(base, task, "known", name) for name, task in KNOWN.items()}
    frozen = {name: accuracy(base, task, name, 0) for name, task in SHIFTED.items()}
    full = {name: adapt(base, plan, FULL, name, 0, FURTHER[FULL].rate).accuracy for name in SHIFTED}
    facts = {"rank": plan.rank, "known": known, "steps": {name: task.steps for name, task in SHIFTED.items()}}
    curves = {name: curve for name, (_, curve) in tuning.items()}
    return write_report(plan.out, facts, {"frozen base": frozen, "all weights, one seed": full}, curves, cells)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/language"))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *FURTHER], default=list(ARMS))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="then report the seeds that are whole")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    plan = Plan(args.out, args.rank, args.seeds, arms=tuple(args.arms))
    print(run(plan, time.monotonic() + 60 * args.minutes))


if __name__ == "__main__":
    main()
