"""Spellings of the keys of a LoRA by the tools that people use: prefixes and endings.

    prefix         path                                    ending
    unet.          mid_block.attentions.0.….attn1.to_q     .lora_A.weight      diffusers and PEFT
    lora_unet_     mid_block_attentions_0_…_attn1_to_q     .lora_down.weight   kohya
    lora_unet_     double_blocks_0_img_attn_qkv            .lokr_w1            in an original layout

Any prefix may go with any ending. Another tool costs a row here and a row of the test's table. The
first prefix that fits is used, so a longer prefix stands before a shorter one that begins it.
`layer_mapping` finds the layer of the base that a path means.

A file in kohya's form, for ComfyUI, Forge, AUTOMATIC1111 and InvokeAI:

    lora_unet_<path with _>.lora_down.weight (r, in)   .lora_up.weight (out, r)   .alpha = r
                          [.dora_scale (out, 1)]

ΔW = alpha/r · up·down. If the ranks differ, every module has the alpha of the most common rank, and
`up` of all other modules is multiplied by r/alpha: diffusers loses the alphas of attention
projections when a file has several. DoRA's W' = dora_scale · (W + ΔW) / ‖W + ΔW‖, with the norm of
each row of W, as in PEFT and LyCORIS. diffusers drops `dora_scale`, so kohya files with DoRA are
evaluated by this definition. Header keys: github.com/Stability-AI/ModelSpec, and `ss_*` of kohya's
sd-scripts, without its folder names, captions and tag counts.
"""

import re
from collections.abc import Collection
from typing import NamedTuple

import torch

from dreambooth_moslora.lora.metadata import AdapterMetadata, get_most_common
from dreambooth_moslora.lora.raw_file import COMPONENTS
from dreambooth_moslora.method.mixer import Folded, Tensors
from dreambooth_moslora.settings.family_facts import DENOISERS, FamilyFacts, get_denoiser_facts


class Prefix(NamedTuple):
    """Beginning of a key: the tool that writes it, and the models that its path may be in."""

    text: str
    tool: str
    components: tuple[str, ...]  # the likeliest first


DIFFUSERS, KOHYA = "diffusers", "kohya"
COMFYUI_PREFIX = "diffusion_model."
PEFT_PREFIX = "base_model.model."
PREFIXES = (
    *(Prefix(f"{component}.", DIFFUSERS, (component,)) for component in COMPONENTS),
    Prefix("lora_unet_", KOHYA, DENOISERS),  # of transformers too
    Prefix("lora_te_", KOHYA, ("text_encoder",)),  # of the one encoder of SD 1.5 and FLUX.1
    Prefix("lora_te1_", KOHYA, ("text_encoder",)),
    Prefix("lora_te2_", KOHYA, ("text_encoder_2",)),
    Prefix("lora_transformer_", "OneTrainer", ("transformer",)),
    Prefix("lycoris_", "LyCORIS", DENOISERS[::-1]),
    Prefix(COMFYUI_PREFIX, "ComfyUI", DENOISERS[::-1]),
    Prefix(PEFT_PREFIX, "PEFT", COMPONENTS),
    Prefix("", DIFFUSERS, COMPONENTS),  # its `save_lora_adapter`
)
WRITTEN_PREFIXES = {
    "unet": "lora_unet_",
    "text_encoder": "lora_te1_",
    "text_encoder_2": "lora_te2_",
}
"""Prefixes of the files that are written; they do not depend on the order of PREFIXES."""
WRITTEN_SINGLE_PREFIX = "lora_te_"


class Ending(NamedTuple):
    """End of a key, which names the part of a layer that the tensor is."""

    text: str
    part: str
    tool: str  # as `info` calls such keys
    is_written: bool = True  # One row for each tool and part.


PEFT_KEYS, KOHYA_KEYS, OLD_KEYS = "PEFT keys", "kohya keys", "old diffusers keys"
DIFFUSERS_KEYS, ENCODER_KEYS = "diffusers keys", "diffusers text encoder keys"
LOHA, LOKR = "LyCORIS LoHa", "LyCORIS LoKr"
UNFOLDED_KEYS = "MoSLoRA in PEFT's form, unfolded"
ENDINGS = (
    *(Ending(f".{part}", part, LOHA) for part in ("hada_w1_a", "hada_w1_b", "hada_t1")),
    *(Ending(f".{part}", part, LOHA) for part in ("hada_w2_a", "hada_w2_b", "hada_t2")),
    *(Ending(f".{part}", part, LOKR) for part in ("lokr_w1", "lokr_w1_a", "lokr_w1_b")),
    *(Ending(f".{part}", part, LOKR) for part in ("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")),
    Ending(".lora_mid.weight", "mid", "LyCORIS LoCon"),
    Ending(".lora_AB.weight", "between", "MoSLoRA reference code"),
    Ending(".lora_B.mixer", "mixer", UNFOLDED_KEYS),
    Ending(".lora_A.weight", "down", PEFT_KEYS),
    Ending(".lora_B.weight", "up", PEFT_KEYS),
    Ending(".lora_B.bias", "bias", PEFT_KEYS),
    Ending(".lora_magnitude_vector", "magnitude", PEFT_KEYS),
    Ending(".lora_magnitude_vector.weight", "magnitude", PEFT_KEYS, is_written=False),
    Ending(".lora_down.weight", "down", KOHYA_KEYS),
    Ending(".lora_up.weight", "up", KOHYA_KEYS),
    Ending(".alpha", "alpha", KOHYA_KEYS),
    Ending(".dora_scale", "dora_scale", KOHYA_KEYS),
    Ending(".lora.down.weight", "down", DIFFUSERS_KEYS),
    Ending(".lora.up.weight", "up", DIFFUSERS_KEYS),
    Ending(".lora.up.bias", "bias", DIFFUSERS_KEYS),
    Ending("_lora.down.weight", "down", OLD_KEYS),
    Ending("_lora.up.weight", "up", OLD_KEYS),
    Ending("_lora.up.bias", "bias", OLD_KEYS),
    Ending(".lora_linear_layer.down.weight", "down", ENCODER_KEYS),
    Ending(".lora_linear_layer.up.weight", "up", ENCODER_KEYS),
    Ending(".lora_linear_layer.up.bias", "bias", ENCODER_KEYS),
)
ENDINGS_BY_TEXT = {row.text: row for row in ENDINGS}
WRITTEN_ENDINGS = {(row.tool, row.part): row.text for row in ENDINGS if row.is_written}
KEY_PATTERN = re.compile(f"(.+?)({'|'.join(re.escape(text) for text in ENDINGS_BY_TEXT)})")
PAIRED_TOOLS = {row.tool for row in ENDINGS if row.part == "down"}
"""Tools whose files hold an up and a down matrix per layer; `info` names the kind of any other."""
LYCORIS_PARTS = {row.part for row in ENDINGS if row.tool in (LOHA, LOKR)}
READ_PARTS = {row.part for row in ENDINGS if row.tool in PAIRED_TOOLS} | LYCORIS_PARTS


class FileModule(NamedTuple):
    """Layer, as a file names it."""

    prefix: Prefix
    path: str  # with dots, or with _ after a prefix that ends so

    @property
    def name(self) -> str:
        return f"{self.prefix.text}{self.path}"

    @property
    def component(self) -> str:
        """Likeliest part of a pipeline; "" for a name that fits any."""
        return "" if self.prefix.components == COMPONENTS else self.prefix.components[0]


class ParsedKey(NamedTuple):
    module: FileModule
    part: str
    tool: str


Modules = dict[FileModule, Tensors]
"""Layer of a file -> its parts."""


def parse_key(key: str) -> ParsedKey | None:
    """Return the layer and the part of it that a key names; None for an unknown spelling."""
    match = KEY_PATTERN.fullmatch(key.replace(".processor.", "."))
    if match is None:
        return None
    ending = ENDINGS_BY_TEXT[match[2]]
    prefix = next(row for row in PREFIXES if match[1].startswith(row.text))
    path = match[1].removeprefix(prefix.text)
    if ending.tool == OLD_KEYS:  # `attn1.to_out_lora`, `self_attn.to_q_lora`
        block, _, projection = path.rpartition(".")
        names = OLD_ENCODER_NAMES if block.endswith("self_attn") else OLD_NAMES
        path = f"{block}.{names.get(projection, projection)}"
    return ParsedKey(FileModule(prefix, path), ending.part, ending.tool)


OLD_NAMES = {"to_out": "to_out.0"}
OLD_ENCODER_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""Projections in old diffusers files -> their names in the model; the second in text encoders."""


def parse_keys(tensors: Tensors) -> tuple[Modules, list[str]]:
    """Return a file's tensors by module and part, and the keys of an unknown spelling."""
    modules, unknown = {}, []
    for name, tensor in tensors.items():
        if key := parse_key(name):
            modules.setdefault(key.module, {})[key.part] = tensor
        else:
            unknown.append(name)
    return modules, unknown


LAYOUT_SEGMENTS = (
    *("joint_blocks", "x_block", "context_block"),  # SD 3
    *("double_blocks", "single_blocks", "img_attn", "txt_attn", "img_mlp", "txt_mlp"),  # FLUX
    *("img_mod", "txt_mod", "img_in", "txt_in", "time_in", "vector_in", "guidance_in"),
    *("in_layer", "out_layer", "single_stream_modulation"),
    *("double_stream_modulation_img", "double_stream_modulation_txt"),
    *("content_mode_blocks", "txt_mode_blocks", "image_cond", "attn_out", "mlp_in", "mlp_out"),
    *("layerwise_blocks", "refiner_blocks"),  # Krea 2
    *("noise_refiner", "context_refiner", "feed_forward", "cap_embedder"),  # Lumina 2, Z-Image
    *("adaln_modulation_self_attn", "adaln_modulation_cross_attn", "adaln_modulation_mlp"),  # Anima
    *("adaln_modulation", "self_attn", "cross_attn", "q_proj", "k_proj", "v_proj", "output_proj"),
    *("adaLN_modulation", "final_layer", "x_embedder", "t_embedder", "y_embedder"),
    "context_embedder",
)
"""Segments of paths in original layouts that have a `_` inside."""
SEGMENT_SEPARATOR = re.compile(rf"(?<![^_])({'|'.join(LAYOUT_SEGMENTS)})(?![^_])|_")


def to_dotted_path(module: FileModule) -> str:
    """Return the path with dots: `joint_blocks_0_x_block_attn_qkv` as
    `joint_blocks.0.x_block.attn.qkv`."""
    if not module.prefix.text.endswith("_"):
        return module.path
    return SEGMENT_SEPARATOR.sub(lambda match: match[1] or ".", module.path)


def format_key(tool: str, name: str, part: str) -> str:
    """Return the key of one part of the layer `name`, as the tool writes it."""
    return name + WRITTEN_ENDINGS[tool, part]


def get_published_path(component: str, path: str) -> str:
    """Return the path that other programs know.

    They keep CLIPTextModel's `text_model.`, which transformers 5 dropped.
    """
    is_bare = component not in DENOISERS and not path.startswith(("text_model.", "text_projection"))
    return f"text_model.{path}" if is_bare else path


def format_published_name(component: str, path: str, facts: FamilyFacts) -> str:
    """Return the name of a layer in the published file: diffusers' own, or that of the family's
    original layout with ComfyUI's prefix, which diffusers reads too."""
    if not facts.original_names:
        return f"{component}.{path}"
    for name, original_name in facts.original_names:
        path = path.replace(name, original_name)
    return COMFYUI_PREFIX + path


def format_kohya_name(component: str, path: str, components: Collection[str] = COMPONENTS) -> str:
    """Return kohya's name of a layer in a file with these components.

    `unet`, `mid_block.attentions.0` -> `lora_unet_mid_block_attentions_0`
    """
    is_alone = component == "text_encoder" and "text_encoder_2" not in components
    prefix = WRITTEN_SINGLE_PREFIX if is_alone else WRITTEN_PREFIXES[component]
    return prefix + path.replace(".", "_")


TEXT_WIDTHS = (2048, 768)
"""Widths of the text embeddings of SDXL and Stable Diffusion 1.5."""


def is_row_magnitude(dora_scale: torch.Tensor) -> bool:
    """Return whether DoRA's magnitudes are those of W's rows: (out, 1) or (out, 1, 1, 1).

    Some programs write those of its columns, (1, in).
    """
    return dora_scale.ndim > 1 and dora_scale.shape[1:].numel() == 1


def build_kohya_tensors(components: Folded, dtype: torch.dtype = torch.float32) -> Tensors:
    """Return all tensors of kohya's file in the shapes above; the scale is already in `up`."""
    alpha = get_common_rank(components)
    tensors = {}
    for component, layers in components.items():
        for path, layer in layers.items():
            name = format_kohya_name(component, path, components)
            parts = {
                "down": layer.down.to(dtype),
                "up": (layer.up * (layer.rank / alpha)).to(dtype),
                "alpha": torch.tensor(float(alpha), dtype=dtype),
            }
            if layer.magnitude is not None:
                parts["dora_scale"] = layer.magnitude[:, None]
            tensors |= {
                format_key(KOHYA_KEYS, name, part): tensor for part, tensor in parts.items()
            }
    return tensors


def get_common_rank(components: Folded) -> int:
    """Return the most common rank of all layers."""
    return get_most_common(
        layer.rank for layers in components.values() for layer in layers.values()
    )


def build_kohya_header(title: str, metadata: AdapterMetadata, components: Folded) -> dict[str, str]:
    """Return title, trigger phrase, architecture and rank for the header of kohya's file.

    All values are strings, as safetensors requires.
    """
    ranks = {layer.rank for layers in components.values() for layer in layers.values()}
    # sd-scripts writes "Dynamic" for a file of several ranks.
    rank = str(*ranks) if len(ranks) == 1 else "Dynamic"

    # The family, by the UNet's configuration; some UNets of that form have another text encoder.
    config = metadata.structures.get("unet", {}).get("config", {"addition_embed_type": "text_time"})
    facts = get_denoiser_facts("UNet2DConditionModel", config)
    text_width = config.get("cross_attention_dim", TEXT_WIDTHS[0])
    is_usual = text_width in TEXT_WIDTHS

    # ModelSpec's keys, then kohya's
    header = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{facts.modelspec}/lora"
        if is_usual
        else f"{facts.name}-like-{text_width}/lora",
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": title,
        "modelspec.trigger_phrase": ", ".join(metadata.trigger_words),
        "ss_output_name": title,
        "ss_sd_model_name": metadata.base_id,
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": str(get_common_rank(components)),
        "ss_v2": "False",
    }

    # What is not known of every file
    if is_usual:
        header["ss_base_model_version"] = facts.kohya_version
    if metadata.resolution_px:
        size = metadata.resolution_px
        header |= {"modelspec.resolution": f"{size}x{size}", "ss_resolution": f"({size}, {size})"}
    return {key: value for key, value in header.items() if value}
