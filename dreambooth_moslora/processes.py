"""Several processes in one run: work of the main one alone, whose end is everybody's, and questions put to all."""

from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dreambooth_moslora.errors import StopRequestedError, UserError

__all__ = ["PATIENCE", "any_process", "on_main"]

PATIENCE = timedelta(days=7)
"""How long a process waits for the others: class images and pictures of a large base can take hours."""


def any_process(accelerator: Accelerator, said: bool) -> bool:
    """Whether one of them says yes. All have to be asked, and all get the same answer."""
    if accelerator.num_processes == 1:
        return said
    votes = torch.tensor(float(said), device=accelerator.device)
    return bool(accelerator.reduce(votes, "sum") > 0)


def on_main(accelerator: Accelerator, work: Callable[[], None]) -> None:
    """Do it on the main process. A stop or an error there ends all: nobody waits for one that is gone."""
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            work()
        except Exception as found:
            error = found
    if accelerator.num_processes > 1:
        error = shared(error)
    if error is not None:
        raise error


def shared(error: Exception | None) -> Exception | None:
    """The main process's error, as the others can raise it; itself on the main process."""
    told = [None if error is None else (isinstance(error, StopRequestedError), str(error))]
    broadcast_object_list(told)
    if error is not None or told[0] is None:
        return error
    stopped, text = told[0]
    return StopRequestedError() if stopped else UserError(f"the main process ended: {text}")
