"""Folded against live: the UNet's output with the published file in unmodified diffusers, for every kind of adapter.

    python -m benchmarks.fold_table [--json FILE]

Each cell is the largest difference of a small random SDXL UNet's output (fp32) between the live adapter and the
file, relative to the largest change that the adapter itself makes. The bound is 1e-5. The kohya file of a DoRA
adapter (marked *) is merged into the weights by the definition of `dora_scale`, because diffusers does not read
it.
"""

import argparse
import copy
import json
import tempfile
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models import UNet2DConditionModel
from diffusers.utils import logging
from torch import Tensor

from dreambooth_moslora.adapters.key_names import kohya_name
from dreambooth_moslora.adapters.moslora import (
    ATTENTION_PROJECTIONS,
    MoSLoraConfig,
    adapter_layers,
    adapter_parameters,
    inject,
)
from dreambooth_moslora.adapters.published_file import load_published, publish
from dreambooth_moslora.adapters.raw_file import adapter_metadata
from dreambooth_moslora.disk.run_folder import KOHYA_SUFFIX, PUBLISHED_NAME
from dreambooth_moslora.settings.table import KRONECKER, MIXERS

BOUND = 1e-5
VARIANTS = {
    "alpha = r": {"lora_alpha": 4},
    "alpha ≠ r": {"lora_alpha": 7},
    "rsLoRA": {"lora_alpha": 4, "use_rslora": True},
    "rank pattern": {"lora_alpha": 5, "rank_pattern": {"attn2.to_k": 2, "to_v": 6}, "alpha_pattern": {"to_q": 3}},
    "DoRA": {"lora_alpha": 6, "use_dora": True},
}


def small_unet() -> UNet2DConditionModel:
    """SDXL's topology, about 1 M parameters."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        cross_attention_dim=64,
    ).eval()


@torch.no_grad()
def output(unet: UNet2DConditionModel) -> Tensor:
    """(2, 4, 16, 16) for a fixed input."""
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    added = {"text_embeds": noise(2, 32), "time_ids": torch.full((2, 6), 128.0)}
    return unet(noise(2, 4, 16, 16), 300, noise(2, 77, 64), added_cond_kwargs=added).sample


@torch.no_grad()
def adapt(unet: UNet2DConditionModel, kind: str, variant: str) -> UNet2DConditionModel:
    """A live adapter far from its start: every A, M, B and magnitude is moved by a random amount.

    ΔW becomes about as large as W. If it were larger, attention would saturate and fp32 rounding alone would
    move the output.
    """
    options = VARIANTS[variant]
    inject(unet, MoSLoraConfig(r=4, target_modules=list(ATTENTION_PROJECTIONS), mixer=kind, **options))
    generator = torch.Generator().manual_seed(7)
    for _, parameter in adapter_parameters(unet):
        parameter.add_(0.08 * torch.randn(parameter.shape, generator=generator))
    return unet.eval()


def loaded_by_diffusers(unet: UNet2DConditionModel, file: Path) -> UNet2DConditionModel:
    pipeline = StableDiffusionXLPipeline(
        vae=None, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, scheduler=None, unet=unet
    )
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    return unet


@torch.no_grad()
def merged_by_definition(unet: UNet2DConditionModel, file: Path, paths: list[str]) -> UNet2DConditionModel:
    """W ← dora_scale · (W + ΔW) / ‖W + ΔW‖ per output row."""
    tensors, _ = load_published(file)
    for path in paths:
        name = kohya_name("unet", path)
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        weight = unet.get_submodule(path).weight
        moved = weight + tensors[f"{name}.alpha"] / len(down) * up @ down
        weight.copy_(tensors[f"{name}.dora_scale"] * moved / moved.norm(dim=1, keepdim=True))
    return unet


def measure(kind: str, variant: str, folder: Path) -> dict[str, float]:
    """File form -> largest output difference / largest effect of the adapter."""
    base = small_unet()
    live = adapt(copy.deepcopy(base), kind, variant)
    components = {"unet": live}
    publish(components, folder, "table", adapter_metadata(components))
    wanted = output(live)
    effect = float((wanted - output(base)).abs().max())
    kohya = folder / f"table{KOHYA_SUFFIX}"
    twins = {"diffusers": loaded_by_diffusers(copy.deepcopy(base), folder / PUBLISHED_NAME)}
    if variant == "DoRA":
        twins["kohya"] = merged_by_definition(copy.deepcopy(base), kohya, list(adapter_layers(live)))
    else:
        twins["kohya"] = loaded_by_diffusers(copy.deepcopy(base), kohya)
    return {form: float((output(unet) - wanted).abs().max()) / effect for form, unet in twins.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.set_verbosity_error()  # diffusers announces that the file has no text encoder
    print(f"{'mixer':<12} {'file':<10} " + " ".join(f"{variant:>13}" for variant in VARIANTS))
    rows = {}
    for kind in (kind for kind in MIXERS if kind != KRONECKER):  # no convolution can carry it
        with tempfile.TemporaryDirectory() as folder:
            row = {variant: measure(kind, variant, Path(folder)) for variant in VARIANTS}
        rows[kind] = row
        for form in ("diffusers", "kohya"):
            cells = [f"{row[v][form]:.1e}" + ("*" if (form, v) == ("kohya", "DoRA") else " ") for v in VARIANTS]
            print(f"{kind:<12} {form:<10} " + " ".join(f"{cell:>13}" for cell in cells), flush=True)
    worst = max(value for row in rows.values() for cell in row.values() for value in cell.values())
    print(f"largest: {worst:.1e} of the adapter's effect; bound {BOUND:.0e}: {'kept' if worst <= BOUND else 'BROKEN'}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
