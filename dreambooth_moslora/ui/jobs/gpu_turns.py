"""The page's pipeline and a training run take turns, since most machines cannot hold SDXL twice.

On a GPU the pipeline moves to the host while a run trains. Without one it leaves memory: in fp32 SDXL takes 13 GiB.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.training.planning.precision import has_gpu

if TYPE_CHECKING:
    from dreambooth_moslora.generation.pipeline import SubjectPipeline

__all__ = ["GpuTurns"]

BUSY = "this machine is training a run; pictures can be drawn again when the run has ended or is stopped"


class GpuTurns:
    """Keeps the pipeline out of a run's way while `is_training()`. A small base is never moved, as both fit.

    `pipeline()` waits for the base, `loaded()` does not, `unload()` forgets it.
    """

    def __init__(
        self,
        pipeline: Callable[[], "SubjectPipeline"],
        loaded: Callable[[], "SubjectPipeline | None"],
        unload: Callable[[], None],
        is_training: Callable[[], bool],
        *,
        is_small: bool,
    ) -> None:
        self._pipeline, self._loaded, self._unload = pipeline, loaded, unload
        self._is_training, self._is_small = is_training, is_small
        self._lock = threading.Lock()  # not an RLock: another thread may close the generator

    def check_memory(self) -> None:
        """Raises UserError while the base must not be loaded: beside a run, without a GPU."""
        if not self._is_small and self._is_training() and not has_gpu():
            raise UserError(BUSY)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Wraps all pictures of a request. Raises UserError while a run trains."""
        if self._is_small:
            yield
            return
        self._pipeline()  # not under the lock: loading takes long
        with self._lock:
            if self._is_training():
                raise UserError(BUSY)
            yield

    @contextmanager
    def training(self) -> Iterator[None]:
        """Wraps the start of a run: waits for the current pictures, then makes room for it.

        With a GPU, a pipeline that is still loading is left alone, as it loads into the CPU's memory.
        """
        with self._lock:
            if not self._is_small:
                self._make_room()
            yield

    def _make_room(self) -> None:
        pipeline = self._loaded()
        if has_gpu() if pipeline is None else pipeline.has_gpu:
            if pipeline is not None:
                pipeline.rest()
            return
        del pipeline
        self._unload()
