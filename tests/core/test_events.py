"""Events as lines of `metrics.jsonl`, and back."""

import pytest

from dreambooth_moslora.core.events import (
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


def test_lines_of_another_program_are_no_events():
    lines = [{"type": "step"}, {"type": "epoch", "step": 1}, {"type": ["step"]}, {"type": "step", "step": 2, "new": 1}]
    assert [event.step for event in events_of(StepDone, lines)] == [2]
