"""Share work and results between the processes of a run, and end them together.

A process that raised alone would leave the others waiting. So each reports to the others how its
part of the work ended. `make_accelerator` joins them and sets the precision.
"""

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta
from random import SystemRandom
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState, utils
from accelerate.state import AcceleratorState
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from dreambooth_moslora.base.devices import check_bf16, is_variable_true
from dreambooth_moslora.disk import processes, run_folder
from dreambooth_moslora.disk.atomic import clean_temporaries
from dreambooth_moslora.errors import StopRequestedError, UserError, format_error, is_out_of_memory
from dreambooth_moslora.settings.train_config import TrainConfig

PROCESS_TIMEOUT = timedelta(days=7)
"""For other processes: class images and pictures can take hours."""
SHARDING_MODES = ("FSDP", "DeepSpeed", "Megatron-LM")
"""What accelerate may be set to, and adapters do not need."""
PRECISION_DTYPES = {
    "no": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}
"""The precisions of accelerate that a run can have."""

Item = TypeVar("Item")
Result = TypeVar("Result")
Processes = Accelerator | PartialState
"""Of a run, or of one that has no precision yet."""


def reduce_any(accelerator: Accelerator, vote: bool) -> bool:
    """Return whether `vote` is true on any process. All must call it, and all get the same
    answer."""
    if accelerator.num_processes == 1:
        return vote
    votes = torch.tensor(float(vote), device=accelerator.device)
    with detect_lost_process():
        return bool(accelerator.reduce(votes, "sum") > 0)


def reduce_mean(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """Return the mean of the processes' `values`, of one shape. All must call it. Raises UserError
    when a process has ended."""
    if accelerator.num_processes == 1:
        return values
    with detect_lost_process():
        return accelerator.reduce(values, "mean")


def run_on_main(accelerator: Processes, work: Callable[[], Result]) -> Result:
    """Run `work` on the main process; all get its small, picklable result, or its error or stop."""
    is_main = accelerator.is_main_process
    result, error = call_safely(work) if is_main else (None, None)
    results = gather_results(accelerator, [result] if is_main else [], error)
    return result if is_main else results[0]


def run_on_each(accelerator: Processes, work: Callable[[], Result]) -> Result:
    """Run `work` on each process, which gets its own result. An error or stop of one is raised on
    all."""
    result, error = call_safely(work)
    gather_results(accelerator, [], error)
    return result


def share_work(
    accelerator: Accelerator,
    items: Sequence[Item],
    work: Callable[[Sequence[Item]], Generator[Result, None, None]],
) -> Iterator[Result]:
    """Yield the results of `items`, equal in all processes, in their order; of n processes each
    works on every n-th.

    `work` yields one picklable result for each of its items. An error or stop of one process is
    raised on all after an item.
    """
    with closing(work(select_share(accelerator, items))) as local_results:
        for first in range(0, len(items), accelerator.num_processes):
            has_item = first + accelerator.process_index < len(items)
            result, error = call_safely(lambda: next(local_results)) if has_item else (None, None)
            yield from gather_results(accelerator, [result] if has_item else [], error)


def select_share(accelerator: Accelerator, items: Sequence[Item]) -> Sequence[Item]:
    """Return the items of this process in `share_work`."""
    return items[accelerator.process_index :: accelerator.num_processes]


def require_agreement(
    accelerator: Processes,
    find: Callable[[], Result],
    format_result: Callable[[Result], str],
    remedy: str = (
        "the photos, --class_data_dir and --output_dir must be on a disk that all machines share."
    ),
) -> Result:
    """Return each process's result of `find`, where the results of all have the same text.

    accelerator: of the process
    find: the work of each process, such as reading the photos
    format_result: lines that are equal where the results are
    remedy: advice for the user

    Raises UserError on all where the text of one process differs from the main process's, with the
    lines that differ. An error of `find` is raised on all too.
    """
    if accelerator.num_processes == 1:
        return find()

    # Processes tell their words, which are small; what they found stays with each.
    result, error = call_safely(find)
    texts = gather_results(accelerator, [] if error else [format_result(result)], error)
    for number, text in enumerate(texts):
        if text != texts[0]:
            theirs = format_extra_lines(texts[0], text)
            ours = format_extra_lines(text, texts[0])
            raise UserError(f"process {number} has {theirs}, and the main process {ours}: {remedy}")
    return result


def format_extra_lines(reference: str, text: str) -> str:
    """Return the lines of `text` that are not in `reference`, as one."""
    return ", ".join(line for line in text.splitlines() if line not in reference.splitlines())


def call_safely(work: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    """Return the result of `work`, or its error."""
    try:
        return work(), None
    except Exception as error:
        return None, error


def gather_results(
    accelerator: Processes, local_results: list[Result], error: Exception | None
) -> list[Result]:
    """Return the results of all processes, in their order. The `error` of one is raised on all; an
    error takes precedence over a stop."""
    # Each tells its results, and how it ended: whether by a stop, and in which words.
    is_stop = isinstance(error, StopRequestedError)
    ending = None
    if error is not None:
        ending = (is_stop, str(error) or type(error).__name__)
    reports = [(local_results, ending)]
    if accelerator.num_processes > 1:
        with detect_lost_process():
            reports = utils.gather_object(reports)

    endings = [
        (process, ending_text)
        for process, (_, ending_text) in enumerate(reports)
        if ending_text is not None
    ]
    if not endings:
        return [result for results, _ in reports for result in results]

    # All end by the first error, or by a stop if there is no error. The process whose own it is
    # raises it with its traceback.
    process, (all_stop, text) = min(endings, key=lambda ending: ending[1][0])
    if error is not None and is_stop == all_stop:
        raise error
    if all_stop:
        raise StopRequestedError()
    failed_process = f"process {process}" if process else "the main process"
    raise UserError(f"{failed_process} ended: {text}")


@contextmanager
def detect_lost_process() -> Iterator[None]:
    """Raise UserError when a process ends, as when it is killed, while the others exchange values
    in the block."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"another process of this run has gone ({format_error(error, 100)}): its own last "
            "line says why. start again, with --resume_from_checkpoint latest if it had a "
            "checkpoint."
        ) from error


def make_accelerator(config: TrainConfig, run_dir: run_folder.RunDir) -> Accelerator:
    """Create the accelerator: device, processes, and the precision of `--mixed_precision`, else of
    `accelerate launch`. Raises UserError."""
    # What cannot work, before anything is made.
    check_bf16(config)
    refuse_sharding()

    # The process: which of its libraries speak, and how exactly it computes.
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    set_deterministic(config.deterministic)

    # accelerate reads the precision from its own settings where the run's do not say it.
    run_dir.path.mkdir(parents=True, exist_ok=True)
    clean_temporaries(run_dir.path)
    folders = utils.ProjectConfiguration(str(run_dir.path), str(run_dir.path / config.logging_dir))
    tracker = None if config.report_to in (None, "none") else config.report_to
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=tracker,
            project_config=folders,
            # `TrainStep` divides
            gradient_accumulation_plugin=utils.GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[utils.InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
        )
    except ValueError as error:
        raise make_accelerate_error(error) from error
    if accelerator.mixed_precision not in PRECISION_DTYPES:
        asks = (
            "`accelerate config` or the environment asks for the precision "
            f"{accelerator.mixed_precision}"
        )
        raise UserError(f"{asks}: give --mixed_precision no, fp16 or bf16.")

    # A run on a GPU should return this memory, which it no longer needs.
    if accelerator.device.type == "cpu":
        processes.keep_freed_memory()
    return accelerator


def set_deterministic(is_enabled: bool) -> None:
    """Enable or disable PyTorch's deterministic kernels; where there is none it raises
    RuntimeError.

    A warning is not enough: attention would continue as usual (pytorch #182551). Call it before the
    first product on the GPU.
    """
    torch.use_deterministic_algorithms(is_enabled)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it only shows errors of programs
    if is_enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False


def join_processes() -> PartialState:
    """Return the processes that a launcher started, before their precision is known. Raises
    UserError if they cannot be joined."""
    refuse_sharding()
    try:
        state = PartialState(
            cpu=utils.parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PROCESS_TIMEOUT
        )
    except ValueError as error:
        raise make_accelerate_error(error) from error
    return state


def refuse_sharding() -> None:
    """Raise UserError when `accelerate config` or `launch` asks to shard the model."""
    for name in SHARDING_MODES:
        if is_variable_true(f"ACCELERATE_USE_{name.upper().replace('-', '_')}"):
            remedy = "adapters need no sharding; use accelerate launch --multi_gpu."
            raise UserError(f"accelerate is set to {name}: {remedy}")


def make_accelerate_error(error: ValueError) -> UserError:
    """Return accelerate's message with the places of its settings."""
    return UserError(
        f"accelerate says: {format_error(error, 300).rstrip('.')}; look at --mixed_precision, at "
        "`accelerate config` and at ACCELERATE_… in the environment."
    )


def choose_seed(seed: int | None, accelerator: Accelerator) -> int:
    """Return `--seed`, or a random one that all processes share. It is saved, so that the run can
    be resumed."""
    return run_on_main(
        accelerator, lambda: SystemRandom().randrange(2**31) if seed is None else seed
    )
