"""On a device without fp64, as Apple's GPUs are, an adapter is folded and diagnosed on the CPU."""

import subprocess
import sys

import pytest

FOLD = """
import copy, os, sys, torch
from dreambooth_moslora.adapters.moslora import fold
from tests.adapters.test_moslora import adapted
from tests.helpers.layer_figures import diagnostics
from tests.helpers.python_gpu import DEVICE, Watch

net = adapted(lora_alpha=7, use_dora=sys.argv[1] == "dora", mixer=sys.argv[2])
wanted, figures = fold(net), diagnostics(net)
Watch.has_fp64 = False
net = copy.deepcopy(net).to(DEVICE)
try:
    found = fold(net)
    for path, layer in found.items():
        for part in ("down", "up", "magnitude"):
            one, other = getattr(layer, part), getattr(wanted[path], part)
            assert (one is None and other is None) or torch.equal(one, other), (path, part)
    assert diagnostics(net) == figures
    print("equal", flush=True)
except BaseException as error:
    print(f"{type(error).__name__}: {error}", flush=True)
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "mixer"), [("dora", "kaiming"), ("plain", "none")])
def test_an_adapter_on_a_device_without_fp64_folds_as_on_the_cpu(variant, mixer):
    run = [sys.executable, "-c", FOLD, variant, mixer]
    assert subprocess.check_output(run, text=True).strip().splitlines()[-1] == "equal"
