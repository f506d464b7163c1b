"""The training loop: from a plan to a verified adapter. A run can be stopped and resumed at any
time.

train(config) -> TrainResult    `set_up` is what comes before the loop, `fit` is the loop,
                                `Training` has a method for each of its lines
training(config)                the same as a generator, for a caller that computes the gradients
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Protocol

import torch

from dreambooth_moslora.disk import events, queue, run_folder
from dreambooth_moslora.disk.atomic import remove_directory
from dreambooth_moslora.errors import StopRequestedError, UserError, is_out_of_memory
from dreambooth_moslora.generation.fixed_seeds import Sampler
from dreambooth_moslora.lora.proof import Proof
from dreambooth_moslora.photos import folder, photo_file
from dreambooth_moslora.plan import checks, distributed, memory
from dreambooth_moslora.plan.plan import Plan, make_plan, plan_steps
from dreambooth_moslora.precision import half_precision
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training import (
    checkpoint,
    explain,
    frozen_base,
    made_before,
    optimizer,
    reporter,
    results,
)
from dreambooth_moslora.training.prepare import prepare, too_slow_for_samples
from dreambooth_moslora.training.step import StepLosses, TrainStep

logger = logging.getLogger(__name__)

# Steps in a row that fp16 may skip; its scale has then fallen by a factor of a million
MOST_SKIPPED = 20
NO_SAMPLES = (
    "No sample images are drawn: on a CPU each takes minutes with a base of this size. "
    "--num_validation_images 4 draws them all the same."
)


class StepScorer(Protocol):
    """Scores at fixed seeds (`evaluation.during_training`), including the `best` step so far."""

    prompts: list[str]

    def __call__(self, sampler: Sampler, step: int) -> dict: ...

    def find_scale(
        self, sampler: Sampler, components: dict[str, torch.nn.Module]
    ) -> explain.ScaleChoice | None: ...


@dataclass(frozen=True)
class TrainResult:
    run_dir: Path
    step: int  # optimizer steps of the adapter there
    interrupted: bool
    proof: Proof | None  # how exactly its files load elsewhere


@dataclass
class Training:
    """A run that is set up. `checkpoint` is the newest that it wrote or resumed from,
    `checkpoint_step` its step. Its step began at `started`, so that `seconds` of the last steps
    count neither samples nor saving."""

    config: TrainConfig
    context: reporter.RunContext
    max_train_steps: int
    train_step: TrainStep
    samples: results.ValidationSamples
    sampler: Sampler
    publisher: results.Publisher
    evaluator: StepScorer | None
    checkpoint: Path | None
    best: explain.BestStep | None = None
    skipped_in_a_row: int = 0
    started: float = 0.0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=20))

    def __post_init__(self):
        self.run_dir, self.accelerator = self.context.run_dir, self.context.accelerator
        self.report, self.checkpoint_step = self.context.report, self.step

    @property
    def step(self) -> int:
        return self.train_step.step

    def accumulate_gradients(self) -> StepLosses:
        """Draw, predict, compare and differentiate a step's micro-batches.

        Until the first update a step that runs out of memory is done again with less, from the
        same draws. Raises the error where nothing is left, and in one of several processes, as the
        others would not know.
        """
        while True:
            self.started = time.monotonic()
            try:
                return self.train_step.accumulate_gradients()
            except Exception as error:
                may_change = self.step == 0 and self.accelerator.num_processes == 1
                if not may_change or not is_out_of_memory(error):
                    raise
                leaner = memory.leaner(self.config, self.train_step.inputs.family.facts)
                if leaner is None:
                    raise

            # Out of the block, where the error holds the step's tensors no more.
            reporter.free_unused_memory(self.accelerator.device)
            flag, settings = leaner
            logger.warning("the first step ran out of memory: it is done again with %s.", flag)
            self.go_on_as(replace(self.config, **settings))

    def go_on_as(self, config: TrainConfig) -> None:
        """Other settings from here on, in what the run computes and in what it says of itself."""
        self.train_step.go_on_as(config)
        self.config, self.publisher = config, replace(self.publisher, config=config)
        checkpoint.write_settings(config, self.run_dir)

    def check_finite(self, losses: StepLosses) -> None:
        """Raises UserError unless the loss is finite. Losses are shared, so all processes stop
        together."""
        if not math.isfinite(losses.total):
            raise self.diverged(f"the loss is {losses.total} at step {self.step + 1}")

    def diverged(self, what: str) -> UserError:
        on_gpu = self.accelerator.device.type != "cpu"
        has_bf16 = self.accelerator.mixed_precision == "fp16" and (
            not on_gpu or half_precision() == "bf16"
        )
        other = ", or use --mixed_precision bf16 instead of fp16" if has_bf16 else ""
        return UserError(
            f"{what}: lower --learning_rate{other}; checkpoints up to here are in {self.run_dir.path}"
        )

    def update_adapter(self, losses: StepLosses) -> bool:
        """Take an optimizer step; False when fp16 overflowed: it is repeated. Raises UserError if
        that stays."""
        attempted = self.step + 1
        grad_norm = self.train_step.update_adapter()
        skipped = not math.isfinite(grad_norm)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.seconds.append(time.monotonic() - self.started)
        done = events.StepDone(
            step=attempted,
            loss=losses.total,
            loss_instance=losses.instance,
            loss_prior=losses.prior,
            lr=self.train_step.learning_rate,
            grad_norm=None if skipped else grad_norm,
            step_sec=self.seconds[-1],
            eta_sec=median(self.seconds) * (self.max_train_steps - self.step),
            memory_gib=reporter.memory_gib(self.accelerator.device),
            skipped=skipped,
        )
        self.report(done)
        if skipped and (self.accelerator.scaler is None or self.skipped_in_a_row >= MOST_SKIPPED):
            raise self.diverged(f"the gradient is {grad_norm} at step {attempted}")
        return not skipped

    def sample_if_due(self) -> None:
        """Draw samples at step 0, every `validation_steps`, and at the end."""
        if self.samples.is_due(self.step, self.max_train_steps):
            self.sample()

    def sample(self) -> None:
        """Draw samples, at step 0 telling each denoising step."""
        self.report.phase("sampling", 0, 1)
        sampler = self.sampler
        if self.step == 0:
            total = (
                len(distributed.share_of(self.accelerator, self.samples.requests))
                * sampler.inference_steps
            )
            counts = self.report.counted("sampling", range(1, total + 1), total)
            sampler = replace(sampler, on_step=lambda: next(counts, None))
        # the loop checks for a stop next
        with suppress(StopRequestedError), self.train_step.averaged():
            self.report(self.samples.draw(self.step, sampler, self.accelerator))
        reporter.free_unused_memory(self.accelerator.device)

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
            reporter.free_unused_memory(self.accelerator.device)
        found = events.event_of({"type": events.StepEvaluated.kind, "step": self.step, **scores})
        self.report(found)
        self.note_scores(found)
        if self.best.step == self.step:
            with self.train_step.averaged():
                self.publisher.keep_best()

    def note_scores(self, found: events.StepEvaluated) -> None:
        self.best = self.publisher.best = explain.BestStep(**found.best)
        self.publisher.scores = found.scores
        if self.config.is_scored and (line := self.best.advice(self.config.early_stopping)):
            logger.warning("step %d: %s", found.step, line)

    def recall_scores(self) -> None:
        """Give a resumed run its earlier scores; score the step at which it was stopped if that is
        missing."""
        scored = self.run_dir.read_scores()
        if scored:
            self.note_scores(scored[-1])
        if self.is_scored_now and self.step not in (event.step for event in scored):
            self.evaluate()

    @property
    def has_stalled(self) -> bool:
        """Whether the score has not risen for as long as `--early_stopping` allows, the same in all
        processes."""
        patience, since = self.config.early_stopping, self.best.since if self.best else 0
        return bool(patience) and distributed.any_process(self.accelerator, since >= patience)

    @property
    def is_checkpoint_due(self) -> bool:
        return self.step % self.config.checkpointing_steps == 0

    def save_checkpoint(self, path: Path) -> None:
        """Write a checkpoint and remove an older `last`. Raises on all processes what the main one
        raises."""

        def write() -> None:
            step, scaler = self.train_step, self.accelerator.scaler
            position = replace(self.publisher.position, step=self.step)
            parts = (
                position,
                step.components,
                self.publisher.facts_now,
                step.optimizer.optimizer,
                scaler,
            )
            own = optimizer.copies(step.trained) if step.average is not None else None
            with step.averaged():
                checkpoint.save_checkpoint(
                    path, *parts, own, step.learnt.tokens if step.learnt else ()
                )
            if path != self.run_dir.last_dir and self.run_dir.last_dir.is_dir():
                remove_directory(self.run_dir.last_dir)
            self.run_dir.rotate(self.config.checkpoints_total_limit)
            self.report(events.CheckpointSaved(self.step, path.name))

        self.require_finite_adapter()
        distributed.on_main(self.accelerator, write)
        self.checkpoint, self.checkpoint_step = path, self.step

    def require_finite_adapter(self) -> None:
        """Raises UserError on all processes for NaN or infinity: black pictures can score well."""
        if not all(bool(torch.isfinite(weights).all()) for weights in self.train_step.trained):
            raise self.diverged(f"the adapter is not finite after step {self.step}")

    def find_scale(self) -> None:
        """Find the finished adapter's best scale for its header and card. A stop leaves it unknown."""
        if self.evaluator is None:
            return
        self.report.phase("evaluating")
        with suppress(StopRequestedError):
            if found := self.evaluator.find_scale(self.sampler, self.train_step.components):
                by_scale = {f"{scale:g}": score for scale, score in found.scores.items()}
                self.report(events.ScaleFound(found.best, found.low, found.high, by_scale))
                usable = (found.low, found.high)
                self.publisher.facts = replace(
                    self.publisher.facts, best_scale=found.best, usable_scales=usable
                )
                if self.best is not None and self.best.step == self.step:
                    self.publisher.keep_best()
        reporter.free_unused_memory(self.accelerator.device)

    def finish(self, interrupted: bool) -> TrainResult:
        """Write the adapter with its card, and a checkpoint: numbered as in diffusers' script, or
        `last`."""
        here = (
            self.run_dir.checkpoint_path(self.step)
            if self.is_checkpoint_due
            else self.run_dir.last_dir
        )
        is_there = self.checkpoint is not None and self.checkpoint.resolve() == here.resolve()
        if not is_there or self.checkpoint_step != self.step:
            self.save_checkpoint(here)
        with self.train_step.averaged():
            if self.config.find_scale and not interrupted:
                distributed.on_main(self.accelerator, self.find_scale)
            self.report.phase("exporting")
            proof = self.publisher.publish(finished=not interrupted)
        self.report(events.AdapterExported(list(proof.files), proof.to_dict()))
        self.report(events.RunEnded("interrupted" if interrupted else "done", self.step))
        distributed.on_each(self.accelerator, self.report.raise_failure)
        return TrainResult(self.run_dir.path, self.step, interrupted, proof)


def train(
    config: TrainConfig | Plan,
    on_event: Callable[[events.Event], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    evaluator: StepScorer | None = None,
) -> TrainResult:
    """Run `config`, or a plan made of it, to its end, or until `should_stop` says so. Every event
    is written to `metrics.jsonl` and passed to `on_event`; `evaluator(sampler, step)` returns
    scores. Raises UserError for a mistake in the settings or files, and for a loss that is no
    longer finite."""
    steps = training(config, on_event, should_stop, evaluator)
    try:
        run = next(steps)
        while True:
            run = advanced(steps, run.accumulate_gradients)
    except StopIteration as end:
        return end.value


Steps = Generator[Training, StepLosses, TrainResult]
"""A generator that trains a run: it yields the run before each step and is sent the step's losses.
"""


def advanced(steps: Steps, accumulate: Callable[[], StepLosses]) -> Training:
    """Send the gradients' losses to the run, and return it before its next step. Raises
    StopIteration at its end."""
    try:
        losses = accumulate()
    except BaseException as error:
        return steps.throw(error)
    return steps.send(losses)


def training(
    config: TrainConfig | Plan,
    on_event: Callable[[events.Event], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    evaluator: StepScorer | None = None,
    load: frozen_base.LoadBase | None = None,
) -> Steps:
    """`train` as a generator: the caller computes the gradients. `load` loads the base."""
    if isinstance(config, TrainConfig):
        checks.check_folders(config)
    plan = config if isinstance(config, Plan) else make_plan(config)
    run_dir = run_folder.RunDir(plan.config.output_dir)
    accelerator = distributed.make_accelerator(plan.config, run_dir)
    report = reporter.Reporter(run_dir, accelerator, on_event)
    context = reporter.RunContext(run_dir, accelerator, report, should_stop or (lambda: False))
    with ExitStack() as stack:
        stack.callback(report.end_trackers)
        distributed.on_main(accelerator, lambda: stack.enter_context(queue.locked(run_dir.path)))
        try:
            return (yield from fit(set_up(context, plan, evaluator, load)))
        except StopRequestedError:
            if report.step:  # a resumed run can continue from its untouched checkpoint
                report.release()
            report(events.RunEnded("interrupted", report.step, "stopped before the first step"))
            return TrainResult(run_dir.path, report.step, True, None)
        except Exception as error:
            with suppress(OSError):  # a full disk, for example, is already the error itself
                report(events.RunEnded("failed", report.step, str(error)))
            raise


def set_up(
    context: reporter.RunContext,
    plan: Plan,
    evaluator: StepScorer | None,
    load: frozen_base.LoadBase | None = None,
) -> Training:
    """Everything before the first step, such as class images. Raises UserError and
    StopRequestedError."""
    fresh = (
        None,
        checkpoint.Position(0, distributed.chosen_seed(plan.config.seed, context.accelerator)),
    )
    resumed_from, position = distributed.agreed(
        context.accelerator,
        lambda: checkpoint.resume_point(plan.config, context.run_dir) or fresh,
        lambda found: f"step {found[1].step} to go on from",
    )
    config, report, step = replace(plan.config, seed=position.seed), context.report, position.step
    folder.log_strays(plan.photo_report)
    photos = folder.usable_photos(plan.photo_report)
    # MPI: no WORLD_SIZE
    steps = plan_steps(config, photo_file.counts_of(photos), context.accelerator.num_processes)
    report.step = step
    distributed.on_main(
        context.accelerator,
        lambda: checkpoint.report_start(config, context, step, steps.total_steps),
    )
    made_before.make_captions(config, context, photos)
    made_before.make_masks(config, context, photos)
    photos = folder.with_made(config, photos)
    if line := folder.bare_prompt_line(config, photos):
        logger.info("%s", line)
    if context.accelerator.log_with:
        distributed.on_main(context.accelerator, lambda: report.start_trackers(config))
    samples = results.ValidationSamples.of(config, context.run_dir, steps.steps_an_epoch)
    prompts = [*samples.prompts, *(evaluator.prompts if evaluator and config.is_scored else ())]
    sample_count = steps.total_steps * steps.photos_a_step
    inputs = prepare(
        config, plan.base, context, photos, sample_count, prompts, resumed_from is None, load
    )
    distributed.on_each(
        context.accelerator, lambda: checkpoint.check_base(resumed_from, position, inputs.base)
    )
    if too_slow_for_samples(config, inputs.pipeline, context.accelerator.device):
        samples.requests, samples.contexts = [], []
        logger.warning(NO_SAMPLES)
    train_step = TrainStep(
        config, inputs, context.accelerator, steps.total_steps, resumed_from, step
    )
    settings = config.resolution, context.accelerator.device
    sampler = Sampler(inputs.pipeline, train_step.texts, *settings, should_stop=context.should_stop)
    parts = train_step, samples, sampler
    publisher = results.Publisher(
        config, context.run_dir, inputs, *parts, steps.total_steps, resumed_from
    )
    distributed.on_main(
        context.accelerator,
        lambda: checkpoint.claim_run_folder(config, context, step, resumed_from),
    )
    return Training(config, context, steps.total_steps, *parts, publisher, evaluator, resumed_from)


def fit(run: Training) -> Steps:
    """The loop. A step has five stages: draw, predict, compare, differentiate, update."""
    # A resumed run gets its earlier scores; a fresh one shows what the base draws.
    if run.step:
        distributed.on_main(run.accelerator, run.recall_scores)
    run.sample_if_due()

    while run.step < run.max_train_steps and not run.has_stalled:
        if run.context.stop_requested():
            if run.step == 0:  # the adapter would be the unchanged base
                raise StopRequestedError
            return run.finish(interrupted=True)

        # Draw, predict, compare, differentiate: `Training.accumulate_gradients` of this run, or of
        # several runs together.
        losses = yield run
        run.check_finite(losses)

        # Update. A step that fp16 skipped is repeated.
        if not run.update_adapter(losses):
            continue

        # Score, sample, save.
        if run.is_scored_now:
            run.require_finite_adapter()
            distributed.on_main(run.accelerator, run.evaluate)
        run.sample_if_due()
        if run.is_checkpoint_due:
            run.save_checkpoint(run.run_dir.checkpoint_path(run.step))

    # A run that stalled ends before `max_train_steps`, so its last samples are still to be drawn.
    if run.samples.requests and run.samples.latest_step != run.step:
        run.sample()
    return run.finish(interrupted=False)
