"""Tools that the pre-training scripts share: fp32 master weights, Muon and AdamW, EMA, resumable
runs.

The model computes in bfloat16 where the processor has instructions for it, else in fp32
(`compute_dtype`).

Under `torchrun --nproc_per_node N` the processes of a script that exports only from rank 0 share
the work: each draws its own batches, and their gradients are averaged.

Muon (Jordan et al., 2024; `torch.optim.Muon`, or `toybox.learning.muon` where bfloat16 is emulated)
orthogonalises the momentum of each weight matrix; a convolution's weight (out,in,k,k) takes part as
(out, in·k·k).
"""

import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from toybox.learning.muon import GramMuon

__all__ = [
    "MasterWeights",
    "TrainingRun",
    "compile_each",
    "compute_dtype",
    "get_rank_and_world",
    "read_saved_step",
    "wait_for_all",
]

# of x86 and, the last, of ARM; PyTorch emulates it elsewhere
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")


def compute_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """bfloat16 on a GPU and on a processor with instructions for it, else fp32, which is then
    faster.

    A PyTorch without `torch.cpu.get_capabilities` cannot be asked: fp32.
    """
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    ask = getattr(torch.cpu, "get_capabilities", dict)
    return torch.bfloat16 if any(ask().get(name) for name in BF16_INSTRUCTIONS) else torch.float32


def compile_each(blocks: Iterable[nn.Module]) -> None:
    """Compile blocks of a model in place, for each shape that they meet. It wants a C++
    compiler."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in blocks:
        block.compile(dynamic=False)


def get_rank_and_world() -> tuple[int, int]:
    """Return this process's number and the number of processes; the first call joins them under
    `torchrun`."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not dist.is_initialized():
        # the first may render for hours meanwhile
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    return (dist.get_rank(), world) if world > 1 else (0, 1)


def wait_for_all() -> None:
    """Go on when each process has come to this call."""
    if get_rank_and_world()[1] > 1:
        dist.barrier()


def average(gradients: list[Tensor]) -> None:
    """Replace each process's gradients by their mean over the processes, in place."""
    _, world = get_rank_and_world()
    if world > 1:
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= world
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients])):
            gradient.copy_(mean.view_as(gradient))


def from_first(number: float) -> float:
    """Return the first process's number, in every process."""
    _, world = get_rank_and_world()
    shared = torch.tensor(number, dtype=torch.float64)
    if world > 1:
        dist.broadcast(shared, src=0)
    return float(shared)


def read_saved_step(out: Path) -> int:
    """Return the step at which the run in `out` resumes: 0 before its first state is saved."""
    path = out / "state.pt"
    return torch.load(path, weights_only=True, mmap=True)["step"] if path.exists() else 0


class MasterWeights:
    """fp32 masters of a model's parameters; the model itself computes in `dtype`, by default
    `compute_dtype`.

    `muon_lr` is the rate of weight matrices whose names contain none of `adamw_names`; `adamw_lr`
    is that of all others. `step` multiplies both by its factor.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        muon_lr: float | None = None,
        adamw_lr: float = 1e-3,
        adamw_names: tuple[str, ...] = (),
        weight_decay: float = 0.0,
        ema_decay: float = 0.999,
        dtype: torch.dtype | None = None,
    ):
        self.names = [n for n, p in model.named_parameters() if p.requires_grad]
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.masters = []
        for p in self.params:
            whole = p.detach().float()
            self.masters.append(nn.Parameter(whole.flatten(1) if p.ndim > 2 else whole.clone()))
        self.ema = [m.detach().clone() for m in self.masters]
        self.ema_decay, self.updates = ema_decay, 0
        matrix = [
            muon_lr is not None
            and m.ndim == 2
            and min(m.shape) > 4
            and not any(k in n for k in adamw_names)
            for n, m in zip(self.names, self.masters)
        ]
        muon = [m for m, is_matrix in zip(self.masters, matrix) if is_matrix]
        adamw = [m for m, is_matrix in zip(self.masters, matrix) if not is_matrix]
        self.optimizers = [
            torch.optim.AdamW(adamw, lr=adamw_lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        ]
        if muon:
            kind = torch.optim.Muon if compute_dtype(muon[0].device) is torch.bfloat16 else GramMuon
            self.optimizers.append(kind(muon, lr=muon_lr, momentum=0.95, weight_decay=weight_decay))
        self.rates = [o.param_groups[0]["lr"] for o in self.optimizers]
        model.to(dtype=dtype or compute_dtype(self.params[0].device))
        if any(p.ndim == 4 for p in self.params):
            model.to(memory_format=torch.channels_last)

    def step(self, factor: float, max_norm: float = 1.0) -> float:
        """Take and clip the model's gradients, update masters, EMA and model; returns the gradient
        norm."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        average(gradients)
        for p, m, gradient in zip(self.params, self.masters, gradients):
            m.grad = gradient.float().reshape(m.shape)
            p.grad = None
        norm = float(nn.utils.clip_grad_norm_(self.masters, max_norm))
        if math.isfinite(norm):
            for optimizer, rate in zip(self.optimizers, self.rates):
                optimizer.param_groups[0]["lr"] = rate * factor
                optimizer.step()
        self.updates += 1
        decay = min(self.ema_decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.ema, [m.detach() for m in self.masters], 1 - decay)
        self.write(self.masters)
        return norm

    @torch.no_grad()
    def write(self, values: list[Tensor]) -> None:
        """Copy masters or EMA values into the model."""
        for p, v in zip(self.params, values):
            p.copy_(v.view(p.shape))

    def get_averaged(self) -> dict[str, Tensor]:
        """EMA weights under the model's parameter names, fp32."""
        return {n: e.view(p.shape).clone() for n, p, e in zip(self.names, self.params, self.ema)}

    def state_dict(self) -> dict:
        return {
            "masters": [m.detach() for m in self.masters],
            "ema": self.ema,
            "updates": self.updates,
            "optimizers": [o.state_dict() for o in self.optimizers],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        for m, saved in zip(self.masters, state["masters"]):
            m.copy_(saved)
        self.ema, self.updates = [e.clone() for e in state["ema"]], state["updates"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.write(self.masters)


class TrainingRun:
    """Resumable loop, `for step in run:`; its state is saved every `save_every` steps, logged every
    `log_every`.

    It ends after `steps`, or earlier after `minutes` of training, in one or several sessions: the
    state holds the time of earlier ones. `until` ends this session at that step, and leaves the
    rates as those of the whole run. With `batch`, the samples of a step in each process, the log
    has the number of samples so far, and of those a second since the line before. Everything random
    in a step must come from `run.generator(step)`, so that a resumed run repeats an unbroken one
    (if its rates follow the steps and not the clock). `beside`: weights of other networks that are
    trained along, by name; they are saved with the state.
    """

    def __init__(
        self,
        out: Path,
        weights: MasterWeights,
        steps: int,
        *,
        minutes: float | None = None,
        until: int | None = None,
        batch: int | None = None,
        save_every: int = 500,
        log_every: int = 50,
        beside: dict[str, MasterWeights] | None = None,
    ):
        self.out, self.weights, self.steps, self.minutes = Path(out), weights, steps, minutes
        self.beside = beside or {}
        self.until = steps if until is None else until
        self.rank, world = get_rank_and_world()
        self.samples = batch and batch * world  # a step
        self.save_every, self.log_every = save_every, log_every
        self.out.mkdir(parents=True, exist_ok=True)
        self.start, self.sec_before = self._resume()
        self.progress, self.clock = 0.0, time.monotonic()
        self.logged = self.start, self.sec_before
        self.sums: dict[str, float] = {}

    def seed_generator(self, step: int, salt: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(1_000_003 * salt + step + 500_009 * self.rank)

    def __iter__(self) -> Iterator[int]:
        self.clock = time.monotonic()
        step = self.start
        self.progress = self._compute_progress(step)
        while self.progress < 1 and step < self.until:
            yield step
            step += 1
            self.progress = self._compute_progress(step)
            if step % self.log_every == 0:
                self._log(step)
            if step % self.save_every == 0 or self.progress >= 1 or step == self.until:
                self.save(step)

    def compute_rate_factor(self, step: int, warmup: int = 50, decay: float = 0.4) -> float:
        """Factor in [0, 1]: linear rise over `warmup` steps, constant, linear fall to 0 over the
        last fraction `decay`."""
        return min(1.0, (step + 1) / warmup, (1 - self.progress) / decay)

    def _get_elapsed_sec(self) -> float:
        return self.sec_before + time.monotonic() - self.clock

    def _compute_progress(self, step: int) -> float:
        """Fraction of the run that is done, by its steps or by the first process's clock."""
        share = step / self.steps
        if self.minutes is not None:
            share = max(share, from_first(self._get_elapsed_sec() / (60 * self.minutes)))
        return share

    def add(self, **figures: float) -> None:
        for name, value in figures.items():
            value = float(value.detach() if isinstance(value, Tensor) else value)
            self.sums[name] = self.sums.get(name, 0.0) + value / self.log_every

    def save(self, step: int) -> None:
        if self.rank:
            return
        temporary = self.out / "state.tmp"
        beside = {name: weights.state_dict() for name, weights in self.beside.items()}
        state = {
            "step": step,
            "sec": self._get_elapsed_sec(),
            "weights": self.weights.state_dict(),
            "beside": beside,
        }
        torch.save(state, temporary)
        os.replace(temporary, self.out / "state.pt")

    def _resume(self) -> tuple[int, float]:
        """Steps and seconds that are already done."""
        path = self.out / "state.pt"
        if not path.exists():
            return 0, 0.0
        state = torch.load(path, weights_only=True)
        self.weights.load_state_dict(state["weights"])
        for name, weights in self.beside.items():
            weights.load_state_dict(state["beside"][name])
        return state["step"], state["sec"]

    def _log(self, step: int) -> None:
        sec = self._get_elapsed_sec()
        row = {
            "step": step,
            **{k: round(v, 5) for k, v in self.sums.items()},
            "step_sec": round(sec / step, 4),
        }
        if self.samples:
            rate = self.samples * (step - self.logged[0]) / (sec - self.logged[1])
            row |= {"samples_sec": round(rate, 2), "seen": self.samples * step}
        self.sums, self.logged = {}, (step, sec)
        if self.rank:
            return
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        remaining_sec = self._get_elapsed_sec() * (1 / self.progress - 1)
        print(
            *(f"{k} {v}" for k, v in row.items()), f"ETA {remaining_sec / 60:.0f} min", flush=True
        )
