"""Encoding before the first step: of several processes each encodes a part, and each can read all of it afterwards."""

from types import SimpleNamespace

import pytest
import torch

from dreambooth_moslora.core import StopRequestedError
from dreambooth_moslora.training.encoder import TensorCache
from dreambooth_moslora.training.prepare import fill, same_everywhere
from dreambooth_moslora.training.reporter import RunContext
from tests.helpers.threads import as_processes

KEYS = [f"{number:02d}" for number in range(5)]


@pytest.fixture
def filled(monkeypatch):
    """Fill one cache in each process; returns how many values each computed, or its error."""
    run = as_processes(monkeypatch)

    def fill_all(caches, on_machine=None, should_stop=lambda process, key: False):
        def work(accelerator):
            process = accelerator.process_index
            asked = iter(KEYS[process :: len(caches)])
            context = RunContext(None, None, accelerator, None, lambda: should_stop(process, next(asked)))
            entries = {key: lambda key=key: {"value": torch.tensor([float(key)])} for key in KEYS}
            assert list(fill(caches[process], context, entries)) == [1, 2, 3, 4, 5]
            return caches[process].computed

        return run(len(caches), work, on_machine)

    return fill_all


def values_in(cache: TensorCache) -> list[float]:
    """What the cache holds, without computing anything."""
    return [float(cache.get(key, lambda: {"value": torch.tensor([-1.0])})["value"]) for key in KEYS]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_in_memory_every_process_has_all_and_encodes_its_share(filled, count):
    caches = [TensorCache() for _ in range(count)]
    assert sum(filled(caches)) == 5
    assert [values_in(cache) for cache in caches] == [[0, 1, 2, 3, 4]] * count


def test_on_one_machine_a_file_is_written_once_by_the_process_that_encodes(filled, tmp_path, monkeypatch):
    written, keep = [], TensorCache._keep
    monkeypatch.setattr(TensorCache, "_keep", lambda self, key, value: written.append(key) or keep(self, key, value))
    caches = [TensorCache(tmp_path) for _ in range(2)]
    assert filled(caches) == [3, 2] and sorted(written) == KEYS
    assert filled(caches) == [3, 2] and len(written) == 5, "the second time all is there"


def test_machines_that_share_no_disk_both_have_all_and_encode_nothing_twice(filled, tmp_path):
    caches = [TensorCache(tmp_path / str(number // 2)) for number in range(4)]
    assert filled(caches, on_machine=2) == [2, 1, 1, 1]
    assert [values_in(cache) for cache in caches] == [[0, 1, 2, 3, 4]] * 4


def test_a_stop_in_one_process_ends_all_and_what_is_encoded_stays(filled, tmp_path):
    caches = [TensorCache(tmp_path) for _ in range(2)]
    ended = filled(caches, should_stop=lambda process, key: key == "03")
    assert [type(end) for end in ended] == [StopRequestedError] * 2
    assert [cache.computed for cache in caches] == [2, 1]
    assert filled(caches) == [3, 2]


def test_processes_that_see_other_photos_end_in_one_line(monkeypatch):
    def find(accelerator):
        context = SimpleNamespace(accelerator=accelerator)
        return same_everywhere(context, lambda: dict.fromkeys(KEYS[accelerator.process_index :], bool), "crops")

    for error in as_processes(monkeypatch)(2, find):
        assert str(error).startswith("process 1 has 4 crops (") and "the main process 5 crops (" in str(error)
