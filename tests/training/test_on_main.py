"""Work of the main process alone: how it ends there is how it ends everywhere."""

from types import SimpleNamespace

import pytest

from dreambooth_moslora.core.errors import StopRequestedError, UserError
from dreambooth_moslora.training import accelerator
from dreambooth_moslora.training.accelerator import agreed, on_main


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


def start_of(monkeypatch, told: list[str], find) -> str:
    """As process 1 of two, which hears what both told."""
    monkeypatch.setattr(accelerator, "gather_object", lambda own: [told[0], *own])
    return agreed(SimpleNamespace(num_processes=2), find, lambda step: f"step {step}")


def test_processes_that_find_other_checkpoints_end_in_one_line(monkeypatch):
    assert start_of(monkeypatch, ["step 4"], lambda: 4) == 4
    with pytest.raises(UserError, match=r"^process 1 finds step 0, and the main process step 4: .* all machines share"):
        start_of(monkeypatch, ["step 4"], lambda: 0)
    with pytest.raises(UserError, match=r"the main process “no checkpoint there”"):
        start_of(monkeypatch, ["“no checkpoint there”"], lambda: 4)
    with pytest.raises(UserError, match=r"^damaged$"):
        start_of(monkeypatch, ["step 4"], lambda: fail(UserError("damaged")))
