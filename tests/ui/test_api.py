"""API of the page through gradio_client: names, streaming, stopping, several clients, mistakes."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import PIL.Image
import pytest
from gradio_client import Client, handle_file

from dreambooth_moslora.generation.image_params import GenerationParams, Image, read_recipe

FAST = {"steps": 3, "guidance_scale": 2.0}
DRAW = FAST | {"api_name": "/generate"}
IMAGE_ARGUMENTS = [
    "prompt",
    "negative_prompt",
    "adapter",
    "scale",
    "seed",
    "steps",
    "guidance_scale",
    "size",
    "num_images",
    "scheduler",
]


def list_files(gallery) -> list[str]:
    return [item["image"] for item in gallery]


def test_api_names_and_arguments_match_the_docs(client):
    api = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    arguments = {
        name.lstrip("/"): [p["parameter_name"] for p in facts["parameters"]]
        for name, facts in api.items()
    }
    expected = {
        ("generate", "compare"): IMAGE_ARGUMENTS,
        ("adapters", "stop"): [],
        ("inspect",): ["file"],
    }
    assert arguments == {
        name: parameters_text for names, parameters_text in expected.items() for name in names
    }
    parameters = [p for facts in api.values() for p in facts["parameters"]]
    needed = {p["parameter_name"] for p in parameters if not p["parameter_has_default"]}
    assert needed == {"file"}
    page = (Path(__file__).parents[2] / "docs" / "page.md").read_text(encoding="utf-8")
    lines = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| `/")]
    documented = {
        name: re.findall("`([a-z_0-9]+)`", parameters_text)
        for names, parameters_text in lines
        for name in re.findall("/([a-z_]+)", names)
    }
    assert documented == arguments


def test_two_adapters_generate_the_pipelines_image_and_recipe(client, served):
    assert [row["name"] for row in client.predict(api_name="/adapters")] == ["cat", "dog"]
    prompt, adapter = "a sks dog <lora:cat:0.2>", {"adapter": "dog", "scale": 0.5}
    job = client.submit(prompt, seed=7, num_images=2, **adapter, **DRAW | {"steps": 30})
    gallery, seed, status = job.result(timeout=600)
    counts = [len(output[0]) for output in job.outputs() if isinstance(output[0], list)]
    assert {1, 2} <= set(counts) and counts == sorted(counts)
    states = [output[2] for output in job.outputs()]
    assert any(
        "data:image/jpeg" in state and " of 30" in state and " left" in state for state in states
    )
    first, second = list_files(gallery)
    assert seed == 7 and "2 pictures" in status
    recipe = read_recipe(second)
    assert (recipe.params.seed, recipe.params.adapters) == (8, (("dog", 0.5), ("cat", 0.2)))
    assert recipe.provenance.base == "model" and len(recipe.provenance.adapter_sha256) == 2
    params = GenerationParams.from_png(first)
    events = served.ctx.wait_for_pipeline().generate(params)
    expected = next(np.asarray(event.pixels) for event in events if isinstance(event, Image))
    assert np.array_equal(np.asarray(PIL.Image.open(first)), expected)
    facts_html = client.predict(handle_file(first), api_name="/inspect")
    assert (
        "a sks dog" in facts_html
        and served.ctx.wait_for_pipeline().adapters["dog"].sha256 in facts_html
    )
    facts_html = client.predict(
        handle_file(served.ctx.catalog.find_file("cat")), api_name="/inspect"
    )
    assert "Rank" in facts_html and "4" in facts_html


def test_negative_or_empty_seed_is_sampled(client):
    seeds = {client.predict("a dog", seed=seed, **DRAW)[1] for seed in (-1, None)}
    assert len(seeds) == 2 and min(seeds) >= 0


def test_compare_takes_the_seed_of_the_last_image(client):
    """It drew another one, so that the image just made could not be compared."""
    _, seed, _ = client.predict("a dog", adapter="dog", seed=-1, **DRAW)
    _, status = client.predict("a dog", adapter="dog", seed=-1, **FAST, api_name="/compare")
    assert f"seed {seed:.0f}" in status


def test_compare_generates_without_then_with_adapter_at_one_seed(client):
    (without, with_dog), _ = client.predict(
        "a dog", adapter="dog", seed=5, **FAST, api_name="/compare"
    )
    assert read_recipe(without).params.adapters == () and read_recipe(with_dog).params.adapters == (
        ("dog", 1.0),
    )
    assert read_recipe(without).params.seed == read_recipe(with_dog).params.seed == 5


MISTAKES = [
    ({"prompt": " "}, "prompt is empty"),
    ({"adapter": "rex"}, "no adapter rex"),
    ({"steps": 0}, "minimum value 1"),
    ({"num_images": 9}, "maximum value 8"),
    ({"size": "big"}, "size"),
    ({"size": "60000 x 60000"}, "60000"),
    ({"size": "1024 x 1024"}, "at most 128 x 128 px"),
    ({"adapter": "\ud800"}, r"There is no adapter \\ud800"),
    ({"prompt": "a \ud800"}, "which is not a character"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES)
def test_mistakes_are_reported_plainly(served, arguments, message):
    """The Python client itself would not send all of them."""
    content, headers = json.dumps({"prompt": "a"} | arguments), {"Content-Type": "application/json"}
    response = httpx.post(
        f"{served.url}gradio_api/call/v2/generate", content=content, headers=headers
    )
    events = httpx.get(
        f"{served.url}gradio_api/call/generate/{response.json()['event_id']}", timeout=60
    ).text
    assert message in events and "event: error" in events


@pytest.mark.slow
def test_clients_share_queue_and_history_but_not_results(served):
    def ask(number: int) -> tuple[int, list]:
        client = Client(served.url, verbose=False)
        gallery, seed, _ = client.predict(f"dog {number}", seed=number, **DRAW)
        return seed, [read_recipe(file).params.prompt for file in list_files(gallery)]

    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(ask, range(5))) == [(n, [f"dog {n}"]) for n in range(5)]
    prompts = {
        GenerationParams.from_png(picture.path).prompt for picture in served.ctx.workspace.history
    }
    assert prompts == {f"dog {number}" for number in range(5)}
