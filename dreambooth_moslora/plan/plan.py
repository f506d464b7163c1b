"""Plan a run once, before the base is loaded: a dry run and the page print the plan, and the
trainer follows it.

settings --memory--> settings --checks--> base --photos--> steps --estimate--> cost
"""

from dataclasses import dataclass, replace

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.devices import get_world_size, is_main_process
from dreambooth_moslora.photos import faces, folder, photo_file
from dreambooth_moslora.plan import agreement, defaults, memory, memory_plans, validation
from dreambooth_moslora.plan.steps import StepPlan, plan_steps
from dreambooth_moslora.settings import subject_kinds
from dreambooth_moslora.settings.train_config import TrainConfig


@dataclass(frozen=True)
class RunPlan:
    """Plan of a run and its cost, which the trainer follows."""

    config: TrainConfig  # after its `--memory`
    base: Base
    photo_report: folder.PhotoReport
    steps: StepPlan  # of all processes
    cost: memory.MemoryEstimate

    @property
    def photos(self) -> list[photo_file.Photo]:
        return self.photo_report.photos


def make_plan(
    config: TrainConfig,
    report: folder.PhotoReport | None = None,
    *,
    free_gib: float | None = None,
    is_later: bool = False,
) -> RunPlan:
    """Return the plan of a run whose folders `check_folders` allows, in all its processes.

    config: the user's settings
    report: of photos that were read before
    free_gib: of the GPU on which another process will train
    is_later: whether another process trains, so that the memory of this one is not checked

    Raises UserError for anything that training would refuse.
    """
    # All processes must begin with the same settings: they make the same plan.
    agreement.check_same_settings(config)

    # What the base's family says, then what `--memory` chooses by the GPU with the least memory.
    base = agreement.agree_on_result(lambda: Base.of(config))
    validation.check_base_settings(config, base)
    config = replace(config, **defaults.choose_family_settings(config, base))
    config = replace(config, **memory_plans.choose_memory_settings(config, base, free_gib))
    agreement.check_same_settings(config)

    # The checks, before photos are read: they answer at once.
    size = agreement.agree_on_result(
        lambda: validation.validate_run(config, base, is_later=is_later)
    )

    # The photos, and with them the steps.
    if report is None:
        # The main process reads first, and tells alone what is wrong with the folder.
        first = agreement.agree_on_result(
            lambda: folder.build_photo_report(config) if is_main_process() else None
        )
        report = agreement.agree_on_result(lambda: first or folder.build_photo_report(config))
    else:
        # Masks may have been chosen after the photos were read.
        report = replace(report, photos=folder.add_saved_sidecars(config, report.photos))
    report = replace(report, photos=faces.add_faces(config, report.photos))
    if config.is_scored and subject_kinds.has_face_subject(config.each_subject):
        faces.load_face_reader().load()  # the scores ask for what compares them
    steps = plan_steps(config, photo_file.count_photos(report.photos), get_world_size())
    return RunPlan(
        config=config,
        base=base,
        photo_report=report,
        steps=steps,
        cost=memory.estimate_memory(config, size, steps.total_steps),
    )
