"""Several runs at once on one base in one process.

One base in memory for several runs: each gets a pipeline whose UNet has its own modules and shared weights.

Trains several runs at once on one base in one process: at each step, a micro-batch of each run goes through
the UNet together.

Everything else is as if the run were alone: seed, noise, photos, loss, optimizer, events, checkpoints, pictures
and publication. So a run can be resumed alone or with others. Only rounding differs: a matrix product with more
rows sums in another order.

    waiting -> begun (alone: base, class images, encoding) -> steps, together -> ended; the next takes the place
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from dreambooth_moslora.adapters.fast_linear import lay_together
from dreambooth_moslora.disk.events import Event
from dreambooth_moslora.extras.cluster.stacked_adapters import StackedAdapters, twin
from dreambooth_moslora.plan.plan import Plan
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.adapters import target_paths
from dreambooth_moslora.training.encoder import LoadBase, load_base
from dreambooth_moslora.training.loop import Steps, StepScorer, Training, TrainResult, advanced, training
from dreambooth_moslora.training.objective import LossParts
from dreambooth_moslora.training.step import MicroBatch, StepLosses, TrainStep, UNetRows, numbers_of


class SharedBase:
    """Replaces `frozen_base.load_base` for runs with the same base, precision and layers.

    The UNet stays on the device. Text encoders and VAE are lent to one run after the other.
    """

    def __init__(self, load: LoadBase = load_base):
        self._load = load
        self._pipeline: StableDiffusionXLPipeline | None = None

    def __call__(self, config: TrainConfig, dtype: torch.dtype, device: torch.device) -> StableDiffusionXLPipeline:
        """The pipeline of one run. Its adapter and the components it removes do not affect other runs."""
        if self._pipeline is None:
            pipeline = self._load(config, dtype, device)
            pipeline.unet.to(device)
            if device.type != "cpu":
                lay_together(pipeline.unet, target_paths(config, "unet", pipeline.unet))
            self._pipeline = pipeline
        own = copy.copy(self._pipeline)
        own.register_modules(unet=twin(self._pipeline.unet), scheduler=copy.deepcopy(self._pipeline.scheduler))
        return own

    def rest(self) -> None:
        """Move the text encoders and the VAE off the device, until a run moves them back."""
        if self._pipeline is not None:
            for part in (self._pipeline.text_encoder, self._pipeline.text_encoder_2, self._pipeline.vae):
                part.to("cpu")


@dataclass(frozen=True)
class Member:
    """A run to train: its plan, its callbacks, and a function that makes its evaluator when it begins.

    Whatever the run does alone happens inside the context manager `within`, which may redirect its log, for
    example.
    """

    plan: Plan
    on_event: Callable[[Event], None] | None = None
    should_stop: Callable[[], bool] | None = None
    make_evaluator: Callable[[Plan], StepScorer | None] = lambda plan: None
    within: Callable[[], AbstractContextManager] = nullcontext


@dataclass
class Course:
    """A member in training: `steps` advances `run` to its next step."""

    member: Member
    steps: Steps
    run: Training


def train_together(
    members: Iterable[Member],
    most: int,
    on_end: Callable[[Member, TrainResult | Exception], None],
) -> None:
    """Train all `members`, at most `most` at once. When one ends or fails, the next begins.

    They must have the same `shared_settings`, and none may need to be alone (`extras.cluster.sizing`). `on_end` is
    called with each member and its result or error.
    """
    base, waiting, under_way = SharedBase(), iter(members), []
    stack = Stack()
    try:
        while True:
            while len(under_way) < most and (member := next(waiting, None)) is not None:
                begin(member, base, under_way, on_end)
            if not under_way:
                return
            under_way = advance(under_way, stack, on_end)
    finally:
        for course in under_way:
            course.steps.close()


def begin(member: Member, base: SharedBase, under_way: list[Course], on_end: Callable) -> None:
    """Do everything before a member's first step, alone."""
    config = replace(member.plan.config, compile="off")  # a compiled graph would depend on the number of runs
    try:
        with member.within():
            plan = replace(member.plan, config=config)
            evaluator = member.make_evaluator(plan)
            steps = training(plan, member.on_event, member.should_stop, evaluator, base)
            under_way.append(Course(member, steps, next(steps)))
    except StopIteration as end:
        on_end(member, end.value)
    except Exception as error:
        on_end(member, error)
    base.rest()


def advance(under_way: list[Course], stack: "Stack", on_end: Callable) -> list[Course]:
    """Do one step of each run; returns the runs that continue."""
    outcomes = losses_of([course.run for course in under_way], stack)
    going = []
    for course, outcome in zip(under_way, outcomes, strict=True):
        try:
            with course.member.within():
                course.run = advanced(course.steps, outcome)
            going.append(course)
        except StopIteration as end:
            on_end(course.member, end.value)
        except Exception as error:
            on_end(course.member, error)
    return going


def losses_of(runs: Sequence[Training], stack: "Stack") -> list[Callable[[], StepLosses]]:
    """For each run, a function that returns its losses or raises. An error while drawing a run's micro-batch
    ends that run only; an error in the common pass ends all runs."""
    outcomes: dict[int, Callable[[], StepLosses]] = {}
    drawn: list[tuple[Training, list[MicroBatch]]] = []
    for run in runs if len(runs) > 1 else ():
        try:
            drawn.append((run, draw(run)))
        except Exception as error:
            outcomes[id(run)] = raising(error)
    ready = [run for run, _ in drawn]
    if len(ready) > 1:
        try:
            found = accumulate_together(
                [run.train_step for run in ready], [micros for _, micros in drawn], stack.of(ready)
            )
            outcomes |= {id(run): partial(given, losses) for run, losses in zip(ready, found, strict=True)}
        except Exception as error:
            outcomes |= dict.fromkeys(map(id, ready), raising(error))
    else:
        stack.forget()
    return [outcomes.get(id(run), run.accumulate_gradients) for run in runs]


def draw(run: Training) -> list[MicroBatch]:
    """The micro-batches of the run's next step."""
    run.stopwatch.restart()
    step = run.train_step
    step.begin()
    return [step.micro_batch(step.number_of(turn)) for turn in range(step.config.gradient_accumulation_steps)]


def given(losses: StepLosses) -> StepLosses:
    return losses


def raising(error: Exception) -> Callable[[], StepLosses]:
    def fail() -> StepLosses:
        raise error

    return fail


class Stack:
    """The adapters of the runs in training, collected again when the runs change."""

    def __init__(self):
        self._runs: list[Training] = []
        self._adapters: StackedAdapters | None = None

    def of(self, runs: Sequence[Training]) -> StackedAdapters:
        if self._adapters is None or self._runs != list(runs):
            self._runs = list(runs)
            self._adapters = StackedAdapters([run.train_step.components["unet"] for run in runs])
        return self._adapters

    def forget(self) -> None:
        """Drop the runs, so that ended ones leave memory."""
        self._runs, self._adapters = [], None


def accumulate_together(
    steps: Sequence[TrainStep], drawn: Sequence[Sequence[MicroBatch]], adapters: StackedAdapters
) -> list[StepLosses]:
    """Accumulate the gradients of each run's next step. `drawn` are its micro-batches, equally many for each run."""
    turns, found = list(zip(*drawn, strict=True)), []
    with adapters.for_one_step() as copies:
        for micros in turns:
            parts = losses_together(steps, micros)
            pairs = zip(steps, parts, strict=True)
            sum(scaled(step, part.total / len(turns)) for step, part in pairs).backward()
            copies.collect()
            found.append([numbers_of(part) for part in parts])
    return [step.mean_of(list(numbers)) for step, numbers in zip(steps, zip(*found, strict=True), strict=True)]


def losses_together(steps: Sequence[TrainStep], micros: Sequence[MicroBatch]) -> list[LossParts]:
    """Each run's loss, of its own rows."""
    first, answers = steps[0], [None] * len(steps)
    if first.base_is_prior:
        answers = predictions(first.base_prediction, [s.prior_rows(m) for s, m in zip(steps, micros, strict=True)])
    found = predictions(first.predict, [micro.rows for micro in micros])
    return [step.loss_of(*own) for step, *own in zip(steps, micros, found, answers, strict=True)]


def predictions(predict: Callable[[UNetRows], Tensor], parts: Sequence[UNetRows]) -> list[Tensor]:
    return list(predict(UNetRows.joined(parts)).split([len(part.time_ids) for part in parts]))


def scaled(step: TrainStep, loss: Tensor) -> Tensor:
    """The loss times its run's own fp16 scale."""
    scaler: torch.amp.GradScaler | None = step.accelerator.scaler
    return loss if scaler is None else scaler.scale(loss)
