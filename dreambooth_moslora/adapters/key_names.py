"""Names of the tensors in LoRA files: of PEFT, diffusers, kohya, and those that diffusers does not read.

PEFT                              diffusers                          kohya, after diffusers' conversion
to_q.lora_A.weight                to_q.lora.down.weight              processor.to_q_lora.down.weight
q_proj.lora_A.weight              q_proj.lora_linear_layer.down.…    to_q_lora.down.weight

read here alone:    lycoris_<path with _>.…    base_model.model.<path>.…    <path>.…    <component>.<path>.lora_down.…
                    lora_unet_<path with _>.… of LoHa and LoKr    <component>.<path>.alpha beside PEFT's names
                    diffusion_model.<path>.…

A file in kohya's form, for ComfyUI, AUTOMATIC1111, Fooocus and InvokeAI:

    lora_unet_<path with _>.lora_down.weight (r, in)   .lora_up.weight (out, r)   .alpha = r
                          [.dora_scale (out, 1)]

ΔW = alpha/r · up·down. If the ranks differ, every module has the alpha of the most common rank, and `up` of the
others is multiplied by r/alpha: diffusers loses the alphas of attention projections when a file has several.
DoRA's W' = dora_scale · (W + ΔW) / ‖W + ΔW‖, with the norm of each row of W, as in PEFT and LyCORIS. diffusers drops
`dora_scale`, so kohya files with DoRA are evaluated by this definition. Header keys: github.com/Stability-AI/ModelSpec,
and `ss_*` of kohya's sd-scripts, without its folder names, captions and tag counts.
"""

import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from dreambooth_moslora.adapters import lycoris, raw_file
from dreambooth_moslora.adapters.metadata import AdapterMetadata, most_common
from dreambooth_moslora.adapters.mixer import Folded, Tensors
from dreambooth_moslora.core import UserError
from dreambooth_moslora.settings.families import DENOISERS, facts_of_model

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PEFT_KEY = re.compile(
    r"(?P<path>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector(\.weight)?|alpha)"
)
OLD_KEY = re.compile(
    r"(?P<path>.+?)\.((?P<projection>to_q|to_k|to_v|to_out)_lora|lora|lora_linear_layer)"
    r"\.(?P<side>down\.weight|up\.weight|up\.bias)"
)
KOHYA_KEY = re.compile(r"(?P<path>.+)\.(?P<part>lora_down\.weight|lora_up\.weight|alpha|dora_scale|(hada|lokr)_\w+)")
UNET_NAMES = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
SIDES = dict.fromkeys(("lora_A.weight", "lora_down.weight", "down.weight"), "down")
SIDES |= dict.fromkeys(("lora_B.weight", "lora_up.weight", "up.weight"), "up")
PEFT_PREFIX = "base_model.model."
PASSED = ("lora_B.bias", "lora_magnitude_vector", "lora_magnitude_vector.weight")  # as they are, in PEFT's form
MOST_NUMBERS = 2**29  # of a file as a LoRA: 2 GiB in fp32
Layer = tuple[str, str, tuple[int, ...]]  # component, module path, (out, in) or (out, in, h, w)


def module_path(component: str, key: str) -> str:
    """The module path in a file's key: `…attn1.processor.to_q_lora.down.weight` -> `…attn1.to_q`."""
    match = match_of(key)
    if match is None:
        return key.replace(".processor.", ".")
    old = match.groupdict().get("projection")
    names = UNET_NAMES if component in DENOISERS else TEXT_NAMES
    return f"{match['path']}.{names[old]}" if old else match["path"]


def match_of(key: str) -> re.Match[str] | None:
    key = key.replace(".processor.", ".")
    return PEFT_KEY.fullmatch(key) or OLD_KEY.fullmatch(key)


def is_of_lycoris(key: str) -> bool:
    return re.search(r"\.(hada|lokr)_", key) is not None


def is_read_here(keys: Iterable[str], pipeline: "DiffusionPipeline") -> bool:
    """Whether diffusers does not read a key of the file for a UNet, or leaves out an alpha. Of other models it depends
    on its version."""
    is_unet = getattr(pipeline, "unet", None) is not None
    for key in keys:
        is_flat, is_dotted = key.startswith("lora_"), key.partition(".")[0] in raw_file.COMPONENTS
        is_kohya_s = re.search(r"\.(lora_(down|up)\.|alpha$)", key) is not None
        if is_of_lycoris(key) or not (is_flat or is_dotted) or (is_kohya_s and is_dotted) or (is_flat and not is_unet):
            return True
    return False


def as_peft(tensors: Tensors, pipeline: "DiffusionPipeline", file_name: str) -> Tensors | None:
    """The tensors under PEFT's names, scales in `lora_B`; None for names that diffusers may know. Raises UserError."""
    if not is_read_here(tensors, pipeline):
        return None
    modules: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        name, part = placed(key)
        modules.setdefault(name, {})[part] = tensor
    layers, found, numbers = layers_named(modules, pipeline), {}, 0
    for name, parts in modules.items():
        if name not in layers:
            if any(map(is_of_lycoris, tensors)):
                raise UserError(f"{file_name} does not fit this base: {name!r:.100} is no layer of it")
            return None
        passed = PASSED[1:] if lycoris.ALPHA in parts else PASSED  # a bias has the scale too
        own = {part: parts.pop(part) for part in passed if part in parts}
        label, size, (up, down) = folded(parts, layers[name], f"{file_name} is broken, or was made for another base")
        numbers += up.numel() + down.numel()
        if numbers > MOST_NUMBERS:
            raise UserError(
                f"{file_name} would be a LoRA of more than {MOST_NUMBERS / 2**28:.0f} GiB, as its LoHa or LoKr has so "
                "high a rank: use it in the program that trained it, or train it with a lower dim"
            )
        found[f"{label}.lora_A.weight"] = down.view(len(down), *size[1:])
        found[f"{label}.lora_B.weight"] = up.view(*up.shape, *(1,) * (len(size) - 2))
        found |= {f"{label}.{part}": tensor for part, tensor in own.items()}
        if lycoris.MAGNITUDE in parts:
            found[f"{label}.lora_magnitude_vector"] = as_magnitude(parts[lycoris.MAGNITUDE])
    return found


def folded(parts: Tensors, layers: list[Layer], wrong: str) -> tuple[str, tuple[int, ...], tuple]:
    """`component.path`, size, and up and down of the first of these layers that the parts fit. Raises UserError."""
    for component, path, size in layers:
        with suppress(ValueError):
            return f"{component}.{path}", size, lycoris.lora_of(parts, size)
    component, path, size = layers[0]
    raise UserError(f"{wrong}: {component}.{path:.100} is {'×'.join(map(str, size))} (out×in) here")


def as_magnitude(dora_scale: torch.Tensor) -> torch.Tensor:
    """kohya's `dora_scale` as PEFT's magnitudes: (out, 1) -> (out,), and (out, 1, 1, 1) -> (1, out, 1, 1)."""
    return dora_scale[:, 0] if dora_scale.ndim == 2 else dora_scale.transpose(0, 1)


def placed(key: str) -> tuple[str, str]:
    """A module as the file names it, and the part: `x.lora_A.weight` -> `x`, `down`. An unknown key has the part ""."""
    if old := KOHYA_KEY.fullmatch(key):
        return old["path"], SIDES.get(old["part"], old["part"])
    if (match := match_of(key)) is None:
        return key, ""
    part = match.groupdict().get("part") or match["side"]
    component = "text_encoder" if "self_attn" in key else DENOISERS[0]
    return module_path(component, key), SIDES.get(part, part)


def layers_named(names: Iterable[str], pipeline: "DiffusionPipeline") -> dict[str, list[Layer]]:
    """Module's name in some program -> the layers that it may mean: SDXL's two text encoders share theirs."""
    from dreambooth_moslora.adapters import moslora

    known: dict[str, list[Layer]] = {}
    by_label: dict[str, Layer] = {}
    for component in raw_file.COMPONENTS:
        model = getattr(pipeline, component, None)
        for own_path, module in ({} if model is None else moslora.matrix_layers(model)).items():
            path = published_path(component, own_path)
            layer = by_label[f"{component}.{path}"] = component, path, moslora.weight_size(module)
            for name in spellings(component, path):
                known.setdefault(name, []).append(layer)
    others = [name for name in names if name not in known and name.startswith("lora_")]
    labels = renamed(others, pipeline) if hasattr(pipeline, "unet") else {}
    return known | {name: [by_label[label]] for name, label in labels.items() if label in by_label}


def spellings(component: str, path: str) -> list[str]:
    """How programs name this module."""
    flat, bare = path.replace(".", "_"), path.removeprefix("text_model.")
    found = [name for dotted in dict.fromkeys((path, bare)) for name in (dotted, PEFT_PREFIX + dotted)]
    found += [f"{component}.{dotted}" for dotted in dict.fromkeys((path, bare))]
    prefix = PREFIXES.get(component, f"lora_{component}")
    found += [f"{one}_{flat}" for one in dict.fromkeys((prefix, ALONE.get(component, prefix)))]
    return [*found, f"lycoris_{flat}", f"diffusion_model.{path}"] if component in DENOISERS else found


def renamed(names: Iterable[str], pipeline: "DiffusionPipeline") -> dict[str, str]:
    """kohya's names, also of original blocks -> `component.path`, as diffusers renames pairs with a number each."""
    numbered = dict(enumerate(names))
    pairs = {
        f"{name}{side}": torch.full((1, 1), float(n)) for n, name in numbered.items() for side in (KOHYA_DOWN, KOHYA_UP)
    }
    found = {}
    for key, number in (pipeline.lora_state_dict(pairs, unet_config=pipeline.unet.config)[0] if pairs else {}).items():
        component, _, rest = key.partition(".")
        found[numbered[int(number)]] = f"{component}.{published_path(component, module_path(component, rest))}"
    return found


PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
ALONE = {"text_encoder": "lora_te"}  # Of the one text encoder: Stable Diffusion 1.5, FLUX.1.
WIDTHS = (2048, 768)  # of the text in SDXL and in Stable Diffusion 1.5
KOHYA_DOWN, KOHYA_UP, KOHYA_ALPHA, DORA_SCALE = ".lora_down.weight", ".lora_up.weight", ".alpha", ".dora_scale"


def is_by_rows(dora_scale: torch.Tensor) -> bool:
    """Whether DoRA's magnitudes are of W's rows: (out, 1) or (out, 1, 1, 1). Some programs write (1, in)."""
    return dora_scale.ndim > 1 and dora_scale.shape[1:].numel() == 1


def published_path(component: str, path: str) -> str:
    """The path that other programs know: they keep CLIPTextModel's `text_model.`, which transformers 5 dropped."""
    is_bare = component not in DENOISERS and not path.startswith(("text_model.", "text_projection"))
    return f"text_model.{path}" if is_bare else path


def kohya_name(component: str, path: str, components: Collection[str] = tuple(PREFIXES)) -> str:
    """`unet`, `mid_block.attentions.0` -> `lora_unet_mid_block_attentions_0`, in a file with these components."""
    prefixes = PREFIXES if "text_encoder_2" in components else PREFIXES | ALONE
    return f"{prefixes[component]}_{path.replace('.', '_')}"


def kohya_tensors(components: Folded, dtype: torch.dtype = torch.float32) -> Tensors:
    """All tensors of the file, with the shapes above; the scale is already in `up`."""
    alpha = common_rank(components)
    tensors = {}
    for component, layers in components.items():
        for path, layer in layers.items():
            name = kohya_name(component, path, components)
            tensors[f"{name}{KOHYA_DOWN}"] = layer.down.to(dtype)
            tensors[f"{name}{KOHYA_UP}"] = (layer.up * (layer.rank / alpha)).to(dtype)
            tensors[f"{name}{KOHYA_ALPHA}"] = torch.tensor(float(alpha), dtype=dtype)
            if layer.magnitude is not None:
                tensors[f"{name}{DORA_SCALE}"] = layer.magnitude[:, None]
    return tensors


def common_rank(components: Folded) -> int:
    return most_common(layer.rank for layers in components.values() for layer in layers.values())


def kohya_header(title: str, metadata: AdapterMetadata, components: Folded) -> dict[str, str]:
    """Title, trigger phrase, architecture and rank. Every value is a string, as safetensors requires."""
    ranks = {layer.rank for layers in components.values() for layer in layers.values()}
    rank = str(*ranks) if len(ranks) == 1 else "Dynamic"  # sd-scripts' word for a file of several ranks
    config = metadata.structures.get("unet", {}).get("config", {"addition_embed_type": "text_time"})
    facts, cross = facts_of_model("UNet2DConditionModel", config), config.get("cross_attention_dim", WIDTHS[0])
    is_usual = cross in WIDTHS
    header = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{facts.modelspec}/lora" if is_usual else f"{facts.name}-like-{cross}/lora",
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": title,
        "modelspec.trigger_phrase": ", ".join(metadata.trigger_words),
        "ss_output_name": title,
        "ss_sd_model_name": metadata.base_id,
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": str(common_rank(components)),
        "ss_v2": "False",
    }
    if is_usual:
        header["ss_base_model_version"] = facts.kohya_version
    if metadata.resolution_px:
        size = metadata.resolution_px
        header |= {"modelspec.resolution": f"{size}x{size}", "ss_resolution": f"({size}, {size})"}
    return {key: value for key, value in header.items() if value}
