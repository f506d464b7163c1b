"""One step of the trainer, and what only makes it cheaper: working copies, cached text, compiled blocks, fp16."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch._inductor import config as inductor

from dreambooth_moslora.adapters.fast_linear import WorkingCopies
from dreambooth_moslora.base.load import TextProducts, TextProjection
from dreambooth_moslora.core import StopRequestedError, UserError
from dreambooth_moslora.disk.events import StepDone
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.plan.memory import speed_of
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training import loop
from dreambooth_moslora.training import step as compiled_blocks
from dreambooth_moslora.training import step as train_step
from dreambooth_moslora.training.dry_run import describe_run
from dreambooth_moslora.training.loop import Training, train
from dreambooth_moslora.training.step import TrainStep
from tests.helpers.tiny import tiny_unet
from tests.helpers.tiny_training import adapter_sha256, largest_difference, paint_photos, tiny_config

PRIOR = {"with_prior_preservation": True, "prior": "adapter_off"}

KINDS = {
    "prior of the base, two micro-batches": PRIOR | {"gradient_accumulation_steps": 2},
    "text encoders, recomputed": {"train_text_encoder": True, "gradient_checkpointing": True},
    "bf16": {"mixed_precision": "bf16", "mixer": "none"},
}


@pytest.fixture
def first_gradients(tiny_base, tmp_path, monkeypatch):
    """The gradients that the optimizer sees in the first step of a run, or None for a parameter without one."""
    found = []

    def note(train_step: TrainStep) -> float:
        found.append([None if p.grad is None else p.grad.clone() for p in train_step.parameters])
        raise StopRequestedError

    def of(name: str, **changes) -> list[torch.Tensor | None]:
        monkeypatch.setattr(TrainStep, "update_adapter", note)
        wide = {"target_modules": ("to_q", "to_k", "to_v", "to_out.0", "conv1")}
        train(tiny_config(tiny_base, paint_photos(tmp_path / "photos"), tmp_path / name, **wide, **changes))
        return found.pop()

    return of


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_the_optimizer_sees_the_gradients_of_a_step_without_copies(first_gradients, monkeypatch, changes):
    with_copies = first_gradients("with", **changes)
    nothing = SimpleNamespace(collect=lambda: None)
    monkeypatch.setattr(WorkingCopies, "for_one_step", lambda self: nullcontext(nothing))
    without = first_gradients("without", **changes)
    assert [g is None for g in with_copies] == [g is None for g in without]
    tolerance = 0.05 if "mixed_precision" in changes else 1e-3
    for seen, wanted in zip(with_copies, without, strict=True):
        if wanted is not None:
            assert (seen - wanted).norm() <= tolerance * wanted.norm() and seen.dtype == torch.float32
    assert any(g is not None and g.norm() > 0 for g in with_copies)


def test_a_step_walks_over_no_model(tiny_base, tmp_path, monkeypatch):
    """SDXL's UNet has 7,530 modules: to list them, or to set their mode again, took 9 and 15 ms."""
    walked, roots = [], []
    step = TrainStep.accumulate_gradients

    def watched(train_step: TrainStep):
        roots[:] = train_step.components.values() if train_step.step else ()
        losses = step(train_step)
        roots.clear()
        return losses

    def note(name: str) -> None:
        usual = getattr(nn.Module, name)

        def walk(self, *given, **named):
            walked.extend(name for root in roots if root is self)
            return usual(self, *given, **named)

        monkeypatch.setattr(nn.Module, name, walk)

    monkeypatch.setattr(TrainStep, "accumulate_gradients", watched)
    note("modules")
    note("train")
    photos = paint_photos(tmp_path / "photos")
    train(tiny_config(tiny_base, photos, tmp_path / "run", max_train_steps=2, **PRIOR))
    assert not walked


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")

BASE_PRIOR = {"with_prior_preservation": True, "prior": "adapter_off"}


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in RunDir(run).read_metrics() if event["type"] == "step"]


def trained_both_ways(tiny_base, tmp_path, **changes) -> tuple[Path, Path]:
    photos = paint_photos(tmp_path / "photos")
    for name, cached in (("live", False), ("cached", True)):
        settings = {"target_modules": ATTENTION, "max_train_steps": 3, "cache_cross_attention": cached} | changes
        train(tiny_config(tiny_base, photos, tmp_path / name, **settings))
    return tmp_path / "live", tmp_path / "cached"


@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "bf16", "gradient_checkpointing": True},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"target_modules": ("to_q", "attn2.to_v")}, marks=pytest.mark.slow),
        pytest.param({"lora_dropout": 0.1}, marks=pytest.mark.slow),
        pytest.param({"caption_dropout": 0.5, "max_train_steps": 5}, marks=pytest.mark.slow),
        pytest.param({"num_validation_images": 1, "max_train_steps": 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_one_photo_at_a_time_gives_the_same_bytes(tiny_base, tmp_path, changes):
    """On a CPU: the same products of the same shapes."""
    live, cached = trained_both_ways(tiny_base, tmp_path, **changes)
    assert losses(cached) == losses(live) and largest_difference(live, cached) == 0
    for picture in live.rglob("*.png"):
        assert (cached / picture.relative_to(live)).read_bytes() == picture.read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(BASE_PRIOR | {"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"train_batch_size": 3}, marks=pytest.mark.slow),
    ],
)
def test_several_rows_give_the_same_but_for_rounding(tiny_base, tmp_path, changes):
    live, cached = trained_both_ways(tiny_base, tmp_path, **changes)
    assert losses(cached) == pytest.approx(losses(live), rel=1e-5)
    assert largest_difference(live, cached) < 1e-4


def test_the_weights_leave_the_unet_and_a_text_of_no_prompt_has_their_products():
    unet = tiny_unet()
    added = {"text_embeds": torch.randn(1, 32), "time_ids": torch.randn(1, 6)}
    given = torch.randn(1, 4, 8, 8), 5, torch.randn(1, 7, 48)
    expected = unet(*given, added_cond_kwargs=added).sample
    numbers = sum(weight.numel() for weight in unet.parameters())
    products = TextProducts(unet, torch.device("cpu"))
    gone = sum(layer.host_weight.numel() for layer in products.layers)
    assert len(products.layers) == sum(isinstance(module, TextProjection) for module in unet.modules()) > 0
    assert sum(weight.numel() for weight in unet.parameters()) == numbers - gone
    assert all(layer.weight.untyped_storage().nbytes() <= 4 for layer in products.layers)
    assert torch.equal(unet(*given, added_cond_kwargs=added).sample, expected)


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


SETTINGS = {"max_train_steps": 3, "lr_scheduler": "linear", "adam_epsilon": 1e-5}


@pytest.fixture
def scaled(monkeypatch):
    """Make the run what `--mixed_precision fp16` makes it on a GPU: accelerate refuses that on a CPU."""
    make_accelerator = loop.make_accelerator

    def use(init_scale: float, backoff: float) -> None:
        def make(config, run_dir):
            accelerator = make_accelerator(config, run_dir)
            accelerator.state._shared_state["_mixed_precision"] = "fp16"
            accelerator.native_amp = True
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, backoff_factor=backoff)
            return accelerator

        monkeypatch.setattr(loop, "make_accelerator", make)

    return use


def steps_of(folder) -> list[dict]:
    return [record for record in RunDir(folder).read_metrics() if record["type"] == "step"]


def adapter(folder) -> dict[str, torch.Tensor]:
    return load_file(RunDir(folder).latest_checkpoint() / "moslora_weights.safetensors")


def test_a_step_that_overflows_is_done_again_and_neither_counts_nor_moves_the_schedule(tiny_base, tmp_path, scaled):
    photos = paint_photos(tmp_path / "photos")
    scaled(init_scale=2.0**10, backoff=0.5)
    loop.train(tiny_config(tiny_base, photos, tmp_path / "plain", **SETTINGS))
    scaled(init_scale=2.0**30, backoff=0.25)
    result = loop.train(tiny_config(tiny_base, photos, tmp_path / "scaled", **SETTINGS))
    found, plain = steps_of(tmp_path / "scaled"), steps_of(tmp_path / "plain")
    skipped, done = ([step for step in found if step["skipped"] is kind] for kind in (True, False))
    assert result.step == 3 and len(skipped) > 1
    assert all(step["step"] == 1 and step["grad_norm"] is None for step in skipped)
    assert [step["step"] for step in done] == [1, 2, 3]
    assert [step["lr"] for step in done] == [step["lr"] for step in plain]
    expected, trained = adapter(tmp_path / "plain"), adapter(tmp_path / "scaled")
    for name, weights in expected.items():
        torch.testing.assert_close(trained[name], weights, rtol=0.02, atol=1e-4)


def test_a_run_whose_steps_all_overflow_ends_in_one_line(tiny_base, tmp_path, scaled):
    scaled(init_scale=2.0**30, backoff=0.999)
    photos = paint_photos(tmp_path / "photos")
    with pytest.raises(UserError, match=r"the gradient is .* at step 1: lower --learning_rate"):
        loop.train(tiny_config(tiny_base, photos, tmp_path / "run", **SETTINGS))
    assert len(steps_of(tmp_path / "run")) == 20
    assert not RunDir(tmp_path / "run").adapter_path.exists()


@pytest.mark.parametrize(("precision", "major", "advised"), [("fp16", 7, False), ("fp16", 8, True), ("bf16", 8, False)])
def test_bf16_is_advised_only_to_a_run_in_fp16_on_a_card_that_has_it(precision, major, advised, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (major, 0))
    accelerator = SimpleNamespace(device=torch.device("cuda"), mixed_precision=precision)
    error = Training.diverged(SimpleNamespace(accelerator=accelerator, run_dir=RunDir(tmp_path)), "the loss is nan")
    assert ("--mixed_precision bf16" in str(error)) is advised
