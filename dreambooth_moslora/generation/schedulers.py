"""The table of schedulers, for the command line, the page and PNG files. It needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

__all__ = ["SCHEDULERS", "Scheduler", "make_scheduler", "scheduler_of_title"]


@dataclass(frozen=True)
class Scheduler:
    """`title` is its name in other programs ("Sampler" in A1111), `class_name` diffusers' class."""

    title: str
    class_name: str
    options: Mapping[str, Any] = field(default_factory=dict)


SCHEDULERS = {
    "euler": Scheduler("Euler", "EulerDiscreteScheduler"),
    "dpmpp_2m_karras": Scheduler(
        "DPM++ 2M Karras",
        "DPMSolverMultistepScheduler",
        {"use_karras_sigmas": True},
    ),
    "unipc": Scheduler("UniPC", "UniPCMultistepScheduler"),
}
"""Schedulers by this program's names. All are deterministic: noise is drawn only at the start."""


def scheduler_of_title(title: str) -> str | None:
    """The name of the scheduler that other programs call `title`."""
    return next((name for name, scheduler in SCHEDULERS.items() if scheduler.title == title), None)


def make_scheduler(name: str, base_config: Mapping[str, Any]) -> "SchedulerMixin":
    """diffusers' scheduler of that name, with the noise levels of the base's own scheduler."""
    import diffusers

    scheduler = SCHEDULERS[name]
    return getattr(diffusers, scheduler.class_name).from_config(base_config, **scheduler.options)
