"""What one training needs of a machine, by the estimate of `--dry_run`: a fraction of a GPU, or cores and memory."""

from dataclasses import dataclass, replace
from functools import lru_cache

from dreambooth_moslora.base.locate import base_folder
from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.fleet.cluster import Resources
from dreambooth_moslora.training.planning.estimate import GIB, TRAINING_BYTES, BaseSize, estimate, size_of_base
from dreambooth_moslora.training.planning.memory_plan import PLANS, USABLE, fitting, with_plan

__all__ = ["Machines", "plan_name"]

PROCESS_GIB = 0.5
"""Memory of the libraries, beside the estimate's tensors."""
SHARED_PLANS = tuple(name for name in PLANS if "cache_cross_attention" not in PLANS[name])
"""The plans of `--memory auto` with which runs can share a base."""


@dataclass(frozen=True)
class Machines:
    """A cluster's machines: `gpu_gib` of one GPU (None: the fleet trains on CPUs), `node_gib` of the largest machine.

    The user sets `per_gpu`, trainings at once on a GPU (None: as many as fit), and `cpus`, cores of each
    training.
    """

    gpu_gib: float | None
    node_gib: float
    per_gpu: int | None = None
    cpus: int = 1

    def resources_for(self, config: TrainConfig) -> Resources:
        """What one training asks for. It is capped at the largest machine: there, a run that does not fit says
        so itself.

        Raises UserError for a damaged base.
        """
        need = estimate(with_plan(config, plan_name(config, self.gpu_gib) or "full"), base_size(config), 1).peak_gib
        if self.gpu_gib is None:
            return Resources(self.cpus, memory_gib=min(need + PROCESS_GIB, self.node_gib))
        count = self.per_gpu or max(1, int(USABLE * self.gpu_gib / need))
        return Resources(self.cpus, gpus=int(10_000 / count) / 10_000)

    def at_once(self, config: TrainConfig) -> int:
        """How many such trainings share a process: `per_gpu`, or fewer if the GPU is too small. Raises UserError."""
        count = self.per_gpu or 1
        while self.gpu_gib is not None and count > 1 and group_gib(config, count) > USABLE * self.gpu_gib:
            count -= 1
        return count

    def resources_for_group(self, config: TrainConfig, at_once: int) -> Resources:
        """What `at_once` such trainings in one process ask for: a whole GPU, or cores and memory. Raises UserError."""
        if self.gpu_gib is not None:
            return Resources(self.cpus, gpus=1.0)
        return Resources(self.cpus, memory_gib=min(group_gib(config, at_once) + PROCESS_GIB, self.node_gib))


def group_gib(config: TrainConfig, count: int) -> float:
    """Peak memory of one base with `count` adapters, for a step on the rows of all, GiB."""
    of_all = estimate(replace(config, train_batch_size=config.train_batch_size * count), base_size(config), 1)
    return of_all.peak_gib + (count - 1) * of_all.adapter_parameters * TRAINING_BYTES / GIB


def plan_name(config: TrainConfig, gpu_gib: float | None) -> str | None:
    """The memory plan that `--memory` means on these machines; None when the option was not given."""
    if config.memory != "auto":
        return config.memory
    return fitting(config, base_size(config), gpu_gib, SHARED_PLANS)


def base_size(config: TrainConfig) -> BaseSize:
    named = ("pretrained_model_name_or_path", "revision", "variant", "cache_dir", "target_modules")
    return size_of(tuple((name, getattr(config, name)) for name in named))


@lru_cache(maxsize=32)
def size_of(named: tuple[tuple[str, object], ...]) -> BaseSize:
    """The size of the base that these settings name. Its files are opened once."""
    config = replace(TrainConfig(), **dict(named))
    return size_of_base(base_folder(config), config.target_modules, config.variant)
