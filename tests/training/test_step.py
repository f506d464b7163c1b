"""Optimizer step, and what makes it cheaper: working copies, cached text, compiled blocks, fp16."""

import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch._inductor import config as inductor

from dreambooth_moslora.base import families
from dreambooth_moslora.disk.events import StepDone
from dreambooth_moslora.disk.run_folder import RAW_NAME, RunDir
from dreambooth_moslora.errors import StopRequestedError, UserError
from dreambooth_moslora.generation.sampling import Sampler, SampleRequest
from dreambooth_moslora.method.fast_linear import WorkingCopies
from dreambooth_moslora.plan import distributed
from dreambooth_moslora.plan.distributed import set_deterministic
from dreambooth_moslora.plan.speed import choose_speed
from dreambooth_moslora.settings.family_facts import get_facts
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training import compilation, loop
from dreambooth_moslora.training.dataset import EncodedCrop, PhotoEncoder, collate
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.step import TrainStep
from tests.helpers.tiny_families import tiny_pipeline
from tests.helpers.tiny_training import adapter_sha256, logged, tiny_config

PRIOR = {"with_prior_preservation": True, "prior": "adapter_off"}
KINDS = {
    "prior of the base, two micro-batches": PRIOR | {"gradient_accumulation_steps": 2},
    "text encoders, recomputed": {"train_text_encoder": True, "gradient_checkpointing": True},
    "bf16": {"mixed_precision": "bf16", "mixer": "none"},
}


@pytest.fixture
def first_gradients(tiny_base, photos, tmp_path, monkeypatch):
    """Return the gradients of a run's first step, None for a parameter without one, and its losses
    (3,)."""

    def first_gradients(**changes) -> tuple[list[torch.Tensor | None], torch.Tensor]:
        gradients, losses, accumulate = [], [], TrainStep.accumulate_gradients

        def note(step: TrainStep, losses: torch.Tensor) -> float:
            gradients.extend(None if p.grad is None else p.grad.clone() for p in step.parameters)
            raise StopRequestedError

        with monkeypatch.context() as patch:
            patch.setattr(TrainStep, "update_adapter", note)
            patch.setattr(
                TrainStep,
                "accumulate_gradients",
                lambda self: losses.append(accumulate(self)) or losses[-1],
            )
            train(
                tiny_config(
                    tiny_base, photos, tmp_path / f"run{len(list(tmp_path.iterdir()))}", **changes
                )
            )
        return gradients, losses[-1]

    return first_gradients


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_working_copies_give_the_gradients_of_peft_layers(first_gradients, monkeypatch, changes):
    changes = {"target_modules": ("to_q", "to_k", "to_v", "to_out.0", "conv1"), **changes}
    with_copies, _ = first_gradients(**changes)
    nothing = SimpleNamespace(collect=lambda: None)
    monkeypatch.setattr(WorkingCopies, "attach_copies", lambda self: nullcontext(nothing))
    without, _ = first_gradients(**changes)
    tolerance = 0.05 if "mixed_precision" in changes else 1e-3
    assert [g is None for g in with_copies] == [g is None for g in without]
    for gradient, expected in zip(with_copies, without, strict=True):
        if expected is not None:
            assert (
                gradient - expected
            ).norm() <= tolerance * expected.norm() and gradient.dtype == torch.float32
    assert any(g is not None and g.norm() > 0 for g in with_copies)


def test_images_are_drawn_with_working_copies(tiny_base, photos, tmp_path):
    """The same images as by PEFT's layers, and no gradients are left."""
    images = []

    def draw_twice(sampler: Sampler, step: int) -> dict:
        (fast,) = sampler([SampleRequest("a photo of a dog", 0)])
        layers = [part for part in sampler.pipeline.unet.modules() if hasattr(part, "step_copies")]
        copies = [layer.step_copies for layer in layers]
        assert copies and all(copies)
        for layer in layers:
            layer.step_copies = {}
        (slow,) = sampler([SampleRequest("a photo of a dog", 0)])
        for layer, copy in zip(layers, copies):
            layer.step_copies = copy
        images.append((np.asarray(fast, dtype=int), np.asarray(slow, dtype=int)))
        return {"scores": {}, "best": None}

    draw_twice.prompts = ["a photo of a dog"]
    changes = {"max_train_steps": 2, "evaluate_steps": 1, "learning_rate": 0.1}
    config = tiny_config(tiny_base, photos, tmp_path, **changes)
    train(config, evaluator=draw_twice)
    for fast, slow in images:
        assert abs(fast - slow).max() <= 1
    assert len(images) > 1 and not np.array_equal(images[0][0], images[-1][0])


def test_recomputed_feed_forward_gives_the_same_bytes(first_gradients):
    changes = PRIOR | {"target_modules": ("to_q", "attn2.to_v", "ff.net.2")}
    plain, losses = first_gradients(**changes)
    recomputed, same = first_gradients(**changes, recompute_feed_forward=True)
    assert (
        torch.equal(losses, same)
        and all(map(torch.equal, plain, recomputed))
        and any(grad.norm() for grad in plain)
    )


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_rng_state_is_read_for_recomputation_with_dropout_alone(
    first_gradients, monkeypatch, dropout
):
    state_reads, state = [], torch.get_rng_state
    module = sys.modules["torch.utils.checkpoint"]
    monkeypatch.setattr(module.torch, "get_rng_state", lambda: state_reads.append(1) or state())
    first_gradients(gradient_checkpointing=True, lora_dropout=dropout)
    assert bool(state_reads) == bool(dropout)


def assert_near(gradients: list[torch.Tensor], expected_gradients: list[torch.Tensor]) -> None:
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert (gradient - expected).norm() <= 1e-4 * expected.norm()


OF_CLASS = {
    "with_prior_preservation": True,
    "num_class_images": 2,
    "prior_loss_weight": 0.5,
    "snr_gamma": 5.0,
}
PASSES = [
    (PRIOR | {"prior_loss_weight": 0.5}, [3, 12]),
    pytest.param(PRIOR | {"prior_loss_weight": 0.5}, [2, 1, 6], marks=pytest.mark.slow),
    ({"enable_bucket": True}, [9]),
    pytest.param(OF_CLASS, [1, 4], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("changes", "passes"), PASSES)
def test_images_at_once_does_not_change_the_gradients(first_gradients, changes, passes):
    """A micro-batch has 2 photos with their prior, 4 images, and a step three of them."""
    usual = changes | {
        "train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "mixed_precision": "no",
    }
    expected, losses = first_gradients(**usual)
    for images in passes:
        gradients, same = first_gradients(**usual, images_at_once=images)
        assert torch.allclose(same, losses, rtol=1e-5, atol=1e-6)
        assert_near(gradients, expected)


CHOSEN = [
    ({}, "cuda", 1000, True, True),
    ({}, "cuda", 999, False, False),
    ({}, "cpu", 10**6, False, False),
]
CHOSEN += [
    ({"resolution": 512}, "cuda", 1000, False, False),
    ({"enable_bucket": True}, "cuda", 1000, True, False),
]
CHOSEN += [({"gradient_accumulation_steps": 2}, "cuda", 500, True, True)]
CHOSEN += [({"with_prior_preservation": True, "class_prompt": "a dog"}, "cuda", 500, True, True)]
CHOSEN += [
    ({"base_quantization": "nf4"}, "cuda", 1000, True, True),
    ({"base_quantization": "int8"}, "cuda", 1000, True, True),
    ({"compile": "off"}, "cuda", 1000, False, True),
]
CHOSEN += [({"compile": "on"}, "cpu", 1, True, False)]


@pytest.mark.parametrize(("changes", "device", "steps", "compiled", "searches"), CHOSEN)
def test_only_long_runs_on_a_gpu_are_compiled_by_default(
    changes, device, steps, compiled, searches
):
    speed = choose_speed(
        TrainConfig(**{"resolution": 1024, "train_batch_size": 1, **changes}), device, steps
    )
    assert (speed.is_compiled, speed.has_cudnn_search) == (compiled, searches)


def test_deterministic_sets_pytorch_and_disables_cudnn_search(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        set_deterministic(True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert (
            os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
            and not torch.backends.cudnn.benchmark
        )
    finally:
        set_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()
    run = TrainConfig(resolution=1024, train_batch_size=1, deterministic=True)
    assert not choose_speed(run, "cuda", 1000).has_cudnn_search


@pytest.fixture
def losses_of(tiny_base, photos, tmp_path):
    """Train a run by its name; returns its losses."""

    def run(name: str, **changes) -> list[float]:
        events = []
        torch._dynamo.reset()
        train(
            tiny_config(tiny_base, photos, tmp_path / name, **{"max_train_steps": 2, **changes}),
            events.append,
        )
        return [event.loss for event in events if isinstance(event, StepDone)]

    return run


@pytest.mark.slow
def test_compilation_changes_neither_losses_nor_weights(losses_of, tmp_path, monkeypatch):
    """Trace, differentiate ahead of time, and run operation by operation: inductor would take
    minutes here."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    settings = PRIOR | {"gradient_checkpointing": True, "enable_bucket": True}
    settings["target_modules"] = ("to_q", "to_k", "to_v", "conv1")
    plain, compiled = (
        losses_of("plain", **settings),
        losses_of("compiled", compile="on", **settings),
    )
    assert compiled == pytest.approx(plain, rel=1e-5)
    plain_weights, compiled_weights = (
        load_file(tmp_path / run / "last" / RAW_NAME) for run in ("plain", "compiled")
    )
    assert plain_weights.keys() == compiled_weights.keys() and not any(
        "_orig_mod" in name for name in compiled_weights
    )


@pytest.mark.slow
def test_only_the_first_step_compiles(tiny_base, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters, graphs = torch._dynamo.utils.counters, []
    counters.clear()
    note = lambda event: (  # noqa: E731
        graphs.append(counters["stats"]["unique_graphs"]) if event.kind == "step" else None
    )
    train(tiny_config(tiny_base, photos, tmp_path / "run", max_train_steps=4, compile="on"), note)
    assert graphs[0] > 0 and graphs == [graphs[0]] * 4


@pytest.mark.slow
def test_missing_compiler_falls_back_to_uncompiled_blocks(losses_of, tmp_path, caplog):
    """PyTorch's own patch restores its settings; pytest's would delete one."""
    with inductor.patch({"cpp.cxx": ("/nowhere/g++",), "force_disable_caches": True}):
        plain, failed = losses_of("plain"), losses_of("failed", compile="on")
    assert failed == plain and adapter_sha256(tmp_path / "failed") == adapter_sha256(
        tmp_path / "plain"
    )
    lines = [
        record.getMessage() for record in caplog.records if "goes on without" in record.getMessage()
    ]
    assert len(lines) == 1 and "\n" not in lines[0] and "/nowhere/g++" in lines[0]


@pytest.fixture
def scaled(monkeypatch):
    """Set up a run as `--mixed_precision fp16` does on a GPU; accelerate refuses that on a CPU."""
    make_accelerator = distributed.make_accelerator

    def use(init_scale: float, backoff: float) -> None:
        def make(config, run_dir):
            accelerator = make_accelerator(config, run_dir)
            accelerator.state._shared_state["_mixed_precision"] = "fp16"
            accelerator.native_amp = True
            accelerator.scaler = torch.amp.GradScaler(
                "cpu", init_scale=init_scale, backoff_factor=backoff
            )
            return accelerator

        monkeypatch.setattr(distributed, "make_accelerator", make)

    return use


@pytest.mark.slow
def test_overflowing_fp16_step_is_repeated_and_not_counted(tiny_base, photos, tmp_path, scaled):
    settings = {"max_train_steps": 3, "lr_scheduler": "linear", "adam_epsilon": 1e-5}
    config = lambda name: tiny_config(tiny_base, photos, tmp_path / name, **settings)  # noqa: E731
    scaled(init_scale=2.0**10, backoff=0.5)
    loop.train(config("plain"))
    scaled(init_scale=2.0**30, backoff=0.25)
    result = loop.train(config("scaled"))
    steps, plain = logged(tmp_path / "scaled"), logged(tmp_path / "plain")
    skipped, done = ([step for step in steps if step["skipped"] is kind] for kind in (True, False))
    assert result.step == 3 and len(skipped) > 1
    assert all(step["step"] == 1 and step["grad_norm"] is None for step in skipped)
    assert [(step["step"], step["lr"]) for step in done] == [
        (n, plain[n - 1]["lr"]) for n in (1, 2, 3)
    ]
    expected, trained = (
        load_file(tmp_path / run / "last" / RAW_NAME) for run in ("plain", "scaled")
    )
    for name, weights in expected.items():
        torch.testing.assert_close(trained[name], weights, rtol=0.02, atol=1e-4)
    scaled(init_scale=2.0**30, backoff=0.999)
    with pytest.raises(UserError, match=r"the gradient is .* at step 1: lower learning_rate"):
        loop.train(config("run"))
    assert (
        len(logged(tmp_path / "run")) == 20 and not RunDir(tmp_path / "run").adapter_path.exists()
    )


@pytest.mark.slow
def test_trained_text_encoders_obey_max_sequence_length(photos, tmp_path, monkeypatch):
    tiny_pipeline("flux", tmp_path / "files").save_pretrained(tmp_path / "base")
    options = {"train_text_encoder": True, "max_sequence_length": 8}
    read = lambda run: run.train_step.encode_prompts(["a photo of sks dog"])  # noqa: E731
    monkeypatch.setattr(loop, "run_training_loop", read)
    (text,) = loop.train(tiny_config(tmp_path / "base", photos, tmp_path / "run", **options))
    assert len(text["prompt_embeds"]) == 8


def test_families_get_the_photo_inputs_that_they_take():
    inputs = {"time_ids": torch.zeros(1, 6), "depth": torch.zeros(1, 1, 8, 8)}

    class DepthFamily(families.ZImage):
        def predict(self, denoiser, z, t, time_ids, depth, prompt_embeds):
            return z

    facts = get_facts("ZImagePipeline")
    assert families.ZImage(facts).select_photo_inputs(inputs).keys() == {"time_ids"}
    assert DepthFamily(facts).select_photo_inputs(inputs).keys() == inputs.keys()


def test_batch_with_an_input_of_some_photos_is_refused():
    crop = EncodedCrop(torch.zeros(4, 8, 8), {"time_ids": torch.zeros(6)}, mask=None)
    deep = replace(crop, photo_inputs=crop.photo_inputs | {"depth": torch.zeros(1)})
    with pytest.raises(ValueError, match="need the same inputs"):
        collate([(crop, "a"), (deep, "b")], instance_count=2)


def test_added_photo_input_reaches_the_denoiser_by_its_name(
    tiny_base, photos, tmp_path, monkeypatch
):
    """The input is added where a photo is encoded and taken where the denoiser is called: two
    places. On the way it is collated, moved, joined and split."""
    encode, predict, received = PhotoEncoder.encode, families.SDXL.predict, []

    def encode_with_brightness(encoder, photo, plan):
        crop = encode(encoder, photo, plan)
        inputs = crop.photo_inputs | {"brightness": crop.latents.mean().reshape(1)}
        return replace(crop, photo_inputs=inputs)

    def predict_with_brightness(family, denoiser, z, t, time_ids, brightness, **text_embeddings):
        received.append(brightness)
        return predict(family, denoiser, z, t, time_ids, **text_embeddings)

    monkeypatch.setattr(PhotoEncoder, "encode", encode_with_brightness)
    monkeypatch.setattr(families.SDXL, "predict", predict_with_brightness)
    settings = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 1}

    # Two micro-batches of two photos with their prior: one pass of the base and one of the adapter.
    train(tiny_config(tiny_base, photos, tmp_path / "run", images_at_once=8, **PRIOR, **settings))
    base_rows, rows = received[:2]
    assert [tuple(shape.shape) for shape in (base_rows, rows)] == [(4, 1), (8, 1)]
    assert torch.equal(base_rows[:2], rows[:2]) and torch.equal(base_rows[2:], rows[4:6])
    assert len(set(rows.flatten().tolist())) > 1
