"""Work of the main process alone: how it ends there is how it ends everywhere."""

from types import SimpleNamespace

import pytest

from dreambooth_moslora.core.errors import StopRequestedError, UserError
from dreambooth_moslora.training import accelerator
from dreambooth_moslora.training.accelerator import on_main


def fail(error):
    raise error


@pytest.fixture
def told(monkeypatch):
    """What the main process told the others, who hear it."""
    wire = []

    def broadcast(values):
        wire.append(values[0]) if values[0] is not None or not wire else values.__setitem__(0, wire[-1])

    monkeypatch.setattr(accelerator, "broadcast_object_list", broadcast)
    return wire


ENDS = {
    "stop": (StopRequestedError(), StopRequestedError, None),
    "mistake": (UserError("no such base"), UserError, "no such base"),
    "bug": (ZeroDivisionError("unforeseen"), UserError, "the main process ended: unforeseen"),
}


@pytest.mark.parametrize("name", ENDS)
def test_an_end_on_the_main_process_is_heard_by_the_others(name, told):
    error, kind, says = ENDS[name]
    with pytest.raises(type(error)):
        on_main(SimpleNamespace(is_main_process=True, num_processes=2), lambda: fail(error))
    with pytest.raises(kind, match=says):
        on_main(SimpleNamespace(is_main_process=False, num_processes=2), lambda: fail(AssertionError))


def test_work_that_succeeds_lets_all_go_on(told):
    done = []
    on_main(SimpleNamespace(is_main_process=True, num_processes=2), lambda: done.append(1))
    on_main(SimpleNamespace(is_main_process=False, num_processes=2), lambda: done.append(2))
    on_main(SimpleNamespace(is_main_process=True, num_processes=1), lambda: done.append(3))
    assert done == [1, 3]
