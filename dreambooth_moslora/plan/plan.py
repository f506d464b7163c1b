"""The plan of a run, made once, before the base is loaded: a dry run and the page print it, the trainer follows it.

settings --memory--> settings --checks--> base --photos--> steps --estimate--> cost
"""

from dataclasses import dataclass, replace
from pathlib import Path

from dreambooth_moslora.core import is_main_process, process_count
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.photos.folder import PhotoReport, photo_report
from dreambooth_moslora.photos.masks import with_kept_masks
from dreambooth_moslora.photos.photo import Photo, counts_of
from dreambooth_moslora.plan.checks import preflight
from dreambooth_moslora.plan.memory import Estimate, checked_by_all, choose_memory, estimate, same_config
from dreambooth_moslora.plan.steps import StepPlan, plan_steps
from dreambooth_moslora.settings.table import TrainConfig


@dataclass(frozen=True)
class Plan:
    """`config` has the settings of its `--memory`. `base` is the base's diffusers folder, None if not on this machine.

    `photo_report` is what was found when each photo was opened; `steps` counts them for all processes of the run.
    """

    config: TrainConfig
    base: Path | None
    photo_report: PhotoReport
    steps: StepPlan
    cost: Estimate

    @property
    def photos(self) -> list[Photo]:
        return self.photo_report.photos


def make_plan(
    config: TrainConfig, report: PhotoReport | None = None, *, free_gib: float | None = None, is_later: bool = False
) -> Plan:
    """The plan of a run whose folders `check_folders` allows. All processes of the run must call it.

    `report` is given where the photos were read before. `is_later`: another process will train, on a GPU with
    `free_gib`; the memory that is free now does not matter then. Raises UserError for whatever training would refuse
    before it loads the base.
    """
    config = same_config(choose_memory(same_config(config), free_gib))
    base, size = checked_by_all(lambda: preflight(config, is_later=is_later))
    if report is None:
        report = read_by_all(config)
    elif config.masks == "auto":  # it may have been chosen after the photos were read
        report = replace(report, photos=with_kept_masks(report.photos, RunDir(config.output_dir).masks_dir))
    steps = plan_steps(config, counts_of(report.photos), process_count())
    return Plan(config, base, report, steps, estimate(config, size, steps.total_steps))


def read_by_all(config: TrainConfig) -> PhotoReport:
    """The photos. The main process reads them first, as it then writes the images of a data set."""
    first = checked_by_all(lambda: photo_report(config) if is_main_process() else None)
    return checked_by_all(lambda: first or photo_report(config))
