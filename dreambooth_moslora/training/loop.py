"""Training loop: from a plan to a verified adapter. A run can be stopped and resumed at any time.

train(config) -> TrainResult    `set_up_training` is what comes before the loop, `fit` is the loop,
                                `Training` has a method for each of its lines
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch

from dreambooth_moslora.base import devices
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.disk import events, queue, run_folder
from dreambooth_moslora.disk.atomic import remove_directory
from dreambooth_moslora.errors import (
    StopRequestedError,
    UserError,
    escape_control_characters,
)
from dreambooth_moslora.generation.sampling import Sampler, SampleRequest
from dreambooth_moslora.lora.verify import Proof
from dreambooth_moslora.photos import caption_variants, folder, photo_file, synthetic
from dreambooth_moslora.photos.quality import find_photo_faults, log_faults
from dreambooth_moslora.plan import distributed, validation
from dreambooth_moslora.plan.plan import RunPlan, make_plan
from dreambooth_moslora.plan.steps import plan_steps
from dreambooth_moslora.precision import FP16_OVERFLOW_ADVICE
from dreambooth_moslora.settings.setting_names import name_arguments_in_errors
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training import (
    checkpoint,
    class_images,
    optimizer,
    publish,
    reporter,
)
from dreambooth_moslora.training.best_step import BestStep, find_best_step
from dreambooth_moslora.training.prepare import prepare_inputs
from dreambooth_moslora.training.samples import ValidationSamples
from dreambooth_moslora.training.step import TrainStep

logger = logging.getLogger(__name__)

MAX_SKIPPED_STEPS = 20
"""Steps in a row that fp16 may skip; its scale has then fallen by a factor of a million."""


class StepScorer(Protocol):
    """Scores the adapter along the way, as `evaluation.during_training` does.

    prompts: those that the sampler will be asked for
    """

    prompts: list[str]

    def __call__(self, sampler: Sampler, step: int) -> events.StepEvaluated | Mapping[str, Any]:
        """Return the scores of a step. Of a mapping each number is one; what else it may have is
        named as the event's fields. Without a `best` it is found by the highest `score`."""


@dataclass(frozen=True)
class TrainResult:
    """End of a run.

    run_dir: its folder
    step: optimizer steps of the adapter there
    interrupted: whether it was stopped before its end
    proof: how exactly its files load elsewhere; None for a run that published none
    """

    run_dir: Path
    step: int
    interrupted: bool
    proof: Proof | None


@dataclass
class Training:
    """Run that is set up.

    context: its folder, its processes and its reporter
    max_train_steps: optimizer steps of the whole run
    evaluator: scores the adapter; None without scores
    checkpoint: the newest that it wrote or resumed from; `checkpoint_step` is its step
    best: the best step so far, if any was scored
    consecutive_skips: steps that fp16 skipped since the last good one
    started: when the present step began, by the monotonic clock
    seconds: of the last steps, without samples and saving
    """

    context: reporter.RunContext
    max_train_steps: int
    train_step: TrainStep
    samples: ValidationSamples
    sampler: Sampler
    publisher: publish.Publisher
    evaluator: StepScorer | None
    checkpoint: Path | None = None
    best: BestStep | None = None
    consecutive_skips: int = 0
    started: float = 0.0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=20))

    def __post_init__(self):
        self.run_dir = self.context.run_dir
        self.accelerator = self.context.accelerator
        self.report = self.context.report
        self.checkpoint_step = self.step

    @property
    def step(self) -> int:
        return self.train_step.step

    @property
    def config(self) -> TrainConfig:
        """Settings, which change if the first step runs out of memory."""
        return self.train_step.config

    def build_divergence_error(self, problem: str) -> UserError:
        """Return the error of numbers that are no longer finite."""
        is_fp16 = self.accelerator.mixed_precision == "fp16"
        alternative = f", or give {FP16_OVERFLOW_ADVICE}" if is_fp16 else ""
        return UserError(
            f"{problem}: lower --learning_rate{alternative}; "
            f"checkpoints up to here are in {self.run_dir.path}"
        )

    def update_and_report(self, losses: torch.Tensor) -> bool:
        """Take an optimizer step. Returns False when fp16 overflowed, so that the step is repeated.

        losses: (3,), of `TrainStep.accumulate_gradients`

        Raises UserError when every step overflows, for a loss that is not finite, and for such a
        gradient otherwise.
        """
        # The update raises `step`, unless fp16 skips it.
        attempted = self.step + 1
        update = self.train_step.update_adapter(losses)

        # Known only now, as reading it waits for a GPU: the update is lost with the run. Losses are
        # shared, so all processes stop together.
        if not math.isfinite(update.total):
            raise self.build_divergence_error(f"the loss is {update.total} at step {attempted}")
        skipped = not math.isfinite(update.grad_norm)
        self.consecutive_skips = self.consecutive_skips + 1 if skipped else 0
        self.seconds.append(time.monotonic() - self.started)

        # A skipped step is reported too: its time is spent, and its number comes again.
        done = events.StepDone(
            step=attempted,
            loss=update.total,
            loss_instance=update.instance,
            loss_prior=update.prior,
            lr=self.train_step.learning_rate,
            grad_norm=None if skipped else update.grad_norm,
            step_sec=self.seconds[-1],
            eta_sec=median(self.seconds) * (self.max_train_steps - self.step),
            memory_gib=devices.measure_peak_gib(self.accelerator.device),
            skipped=skipped,
        )
        self.report(done)

        # Without a scaler nothing is skipped on purpose. With one, its scale has fallen enough.
        if skipped and (
            self.accelerator.scaler is None or self.consecutive_skips >= MAX_SKIPPED_STEPS
        ):
            raise self.build_divergence_error(
                f"the gradient is {update.grad_norm} at step {attempted}"
            )
        return not skipped

    def sample_when_due(self) -> None:
        """Draw samples at step 0, every `validation_steps`, and at the end."""
        if self.samples.should_sample(self.step, self.max_train_steps):
            self.sample()

    def sample(self) -> None:
        """Draw samples, and report each denoising step."""
        self.report.report_phase("sampling", 0, 1)
        sampler = self.count_sampling(self.samples.requests)

        # A stop ends the drawing alone; the loop asks for it next.
        with suppress(StopRequestedError), self.train_step.apply_average():
            self.report(self.samples.sample_images(self.step, sampler, self.accelerator))
        devices.free_unused_memory(self.accelerator.device)

    def count_denoising_steps(self, phase: str, total: int) -> Sampler:
        """Return the sampler, which then reports each denoising step as a count of the phase."""
        counts = self.report.report_counts(phase, range(1, total + 1), total)
        return replace(self.sampler, on_step=lambda: next(counts, None))

    def count_sampling(self, requests: Sequence[SampleRequest]) -> Sampler:
        """Return the sampler for this process's share of the requests, with counts."""
        share = distributed.select_share(self.accelerator, requests)
        total = len(share) * self.sampler.inference_steps
        return self.count_denoising_steps("sampling", total)

    @property
    def should_score(self) -> bool:
        """True for a step that `--evaluate_steps` names."""
        every = self.config.evaluate_steps
        return self.evaluator is not None and bool(every) and self.step % every == 0

    def evaluate(self) -> None:
        """Score this step, on the main process, and keep the adapter if it is the best so far."""
        self.report.report_phase("evaluating")
        sampler = self.sampler

        # A program's evaluator need not know how much it generates.
        count_steps = getattr(self.evaluator, "count_denoising_steps", None)
        if count_steps is not None:
            sampler = self.count_denoising_steps("evaluating", count_steps())
        try:
            with self.train_step.apply_average():
                evaluation = self.evaluator(sampler, self.step)
        except StopRequestedError:  # the loop checks for a stop next
            return
        finally:
            devices.free_unused_memory(self.accelerator.device)

        # If the best step so far is this one, its adapter is kept.
        if isinstance(evaluation, Mapping):
            record = {"type": events.StepEvaluated.kind, "step": self.step, **evaluation}
            evaluation = events.parse_record(record)
        if evaluation.best is None:
            evaluation = replace(evaluation, best=self.find_best(evaluation))
        self.report(evaluation)
        self.note_scores(evaluation)
        if self.best and self.best.step == self.step:
            with self.train_step.apply_average():
                self.publisher.keep_best()

    def find_best(self, last: events.StepEvaluated) -> events.Best | None:
        """Return the best of the run's evaluations up to `last`; None where none has a `score`. A
        resumed run may know later ones."""
        earlier = [event for event in self.run_dir.read_scores() if event.step < last.step]
        scores = {
            event.step: event.scores["score"]
            for event in [*earlier, last]
            if "score" in event.scores
        }
        return asdict(find_best_step(sorted(scores.items()))) if scores else None

    def note_scores(self, evaluation: events.StepEvaluated) -> None:
        """Keep the scores for the card, and say it when they have stopped rising."""
        self.publisher.scores = evaluation.scores
        if evaluation.best is None:
            return
        self.best = BestStep(**evaluation.best)
        self.publisher.best = self.best
        line = self.best.describe_stall() if self.config.is_scored else None
        if line:
            logger.warning("step %d: %s", evaluation.step, line)

    def recall_scores(self) -> None:
        """Give a resumed run its earlier scores; score the step at which it was stopped if that is
        missing."""
        scored = self.run_dir.read_scores()
        if scored:
            self.note_scores(scored[-1])
        if self.should_score and self.step not in (event.step for event in scored):
            self.evaluate()

    @property
    def should_save_checkpoint(self) -> bool:
        return self.step % self.config.checkpointing_steps == 0

    def save_checkpoint(self, path: Path) -> None:
        """Write a checkpoint and remove an older `last`. Raises on all processes what the main one
        raises."""

        def write() -> None:
            # With an average, the adapter's file holds it, and the weights get their own file.
            step = self.train_step
            weights = optimizer.clone_weights(step.parameters) if step.average is not None else None
            with step.apply_average():
                checkpoint.save_checkpoint(
                    path,
                    position=self.publisher.position,
                    components=step.components,
                    facts=self.publisher.facts,
                    optimizer=step.optimizer.optimizer,
                    scaler=self.accelerator.scaler,
                    weights=weights,
                )

            # Older ones go only when the new one is whole.
            if path != self.run_dir.last_dir and self.run_dir.last_dir.is_dir():
                remove_directory(self.run_dir.last_dir)
            self.run_dir.rotate_checkpoints(self.config.checkpoints_total_limit)
            self.report(events.CheckpointSaved(self.step, path.name))

        self.require_finite_adapter()
        distributed.run_on_main(self.accelerator, write)
        self.checkpoint, self.checkpoint_step = path, self.step

    def require_finite_adapter(self) -> None:
        """Raise UserError on all processes for NaN or infinity: black images can score well."""
        if not all(bool(torch.isfinite(weights).all()) for weights in self.train_step.parameters):
            raise self.build_divergence_error(f"the adapter is not finite after step {self.step}")

    def finish(self, interrupted: bool) -> TrainResult:
        """Write the adapter with its card, and a checkpoint: numbered as in diffusers' script, or
        `last`."""
        # The last checkpoint, unless it was written at this very step.
        checkpoint_path = self.run_dir.last_dir
        if self.should_save_checkpoint:
            checkpoint_path = self.run_dir.get_checkpoint_path(self.step)
        is_there = (
            self.checkpoint is not None and self.checkpoint.resolve() == checkpoint_path.resolve()
        )
        if not is_there or self.checkpoint_step != self.step:
            self.save_checkpoint(checkpoint_path)

        # The adapter's files. All processes take part: they draw the card's new contexts.
        with self.train_step.apply_average():
            self.report.report_phase("exporting")
            sampler = self.count_sampling(self.samples.contexts)
            proof = self.publisher.publish(sampler, finished=not interrupted)

        # Say it last, so that a run that is told to be done has all its files.
        self.report(events.AdapterExported(list(proof.files), proof.to_dict()))
        self.report(events.RunEnded("interrupted" if interrupted else "done", self.step))
        distributed.run_on_each(self.accelerator, self.report.raise_failure)
        return TrainResult(
            run_dir=self.run_dir.path,
            step=self.step,
            interrupted=interrupted,
            proof=proof,
        )


def train(
    config: TrainConfig | RunPlan,
    on_event: Callable[[events.Event], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    evaluator: StepScorer | None = None,
) -> TrainResult:
    """Run a training to its end, or until it is asked to stop.

    config: the settings, or a plan made of them
    on_event: gets every event that is written to `metrics.jsonl`
    should_stop: whether this process was asked to stop
    evaluator: scores the adapter at its steps: called with a sampler and the step, it returns a
        StepEvaluated or numbers by name. The highest `score` makes the best step

    Raises UserError for a mistake in the settings or files, and for a loss that is no longer
    finite.
    """
    # A program gives settings. Folders are checked here because a plan can be made without them.
    if isinstance(config, TrainConfig):
        with name_arguments_in_errors():
            validation.check_folders(config)
            return train(make_plan(config), on_event, should_stop, evaluator)
    plan = config

    # What every part of the run shares.
    run_dir = run_folder.RunDir(plan.config.output_dir)
    accelerator = distributed.make_accelerator(plan.config, run_dir)
    report = reporter.Reporter(run_dir, accelerator, on_event)
    context = reporter.RunContext(
        run_dir=run_dir,
        accelerator=accelerator,
        report=report,
        should_stop=should_stop or (lambda: False),
    )

    with ExitStack() as stack:
        # Nobody else trains in this folder until the end.
        stack.callback(report.end_trackers)
        distributed.run_on_main(
            accelerator, lambda: stack.enter_context(queue.lock_folder(run_dir.path))
        )

        # However it ends, the log says how.
        try:
            return run_training_loop(set_up_training(context, plan, evaluator))
        except StopRequestedError:
            if report.step:  # a resumed run can continue from its untouched checkpoint
                report.write_pending()
            report(events.RunEnded("interrupted", report.step, "stopped before the first step"))
            return TrainResult(run_dir=run_dir.path, step=report.step, interrupted=True, proof=None)
        except Exception as error:
            with suppress(OSError):  # a full disk, for example, is already the error itself
                report(events.RunEnded("failed", report.step, str(error)))
            raise


def set_up_training(
    context: reporter.RunContext, plan: RunPlan, evaluator: StepScorer | None
) -> Training:
    """Everything before the first step.

    context: the run's folder, processes and reporter
    plan: its settings, base and photos
    evaluator: scores the adapter; None without scores

    Raises UserError and StopRequestedError.
    """
    # Where it begins, and how long it is. Under MPI the plan did not know the processes.
    photo_digests = distributed.run_on_main(
        context.accelerator, lambda: folder.hash_files(plan.photo_report)
    )
    config, resumed_from, position = find_start(context, plan, photo_digests)
    folder.log_strays(plan.photo_report)
    photos = folder.list_usable_photos(plan.photo_report)
    counts = photo_file.count_photos(photos)
    steps = plan_steps(config, counts, context.accelerator.num_processes)
    start_reporting(config, context, plan, position.step, steps.total_steps)

    # The photos with what they lack, then the base with all that its encoders give. Samples and
    # scores are asked for their prompts before the encoders leave memory.
    photos = make_captions_and_masks(config, context, photos)
    samples = ValidationSamples.from_config(config, context.run_dir, steps.steps_per_epoch)
    scored = evaluator.prompts if evaluator and config.is_scored else []
    inputs = prepare_inputs(
        config,
        plan.base,
        context,
        photos,
        sample_count=steps.total_steps * steps.photos_per_step,
        prompts=[*samples.prompts, *scored],
        is_fresh=resumed_from is None,
    )
    replaced = distributed.run_on_each(
        context.accelerator,
        lambda: checkpoint.compare_bases(config, resumed_from, position, inputs.base_identity),
    )
    log_changes(context, resumed_from, replaced)

    # What trains, draws and publishes the adapter.
    train_step = TrainStep(
        config,
        inputs,
        context.accelerator,
        max_train_steps=steps.total_steps,
        checkpoint=resumed_from,
        step=position.step,
        on_new_settings=lambda config: checkpoint.write_settings(config, context.run_dir),
    )
    run = build_training(
        context,
        train_step,
        samples,
        evaluator,
        max_train_steps=steps.total_steps,
        photo_digests=photo_digests,
    )
    run.checkpoint = resumed_from

    # Last, when nothing can fail any more: only now an earlier run in the folder is moved away.
    distributed.run_on_main(
        context.accelerator,
        lambda: checkpoint.claim_run_folder(config, context, position.step, resumed_from),
    )
    return run


def find_start(
    context: reporter.RunContext, plan: RunPlan, photo_digests: dict[str, str]
) -> tuple[TrainConfig, Path | None, checkpoint.Position]:
    """Find where the run begins: at a checkpoint with its seed, or at step 0 with a seed that all
    processes share. Logs a line for each setting and photo that differs from the checkpoint's.

    Returns the settings with that seed, the checkpoint, which is None for a fresh run, and its
    position. Raises UserError for a checkpoint that cannot go on.
    """
    seed = distributed.choose_seed(plan.config.seed, context.accelerator)
    fresh = (None, checkpoint.Position(step=0, seed=seed))
    resumed_from, position = distributed.require_agreement(
        context.accelerator,
        lambda: checkpoint.find_resume_point(plan.config, context.run_dir) or fresh,
        lambda resume_point: f"step {resume_point[1].step} to go on from",
    )
    if resumed_from is not None:
        changes = checkpoint.list_changes(position, plan.config, photo_digests)
        log_changes(context, resumed_from, changes)
    return replace(plan.config, seed=position.seed), resumed_from, position


def log_changes(
    context: reporter.RunContext, resumed_from: Path | None, changes: list[str]
) -> None:
    """Log in a line each, on the main process, what a run has otherwise than its checkpoint."""
    if context.accelerator.is_main_process:
        for line in changes:
            logger.warning("%s", escape_control_characters(f"{line} (since {resumed_from.name})"))


def start_reporting(
    config: TrainConfig, context: reporter.RunContext, plan: RunPlan, step: int, total_steps: int
) -> None:
    """Report the start, say what is wrong with the photos, and open the trackers: one that does not
    open ends the run before the base is loaded. Raises UserError."""
    context.report.step = step
    distributed.run_on_main(
        context.accelerator, lambda: checkpoint.report_start(config, context, step, total_steps)
    )
    if step == 0 and context.accelerator.is_main_process:
        log_faults(find_photo_faults(plan.photo_report, config.resolution))
    if context.accelerator.log_with:
        distributed.run_on_main(context.accelerator, lambda: context.report.start_trackers(config))


def make_captions_and_masks(
    config: TrainConfig, context: reporter.RunContext, photos: list[photo_file.Photo]
) -> list[photo_file.Photo]:
    """Return the photos with the captions and masks that they lacked. The models that make them
    leave memory before the base is loaded. Raises UserError and StopRequestedError."""
    class_images.make_captions(config, context, photos)
    class_images.make_masks(config, context, photos)
    photos_with_sidecars = folder.add_saved_sidecars(config, photos)
    if line := caption_variants.describe_bare_prompts(config, photos_with_sidecars):
        logger.info("%s", line)
    for line in synthetic.describe_synthetic(photos_with_sidecars, config.synthetic_weight):
        logger.info("%s", line)
    return photos_with_sidecars


def build_training(
    context: reporter.RunContext,
    train_step: TrainStep,
    samples: ValidationSamples,
    evaluator: StepScorer | None,
    max_train_steps: int,
    photo_digests: dict[str, str],
) -> Training:
    """Build the run, with its sampler and the publisher of the adapter that `train_step` trains."""
    # Pictures are drawn by the adapter as it is at that step.
    sampler = Sampler(
        pipeline=train_step.inputs.pipeline,
        embed=train_step.encode_prompts,
        resolution_px=train_step.config.resolution,
        device=context.accelerator.device,
        should_stop=context.should_stop,
        guidance_scale=Base.of(train_step.config).guidance,
    )
    publisher = publish.Publisher(
        run_dir=context.run_dir,
        train_step=train_step,
        samples=samples,
        max_train_steps=max_train_steps,
        photo_digests=photo_digests,
    )
    return Training(
        context=context,
        max_train_steps=max_train_steps,
        train_step=train_step,
        samples=samples,
        sampler=sampler,
        publisher=publisher,
        evaluator=evaluator,
    )


def run_training_loop(run: Training) -> TrainResult:
    """Train to the last step. A step has five stages: batch, prediction, loss, backward, update."""
    # A resumed run gets its earlier scores; a fresh one shows what the base draws.
    if run.step:
        distributed.run_on_main(run.accelerator, run.recall_scores)
    run.sample_when_due()

    while run.step < run.max_train_steps:
        if run.context.is_stop_requested():
            if run.step == 0:  # the adapter would be the unchanged base
                raise StopRequestedError
            return run.finish(interrupted=True)

        # Draw, predict, compare, differentiate.
        run.started = time.monotonic()
        losses = run.train_step.accumulate_gradients()

        # Update. A step that fp16 skipped is repeated.
        if not run.update_and_report(losses):
            continue

        # Score, sample, save.
        if run.should_score:
            run.require_finite_adapter()
            distributed.run_on_main(run.accelerator, run.evaluate)
        run.sample_when_due()
        if run.should_save_checkpoint:
            run.save_checkpoint(run.run_dir.get_checkpoint_path(run.step))

    return run.finish(interrupted=False)
