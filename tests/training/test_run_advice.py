"""Each rule of `explain`: figures with the fault it is for, and runs that are made to have some."""

import json
import os
import re
import shlex
import shutil
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import pytest

from dreambooth_moslora.cli import command_evaluate
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.disk.paths import find_asset
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.plan.steps import plan_steps
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training import loop, run_advice
from dreambooth_moslora.training.run_advice import list_advice
from dreambooth_moslora.training.run_metrics import RunMetrics, load_run_metrics
from tests.helpers.few_pictures import few_pictures
from tests.helpers.tiny_training import paint_photos, tiny_config

CONFIG = TrainConfig(
    instance_prompt="a photo of sks dog", train_batch_size=4, mixed_precision="fp16"
)
SCORES = dict(
    dino=0.7, dino_base=0.1, pres=0.12, pres_base=0.1, clip_t_of_base=0.95,
    drift_of_spread=0.7, copied=0.0, score=0.66, background_leak=0.02, dino_bare=0.66,
)  # fmt: skip
RISEN = {
    "likeness": ((80, 0.66), (160, 0.69), (240, 0.7)),
    "score": ((80, 0.62), (160, 0.67), (240, 0.66)),
}
GOOD = RunMetrics(config=CONFIG, state="done", step=240, photos=5, scores=SCORES, **RISEN)
FAULTY = (
    "--no_with_prior_preservation",
    "--max_train_steps=12",
    "--evaluate_steps=4",
    "--lr_scheduler=constant",
)
SHORT = (
    "--max_train_steps=80",
    "--evaluate_steps=80",
    "--num_validation_images=0",
)


def with_scores(**changes) -> RunMetrics:
    return replace(GOOD, scores=SCORES | changes)


PRIOR = replace(CONFIG, with_prior_preservation=True, class_prompt="a photo of a dog")
DOGS = {"instance_data_dir": "dogs", "instance_prompt": "a photo of sks dog"}
CATS = {"instance_data_dir": "cats", "instance_prompt": "a photo of sks cat"}
TWO = {"instance_prompt": TrainConfig().instance_prompt, "subjects": (DOGS, CATS)}
BROKEN = replace(GOOD, state="failed", message="the loss is nan at step 7: lower --learning_rate")
LAGS = replace(with_scores(dino_bare=0.25), without_bare_prompt=5)
TWICE = replace(with_scores(confusion=0.42), config=replace(CONFIG, **TWO))
COPIED = replace(with_scores(copied=0.3), copy_alarm=True)
NEVER = replace(LAGS, config=replace(CONFIG, instance_prompt_share=0))
PAST = replace(GOOD, score=((120, 0.67), (240, 0.55)))
RISING = replace(GOOD, likeness=((80, 0.3), (160, 0.5), (240, 0.7)))
FAULTS = {
    "broke_off": (
        BROKEN,
        "the loss is nan at step 7; --learning_rate 3e-05; --mixed_precision bf16, or no on",
    ),
    "seen_too_rarely": (replace(GOOD, step=10), "shown 8 times; --exposures_per_photo 200"),
    "nothing_scored": (
        replace(GOOD, scores={}),
        "Not scored. Run: python -m dreambooth_moslora evaluate; --evaluate_steps 48",
    ),
    "odd_photo": (
        replace(
            GOOD, photo_likeness={"0.jpg": 0.6, "1.jpg": 0.65, "my dog.jpg": 0.2, "3.jpg": 0.6}
        ),
        "my dog.jpg may show something else; DINO 0.20; 0.60; --leave_out 'my dog.jpg'",
    ),
    "leaked": (
        replace(with_scores(leak=0.5, leak_base=0.1), leaked="red rocket"),
        "“red rocket” comes with the style; 50%; --max_train_steps 160",
    ),
    "copies_photos": (COPIED, "30%; --crops_per_photo 8; --max_train_steps 160"),
    "lost_the_prompt": (
        with_scores(clip_t_of_base=0.6, background_leak=0.12),
        "0.60; --unmasked_weight 0",
    ),
    "leaks": (with_scores(background_leak=0.3), "came along; leak 0.30; --unmasked_weight 0"),
    "bare_prompt_lags": (
        NEVER,
        "“a photo of sks dog” alone; 25% of the likeness; --instance_prompt_share 0.25",
    ),
    "class_became_subject": (with_scores(pres=0.5), "every dog; 67%; --with_prior_preservation"),
    "drifted": (with_scores(drift_of_spread=1.8), "1.8 times; --with_prior_preservation"),
    "confused_subjects": (TWICE, "confusion 0.42; --exposures_per_photo 290; another rare word"),
    "past_its_best": (PAST, "0.67 at step 120; best/; --max_train_steps 120"),
    "still_rising": (RISING, "0.50 at step 160; 0.70 at step 240; --exposures_per_photo 290"),
}
"""Figures with one fault, and what the advice has to say of it."""


def test_good_metrics_get_no_advice_bad_ones_three_lines():
    assert list_advice(GOOD) == [] and run_advice.list_closing_advice(GOOD) == [
        "No problem was detected in the scores. Look at the contact sheet yourself."
    ]
    assert list_advice(replace(GOOD, photo_likeness=dict.fromkeys("abc", 0.6))) == []
    assert with_scores(dino=0.15, dino_base=0.1, dino_bare=0.1).compute_shift("dino_bare") is None
    bad = replace(
        with_scores(pres=0.5, copied=0.3, clip_t_of_base=0.6), copy_alarm=True, score=PAST.score
    )
    assert (
        run_advice.list_closing_advice(bad) == list_advice(bad)[:3] and len(list_advice(bad)) == 4
    )
    assert run_advice.list_closing_advice(replace(GOOD, scores={})) == []


JUDGEMENTS = {
    "unscored": (
        replace(GOOD, scores={}, folder=Path("runs/dog")),
        "^Not scored. Run: python -m dreambooth_moslora evaluate runs/dog, or give the next "
        "training --evaluate_steps 48. Look for yourself",
    ),
    "no_gain": (with_scores(dino=0.15), "It hardly learned your subject: .* was 10%, and is 15%"),
    "melted": (with_scores(dino=0.54, dino_base=0.22), "only begun to learn .* from 22% to 54%"),
    "class": (with_scores(dino=0.8, pres=0.7), "Every dog turns into yours; .* from 10% to 80%"),
    "copies": (COPIED, "Its images repeat your photos; likeness"),
    "short": (replace(GOOD, step=100), "only begun to learn your subject: .* from 10% to 70%"),
    "good": (GOOD, "^Likeness to the photos rose from 10% to 70%. Look for yourself"),
    "toy": (GOOD, "from 10% to 70%. The practice model draws only its own toys"),
}
"""Metrics and their verdict."""


@pytest.mark.parametrize("name", JUDGEMENTS)
def test_verdict_is_careful(name):
    """It said of a melted dog, and where every duck became the subject, that it had learned it."""
    run, expected = JUDGEMENTS[name]
    base = "toy" if name == "toy" else "owner/sdxl"
    config = replace(run.config, pretrained_model_name_or_path=base)
    verdict = run_advice.judge_run(replace(run, config=config))
    assert re.search(expected, verdict) and verdict.endswith(run_advice.LOOK_ADVICE)


def test_two_odd_photos_are_spoken_of_as_two():
    likeness = {"0.jpg": 0.6, "1.jpg": 0.2, "2.jpg": 0.6, "3.jpg": 0.1, "4.jpg": 0.6}
    (sentence,) = list_advice(replace(GOOD, photo_likeness=likeness))
    assert sentence.startswith("1.jpg and 3.jpg may show something else (DINO 0.20 to the others")
    assert sentence.endswith("look at them, and try --leave_out 1.jpg 3.jpg")


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_alone_with_figure_and_flag(name):
    run, expected_parts = FAULTS[name]
    (sentence,) = list_advice(run)
    assert all(word in sentence for word in expected_parts.split("; ")) and "\n" not in sentence, (
        sentence
    )


RUN = Path("runs/dog")
STOPPED = replace(
    GOOD,
    state="interrupted",
    step=157,
    planned_steps=480,
    saved=157,
    folder=RUN,
    config=replace(CONFIG, output_dir=str(RUN)),
)
AGAIN = f"python -m dreambooth_moslora train --config {RUN / 'train_config.json'}"
GOES_ON = f"to go on: {AGAIN} --resume_from_checkpoint latest"
SEVERAL = AGAIN.replace(
    "python -m dreambooth_moslora train", "accelerate launch --multi_gpu train_dreambooth.py"
)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, [GOES_ON]),
        ({"state": ""}, [GOES_ON]),  # killed
        ({"state": "failed", "message": "the disk is full"}, [GOES_ON]),
        ({"state": "failed", "message": BROKEN.message}, []),  # it would fail again
        ({"state": "", "is_training": True}, []),
        ({"state": "done"}, []),
        ({"processes": 2}, [f"to go on: {SEVERAL} --resume_from_checkpoint latest"]),
        (
            {"config": CONFIG},
            [f"to go on: {AGAIN} --output_dir {RUN} --resume_from_checkpoint latest"],
        ),
        ({"saved": 0}, [f"nothing was saved; to start again: {AGAIN}"]),
        ({"saved": 0, "step": 0, "scores": {}}, [f"nothing was trained; to start again: {AGAIN}"]),
    ],
)
def test_a_run_that_ended_early_is_told_the_command_that_goes_on(changes, says):
    """`explain` said of a stop at step 157 of 480 that no figure stands out, and advised a run of
    no step to be scored."""
    run = replace(STOPPED, **changes)
    assert run_advice.list_resume_hints(run) == says
    assert run.step or list_advice(run) == []


def test_photos_are_counted_as_whole_numbers(monkeypatch, capsys):
    """It said that each of 5.0 photos was shown: the record of a run keeps floats."""
    run = replace(STOPPED, photos=5.0)
    monkeypatch.setattr(command_evaluate, "load_run_metrics", lambda run_dir: run)
    assert main(["explain", "dog"]) == 0
    assert "each of 5 photos was shown" in capsys.readouterr().out


def test_the_command_that_explain_names_ends_a_stopped_run(tiny_base, photos, tmp_path, capsys):
    path = tmp_path / "dog"
    run = RunMetrics(config=tiny_config(tiny_base, photos, path, max_train_steps=3), folder=path)
    explained = ["explain", str(path)]

    def stop_after(count: int) -> None:
        kinds = []
        loop.train(
            run.config,
            on_event=lambda event: kinds.append(event.kind),
            should_stop=lambda: kinds.count("step") == count,
        )

    stop_after(0)
    assert main(explained) == 0
    output = capsys.readouterr().out
    start = f"nothing was trained; to start again: {run_advice.format_train_command(run)}\n"
    assert output.splitlines()[0].startswith(
        "it was stopped after 0 of 3 steps"
    ) and output.endswith(start)
    stop_after(2)
    assert main(explained) == 0
    first, lead, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("it was stopped after 2 of 3 steps")
    assert lead.startswith("to go on: python -m dreambooth_moslora train --config ")
    assert main(shlex.split(lead.partition(": ")[2])[3:]) == 0
    assert (load_run_metrics(RunDir(path)).state, load_run_metrics(RunDir(path)).step) == (
        "done",
        3,
    )


def test_a_style_is_told_of_no_masks_and_of_no_class():
    """Its pictures have no subject to be masked, and a style has no class."""
    style = replace(CONFIG, subject="style")
    run = replace(with_scores(clip_t_of_base=0.4, drift_of_spread=1.8), config=style)
    (sentence,) = list_advice(run)
    assert "1.8 times" in sentence and sentence.endswith("try --max_train_steps 160")
    # DINO compares things, which a style leaves free: that its likeness rises says nothing.
    assert list_advice(RISING) and not list_advice(replace(RISING, config=style))


def test_a_run_that_has_the_remedy_gets_the_next_one():
    unmasked = {name: value for name, value in SCORES.items() if name != "background_leak"}
    for run, end in (
        (replace(with_scores(pres=0.5), config=PRIOR), "--prior_loss_weight 2"),
        (
            replace(with_scores(drift_of_spread=1.8), config=replace(PRIOR, prior="adapter_off")),
            "--prior_prompts",
        ),
        (LAGS, "--instance_prompt_share 0.5"),  # the default is a quarter
        # the captions have the prompt
        (replace(LAGS, without_bare_prompt=0, config=PRIOR), "--prior_loss_weight 0.5"),
        (replace(LAGS, without_bare_prompt=0), "--exposures_per_photo 290"),
    ):
        (sentence,) = list_advice(run)
        assert sentence.endswith(end), sentence
    short = replace(LAGS, step=10, without_bare_prompt=0, likeness=RISING.likeness)
    # one number, and no third line of the likeness that still rose
    rare, bare = list_advice(short)
    assert rare.endswith("--exposures_per_photo 200") and bare.endswith("--exposures_per_photo 200")
    (masks,) = list_advice(replace(GOOD, scores=unmasked | {"clip_t_of_base": 0.6}))
    assert "add masks" in masks and "leak" not in masks


def test_bare_prompt_count_is_read_from_photos_if_missing(tmp_path):
    photos = paint_photos(tmp_path / "photos", 2)
    (photos / "0.txt").write_text("a photo of sks dog on grass")
    config = replace(CONFIG, instance_data_dir=str(photos), resolution=64)
    run = RunDir(tmp_path)
    for count, photo_facts in ((2, {}), (5, {"count": 5})):
        run.config_path.write_text(json.dumps(config.to_dict()))
        run.record_event({"type": "evaluation", "photos": photo_facts})
        assert (load_run_metrics(run).photos, load_run_metrics(run).without_bare_prompt) == (
            count,
            1,
        )
    run.config_path.write_text(
        json.dumps(config.to_dict() | {"instance_data_dir": str(tmp_path / "gone")})
    )
    assert (load_run_metrics(run).photos, load_run_metrics(run).without_bare_prompt) == (5, 0)


def test_advised_exposures_count_the_largest_subject(tmp_path):
    """With the mean over 4 and 20 photos, half as many again was 2.5 times the steps."""
    pets = [
        dict(subject, instance_data_dir=str(tmp_path / subject["instance_data_dir"]))
        for subject in (DOGS, CATS)
    ]
    config = replace(TWICE.config, resolution=64, max_train_steps=800, subjects=tuple(pets))
    for pet, count in zip(pets, (4, 20)):
        paint_photos(Path(pet["instance_data_dir"]), count)
    run = RunDir(tmp_path)
    run.config_path.write_text(json.dumps(config.to_dict()))
    run.record_event({"type": "step", "step": 800})
    metrics = load_run_metrics(run)
    longer = replace(
        config, max_train_steps=None, exposures_per_photo=run_advice.compute_more_exposures(metrics)
    )
    assert metrics.photos == 24 and 1200 <= plan_steps(longer, [4, 20]).total_steps <= 1400


def test_a_later_report_of_evaluate_is_taken(tmp_path):
    run = RunDir(tmp_path)
    run.config_path.write_text(json.dumps(CONFIG.to_dict()))
    run.record_event({"type": "evaluation", "step": 3, "dino": 0.5, "photos": {"count": 4}})
    assert load_run_metrics(run).scores["dino"] == 0.5 and load_run_metrics(run).photos == 4
    (tmp_path / "evaluation").mkdir()
    report = {
        "time": 1e10,
        "scores": {"dino": {"mean": 0.6}},
        "relative": {"drift_of_spread": 1.7},
        "copy_alarm": {"raised": True, "share": 0.3},
        "leaked": "a red rocket",
        "dino_of_each_photo": {"0.jpg": 0.6},
        "protocol": {"adapter_scale": 1.0},
        "references": None,
        "score": 0.4,
    }
    (tmp_path / "evaluation" / "scores.json").write_text(json.dumps(report))
    metrics = load_run_metrics(run)
    assert (
        metrics.scores
        == {
            "dino": 0.6,
            "drift_of_spread": 1.7,
            "copied": 0.3,
            "score": 0.4,
        }
        and metrics.copy_alarm
        and metrics.leaked == "a red rocket"
        and metrics.photo_likeness == {"0.jpg": 0.6}
    )
    for moment, score in ((1.0, 0.5), (3.0, 0.6)):
        run.metrics_path.write_text(
            json.dumps({"type": "evaluation", "step": 3, "time": 2.0, "dino": 0.5}) + "\n"
        )
        (tmp_path / "evaluation" / "scores.json").write_text(json.dumps(report | {"time": moment}))
        os.utime(run.metrics_path, (0, moment))
        os.utime(tmp_path / "evaluation" / "scores.json", (0, 2))
        assert load_run_metrics(run).scores["dino"] == score, (
            "by its own time: a copied file has another"
        )


def test_a_folder_without_a_run_is_one_line(tmp_path, capsys):
    for missing in ("train_config.json", "metrics.jsonl"):
        assert main(["explain", str(tmp_path)]) == 2
        assert f"holds no run: {missing} is not there" in capsys.readouterr().err
        RunDir(tmp_path).config_path.write_text(json.dumps(CONFIG.to_dict()))


@pytest.mark.slow
def test_rocket_run_trains_scores_and_explains_faults(tmp_path, capsys):
    shutil.copytree(find_asset("assets/subjects/rocket"), tmp_path / "rocket")
    with chdir(tmp_path), few_pictures(templates=2, class_images=2):
        assert main(["train", "rocket", "rocket", *FAULTY, "--num_validation_images=0"]) == 0
    run, output = RunDir(tmp_path / "runs" / "rocket"), capsys.readouterr().err
    kinds = {event["type"] for event in run.read_events()}
    assert {"evaluation", "export", "end"} <= kinds and run.best_dir.is_dir()
    assert 1 <= output.count("try next: ") <= 3
    assert re.search("try next: every rocket turns into yours.* --with_prior_preservation", output)
    output = list_advice(load_run_metrics(run))
    assert any(
        "each photo was shown 10 times" in line and "--exposures_per_photo" in line
        for line in output
    ), output


@pytest.mark.slow
def test_bare_prompt_share_reduces_the_bare_prompts_lag(
    tmp_path,
):
    """On the sample photos, of whose captions only those with a place stay."""

    def trained(home: Path, *flags: str) -> RunMetrics:
        photos = Path(shutil.copytree(find_asset("assets/subjects/train"), home / "train"))
        for path in photos.glob("*.txt"):
            path.write_text(path.read_text().splitlines()[1])
        with chdir(home), few_pictures(templates=2, seeds=2, class_images=2, inference_steps=12):
            assert main(["train", "train", "train", *SHORT, "--crops_per_photo=2", *flags]) == 0
        return load_run_metrics(RunDir(home / "runs" / "train"))

    never, usual = (
        trained(tmp_path / "never", "--instance_prompt_share=0"),
        trained(tmp_path / "usual"),
    )
    assert never.without_bare_prompt == usual.without_bare_prompt == 5
    sentences = [line for line in list_advice(never) if "alone shows" in line]
    assert len(sentences) == 1 and sentences[0].endswith("--instance_prompt_share 0.25"), (
        never.scores
    )
    assert usual.compute_shift("dino_bare") > never.compute_shift("dino_bare") + 0.2


@pytest.mark.parametrize(
    ("program", "train_command", "evaluate_command"),
    [
        ("train_dreambooth.py", "python train_dreambooth.py", "python -m dreambooth_moslora"),
        ("/env/bin/dreambooth-moslora", "dreambooth-moslora train", "dreambooth-moslora"),
        ("dreambooth-moslora.exe", "dreambooth-moslora train", "dreambooth-moslora"),
        ("app.py", "python -m dreambooth_moslora train", "python -m dreambooth_moslora"),
    ],
)
def test_commands_are_spelled_as_the_program_was_called(
    program, train_command, evaluate_command, monkeypatch
):
    """Who trains by the script was told to use the package."""
    monkeypatch.setattr("sys.argv", [program])
    run = replace(GOOD, scores={}, state="interrupted", folder=RUN)
    assert run_advice.format_resume_command(run).startswith(f"to go on: {train_command} --config ")
    assert f" {evaluate_command} evaluate {RUN}" in run_advice.describe_missing_scores(run)
