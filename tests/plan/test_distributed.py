"""How a run's processes begin, what they do together, and how the work of one ends is how it ends
on all."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from dreambooth_moslora.disk import processes as disk_processes
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import StopRequestedError, UserError
from dreambooth_moslora.plan.agreement import format_settings
from dreambooth_moslora.plan.distributed import (
    make_accelerator,
    require_agreement,
    run_on_each,
    run_on_main,
    share_work,
)
from dreambooth_moslora.settings.train_config import TrainConfig
from tests.helpers.threads import as_processes


def fail(error):
    raise error


@pytest.fixture
def ends(monkeypatch):
    """Do `work(accelerator)` in so many processes; returns the result or the error of each."""
    return as_processes(monkeypatch)


ERRORS = {
    "stop": (StopRequestedError(), StopRequestedError, ""),
    "mistake": (UserError("no such base"), UserError, "no such base"),
    "bug": (ZeroDivisionError("unforeseen"), UserError, "unforeseen"),
    "without words": (MemoryError(), UserError, "MemoryError"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_all_processes_get_the_main_process_result_or_error(name, ends):
    done = []
    assert ends(
        3, lambda accelerator: run_on_main(accelerator, lambda: done.append(1) or len(done))
    ) == [1, 1, 1]
    assert ends(1, lambda accelerator: run_on_main(accelerator, lambda: len(done))) == [1]
    error, kind, says = ERRORS[name]
    local, heard = ends(2, lambda accelerator: run_on_main(accelerator, lambda: fail(error)))
    assert local is error and type(heard) is kind
    assert str(heard) == (f"the main process ended: {says}" if says else "")


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("items", ["", "a", "abcde", "abcdef"])
def test_work_is_shared_out_and_all_get_the_results_in_order(items, count, ends):
    closed = []

    def results(accelerator):
        def work(items):
            try:
                yield from ((item.upper(), accelerator.process_index) for item in items)
            finally:
                closed.append(accelerator.process_index)

        return list(share_work(accelerator, items, work))

    expected = [(item.upper(), number % count) for number, item in enumerate(items)]
    assert ends(count, results) == [expected] * count
    assert len(closed) == min(count, len(items)), "each process that works can tidy up"


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_in_one_share_ends_all_after_the_same_round(name, ends):
    error, kind, says = ERRORS[name]
    results = [[], [], []]

    def work(items):
        for item in items:
            yield item if item != 4 else fail(error)

    def take(accelerator):
        for result in share_work(accelerator, range(30), work):
            results[accelerator.process_index].append(result)

    first, second, last = ends(3, take)
    assert second is error and type(first) is type(last) is kind
    assert str(first) == str(last) == (f"process 1 ended: {says}" if says else "")
    assert results == [[0, 1, 2]] * 3


def test_an_error_is_more_than_a_stop(ends):
    errors = [StopRequestedError(), UserError("full"), ZeroDivisionError("bug")]
    results = ends(
        3,
        lambda accelerator: run_on_each(
            accelerator, lambda: fail(errors[accelerator.process_index])
        ),
    )
    assert results[1:] == errors[1:] and str(results[0]) == "process 1 ended: full"


def test_a_process_that_has_gone_is_a_line(monkeypatch):
    gone = RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:5")
    monkeypatch.setattr("accelerate.utils.gather_object", lambda _: fail(gone))
    with pytest.raises(
        UserError, match=r"^another process of this run has gone .*Connection closed by peer"
    ):
        run_on_each(SimpleNamespace(num_processes=2), bool)


def test_processes_with_other_checkpoints_end_in_one_line(ends):
    def compare_steps(*steps):
        def find(accelerator):
            step = steps[accelerator.process_index]
            return fail(UserError(step)) if isinstance(step, str) else step

        return ends(
            2,
            lambda accelerator: require_agreement(
                accelerator, lambda: find(accelerator), lambda step: f"step {step}"
            ),
        )

    assert compare_steps(4, 4) == [4, 4]
    for error in compare_steps(4, 0):
        assert str(error).startswith(
            "process 1 has step 0, and the main process step 4: the photos, "
        )
        assert str(error).endswith("must be on a disk that all machines share.")
    messages = [
        str(error)
        for error in compare_steps("no checkpoint there", 4) + compare_steps("damaged", "damaged")
    ]
    assert messages == [
        "no checkpoint there",
        "the main process ended: no checkpoint there",
        "damaged",
        "damaged",
    ]
    lines = ["rank 4\nseed 1\nmixer none", "rank 4\nseed 2\nmixer none", "rank 8\nseed 2"]
    compare_settings = lambda accelerator: require_agreement(  # noqa: E731
        accelerator, lambda: lines[accelerator.process_index], str, "be alike."
    )
    assert {str(error) for error in ends(3, compare_settings)} == {
        "process 1 has seed 2, and the main process seed 1: be alike."
    }


BEGIN = {
    (
        "ACCELERATE_MIXED_PRECISION",
        "fp7",
    ): "asks for the precision fp7: give --mixed_precision no, fp16 or bf16",
    (
        "ACCELERATE_DYNAMO_BACKEND",
        "two",
    ): "^accelerate says: 'TWO' is not a valid DynamoBackend; look",
    **dict.fromkeys(
        [(f"ACCELERATE_USE_{name}", "true") for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM")],
        "adapters need no sharding; use accelerate launch --multi_gpu",
    ),
}


@pytest.fixture
def begin(tmp_path):
    return lambda **changes: make_accelerator(
        TrainConfig(report_to="none", **changes), RunDir(tmp_path / "run")
    )


@pytest.mark.parametrize("setting", BEGIN)
def test_what_a_launcher_sets_is_refused_in_one_line(setting, begin, monkeypatch):
    monkeypatch.setenv(*setting)
    with pytest.raises(UserError, match=BEGIN[setting]):
        begin(mixed_precision="bf16" if "DYNAMO" in setting[0] else None)


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_set_by_pytorchs_older_and_newer_switch(allowed, begin):
    products = torch.backends.cuda.matmul
    try:
        begin(allow_tf32=allowed)
        assert (products.allow_tf32, products.fp32_precision) == (
            allowed,
            "tf32" if allowed else "ieee",
        )
    finally:
        products.allow_tf32 = False


@pytest.mark.parametrize("number", ["4", "two"])
def test_accelerates_own_accumulation_divides_no_gradient_again(number, begin, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", number)
    weight = torch.ones(1, requires_grad=True)
    begin().backward(weight.sum())
    assert weight.grad.item() == 1


@pytest.mark.parametrize(("device", "calls"), [("cpu", 1), ("cuda", 0)])
def test_freed_memory_is_kept_on_a_cpu_only(device, calls, begin, monkeypatch):
    made_calls = []
    monkeypatch.setattr(disk_processes, "keep_freed_memory", lambda: made_calls.append(1))
    monkeypatch.setattr(Accelerator, "device", torch.device(device))
    begin()
    assert len(made_calls) == calls


def test_processes_may_differ_in_cache_token_and_number_format():
    settings = {"cache_dir": "/disk", "hub_token": "secret", "rank": "8"}
    assert format_settings(settings) == format_settings({"rank": 8}) != format_settings({})
