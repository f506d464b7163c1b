"""The queue on the page: what is added, shown and moved, of whom, and which run is watched."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from dreambooth_moslora.core import UserError
from dreambooth_moslora.ui import public
from dreambooth_moslora.ui.jobs import QueueTurns
from dreambooth_moslora.ui.train_form import TrainForm
from dreambooth_moslora.ui.train_start import add_to_queue, start_run
from dreambooth_moslora.ui.train_watch import queue_changes
from dreambooth_moslora.ui.visitors import Visitors
from tests.helpers.tiny_training import paint_photos
from tests.ui.test_handlers import OTHER, visitor
from tests.ui.test_processes import jobs, wait_for  # noqa: F401 (a fixture)
from tests.ui.test_run_queue import added, names


@pytest.fixture
def page(jobs, tmp_path):  # noqa: F811
    """What the tab's actions know, and a visitor with two photos."""
    ann = visitor(tmp_path)
    for number, file in enumerate(sorted(paint_photos(tmp_path / "mine", 2).iterdir()), 1):
        ann.photos_dir.mkdir(exist_ok=True)
        file.rename(ann.photos_dir / f"photo_0{number}.png")
    ctx = SimpleNamespace(queue=QueueTurns(jobs), base_name="toy", resolution_px=128, jobs=jobs, public=True)
    return ctx, ann


def test_the_page_adds_shows_and_moves_runs_of_its_visitor_alone(jobs, page, monkeypatch):  # noqa: F811
    ctx, ann = page
    bob = replace(ann, id=OTHER)
    form = TrainForm("sks", "dog")
    assert add_to_queue(ctx, form, ann)[0] == "dog"
    name, card = add_to_queue(ctx, replace(form, steps=7), ann)
    assert name == "dog-2" and "dog-2 waits, number 2 in the queue" in card
    assert len(list((jobs.runs_dir / "dog-2" / "photos").iterdir())) == 2
    add_to_queue(ctx, replace(form, run_name="secret"), bob)
    added(ctx.queue.queue, "bear", owner="")
    shown = queue_changes(ctx, ann, None, None)
    assert shown["queued"].choices == [("1 · dog · each photo 384 times", "dog"), ("4 · dog-2 · 7 steps", "dog-2")]
    assert "3 · bear" in shown["queue_rest"] and "1 of other visitors" in shown["queue_rest"]
    assert "secret" not in str(shown) and shown["queue_box"].visible
    assert queue_changes(ctx, ann, None, shown["queue_seen"]) == {}
    with pytest.raises(UserError, match="Add to queue"):
        start_run(ctx, form, ann)
    monkeypatch.setattr(public, "RUNS_PER_VISITOR", 2)
    with pytest.raises(UserError, match="2 runs of yours are waiting"):
        add_to_queue(ctx, form, ann)
    for run in names(ctx.queue.queue):
        ctx.queue.queue.remove(run)
    assert not queue_changes(ctx, ann, None, None, "dog")["queue_box"].visible
    assert [path.name for path in jobs.runs_dir.iterdir()] == [".queue"]


@pytest.mark.parametrize(
    ("limit", "says"),
    [("RUNS_PER_ADDRESS", "2 runs from your address are waiting"), ("RUNS_IN_ALL", "the queue is full, 2 runs")],
)
def test_cookies_together_leave_room_for_others(jobs, page, monkeypatch, limit, says):  # noqa: F811
    ctx, ann = page
    monkeypatch.setattr(public, limit, 2)
    added(ctx.queue.queue, "bear", owner="", address="")
    for number in range(2):
        add_to_queue(ctx, TrainForm("sks", "dog"), replace(ann, id=f"cookie {number}", address="203.0.113.1"))
    with pytest.raises(UserError, match=says):
        add_to_queue(ctx, TrainForm("sks", "dog"), replace(ann, id="cookie 2", address="203.0.113.1"))
    elsewhere = [replace(ann, address="203.0.113.2"), replace(ann, id="a login")]
    if limit == "RUNS_PER_ADDRESS":
        assert [add_to_queue(ctx, TrainForm("sks", "dog"), one)[0] for one in elsewhere] == ["dog-3", "dog-4"]


def test_a_visitor_without_a_login_has_an_address():
    visitors, asked = Visitors(), {"cookies": {}, "session_hash": "s", "client": SimpleNamespace(host="203.0.113.1")}
    for username, address in ((None, "203.0.113.1"), ("ann", "")):
        assert visitors.of(SimpleNamespace(username=username, **asked)).address == address
    visitors.close()


def test_the_page_turns_to_the_run_whose_turn_has_come(jobs, page):  # noqa: F811
    ctx, ann = page
    added(ctx.queue.queue, "dog", steps=500)
    ctx.queue.take()
    wait_for(lambda: jobs.current())
    assert queue_changes(ctx, ann, "old", None)["run"].value == "dog"
    other = queue_changes(ctx, replace(ann, id=OTHER), None, None)["run"]
    assert other.value != "dog" and other.choices == []
