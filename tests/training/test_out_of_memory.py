"""A step, or pictures, that run out of memory are done with less, and that changes nothing else."""

import json
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from dreambooth_moslora.base import devices, load
from dreambooth_moslora.base.streaming import list_streamed_blocks
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.generation.sampling import Sampler, SampleRequest
from dreambooth_moslora.plan import memory_plans
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny_training import adapter_sha256, tiny_config

Fits = Callable[[nn.Module, torch.Tensor], bool]
NO_ROOM = "CUDA out of memory. Tried to allocate 2.00 GiB."
TWICE = {"gradient_accumulation_steps": 2, "max_train_steps": 2}
PAIR = TWICE | {"train_batch_size": 2}
LAYERS = TWICE | {"target_modules": ("to_q", "to_k", "ff.net.2")}


@pytest.fixture
def card(monkeypatch):
    """Let a pass run out of memory, at its end, unless it `fits`; the first ones always do."""
    forward = UNet2DConditionModel.forward

    def card(fits: Fits, free_passes: int = 0) -> None:
        passes = []

        def limited(unet: nn.Module, z: torch.Tensor, *arguments, **options):
            output = forward(unet, z, *arguments, **options)
            passes.append(z)
            if len(passes) > free_passes and not fits(unet, z):
                raise torch.OutOfMemoryError(NO_ROOM)
            return output

        monkeypatch.setattr(UNet2DConditionModel, "forward", limited)

    return card


FEWER = {"images_at_once": 1}
FEED_FORWARD, RECOMPUTED = {"recompute_feed_forward": True}, {"gradient_checkpointing": True}
IN_4_BIT = RECOMPUTED | {"base_quantization": "nf4"}
TO_FEWER, TO_FEED_FORWARD = "--images_at_once 1", "--memory recompute_ff"
TO_RECOMPUTED, TO_4_BIT = "--memory recompute", "--memory nf4"
IN_8_BIT = RECOMPUTED | {"base_quantization": "int8"}
STREAMED, TO_STREAMED = IN_4_BIT | {"stream_blocks": True}, "--memory nf4_stream"
TO_WHOLE = "--streamed_share 1"
slow = pytest.mark.slow


def is_recomputed(unet: nn.Module, z: torch.Tensor) -> bool:
    return unet.is_gradient_checkpointing


def is_streamed(unet: nn.Module, z: torch.Tensor) -> bool:
    return any(part._forward_pre_hooks for part in unet.modules())


def is_single(unet: nn.Module, z: torch.Tensor) -> bool:
    return len(z) == 1


def is_streamed_whole(unet: nn.Module, z: torch.Tensor) -> bool:
    return all(block.module._forward_pre_hooks for block in list_streamed_blocks(unet))


def has_layers(kind: str) -> Fits:
    return lambda unet, z: any(type(part).__name__ == kind for part in unet.modules())


# the settings of a run, what fits, what it ends with beside these, and the flags that it names
WAYS = [
    (PAIR, is_single, FEWER, [TO_FEWER]),
    pytest.param(
        LAYERS, has_layers("CheckpointedFeedForward"), FEED_FORWARD, [TO_FEED_FORWARD], marks=slow
    ),
    pytest.param(LAYERS, is_recomputed, RECOMPUTED, [TO_FEED_FORWARD, TO_RECOMPUTED], marks=slow),
    pytest.param(LAYERS | RECOMPUTED, has_layers("Linear4bit"), IN_4_BIT, [TO_4_BIT], marks=slow),
    pytest.param(
        LAYERS | RECOMPUTED, has_layers("Int8Linear"), IN_8_BIT, ["--memory int8"], marks=slow
    ),
    pytest.param(LAYERS | IN_4_BIT, is_streamed, STREAMED, [TO_STREAMED], marks=slow),
    pytest.param(
        LAYERS | IN_8_BIT,
        is_streamed,
        IN_8_BIT | {"stream_blocks": True},
        ["--memory int8_stream"],
        marks=slow,
    ),
    (LAYERS | STREAMED | {"streamed_share": 0.5}, is_streamed_whole, STREAMED, [TO_WHOLE]),
    pytest.param(
        PAIR | LAYERS,
        has_layers("Linear4bit"),
        FEWER | IN_4_BIT,
        [TO_FEWER, TO_FEED_FORWARD, TO_RECOMPUTED, TO_4_BIT],
        marks=slow,
    ),
]


@pytest.mark.parametrize(("usual", "fits", "changes", "flags"), WAYS)
def test_retried_first_step_equals_a_leaner_run(
    usual, fits, changes, flags, card, tiny_base, photos, tmp_path, caplog, monkeypatch
):
    """The same bytes, though it ran out in the second of its passes. The run's folder tells. In 8
    bit it goes on where there is no bitsandbytes. Each change frees memory once more."""
    monkeypatch.setattr(memory_plans, "find_spec", lambda name: changes != IN_8_BIT)
    freed = []
    monkeypatch.setattr(devices, "free_unused_memory", freed.append)
    begun = tiny_config(tiny_base, photos, tmp_path / "begun", **usual | changes)
    train(begun)
    usual_count = len(freed)
    card(fits, free_passes=1)
    train(tiny_config(tiny_base, photos, tmp_path / "recovered", **usual))

    assert len(freed) - usual_count == usual_count + len(flags)
    assert adapter_sha256(tmp_path / "recovered") == adapter_sha256(tmp_path / "begun")
    messages = [line for line in caplog.messages if "out of memory" in line]
    prefix = "the first step ran out of memory: it is done again with"
    assert messages == [f"{prefix} {flag}." for flag in flags]
    settings = json.loads(RunDir(tmp_path / "recovered").config_path.read_text())
    assert settings.items() >= changes.items()


LOST = {
    "nothing is left": (STREAMED, 0),
    "the adapter was updated": ({}, 1),
}


@pytest.mark.parametrize(("changes", "free_passes"), LOST.values(), ids=LOST)
def test_where_nothing_is_left_a_run_ends(changes, free_passes, card, tiny_base, photos, tmp_path):
    card(lambda unet, z: False, free_passes)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        train(tiny_config(tiny_base, photos, tmp_path / "run", **changes))
    assert RunDir(tmp_path / "run").read_events()[-1]["message"] == NO_ROOM


def test_pictures_are_drawn_half_as_many_at_once(card, tiny_base, caplog, monkeypatch):
    """Each once, and the same; one that does not fit alone ends it. Memory is freed before each
    smaller batch, without the error that keeps the larger one's tensors."""
    pipeline = load.load_pipeline(tiny_base)
    pipeline.set_progress_bar_config(disable=True)
    embed = partial(load.SDXL_FAMILY.encode_prompts, pipeline)
    sampler = Sampler(pipeline, embed, 64, torch.device("cpu"), 4.0, inference_steps=2)
    requests = [SampleRequest("a dog", seed) for seed in range(5)]
    expected = list(sampler(requests, batch_size=1))

    freed = []
    monkeypatch.setattr(
        devices, "free_unused_memory", lambda device: freed.append((device, sys.exc_info()[1]))
    )
    card(lambda unet, z: len(z) <= 2)  # a picture with guidance passes twice
    assert list(sampler(requests, batch_size=4)) == expected
    assert freed == [(torch.device("cpu"), None)] * 2
    message = "out of memory while generating images: continuing with batches of %d."
    assert caplog.messages == [message % 2, message % 1]

    card(lambda unet, z: False)
    with pytest.raises(torch.OutOfMemoryError):
        next(sampler(requests, batch_size=4))


@pytest.mark.slow
@pytest.mark.usefixtures("few_steps")
def test_class_images_are_drawn_half_as_many_at_once(card, tiny_base, photos, tmp_path, caplog):
    """Each once, and the same; the number that found room is kept for the batches after it."""
    card(lambda unet, z: len(z) <= 2)
    images = []
    for size in (1, 4):
        folder = tmp_path / str(size)
        changes = {"with_prior_preservation": True, "num_class_images": 6}
        changes |= {"sample_batch_size": size, "max_train_steps": 1}
        train(tiny_config(tiny_base, photos, folder, **changes))
        pictures = sorted(RunDir(folder).class_images_dir.glob("*.png"))
        images.append([path.read_bytes() for path in pictures])
    assert images[0] == images[1] and len(images[0]) == 6
    message = "out of memory while generating images: continuing with batches of %d."
    assert [line for line in caplog.messages if "while generating" in line] == [
        message % 2,
        message % 1,
    ]
