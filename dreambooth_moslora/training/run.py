"""A run during training: one method for each line of the loop `loop.fit`."""

import logging
import math
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import nn

from dreambooth_moslora.adapters.files.proof import Proof
from dreambooth_moslora.core.atomic_files import remove_directory
from dreambooth_moslora.core.errors import StopRequestedError, UserError
from dreambooth_moslora.core.half_precision import half_precision
from dreambooth_moslora.core.run_files.events import (
    AdapterExported,
    CheckpointSaved,
    RunEnded,
    ScaleFound,
    StepDone,
    StepEvaluated,
    event_of,
    events_of,
)
from dreambooth_moslora.generation.fixed_seeds import Sampler
from dreambooth_moslora.training.checkpoint import Position, save_checkpoint
from dreambooth_moslora.training.processes import any_process, on_each, on_main, share_of
from dreambooth_moslora.training.reporter import Stopwatch, free_unused_memory, memory_gib
from dreambooth_moslora.training.results.best_scale import ScaleChoice
from dreambooth_moslora.training.results.best_step import BestStep
from dreambooth_moslora.training.results.publish import Publisher
from dreambooth_moslora.training.results.samples import ValidationSamples
from dreambooth_moslora.training.run_context import RunContext
from dreambooth_moslora.training.step.averages import copies
from dreambooth_moslora.training.step.optimizer import optimizer_kind
from dreambooth_moslora.training.step.train_step import StepLosses, TrainStep

__all__ = ["StepScorer", "TrainResult", "Training"]

logger = logging.getLogger(__name__)

MOST_SKIPPED = 20
"""Steps in a row that fp16 may skip; its scale has then fallen by a factor of a million."""


class StepScorer(Protocol):
    """Scores at fixed seeds (`evaluation.during_training`), including the `best` step so far."""

    prompts: list[str]

    def __call__(self, sampler: Sampler, step: int) -> dict: ...

    def find_scale(self, sampler: Sampler, components: dict[str, nn.Module]) -> ScaleChoice | None: ...


@dataclass(frozen=True)
class TrainResult:
    """The adapter in `run_dir` has `step` optimizer steps; `proof` says how exactly its files load elsewhere."""

    run_dir: Path
    step: int
    interrupted: bool
    proof: Proof | None


@dataclass
class Training:
    """A run that is set up. `checkpoint` is the newest that it wrote or resumed from, `checkpoint_step` its step."""

    context: RunContext
    max_train_steps: int
    train_step: TrainStep
    samples: ValidationSamples
    sampler: Sampler
    publisher: Publisher
    evaluator: StepScorer | None
    checkpoint: Path | None
    best: BestStep | None = None
    skipped_in_a_row: int = 0
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    def __post_init__(self):
        self.config, self.run_dir = self.context.config, self.context.run_dir
        self.accelerator, self.report = self.context.accelerator, self.context.report
        self.checkpoint_step = self.step

    @property
    def step(self) -> int:
        """Number of optimizer steps done."""
        return self.train_step.step

    def accumulate_gradients(self) -> StepLosses:
        self.stopwatch.restart()
        return self.train_step.accumulate_gradients()

    def check_finite(self, losses: StepLosses) -> None:
        """Raises UserError unless the loss is finite. Losses are shared, so all processes stop together."""
        if not math.isfinite(losses.total):
            raise self.diverged(f"the loss is {losses.total} at step {self.step + 1}")

    def diverged(self, what: str) -> UserError:
        other = ", or use --mixed_precision bf16 instead of fp16" if could_be_in_bf16(self.accelerator) else ""
        return UserError(f"{what}: lower --learning_rate{other}; checkpoints up to here are in {self.run_dir.path}")

    def update_adapter(self, losses: StepLosses) -> bool:
        """Take an optimizer step. Returns False when fp16 overflowed: nothing changed, and the step is repeated.

        Raises UserError when the gradient stays not finite.
        """
        attempted = self.step + 1
        grad_norm = self.train_step.update_adapter()
        skipped = not math.isfinite(grad_norm)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.report(self.step_event(attempted, losses, None if skipped else grad_norm, skipped))
        if skipped and (self.accelerator.scaler is None or self.skipped_in_a_row >= MOST_SKIPPED):
            raise self.diverged(f"the gradient is {grad_norm} at step {attempted}")
        return not skipped

    def step_event(self, step: int, losses: StepLosses, grad_norm: float | None, skipped: bool) -> StepDone:
        seconds, eta = self.stopwatch.lap(self.max_train_steps - self.step)
        return StepDone(
            step=step,
            loss=losses.total,
            loss_instance=losses.instance,
            loss_prior=losses.prior,
            lr=self.train_step.learning_rate,
            grad_norm=grad_norm,
            step_sec=seconds,
            eta_sec=eta,
            memory_gib=memory_gib(self.accelerator.device),
            skipped=skipped,
        )

    def sample_if_due(self) -> None:
        """Draw samples at step 0, every `validation_steps`, and at the end, with the same prompts and seeds each time.

        At step 0 each denoising step is reported, as the user may be waiting for them.
        """
        if not self.samples.is_due(self.step, self.max_train_steps):
            return
        self.report.phase("sampling", 0, 1)
        sampler = self.sampler
        if self.step == 0:
            total = len(share_of(self.accelerator, self.samples.requests)) * sampler.inference_steps
            sampler = replace(sampler, on_step=self.report.counter("sampling", total))
        with suppress(StopRequestedError), self.train_step.averaged():  # the loop checks for a stop next
            self.report(self.samples.draw(self.step, sampler, self.accelerator))
        free_unused_memory(self.accelerator.device)

    def evaluate_if_due(self) -> None:
        if self.is_scored_now:
            self.require_finite_adapter()
            on_main(self.accelerator, self.evaluate)

    @property
    def is_scored_now(self) -> bool:
        every = self.config.evaluate_steps
        return self.evaluator is not None and bool(every) and self.step % every == 0

    def evaluate(self) -> None:
        """Score this step, on the main process, and keep the adapter if it is the best so far."""
        self.report.phase("evaluating")
        try:
            with self.train_step.averaged():
                scores = self.evaluator(self.sampler, self.step)
        except StopRequestedError:  # the loop checks for a stop next
            return
        finally:
            free_unused_memory(self.accelerator.device)
        found = event_of({"type": StepEvaluated.kind, "step": self.step, **scores})
        self.report(found)
        self.best = BestStep(**found.best)
        self.publisher.note_scores(found.scores, self.best)
        if self.best.step == self.step:
            with self.train_step.averaged():
                self.publisher.keep_best()
        if line := self.best.advice(self.config.early_stopping):
            logger.warning("step %d: %s", self.step, line)

    def recall_scores(self) -> None:
        """Give a resumed run its earlier scores; score the step at which it was stopped if that is missing."""

        def recall() -> None:
            scored = events_of(StepEvaluated, self.run_dir.read_metrics())
            if scored:
                self.publisher.note_scores(scored[-1].scores, BestStep(**scored[-1].best))
            if self.is_scored_now and self.step not in (event.step for event in scored):
                self.evaluate()

        if self.step:
            on_main(self.accelerator, recall)

    def has_stalled(self) -> bool:
        """Whether early stopping is on and due."""
        patience = self.config.early_stopping
        stalled = patience is not None and self.best is not None and self.best.should_stop(patience)
        return patience is not None and any_process(self.accelerator, stalled)

    def checkpoint_if_due(self) -> None:
        if self.step % self.config.checkpointing_steps == 0:
            self.save_checkpoint(self.run_dir.checkpoint_path(self.step))

    def save_checkpoint(self, path: Path) -> None:
        """Write a checkpoint and remove an older `last`. Raises on all processes when the adapter is not finite
        (UserError), or when the main process cannot write."""
        self.require_finite_adapter()
        on_main(self.accelerator, lambda: self.write_checkpoint(path))
        self.checkpoint, self.checkpoint_step = path, self.step

    def write_checkpoint(self, path: Path) -> None:
        position = Position(self.step, self.config.seed, optimizer_kind(self.config))
        optimizer, scaler = self.train_step.optimizer.optimizer, self.accelerator.scaler
        parts = position, self.train_step.components, self.publisher.facts, optimizer, scaler
        own = copies(self.train_step.trained) if self.train_step.average is not None else None
        learnt = self.train_step.learnt
        with self.train_step.averaged():
            save_checkpoint(path, *parts, own, learnt.tokens if learnt else ())
        if path != self.run_dir.last_dir and self.run_dir.last_dir.is_dir():
            remove_directory(self.run_dir.last_dir)
        self.run_dir.rotate(self.config.checkpoints_total_limit)
        self.report(CheckpointSaved(self.step, path.name))

    def require_finite_adapter(self) -> None:
        """Raises UserError on all processes when a weight is NaN or infinite: black pictures can score well, and
        `best/` would be lost."""
        if not all(bool(torch.isfinite(weights).all()) for weights in self.train_step.trained):
            raise self.diverged(f"the adapter is not finite after step {self.step}")

    def stop_requested(self) -> bool:
        """Whether any process was asked to stop; all processes stop after the same step."""
        return self.context.stop_requested()

    def find_scale(self) -> None:
        """Find the finished adapter's best scale for its header and card. A stop leaves it unknown."""
        if self.evaluator is None:
            return
        self.report.phase("evaluating")
        with suppress(StopRequestedError):
            found = self.evaluator.find_scale(self.sampler, self.train_step.components)
            if found is not None:
                by_scale = {f"{scale:g}": score for scale, score in found.scores.items()}
                self.report(ScaleFound(found.best, found.low, found.high, by_scale))
                self.publisher.note_scale(found)
            if found is not None and self.best is not None and self.best.step == self.step:
                self.publisher.keep_best()
        free_unused_memory(self.accelerator.device)

    def require_a_step(self) -> None:
        """Raises StopRequestedError before the first step: the adapter would be the unchanged base."""
        if self.step == 0:
            raise StopRequestedError

    def finish(self, interrupted: bool) -> TrainResult:
        """Write the loadable adapter with its card, and a checkpoint with the raw adapter to resume from.

        The checkpoint is called `last` unless the step is a multiple of `--checkpointing_steps`: as in
        diffusers' script, only those have numbers.
        """
        is_due = self.step % self.config.checkpointing_steps == 0
        here = self.run_dir.checkpoint_path(self.step) if is_due else self.run_dir.last_dir
        is_there = self.checkpoint is not None and self.checkpoint.resolve() == here.resolve()
        if not is_there or self.checkpoint_step != self.step:
            self.save_checkpoint(here)
        with self.train_step.averaged():
            if self.config.find_scale and not interrupted:
                on_main(self.accelerator, self.find_scale)
            self.report.phase("exporting")
            proof = self.publisher.publish(self.step, self.max_train_steps, finished=not interrupted)
        self.report(AdapterExported(list(proof.files), proof.to_dict()))
        self.report(RunEnded("interrupted" if interrupted else "done", self.step))
        on_each(self.accelerator, self.report.raise_failure)
        return TrainResult(self.run_dir.path, self.step, interrupted, proof)


def could_be_in_bf16(accelerator: Accelerator) -> bool:
    """Whether a run in fp16 is on a GPU that has bf16."""
    return accelerator.mixed_precision == "fp16" and (accelerator.device.type != "cuda" or half_precision() == "bf16")
