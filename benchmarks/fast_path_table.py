"""The fused projections compared with PEFT's own layers: the largest differences of output and gradients.

    python -m benchmarks.fast_path_table [--json FILE] [--bases bf16 NF4] [--how inductor]

One step of a small random SDXL UNet with adapters far from their start, for every number format of the frozen base, on
attention with q, k and v computed together, and with convolutions beside them. "traced": all transformer blocks by
`torch.compile`, run operation by operation (aot_eager); "inductor": one of them built by the trainer's own backend.
The output's difference is a share of its largest value, a gradient's one of its own norm; the worst gradient counts.
PEFT's own distance from the same step in fp64 stands beside it: that is what the format's rounding costs by itself.
8-bit layers keep PEFT's path, so nothing differs there; 4-bit ones take the fast path one by one. fp16 is computed by
the CPU's fp16 kernels.
"""

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers.models import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.utils import logging
from torch import Tensor, nn

from benchmarks.fold_table import small_unet
from dreambooth_moslora.adapters.fast_linear import WorkingCopies, enable_fast_path
from dreambooth_moslora.adapters.moslora import ATTENTION_PROJECTIONS, MoSLoraConfig, adapter_parameters, inject
from dreambooth_moslora.base.load import TextProducts, quantize
from dreambooth_moslora.training import step as compiled_blocks

__all__ = ["BASES", "HOW", "TARGETS", "adapted", "compare"]

BASES = {
    "fp32": (torch.float32, "none"),
    "bf16": (torch.bfloat16, "none"),
    "fp16": (torch.float16, "none"),
    "NF4": (torch.bfloat16, "nf4"),
    "int8": (torch.bfloat16, "int8"),
}
"""Name -> number format of the arithmetic, and `--base_quantization`."""
HOW = ("plain", "recomputed", "text cached", "traced", "inductor")
TARGETS = {
    "q/k/v together": list(ATTENTION_PROJECTIONS),
    "with conv": [*ATTENTION_PROJECTIONS, "conv1", "conv_shortcut", "downsamplers.0.conv"],
}
Step = tuple[Tensor, dict[str, Tensor]]
"""The output (2,4,16,16), and the gradient of each trained parameter, in fp64."""


def adapted(base: str, targets: str, cached: bool = False) -> UNet2DConditionModel:
    """In training mode, frozen, the adapter in fp32. ΔW is about as large as W. `cached`: with `TextProducts`."""
    dtype, bits = BASES[base]
    unet = small_unet().to(dtype).requires_grad_(False)
    quantize(unet, bits, dtype)
    if cached:
        TextProducts(unet, torch.device("cpu"))
    inject(unet, MoSLoraConfig(r=4, lora_alpha=7, target_modules=TARGETS[targets]))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in adapter_parameters(unet):
            parameter.add_(0.08 * torch.randn(parameter.shape, generator=generator))
    return unet.train()


def loss_of(unet: UNet2DConditionModel) -> tuple[Tensor, Tensor]:
    """The output, and its mean square in at least fp32."""
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(unet.conv_in.weight.dtype)

    added = {"text_embeds": noise(2, 32), "time_ids": torch.full((2, 6), 128.0, dtype=unet.conv_in.weight.dtype)}
    output = unet(noise(2, 4, 16, 16), 300, noise(2, 77, 64), added_cond_kwargs=added).sample
    return output, output.to(torch.promote_types(output.dtype, torch.float32)).square().mean()


def given(output: Tensor, model: nn.Module) -> Step:
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return output.detach().double(), found


def by_peft(unet: UNet2DConditionModel) -> Step:
    output, loss = loss_of(unet)
    loss.backward()
    return given(output, unet)


def by_fast_path(unet: UNet2DConditionModel, how: str) -> Step:
    """A training step as the trainer makes it."""
    enable_fast_path(unet)
    if how == "recomputed":
        unet.enable_gradient_checkpointing()
    if how in ("traced", "inductor"):
        blocks = [block for block in unet.modules() if isinstance(block, BasicTransformerBlock)]
        for block in blocks if how == "traced" else blocks[:1]:
            block.compile(backend="aot_eager" if how == "traced" else compiled_blocks.BACKEND)
    with WorkingCopies(unet, joint=True).for_one_step() as copies:
        output, loss = loss_of(unet)
        loss.backward()
        copies.collect()
    return given(output, unet)


def difference(found: Step, expected: Step) -> tuple[float, float]:
    """Relative differences of the output, and of the worst gradient."""
    output = float((found[0] - expected[0]).abs().max() / expected[0].abs().max())
    if found[1].keys() != expected[1].keys():
        return output, float("inf")
    return output, max(float((found[1][n] - g).norm() / g.norm()) for n, g in expected[1].items())


def compare(base: str, targets: str, hows: tuple[str, ...] = HOW) -> Iterator[tuple[str, tuple[float, float]]]:
    """(how, differences to PEFT's); last, for a base that is not quantised, "PEFT to fp64"."""
    model, is_dense = adapted(base, targets), BASES[base][1] == "none"
    expected = by_peft(copy.deepcopy(model))
    for how in hows:
        if how == "text cached" and not is_dense:
            continue
        torch._dynamo.reset()
        twin = adapted(base, targets, cached=True) if how == "text cached" else copy.deepcopy(model)
        yield how, difference(by_fast_path(twin, how), expected)
    if is_dense:
        yield "PEFT to fp64", difference(expected, by_peft(model.double()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--how", nargs="+", choices=HOW, default=list(HOW))
    parser.add_argument("--bases", nargs="+", choices=list(BASES), default=list(BASES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.set_verbosity_error()  # diffusers warns of casting a whole model
    columns, rows = (*args.how, "PEFT to fp64"), {}
    print("| base | adapters on | " + " | ".join(columns) + " |")
    print("|---" * (2 + len(columns)) + "|")
    for base in args.bases:
        for targets in TARGETS:
            found = rows[f"{base}, {targets}"] = dict(compare(base, targets, tuple(args.how)))
            cells = [f"{found[how][0]:.0e}, {found[how][1]:.0e}" if how in found else "" for how in columns]
            print(f"| {base} | {targets} | " + " | ".join(cells) + " |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
