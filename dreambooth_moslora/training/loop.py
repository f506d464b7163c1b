"""The training loop: a photo folder becomes a proved adapter, and any moment of it can be stopped and resumed.

train(config) -> TrainResult        see `fit` for the loop, `prepare` for what comes before it,
                                    `train_step` for one step, `publish` for what it leaves
"""

import logging
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator

from dreambooth_moslora.adapters.proof import Proof
from dreambooth_moslora.core.config import TrainConfig
from dreambooth_moslora.core.errors import StopRequestedError, UserError, one_line
from dreambooth_moslora.core.run_folder import RunDir
from dreambooth_moslora.generation.sampler import Sampler
from dreambooth_moslora.photos.folder import instance_photos
from dreambooth_moslora.training.accelerator import any_process, chosen_seed, make_accelerator
from dreambooth_moslora.training.best_step import BestStep
from dreambooth_moslora.training.checkpoint import Position, resume_point, save_checkpoint
from dreambooth_moslora.training.checks import check_folders
from dreambooth_moslora.training.earlier_runs import claim_run_folder, report_start
from dreambooth_moslora.training.events import Reporter, Stopwatch, memory_gib
from dreambooth_moslora.training.optimizer import optimizer_kind
from dreambooth_moslora.training.prepare import prepare, usable_photos
from dreambooth_moslora.training.publish import Publisher
from dreambooth_moslora.training.samples import ValidationSamples
from dreambooth_moslora.training.step_plan import plan_steps
from dreambooth_moslora.training.train_step import StepLosses, TrainStep

__all__ = ["TrainResult", "train"]

logger = logging.getLogger(__name__)


class Evaluator(Protocol):
    """Scores at fixed seeds (`training_evaluator`): the facts of the `evaluation` event, `best` step among them."""

    prompts: list[str]

    def __call__(self, sampler: Sampler, step: int) -> dict: ...


@dataclass(frozen=True)
class TrainResult:
    """`step` optimizer steps are in the adapter of `run_dir`; `proof` says how exactly its files load elsewhere."""

    run_dir: Path
    step: int
    interrupted: bool
    proof: Proof | None


def train(
    config: TrainConfig,
    on_event: Callable[[dict], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    evaluator: Evaluator | None = None,
) -> TrainResult:
    """Run `config` to its end, or to the first step after `should_stop` says so.

    Every event goes to the run folder's `metrics.jsonl` and to `on_event`. `evaluator(sampler, step)` gives scores.
    Raises UserError for a person's mistake, and for a loss that is no longer finite.
    """
    check_folders(config)
    run_dir = RunDir(config.output_dir)
    accelerator = make_accelerator(config, run_dir)
    report = Reporter(run_dir, accelerator, on_event)
    try:
        return fit(Training(config, run_dir, accelerator, report, should_stop or (lambda: False), evaluator))
    except StopRequestedError:
        if report.step:  # the checkpoint is as it was, and the run goes on from it another time
            report.release()
        report("end", state="interrupted", step=report.step, message="stopped before a step")
        return TrainResult(run_dir.path, report.step, True, None)
    except Exception as error:
        with suppress(OSError):  # a full disk, for one, is said by the error itself
            report("end", state="failed", step=report.step, message=str(error))
        raise
    finally:
        end_trackers(accelerator)


def end_trackers(accelerator: Accelerator) -> None:
    """The run has ended, well or with its own error: a tracker's trouble after that hides neither."""
    try:
        accelerator.end_training()
    except Exception as error:  # each tracker has its own kinds
        logger.warning("--report_to: ending it failed: %s", one_line(f"{type(error).__name__} {error}"))


def fit(run: "Training") -> TrainResult:
    """The loop, as a checklist."""
    run.recall_scores()
    run.sample_if_due()
    while run.step < run.max_train_steps:
        if run.stop_requested():
            run.require_a_step()
            return run.finish(interrupted=True)
        losses = run.accumulate_gradients()
        run.check_finite(losses)
        run.update_adapter(losses)
        run.evaluate_if_due()
        run.sample_if_due()
        run.checkpoint_if_due()
        if run.has_stalled():
            break
    return run.finish(interrupted=False)


class Training:
    """A run: what `fit` checks off. Preparing is in `prepare`, one step in `train_step`."""

    def __init__(
        self,
        config: TrainConfig,
        run_dir: RunDir,
        accelerator: Accelerator,
        report: Reporter,
        should_stop: Callable[[], bool],
        evaluator: Evaluator | None,
    ):
        self.run_dir, self.accelerator, self.report = run_dir, accelerator, report
        self.should_stop, self.evaluator = should_stop, evaluator
        fresh = None, Position(0, chosen_seed(config, accelerator))
        self.checkpoint, position = resume_point(config, run_dir) or fresh
        self.config = config = replace(config, seed=position.seed)
        photos = usable_photos(instance_photos(config))
        plan = plan_steps(config, len(photos), accelerator.num_processes)
        self.max_train_steps = plan.total_steps
        report_start(config, run_dir, report, position.step, self.max_train_steps)
        report.start_trackers(config)
        self.samples = ValidationSamples.of(config, run_dir, plan.steps_an_epoch)
        prompts = [*self.samples.prompts, *(evaluator.prompts if evaluator and config.evaluate_steps else ())]
        sample_count = plan.total_steps * plan.photos_a_step
        inputs = prepare(config, photos, sample_count, prompts, accelerator, run_dir, report, should_stop)
        self.train_step = TrainStep(config, inputs, accelerator, self.max_train_steps, self.checkpoint, position.step)
        self.sampler = Sampler(
            inputs.pipeline, self.train_step.text_cond, config.resolution, accelerator.device, should_stop=should_stop
        )
        self.publisher = Publisher(config, run_dir, inputs, self.train_step, self.samples, self.sampler)
        claim_run_folder(config, run_dir, report, position.step, self.checkpoint)
        self.stopwatch = Stopwatch()
        self.best: BestStep | None = None

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.train_step.step

    def accumulate_gradients(self) -> StepLosses:
        self.stopwatch.restart()
        return self.train_step.accumulate_gradients()

    def check_finite(self, losses: StepLosses) -> None:
        """A loss that is NaN on one process is NaN on all, so all stop here together."""
        if not math.isfinite(losses.total):
            raise self.diverged(f"the loss is {losses.total} at step {self.step + 1}")

    def diverged(self, what: str) -> UserError:
        return UserError(
            f"{what}: lower --learning_rate, or use --mixed_precision bf16 instead of fp16; checkpoints up to here are "
            f"in {self.run_dir.path}"
        )

    def update_adapter(self, losses: StepLosses) -> None:
        grad_norm = self.train_step.update_adapter()
        seconds, eta = self.stopwatch.lap(self.max_train_steps - self.step)
        self.report(
            "step",
            step=self.step,
            loss=losses.total,
            loss_instance=losses.instance,
            loss_prior=losses.prior,
            lr=self.train_step.learning_rate,
            grad_norm=grad_norm,
            step_sec=seconds,
            eta_sec=eta,
            memory_gib=memory_gib(self.accelerator.device),
        )

    def sample_if_due(self) -> None:
        """At step 0, every `validation_steps`, and at the end: the same prompts and seeds each time."""
        if not self.accelerator.is_main_process or not self.samples.is_due(self.step, self.max_train_steps):
            return
        self.report.phase("sampling", 0, 1)
        with suppress(StopRequestedError):  # the loop asks next
            files = self.samples.draw(self.step, self.sampler)
            self.report("sample", step=self.step, **files)

    def evaluate_if_due(self) -> None:
        every = self.config.evaluate_steps
        if self.evaluator is None or not every or self.step % every or not self.accelerator.is_main_process:
            return
        self.report.phase("evaluating")
        try:
            facts = self.evaluator(self.sampler, self.step)
        except StopRequestedError:  # the loop asks next
            return
        self.report("evaluation", step=self.step, **facts)
        self.best = BestStep(**facts["best"])
        self.publisher.note_scores(facts, self.best)
        if self.best.step == self.step:
            self.publisher.keep_best()
        if line := self.best.advice(self.config.early_stopping):
            logger.warning("step %d: %s", self.step, line)

    def recall_scores(self) -> None:
        """A run that goes on has its scores in its card; one that was stopped while it scored a step does so now."""
        scored = [event for event in self.run_dir.read_metrics() if event["type"] == "evaluation"] if self.step else []
        if scored:
            self.publisher.note_scores(scored[-1], BestStep(**scored[-1]["best"]))
        if self.step and self.step not in (event["step"] for event in scored):
            self.evaluate_if_due()

    def has_stalled(self) -> bool:
        """Whether early stopping was asked for and is due."""
        patience = self.config.early_stopping
        stalled = patience is not None and self.best is not None and self.best.should_stop(patience)
        return patience is not None and any_process(self.accelerator, stalled)

    def checkpoint_if_due(self) -> None:
        if self.step % self.config.checkpointing_steps == 0:
            self.save_checkpoint()

    def save_checkpoint(self) -> None:
        """Nothing is written of an adapter from which no run could go on: all processes, which have the same, end."""
        if not all(bool(torch.isfinite(weights).all()) for weights in self.train_step.parameters):
            raise self.diverged(f"the adapter is not finite after step {self.step}")
        if not self.accelerator.is_main_process:
            return
        path = self.run_dir.checkpoint_path(self.step)
        position = Position(self.step, self.config.seed, optimizer_kind(self.config))
        optimizer, scaler = self.train_step.optimizer.optimizer, self.accelerator.scaler
        save_checkpoint(path, position, self.train_step.components, self.publisher.facts, optimizer, scaler)
        self.checkpoint = path
        self.run_dir.rotate(self.config.checkpoints_total_limit)
        self.report("checkpoint", step=self.step, path=path.name)

    def stop_requested(self) -> bool:
        """Whether any process was told to stop: all leave after the same step."""
        return any_process(self.accelerator, self.should_stop())

    def require_a_step(self) -> None:
        """A run that is stopped before its first step leaves no adapter: it would be the base."""
        if self.step == 0:
            raise StopRequestedError

    def finish(self, interrupted: bool) -> TrainResult:
        """Leave a loadable adapter with its card, and a checkpoint, which has the raw adapter, to go on from."""
        here = self.run_dir.checkpoint_path(self.step)
        if self.checkpoint is None or self.checkpoint.resolve() != here.resolve():  # a name alone may be another run's
            self.save_checkpoint()
        proof = None
        if self.accelerator.is_main_process:
            self.report.phase("exporting")
            proof = self.publisher.publish(self.step, self.max_train_steps, finished=not interrupted)
            self.report("export", files=list(proof.files), proof=proof.to_dict())
            self.report("end", state="interrupted" if interrupted else "done", step=self.step, message="")
        self.accelerator.wait_for_everyone()
        return TrainResult(self.run_dir.path, self.step, interrupted, proof)
