"""`python -m dreambooth_moslora together RUN_DIR… --at_once N`: several runs at once on one base in
one process.

A fleet's worker starts it for a group. Each run folder has its `job_config.json` and its fleet's
record, which this process updates: running, then how the run ended. At each step, a micro-batch of
each run goes through the UNet together.

Everything else is as if the run were alone: seed, noise, photos, loss, optimizer, events,
checkpoints, pictures and publication. So a run can be resumed alone or with others. Only rounding
differs: a matrix product with more rows sums in another order.

waiting -> begun (alone: base, class images, encoding) -> steps, together -> ended; the next takes
the place
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
from dreambooth_moslora.method.fast_linear import lay_together
from dreambooth_moslora.plan.checks import check_folders
from dreambooth_moslora.plan.plan import Plan, make_plan
from dreambooth_moslora.settings import families, table
from dreambooth_moslora.training import adapters, frozen_base, loop
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
    folders, costs = [Path(folder) for folder in args.run_dirs], Costs(args.share)

    def note(member: "Member", result: loop.TrainResult | Exception) -> None:
        costs.ended(Path(member.plan.config.output_dir), result)

    with terminal.StopRequest() as stop:
        train_together(members(folders, stop, costs), args.at_once, note)
    states = [
        record.state for folder in folders if (record := records.read_record(folder)) is not None
    ]
    return terminal.INTERRUPTED if "interrupted" in states else 0


def members(
    folders: Sequence[Path], stop: terminal.StopRequest, costs: "Costs"
) -> Iterator["Member"]:
    """The runs one by one, as there is room. A faulty run is recorded as failed."""
    for folder in folders:
        if stop():
            records.ended(folder, "interrupted", "stopped before it began")
            continue
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
            yield Member(plan, None, stop, evaluator, partial(logged_to, config))


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
    """The records of the current runs, each with its share of the time."""

    def __init__(self, share: float):
        self.share, self._since = share, time.monotonic()
        self._seconds: dict[Path, float] = {}

    def began(self, folder: Path) -> None:
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
        self._divide()
        if isinstance(result, Exception):
            state, message = "failed", line_for(result)
        else:
            state, message = "interrupted" if result.interrupted else "done", ""
        spent, record = (
            self._seconds.pop(folder),
            records.read_record(folder) or records.Record(state),
        )
        costs = {
            "seconds": record.seconds + spent,
            "hours": record.hours + spent / 3600 * self.share,
        }
        records.write_record(folder, replace(record, state=state, message=message, **costs))

    def _divide(self) -> None:
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
        if self._pipeline is None:
            pipeline = frozen_base.load_base(config, base, dtype, device)
            denoiser = denoiser_of(pipeline).to(device)
            facts = families.facts_of(type(pipeline).__name__)
            if device.type != "cpu":
                lay_together(denoiser, adapters.target_paths(config, facts.denoiser, denoiser))
            self._pipeline = pipeline
        own = copy.copy(self._pipeline)
        name, scheduler = (
            families.facts_of(type(own).__name__).denoiser,
            copy.deepcopy(self._pipeline.scheduler),
        )
        own.register_modules(
            **{name: stacked_adapters.twin(denoiser_of(self._pipeline))}, scheduler=scheduler
        )
        return own

    def rest(self) -> None:
        """Move the text encoders and the VAE off the device, until a run moves them back."""
        if self._pipeline is not None:
            for name in ("vae", *families.facts_of(type(self._pipeline).__name__).encoders):
                getattr(self._pipeline, name).to("cpu")


@dataclass(frozen=True)
class Member:
    """A run to train: its plan, its callbacks, and a function that makes its evaluator when it
    begins. Whatever the run does alone happens inside the context manager `within`, which may
    redirect its log."""

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
    base, waiting, under_way = SharedBase(), iter(members), []

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
            while len(under_way) < most and (member := next(waiting, None)) is not None:
                if (course := going(member, begun, member, base)) is not None:
                    under_way.append(course)
                base.rest()
            if not under_way:
                return
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
        plan, member.on_event, member.should_stop, member.make_evaluator(plan), base
    )
    return Course(member, steps, next(steps))


def losses_of(runs: Sequence[loop.Training]) -> list[Callable[[], StepLosses]]:
    """For each run, a function that returns its losses or raises; an error in the common pass ends
    all."""
    found: dict[int, StepLosses | Exception] = {}
    ready, drawn = [], []
    for run in runs if len(runs) > 1 else ():
        try:
            drawn.append(draw(run))
            ready.append(run)
        except Exception as error:
            found[id(run)] = error
    if len(ready) > 1:
        try:
            found |= zip(
                map(id, ready), accumulate_together([run.train_step for run in ready], drawn)
            )
        except Exception as error:
            found |= dict.fromkeys(map(id, ready), error)
    else:
        stacked.cache_clear()  # so that ended runs leave memory
    return [
        partial(told, found[id(run)]) if id(run) in found else run.accumulate_gradients
        for run in runs
    ]


def draw(run: loop.Training) -> list[MicroBatch]:
    run.started = time.monotonic()
    step = run.train_step
    step.begin()
    return [
        step.micro_batch(step.number_of(turn))
        for turn in range(step.config.gradient_accumulation_steps)
    ]


def told(found: StepLosses | Exception) -> StepLosses:
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
    first, turns, found = steps[0], list(zip(*drawn, strict=True)), []
    with stacked(*(step.inputs.denoiser for step in steps)).for_one_step() as copies:
        for micros in turns:
            answers = [None] * len(steps)
            if first.base_is_prior:
                answers = predicted_together(
                    first.base_prediction, [s.prior_rows(m) for s, m in zip(steps, micros)]
                )
            of_each = predicted_together(first.predict, [micro.rows for micro in micros])
            parts = [
                step.loss_of(*own)
                for step, *own in zip(steps, micros, of_each, answers, strict=True)
            ]
            sum(
                scaled(step, part.total / len(turns)) for step, part in zip(steps, parts)
            ).backward()
            copies.collect()
            found.append([numbers_of(part) for part in parts])
    return [
        step.mean_of(list(numbers))
        for step, numbers in zip(steps, zip(*found, strict=True), strict=True)
    ]


def scaled(step: TrainStep, loss: torch.Tensor) -> torch.Tensor:
    scaler: torch.amp.GradScaler | None = step.accelerator.scaler
    return loss if scaler is None else scaler.scale(loss)
