"""Block streaming: the frozen base's blocks stay on the host and are copied to the device in turn.

    host      block 0  | block 1  | block 2 | …   pinned for CUDA
    device    buffer 0 | buffer 1                 block n is copied to buffer n mod 2

While a block computes, the next one is copied, and after a pass without gradients the first ones,
for the next pass. Nothing is copied back, as the base is frozen. Adapters, norms, biases, and the
scales of packed weights stay on the device.

Of a device on which most of the model fits, only a share of the blocks is streamed, evenly spaced,
so that several blocks compute during each copy.

Streaming needs blocks that are recomputed (gradient checkpointing), which read no weights between
their two forward passes. A block is copied before its forward, and again when the first gradient of
its outputs arrives. Its addresses never change, so that views of its weights stay valid:
bitsandbytes keeps one from the forward pass, and reads it before anything is recomputed.

Generation on a small device streams the text encoders too: `move_to_device` frees the buffers
between two images, and `end` restores the model.

diffusers' group offloading frees a block when its forward ends, before the backward pass has read
it, and restores each weight to its earlier value, the trained ones too.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dreambooth_moslora.base import devices
from dreambooth_moslora.base.devices import RESIDENT_BLOCKS
from dreambooth_moslora.base.families import list_block_classes

ALIGNMENT_BYTES = 256
"""Alignment of each weight in a buffer: kernels read several numbers at once."""
USE_ORDER = (
    *("down_blocks.", "mid_block.", "up_blocks."),  # a UNet defines its middle block last
    *("txt_mode_blocks.", "mode_blocks.", "single_transformer_blocks."),  # FLUX 3
    "mode_blocks.image_cond.",
)
"""Beginnings of blocks' paths in the order of use, which is otherwise that of definition."""
UNUSED_BLOCKS = "mode_blocks.image_cond."
"""Beginning of the paths of blocks that only reference images pass through. They come last."""
PIECE_BYTES = 2**24
"""Bytes of a piece of a block on the host: PyTorch rounds a pinned buffer up to a power of two."""


class BlockCopier:
    """Copier of blocks to the device: asynchronous on a separate stream of a GPU of Nvidia or AMD,
    synchronous elsewhere."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, buffer: Tensor, pieces: Sequence[Tensor]) -> torch.cuda.Event | None:
        """Start to fill the buffer (bytes,) with the pieces. Return the event for `wait`."""
        if self.stream is None:
            return copy_pieces(buffer, pieces)

        # Kernels that are queued already may still read the block that the copy overwrites.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            copy_pieces(buffer, pieces)
        return self.stream.record_event()

    def wait(self, copy: torch.cuda.Event | None) -> None:
        """Make all later computation wait for the end of this copy."""
        if copy is not None:
            torch.cuda.current_stream(self.device).wait_event(copy)


def copy_pieces(buffer: Tensor, pieces: Sequence[Tensor]) -> None:
    """Copy the pieces to the beginning of the buffer (bytes,), asynchronously if pinned."""
    for target, piece in zip(buffer.split(PIECE_BYTES), pieces):
        target[: len(piece)].copy_(piece, non_blocking=piece.is_pinned())


class StreamedBlock(NamedTuple):
    """Block with its path in the model, and the layers whose matrices are streamed."""

    path: str
    module: nn.Module
    layers: list[nn.Linear]

    @property
    def padded_bytes(self) -> int:
        """Return the bytes of its matrices in a buffer."""
        return sum(map(compute_padded_bytes, self.layers))


class StreamedBlocks:
    """Matrices of a model's blocks on the host, which are copied to the device for computation.

    model: denoiser or text encoder, changed in place, on the host or on the device, dense or in 4
        or 8 bit; the caller moves all but the blocks' matrices
    device: on which the model computes
    copies: copier of the blocks; by default one for the device
    share: of the blocks' bytes that is streamed at least, in (0, 1]; the caller moves the rest

    `resident_blocks` are the indices of the blocks in the device's buffers.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        copies: BlockCopier | None = None,
        share: float = 1.0,
    ):
        self.blocks = select_evenly(list_streamed_blocks(model), share)
        self.pass_length = sum(not block.path.startswith(UNUSED_BLOCKS) for block in self.blocks)
        self.largest = max(block.padded_bytes for block in self.blocks)
        self.make_buffers(device, copies or BlockCopier(device))

        # Move each block to the host, and copy it back whenever its forward is called. The hooks
        # must not be compiled.
        is_cuda = device.type == "cuda"
        self.pieces: list[list[Tensor]] = []
        self.hooks: list[RemovableHandle] = []
        enter = torch.compiler.disable(self.enter)
        leave = torch.compiler.disable(self.leave)
        for number, block in enumerate(self.blocks):
            packed = pack_weights(block.layers).split(PIECE_BYTES)
            self.pieces.append([move_to_pinned(piece) if is_cuda else piece for piece in packed])
            self.bind_block(number)
            self.hooks.append(block.module.register_forward_pre_hook(partial(enter, number)))
            self.hooks.append(block.module.register_forward_hook(partial(leave, number)))

    def make_buffers(self, device: torch.device, copies: BlockCopier) -> None:
        """Allocate buffers on the device, as large as the largest block."""
        self.copies = copies
        self.buffers = [
            torch.empty(self.largest, dtype=torch.uint8, device=device)
            for _ in range(RESIDENT_BLOCKS)
        ]
        self.resident_blocks: list[int | None] = [None] * RESIDENT_BLOCKS
        self.pending_copies: list[Any] = [None] * RESIDENT_BLOCKS
        self.last = -1

    def move_to_device(self, device: torch.device) -> None:
        """Move the buffers to another device, between two passes. Blocks stay on the host."""
        self.wait()
        self.make_buffers(device, BlockCopier(device))
        for number in range(len(self.blocks)):
            self.bind_block(number)

    def wait(self) -> None:
        """Make all later computation wait for the end of all copies: one may still write to a
        buffer whose memory is freed."""
        for copy in self.pending_copies:
            self.copies.wait(copy)

    def end(self) -> None:
        """Remove the hooks and restore the matrices on the host."""
        self.wait()
        for hook in self.hooks:
            hook.remove()
        for block, pieces in zip(self.blocks, self.pieces, strict=True):
            bind_weights(block.layers, torch.cat(pieces))

            # Free the pinned memory: otherwise the host holds the base twice.
            pieces.clear()
            devices.free_unused_host_blocks()

    def bind_block(self, number: int) -> None:
        """Make a block's matrices views of its buffer."""
        bind_weights(self.blocks[number].layers, self.buffers[number % RESIDENT_BLOCKS])

    def enter(self, number: int, *_: Any) -> None:
        """Wait for block `number` before it computes, forwards or backwards, and start to copy the
        next one, which in a backward pass is the previous one."""
        self.fetch_block(number)
        self.copies.wait(self.pending_copies[number % RESIDENT_BLOCKS])
        next_number = number + 1 if number > self.last else number - 1
        self.last = number
        if 0 <= next_number < self.pass_length:
            self.fetch_block(next_number)

    def leave(self, number: int, block: nn.Module, inputs: tuple, outputs: Any) -> None:
        """Register `enter` for the gradients of block `number`'s outputs. After the last block of a
        pass without gradients, start to copy the first ones for the next pass."""
        if number == self.pass_length - 1 and not torch.is_grad_enabled():
            for first in range(min(RESIDENT_BLOCKS, self.pass_length)):
                self.fetch_block(first)
        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(partial(self.enter, number))

    def fetch_block(self, number: int) -> None:
        """Start to copy a block to its buffer, unless it is there."""
        slot = number % RESIDENT_BLOCKS
        if self.resident_blocks[slot] != number:
            self.resident_blocks[slot] = number
            self.pending_copies[slot] = self.copies.start(self.buffers[slot], self.pieces[number])


def list_streamed_blocks(model: nn.Module) -> list[StreamedBlock]:
    """List the streamed blocks in the order of use. The few blocks that refine an input are
    excluded: Lumina 2 does not recompute them."""
    kinds = list_block_classes(model)
    blocks = []

    for path, module in sorted(model.named_modules(), key=lambda item: rank_by_use(item[0])):
        if type(module).__name__ not in kinds or "refiner" in path:
            continue

        # Exclude the matrices of an adapter that was added before. PEFT's layers, which have the
        # class names of the layers that they wrap, are not PyTorch's.
        layers = []
        for inner_path, layer in module.named_modules():
            is_matrix = type(layer).__name__ in ("Linear", "Linear4bit", "Int8Linear")
            if is_matrix and isinstance(layer, nn.Linear) and ".lora_" not in inner_path:
                layers.append(layer)
        if layers:
            blocks.append(StreamedBlock(path, module, layers))
    return blocks


def select_evenly(blocks: Sequence[StreamedBlock], share: float) -> list[StreamedBlock]:
    """Select blocks, evenly spaced in the order of use, that hold at least this share of all bytes:
    each block before which the selected ones would fall behind the share."""
    selected: list[StreamedBlock] = []
    selected_bytes = passed_bytes = 0
    for block in blocks:
        passed_bytes += block.padded_bytes
        if selected_bytes < share * passed_bytes:
            selected.append(block)
            selected_bytes += block.padded_bytes
    return selected


def rank_by_use(path: str) -> int:
    """Return the place of a module's path in `USE_ORDER`; 0 for a path that is not there."""
    ranks = [rank for rank, prefix in enumerate(USE_ORDER) if path.startswith(prefix)]
    return max(ranks, default=0)


def bind_weights(layers: Sequence[nn.Linear], buffer: Tensor) -> None:
    """Make the layers' matrices views of the buffer (bytes,)."""
    start = 0
    for layer in layers:
        weight = layer.weight
        part = buffer[start : start + weight.nbytes]
        weight.data = part.view(weight.dtype).view(weight.shape)
        start += compute_padded_bytes(layer)


def pack_weights(layers: Sequence[nn.Linear]) -> Tensor:
    """Copy the layers' matrices to the host as bytes, in the layout of a buffer."""
    host = torch.empty(sum(map(compute_padded_bytes, layers)), dtype=torch.uint8)
    start = 0
    for layer in layers:
        flat = layer.weight.data.contiguous().view(-1).view(torch.uint8)
        host[start : start + len(flat)].copy_(flat)
        start += compute_padded_bytes(layer)
    return host


def move_to_pinned(piece: Tensor) -> Tensor:
    """Copy a piece to pinned memory. Return it unchanged, for slower copies, if the host can pin no
    more: Windows lets a driver pin half of the memory."""
    try:
        return piece.pin_memory()
    except RuntimeError:
        return piece


def compute_padded_bytes(layer: nn.Linear) -> int:
    """Return the bytes of a layer's matrix in a buffer, with padding."""
    return -(-layer.weight.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
