"""A random pipeline of each family, small enough to run in a second, made without the hub, and what
the tests know of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn

from dreambooth_moslora.base import modular
from dreambooth_moslora.base.families import pack_latents
from tests.helpers.tiny import byte_alphabet, tiny_sdxl, tiny_text_config, tiny_tokenizer

CHAT = (
    "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHIFTED = {
    "shift_factor": 0.0609,
    "scaling_factor": 1.5035,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
WORDS = 300
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 16,
}
ENDS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
HALVED = ENDS | {
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "sample_size": 32,
}
"""The sides are halved once: latents of 32 x 32 from pictures of 64 x 64."""
DYNAMIC = {"use_dynamic_shifting": True}


def vae(channels: int = 4, **options) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(latent_channels=channels, **HALVED, **options)


def clip(kind: type, folder: Path, number: str = "") -> dict:
    """An encoder of width 32 and its tokenizer, as parts of a pipeline."""
    tokenizer = tiny_tokenizer(folder / "tokenizer_files")
    eos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    encoder = kind(tiny_text_config(32, eos, projection_dim=32))
    return {f"text_encoder{number}": encoder, f"tokenizer{number}": tokenizer}


def t5(width: int, number: str) -> dict:
    config = transformers.T5Config(
        vocab_size=WORDS, d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4
    )
    return {
        f"text_encoder{number}": transformers.T5EncoderModel(config),
        f"tokenizer{number}": plain_tokenizer(),
    }


def plain_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Bytes, with an end after each text."""
    special = ("<pad>", "</s>", "<unk>", "<bos>")
    vocabulary = {token: number for number, token in enumerate([*special, *byte_alphabet()])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = [("</s>", vocabulary["</s>"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=end)
    names = dict(zip(("pad_token", "eos_token", "unk_token", "bos_token"), special))
    options = {"model_max_length": 512, "padding_side": "right", **names}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def qwen_tokenizer() -> transformers.Qwen2Tokenizer:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    vocabulary = {token: number for number, token in enumerate([*byte_alphabet(), *special])}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen3(kind: type = transformers.Qwen3Model, layers: int = 3) -> dict:
    sizes = {
        "num_hidden_layers": layers,
        "head_dim": 8,
        "vocab_size": WORDS,
        "max_position_embeddings": 1024,
        **SMALL,
    }
    return {"text_encoder": kind(transformers.Qwen3Config(**sizes)), "tokenizer": qwen_tokenizer()}


def gemma() -> dict:
    sizes = {**SMALL, "hidden_size": 8, "head_dim": 4, "num_hidden_layers": 3, "vocab_size": WORDS}
    encoder = transformers.Gemma2Model(transformers.Gemma2Config(**sizes))
    return {"text_encoder": encoder, "tokenizer": plain_tokenizer()}


def with_flow(kind: type, transformer: nn.Module, flow: dict, **parts) -> DiffusionPipeline:
    """The pipeline whose scheduler has these settings of a flow."""
    return kind(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(**flow), **parts)


def sd1(folder: Path) -> DiffusionPipeline:
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    sizes = {
        "sample_size": 16,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
    }
    sizes |= {"attention_head_dim": 2, "cross_attention_dim": 32}
    unet = diffusers.UNet2DConditionModel(down_block_types=down, up_block_types=up, **sizes)
    noise = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    parts = clip(transformers.CLIPTextModel, folder) | {
        "unet": unet,
        "scheduler": noise,
        "vae": vae(),
    }
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline(**parts, **nothing)


def sd3(folder: Path) -> DiffusionPipeline:
    texts = {"caption_projection_dim": 32, "joint_attention_dim": 64, "pooled_projection_dim": 64}
    sizes = {
        "in_channels": 4,
        "out_channels": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        **texts,
    }
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32, patch_size=2, num_layers=2, pos_embed_max_size=96, **sizes
    )
    kind = transformers.CLIPTextModelWithProjection
    encoders = clip(kind, folder) | clip(kind, folder, "_2") | t5(64, "_3")
    return with_flow(
        diffusers.StableDiffusion3Pipeline,
        transformer,
        {"shift": 3.0},
        vae=vae(**SHIFTED),
        **encoders,
    )


LAYERS = {"patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2}
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}


def flux(folder: Path) -> DiffusionPipeline:
    texts = {"joint_attention_dim": 32, "pooled_projection_dim": 32, "guidance_embeds": True}
    transformer = diffusers.FluxTransformer2DModel(
        axes_dims_rope=[4, 4, 8], **texts, **LAYERS, **HEADS
    )
    encoders = clip(transformers.CLIPTextModel, folder) | t5(32, "_2")
    return with_flow(diffusers.FluxPipeline, transformer, DYNAMIC, vae=vae(**SHIFTED), **encoders)


def flux2(folder: Path) -> DiffusionPipeline:
    transformer = diffusers.Flux2Transformer2DModel(
        joint_attention_dim=48,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=False,
        **LAYERS,
        **HEADS,
    )
    autoencoder = diffusers.AutoencoderKLFlux2(latent_channels=4, **HALVED)
    autoencoder.bn.running_mean.normal_()
    autoencoder.bn.running_var.uniform_(0.5, 2)
    parts = {"vae": autoencoder, "is_distilled": False, **qwen3(transformers.Qwen3ForCausalLM, 28)}
    return with_flow(diffusers.Flux2KleinPipeline, transformer, DYNAMIC, **parts)


def z_image(folder: Path) -> DiffusionPipeline:
    sizes = {
        "in_channels": 16,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
    }
    places = {"axes_dims": [8, 4, 4], "axes_lens": [1024, 64, 64]}
    transformer = diffusers.ZImageTransformer2DModel(cap_feat_dim=16, **sizes, **places)
    with torch.no_grad():
        transformer.x_pad_token.fill_(1)
        transformer.cap_pad_token.fill_(1)
    return with_flow(
        diffusers.ZImagePipeline, transformer, {"shift": 3.0}, vae=vae(16, **SHIFTED), **qwen3()
    )


def qwen_vae() -> diffusers.AutoencoderKLQwenImage:
    scale = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 1.5]}
    sizes = {"base_dim": 24, "z_dim": 4, "dim_mult": [1, 2, 4], "num_res_blocks": 1}
    return diffusers.AutoencoderKLQwenImage(temperal_downsample=[False, True], **sizes, **scale)


def qwen_image(folder: Path) -> DiffusionPipeline:
    sizes = {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "joint_attention_dim": 16,
    }
    transformer = diffusers.QwenImageTransformer2DModel(
        attention_head_dim=16, num_attention_heads=3, axes_dims_rope=(8, 4, 4), **sizes
    )
    rope = {
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "rope_theta": 1e6,
    }
    special = {"vision_end_token_id": 257, "vision_start_token_id": 256, "vision_token_id": 258}
    text = {**SMALL, **rope, "num_hidden_layers": 2, "vocab_size": WORDS}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=VISION, hidden_size=16, vocab_size=WORDS, **special
    )
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(config)
    parts = {"vae": qwen_vae(), "text_encoder": encoder, "tokenizer": qwen_tokenizer()}
    return with_flow(diffusers.QwenImagePipeline, transformer, DYNAMIC, **parts)


def anima(folder: Path) -> DiffusionPipeline:
    """Our pipeline of the parts, which diffusers' modular pipeline saves."""
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 64, 64),
        extra_pos_embed_type=None,
    )
    conditioner = diffusers.AnimaTextConditioner(
        source_dim=16,
        target_dim=16,
        model_dim=16,
        num_layers=2,
        num_attention_heads=2,
        target_vocab_size=WORDS,
    )
    pipe = with_flow(
        modular.AnimaModularPipeline,
        transformer,
        {"shift": 3.0},
        vae=qwen_vae(),
        text_conditioner=conditioner,
        t5_tokenizer=plain_tokenizer(),
        **qwen3(),
    )
    return saved_as_modular(pipe, diffusers.AnimaAutoBlocks())


def flux3(folder: Path) -> DiffusionPipeline:
    """Our pipeline of the parts, without the one that rewrites prompts."""
    transformer = diffusers.Flux3Transformer2DModel(
        in_channels=16,
        cond_in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=128,
        axes_dims_rope=(4, 4, 4, 4),
    )
    autoencoder = diffusers.AutoencoderKLFlux2(latent_channels=4, **HALVED)
    autoencoder.bn.running_mean.normal_()
    autoencoder.bn.running_var.uniform_(0.5, 2)
    processor = qwen3_vl_processor()
    processor.chat_template = processor.tokenizer.chat_template = CHAT
    pipe = with_flow(
        modular.Flux3ModularPipeline,
        transformer,
        {"shift": 6.93},
        vae=autoencoder,
        text_encoder=qwen3_vl(processor, layers=32),
        tokenizer=processor,
    )
    blocks = diffusers.Flux3AutoBlocks()
    blocks.sub_blocks.pop("prompt_upsampler")
    return saved_as_modular(pipe, blocks)


def saved_as_modular(pipe: DiffusionPipeline, blocks) -> DiffusionPipeline:
    """Let diffusers' modular pipeline of these blocks save the parts."""
    stock = blocks.init_pipeline()
    stock.update_components(**pipe.components)
    pipe.save_pretrained = lambda folder: stock.save_pretrained(
        str(folder), overwrite_modular_index=True
    )
    return pipe


def krea2(folder: Path) -> DiffusionPipeline:
    heads = {
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "axes_dims_rope": (4, 2, 2),
    }
    sizes = {"in_channels": 16, "num_layers": 2, "intermediate_size": 32, "timestep_embed_dim": 8}
    texts = {
        "hidden_dim": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 16,
    }
    blocks = {"num_text_layers": 3, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1}
    transformer = diffusers.Krea2Transformer2DModel(
        **heads, **sizes, **{f"text_{name}": size for name, size in texts.items()}, **blocks
    )
    rope = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    }
    text = {
        **SMALL,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "vocab_size": WORDS,
        "rope_parameters": rope,
    }
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=VISION, vocab_size=WORDS)
    parts = {
        "vae": qwen_vae(),
        "text_encoder": transformers.Qwen3VLModel(config),
        "tokenizer": qwen_tokenizer(),
    }
    return with_flow(
        diffusers.Krea2Pipeline, transformer, DYNAMIC, text_encoder_select_layers=(0, 1, 2), **parts
    )


def qwen3_vl_processor() -> transformers.Qwen3VLProcessor:
    """Bytes for a text, and 2 x 2 patches of 16 px a token for a picture."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>")
    special += ("<|vision_start|>", "<|vision_end|>")
    vocabulary = {token: number for number, token in enumerate([*byte_alphabet(), *special])}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    chat = CHAT.replace("m['content']", "m['content'][0]['text']")
    patches = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    return transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(
            size={"shortest_edge": 32**2, "longest_edge": 256**2}, **patches
        ),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(**patches),
        chat_template=chat,
    )


def qwen3_vl(processor, layers: int = 2) -> transformers.Qwen3VLForConditionalGeneration:
    numbers = processor.tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}
    text = {**SMALL, "num_hidden_layers": layers, "head_dim": 8, "vocab_size": WORDS}
    vision = {**VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    config = transformers.Qwen3VLConfig(
        text_config=text | {"rope_parameters": rope | {"mrope_interleaved": True}},
        vision_config=vision,
        image_token_id=numbers("<|image_pad|>"),
        video_token_id=numbers("<|video_pad|>"),
        vision_start_token_id=numbers("<|vision_start|>"),
        vision_end_token_id=numbers("<|vision_end|>"),
    )
    return transformers.Qwen3VLForConditionalGeneration(config)


def qwen_image21(folder: Path) -> DiffusionPipeline:
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    autoencoder = diffusers.AutoencoderKLQwenImage21(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 2.0, 0.5, 1.5],
    )
    processor = qwen3_vl_processor()
    encoder = qwen3_vl(processor)
    parts = {"vae": autoencoder, "text_encoder": encoder, "processor": processor}
    return with_flow(diffusers.QwenImage21Pipeline, transformer, DYNAMIC, **parts)


def lumina2(folder: Path) -> DiffusionPipeline:
    sizes = {
        "sample_size": 4,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 8,
        "num_layers": 2,
        "multiple_of": 16,
    }
    heads = {"num_attention_heads": 1, "num_kv_heads": 1, "axes_dim_rope": [4, 2, 2]}
    transformer = diffusers.Lumina2Transformer2DModel(cap_feat_dim=8, **sizes, **heads)
    return with_flow(
        diffusers.Lumina2Pipeline, transformer, {"shift": 6.0}, vae=vae(**SHIFTED), **gemma()
    )


def sana(folder: Path) -> DiffusionPipeline:
    sides = {}
    for side in ("encoder", "decoder"):
        sides |= {
            f"{side}_block_types": ("ResBlock", "EfficientViTBlock"),
            f"{side}_block_out_channels": (8, 8),
        }
        sides |= {f"{side}_qkv_multiscales": ((), (5,)), f"{side}_layers_per_block": (1, 1)}
    sides |= {"downsample_block_type": "conv", "upsample_block_type": "interpolate"}
    sides |= {
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "scaling_factor": 0.41407,
    }
    autoencoder = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, **sides
    )
    sizes = {
        "patch_size": 1,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "sample_size": 32,
    }
    heads = {"num_attention_heads": 2, "attention_head_dim": 4}
    crossed = {
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 4,
        "cross_attention_dim": 8,
    }
    transformer = diffusers.SanaTransformer2DModel(caption_channels=8, **sizes, **heads, **crossed)
    flow = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    parts = {
        "scheduler": diffusers.DPMSolverMultistepScheduler(**flow),
        "vae": autoencoder,
        **gemma(),
    }
    return diffusers.SanaPipeline(transformer=transformer, **parts)


@dataclass(frozen=True)
class TinyFamily:
    """What the tests know of one family.

    make: makes its tiny pipeline; gets a folder for files of tokenizers
    one_layer: that diffusers' own tests train alone, by its path; "" for UNets
    settings: of a run, that the little encoders need
    instructed: arguments of `encode_prompt` that put an instruction before a prompt
    as_tokens: latents (B, C, h, w) as the tokens that its pipeline takes; None where it takes them
        as they are
    prompts: of which its pipeline draws in a batch what it draws of each alone
    file_type: diffusers' word for a single file of it; "" where it has none
    file_keys: what such a file has beside the family's mark
    original: layer of its original layout -> the layers of diffusers that its rows are, in their
        order, as the tools map them; empty where the tools know no other layout
    """

    make: Callable[[Path], DiffusionPipeline]
    one_layer: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    instructed: Mapping[str, Any] = field(default_factory=dict)
    as_tokens: Callable[[torch.Tensor], torch.Tensor] | None = None
    prompts: tuple[str, str] = ("a photo of sks dog", "a much longer photo of a cat on the moon")
    file_type: str = ""
    file_keys: tuple[str, ...] = ()
    original: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def three(block: str, *names: str) -> tuple[str, ...]:
    """The layers that one of q, k and v is in diffusers."""
    return tuple(f"{block}.{name}" for name in names or ("to_q", "to_k", "to_v"))


def flat(z: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, h·w, C)."""
    return z.flatten(2).mT


ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
TINY_FAMILIES = {
    "sdxl": TinyFamily(
        make=tiny_sdxl,
    ),
    "sd1": TinyFamily(
        make=sd1,
    ),
    "sd3": TinyFamily(
        make=sd3,
        one_layer="transformer_blocks.0.attn.to_k",
        file_type="sd35_large",
        file_keys=("joint_blocks.37.x_block.mlp.fc1.weight",),
        original={
            "joint_blocks.0.x_block.attn.qkv": three("transformer_blocks.0.attn"),
            "joint_blocks.1.context_block.attn.qkv": three("transformer_blocks.1.attn", *ADDED),
            "joint_blocks.1.x_block.attn.proj": ("transformer_blocks.1.attn.to_out.0",),
            "joint_blocks.0.context_block.mlp.fc1": ("transformer_blocks.0.ff_context.net.0.proj",),
            "final_layer.adaLN_modulation.1": ("norm_out.linear",),
        },
    ),
    "flux": TinyFamily(
        make=flux,
        one_layer="single_transformer_blocks.0.attn.to_k",
        as_tokens=pack_latents,
        file_type="flux-dev",
        file_keys=(
            "double_blocks.0.img_attn.norm.key_norm.scale",
            "guidance_in.in_layer.bias",
            "img_in.weight",
        ),
        original={
            "double_blocks.0.img_attn.qkv": three("transformer_blocks.0.attn"),
            "double_blocks.1.txt_attn.proj": ("transformer_blocks.1.attn.to_add_out",),
            "single_blocks.0.linear2": ("single_transformer_blocks.0.proj_out",),
            "final_layer.adaLN_modulation.1": ("norm_out.linear",),
        },
    ),
    "flux2": TinyFamily(
        make=flux2,
        one_layer="single_transformer_blocks.0.attn.to_qkv_mlp_proj",
        settings={"text_encoder_out_layers": ("1", "2", "3")},
        file_type="flux-2-dev",
        file_keys=("double_blocks.0.img_attn.norm.key_norm.scale",),
        original={
            "double_blocks.0.img_attn.qkv": three("transformer_blocks.0.attn"),
            "double_blocks.1.txt_attn.qkv": three("transformer_blocks.1.attn", *ADDED),
            "double_blocks.1.txt_mlp.0": ("transformer_blocks.1.ff_context.linear_in",),
            "single_blocks.1.linear1": ("single_transformer_blocks.1.attn.to_qkv_mlp_proj",),
            "final_layer.adaLN_modulation.1": ("norm_out.linear",),
        },
    ),
    "z_image": TinyFamily(
        make=z_image,
        one_layer="layers.0.attention.to_k",
        file_type="z-image-turbo",
        file_keys=("cap_embedder.0.weight",),
        original={
            "layers.0.attention.qkv": three("layers.0.attention"),
            "noise_refiner.0.attention.out": ("noise_refiner.0.attention.to_out.0",),
            "layers.1.adaLN_modulation.0": ("layers.1.adaLN_modulation.0",),
            "final_layer.linear": ("all_final_layer.2-1.linear",),
        },
    ),
    "qwen_image": TinyFamily(
        make=qwen_image,
        one_layer="transformer_blocks.0.attn.to_k",
        as_tokens=pack_latents,
        original={  # its original layout is diffusers'
            "transformer_blocks.0.attn.to_q": ("transformer_blocks.0.attn.to_q",),
            "transformer_blocks.1.img_mlp.net.0.proj": ("transformer_blocks.1.img_mlp.net.0.proj",),
        },
    ),
    "qwen_image21": TinyFamily(
        make=qwen_image21,
        one_layer="transformer_blocks.0.attn.to_k",
        as_tokens=flat,
        prompts=("a photo of sks dog", "a photo of sks cat"),
        file_type="qwen-image-2.1",
        original={  # its original layout is diffusers'
            "transformer_blocks.0.attn.to_q": ("transformer_blocks.0.attn.to_q",),
            "transformer_blocks.1.img_mlp.proj": ("transformer_blocks.1.img_mlp.proj",),
        },
    ),
    "anima": TinyFamily(
        make=anima,
        one_layer="transformer_blocks.0.attn1.to_k",
        original={
            "blocks.0.self_attn.q_proj": ("transformer_blocks.0.attn1.to_q",),
            "blocks.1.cross_attn.output_proj": ("transformer_blocks.1.attn2.to_out.0",),
            "blocks.0.mlp.layer1": ("transformer_blocks.0.ff.net.0.proj",),
        },
    ),
    "flux3": TinyFamily(
        make=flux3,
        one_layer="single_transformer_blocks.0.attn.to_k",
        file_type="flux-3-image",
        original={
            "single_blocks.0.q_proj": ("single_transformer_blocks.0.attn.to_q",),
            "content_mode_blocks.image.1.attn_out": ("mode_blocks.image.1.attn.to_out.0",),
            "txt_mode_blocks.0.mlp_in": ("txt_mode_blocks.0.ff.linear_in",),
        },
    ),
    "krea2": TinyFamily(
        make=krea2,
        one_layer="transformer_blocks.0.attn.to_k",
        as_tokens=pack_latents,
        file_type="krea2",
        original={
            "blocks.0.attn.wq": ("transformer_blocks.0.attn.to_q",),
            "blocks.1.attn.wo": ("transformer_blocks.1.attn.to_out.0",),
            "blocks.1.attn.gate": ("transformer_blocks.1.attn.to_gate",),
            "blocks.0.mlp.gate": ("transformer_blocks.0.ff.gate",),
            "txtfusion.refiner_blocks.0.attn.wk": ("text_fusion.refiner_blocks.0.attn.to_k",),
            "tproj.1": ("time_mod_proj",),
        },
    ),
    "lumina2": TinyFamily(
        make=lumina2,
        one_layer="layers.0.attn.to_k",
        instructed={"system_prompt": "Draw well."},
        file_type="lumina2",
        file_keys=("cap_embedder.0.weight",),
    ),
    "sana": TinyFamily(
        make=sana,
        one_layer="transformer_blocks.0.attn1.to_k",
        instructed={"complex_human_instruction": ["Draw well: "]},
        file_type="sana",
    ),
}
"""The facts' name -> what the tests know. A new family is one more row."""


def tiny_pipeline(name: str, folder: Path) -> DiffusionPipeline:
    """The family's pipeline, frozen. `folder` receives files of tokenizers."""
    torch.manual_seed(0)
    pipe = TINY_FAMILIES[name].make(folder)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return pipe
