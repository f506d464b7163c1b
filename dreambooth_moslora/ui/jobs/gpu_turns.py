"""The page's pipeline and a training run take turns on the GPU, since most GPUs cannot hold SDXL twice."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dreambooth_moslora.core.errors import UserError

if TYPE_CHECKING:
    from dreambooth_moslora.generation.pipeline import SubjectPipeline

__all__ = ["GpuTurns"]

BUSY = "the GPU is training a run; pictures can be drawn again when the run has ended or is stopped"


class GpuTurns:
    """Keeps the pipeline off the GPU while `is_training()`. A small base is never moved, as both fit.

    `pipeline()` waits for the base, `loaded()` does not.
    """

    def __init__(
        self,
        pipeline: Callable[[], "SubjectPipeline"],
        loaded: Callable[[], "SubjectPipeline | None"],
        is_training: Callable[[], bool],
        *,
        is_small: bool,
    ) -> None:
        self._pipeline, self._loaded = pipeline, loaded
        self._is_training, self._is_small = is_training, is_small
        self._lock = threading.Lock()  # not an RLock: another thread may close the generator

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Wraps all pictures of a request. Raises UserError while a run trains on the GPU that they need."""
        if self._is_small or not self._pipeline().has_gpu:
            yield
            return
        with self._lock:
            if self._is_training():
                raise UserError(BUSY)
            yield

    @contextmanager
    def training(self) -> Iterator[None]:
        """Wraps the start of a run: waits for the current pictures, then frees the GPU.

        A pipeline that is still loading is not moved, as it loads into the CPU's memory.
        """
        with self._lock:
            pipeline = self._loaded()
            if pipeline is not None and not self._is_small:
                pipeline.rest()
            yield
