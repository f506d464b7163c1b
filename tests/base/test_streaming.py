"""Blocks that are streamed from the host compute the same numbers, and few are on the device."""

import itertools

import pytest
import torch
from torch import nn

from dreambooth_moslora.base import families, streaming
from dreambooth_moslora.base.quantization import quantize
from dreambooth_moslora.method import fast_linear
from dreambooth_moslora.settings.family_facts import FAMILIES
from dreambooth_moslora.training import adapters, compilation
from tests.helpers import tiny_families
from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.late_copies import LateCopies
from tests.helpers.tiny_families import TINY_FAMILIES, tiny_pipeline
from tests.helpers.tiny_training import tiny_config


def compute_gradients(
    name: str,
    folder,
    kind: str,
    copies: LateCopies | None,
    share: float = 1.0,
    passes_between: int = 0,
    is_compiled: bool = False,
) -> tuple[torch.Tensor, list[torch.Tensor], tuple[nn.Module, streaming.StreamedBlocks | None]]:
    """The prediction of a tiny base of the family, twice and then backwards, and the gradients of
    an adapter on half of its layers; with `copies` this share of its blocks is streamed by them.
    With `passes_between`, as of samples, a second step follows after these."""
    torch.manual_seed(0)
    pipeline = tiny_pipeline(name, folder)
    denoiser = families.get_denoiser(pipeline).requires_grad_(False).train()
    quantize(denoiser, kind, torch.float32, "cpu")
    streamed = None
    if copies:
        streamed = WatchedBlocks(denoiser, torch.device("cpu"), copies, share)

    # An adapter on the queries alone: the gradients pass through other layers of the blocks too.
    config = tiny_config(
        folder, folder, folder / "run", gradient_checkpointing=True, target_modules=TARGETS
    )
    family = families.build_family(pipeline)
    adapters.add_adapters(config, {family.facts.denoiser: denoiser})
    copied = fast_linear.WorkingCopies(denoiser)
    if is_compiled:
        compilation.compile_blocks(denoiser)

    # The pass of the prior without gradients, then a step.
    text = family.collate(family.encode_prompts(pipeline, ["a dog"]))
    z = torch.randn(1, *latent_shape(name, denoiser))
    time_ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    t = torch.tensor([500.0])
    for passes in (1, passes_between) if passes_between else (1,):
        with copied.attach_copies() as step:
            for _ in range(passes):
                with torch.no_grad():
                    family.predict(denoiser, z, t, time_ids, **text)
            prediction = family.predict(denoiser, z, t, time_ids, **text)
            prediction.square().sum().backward()
            step.collect()
    learned = [weight.grad for weight in denoiser.parameters() if weight.grad is not None]
    return prediction.detach(), learned, (denoiser, streamed)


TARGETS = ("to_q", "to_qkv_mlp_proj")


def latent_shape(name: str, denoiser: nn.Module) -> tuple[int, int, int]:
    config = denoiser.config
    channels = config.get("in_channels")
    is_packed = TINY_FAMILIES[name].as_tokens is families.pack_latents
    return (channels // 4 if is_packed else channels, 16, 16)


FAST = ("sdxl", "flux", "z_image")
CASES = [(name, "none") for name in FAST] + [("flux", "nf4"), ("sdxl", "nf4"), ("flux", "int8")]
for facts in FAMILIES:
    if facts.name not in FAST:
        CASES.append(pytest.param(facts.name, "none", marks=pytest.mark.slow))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_streamed_blocks_give_the_same_gradients_bit_for_bit(name, kind, tmp_path):
    """Copies end as late as possible, and buffers are overwritten."""
    copies = LateCopies()
    whole, expected, _ = compute_gradients(name, tmp_path / "whole", kind, copies=None)
    prediction, learnt, (denoiser, streamed) = compute_gradients(
        name, tmp_path / "streamed", kind, copies
    )
    assert torch.equal(prediction, whole) and len(learnt) == len(expected) > 0
    assert all(map(torch.equal, learnt, expected))

    # Three passes bring each block once, but for the two that the backward pass finds there.
    count = streamed.pass_length
    assert copies.ended == copies.started == (3 * count - 2 if count > 2 else count)

    # No more than two are on the device: all blocks' weights lie in two buffers.
    buffers = {place.untyped_storage().data_ptr() for place in streamed.buffers}
    weights = [
        layer.weight for block in streaming.list_streamed_blocks(denoiser) for layer in block.layers
    ]
    assert len(buffers) == 2
    assert {weight.untyped_storage().data_ptr() for weight in weights} <= buffers


SHARED = [(kind, False) for kind in ("none", "int8", "nf4")]
SHARED += [pytest.param(kind, True, marks=pytest.mark.slow) for kind in ("none", "int8", "nf4")]


@pytest.mark.parametrize(("kind", "is_compiled"), SHARED)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_share_of_streamed_blocks_gives_the_same_gradients(
    share, kind, is_compiled, tmp_path, monkeypatch
):
    """With recomputation, and samples between two steps. No pass but the first waits for a copy
    that was not yet begun."""
    monkeypatch.setitem(tiny_families.LAYERS, "num_single_layers", 8)
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")  # inductor takes minutes
    options = {"passes_between": 2, "is_compiled": is_compiled}
    whole, expected, (denoiser, _) = compute_gradients(
        "flux", tmp_path / "whole", kind, copies=None, **options
    )
    copies = LateCopies()
    prediction, learnt, (denoiser, streamed) = compute_gradients(
        "flux", tmp_path / "streamed", kind, copies, share, **options
    )
    assert torch.equal(prediction, whole) and len(learnt) == len(expected) > 0
    assert all(map(torch.equal, learnt, expected))
    blocks = streaming.list_streamed_blocks(denoiser)
    assert 0 < len(streamed.blocks) < len(blocks)
    resident = [was_resident for _, was_resident in streamed.entered]
    assert not resident[0] and all(resident[1:])


def test_streamed_blocks_are_evenly_spaced_and_hold_their_share():
    """Of blocks of one size, and of FLUX.1's two."""
    for sizes in ([4] * 60, [9] * 19 + [4] * 38):
        blocks = [
            streaming.StreamedBlock(str(number), nn.Identity(), [nn.Linear(64, size)])
            for number, size in enumerate(sizes)
        ]
        for share in (0.1, 0.5, 0.9, 1.0):
            selected = streaming.select_evenly(blocks, share)
            selected_bytes = sum(block.padded_bytes for block in selected)
            total = sum(block.padded_bytes for block in blocks)
            largest = max(block.padded_bytes for block in blocks)
            assert share * total <= selected_bytes < share * total + largest
            if len(set(sizes)) == 1:
                numbers = [int(block.path) for block in selected]
                assert {b - a for a, b in itertools.pairwise(numbers)} <= {
                    int(1 / share),
                    -int(-1 // share),
                }


class WatchedBlocks(streaming.StreamedBlocks):
    """Notes each block that is about to compute, and whether it had been called for by then."""

    def __init__(self, *arguments):
        self.entered = []
        super().__init__(*arguments)

    def enter(self, number, *arguments):
        self.entered.append((number, number in self.resident_blocks))
        super().enter(number, *arguments)


@pytest.mark.parametrize("name", [facts.name for facts in FAMILIES])
@torch.no_grad()
def test_sampling_waits_for_the_very_first_block_alone(name, tmp_path):
    pipeline = tiny_pipeline(name, tmp_path)
    denoiser = families.get_denoiser(pipeline)
    copies = LateCopies()
    watched = WatchedBlocks(denoiser, torch.device("cpu"), copies)
    family = families.build_family(pipeline)
    text = family.collate(family.encode_prompts(pipeline, ["a dog"]))
    z, time_ids = (
        torch.randn(1, *latent_shape(name, denoiser)),
        torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
    )
    predictions = [
        family.predict(denoiser, z, torch.tensor([500.0]), time_ids, **text) for _ in range(3)
    ]
    count = watched.pass_length
    passes = [(number, step + number > 0) for step in range(3) for number in range(count)]
    assert watched.entered == passes
    assert copies.started == (3 * count + 2 if count > 2 else count)
    assert all(torch.equal(prediction, predictions[0]) for prediction in predictions)

    # What nobody waited for ends before its memory is given back.
    watched.end()
    assert copies.ended == copies.started
    again = family.predict(denoiser, z, torch.tensor([500.0]), time_ids, **text)
    assert torch.equal(again, predictions[0])


CUDA = torch.device("cuda")


def test_a_copy_begins_when_its_buffer_was_read(monkeypatch):
    """The GPU computes with another block meanwhile."""
    cuda, began = FakeCuda(monkeypatch), []
    monkeypatch.setattr(
        streaming, "copy_pieces", lambda *_: began.append(cuda.current.run("copy of block 2"))
    )
    copies, computing = streaming.BlockCopier(CUDA), cuda.current
    computing.run("block 0")
    copy = copies.start(torch.empty(4), [torch.empty(4)])
    assert began == [{"block 0"}]
    assert computing.run("block 1") == {"block 0"}
    copies.wait(copy)
    assert computing.run("block 2") >= {"copy of block 2"}


@pytest.mark.parametrize(("device", "is_pinned"), [(CUDA, True), (torch.device("cpu"), False)])
def test_only_blocks_pinned_for_cuda_are_copied_asynchronously(
    device, is_pinned, tmp_path, monkeypatch
):
    """An asynchronous copy from unpinned memory may read later contents."""
    make_buffers = streaming.StreamedBlocks.make_buffers
    monkeypatch.setattr(
        streaming.StreamedBlocks,
        "make_buffers",
        lambda blocks, _, copies: make_buffers(blocks, torch.device("cpu"), copies),
    )
    denoiser = families.get_denoiser(tiny_pipeline("flux", tmp_path))
    cuda = FakeCuda(monkeypatch)
    blocks = streaming.StreamedBlocks(denoiser, device)
    cuda.copies.clear()
    for number in range(len(blocks.pieces)):
        blocks.fetch_block(number)
    assert cuda.copies == [(is_pinned, is_pinned)] * sum(map(len, blocks.pieces))


def test_a_block_that_cannot_be_pinned_is_used_unpinned(monkeypatch):
    def refuse(tensor):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    piece = torch.arange(4, dtype=torch.uint8)
    assert streaming.move_to_pinned(piece) is piece
