"""Processes and precision of a run: accelerate's Accelerator, and the seed that all processes share."""

import logging
import os
from collections.abc import Mapping
from datetime import timedelta
from random import SystemRandom

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    parse_flag_from_env,
)
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from dreambooth_moslora.core.atomic_files import clean_stale
from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.errors import UserError, one_line
from dreambooth_moslora.core.process import keep_freed_memory
from dreambooth_moslora.core.run_files.run_folder import RunDir
from dreambooth_moslora.training.planning.precision import check_bf16
from dreambooth_moslora.training.processes import on_main

__all__ = ["PATIENCE", "chosen_seed", "joined", "make_accelerator"]

logger = logging.getLogger(__name__)

PATIENCE = timedelta(days=7)
"""How long a process waits for the others: class images and pictures of a large base can take hours."""


SHARDING = {
    "FSDP": "ACCELERATE_USE_FSDP",
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
}
"""Name in accelerate -> environment variable that asks for it."""

ONE_PROCESS = (
    "this is the only process: on CPUs without MPI, accelerate starts several by "
    "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 …`"
)


def make_accelerator(config: TrainConfig, run_dir: RunDir) -> Accelerator:
    """Device, processes and precision: from `--mixed_precision`, else from `accelerate launch`, else fp32.

    Raises UserError for settings of accelerate that cannot work.
    """
    check_bf16(config)
    refuse_sharding(os.environ)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    run_dir.path.mkdir(parents=True, exist_ok=True)
    clean_stale(run_dir.path)
    folders = ProjectConfiguration(str(run_dir.path), str(run_dir.path / config.logging_dir))
    tracker = None if config.report_to in (None, "none") else config.report_to
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=tracker,
            project_config=folders,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # `TrainStep` divides
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    except ValueError as error:
        raise UserError(refusal(config.mixed_precision, one_line(error, 300))) from error
    if accelerator.mixed_precision not in DTYPES:
        raise UserError(
            f"`accelerate config` or the environment asks for the precision {accelerator.mixed_precision}: give "
            "--mixed_precision no, fp16 or bf16."
        )
    check_world_size(os.environ, accelerator.num_processes)
    if accelerator.num_processes == 1 and asked_for_more(os.environ):
        logger.warning(ONE_PROCESS)
    if accelerator.device.type == "cpu":  # a GPU run should return this memory, which it no longer needs
        keep_freed_memory()
    return accelerator


def joined() -> PartialState:
    """The processes that a launcher started, before their precision is known; `make_accelerator` goes on with them.

    Raises UserError where accelerate does not join them.
    """
    refuse_sharding(os.environ)
    try:
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)
    except ValueError as error:
        raise UserError(refusal(None, one_line(error, 300))) from error
    check_world_size(os.environ, state.num_processes)
    return state


def refuse_sharding(environment: Mapping[str, str]) -> None:
    """Raises UserError when `accelerate config` or `launch` asks to shard the model."""
    for name, variable in SHARDING.items():
        if environment.get(variable, "false").lower() in ("true", "1"):
            raise UserError(
                f"accelerate is set to {name}: adapters need no sharding; use accelerate launch --multi_gpu."
            )


def check_world_size(environment: Mapping[str, str], num_processes: int) -> None:
    """Raises UserError when a launcher started processes that accelerate does not join."""
    started = environment.get("WORLD_SIZE", "")
    if started.isdigit() and int(started) != num_processes:
        raise UserError(
            f"{started} processes were started (WORLD_SIZE) and accelerate joins {num_processes}: "
            "use accelerate launch --multi_gpu, or start one process."
        )


def refusal(mixed_precision: str | None, said: str) -> str:
    """accelerate's message, with the source of the wrong value: the flag, or accelerate's own settings."""
    if mixed_precision is not None and "precision" in said:
        return f"--mixed_precision {mixed_precision}: {said}"
    return f"accelerate says: {said.rstrip('.')}; look at `accelerate config` and at ACCELERATE_… in the environment."


def asked_for_more(environment: Mapping[str, str]) -> bool:
    """Whether several processes were asked for and only one started: `accelerate launch --cpu --num_processes
    2` without MPI."""
    wants_cpu = environment.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1")
    return wants_cpu and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment


def chosen_seed(config: TrainConfig, accelerator: Accelerator) -> int:
    """`--seed`, or a random one that all processes share. It is saved, so that the run can be resumed."""
    seeds = [config.seed if config.seed is not None else SystemRandom().randrange(2**31)]
    return on_main(accelerator, lambda: seeds[0])


DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
