"""What can be known of a GPU without one, by trainings on a GPU written in Python
(`tests.helpers.python_gpu`); and the self-test, which finds there what it is told to find, on the
CPU, and where a run fails."""

import json
import math
import re
import shutil
import subprocess
import sys
from subprocess import PIPE

import pytest
from torch.utils import backend_registration

from benchmarks.precision import build_bf16_accelerator
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.extras.lab import selftest
from dreambooth_moslora.extras.lab.full_step import build_random_inputs
from dreambooth_moslora.extras.lab.selftest import CPU_ENV, PROGRAM, Finding, SelfTest
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training import loop
from dreambooth_moslora.training.step import TrainStep
from tests.helpers.tiny_training import logged, tiny_config
from tests.training.conftest import ROOT, start

HAS_PYTHON_DEVICES = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
DEVICE = "tests.helpers.on_python_gpu"


def test_selftest_compares_losses_and_reports_failures(tmp_path):
    far = [([1.0, 2.0], 0.0), ([1.0, 2.2], 0.1), ([1.0], math.inf), ([1.0, math.nan], math.inf)]
    for losses, difference in far:
        assert selftest.compute_largest_difference(losses, [1.0, 2.0]) == pytest.approx(difference)
    page = selftest.format_page(
        {"torch": "2.13"}, [Finding("resumed", False, "other bytes than an unbroken run")]
    )
    assert (
        "| resumed | **no** | other bytes than an unbroken run |" in page
        and "- torch: 2.13" in page
    )
    program = (
        sys.executable,
        "-c",
        "import sys; print('loading'); sys.exit('error: the GPU has gone')",
    )
    with pytest.raises(UserError, match="first: exit code 1: error: the GPU has gone"):
        SelfTest(tmp_path, program=program).run_command("first", [*program, "train"])


RESUMED = {"sound": ("aaa", True), "a defect": ("aab", False), "chance": ("abcc", True)}
RESUMED |= {"a defect beside chance": ("abcd", False)}


@pytest.mark.parametrize(("weights", "holds"), RESUMED.values(), ids=RESUMED)
def test_a_run_that_is_resumed_is_judged_beside_two_equal_runs(
    weights, holds, tmp_path, monkeypatch
):
    """By the tensors without the header; where equal runs differ, by runs that are told to sum in
    one order."""
    calls = []
    monkeypatch.setattr(
        SelfTest, "train", lambda self, name, **changes: calls.append((name, changes))
    )
    names = (
        ("device_no", "again", "resumed")
        if len(weights) == 3
        else ("device_no", "again", "exact", "resumed")
    )
    for name, tensors in zip(names, weights):
        (tmp_path / name).mkdir()
        header = json.dumps({"__metadata__": {"name": name}}).encode()
        content = len(header).to_bytes(8, "little") + header + tensors.encode()
        (tmp_path / name / "pytorch_lora_weights.safetensors").write_bytes(content)
    repeated, resumed = SelfTest(tmp_path).check_resume()
    assert repeated.holds and ("other bytes" in repeated.line) == (len(weights) == 4)
    assert resumed.holds == holds and all(
        "deterministic" in call_settings for name, call_settings in calls[1:]
    ) == (len(weights) == 4)


def test_a_step_that_fp16_skips_is_no_loss(tmp_path):
    steps = [
        {"type": "step", "loss": math.inf, "skipped": True},
        {"type": "step", "loss": 0.5, "skipped": False},
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f"{json.dumps({'time': 0, **step})}\n" for step in steps)
    )
    assert selftest.read_losses(RunDir(tmp_path)) == [0.5]


@pytest.mark.slow
def test_compiled_blocks_are_compared_and_so_are_two_processes(tmp_path, monkeypatch):
    """By inductor on the CPU, in two steps. accelerate takes the words for two GPUs, and gloo."""
    monkeypatch.setattr(selftest, "TRAIN_STEPS", 2)
    test = SelfTest(tmp_path, env=CPU_ENV, launcher=selftest.TWO_GPU_COMMAND)
    test.train("device_no")
    finding = test.check_cards()
    assert finding.holds and finding.line.startswith("2 losses of two processes"), finding
    if shutil.which("g++"):
        finding = test.check_compiled()
        assert finding.holds and finding.line.startswith("losses with compiled blocks, at most "), (
            finding
        )
        assert "transformer blocks compiled" in (tmp_path / "compiled.log").read_text()


def test_a_step_of_full_size_is_left_out_where_memory_is_short(tmp_path):
    finding = SelfTest(tmp_path, env=CPU_ENV).measure_step(4.0)
    assert finding.holds and finding.line.startswith(
        "left out: 4.0 GiB are free; --memory at 512 px needs full "
    )


@pytest.mark.slow
def test_step_is_measured_in_its_own_process(tmp_path):
    step = SelfTest(tmp_path, env=CPU_ENV, compiles=True).measure_step(99.0, size="small")
    assert step.holds and "(full); --memory at 512 px needs" in step.line, step
    numbers = re.match(r"([\d.]+) s at 512 px, the floor ([\d.]+) s, peak ([\d.]+) GiB", step.line)
    assert all(0 < float(number) < 100 for number in numbers.groups())


def test_random_materials_have_all_that_a_step_reads():
    config = TrainConfig.from_dict({"resolution": 64, "rank": 2, "mixed_precision": "bf16"})
    step = TrainStep(
        config, build_random_inputs("small", 64), build_bf16_accelerator(), max_train_steps=1
    )
    update = step.update_adapter(step.accumulate_gradients())
    assert 0 < update.total < 10 and update.grad_norm > 0


@pytest.mark.slow
def test_selftest_passes_on_the_python_gpu_or_cpu(tmp_path):
    """Beside one training on the CPU. The picture is drawn on the CPU in both cases."""
    program = (sys.executable, "-m", DEVICE) if HAS_PYTHON_DEVICES else PROGRAM
    findings = {
        finding.name: finding for finding in SelfTest(tmp_path, program=program).run_tests()
    }
    assert list(findings) == ["losses, fp32", "published", "repeated", "resumed", "generated"]
    assert all(finding.holds for finding in findings.values()), findings
    far = float(re.search(r"at most (\S+) from", findings["losses, fp32"].line)[1])
    assert far < 1e-4


ATTENTION, CONVOLUTIONS = (
    ["to_q", "to_k", "to_v", "to_out.0"],
    ["to_q", "conv1", "ff.net.0.proj", "ff.net.2"],
)
PRIOR = {"with_prior_preservation": True, "prior": "adapter_off"}
PRODIGY = {"optimizer": "Prodigy", "learning_rate": 1.0}
ACCUMULATED = {"snr_gamma": 5.0, "gradient_accumulation_steps": 2}
TRAININGS = {
    "plain": {"target_modules": ATTENTION},
    "text encoders, recomputed": {"train_text_encoder": True, "gradient_checkpointing": True},
    "bf16": {"mixed_precision": "bf16", "target_modules": ATTENTION},
    "min-SNR, accumulated": ACCUMULATED,
    "prior of the base": PRIOR | {"target_modules": ATTENTION},
    "one image after the other": PRIOR | {"images_at_once": 1, "use_dora": True} | PRODIGY,
    "class images": {"with_prior_preservation": True},
    "convolutions, feed-forward blocks recomputed": {
        "target_modules": CONVOLUTIONS,
        "recompute_feed_forward": True,
    },
    "EDM, uncached": {"do_edm_style_training": True, "caching": "off"},
    "samples": {"num_validation_images": 1, "validation_steps": 2},
}
COUNTED = ("plain", "prior of the base", "class images", "min-SNR, accumulated")
"""Each wait leaves the GPU idle until the program has handed it the next kernels: the loss alone is
read. And each micro-batch is sent at once."""


STAND_IN = """
import os, torch
from tests.helpers.python_gpu import DEVICE, Watch
rows, table = torch.tensor([1, 0]), torch.arange(3.0)
far, there = rows.to(DEVICE), table.to(DEVICE)
faults = {
    "a table of the CPU": lambda: table[far],
    "a change of one": lambda: table.index_put_((far,), there[:2]),
    "two devices": lambda: table + there,
    "a copy that nobody waits for": lambda: table.to(DEVICE, non_blocking=True),
    "numpy": lambda: there.numpy(),
}
let_through = []
for name, fault in faults.items():
    try:
        let_through.append((name, fault()))
    except (RuntimeError, TypeError):
        pass
with Watch() as seen:
    there[rows].sum().item()
print(let_through, dict(seen.waits), dict(seen.copies), flush=True)
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_PYTHON_DEVICES, reason="this PyTorch has no devices written in Python")
def test_the_stand_in_refuses_what_a_card_refuses():
    """Of a table on the CPU, indexed by numbers on the device, it once made a tensor of the
    device."""
    output = subprocess.check_output([sys.executable, "-c", STAND_IN], text=True, cwd=ROOT)
    assert output.splitlines()[-1] == "[] {'backward': 1} {}", output


@pytest.fixture(scope="module")
def run_on_device(tiny_base, photos, tmp_path_factory, few_steps):
    """Train two steps in a process with such a GPU, as starting one costs more than a training; the
    losses of the steps, and what the last micro-batch did. Equal trainings are made once."""
    if not HAS_PYTHON_DEVICES:
        pytest.skip("this PyTorch has no devices written in Python")
    folder, command, answers = tmp_path_factory.mktemp("device"), [sys.executable, "-m", DEVICE], {}
    with (
        (folder / "stderr.txt").open("w") as errors,
        subprocess.Popen(
            command, cwd=ROOT, stdin=PIPE, stdout=PIPE, stderr=errors, text=True
        ) as process,
    ):

        def run(**changes) -> dict:
            request = {
                "base": str(tiny_base),
                "photos": str(photos),
                "output": str(folder / f"gpu_{len(answers)}"),
            }
            if (key := json.dumps(changes)) not in answers:
                process.stdin.write(
                    json.dumps(request | {"changes": {"max_train_steps": 2} | changes}) + "\n"
                )
                process.stdin.flush()
                answer = process.stdout.readline()
                assert answer, f"the process ended: {(folder / 'stderr.txt').read_text()[-3000:]}"
                answers[key] = json.loads(answer)
            assert "error" not in answers[key], answers[key]["error"]
            return answers[key]

        yield run


@pytest.mark.slow
@pytest.mark.parametrize("training", TRAININGS)
def test_device_training_equals_cpu_and_syncs_once_a_step(
    run_on_device, tiny_base, photos, tmp_path, training
):
    """The losses of two steps; bf16 rounds in another order there."""
    settings = TRAININGS[training]
    device_run = run_on_device(**settings)
    loop.train(tiny_config(tiny_base, photos, tmp_path / "cpu", max_train_steps=2, **settings))
    expected = [event["loss"] for event in logged(tmp_path / "cpu")]
    assert device_run["losses"] == pytest.approx(
        expected, rel=1e-2 if "mixed_precision" in settings else 1e-5
    )
    if training in COUNTED:
        assert sum(device_run["waits"].values()) == 0, device_run["waits"]
        assert sum(device_run["update_waits"].values()) == 1, device_run["update_waits"]
        assert sum(device_run["copies"].values()) == settings.get(
            "gradient_accumulation_steps", 1
        ), device_run["copies"]


@pytest.mark.slow
def test_two_device_processes_equal_two_micro_batches(
    run_on_device, tiny_base, photos, tmp_path, free_port
):
    alone, half = (
        run_on_device(**ACCUMULATED),
        ACCUMULATED | {"max_train_steps": 2, "gradient_accumulation_steps": 1},
    )
    request = {
        "base": str(tiny_base),
        "photos": str(photos),
        "output": str(tmp_path / "two"),
        "changes": half,
    }
    (tmp_path / "two.json").write_text(json.dumps(request))
    command = [sys.executable, "-m", DEVICE, str(tmp_path / "two.json")]
    ended = [
        process.communicate(timeout=600)[1]
        for process in [start(command, rank, 2, free_port) for rank in (0, 1)]
    ]
    for rank in (0, 1):
        results = json.loads((tmp_path / f"two.{rank}").read_text())
        assert results.get("losses") == pytest.approx(alone["losses"], rel=1e-4), (results, ended)
        assert sum(results["waits"].values()) <= 2 and sum(results["update_waits"].values()) <= 2, (
            results
        )


@pytest.mark.slow
def test_fp16_that_overflows_on_the_device_makes_the_step_again(run_on_device):
    """The scaler asks the device once whether a gradient is infinite, and the losses are read with
    the norm."""
    device_run, usual = run_on_device(fp16_scale=2.0**23), run_on_device(mixed_precision="bf16")
    assert device_run["skipped"] > 2 and len(device_run["losses"]) == 2
    assert device_run["losses"] == pytest.approx(usual["losses"], rel=2e-2)
    assert sum(device_run["update_waits"].values()) <= 2, device_run["update_waits"]


@pytest.mark.slow
def test_small_card_encodes_photos_in_tiles_before_prompts(
    run_on_device,
):
    """Together they were the peak of a small card: the UNet comes last."""
    short, usual = run_on_device(free_gib=0.005), run_on_device(**TRAININGS["plain"])
    parts = {"fill_latents_cache": ["vae"], "fill_text_cache": ["text_encoder", "text_encoder_2"]}
    assert short["encoded"] == usual["encoded"] == parts
    assert (short["side_px"], usual["side_px"]) == (32, 64) and len(short["losses"]) == 2
