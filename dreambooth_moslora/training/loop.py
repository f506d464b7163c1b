"""The training loop: from a photo folder to a verified adapter. A run can be stopped and resumed at any time.

train(config) -> TrainResult        `set_up` is what comes before the loop, `fit` is the loop;
                                    `run` holds what the loop calls, `publish` what a run leaves
training(config)                    the same as a generator, for a caller that computes the gradients
(`together`)
"""

import logging
from collections.abc import Callable, Generator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from dreambooth_moslora.core.config.train_config import TrainConfig, is_scored
from dreambooth_moslora.core.errors import StopRequestedError, one_line
from dreambooth_moslora.core.run_files.events import Event, RunEnded
from dreambooth_moslora.core.run_files.run_folder import RunDir
from dreambooth_moslora.generation.fixed_seeds import Sampler
from dreambooth_moslora.photos.folder import instance_photos, usable_photos
from dreambooth_moslora.photos.photo import counts_of
from dreambooth_moslora.training.accelerator import chosen_seed, make_accelerator
from dreambooth_moslora.training.checkpoint import Position
from dreambooth_moslora.training.frozen_base import LoadBase
from dreambooth_moslora.training.inputs.caption_orders import bare_prompt_line
from dreambooth_moslora.training.inputs.run_captions import captioned_photos
from dreambooth_moslora.training.inputs.run_masks import masked_photos
from dreambooth_moslora.training.planning.checks import check_folders
from dreambooth_moslora.training.planning.common_settings import same_config
from dreambooth_moslora.training.planning.memory_plan import planned
from dreambooth_moslora.training.planning.step_plan import plan_steps
from dreambooth_moslora.training.prepare import prepare, too_slow_for_samples
from dreambooth_moslora.training.processes import agreed, on_main
from dreambooth_moslora.training.reporter import Reporter
from dreambooth_moslora.training.results.publish import Publisher
from dreambooth_moslora.training.results.samples import ValidationSamples
from dreambooth_moslora.training.resumption import resume_point
from dreambooth_moslora.training.run import StepScorer, Training, TrainResult
from dreambooth_moslora.training.run_context import RunContext
from dreambooth_moslora.training.run_folders.earlier_runs import claim_run_folder, report_start
from dreambooth_moslora.training.run_folders.run_lock import locked
from dreambooth_moslora.training.step.train_step import StepLosses, TrainStep

__all__ = ["Steps", "TrainResult", "advanced", "train", "training"]

logger = logging.getLogger(__name__)

NO_SAMPLES = (
    "No sample images are drawn: on a CPU each takes minutes with a base of this size. "
    "--num_validation_images 4 draws them all the same."
)


def train(
    config: TrainConfig,
    on_event: Callable[[Event], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    evaluator: StepScorer | None = None,
) -> TrainResult:
    """Run `config` to its end, or until `should_stop` says so between two steps.

    Every event is written to the run folder's `metrics.jsonl` and passed to `on_event`. `evaluator(sampler,
    step)` returns scores. Raises UserError for a mistake in the settings or files, and for a loss that is no
    longer finite.
    """
    steps = training(config, on_event, should_stop, evaluator)
    try:
        run = next(steps)
        while True:
            run = advanced(steps, run.accumulate_gradients)
    except StopIteration as end:
        return end.value


Steps = Generator[Training, StepLosses, TrainResult]
"""A generator that trains a run: it yields the run before each step and is sent the step's losses."""


def advanced(steps: Steps, accumulate: Callable[[], StepLosses]) -> Training:
    """Compute the gradients by `accumulate`, send them to the run, and return it before its next step. An error
    is raised inside the run. Raises StopIteration with the result at the run's end."""
    try:
        losses = accumulate()
    except BaseException as error:
        return steps.throw(error)
    return steps.send(losses)


def training(
    config: TrainConfig,
    on_event: Callable[[Event], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    evaluator: StepScorer | None = None,
    load: LoadBase | None = None,
) -> Steps:
    """`train` as a generator: the caller computes the gradients. `load` loads the base."""
    check_folders(config)
    config = same_config(planned(same_config(config)))
    run_dir = RunDir(config.output_dir)
    accelerator = make_accelerator(config, run_dir)
    report = Reporter(run_dir, accelerator, on_event)
    context = RunContext(config, run_dir, accelerator, report, should_stop or (lambda: False))
    with ExitStack() as stack:
        stack.callback(end_trackers, accelerator)
        on_main(accelerator, lambda: stack.enter_context(locked(run_dir.path)))
        try:
            return (yield from fit(set_up(context, evaluator, load)))
        except StopRequestedError:
            if report.step:  # a resumed run can continue from its untouched checkpoint
                report.release()
            report(RunEnded("interrupted", report.step, "stopped before a step"))
            return TrainResult(run_dir.path, report.step, True, None)
        except Exception as error:
            with suppress(OSError):  # a full disk, for example, is already the error itself
                report(RunEnded("failed", report.step, str(error)))
            raise


def set_up(context: RunContext, evaluator: StepScorer | None, load: LoadBase | None = None) -> Training:
    """Everything before the first step; drawing class images may take hours. `load` loads the base.

    Raises UserError, and StopRequestedError when a stop is requested.
    """
    context, checkpoint, step = find_start(context)
    config, report = context.config, context.report
    photos = usable_photos(instance_photos(config))
    plan = plan_steps(config, counts_of(photos), context.accelerator.num_processes)
    report.step = step
    on_main(context.accelerator, lambda: report_start(context, step, plan.total_steps))
    photos = masked_photos(context, captioned_photos(context, photos))
    if line := bare_prompt_line(config, photos):
        logger.info("%s", line)
    report.trackers.start(config)
    samples = ValidationSamples.of(config, context.run_dir, plan.steps_an_epoch)
    prompts = [*samples.prompts, *(evaluator.prompts if evaluator and is_scored(config) else ())]
    inputs = prepare(context, photos, plan.total_steps * plan.photos_a_step, prompts, checkpoint is None, load)
    if too_slow_for_samples(config, inputs.pipeline, context.accelerator.device):
        samples.leave_out()
        logger.warning(NO_SAMPLES)
    train_step = TrainStep(config, inputs, context.accelerator, plan.total_steps, checkpoint, step)
    sampler = Sampler(
        inputs.pipeline,
        train_step.text_cond,
        config.resolution,
        context.accelerator.device,
        should_stop=context.should_stop,
    )
    publisher = Publisher(config, context.run_dir, inputs, train_step, samples, sampler, plan.total_steps, checkpoint)
    on_main(context.accelerator, lambda: claim_run_folder(context, step, checkpoint))
    return Training(context, plan.total_steps, train_step, samples, sampler, publisher, evaluator, checkpoint)


def fit(run: Training) -> Steps:
    """The loop, as a checklist."""
    run.recall_scores()
    run.sample_if_due()
    while run.step < run.max_train_steps:
        if run.stop_requested():
            run.require_a_step()
            return run.finish(interrupted=True)
        losses = yield run
        run.check_finite(losses)
        if not run.update_adapter(losses):
            continue
        run.evaluate_if_due()
        run.sample_if_due()
        run.checkpoint_if_due()
        if run.has_stalled():
            break
    return run.finish(interrupted=False)


def find_start(context: RunContext) -> tuple[RunContext, Path | None, int]:
    """The context with the seed of the run, the checkpoint to go on from (None: a fresh run), and its step: the same on
    all processes, or a UserError."""
    fresh = None, Position(0, chosen_seed(context.config, context.accelerator))

    def start() -> tuple[Path | None, Position]:
        return resume_point(context.config, context.run_dir) or fresh

    checkpoint, position = agreed(context.accelerator, start, lambda found: f"step {found[1].step} to go on from")
    return replace(context, config=replace(context.config, seed=position.seed)), checkpoint, position.step


def end_trackers(accelerator: Accelerator) -> None:
    """End the trackers. Their errors are only logged, so that they do not hide the run's result or error."""
    try:
        accelerator.end_training()
    except Exception as error:  # each tracker raises its own errors
        logger.warning("--report_to: ending it failed: %s", one_line(f"{type(error).__name__} {error}"))
