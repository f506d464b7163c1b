"""`--compile`: when it pays, what it leaves as it was, and that a failing compiler costs nothing."""

import shutil

import pytest
import torch
from safetensors import safe_open
from torch._inductor import config as inductor

from dreambooth_moslora.disk.events import StepDone
from dreambooth_moslora.plan.memory import speed_of
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training import step as compiled_blocks
from dreambooth_moslora.training import step as train_step
from dreambooth_moslora.training.dry_run import describe_run
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny import tiny_unet
from tests.helpers.tiny_training import adapter_sha256, paint_photos, tiny_config

LONG = {"resolution": 1024, "train_batch_size": 1}


@pytest.mark.parametrize(
    ("changes", "device", "steps", "compiled", "searches"),
    [
        ({}, "cuda", 1000, True, True),
        ({}, "cuda", 999, False, False),
        ({}, "cpu", 10**6, False, False),
        ({"resolution": 512}, "cuda", 1000, False, False),
        ({"gradient_accumulation_steps": 2}, "cuda", 500, True, True),
        ({"with_prior_preservation": True, "class_prompt": "a dog"}, "cuda", 500, True, True),
        ({"enable_bucket": True}, "cuda", 1000, True, False),
        ({"base_quantization": "nf4"}, "cuda", 1000, False, True),
        ({"compile": "off"}, "cuda", 1000, False, True),
        ({"compile": "on"}, "cpu", 1, True, False),
    ],
)
def test_only_a_long_run_on_a_gpu_is_compiled_by_itself(changes, device, steps, compiled, searches):
    speed = speed_of(TrainConfig(**{**LONG, **changes}), device, steps)
    assert (speed.compiled, speed.searches, speed.channels_last) == (compiled, searches, device == "cuda")


def test_a_dry_run_says_what_is_chosen(tiny_base, tmp_path):
    config = tiny_config(tiny_base, paint_photos(tmp_path / "photos"), tmp_path / "run", compile="on")
    assert "  speed: transformer blocks compiled (the work of 0 images of 1024 px" in describe_run(config)


def test_channels_last_is_the_same_function():
    unet, other = tiny_unet(), tiny_unet()
    train_step.make_convolutions_fast(other, speed_of(TrainConfig(), "cuda", 1))
    assert other.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    added = {"text_embeds": torch.randn(1, 32), "time_ids": torch.randn(1, 6)}
    given = torch.randn(1, 4, 8, 8), 5, torch.randn(1, 7, 48)
    plain, fast = (net(*given, added_cond_kwargs=added).sample for net in (unet, other))
    assert torch.allclose(plain, fast, atol=1e-5)
    assert not torch.backends.cudnn.benchmark


@pytest.fixture
def losses_of(tiny_base, tmp_path):
    photos = paint_photos(tmp_path / "photos")

    def run(name: str, **changes) -> list[float]:
        events = []
        torch._dynamo.reset()
        train(tiny_config(tiny_base, photos, tmp_path / name, **{"max_train_steps": 2, **changes}), events.append)
        return [event.loss for event in events if isinstance(event, StepDone)]

    return run


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@torch.no_grad()
def test_a_block_by_inductor_computes_the_same():
    """It stands before the test without a compiler, which inductor remembers."""
    block = tiny_unet().mid_block.attentions[0].transformer_blocks[0]
    x, text = torch.randn(1, 16, 32), torch.randn(1, 7, 48)
    plain = block(x, encoder_hidden_states=text)
    block.compile(backend=compiled_blocks.BACKEND)
    assert torch.allclose(block(x, encoder_hidden_states=text), plain, atol=1e-5)


@pytest.mark.slow
def test_compiled_losses_are_those_without_and_so_is_what_is_saved(losses_of, tmp_path, monkeypatch):
    """Traced, differentiated ahead of time, and run operation by operation: inductor would take minutes here."""
    monkeypatch.setattr(compiled_blocks, "BACKEND", "aot_eager")
    prior = {"with_prior_preservation": True, "prior": "adapter_off", "gradient_checkpointing": True}
    settings = {**prior, "enable_bucket": True, "target_modules": ("to_q", "to_k", "to_v", "conv1")}
    plain, compiled = losses_of("plain", **settings), losses_of("compiled", compile="on", **settings)
    assert compiled == pytest.approx(plain, rel=1e-5)
    names = []
    for run in ("plain", "compiled"):
        with safe_open(tmp_path / run / "last" / "moslora_weights.safetensors", "pt") as file:
            names.append(sorted(file.keys()))
    assert names[0] == names[1] and not any("_orig_mod" in name for name in names[1])


@pytest.mark.slow
def test_a_compiler_that_is_missing_costs_nothing(losses_of, tmp_path, caplog):
    """PyTorch's own patch gives its settings back; after pytest's, a setting "does not exist" any more."""
    with inductor.patch({"cpp.cxx": ("/nowhere/g++",), "force_disable_caches": True}):
        plain, failed = losses_of("plain"), losses_of("failed", compile="on")
    assert failed == plain and adapter_sha256(tmp_path / "failed") == adapter_sha256(tmp_path / "plain")
    lines = [record.getMessage() for record in caplog.records if "goes on without" in record.getMessage()]
    assert len(lines) == 1 and "\n" not in lines[0] and "/nowhere/g++" in lines[0]
