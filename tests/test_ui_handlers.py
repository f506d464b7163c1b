"""What the page's handlers compute, without a server: forms, shelf, jobs, what is shown of a run."""

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest
from safetensors.numpy import save_file

from dreambooth_moslora.config import TrainConfig
from dreambooth_moslora.config_files import load_settings
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation import GenerationParams, Provenance, Recipe
from dreambooth_moslora.ui.context import AppContext
from dreambooth_moslora.ui.facts import AdapterSummary, renewed_prompt
from dreambooth_moslora.ui.form import GenerateForm, code_snippet, size_choices
from dreambooth_moslora.ui.generate_actions import format_seconds
from dreambooth_moslora.ui.generate_tab import _axis_values
from dreambooth_moslora.ui.generate_widgets import ask_widgets
from dreambooth_moslora.ui.inspect_tab import label_of, words_of
from dreambooth_moslora.ui.jobs import Job, Jobs, Metrics
from dreambooth_moslora.ui.photo_uploads import take_photos
from dreambooth_moslora.ui.recipes import settle
from dreambooth_moslora.ui.serve import main, parse_login, resolution_of
from dreambooth_moslora.ui.shelf import AdapterShelf
from dreambooth_moslora.ui.train_actions import (
    fidelity_table,
    free_run_dir,
    loss_table,
    review_photos,
    samples_of,
    status_card,
)
from dreambooth_moslora.ui.train_form import QUICK_START, TrainForm, prompts_of
from dreambooth_moslora.ui.visitors import HISTORY_LENGTH, Picture, Visitor, VisitorCookie

OWNER, OTHER = "a" * 64, "b" * 64

TRAINER = '''
"""Stands in for the training program where a real one would be too slow or too well-behaved."""
import json, signal, sys, time
config = json.load(open(sys.argv[2]))
mode, out = config["mode"], config["output_dir"] + "/metrics.jsonl"
def say(kind, **facts):
    with open(out, "a") as file:
        file.write(json.dumps({"type": kind, "time": time.time(), **facts}) + "\\n")
if mode == "crash":
    print("error: the photos are gone", file=sys.stderr)
    sys.exit(2)
stop = []
signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "stubborn" else lambda *_: stop.append(1))
say("start", max_train_steps=1000, config={})
say("phase", phase=config.get("phase", "loading"), done=0, total=1)
for step in range(1, 1001):
    say("step", step=step, loss=1.0, loss_instance=1.0, loss_prior=None, lr=1e-4, step_sec=0.05, eta_sec=9.0)
    time.sleep(0.05)
    if stop or step == config.get("steps", 1000):
        break
say("end", state="interrupted" if stop else "done", step=step, message="")
'''


@pytest.fixture
def jobs(tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    (tmp_path / "runs").mkdir()
    found = Jobs(tmp_path / "runs", script)
    yield found
    for job in found.all():
        if job.is_alive:
            os.kill(job.pid, 9)


def start(jobs: Jobs, mode: str = "good", name: str = "dog", **config) -> Job:
    return jobs.start(name, {"mode": mode, "output_dir": str(jobs.runs_dir / name), **config}, OWNER)


def wait_for(condition, seconds: float = 40.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found


def test_the_form_and_the_parameters_are_each_others_inverse():
    form = GenerateForm("a dog", "blur", "dog", 0.5, "cat", 0.2, "none", 1.0, 7, 20, 4.0, "96 x 64", 3, "unipc")
    params = form.params()
    assert (params.width_px, params.height_px, params.adapters) == (96, 64, (("dog", 0.5), ("cat", 0.2)))
    assert GenerateForm.from_params(params) == form


def test_a_fourth_adapter_becomes_a_tag():
    params = GenerationParams("a dog", adapters=(("a", 1.0), ("b", 1.0), ("c", 1.0), ("d", 0.3)))
    assert GenerateForm.from_params(params).params().apply_tags().adapters == params.adapters


@pytest.mark.parametrize("resolution", [64, 128, 512, 1024])
def test_size_presets_are_multiples_of_eight_around_the_bases_own(resolution):
    sizes = [tuple(int(n) for n in value.split(" x ")) for _, value in size_choices(resolution)]
    assert sizes[0] == (resolution, resolution) and len(set(sizes)) == 5
    assert all(w % 8 == h % 8 == 0 and abs(w * h / resolution**2 - 1) < 0.15 for w, h in sizes)


def test_the_snippet_is_python_that_gives_the_same_parameters():
    params = GenerationParams('a "dog"', seed=3, steps=2, height_px=64, width_px=64, adapters=(("dog", 0.5),))
    code = code_snippet(params, "toy", {"dog": "dog.safetensors"})
    seen = {}

    class Stand:
        def load_adapter(self, path, name):
            seen["loaded"] = (path, name)

        def generate(self, params):
            seen["params"] = params
            return []

    code = code.replace("from dreambooth_moslora import GenerationParams, SubjectPipeline", "")
    factory = type("SubjectPipeline", (), {"from_base": staticmethod(lambda base: Stand())})
    exec(code, {"GenerationParams": GenerationParams, "SubjectPipeline": factory})
    assert seen == {"loaded": ("dog.safetensors", "dog"), "params": params}


def test_seconds_are_said_as_people_say_them():
    assert [format_seconds(s) for s in (4.21, 42, 65, 7800)] == ["4.2 s", "42 s", "1 min 05 s", "2 h 10 min"]


def visitor(tmp_path, name: str = OWNER) -> Visitor:
    folder = tmp_path / f"visitor-{name[:4]}"
    folder.mkdir(exist_ok=True)
    return Visitor(name, folder)


def test_the_shelf_shows_a_run_to_its_owner_and_command_line_runs_to_all(tmp_path):
    published, raw = "pytorch_lora_weights.safetensors", "moslora_weights.safetensors"
    for file in (f"mine/{published}", f"free/{published}", f"free/checkpoint-20/{raw}", f"free/checkpoint-100/{raw}"):
        (tmp_path / "runs" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / file).write_text("x")
    Job(tmp_path / "runs" / "mine", OWNER, 1, 0.0).save()
    shelf = AdapterShelf(tmp_path / "adapters", tmp_path / "runs")
    assert set(shelf.files(visitor(tmp_path))) == {"mine", "free", "free@100", "free@20"}
    assert list(shelf.files(visitor(tmp_path, OTHER))) == ["free", "free@100", "free@20"]


def test_a_run_called_like_an_adapter_is_found_under_a_name_of_its_own(tmp_path):
    for file in ("adapters/dog.safetensors", "runs/dog/pytorch_lora_weights.safetensors"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(file)
    shelf = AdapterShelf(tmp_path / "adapters", tmp_path / "runs")
    assert list(shelf.files()) == ["dog", "dog 2"]
    assert shelf.name_of(tmp_path / "runs" / "dog" / "pytorch_lora_weights.safetensors") == "dog 2"


def test_an_upload_is_its_visitors_alone_and_keeps_a_free_name(tmp_path):
    shelf = AdapterShelf(tmp_path / "adapters", tmp_path / "runs")
    file = tmp_path / "my <b>dog.safetensors"
    file.write_bytes(b"x")
    ann, bob = visitor(tmp_path), visitor(tmp_path, OTHER)
    names = [shelf.add_upload(file, ann) for _ in range(2)]
    assert names == ["my _b_dog", "my _b_dog 2"] and not shelf.files(bob)
    with pytest.raises(UserError, match="there is no adapter"):
        shelf.path(names[0], bob)


def test_the_history_forgets_the_oldest_with_its_file(tmp_path):
    ann = visitor(tmp_path)
    for number in range(HISTORY_LENGTH + 5):
        (path := tmp_path / f"{number}.png").write_bytes(b"x")
        ann.remember(Picture(path, str(number)))
    assert ann.history[0].caption == str(HISTORY_LENGTH + 4)
    assert len(list(tmp_path.glob("*.png"))) == HISTORY_LENGTH


def test_a_stop_counts_before_ones_turn_has_come_and_only_once(tmp_path):
    pages = [SimpleNamespace(username=None, cookies={}, session_hash=name) for name in ("mine", "other")]
    ctx = context(tmp_path)
    for page in pages:
        ctx.announce(page)
    ctx.stop(pages[0])
    for page, stopped in zip(pages, (True, False)):
        with ctx.stoppable(page) as should_stop:
            assert should_stop() == stopped
    with ctx.stoppable(pages[0]) as should_stop:
        assert not should_stop()
        ctx.stop(pages[0])
        assert should_stop()
    ctx.visitors.close()


def test_the_snippet_names_files_as_they_lie_in_the_project_or_by_the_bare_name(tmp_path, monkeypatch):
    published, raw = "pytorch_lora_weights.safetensors", "moslora_weights.safetensors"
    for file in ("adapters/cat.safetensors", f"runs/dog/{published}", f"runs/dog/checkpoint-20/{raw}"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("x")
    shelf = AdapterShelf(tmp_path / "adapters", tmp_path / "runs")
    runs = {"dog": "runs/dog", "dog@20": "runs/dog/checkpoint-20"}
    assert shelf.public_paths() == {"cat": "cat.safetensors"} | runs
    monkeypatch.setattr("dreambooth_moslora.ui.shelf.PROJECT", tmp_path)
    assert shelf.public_paths() == {"cat": "adapters/cat.safetensors"} | runs
    monkeypatch.setattr("dreambooth_moslora.ui.shelf.PROJECT", tmp_path.parent)
    assert shelf.public_paths()["dog@20"] == f"{tmp_path.name}/runs/dog/checkpoint-20"


def test_choosing_an_adapter_renews_the_prompt_only_while_nobody_has_written_in_it():
    dog, cat, foreign = AdapterSummary("sks", "dog"), AdapterSummary("zwx", "cat"), AdapterSummary()
    known = (dog, cat, foreign)
    assert renewed_prompt("", dog, known) == "a photo of a sks dog"
    assert renewed_prompt("a photo of a sks dog", cat, known) == "a photo of a zwx cat"
    assert renewed_prompt("a photo of a sks dog in space", cat, known) == "a photo of a sks dog in space"
    assert renewed_prompt("a photo of a sks dog", foreign, known) == "a photo of a sks dog"


def test_a_run_survives_the_server_that_started_it(jobs):
    """Another process starts the run and is gone; this one finds it, watches it and stops it."""
    code = (
        "import sys; from pathlib import Path; from dreambooth_moslora.ui.jobs import Jobs\n"
        f"jobs = Jobs(Path({str(jobs.runs_dir)!r}), Path({str(jobs.script)!r}))\n"
        f"jobs.start('dog', {{'mode': 'good', 'output_dir': {str(jobs.runs_dir / 'dog')!r}}}, {OWNER!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    job = jobs.current()
    assert job is not None and job.is_alive
    first = wait_for(lambda: jobs.state(job).step)
    wait_for(lambda: jobs.state(job).step > first)
    assert jobs.stop("dog", OWNER).stop_asked
    wait_for(lambda: jobs.state(jobs.owned("dog", OWNER)).state == "interrupted")
    assert jobs.current() is None


def test_one_run_at_a_time_and_only_the_owner_has_a_say(jobs):
    start(jobs)
    with pytest.raises(UserError, match="your run dog"):
        start(jobs, name="cat")
    with pytest.raises(UserError, match="another visitor's"):
        jobs.start("cat", {}, OTHER)
    for action in (jobs.stop, jobs.resume):
        with pytest.raises(UserError, match="you have no run"):
            action("dog", OTHER)
    with pytest.raises(UserError, match="still going on"):
        jobs.resume("dog", OWNER)
    assert jobs.current().name == "dog" and jobs.of(OTHER) == []


def test_resume_adds_the_checkpoint_to_the_same_run(jobs):
    job = start(jobs, steps=2)
    wait_for(lambda: jobs.state(job).state == "done")
    job = jobs.resume("dog", OWNER)
    wait_for(lambda: jobs.state(job).state == "done")
    config = json.loads((job.run_dir / "job_config.json").read_text())
    assert config["resume_from_checkpoint"] == "latest" and len(jobs.metrics(job).of("start")) == 2


def test_a_step_after_a_phase_means_that_it_trains(jobs):
    job = start(jobs, phase="sampling")
    state = wait_for(lambda: (s := jobs.state(job)).step > 1 and s)
    assert state.phase == "training"
    assert f"Step {state.step} of 1000" in status_card(state, jobs.metrics(job))


def test_a_crash_shows_its_last_words(jobs):
    job = start(jobs, "crash")
    state = wait_for(lambda: (s := jobs.state(job)).state == "failed" and s)
    assert "the photos are gone" in state.message
    assert "the photos are gone" in status_card(state, jobs.metrics(job))


def test_a_process_that_will_not_stop_is_killed_at_the_second_asking(jobs, monkeypatch):
    job = start(jobs, "stubborn")
    wait_for(lambda: jobs.state(job).step)
    stopping = jobs.stop("dog", OWNER)
    assert jobs.state(stopping).state == "stopping" and stopping.is_alive
    monkeypatch.setattr("dreambooth_moslora.ui.jobs.KILL_AFTER_SEC", 0)
    jobs.stop("dog", OWNER)
    wait_for(lambda: not job.is_alive)
    assert jobs.state(jobs.owned("dog", OWNER)).state == "failed"


def test_a_reused_process_number_is_not_taken_for_the_run(tmp_path):
    job = Job(tmp_path, OWNER, os.getpid(), created=0.0)
    assert not job.is_alive
    assert replace(job, created=__import__("psutil").Process().create_time()).is_alive


def test_metrics_wait_for_the_rest_of_a_half_written_line(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    assert metrics.refresh().events == []
    with metrics.path.open("a") as file:
        file.write('{"type": "start"}\nnonsense\n[1]\n{"type": "st')
        file.flush()
        assert [e["type"] for e in metrics.refresh().events] == ["start"]
        file.write('ep", "step": 1}\n')
    assert metrics.refresh().last("step") == {"type": "step", "step": 1}


def written(tmp_path, *events) -> Metrics:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return Metrics(tmp_path / "metrics.jsonl").refresh()


def test_the_loss_plot_keeps_instance_and_prior_apart_and_a_resumed_step_once(tmp_path):
    steps = [{"type": "step", "step": s, "loss_instance": 1.0, "loss_prior": 0.5} for s in (1, 2, 3, 2, 3)]
    table = loss_table(written(tmp_path, *steps, {"type": "step", "step": 4, "loss_instance": float("nan")}))
    assert table.groupby("part")["loss"].mean().to_dict() == {"subject": 1.0, "class (prior)": 0.5}
    assert list(table[table.part == "subject"].step) == [1, 2, 3]


def test_of_many_samples_the_bases_own_and_the_newest_are_shown(tmp_path):
    (tmp_path / "samples").mkdir()
    for step in range(40):
        (tmp_path / "samples" / f"{step}.png").write_bytes(b"x")
    metrics = written(tmp_path, *({"type": "sample", "step": s, "files": [f"{s}.png"]} for s in range(40)))
    shown = [caption for _, caption in samples_of(Job(tmp_path, OWNER, 1, 0.0), metrics, visitor(tmp_path))]
    assert shown == ["step 0", *(f"step {s}" for s in range(40 - len(shown) + 1, 40))] and len(shown) < 40


def test_scores_and_samples_of_a_run_are_shown_step_0_first(tmp_path):
    (tmp_path / "samples").mkdir()
    for step in (0, 10):
        (tmp_path / "samples" / f"step_{step}.png").write_bytes(b"x")
    events = [{"type": "sample", "step": s, "files": [f"samples/step_{s}.png", "../../etc/passwd"]} for s in (0, 10)]
    metrics = written(
        tmp_path, *events, {"type": "evaluation", "step": 10, "clip_t": 0.7, "pres": 1, "note": "x", "time": 5}
    )
    job, ann = Job(tmp_path, OWNER, 1, 0.0), visitor(tmp_path)
    shown = samples_of(job, metrics, ann)
    assert [caption for _, caption in shown] == ["step 0", "step 10"]
    assert all(Path(path).is_relative_to(ann.folder) for path, _ in shown)
    assert fidelity_table(metrics).to_dict("records") == [{"step": 10, "score": 0.7, "measure": "prompt"}]


def test_the_training_form_makes_a_config_the_trainer_accepts(tmp_path):
    form = TrainForm("sks", "dog", prior_preservation=True, captions="one\n\nthree")
    config = TrainConfig.from_dict(form.config("toy", 128, tmp_path / "photos", tmp_path / "run"))
    assert (config.instance_prompt, config.class_prompt) == ("a photo of a sks dog", "a photo of a dog")
    assert config.with_prior_preservation and config.resolution == 128 and config.max_train_steps == 300
    quick = load_settings(QUICK_START)
    assert config.target_modules == tuple(quick["target_modules"]) and config.rank == quick["rank"]
    assert config.prior_prompts == tuple(quick["prior_prompts"]) and config.learning_rate == quick["learning_rate"]
    plain = replace(form, prior_preservation=False).config("toy", 128, tmp_path / "photos", tmp_path / "run")
    assert not any(name.startswith("prior") for name in plain) and plain["target_modules"] == quick["target_modules"]
    big = TrainForm("sks", "dog", preset="quick", steps=7, rank=3).config("hub/id", 1024, tmp_path, tmp_path)
    assert (big["max_train_steps"], big["rank"], big["checkpointing_steps"]) == (7, 3, 1)


@pytest.mark.parametrize(
    "form, word",
    [
        (TrainForm("", "dog"), "token"),
        (TrainForm("sks", " "), "class word"),
        (TrainForm("sks", "d" * 61), "too long"),
        (TrainForm("sks", "dog", preset="endless"), "endless"),
        (TrainForm("sks", "dog", steps=-1), "steps"),
        (TrainForm("sks", "dog", learning_rate=11), "learning rate"),
        (TrainForm("sks", "dog", rank=1.5), "rank"),
    ],
)
def test_a_form_that_makes_no_sense_is_refused_in_words(form, word, tmp_path):
    with pytest.raises(UserError, match=word):
        form.config("toy", 128, tmp_path, tmp_path)


def test_captions_lie_beside_their_photos(tmp_path):
    photos = [tmp_path / f"in{i}.png" for i in range(3)]
    for photo in photos:
        PIL.Image.new("RGB", (40, 40)).save(photo)
    folder = take_photos([str(p) for p in photos], tmp_path / "photos").folder
    TrainForm("sks", "dog", captions="first\n\nthird").write_captions(folder)
    assert {p.name: p.read_text() for p in folder.glob("*.txt")} == {"photo_01.txt": "first", "photo_03.txt": "third"}


def test_a_run_gets_a_free_name_that_is_a_folder_name(jobs):
    form = TrainForm("sks", "guinea pig", run_name="")
    assert free_run_dir(jobs, form).name == "guinea-pig"
    (jobs.runs_dir / "guinea-pig").mkdir()
    assert free_run_dir(jobs, form).name == "guinea-pig-2"
    assert free_run_dir(jobs, replace(form, run_name="../../x")).parent == jobs.runs_dir


@pytest.mark.parametrize(
    "words, name",
    [
        ("-dog", "dog"),
        ("d..g", "d.g"),
        ("dog.", "dog"),
        ("_ +", "run"),
        ("Bär v2.1", "Bär-v2.1"),
        ("a" * 59 + ".b", "a" * 59),
        ("d@/<g", "d-g"),
    ],
)
def test_any_word_names_a_run(jobs, words, name):
    assert free_run_dir(jobs, TrainForm("sks", words)).name == name


def test_photos_are_numbered_as_they_are_taken_and_each_fault_is_told(tmp_path):
    def noise(seed: int, side: int = 160) -> PIL.Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 255, (side, side + 8, 3), dtype=np.uint8)
        return PIL.Image.fromarray(pixels)

    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    (tmp_path / "letter.jpg").write_text("hello")
    noise(1).save(tmp_path / "turned.png", exif=turned)
    noise(2).save(tmp_path / "good.png")
    noise(2).point(lambda value: value * 9 // 10).save(tmp_path / "twin.png")
    noise(3).filter(PIL.ImageFilter.GaussianBlur(4)).save(tmp_path / "soft.png")
    noise(4, 20).save(tmp_path / "tiny.png")
    names = ("letter.jpg", "turned.png", "good.png", "twin.png", "soft.png", "tiny.png")
    ann, ctx = visitor(tmp_path), SimpleNamespace(resolution_px=64)
    found = review_photos(ctx, [str(tmp_path / name) for name in names], ann)
    assert [p.name for p in sorted(ann.photos_dir.iterdir())] == [f"photo_0{n}.png" for n in range(1, 6)]
    for words in (
        "letter.jpg: broken",
        "photo 1: rotated",
        "photo 3: near-duplicate of photo_02",
        "photo 4: blurred",
        "photo 5: too small",
    ):
        assert words in found.remarks, (words, found.remarks)
    assert [caption == "good" for _, caption in found.crops] == [True, True, False, False, False]


def test_the_log_shows_a_progress_bars_last_state_and_no_empty_lines(tmp_path):
    job = Job(tmp_path, OWNER, 1, 0.0)
    (tmp_path / "job.log").write_bytes(b"loading\n\n 1%|\r 50%|\r 99%|\n\r\nsaved\n")
    assert job.log_tail() == "loading\n 99%|\nsaved"


def context(tmp_path, load=lambda: None) -> AppContext:
    folders = {"adapters_dir": tmp_path / "adapters", "runs_dir": tmp_path / "runs"}
    return AppContext(load, base="x", base_name="x", resolution_px=64, training=False, **folders)


@pytest.mark.parametrize("error, words", [(UserError("there is no base x"), "no base x"), (OSError("/home/me"), "log")])
def test_a_base_that_does_not_load_is_told_to_the_visitor_without_the_machines_secrets(tmp_path, caplog, error, words):
    def load():
        raise error

    ctx = context(tmp_path, load)
    with pytest.raises(UserError, match=words) as told:
        ctx.pipeline()
    assert "/home" not in str(told.value)
    assert ("Traceback" in caplog.text) == isinstance(error, OSError)
    ctx.visitors.close()


def write_adapter(file: Path, trigger: str) -> None:
    facts = {"trigger_words": [trigger], "class_word": "dog", "base_id": "toy"}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"x": np.zeros(1, np.float32)}, file, metadata={"moslora": json.dumps(facts)})


def test_the_first_prompt_has_the_trigger_words_and_the_adapters_words_are_no_markup(tmp_path):
    ctx = context(tmp_path)
    for trigger, prompt in (("sks", "a photo of a sks dog"), ("<b>![x](//evil/x.png)", "a photo of a <b>")):
        write_adapter(tmp_path / "adapters" / "a.safetensors", trigger)
        with gr.Blocks():
            widgets, others = ask_widgets(ctx)
        assert widgets["adapter"].value == "a" and widgets["prompt"].value.startswith(prompt)
        assert isinstance(others["about"], gr.HTML) and "<b>" not in others["about"].value
    ctx.visitors.close()


def test_the_axis_of_adapters_starts_with_the_checkpoints_of_the_chosen_run(tmp_path):
    ctx, page = context(tmp_path), SimpleNamespace(username=None, cookies={}, session_hash="page")
    write_adapter(tmp_path / "adapters" / "cat.safetensors", "zwx")
    for step in (20, 100):
        write_adapter(tmp_path / "runs" / "dog" / f"checkpoint-{step}" / "moslora_weights.safetensors", "sks")
    write_adapter(tmp_path / "runs" / "dog" / "pytorch_lora_weights.safetensors", "sks")
    assert _axis_values(ctx, "adapter", "dog", "", page) == "none, dog@20, dog@100, dog"
    assert _axis_values(ctx, "prompt", "dog", "a dog", page) == "a dog|"
    ctx.visitors.close()


@pytest.mark.parametrize(
    "options, training",
    [
        ([], True),
        (["--share"], False),
        (["--server_name", "0.0.0.0"], False),
        (["--server_name", "0.0.0.0", "--auth", "ann:secret"], True),
        (["--share", "--auth", "ann:secret"], True),
    ],
)
def test_on_a_public_address_training_needs_a_login(monkeypatch, capsys, options, training):
    seen = []

    def stop_here(args, *, training):
        seen.append(training)
        raise UserError("far enough")

    monkeypatch.setattr("dreambooth_moslora.ui.serve.context_of", stop_here)
    assert main(options) == 2 and seen == [training]
    assert ("warning: everybody" in capsys.readouterr().err) == (not training)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1.5, True, None, "7", 10**400])
def test_what_is_no_whole_number_is_refused_in_words(number, tmp_path):
    with pytest.raises(UserError):
        GenerateForm("a dog", steps=number).params()
    if number is not None:
        with pytest.raises(UserError, match="steps"):
            TrainForm("sks", "dog", steps=number).config("toy", 128, tmp_path, tmp_path)


def test_facts_have_names_that_people_read():
    assert [label_of(n) for n in ("use_dora", "size_mib", "trigger_words")] == ["DoRA", "Size (MiB)", "Trigger words"]
    assert [words_of(v) for v in (True, False, None, 0.25)] == ["yes", "no", "", "0.25"]


def test_prompts_follow_from_two_words():
    assert prompts_of(" sks ", "guinea  pig") == ("a photo of a sks guinea pig", "a photo of a guinea pig")


def test_the_resolution_is_read_without_the_weights(tiny_base, tmp_path):
    assert resolution_of(tiny_base) == 64 and resolution_of(None) == 1024 and resolution_of(tmp_path) == 1024


def test_app_mistakes_end_with_one_line(capsys):
    assert main(["--auth", "nocolon"]) == 2
    assert capsys.readouterr().err == "error: --auth needs NAME:PASSWORD\n"
    assert parse_login("ann:se:cret") == ("ann", "se:cret")


def test_a_page_below_a_cookie_keeps_it():
    """Websocket and asset requests pass through untouched."""
    import asyncio

    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    scopes = [{"type": "http", "path": path, "headers": []} for path in ("/", "/assets/x.js")]
    for scope in scopes:
        asyncio.run(VisitorCookie(app)(scope, None, send))
    assert [bool(message["headers"]) for message in sent] == [True, False]


def test_a_recipes_adapter_is_found_by_content_and_a_changed_one_is_told(tmp_path):
    for name, content in (("renamed", b"dog"), ("cat", b"another cat")):
        (tmp_path / name).write_bytes(content)
    files = {name: tmp_path / name for name in ("renamed", "cat")}
    sha = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("dog", "cat", "rex")}
    params = GenerationParams("x", adapters=(("dog", 0.5), ("cat", 1.0), ("rex", 1.0)))
    settled, remarks = settle(Recipe(params, Provenance("toy", tuple(sha.items())), True), files, "other")
    assert settled.adapters == (("renamed", 0.5), ("cat", 1.0), ("rex", 1.0))
    assert [
        word in remark for word, remark in zip(("cat here is another", "rex is not here", "base toy"), remarks)
    ] == [True] * 3
