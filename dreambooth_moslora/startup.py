"""How a run begins: processes and precision, the seed, the arithmetic of steps, and the run folder's first files."""

import logging
import math
import os
from collections.abc import Mapping
from random import SystemRandom

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
)
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from dreambooth_moslora.bf16 import check_bf16
from dreambooth_moslora.config import TrainConfig
from dreambooth_moslora.errors import UserError, one_line
from dreambooth_moslora.memory import keep_freed_memory
from dreambooth_moslora.processes import PATIENCE
from dreambooth_moslora.rundir import RunDir, clean_stale
from dreambooth_moslora.steps import uses_class_images

__all__ = ["chosen_seed", "make_accelerator", "steps_per_epoch"]

logger = logging.getLogger(__name__)

ONE_PROCESS = (
    "this is the only process: on CPUs without MPI, accelerate starts several by "
    "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 …`"
)


def make_accelerator(config: TrainConfig, run_dir: RunDir) -> Accelerator:
    """Device, processes and precision: from `--mixed_precision`, else from `accelerate launch`, else fp32."""
    check_bf16(config)
    keep_freed_memory()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    run_dir.path.mkdir(parents=True, exist_ok=True)
    clean_stale(run_dir.path)
    folders = ProjectConfiguration(str(run_dir.path), str(run_dir.path / config.logging_dir))
    tracker = None if config.report_to in (None, "none") else config.report_to
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=tracker,
            project_config=folders,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # `Learner` divides, by our flag
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    except ValueError as error:
        raise UserError(refusal(config.mixed_precision, one_line(error, 300))) from error
    if accelerator.mixed_precision not in DTYPES:
        raise UserError(
            f"`accelerate config` or the environment asks for the precision {accelerator.mixed_precision}: give "
            "--mixed_precision no, fp16 or bf16."
        )
    if accelerator.num_processes == 1 and asked_for_more(os.environ):
        logger.warning(ONE_PROCESS)
    return accelerator


def refusal(mixed_precision: str | None, said: str) -> str:
    """What accelerate said, under the name of what asked for it: the flag, or what is set for accelerate itself."""
    if mixed_precision is not None and "precision" in said:
        return f"--mixed_precision {mixed_precision}: {said}"
    return f"accelerate says: {said.rstrip('.')}; look at `accelerate config` and at ACCELERATE_… in the environment."


def asked_for_more(environment: Mapping[str, str]) -> bool:
    """`accelerate launch --cpu --num_processes 2` without MPI names a meeting point and starts one process."""
    wants_cpu = environment.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1")
    return wants_cpu and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment


def chosen_seed(config: TrainConfig, accelerator: Accelerator) -> int:
    """`--seed`, or a random one that all processes share; it is written down, so that a run can be resumed."""
    seeds = [config.seed if config.seed is not None else SystemRandom().randrange(2**31)]
    if accelerator.num_processes > 1:
        broadcast_object_list(seeds)
    return seeds[0]


def steps_per_epoch(config: TrainConfig, photo_count: int, num_processes: int) -> int:
    """Optimizer steps in an epoch, as diffusers' script counts: with class images, the larger set makes the epoch."""
    exposures = photo_count * config.repeats
    if uses_class_images(config):
        exposures = max(exposures, config.num_class_images)
    batches = math.ceil(exposures / (config.train_batch_size * num_processes))
    return math.ceil(batches / config.gradient_accumulation_steps)


DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
