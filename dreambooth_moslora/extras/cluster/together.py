"""`python -m dreambooth_moslora together RUN_DIR… --at_once N`: several runs at once on one base.

They share one process. A fleet's worker starts it for a group. Each run folder has its
`job_config.json` and its fleet's record, which this process updates: running, then how the run
ended. At each step, a micro-batch of each run goes through the UNet together.

Everything else is as if the run were alone: seed, noise, photos, loss, optimizer, events,
checkpoints, pictures and publication. So a run can be resumed alone or with others. Only rounding
differs: a matrix product with more rows sums in another order.

waiting -> begun (alone: base, class images, encoding) -> steps, together -> ended

When one has ended, the next takes its place.
"""

import argparse
import copy
import logging
import socket
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import DiffusionPipeline

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.pipelines import denoiser_of
from dreambooth_moslora.cli import command_train, terminal
from dreambooth_moslora.disk import events, processes
from dreambooth_moslora.disk.contents import read_json
from dreambooth_moslora.errors import UserError, shortened, spelled_out
from dreambooth_moslora.extras.cluster import records, stacked_adapters
from dreambooth_moslora.plan.checks import check_folders
from dreambooth_moslora.plan.plan import Plan, make_plan
from dreambooth_moslora.settings import families, table
from dreambooth_moslora.training import frozen_base, loop
from dreambooth_moslora.training.micro_batch import MicroBatch, predicted_together
from dreambooth_moslora.training.step import StepLosses, TrainStep, numbers_of

T = TypeVar("T")


def together_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_dirs", metavar="RUN_DIR", nargs="+", help="run folders with their settings"
    )
    parser.add_argument(
        "--at_once", type=int, default=2, help="how many of them train at the same time"
    )
    parser.add_argument(
        "--share", type=float, default=1.0, help="GPUs or cores that the process holds"
    )


def run_together(args: argparse.Namespace) -> int:
    """Returns 130 when a run was stopped. Each run's record says how it ended."""
    folders = [Path(folder) for folder in args.run_dirs]
    costs = Costs(args.share)

    def note(member: "Member", result: loop.TrainResult | Exception) -> None:
        costs.ended(Path(member.plan.config.output_dir), result)

    with terminal.StopRequest() as stop:
        train_together(members(folders, stop, costs), args.at_once, note)
    found = [records.read_record(folder) for folder in folders]
    states = [record.state for record in found if record is not None]
    return terminal.INTERRUPTED if "interrupted" in states else 0


def members(
    folders: Sequence[Path], stop: terminal.StopRequest, costs: "Costs"
) -> Iterator["Member"]:
    """The runs one by one, as there is room. A faulty run is recorded as failed."""
    for folder in folders:
        if stop():
            records.ended(folder, "interrupted", "stopped before it began")
            continue
        # planning is a part of the run: it counts as its time, and is in its log
        costs.began(folder)
        try:
            config = table.TrainConfig.from_dict(read_json(folder / processes.CONFIG_NAME))
            check_folders(config)
            with logged_to(config):
                plan = make_plan(config)
                command_train.warn_about(plan)
        except Exception as error:
            costs.ended(folder, error)
        else:
            evaluator = command_train.make_evaluator if config.is_scored else lambda plan: None
            yield Member(
                plan=plan,
                should_stop=stop,
                make_evaluator=evaluator,
                within=partial(logged_to, config),
            )


@contextmanager
def logged_to(config: table.TrainConfig) -> Iterator[None]:
    """Log only to the run folder for the length of the block, since its events concern this run."""
    root = logging.getLogger()
    before = list(root.handlers)
    file_only = command_train.start_log(config)
    try:
        yield
    except UserError as error:
        file_only.error("%s", error)
        raise
    finally:
        for handler in set(root.handlers) - set(before):
            root.removeHandler(handler)
            handler.close()


def line_for(error: Exception) -> str:
    """The line for the user; for a bug, the log has the traceback."""
    if isinstance(error, UserError):
        return shortened(spelled_out(" ".join(str(error).split())))
    if (line := terminal.message_for_known_error(error)) is not None:
        return line
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


class Costs:
    """The records of the current runs, each with its share of the time.

    share: GPUs or cores that the process holds
    """

    def __init__(self, share: float):
        self.share = share
        self._since = time.monotonic()  # until when the time is divided
        self._seconds: dict[Path, float] = {}

    def began(self, folder: Path) -> None:
        """Write the start of a run into its record."""
        self._divide()
        self._seconds[folder] = 0.0
        record = records.read_record(folder) or records.Record("running")
        begun = replace(
            record,
            state="running",
            message="",
            starts=record.starts + 1,
            machine=socket.gethostname(),
        )
        records.write_record(folder, begun)

    def ended(self, folder: Path, result: loop.TrainResult | Exception) -> None:
        """Write the end of a run into its record, and add what it has cost."""
        self._divide()
        # how it ended
        message = ""
        if isinstance(result, Exception):
            state = "failed"
            message = line_for(result)
        else:
            state = "interrupted" if result.interrupted else "done"

        # its share of the process's time, beside that of earlier trainings
        spent_sec = self._seconds.pop(folder)
        record = records.read_record(folder) or records.Record(state)
        record = replace(
            record,
            state=state,
            message=message,
            seconds=record.seconds + spent_sec,
            hours=record.hours + spent_sec / 3600 * self.share,
        )
        records.write_record(folder, record)

    def _divide(self) -> None:
        """Give each run that is under way its part of the time since the last call."""
        now = time.monotonic()
        for folder in self._seconds:
            self._seconds[folder] += (now - self._since) / len(self._seconds)
        self._since = now


class SharedBase:
    """Replaces `load_base`: the UNet stays on the device; encoders and VAE are lent to one run
    after the other."""

    _pipeline: DiffusionPipeline | None = None

    def __call__(
        self, config: table.TrainConfig, base: Base, dtype: torch.dtype, device: torch.device
    ) -> DiffusionPipeline:
        """The pipeline of one run. Its adapter and the components it removes do not affect other
        runs."""
        # load it for the first run
        if self._pipeline is None:
            pipeline = frozen_base.load_base(config, base, dtype, device)
            denoiser_of(pipeline).to(device)
            self._pipeline = pipeline

        # each run has its own denoiser to put an adapter on, which shares the base's tensors
        own = copy.copy(self._pipeline)
        name = families.facts_of(type(own).__name__).denoiser
        denoiser = stacked_adapters.twin(denoiser_of(self._pipeline))
        scheduler = copy.deepcopy(self._pipeline.scheduler)
        own.register_modules(**{name: denoiser}, scheduler=scheduler)
        return own

    def rest(self) -> None:
        """Move the text encoders and the VAE off the device, until a run moves them back."""
        if self._pipeline is not None:
            for name in ("vae", *families.facts_of(type(self._pipeline).__name__).encoders):
                getattr(self._pipeline, name).to("cpu")


@dataclass(frozen=True)
class Member:
    """A run to train.

    plan: of the run
    on_event, should_stop: callbacks, as `loop.train` takes them
    make_evaluator: called with the plan when the run begins; None as evaluator scores nothing
    within: makes the context in which the run does whatever it does alone; it may redirect the log
    """

    plan: Plan
    on_event: Callable[[events.Event], None] | None = None
    should_stop: Callable[[], bool] | None = None
    make_evaluator: Callable[[Plan], loop.StepScorer | None] = lambda plan: None
    within: Callable[[], AbstractContextManager] = nullcontext


@dataclass
class Course:
    """A member in training: `steps` advances `run` to its next step."""

    member: Member
    steps: loop.Steps
    run: loop.Training


def train_together(
    members: Iterable[Member],
    most: int,
    on_end: Callable[[Member, loop.TrainResult | Exception], None],
) -> None:
    """Train all `members`, at most `most` at once; when one ends, the next begins. They must have
    the same `shared_settings`. `on_end` is called with each member and its result or error."""
    base = SharedBase()
    waiting = iter(members)
    under_way: list[Course] = []

    def going(member: Member, action: Callable[..., T], *arguments: object) -> T | None:
        """What `action` returns, done within the member; None when the run has ended by it."""
        try:
            with member.within():
                return action(*arguments)
        except StopIteration as end:
            on_end(member, end.value)
        except Exception as error:
            on_end(member, error)

    try:
        while True:
            # fill the free places
            while len(under_way) < most:
                member = next(waiting, None)
                if member is None:
                    break
                course = going(member, begun, member, base)
                if course is not None:
                    under_way.append(course)
                base.rest()
            if not under_way:
                return

            # one step of all; those that end by it leave
            outcomes = losses_of([course.run for course in under_way])
            for course, outcome in zip(under_way, outcomes, strict=True):
                course.run = going(course.member, loop.advanced, course.steps, outcome)
            under_way = [course for course in under_way if course.run is not None]
    finally:
        stacked.cache_clear()
        for course in under_way:
            course.steps.close()


def begun(member: Member, base: SharedBase) -> Course:
    """Everything before a member's first step, alone."""
    # a compiled graph would depend on the number of runs
    plan = replace(member.plan, config=replace(member.plan.config, compile="off"))
    steps = loop.training(
        plan,
        on_event=member.on_event,
        should_stop=member.should_stop,
        evaluator=member.make_evaluator(plan),
        load=base,
    )
    return Course(member, steps, next(steps))


def losses_of(runs: Sequence[loop.Training]) -> list[Callable[[], StepLosses]]:
    """For each run, a function that returns its losses or raises; an error in the common pass ends
    all."""
    # draw for each run; one alone computes as it would without the others
    found: dict[int, StepLosses | Exception] = {}
    ready: list[loop.Training] = []
    drawn: list[list[MicroBatch]] = []
    for run in runs if len(runs) > 1 else ():
        try:
            drawn.append(draw(run))
            ready.append(run)
        except Exception as error:
            found[id(run)] = error

    # the common pass of those that have drawn
    if len(ready) > 1:
        try:
            losses = accumulate_together([run.train_step for run in ready], drawn)
            found |= zip(map(id, ready), losses)
        except Exception as error:
            found |= dict.fromkeys(map(id, ready), error)
    else:
        stacked.cache_clear()  # so that ended runs leave memory

    # what each has to say, told within the run
    outcomes = []
    for run in runs:
        is_known = id(run) in found
        outcomes.append(partial(told, found[id(run)]) if is_known else run.accumulate_gradients)
    return outcomes


def draw(run: loop.Training) -> list[MicroBatch]:
    """The micro-batches of its next step."""
    run.started = time.monotonic()
    step = run.train_step
    step.begin()
    turns = range(step.config.gradient_accumulation_steps)
    return [step.micro_batch(step.number_of(turn)) for turn in turns]


def told(found: StepLosses | Exception) -> StepLosses:
    """Returns losses, and raises an error."""
    if isinstance(found, Exception):
        raise found
    return found


@lru_cache(maxsize=1)
def stacked(*unets: torch.nn.Module) -> stacked_adapters.StackedAdapters:
    """Collected again when the runs in training change."""
    return stacked_adapters.StackedAdapters(unets)


def accumulate_together(
    steps: Sequence[TrainStep], drawn: Sequence[Sequence[MicroBatch]]
) -> list[StepLosses]:
    """Accumulate each run's gradients of its next step, from equally many micro-batches `drawn`."""
    first = steps[0]  # its denoiser computes for all
    turns = list(zip(*drawn, strict=True))  # a turn has a micro-batch of each run
    found = []
    with stacked(*(step.inputs.denoiser for step in steps)).for_one_step() as copies:
        for micros in turns:
            # what the base alone answers, where it is the prior
            answers = [None] * len(steps)
            if first.base_is_prior:
                prior_rows = [step.prior_rows(micro) for step, micro in zip(steps, micros)]
                answers = predicted_together(first.base_prediction, prior_rows)

            # predict for all in one pass, and compare for each
            of_each = predicted_together(first.predict, [micro.rows for micro in micros])
            parts = []
            for step, micro, prediction, answer in zip(
                steps, micros, of_each, answers, strict=True
            ):
                parts.append(step.loss_of(micro, prediction, answer))

            # differentiate the sum: each adapter is in one summand only
            scaled_losses = []
            for step, part in zip(steps, parts):
                scaled_losses.append(scaled(step, part.total / len(turns)))
            sum(scaled_losses).backward()
            copies.collect()
            found.append([numbers_of(part) for part in parts])

    # of each run, the mean over its turns
    of_runs = zip(*found, strict=True)
    return [step.mean_of(list(own)) for step, own in zip(steps, of_runs, strict=True)]


def scaled(step: TrainStep, loss: torch.Tensor) -> torch.Tensor:
    """The loss times the scale by which fp16's gradients do not vanish."""
    scaler: torch.amp.GradScaler | None = step.accelerator.scaler
    return loss if scaler is None else scaler.scale(loss)
