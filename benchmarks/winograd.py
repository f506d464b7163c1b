"""A training step of the embedded base's UNet in fp32, forward and backward: PyTorch's convolutions beside
`toybox.learning.winograd`, each with and without `keep_freed_memory`.

    python -m benchmarks.winograd [--batch 48] [--levels 2] [--steps 3]

One thread, as each process of `toybox.keep_training` has. Each of the four is a process of its own, because memory that
is kept stays kept. The first step is not counted. The gradients' difference is a share of their norm.
"""

import argparse
import time
from multiprocessing import get_context

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from dreambooth_moslora.disk.processes import keep_freed_memory
from toybox.learning.channels_last import to_channels_last
from toybox.learning.train_unet import SHAPES, build_unet
from toybox.learning.winograd import use_winograd

__all__ = ["main"]


def measure(winograd: bool, keep: bool, levels: int, batch: int, steps: int) -> tuple[float, Tensor]:
    """Seconds of the middle step, and the gradients of all weights in one vector."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if keep:
        keep_freed_memory()
    unet = build_unet(levels).train().to(memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())
    if winograd:
        use_winograd(unet)
    noisy, t = to_channels_last(torch.randn(batch, 4, 16, 16), torch.float32), torch.randint(1000, (batch,))
    words, pooled = torch.randn(batch, 77, 256), torch.randn(batch, 160)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]]).repeat(batch, 1)}
    times = []
    for _ in range(steps + 1):
        unet.zero_grad()
        began = time.perf_counter()
        (unet(noisy, t, words, added_cond_kwargs=added).sample - noisy).square().mean().backward()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[steps // 2], torch.cat([p.grad.flatten() for p in unet.parameters()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--levels", type=int, default=2, choices=SHAPES)
    parser.add_argument("--steps", type=int, default=3, help="counted ones")
    args = parser.parse_args()
    found = {}
    for winograd, keep in ((False, False), (False, True), (True, False), (True, True)):
        with get_context("spawn").Pool(1) as pool:
            found[winograd, keep] = pool.apply(measure, (winograd, keep, args.levels, args.batch, args.steps))
        sec = found[winograd, keep][0]
        names = ["Winograd's" if winograd else "PyTorch's"] + ["memory kept"] * keep
        print(f"{', '.join(names)}: {sec:.2f} s, {found[False, False][0] / sec:.2f} times as fast", flush=True)
    direct, ours = found[False, False][1], found[True, False][1]
    print(f"difference of the gradients: {float((ours - direct).norm() / direct.norm()):.1e}")


if __name__ == "__main__":
    main()
