"""Fixtures shared by the tests. No test reaches the network."""

import gc
import logging
import os
import sys
from collections import Counter
from importlib.util import find_spec

os.environ["HF_HUB_OFFLINE"] = "1"
# as the programs do: waiting threads do not spin
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers.ports import find_free_port

TESTS = Path(__file__).parent
LONGEST = (
    "ui/test_browser.py",
    "training/test_selftest.py",
    "training/test_resume.py",
    "training/test_processes.py",
    "docs/test_notebook.py",
    "extras/cluster/test_ray_fleet.py",
    "training/test_run_advice.py",
    "extras/cluster/test_fleet.py",
    "ui/train/test_train_form.py",
    "extras/serving/test_ray_serve.py",
    "test_wheel.py",
)
"""Files whose slow tests take half a minute or more, by `python -m pytest -m slow --durations=0`.
"""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Put the files of `LONGEST` first, then those of most tests, as pytest-xdist does.

    So no worker is left alone with a long file at the end. A file's own order stays.
    """
    rank = {TESTS / name: number for number, name in enumerate(LONGEST)}
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: (rank.get(item.path, len(rank)), -counts[item.path]))


def pytest_runtest_setup(item):
    """Skip a test whose extra is missing, before its fixtures.

    The extra's modules are not imported: Ray reads the environment on import.
    """
    modules = {name for mark in item.iter_markers("extra") for name in mark.args}
    if missing := sorted(name for name in modules if find_spec(name) is None):
        pytest.skip(f"not installed: {', '.join(missing)}")


@pytest.fixture(autouse=True, scope="module")
def nothing_to_collect_twice():
    """Freeze the million objects of libraries, which each collection would visit: a quarter of a
    training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def only_its_own_log():
    """Remove the log handlers that a program in this process has added."""
    root = logging.getLogger()
    before, level = set(root.handlers), root.level
    yield
    root.setLevel(level)
    for handler in set(root.handlers) - before:
        root.removeHandler(handler)


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that torch.cuda has one GPU with so much free, and so much used by this process."""
    import torch

    def install_gpu(
        major: int,
        free_gib: float = 80,
        own_gib: float = 0,
        name: str = "Some Card <3",
        minor: int = 0,
    ) -> None:
        facts = SimpleNamespace(name=name, major=major, minor=minor, total_memory=80 * 2**30)
        answers = {
            "is_available": True,
            "current_device": 0,
            "device_count": 1,
            "get_device_name": name,
            "get_device_capability": (major, minor),
            "get_device_properties": facts,
            "mem_get_info": (int(free_gib * 2**30), 80 * 2**30),
            "memory_reserved": int(own_gib * 2**30),
            "_check_bf16_tensor_supported": True,  # by emulation
        }
        for function, answer in answers.items():
            monkeypatch.setattr(torch.cuda, function, lambda *_, answer=answer, **__: answer)

    return install_gpu


@pytest.fixture
def apple(monkeypatch):
    """Pretend that this is a Mac of 32 GB with macOS 14, where Metal gives a process 21.3 GiB."""
    import torch

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.backends.mps, "is_macos_or_newer", lambda major, minor: (major, minor) <= (14, 0)
    )
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: int(21.3 * 2**30))
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 0)


@pytest.fixture
def windows(monkeypatch):
    """Give this process and its children Windows' answers (see `tests/helpers/windows.py`)."""
    from tests.helpers.windows import CHILDREN, answer_as_windows

    for name, value in CHILDREN.items():
        monkeypatch.setenv(name, value)
    answer_as_windows(monkeypatch)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """Return a diffusers folder with a random SDXL pipeline of 64 px (see
    `tests/helpers/tiny.py`)."""
    from tests.helpers.tiny import save_tiny_sdxl

    return save_tiny_sdxl(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def few_steps():
    """Generate images in two denoising steps."""
    from tests.helpers.tiny import few_steps

    with few_steps():
        yield


@pytest.fixture
def subject(tiny_base):
    """Return the tiny base as a SubjectPipeline without adapters."""
    from dreambooth_moslora.generation.pipeline import SubjectPipeline

    return SubjectPipeline.from_base(tiny_base)


@pytest.fixture(scope="module")
def state(tiny_base):
    """Return a good LoRA for the tiny base in PEFT's naming."""
    from diffusers import UNet2DConditionModel

    from tests.helpers.tiny_adapters import random_lora

    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    return {f"unet.{key}": value for key, value in random_lora(unet, seed=1).items()}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Return random encoders of fidelity (see `tests/helpers/tiny_encoders.py`)."""
    from tests.helpers.tiny_encoders import tiny_encoders

    return tiny_encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def dog(tmp_path_factory):
    """Return one live adapter on all three components, its raw file and both published files."""
    from dreambooth_moslora.disk.run_folder import RAW_NAME
    from dreambooth_moslora.lora.raw_file import save_raw
    from dreambooth_moslora.lora.writer import publish
    from tests.helpers.live_adapters import facts_of, live

    folder, components = tmp_path_factory.mktemp("dog"), live(with_text=True)
    facts = facts_of(components)
    save_raw(components, folder / RAW_NAME, facts)
    return folder, components, publish(components, folder, "dog", facts)


@pytest.fixture(scope="module")
def served(tiny_base, tmp_path_factory):
    """Serve the page on a port of the loopback, with an adapter named dog."""
    from tests.helpers.ui_server import serve

    with serve(tiny_base, tmp_path_factory.mktemp("app")) as server:
        yield server


@pytest.fixture
def client(served):
    """Return a client of the page without a cookie."""
    from gradio_client import Client

    return Client(served.url, verbose=False)


@pytest.fixture
def free_port() -> int:
    return find_free_port()
