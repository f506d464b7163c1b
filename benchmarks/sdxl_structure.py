"""Count the projections and parameters of the full SDXL UNet's adapter on its structure without
weights.

python -m benchmarks.sdxl_structure
"""

from collections import Counter

import torch
from diffusers import UNet2DConditionModel

from dreambooth_moslora.extras.lab.full_step import SDXL
from dreambooth_moslora.method.moslora import (
    MoSLoraConfig,
    get_adapter_layers,
    inject,
    list_adapter_parameters,
    list_mixer_parameters,
)
from dreambooth_moslora.settings import field_facts

RANKS = (4, 16, 64)


def build_sdxl_unet() -> UNet2DConditionModel:
    """Build the UNet of stable-diffusion-xl-base-1.0 on the meta device: 2.57 G parameters, no
    memory."""
    with torch.device("meta"):
        return UNet2DConditionModel(**SDXL)


def count(rank: int) -> dict[str, float]:
    """Projections, and millions of parameters in A and B, and in the mixers."""
    unet = inject(
        build_sdxl_unet(),
        MoSLoraConfig(r=rank, lora_alpha=rank, target_modules=list(field_facts.ATTENTION_LAYERS)),
    )
    mixers = sum(p.numel() for _, p in list_mixer_parameters(unet))
    every = sum(p.numel() for _, p in list_adapter_parameters(unet))
    return {
        "projections": len(get_adapter_layers(unet)),
        "a_and_b": (every - mixers) / 1e6,
        "mixers": mixers / 1e6,
    }


def main() -> None:
    unet = build_sdxl_unet()
    print(f"SDXL UNet: {sum(p.numel() for p in unet.parameters()) / 1e9:.2f} G parameters")
    sizes = Counter(
        (m.in_features, m.out_features)
        for n, m in unet.named_modules()
        if n.endswith(field_facts.ATTENTION_LAYERS)
    )
    for (inputs, outputs), number in sizes.most_common():
        print(f"{number:>5} projections {inputs:>5} → {outputs}")
    print(f"{'rank':>5} {'projections':>12} {'A and B':>10} {'mixers':>9}")
    for rank in RANKS:
        row = count(rank)
        print(
            f"{rank:>5} {row['projections']:>12} {row['a_and_b']:>8.2f} M {row['mixers']:>7.3f} M"
        )


if __name__ == "__main__":
    main()
