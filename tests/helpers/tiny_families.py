"""A random pipeline of each family, small enough to run in a second, made without the hub."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
)

from tests.helpers.tiny import byte_alphabet, tiny_sdxl, tiny_text_config, tiny_tokenizer

CHAT = (
    "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHIFTED = {"shift_factor": 0.0609, "scaling_factor": 1.5035, "use_quant_conv": False, "use_post_quant_conv": False}
WORDS = 300
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
VISION = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}


def vae(channels: int = 4, **options) -> AutoencoderKL:
    return AutoencoderKL(latent_channels=channels, **levels_of_two(), **options)


def levels_of_two() -> dict:
    """The sides are halved once: latents of 32 x 32 from pictures of 64 x 64."""
    return {
        "block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "sample_size": 32,
    }


def flow(**options) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**options)


def clip(kind: type, folder: Path, number: str = "") -> dict:
    """An encoder of width 32 and its tokenizer, as parts of a pipeline."""
    tokenizer = tiny_tokenizer(folder / "tokenizer_files")
    eos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    encoder = kind(tiny_text_config(32, eos, projection_dim=32))
    return {f"text_encoder{number}": encoder, f"tokenizer{number}": tokenizer}


def t5(width: int, number: str) -> dict:
    config = T5Config(vocab_size=WORDS, d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return {f"text_encoder{number}": T5EncoderModel(config), f"tokenizer{number}": plain_tokenizer()}


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, with an end after each text."""
    special = ("<pad>", "</s>", "<unk>", "<bos>")
    words = {token: number for number, token in enumerate([*special, *byte_alphabet()])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = [("</s>", words["</s>"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=end)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<bos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, padding_side="right", **names)


def qwen_tokenizer() -> Qwen2Tokenizer:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    words = {token: number for number, token in enumerate([*byte_alphabet(), *special])}
    tokenizer = Qwen2Tokenizer(vocab=words, merges=[])
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen3(kind: type = Qwen3Model) -> nn.Module:
    return kind(Qwen3Config(num_hidden_layers=3, head_dim=8, vocab_size=WORDS, max_position_embeddings=1024, **SMALL))


def sd1(folder: Path) -> StableDiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=32,
    )
    noise = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(unet=unet, scheduler=noise, vae=vae(), **clip(CLIPTextModel, folder), **nothing)


def sd3(folder: Path) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=96,
    )
    clips = clip(CLIPTextModelWithProjection, folder) | clip(CLIPTextModelWithProjection, folder, "_2")
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=flow(shift=3.0), vae=vae(**SHIFTED), **clips, **t5(64, "_3")
    )


def flux(folder: Path) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    texts = clip(CLIPTextModel, folder) | t5(32, "_2")
    shifting = flow(use_dynamic_shifting=True)
    return FluxPipeline(transformer=transformer, scheduler=shifting, vae=vae(**SHIFTED), **texts)


def flux2(folder: Path) -> Flux2KleinPipeline:
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=False,
    )
    autoencoder = AutoencoderKLFlux2(latent_channels=4, **levels_of_two())
    autoencoder.bn.running_mean.normal_()
    autoencoder.bn.running_var.uniform_(0.5, 2)
    return Flux2KleinPipeline(
        transformer=transformer,
        scheduler=flow(use_dynamic_shifting=True),
        vae=autoencoder,
        text_encoder=qwen3(Qwen3ForCausalLM),
        tokenizer=qwen_tokenizer(),
        is_distilled=False,
    )


def z_image(folder: Path) -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 64, 64],
    )
    with torch.no_grad():
        transformer.x_pad_token.fill_(1)
        transformer.cap_pad_token.fill_(1)
    return ZImagePipeline(
        transformer=transformer,
        scheduler=flow(shift=3.0),
        vae=vae(16, **SHIFTED),
        text_encoder=qwen3(),
        tokenizer=qwen_tokenizer(),
    )


def qwen_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 2.0, 0.5, 1.5],
    )


def qwen_image(folder: Path) -> QwenImagePipeline:
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    rope = {"rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}, "rope_theta": 1e6}
    special = {"vision_end_token_id": 257, "vision_start_token_id": 256, "vision_token_id": 258}
    config = Qwen2_5_VLConfig(
        text_config={**SMALL, **rope, "num_hidden_layers": 2, "vocab_size": WORDS},
        vision_config=VISION,
        hidden_size=16,
        vocab_size=WORDS,
        **special,
    )
    return QwenImagePipeline(
        transformer=transformer,
        scheduler=flow(use_dynamic_shifting=True),
        vae=qwen_vae(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=qwen_tokenizer(),
    )


def krea2(folder: Path) -> Krea2Pipeline:
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {**SMALL, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": WORDS, "rope_parameters": rope}
    return Krea2Pipeline(
        transformer=transformer,
        scheduler=flow(use_dynamic_shifting=True),
        vae=qwen_vae(),
        text_encoder=Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=VISION, vocab_size=WORDS)),
        tokenizer=qwen_tokenizer(),
        text_encoder_select_layers=(0, 1, 2),
    )


def gemma() -> Gemma2Model:
    config = Gemma2Config(**{**SMALL, "hidden_size": 8}, head_dim=4, num_hidden_layers=3, vocab_size=WORDS)
    return Gemma2Model(config)


def lumina2(folder: Path) -> Lumina2Pipeline:
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=2,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=[4, 2, 2],
        cap_feat_dim=8,
    )
    parts = {"vae": vae(**SHIFTED), "text_encoder": gemma(), "tokenizer": plain_tokenizer()}
    return Lumina2Pipeline(transformer=transformer, scheduler=flow(shift=6.0), **parts)


def sana(folder: Path) -> SanaPipeline:
    blocks = ("ResBlock", "EfficientViTBlock")
    autoencoder = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )
    parts = {"vae": autoencoder, "text_encoder": gemma(), "tokenizer": plain_tokenizer()}
    return SanaPipeline(transformer=transformer, scheduler=flow(shift=7.0), **parts)


MAKERS: dict[str, Callable[[Path], DiffusionPipeline]] = {
    "sdxl": tiny_sdxl,
    "sd1": sd1,
    "sd3": sd3,
    "flux": flux,
    "flux2": flux2,
    "z_image": z_image,
    "qwen_image": qwen_image,
    "krea2": krea2,
    "lumina2": lumina2,
    "sana": sana,
}
OPTIONS = {"flux2": {"text_encoder_out_layers": (1, 2, 3)}}
"""What the little encoders need of `encode_prompt`."""


def tiny_pipeline(name: str, folder: Path) -> DiffusionPipeline:
    """The family's pipeline, frozen. `folder` receives files of tokenizers."""
    torch.manual_seed(0)
    pipe = MAKERS[name](folder)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return pipe
