"""The heavy libraries are imported by one thread at a time, and a base that could not be loaded is tried again."""

import json
import subprocess
import sys
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace

import pytest

from dreambooth_moslora.core import UserError
from dreambooth_moslora.ui.state import AppContext
from tests.helpers.tiny_adapters import save_diffusers_lora

UI = Path(__file__).parents[2] / "dreambooth_moslora" / "ui"
INSPECTED_WHILE_LOADING = '''
"""Inspect an adapter as soon as the loading of the base imports its first library; count who imported."""
import argparse, json, sys, threading
from dreambooth_moslora.ui import app
from dreambooth_moslora.ui.page import adapter_facts

imports, begun = [], threading.Event()

class Spy:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "diffusers", "transformers", "peft"):
            imports.append(threading.get_ident())
            begun.set()

sys.meta_path.insert(0, Spy())
parser = argparse.ArgumentParser()
app.add_arguments(parser)
args = parser.parse_args(["--base", sys.argv[1], "--runs_dir", sys.argv[2]])
ctx = app.context_of(args, training=True)
begun.wait(60)
facts = dict(adapter_facts(sys.argv[3]))
ctx.pipeline()
ctx.visitors.close()
print(json.dumps({"mine": imports.count(threading.get_ident()), "all": len(imports), "facts": len(facts)}))
'''


@pytest.mark.slow
def test_an_adapter_inspected_while_the_base_loads_shares_no_import_with_it(tiny_base, subject, tmp_path):
    adapter = save_diffusers_lora(subject.pipeline.unet, tmp_path / "made", seed=1)
    adapter = adapter.rename(tmp_path / "dog.safetensors")
    command = [sys.executable, "-c", INSPECTED_WHILE_LOADING, tiny_base, tmp_path / "runs", adapter]
    done = subprocess.run(command, capture_output=True, text=True, cwd=UI.parents[1], check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["facts"] and found["all"] and found["mine"] == 0


@pytest.fixture
def context(tmp_path):
    made = []

    def make(load) -> AppContext:
        folders = {"adapters_dir": tmp_path / "adapters", "runs_dir": tmp_path / "runs"}
        made.append(AppContext(load, base="x", base_name="x", resolution_px=64, training=True, **folders))
        return made[-1]

    yield make
    for ctx in made:
        ctx.visitors.close()


@pytest.mark.parametrize("error", [UserError("not yet"), RuntimeError("half an import")])
def test_a_base_that_could_not_be_loaded_is_tried_again_by_the_next_who_asks(context, error):
    found, tries = SimpleNamespace(), []

    def load():
        tries.append(1)
        if len(tries) < 3:
            raise error
        return found

    ctx = context(load)
    wait([ctx._pipeline])
    assert not ctx.loaded()
    with pytest.raises(UserError):
        ctx.pipeline()
    assert ctx.pipeline() is ctx.pipeline() is found and ctx.loaded() and len(tries) == 3
