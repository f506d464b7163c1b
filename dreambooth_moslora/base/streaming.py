"""Blocks of the frozen base that stay in the host's memory and come to the device to compute.

    host      block 0 | block 1 | block 2 | …     pinned where there is CUDA
    device    place 0 | place 1                   block n comes to place n mod 2

While a block computes, the next one is copied beside it, and after a pass that has no gradients the
first ones, for another pass. Nothing is written back, as the base is
frozen. Adapters, norms and biases, and the scales of packed weights, stay on the device.

It is for blocks that are recomputed (gradient checkpointing), which read nothing between the two
passes. A block comes before its forward, and again when the first gradient of its outputs is there.
It has the same addresses each time, so that it does not matter when a view of its weights was
taken: bitsandbytes keeps one from the forward pass, and reads it before anything is recomputed.

It is also for pictures that are drawn on a small device, where text encoders are streamed too:
`move` frees the places between two pictures, and `end` makes the model what it was.

diffusers' group offloading lets a block go when its forward ends, before the backward pass has
read it, and puts back each weight as it was, the trained ones too.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dreambooth_moslora.base import devices
from dreambooth_moslora.base.devices import RESIDENT_BLOCKS
from dreambooth_moslora.base.families import list_block_classes

ALIGNMENT_BYTES = 256
"""Bytes between which a weight begins: kernels read several numbers at once."""
PIECE_BYTES = 2**24
"""Bytes of a piece of a block on the host. PyTorch rounds each pinned buffer up to a power of two.
"""


class BlockCopier:
    """How a block comes to the device: on a GPU of Nvidia or AMD beside the computation, on a
    stream of its own; elsewhere a copy has ended when it has begun."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, place: Tensor, pieces: Sequence[Tensor]) -> torch.cuda.Event | None:
        """Begin to fill `place` (bytes,) with the pieces. Returns what `wait` takes."""
        if self.stream is None:
            return copy_pieces(place, pieces)

        # What was queued up to now may still read the block that lay there before.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            copy_pieces(place, pieces)
        return self.stream.record_event()

    def wait(self, copy: torch.cuda.Event | None) -> None:
        """Let nothing compute before that copy has ended."""
        if copy is not None:
            torch.cuda.current_stream(self.device).wait_event(copy)


def copy_pieces(place: Tensor, pieces: Sequence[Tensor]) -> None:
    """Fill the beginning of `place` (bytes,) with the pieces, without waiting where they are
    pinned."""
    for target, piece in zip(place.split(PIECE_BYTES), pieces):
        target[: len(piece)].copy_(piece, non_blocking=piece.is_pinned())


class StreamedBlocks:
    """Moves the matrices of a model's blocks to the host, and brings them when they compute.

    model: a denoiser or a text encoder, changed in place; it may be on the host or on the device,
        in 4 or 8 bit too, and all but these matrices is the caller's to move
    device: where it computes
    copies: how blocks come there

    `held` are the numbers of the blocks on the device.
    """

    def __init__(self, model: nn.Module, device: torch.device, copies: BlockCopier | None = None):
        self.blocks = list_streamed_blocks(model)
        self.largest = max(sum(map(compute_padded_bytes, layers)) for _, layers in self.blocks)
        self.make_places(device, copies or BlockCopier(device))

        # Each block moves to the host, and comes again whenever its forward is called. A compiler
        # must not look into that.
        is_cuda = device.type == "cuda"
        self.pieces: list[list[Tensor]] = []
        self.hooks: list[RemovableHandle] = []
        enter = torch.compiler.disable(self.enter)
        leave = torch.compiler.disable(self.leave)
        for number, (block, layers) in enumerate(self.blocks):
            packed = pack_weights(layers).split(PIECE_BYTES)
            self.pieces.append([move_to_pinned(piece) if is_cuda else piece for piece in packed])
            self.bind_block(number)
            self.hooks.append(block.register_forward_pre_hook(partial(enter, number)))
            self.hooks.append(block.register_forward_hook(partial(leave, number)))

    def make_places(self, device: torch.device, copies: BlockCopier) -> None:
        """Empty places on the device, as large as the largest block."""
        self.copies = copies
        self.places = []
        for _ in range(RESIDENT_BLOCKS):
            self.places.append(torch.empty(self.largest, dtype=torch.uint8, device=device))
        self.resident_blocks: list[int | None] = [None] * RESIDENT_BLOCKS
        self.pending_copies: list[Any] = [None] * RESIDENT_BLOCKS
        self.last = -1

    def move_to_device(self, device: torch.device) -> None:
        """Compute on another device from here on, between two passes. The memory of the places on
        the present one is freed; blocks lie on the host as before."""
        self.wait()
        self.make_places(device, BlockCopier(device))
        for number in range(len(self.blocks)):
            self.bind_block(number)

    def wait(self) -> None:
        """Let nothing compute before all copies have ended: one may still write to a place whose
        memory is given back."""
        for copy in self.pending_copies:
            self.copies.wait(copy)

    def end(self) -> None:
        """Leave the model as it was, with these matrices on the host."""
        self.wait()
        for hook in self.hooks:
            hook.remove()
        for (_, layers), pieces in zip(self.blocks, self.pieces, strict=True):
            bind_weights(layers, torch.cat(pieces))

            # Or PyTorch keeps what was pinned, and the host holds the base twice.
            pieces.clear()
            devices.free_unused_host_blocks()

    def bind_block(self, number: int) -> None:
        """Make a block's matrices views of its place."""
        bind_weights(self.blocks[number][1], self.places[number % RESIDENT_BLOCKS])

    def enter(self, number: int, *_: Any) -> None:
        """Called before block `number` computes, forwards or backwards: it waits for that block,
        and begins to bring the next one, which in a backward pass is the one before."""
        self.fetch_block(number)
        self.copies.wait(self.pending_copies[number % RESIDENT_BLOCKS])
        ahead = number + 1 if number > self.last else number - 1
        self.last = number
        if 0 <= ahead < len(self.pieces):
            self.fetch_block(ahead)

    def leave(self, number: int, block: nn.Module, inputs: tuple, outputs: Any) -> None:
        """Called after block `number` has computed: it enters again with the outputs' gradients.
        After the last one of a pass without gradients the next pass begins, with the first ones."""
        if number == len(self.blocks) - 1 and not torch.is_grad_enabled():
            for first in range(min(RESIDENT_BLOCKS, len(self.blocks))):
                self.fetch_block(first)
        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(partial(self.enter, number))

    def fetch_block(self, number: int) -> None:
        """Begin to copy a block to its place, unless it is there."""
        place = number % RESIDENT_BLOCKS
        if self.resident_blocks[place] != number:
            self.resident_blocks[place] = number
            self.pending_copies[place] = self.copies.start(self.places[place], self.pieces[number])


def list_streamed_blocks(model: nn.Module) -> list[tuple[nn.Module, list[nn.Linear]]]:
    """The blocks that are streamed, each with the layers whose matrices are, in the order of use.
    The few blocks that refine an input are not: Lumina 2 does not recompute them."""
    kinds = list_block_classes(model)
    found = []

    # A UNet has its middle after its upper half, and uses it before.
    modules = sorted(model.named_modules(), key=lambda named: named[0].startswith("up_blocks."))
    for name, block in modules:
        if type(block).__name__ not in kinds or "refiner" in name:
            continue

        # An adapter's own matrices stay, where it is there already. PEFT's layer, which has the
        # name of the layer that it holds, is no layer of PyTorch's.
        layers = []
        for path, layer in block.named_modules():
            is_matrix = type(layer).__name__ in ("Linear", "Linear4bit", "Int8Linear")
            if is_matrix and isinstance(layer, nn.Linear) and ".lora_" not in path:
                layers.append(layer)
        if layers:
            found.append((block, layers))
    return found


def bind_weights(layers: Sequence[nn.Linear], buffer: Tensor) -> None:
    """Make the layers' matrices views of `room` (bytes,)."""
    start = 0
    for layer in layers:
        weight = layer.weight
        part = buffer[start : start + weight.nbytes]
        weight.data = part.view(weight.dtype).view(weight.shape)
        start += compute_padded_bytes(layer)


def pack_weights(layers: Sequence[nn.Linear]) -> Tensor:
    """The bytes of the layers' matrices on the host, as they lie in a place."""
    host = torch.empty(sum(map(compute_padded_bytes, layers)), dtype=torch.uint8)
    start = 0
    for layer in layers:
        flat = layer.weight.data.contiguous().view(-1).view(torch.uint8)
        host[start : start + len(flat)].copy_(flat)
        start += compute_padded_bytes(layer)
    return host


def move_to_pinned(piece: Tensor) -> Tensor:
    """The piece in pinned memory; as it is where the host has none left, as Windows lets a driver
    pin half of the memory. It is copied more slowly then."""
    try:
        return piece.pin_memory()
    except RuntimeError:
        return piece


def compute_padded_bytes(layer: nn.Linear) -> int:
    """Bytes that a layer's matrix takes of a block."""
    return -(-layer.weight.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
