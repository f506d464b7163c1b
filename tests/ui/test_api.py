"""The page through gradio_client: names, arguments, streaming, stopping, several visitors."""

import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import PIL.Image
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from dreambooth_moslora.generation.params import GenerationParams, Image, read_recipe
from dreambooth_moslora.ui.jobs import Job
from dreambooth_moslora.ui.train_form import TrainForm, rows
from dreambooth_moslora.ui.visitors import COOKIE, visitor_id
from tests.helpers.ui_server import cookie_of, secret_of

FAST = {"steps": 3, "guidance_scale": 2.0}
GENERATE_ARGUMENTS = [
    "prompt",
    "negative_prompt",
    "adapter",
    "scale",
    "adapter_2",
    "scale_2",
    "adapter_3",
    "scale_3",
    "seed",
    "steps",
    "guidance_scale",
    "size",
    "num_images",
    "scheduler",
]


def files_of(gallery) -> list[str]:
    return [item["image"] for item in gallery]


def test_endpoints_and_arguments_keep_their_names(client):
    api = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    arguments = {name: [p["parameter_name"] for p in facts["parameters"]] for name, facts in api.items()}
    assert arguments["/generate"] == arguments["/compare"] == GENERATE_ARGUMENTS
    assert arguments["/grid"] == ["rows", "row_values", "columns", "column_values", *GENERATE_ARGUMENTS]
    fields = ("photos", "class_word", "token", "captions", "tokens_begin_as")
    further = [f"{name}_{number}" for number in (2, 3, 4) for name in fields]
    with_photos = ["photos", *rows(TrainForm), "subjects", *further]
    assert arguments["/train"] == arguments["/estimate"] == arguments["/add_to_queue"] == with_photos
    assert (arguments["/move_in_queue"], arguments["/remove_from_queue"]) == (["run", "place"], ["run"])
    assert all(arguments[name] == ["run"] for name in ("/train_status", "/stop_training", "/resume_training"))
    assert (
        arguments["/inspect"] == ["file"] and arguments["/adapters"] == arguments["/stop"] == arguments["/queue"] == []
    )
    assert set(arguments) == {
        "/generate",
        "/compare",
        "/grid",
        "/stop",
        "/adapters",
        "/inspect",
        "/train",
        "/estimate",
        "/add_to_queue",
        "/queue",
        "/move_in_queue",
        "/remove_from_queue",
        "/train_status",
        "/stop_training",
        "/resume_training",
    }
    assert all(p["parameter_has_default"] for p in api["/generate"]["parameters"])


def test_the_docs_name_every_endpoint_with_its_arguments(client):
    page = (Path(__file__).parents[2] / "docs" / "page.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| `/")]
    told = {
        name: re.findall("`([a-z_0-9]+)`", words) for names, words in rows for name in re.findall("/[a-z_]+", names)
    }
    told["/grid"] += told["/generate"]
    api = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert told == {name: [p["parameter_name"] for p in facts["parameters"]] for name, facts in api.items()}
    needed = {
        p["parameter_name"] for facts in api.values() for p in facts["parameters"] if not p["parameter_has_default"]
    }
    assert needed == {"photos", "class_word", "file", "run"}


def test_a_fixed_cookie_finds_its_run_and_its_adapter_again(served):
    (run := served.ctx.runs_dir / "lasting").mkdir()
    shutil.copy(served.ctx.catalog.path("dog"), run / "pytorch_lora_weights.safetensors")
    Job(run, visitor_id(SimpleNamespace(cookies={COOKIE: secret_of("a-secret")})), 1, 0.0).save()
    for _ in range(2):
        mine = Client(served.url, verbose=False, headers=cookie_of("a-secret"))
        assert mine.predict("lasting", api_name="/train_status")["run"] == "lasting"
        assert "lasting" in [row["name"] for row in mine.predict(api_name="/adapters")]
    with pytest.raises(AppError, match="no run"):
        Client(served.url, verbose=False).predict("lasting", api_name="/train_status")
    shutil.rmtree(run)


def test_a_picture_is_the_pipelines_own_and_carries_its_recipe(client, served):
    gallery, seed, status = client.predict(
        "a sks dog", adapter="dog", scale=0.5, seed=7, num_images=2, **FAST, api_name="/generate"
    )
    first, second = files_of(gallery)
    assert seed == 7 and "2 pictures" in status
    recipe = read_recipe(second)
    assert (recipe.params.seed, recipe.params.adapters, recipe.provenance.base) == (8, (("dog", 0.5),), "model")
    params = GenerationParams.from_png(first)
    events = served.ctx.pipeline().generate(params)
    expected = next(np.asarray(event.pixels) for event in events if isinstance(event, Image))
    assert np.array_equal(np.asarray(PIL.Image.open(first)), expected)


def test_pictures_arrive_one_by_one(client):
    job = client.submit("a sks dog", num_images=3, seed=1, **FAST, api_name="/generate")
    job.result(timeout=60)
    counts = [len(output[0]) for output in job.outputs() if isinstance(output[0], list)]
    assert {1, 2, 3} <= set(counts) and counts == sorted(counts)


def test_a_preview_and_the_time_left_are_shown_while_it_draws(client):
    job = client.submit("a sks dog", steps=60, api_name="/generate")
    job.result(timeout=600)
    states = [output[2] for output in job.outputs()]
    assert any("data:image/jpeg" in state and " of 60" in state and " left" in state for state in states)


def test_several_adapters_act_together(client):
    gallery, _, _ = client.predict(
        "a sks dog", adapter="dog", scale=0.5, adapter_3="cat", scale_3=0.2, **FAST, api_name="/generate"
    )
    recipe = read_recipe(files_of(gallery)[0])
    assert recipe.params.adapters == (("dog", 0.5), ("cat", 0.2)) and len(recipe.provenance.adapter_sha256) == 2


def test_a_negative_seed_is_drawn_and_told(client):
    seeds = {client.predict("a dog", **FAST, api_name="/generate")[1] for _ in range(2)}
    assert len(seeds) == 2 and min(seeds) >= 0


def test_comparison_is_without_then_with_at_one_seed(client):
    (without, with_dog), _ = client.predict("a dog", adapter="dog", seed=5, **FAST, api_name="/compare")
    assert read_recipe(without).params.adapters == () and read_recipe(with_dog).params.adapters == (("dog", 1.0),)
    assert read_recipe(without).params.seed == read_recipe(with_dog).params.seed == 5


def test_a_grid_is_one_png_with_its_axes(client):
    sheet, _ = client.predict("scale", "0, 1", "seed", "1, 2", "a dog", adapter="dog", **FAST, api_name="/grid")
    with PIL.Image.open(sheet) as image:
        assert json.loads(image.info["dreambooth_moslora_grid"]) == {"scale": [0.0, 1.0], "seed": [1, 2]}
        assert image.width > 2 * 64 and image.height > 2 * 64


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": "a", "adapter": "rex"}, "no adapter rex"),
        ({"prompt": "a", "steps": 0}, "minimum value 1"),
        ({"prompt": "a", "num_images": 9}, "maximum value 8"),
        ({"prompt": "a", "size": "big"}, "size"),
        ({"prompt": "a", "size": "60000 x 60000"}, "60000"),
        ({"prompt": "a", "size": "1024 x 1024"}, "at most 128 x 128 px"),
        ({"prompt": "a", "guidance_scale": 99}, "Guidance: Value 99 is greater than maximum value"),
        ({"prompt": "a", "scale": None}, "Adapter scale must be a number, not None"),
        ({"prompt": "a", "steps": "many"}, "Steps must be a number, not 'many'"),
        ({"prompt": "a", "seed": [1]}, "Seed must be a number, not [1]"),
        ({"prompt": "a", "size": [64, 64]}, "size [64, 64] is not understood"),
        ({"prompt": "a", "size": 64.5}, "size 64.5 is not understood"),
    ],
)
def test_mistakes_are_told_in_words(client, arguments, words):
    with pytest.raises(Exception) as error:
        client.predict(**arguments, api_name="/generate")
    assert words in str(error.value)


@pytest.mark.parametrize("endpoint", ["/train_status", "/stop_training", "/resume_training"])
@pytest.mark.parametrize("run", [None, 5, ["dog"], {}, "../dog"])
def test_what_is_no_name_of_a_run_is_told_in_words(client, endpoint, run):
    with pytest.raises(AppError, match="cannot be the name of a run"):
        client.predict(run, api_name=endpoint)


@pytest.mark.parametrize("name, value", [("steps", "x"), ("seed", [1]), ("rank", {"a": 1})])
def test_a_training_number_that_is_none_is_told_in_words(client, name, value):
    with pytest.raises(AppError, match=f"{name.capitalize()} must be a number"):
        client.predict(photos=[], token="sks", class_word="dog", **{name: value}, api_name="/estimate")


def told(served, endpoint: str, text: str) -> str:
    """The error after JSON that the Python client itself would not send."""
    headers = {"Content-Type": "application/json"}
    asked = httpx.post(f"{served.url}gradio_api/call/v2/{endpoint}", content=text, headers=headers)
    return httpx.get(f"{served.url}gradio_api/call/{endpoint}/{asked.json()['event_id']}", timeout=60).text


@pytest.mark.parametrize(
    "endpoint, arguments, words",
    [
        ("generate", '{"prompt": "a", "seed": NaN}', "Seed must be a number, not nan"),
        ("generate", '{"prompt": "a", "seed": Infinity}', "Seed must be a number, not inf"),
        ("generate", '{"prompt": "a", "num_images": NaN}', "must be a whole number, not nan"),
        ("generate", '{"prompt": "a", "adapter": "\\ud800"}', "There is no adapter \\\\ud800"),
        ("generate", '{"prompt": "a \\ud800"}', "which is not a character"),
        ("estimate", '{"photos": [], "token": "s", "class_word": "d", "rank": NaN}', "Rank must be a number"),
        ("stop_training", '{"run": "\\ud800"}', "cannot be the name of a run"),
    ],
)
def test_json_of_another_kind_is_told_in_words(served, endpoint, arguments, words):
    assert words in told(served, endpoint, arguments)


def test_an_emptied_seed_is_a_drawn_one(client):
    seeds = {client.predict("a dog", seed=None, **FAST, api_name="/generate")[1] for _ in range(2)}
    assert len(seeds) == 2 and min(seeds) >= 0


def test_stop_ends_only_ones_own_work(served, client):
    other = Client(served.url, verbose=False)
    mine = client.submit("a dog", steps=60, num_images=8, api_name="/generate")
    while not mine.outputs():
        time.sleep(0.02)
    other.predict(api_name="/stop")
    time.sleep(0.3)
    assert not mine.done()
    client.predict(api_name="/stop")
    gallery, _, status = mine.result(timeout=30)
    assert "Stopped" in status and len(gallery) < 8


def test_several_visitors_share_a_queue_and_each_gets_its_own(served):
    def ask(number: int) -> tuple[int, list]:
        client = Client(served.url, verbose=False)
        gallery, seed, _ = client.predict(f"dog {number}", seed=number, **FAST, api_name="/generate")
        return seed, [read_recipe(file).params.prompt for file in files_of(gallery)]

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, range(6)))
    assert answers == [(n, [f"dog {n}"]) for n in range(6)]


def test_the_list_of_adapters_is_an_endpoint(client):
    assert [row["name"] for row in client.predict(api_name="/adapters")] == ["cat", "dog"]


def test_a_history_belongs_to_one_cookie(served):
    for cookie in ("first", "second", "first"):
        client = Client(served.url, verbose=False, headers=cookie_of(cookie))
        client.predict(f"a dog of {cookie}", **FAST, api_name="/generate")
    histories = {
        GenerationParams.from_png(visitor.history[0].path).prompt: len(visitor.history)
        for visitor in served.ctx.visitors._known.values()
        if visitor.history
    }
    assert histories["a dog of first"] == 2 and histories["a dog of second"] == 1


def test_an_app_error_is_no_server_error(client):
    with pytest.raises(AppError):
        client.predict("", api_name="/generate")


def test_inspect_says_what_a_picture_and_an_adapter_are(client, served):
    gallery, _, _ = client.predict("a dog in space", adapter="dog", seed=4, **FAST, api_name="/generate")
    picture = client.predict(handle_file(files_of(gallery)[0]), api_name="/inspect")
    assert "a dog in space" in picture and served.ctx.pipeline().adapters["dog"].sha256 in picture
    adapter = client.predict(handle_file(served.ctx.catalog.path("cat")), api_name="/inspect")
    assert "Rank" in adapter and "4" in adapter


def test_a_run_answers_with_its_name_and_state_and_takes_what_is_not_said_from_the_recipe(
    client, served, tmp_path, monkeypatch
):
    started: list[dict] = []
    run_of = lambda name, config, owner: started.append(config) or Job(tmp_path / name, owner, 1, 0.0)  # noqa: E731
    monkeypatch.setattr(served.ctx.jobs, "start", run_of)
    PIL.Image.effect_noise((120, 100), 80).convert("RGB").save(tmp_path / "a.png")
    run, status = client.predict(photos=[handle_file(tmp_path / "a.png")], class_word="hen", api_name="/train")
    shutil.rmtree(served.ctx.runs_dir / "hen")
    assert run["value"] == "hen" and "is starting" in status
    assert (started[0]["rank"], started[0]["prior"], started[0]["exposures_per_photo"]) == (16, "adapter_off", 320)


def test_a_run_of_two_subjects_is_started_by_a_program(client, served, tmp_path, monkeypatch):
    started: list[dict] = []
    run_of = lambda name, config, owner: started.append(config) or Job(tmp_path / name, owner, 1, 0.0)  # noqa: E731
    monkeypatch.setattr(served.ctx.jobs, "start", run_of)
    files = []
    for number in range(3):
        PIL.Image.effect_noise((120, 100 + number), 80).convert("RGB").save(tmp_path / f"{number}.png")
        files.append(handle_file(tmp_path / f"{number}.png"))
    words = {"class_word": "hen", "subjects": 2, "class_word_2": "cat"}
    run, _ = client.predict(photos=files[:1], photos_2=files[1:], **words, api_name="/train")
    assert run["value"] == "hen-cat"
    found = [(table["instance_prompt"], Path(table["instance_data_dir"])) for table in started[0]["subjects"]]
    assert [prompt for prompt, _ in found] == ["a photo of a sks hen", "a photo of a zwx cat"]
    assert [len(list(folder.iterdir())) for _, folder in found] == [1, 2]
    shutil.rmtree(served.ctx.runs_dir / "hen-cat")
    with pytest.raises(AppError, match="With class_word_2, subjects must be at least 2"):
        client.predict(photos=files[:1], **words | {"subjects": 1}, api_name="/estimate")


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("memory", "little", "Memory: Value: little is not in the list of choices"),
        ("prior", [1], "Kept by"),
        ("prior_weight", "x", "The prior weight must be a number"),
        ("unmasked_weight", 7, "Weight outside the mask: Value 7 is greater than maximum"),
        ("scores", "perhaps", "Scores must be true or false"),
        ("make_masks", 5, "Make_masks must be true or false"),
    ],
)
def test_a_training_setting_that_is_none_is_told_in_words(client, tmp_path, name, value, words):
    PIL.Image.effect_noise((120, 100), 80).convert("RGB").save(tmp_path / "a.png")
    with pytest.raises(AppError) as error:
        client.predict(photos=[handle_file(tmp_path / "a.png")], class_word="x", **{name: value}, api_name="/estimate")
    assert words in str(error.value)


def test_an_estimate_names_steps_and_memory(client, tmp_path):
    PIL.Image.effect_noise((120, 100), 80).convert("RGB").save(tmp_path / "a.png")
    cost = client.predict(
        photos=[handle_file(tmp_path / "a.png")],
        token="sks",
        class_word="dog",
        steps=7,
        api_name="/estimate",
    )
    assert "7 steps" in cost and "GiB" in cost and str(tmp_path) not in cost
