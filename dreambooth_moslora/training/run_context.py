"""What every part of a run shares: settings, folder, processes, reports and stop requests."""

from collections.abc import Callable
from dataclasses import dataclass

from accelerate import Accelerator

from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.errors import StopRequestedError
from dreambooth_moslora.core.run_files.run_folder import RunDir
from dreambooth_moslora.training.processes import any_process, on_each
from dreambooth_moslora.training.reporter import Reporter

__all__ = ["RunContext"]


@dataclass(frozen=True)
class RunContext:
    """`should_stop` says whether this process was asked to stop."""

    config: TrainConfig
    run_dir: RunDir
    accelerator: Accelerator
    report: Reporter
    should_stop: Callable[[], bool]

    def stop_requested(self) -> bool:
        """Whether any process was asked to stop. All processes must call it at the same places; all get the
        same answer. Raises on all what the main process could not report."""
        ends = any_process(self.accelerator, self.report.failure is not None or self.should_stop())
        if ends:
            on_each(self.accelerator, self.report.raise_failure)
        return ends

    def stop_if_asked(self) -> None:
        """Raises StopRequestedError, on all processes together."""
        if self.stop_requested():
            raise StopRequestedError

    def raise_if_asked(self) -> None:
        """Raises StopRequestedError when this process was asked to stop: for work whose errors all processes hear."""
        if self.should_stop():
            raise StopRequestedError
