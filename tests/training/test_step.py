"""One step of the trainer, and what only makes it cheaper: working copies, cached text, compiled
blocks, fp16."""

import os
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch._inductor import config as inductor

from dreambooth_moslora.disk.events import StepDone
from dreambooth_moslora.disk.run_folder import RAW_NAME, RunDir
from dreambooth_moslora.errors import StopRequestedError, UserError
from dreambooth_moslora.method.fast_linear import WorkingCopies
from dreambooth_moslora.plan import distributed
from dreambooth_moslora.plan.distributed import set_deterministic
from dreambooth_moslora.plan.speed import choose_speed
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training import compilation, loop
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
    """Those of the first step, with None for a parameter without one, and its losses (3,)."""

    def first_gradients(**changes) -> tuple[list[torch.Tensor | None], torch.Tensor]:
        found, seen, accumulate = [], [], TrainStep.accumulate_gradients

        def note(step: TrainStep, losses: torch.Tensor) -> float:
            found.extend(None if p.grad is None else p.grad.clone() for p in step.parameters)
            raise StopRequestedError

        with monkeypatch.context() as patch:
            patch.setattr(TrainStep, "update_adapter", note)
            patch.setattr(
                TrainStep,
                "accumulate_gradients",
                lambda self: seen.append(accumulate(self)) or seen[-1],
            )
            train(
                tiny_config(
                    tiny_base, photos, tmp_path / f"run{len(list(tmp_path.iterdir()))}", **changes
                )
            )
        return found, seen[-1]

    return first_gradients


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_the_optimizer_sees_the_gradients_of_a_step_without_copies(
    first_gradients, monkeypatch, changes
):
    changes = {"target_modules": ("to_q", "to_k", "to_v", "to_out.0", "conv1"), **changes}
    with_copies, _ = first_gradients(**changes)
    nothing = SimpleNamespace(collect=lambda: None)
    monkeypatch.setattr(WorkingCopies, "attach_copies", lambda self: nullcontext(nothing))
    without, _ = first_gradients(**changes)
    tolerance = 0.05 if "mixed_precision" in changes else 1e-3
    assert [g is None for g in with_copies] == [g is None for g in without]
    for seen, wanted in zip(with_copies, without, strict=True):
        if wanted is not None:
            assert (
                seen - wanted
            ).norm() <= tolerance * wanted.norm() and seen.dtype == torch.float32
    assert any(g is not None and g.norm() > 0 for g in with_copies)


def test_feed_forward_blocks_that_are_recomputed_give_the_same_bytes(first_gradients):
    changes = PRIOR | {"target_modules": ("to_q", "attn2.to_v", "ff.net.2")}
    plain, losses = first_gradients(**changes)
    recomputed, same = first_gradients(**changes, recompute_feed_forward=True)
    assert (
        torch.equal(losses, same)
        and all(map(torch.equal, plain, recomputed))
        and any(grad.norm() for grad in plain)
    )


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_state_of_the_generator_is_kept_for_recomputed_blocks_where_dropout_draws_alone(
    first_gradients, monkeypatch, dropout
):
    asked, state = [], torch.get_rng_state
    module = sys.modules["torch.utils.checkpoint"]
    monkeypatch.setattr(module.torch, "get_rng_state", lambda: asked.append(1) or state())
    first_gradients(gradient_checkpointing=True, lora_dropout=dropout)
    inside = [call for call in asked]
    assert bool(inside) == bool(dropout)


def assert_near(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()


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
def test_one_pass_and_many_have_the_gradients_of_a_micro_batch_each(
    first_gradients, changes, passes
):
    """Of 2 photos with their prior, three times: 4 images a micro-batch. 6 at once would be one and
    a half."""
    usual = changes | {
        "train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "mixed_precision": "no",
    }
    wanted, losses = first_gradients(**usual)
    for images in passes:
        found, same = first_gradients(**usual, images_at_once=images)
        assert torch.allclose(same, losses, rtol=1e-5, atol=1e-6)
        assert_near(found, wanted)


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
def test_only_a_long_run_on_a_gpu_is_compiled_by_itself(changes, device, steps, compiled, searches):
    speed = choose_speed(
        TrainConfig(**{"resolution": 1024, "train_batch_size": 1, **changes}), device, steps
    )
    assert (speed.is_compiled, speed.has_cudnn_search) == (compiled, searches)


def test_deterministic_is_asked_of_pytorch_before_the_gpu_and_costs_the_search(monkeypatch):
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
def test_compiled_losses_are_those_without_and_so_is_what_is_saved(
    losses_of, tmp_path, monkeypatch
):
    """Traced, differentiated ahead of time, and run operation by operation: inductor would take
    minutes here."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    settings = PRIOR | {"gradient_checkpointing": True, "enable_bucket": True}
    settings["target_modules"] = ("to_q", "to_k", "to_v", "conv1")
    plain, compiled = (
        losses_of("plain", **settings),
        losses_of("compiled", compile="on", **settings),
    )
    assert compiled == pytest.approx(plain, rel=1e-5)
    one, other = (load_file(tmp_path / run / "last" / RAW_NAME) for run in ("plain", "compiled"))
    assert one.keys() == other.keys() and not any("_orig_mod" in name for name in other)


@pytest.mark.slow
def test_no_step_after_the_first_compiles_again(tiny_base, photos, tmp_path, monkeypatch):
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
def test_a_compiler_that_is_missing_costs_nothing(losses_of, tmp_path, caplog):
    """PyTorch's own patch gives its settings back; after pytest's, a setting "does not exist" any
    more."""
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
    """Make the run what `--mixed_precision fp16` makes it on a GPU: accelerate refuses that on a
    CPU."""
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
def test_a_step_that_overflows_is_done_again_and_neither_counts_nor_moves_the_schedule(
    tiny_base, photos, tmp_path, scaled
):
    """A run whose steps all overflow ends in one line."""
    settings = {"max_train_steps": 3, "lr_scheduler": "linear", "adam_epsilon": 1e-5}
    config = lambda name: tiny_config(tiny_base, photos, tmp_path / name, **settings)  # noqa: E731
    scaled(init_scale=2.0**10, backoff=0.5)
    loop.train(config("plain"))
    scaled(init_scale=2.0**30, backoff=0.25)
    result = loop.train(config("scaled"))
    found, plain = logged(tmp_path / "scaled"), logged(tmp_path / "plain")
    skipped, done = ([step for step in found if step["skipped"] is kind] for kind in (True, False))
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
    with pytest.raises(UserError, match=r"the gradient is .* at step 1: lower --learning_rate"):
        loop.train(config("run"))
    assert (
        len(logged(tmp_path / "run")) == 20 and not RunDir(tmp_path / "run").adapter_path.exists()
    )


@pytest.mark.slow
def test_trained_text_encoders_read_as_many_tokens_as_the_run_says(photos, tmp_path, monkeypatch):
    tiny_pipeline("flux", tmp_path / "files").save_pretrained(tmp_path / "base")
    options = {"train_text_encoder": True, "max_sequence_length": 8}
    read = lambda run: run.train_step.encode_prompts(["a photo of sks dog"])  # noqa: E731
    monkeypatch.setattr(loop, "run_training_loop", read)
    (text,) = loop.train(tiny_config(tmp_path / "base", photos, tmp_path / "run", **options))
    assert len(text["prompt_embeds"]) == 8
