"""Fixtures shared by the tests. No test reaches the network."""

import gc
import logging
import os
import socket
from importlib.util import find_spec

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the programs do: waiting threads do not spin
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores

from pathlib import Path

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """After `-m` has left tests out."""
    from tests.helpers.order import longest_first

    longest_first(items)


def pytest_runtest_setup(item):
    """Before its fixtures. A module of `extra` is found and not imported: Ray reads the environment when it is."""
    needed = {name for mark in item.iter_markers("extra") for name in mark.args}
    if missing := sorted(name for name in needed if find_spec(name) is None):
        pytest.skip(f"not installed: {', '.join(missing)}")


@pytest.fixture(autouse=True, scope="module")
def nothing_to_collect_twice():
    """A worker holds a million objects of libraries, which each collection would look at: a quarter of a training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def only_its_own_log():
    """A program that ran in this process has left its handlers, with a terminal that is closed by then."""
    root = logging.getLogger()
    before, level = set(root.handlers), root.level
    yield
    root.setLevel(level)
    for handler in set(root.handlers) - before:
        root.removeHandler(handler)


@pytest.fixture
def windows(monkeypatch):
    """This process and those that it starts get Windows' answers (see `tests/helpers/windows.py`)."""
    from tests.helpers.windows import CHILDREN, answer_as_windows

    for name, value in CHILDREN.items():
        monkeypatch.setenv(name, value)
    answer_as_windows(monkeypatch)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A diffusers folder with a random SDXL pipeline of 64 px (see `tests/helpers/tiny.py`)."""
    from tests.helpers.tiny import save_tiny_sdxl

    return save_tiny_sdxl(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def few_steps():
    """Pictures in two denoising steps (see `tests/helpers/few_steps.py`)."""
    from tests.helpers.few_steps import few_steps

    with few_steps():
        yield


@pytest.fixture
def subject(tiny_base):
    """The tiny base as a SubjectPipeline without adapters."""
    from dreambooth_moslora.generation.pipeline import SubjectPipeline

    return SubjectPipeline.from_base(tiny_base)


@pytest.fixture(scope="module")
def state(tiny_base):
    """A good LoRA for the tiny base in PEFT's naming."""
    from diffusers import UNet2DConditionModel

    from tests.helpers.tiny_adapters import random_lora

    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    return {f"unet.{key}": value for key, value in random_lora(unet, seed=1).items()}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Random encoders of fidelity (see `tests/helpers/tiny_encoders.py`)."""
    from tests.helpers.tiny_encoders import tiny_encoders

    return tiny_encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def dog(tmp_path_factory):
    """One live adapter on all three components, its raw file and both published files."""
    from dreambooth_moslora.adapters.published_file import publish
    from dreambooth_moslora.adapters.raw_file import save_raw
    from dreambooth_moslora.disk.run_folder import RAW_NAME
    from tests.helpers.live_adapters import facts_of, live

    folder, components = tmp_path_factory.mktemp("dog"), live(with_text=True)
    facts = facts_of(components)
    save_raw(components, folder / RAW_NAME, facts)
    return folder, components, publish(components, folder, "dog", facts)


@pytest.fixture(scope="module")
def served(tiny_base, tmp_path_factory):
    """The page on a port of the loopback, with an adapter named dog."""
    from tests.helpers.ui_server import serve

    with serve(tiny_base, tmp_path_factory.mktemp("app")) as server:
        yield server


@pytest.fixture
def client(served):
    """A client of the page without a cookie."""
    from gradio_client import Client

    return Client(served.url, verbose=False)


@pytest.fixture
def free_port() -> int:
    """A port of the loopback that nobody has now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
