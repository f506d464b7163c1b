"""The published file in unmodified diffusers beside the live adapter, on a small random SDXL
UNet."""

import copy
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models import UNet2DConditionModel
from torch import Tensor

from dreambooth_moslora.disk.run_folder import KOHYA_SUFFIX, PUBLISHED_NAME
from dreambooth_moslora.lora.key_names import format_kohya_name
from dreambooth_moslora.lora.metadata import AdapterMetadata, parse_metadata
from dreambooth_moslora.lora.raw_file import build_adapter_metadata
from dreambooth_moslora.lora.safetensors_file import read_tensors
from dreambooth_moslora.lora.writer import publish
from dreambooth_moslora.method.moslora import (
    MoSLoraConfig,
    get_adapter_layers,
    inject,
    list_adapter_parameters,
)
from dreambooth_moslora.settings import field_facts

BOUND = 1e-5
VARIANTS = {
    "alpha = r": {"lora_alpha": 4},
    "alpha ≠ r": {"lora_alpha": 7},
    "rsLoRA": {"lora_alpha": 4, "use_rslora": True},
    "rank pattern": {
        "lora_alpha": 5,
        "rank_pattern": {"attn2.to_k": 2, "to_v": 6},
        "alpha_pattern": {"to_q": 3},
    },
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

    ΔW becomes about as large as W. If it were larger, attention would saturate and fp32 rounding
    alone would move the output.
    """
    options = VARIANTS[variant]
    inject(
        unet,
        MoSLoraConfig(
            r=4, target_modules=list(field_facts.ATTENTION_LAYERS), mixer=kind, **options
        ),
    )
    generator = torch.Generator().manual_seed(7)
    for _, parameter in list_adapter_parameters(unet):
        parameter.add_(0.08 * torch.randn(parameter.shape, generator=generator))
    return unet.eval()


def loaded_by_diffusers(unet: UNet2DConditionModel, file: Path) -> UNet2DConditionModel:
    pipeline = StableDiffusionXLPipeline(
        vae=None,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        scheduler=None,
        unet=unet,
    )
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    return unet


def load_published(path: Path) -> tuple[dict[str, Tensor], AdapterMetadata | None]:
    """Tensors of a LoRA file, or of that in a folder, and its metadata if we wrote it."""
    tensors, header = read_tensors(path / PUBLISHED_NAME if path.is_dir() else path)
    return tensors, parse_metadata(header)


@torch.no_grad()
def merged_by_definition(
    unet: UNet2DConditionModel, file: Path, paths: list[str]
) -> UNet2DConditionModel:
    """W ← dora_scale · (W + ΔW) / ‖W + ΔW‖ per output row."""
    tensors, _ = load_published(file)
    for path in paths:
        name = format_kohya_name("unet", path)
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        weight = unet.get_submodule(path).weight
        moved = weight + tensors[f"{name}.alpha"] / len(down) * up @ down
        weight.copy_(tensors[f"{name}.dora_scale"] * moved / moved.norm(dim=1, keepdim=True))
    return unet


def measure(kind: str, variant: str, folder: Path) -> dict[str, float]:
    """File form -> largest output difference / largest effect of the adapter, fp32.

    The kohya file of a DoRA adapter is merged into the weights by the definition of `dora_scale`,
    because diffusers does not read it.
    """
    base = small_unet()
    live = adapt(copy.deepcopy(base), kind, variant)
    components = {"unet": live}
    publish(components, folder, "table", build_adapter_metadata(components))
    expected = output(live)
    effect = float((expected - output(base)).abs().max())
    kohya = folder / f"table{KOHYA_SUFFIX}"
    twins = {"diffusers": loaded_by_diffusers(copy.deepcopy(base), folder / PUBLISHED_NAME)}
    if variant == "DoRA":
        twins["kohya"] = merged_by_definition(
            copy.deepcopy(base), kohya, list(get_adapter_layers(live))
        )
    else:
        twins["kohya"] = loaded_by_diffusers(copy.deepcopy(base), kohya)
    return {
        form: float((output(unet) - expected).abs().max()) / effect for form, unet in twins.items()
    }
