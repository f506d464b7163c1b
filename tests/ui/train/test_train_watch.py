"""What is shown of a run: its state and numbers, its plots and pictures, its files, its best step
and advice."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest

from dreambooth_moslora.disk.events import EventLog
from dreambooth_moslora.disk.process_identity import read_process_start
from dreambooth_moslora.disk.queue import lock_folder
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings.metric_kinds import METRICS
from dreambooth_moslora.ui.jobs import Job, Jobs, JobState, find_phase
from dreambooth_moslora.ui.state import AdapterCatalog
from dreambooth_moslora.ui.train.curves import (
    MAX_POINTS,
    SCORE_COLORS,
    build_loss_table,
    list_curve_values,
)
from dreambooth_moslora.ui.train.run_cards import render_status, render_verdict
from dreambooth_moslora.ui.train.run_list import build_run_cards
from dreambooth_moslora.ui.train.run_view import list_changes, list_samples
from dreambooth_moslora.ui.train.train_form import replace_flags
from tests.ui.conftest import find_handler, write_run, write_samples

PUBLISHED = "pytorch_lora_weights.safetensors"


@pytest.fixture
def run(tmp_path):
    """A run that has ended, scored on its way."""
    run = tmp_path / "runs" / "dog"
    for name in (
        PUBLISHED,
        "dog.kohya.safetensors",
        f"best/{PUBLISHED}",
        "best/dog.kohya.safetensors",
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    best = {"step": 20, "score": 0.5}
    write_run(
        run,
        {"type": "start", "max_train_steps": 30},
        {"type": "evaluation", "step": 20, "score": 0.5, "best": best | {"since": 0}}
        | {"dino": 0.7, "dino_base": 0.1},
        {"type": "evaluation", "step": 30, "score": 0.4, "best": best | {"since": 1}}
        | {"dino": 0.6, "dino_base": 0.1},
        {"type": "end", "state": "done", "step": 30},
    )
    return run


@pytest.fixture
def list_widget_changes(tmp_path, workspace):
    """What the page shows of that run."""
    return lambda: list_changes(Jobs(tmp_path / "runs"), "dog", None, workspace)


def test_card_names_best_step_and_offers_files(run, list_widget_changes, tmp_path, workspace):
    catalog = AdapterCatalog(tmp_path / "adapters", tmp_path / "runs", workspace)
    assert catalog.list_files() == {"dog": run / PUBLISHED, "dog@best": run / "best" / PUBLISHED}
    now = list_widget_changes()
    assert "Step 20 was the best" in now["verdict"] and "@" not in now["verdict"]
    # The verdict and the scores are of that step; that a later one was worse needs no advice.
    assert "rose from 10% to 70%" in now["verdict"] and "fell" not in now["verdict"]
    assert "Step 20:" in now["scores"] and "likeness to the photos 70%" in now["scores"]
    files = {"download": PUBLISHED, "download_kohya": "dog.kohya.safetensors"}
    assert all(
        now[name].visible and Path(str(now[name].value["path"])).name == file
        for name, file in files.items()
    )
    assert now["download"].label == "Download for diffusers"
    for folder in (run, run / "best"):
        (folder / "dog.kohya.safetensors").unlink()
    write_run(run, {"type": "start"}, {"type": "end", "state": "done", "step": 30})
    now = list_widget_changes()
    assert now["download"].visible and not now["download_kohya"].visible
    assert now["download"].label == "Download the LoRA"
    command = f"Not scored. Run: python -m dreambooth_moslora evaluate {run}, or tick “Scores”"
    assert command in now["verdict"] and "Next: “Draw with it”" in now["verdict"]
    run.rename(run.with_name("best"))  # a run of that name is a run
    assert set(catalog.list_files()) == {"best", "best@best"}


def test_verdict_on_a_short_run(tmp_path):
    for number in range(5):
        copy = tmp_path / "photos" / f"photo_{number:02d}.png"
        copy.parent.mkdir(exist_ok=True)
        copy.touch()
    config = {"instance_prompt": "a photo of sks bear", "train_batch_size": 4}
    short = [{"type": "start", "config": config}, {"type": "step", "step": 10}]
    verdict = render_verdict(write_metrics(tmp_path, *short), tmp_path)
    for text in ("Next: each photo was shown 8 times", "models/loras", "“sks bear”"):
        assert text in verdict
    assert verdict.count("Not scored") == 1 and "Draw with it" not in verdict
    scores = {"type": "evaluation", "step": 10, "dino": 0.47, "dino_base": 0.0}
    verdict = render_verdict(write_metrics(tmp_path, *short, scores), tmp_path)
    assert "It has only begun to learn your subject" in verdict

    # A style without a score has been measured, and the page says why it has none.
    style = {"type": "start", "config": {"instance_prompt": "in ink style", "subject": "style"}}
    unscored = {"type": "evaluation", "step": 10, "dino": 0.47, "no_score": "the base draws so"}
    verdict = render_verdict(write_metrics(tmp_path, style, unscored), tmp_path)
    assert "It has no score: the base draws so." in verdict


def test_verdict_on_a_style(tmp_path):
    """It told how like the things are to those of the photos, and to write “dusk” in the prompt."""
    config = {"instance_prompt": "a picture in dusk style", "subject": "style"}
    scores = {"type": "evaluation", "step": 200, "dino": 0.05, "dino_base": 0.0, "style": 0.77}
    events = [{"type": "start", "config": config}, {"type": "step", "step": 200}, scores]
    verdict = render_verdict(write_metrics(tmp_path, *events), tmp_path)
    assert "rose from 0% to 77%" in verdict and "write “in dusk style” in the prompt" in verdict

    # Above 1, a style is as like as it can be.
    events[-1] = scores | {"style": 2.2}
    verdict = render_verdict(write_metrics(tmp_path, *events), tmp_path)
    assert "rose from 0% to 100%" in verdict


@pytest.mark.parametrize(
    "advice, expected",
    [
        ("try --exposures_per_photo 200, and x", "try a greater “Length”, or more “Steps”, and x"),
        ("try --learning_rate 3e-05 (it was 0.0001)", "try “Learning rate” 3e-05 (it was 0.0001)"),
        (
            'try --with_prior_preservation --prior adapter_off --class_prompt "a dog"',
            "try “Keep the class”",
        ),
        (
            "try --unmasked_weight 0, and captions",
            "try “Weight outside the mask” 0, and captions",
        ),
        ("add masks: --masks auto", "add masks: “Make masks”"),
        ("--rank: from 1 on; --rank_pattern too", "“Rank”: from 1 on; --rank_pattern too"),
    ],
)
def test_advice_names_form_labels(advice, expected):
    assert replace_flags(advice).endswith(expected)


def test_newest_run_is_selected_first(context):
    ctx = context()
    attach = find_handler(ctx, "attach")
    assert attach() == ""
    for number, name in enumerate(("newest", "older")):
        run = write_run(ctx.runs_dir / name, {"type": "end", "state": "done", "step": 3}).run_dir
        (run / PUBLISHED).touch()
        os.utime(run / "job.json", (9 - number, 9 - number))
    assert attach() == "newest"


def test_deleted_run_is_reported(tmp_path, workspace):
    jobs = Jobs(tmp_path)
    write_run(tmp_path / "dog", birth=read_process_start(os.getpid()))
    write_run(tmp_path / "other")
    changes = list_changes(jobs, "dog", None, workspace)
    assert changes["stop"].visible and list_changes(jobs, "dog", changes["seen"], workspace) == {}
    shutil.rmtree(tmp_path / "dog")
    now = list_changes(jobs, "dog", changes["seen"], workspace)
    assert "not there any more" in now["status"] and now["run"] == ""
    assert list_changes(jobs, None, None, workspace) == {}


def test_stopped_run_is_stopping_until_its_process_ends(tmp_path):
    """It takes the request away a moment before."""
    ended = {"type": "end", "state": "interrupted", "step": 4}
    job = write_run(
        tmp_path / "dog", {"type": "start"}, ended, birth=read_process_start(os.getpid())
    )
    assert Jobs(tmp_path).get_state(job).state == "stopping"


def test_gigabytes_of_events_are_not_read(tmp_path, list_widget_changes):
    """A hole in a received folder: each look, once a second, took half a minute."""
    run = write_run(tmp_path / "runs" / "dog", {"type": "start"}).run_dir
    os.truncate(run / "metrics.jsonl", 2**36)
    assert "metrics.jsonl: it has more than 64 MiB" in list_widget_changes()["status"]


def test_bar_of_a_counted_phase_shows_its_count(tmp_path):
    """It was empty at “Drawing samples 100 of 100”."""
    phase = {"type": "phase", "phase": "sampling", "done": 75, "total": 100}
    status = render_status(JobState("running", 0, 400, "sampling"), write_metrics(tmp_path, phase))
    assert "Drawing samples 75 of 100" in status and 'aria-valuenow="75"' in status


def test_status_follows_the_phases(
    tmp_path,
):
    """On a CPU it takes minutes with SDXL, and nothing more is written before its end."""
    encoding, step = (
        {"type": "phase", "phase": "caching", "done": 3, "total": 4},
        {"type": "step", "step": 7, "eta_sec": 90},
    )
    assert find_phase([encoding]) == "caching"
    last = find_phase([encoding, encoding | {"done": 4}])
    assert "Step 1 of 400" in render_status(JobState("running", 0, 400, last), EventLog(tmp_path))
    drawing = [encoding | {"done": 4}, {"type": "phase", "phase": "sampling"}]
    assert find_phase(drawing) == "sampling"
    trains = JobState("running", 7, 400, find_phase([*drawing, step]))
    status = render_status(trains, write_metrics(tmp_path, *drawing, step))
    assert "Step 7 of 400" in status and "about 1 min 30 s left" in status
    scores = JobState("running", 7, 400, "evaluating")
    assert "left" not in render_status(scores, write_metrics(tmp_path, step))
    early = JobState("interrupted", 0, 100, "", "stopped before the first step")
    assert "Stopped before the first step." in render_status(early, EventLog(tmp_path))
    assert "checkpoint is written" in render_status(replace(early, message=""), EventLog(tmp_path))


def write_metrics(tmp_path, *events) -> EventLog:
    return EventLog(write_run(tmp_path, *events).run_dir / "metrics.jsonl").refresh()


def list_captions(tmp_path, workspace, events: list[dict], step: int | None = None) -> list[str]:
    """The captions of the samples that the page shows of these events."""
    samples = list_samples(Job(tmp_path, 1, ""), write_metrics(tmp_path, *events), workspace, step)
    assert all(Path(path).is_relative_to(workspace.folder) for path, _ in samples)
    return [caption for _, caption in samples]


def test_samples_are_paired_by_prompt_and_seed(tmp_path, workspace):
    events = write_samples(tmp_path, 0, 10, 20)
    assert list_captions(tmp_path, workspace, events[:1]) == ["Before: in snow", "Before: at sea"]
    newest = ["Before: in snow", "Step 20: in snow", "Before: at sea", "Step 20: at sea"]
    assert list_captions(tmp_path, workspace, events) == newest
    # A resumed run drew other prompts, in another order: no pair where there is no image before.
    (late,) = write_samples(tmp_path, 30, prompts=["at sea", "at sea"], seeds=[2, 1])
    captions = list_captions(tmp_path, workspace, [*events, late])
    assert captions == ["Step 30: at sea", "Before: at sea", "Step 30: at sea"]
    # The last drawn up to a step between two drawings, and nothing outside the folder.
    assert list_captions(tmp_path, workspace, [*events, late], step=25) == newest
    outside = [event | {"files": ["../../etc/passwd"] * 2} for event in events]
    assert list_captions(tmp_path, workspace, outside) == []
    many = [event | {"seeds": [1, 2], "prompts": ["in snow"] * 2} for event in events]
    assert list_captions(tmp_path, workspace, many) == newest[:2] * 2


@pytest.mark.parametrize(
    "is_of_page, count, expected", [(True, 5, 4), (False, 3, 2), (False, 1, 1)]
)
def test_photos_come_before_the_pairs_of_a_run_that_has_ended(
    tmp_path, workspace, is_of_page, count, expected
):
    """An even number, so that before and after stand side by side in two or four columns."""
    run, folder = tmp_path / "dog", tmp_path / "dog" / "photos"
    name = "photo_{:02d}.png" if is_of_page else "{}.JPG"
    folder = folder if is_of_page else tmp_path / "elsewhere"
    folder.mkdir(parents=True)
    for number in range(count):
        PIL.Image.new("RGB", (8, 8)).save(folder / name.format(number))
        PIL.Image.new("L", (8, 8)).save((folder / name.format(number)).with_suffix(".mask.png"))
    start = {"type": "start", "config": {"instance_data_dir": str(folder)}}
    ended = {"type": "end", "state": "interrupted", "step": 10}
    events = [start, *write_samples(run, 0, 10)]
    write_run(run, *events, birth=read_process_start(os.getpid()))
    images = list_changes(Jobs(tmp_path), "dog", None, workspace)["samples"].value
    assert [image["caption"] for image in images][:2] == ["Before: in snow", "Step 10: in snow"]
    write_run(run, *events, ended)
    images = list_changes(Jobs(tmp_path), "dog", None, workspace)["samples"].value
    captions = [image["caption"] for image in images]
    assert captions == ["Photo"] * expected + [
        "Before: in snow",
        "Step 10: in snow",
        "Before: at sea",
        "Step 10: at sea",
    ]


def test_samples_of_a_finished_run_are_those_of_its_best_step(run, list_widget_changes, workspace):
    """The page showed step 30, and step 20 was drawn with and downloaded."""
    samples = write_samples(run, 0, 10, 20, 30)
    (run / "metrics.jsonl").open("a").writelines(json.dumps(event) + "\n" for event in samples)
    now = list_widget_changes()
    captions = [image["caption"] for image in now["samples"].value]
    assert captions == ["Before: in snow", "Step 20: in snow", "Before: at sea", "Step 20: at sea"]
    shutil.rmtree(run / "best")
    captions = [image["caption"] for image in list_widget_changes()["samples"].value]
    assert captions[1] == "Step 30: in snow"


def test_curves_have_mean_losses_and_scores_in_words(tmp_path):
    """There were none before the run had ended, and scores were called “bare prompt 0.660”."""
    step = {"type": "step", "loss_prior": 0.5}
    steps = [step | {"step": at, "loss_instance": at % 2} for at in range(1, 601)]
    values = list_curve_values(write_metrics(tmp_path, *steps[:1]))
    assert not values["loss_curve"].visible and values["scores"] == ""
    metrics = write_metrics(tmp_path, *steps, {"type": "step", "step": 601, "loss_instance": None})
    table = build_loss_table(metrics)
    assert sorted(set(table["curve"])) == ["class", "photos"]
    assert len(table) <= 2 * (MAX_POINTS + 1)
    photos = table[table["curve"] == "photos"]
    assert list(photos["step"][:3]) == [11, 22, 33] and photos["step"].max() == 600
    assert photos["value"].iloc[0] == pytest.approx(6 / 11)  # odd steps among the first 11
    scores = [
        {"type": "evaluation", "step": at, "dino": at / 100, "dino_bare": 0.66, "clip_t": 0.3}
        for at in (20, 40)
    ]
    values = list_curve_values(write_metrics(tmp_path, *steps, *scores))
    assert values["loss_curve"].visible and values["score_curve"].visible
    texts = re.findall("</i>(.*?)</span>", values["scores"])
    assert texts == ["likeness to the photos 40%", "likeness without a place 66%"]
    assert "Step 40:" in values["scores"]
    one_score = list_curve_values(write_metrics(tmp_path, *steps, scores[0]))
    assert "photos 20%" in one_score["scores"] and not one_score["score_curve"].visible
    # A received folder may lack a step, or have none that can be read.
    odd = [{"type": "step", "loss_instance": 1.0}, {"type": "evaluation", "best": {"step": "x"}}]
    assert list_curve_values(write_metrics(tmp_path, *odd))["scores"] == ""
    # Every metric that is told of has a colour of its own, in the dot and on the plot.
    colors = list(SCORE_COLORS.values())
    assert len(SCORE_COLORS) == sum(bool(row.phrase) for row in METRICS.values())
    assert len(set(colors)) == len(colors)
    assert values["score_curve"].color_map.items() <= SCORE_COLORS.items()


def test_terminal_runs_are_listed_if_they_saved(tmp_path):
    jobs = Jobs(tmp_path)
    started = {"type": "start", "max_train_steps": 30, "time": 1.0}
    ended = {"type": "end", "state": "interrupted", "step": 20, "time": 2.0}
    for name, saved in (("empty", None), ("terminal", PUBLISHED)):
        run = write_run(tmp_path / name, started, {"type": "step", "step": 20}, ended).run_dir
        (run / "job.json").unlink()
        if saved:
            (run / saved).write_text("x")
            (run / "samples").mkdir()
    PIL.Image.new("RGB", (300, 200)).save(tmp_path / "terminal" / "samples" / "0.png")
    (card,) = build_run_cards(jobs)
    assert (card["run"], card["state"]) == ("terminal", "stopped · step 20")
    assert card["picture"].startswith("data:image/jpeg") and card["date"]
    # While a terminal trains, it holds the folder, and the page cannot stop it.
    with lock_folder(tmp_path / "empty"):
        states = {card["run"]: card["state"] for card in build_run_cards(jobs)}
        assert states["empty"] == "training · step 20" and jobs.find_active_job().name == "empty"
        with pytest.raises(UserError, match="begun in a terminal"):
            jobs.stop("empty")
