"""Events as lines of `metrics.jsonl`, and back."""

from unittest.mock import ANY

import pytest

from dreambooth_moslora.disk.events import (
    AdapterExported,
    CheckpointSaved,
    PhaseProgress,
    RunEnded,
    RunStarted,
    SamplesDrawn,
    StepDone,
    StepEvaluated,
    event_of,
    events_of,
    record_of,
)

EVENTS = [
    RunStarted(9, {"rank": 4}),
    PhaseProgress("caching", 2, 3),
    StepDone(3, loss=0.5, loss_instance=0.5, lr=1e-4),
    SamplesDrawn(3, ["samples/a.png"], ["a dog"], [7]),
    StepEvaluated(3, {"dino": 0.5, "score": 0.25}, {"step": 3, "score": 0.25, "since": 0}, True, {"seconds": 1.0}),
    CheckpointSaved(3, "checkpoint-3"),
    AdapterExported(["a.safetensors"], {"checked": 1}),
    RunEnded("done", 3),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.kind)
def test_an_event_is_the_same_when_its_line_is_read_again(event):
    assert event_of(record_of(event)) == event


def test_the_scores_of_an_evaluation_are_keys_of_its_line():
    record = record_of(EVENTS[4])
    assert record["type"] == "evaluation" and record["dino"] == 0.5 and "scores" not in record


BEST = {"step": 2, "score": 0.5, "since": 0}


@pytest.mark.parametrize(
    "line",
    [
        {"type": "step", "step": True},
        {"type": "step", "step": "2"},
        {"type": "step", "step": 2, "loss": "0.5"},
        {"type": "step", "step": 2, "lr": [1]},
        {"type": "sample", "step": 2, "files": "a.png", "prompts": [], "seeds": []},
        {"type": "evaluation", "step": 2, "dino": 0.5},
        {"type": "evaluation", "step": 2, "best": 3},
        {"type": "evaluation", "step": 2, "best": {"stdp": 2, "score": 0.5, "since": 0}},
        {"type": "evaluation", "step": 2, "best": BEST | {"score": None}},
        {"type": "evaluation", "step": 2, "best": BEST | {"more": 1}},
        {"type": "step", "step": 2, "time": "yesterday"},
    ],
)
def test_a_line_whose_letters_were_changed_is_no_event(line):
    assert event_of(line) is None


def test_a_whole_number_is_a_fraction_too_and_what_is_not_finite_is_null():
    assert event_of({"type": "step", "step": 2, "loss": 1, "lr": None}) == StepDone(2, loss=1, lr=None, time=ANY)
    assert event_of({"type": "evaluation", "step": 2, "best": BEST}).best == BEST


def test_lines_of_another_program_are_no_events():
    lines = [{"type": "step"}, {"type": "epoch", "step": 1}, {"type": ["step"]}, {"type": "step", "step": 2, "new": 1}]
    assert [event.step for event in events_of(StepDone, lines)] == [2]
