"""Any LoRA file, of this program, diffusers or kohya: its matrices under common names, and into a pipeline.

file --read_adapter--> AdapterWeights --check_fits--> --install--> a PEFT adapter named by its content

A file may come from anyone. Only the matrices of a LoRA and their scales are taken from it; other keys are refused.

<component>.<module path>.<part>  ->  component -> module path -> LowRank
"""

import json
import logging
import re
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open

from dreambooth_moslora.adapters import basis, key_names, kohya, mixer, moslora, proof, published_file, raw_file
from dreambooth_moslora.adapters.metadata import BUNDLE, most_common
from dreambooth_moslora.base.load import architecture
from dreambooth_moslora.core import UserError, file_digest, is_number, one_line, parse_object
from dreambooth_moslora.disk import run_folder
from dreambooth_moslora.settings.families import DENOISERS, facts_of

FIELDS = key_names.SIDES | {
    "lora_B.bias": "bias",
    "up.bias": "bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "alpha": "",  # ignored: diffusers and PEFT do not read an alpha under such a name
}
logger = logging.getLogger(__name__)

LONGEST_CONFIG = 2**20  # bytes
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def projections(tensors: dict[str, torch.Tensor], file_name: str) -> mixer.Folded:
    """Component -> module path -> matrices down (r, in, …) and up (out, r, …). Raises UserError for others."""
    found: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for key, tensor in tensors.items():
        component, path, field = _place(key, tensor, file_name)
        if field:
            found.setdefault(component, {}).setdefault(path, {})[field] = tensor
    if not found:
        raise UserError(f"{file_name} holds no LoRA projection")
    result: mixer.Folded = {}
    for component, paths in found.items():
        for path, parts in paths.items():
            name, down, up = f"{component}.{path}", parts.get("down"), parts.get("up")
            if down is None or up is None or down.ndim < 2 or up.ndim < 2 or not 0 < len(down) == up.shape[1]:
                raise _broken(file_name, f"{name!r:.100} is half there")
            result.setdefault(component, {})[path] = mixer.LowRank(**parts)
    for component, of_one in result.items():
        if len({projection.magnitude is None for projection in of_one.values()}) > 1:
            raise UserError(f"{file_name} holds DoRA for some layers of its {component} alone, which PEFT cannot load")
    return result


def _place(key: str, tensor: torch.Tensor, file_name: str) -> tuple[str, str, str]:
    """Component, module path and field of LowRank ("" for an ignored tensor). Raises UserError."""
    component, _, rest = key.partition(".")
    match = key_names.match_of(rest)
    if component not in raw_file.COMPONENTS or match is None:
        raise UserError(f"{file_name} is not a LoRA of a diffusion model: {key!r:.100} does not belong to one")
    groups = match.groupdict()
    field = FIELDS[groups.get("part") or groups["side"]]
    if field and tensor.dtype not in DTYPES:
        raise _broken(file_name, f"{key!r:.100} is in {tensor.dtype}, which is not a dtype of weights")
    if field and not tensor.float().isfinite().all():
        raise _broken(file_name, f"{key!r:.100} has values that are NaN, infinite or beyond single precision")
    return component, key_names.module_path(component, rest), field


LARGEST_ALPHA = 1e6
MOST_VALUES = 200  # PEFT tries one pattern per value on every module; no trainer writes this many ranks or alphas
PEFT_ALPHA = 8  # PEFT's default when a header has no alpha
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # they leave the base unchanged
MODULE_NAME = re.compile(r"\^?\w[\w.]*")


@dataclass(frozen=True)
class Scales:
    alphas: dict[str, float]  # module path -> alpha
    use_rslora: bool = False  # s is alpha/√r, not alpha/r

    def of(self, path: str, rank: int) -> float:
        return mixer.nominal_scale(self.alphas[path], rank, self.use_rslora)


def scales(
    component: str,
    found: dict[str, mixer.LowRank],
    kohya_alphas: dict | None,
    of_peft: object,
    file_name: str,
    pipeline,
) -> Scales:
    """The alphas of one component, kohya's or PEFT's. Raises UserError for invalid and contradicting settings."""
    if of_peft is not None and not isinstance(of_peft, dict):
        raise _broken(file_name, "its LoRA settings are no object")
    if of_peft and kohya_alphas:
        raise _broken(file_name, "it has both alphas and LoRA settings")
    prefix = f"{component}."
    settings = {k.removeprefix(prefix): v for k, v in (of_peft or {}).items() if k.startswith(prefix)}
    own = {k.removeprefix(prefix): v for k, v in (kohya_alphas or {}).items() if k.startswith(prefix)}
    if settings:
        result = _from_settings(component, found, settings, file_name)
    else:  # a layer without an alpha gets the most common one, as in diffusers; without any, alpha is the rank
        paths = {key: key_names.module_path(component, key.removesuffix(".alpha")) for key in own}
        named = {_base_path(component, path, pipeline): own[key] for key, path in paths.items()}
        common = most_common(named.values()) if named else None
        result = Scales({path: named.get(path, common) if named else p.rank for path, p in found.items()})
    for value in result.alphas.values():
        if not is_number(value) or not abs(value) <= LARGEST_ALPHA:
            raise _broken(file_name, f"it has an alpha of {value!r:.40}")
    if max(len({p.rank for p in found.values()}), len(set(result.alphas.values()))) > MOST_VALUES:
        raise UserError(f"{file_name} has more than {MOST_VALUES} different ranks or alphas")
    return result


def _from_settings(component: str, found: dict[str, mixer.LowRank], settings: dict, file_name: str) -> Scales:
    start = settings.get("init_lora_weights", True)
    if not isinstance(start, bool | str | None) or start not in PLAIN_STARTS:
        raise UserError(f"{file_name} goes with a changed base (init_lora_weights {start!r:.40}); export a plain LoRA")
    has_dora = any(projection.magnitude is not None for projection in found.values())
    if _flag(settings, "use_dora", file_name) != has_dora:
        raise _broken(file_name, "its use_dora does not go with its tensors")
    alpha, pattern = settings.get("lora_alpha", PEFT_ALPHA), settings.get("alpha_pattern") or {}
    alphas = dict.fromkeys(found, alpha) | _matches(component, found, pattern, file_name)
    return Scales(alphas, _flag(settings, "use_rslora", file_name))


def _matches(component: str, paths: Iterable[str], pattern: object, file_name: str) -> dict[str, float]:
    """Module path -> value of the first entry that is one of its names or the end of one (`^`: a whole name only)."""
    if not isinstance(pattern, dict):
        raise _broken(file_name, "its alpha_pattern is no object")
    plain = {str(name).replace(r"\.", "."): value for name, value in pattern.items()}
    for name in plain:
        if not MODULE_NAME.fullmatch(name):
            raise _broken(file_name, f"its alpha_pattern {name!r:.60} names no module")
    order, found = {name: number for number, name in enumerate(plain)}, {}
    for path in paths:
        ends = set()
        # Versions of transformers differ in the prefix `text_model.` of a text encoder.
        bare = path if component in DENOISERS else path.removeprefix("text_model.")
        for name in (bare, kohya.published_path(component, path)):
            parts = name.split(".")
            ends |= {f"^{name}", *(".".join(parts[start:]) for start in range(len(parts)))}
        if known := ends & order.keys():
            found[path] = plain[min(known, key=order.__getitem__)]
    return found


def _flag(settings: dict, name: str, file_name: str) -> bool:
    value = settings.get(name, False)
    if not isinstance(value, bool):
        raise _broken(file_name, f"its {name} is {value!r:.40}")
    return value


def _broken(file_name: str, what: str) -> UserError:
    return UserError(f"{file_name} is broken: {what}")


FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}  # by cross-attention width


@dataclass(frozen=True)
class AdapterWeights:
    """A LoRA file's content: component -> projections by the base's module paths, and their scales."""

    file_name: str
    sha256: str
    parts: dict[str, tuple[dict[str, mixer.LowRank], Scales]]
    header: dict[str, str]

    @property
    def key(self) -> str:
        """The name inside PEFT, from the content: a file under two names is loaded once."""
        return f"sha_{self.sha256[:16]}"


def adapter_name(path: str | Path) -> str:
    """ "dog" for `runs/dog` and the file in it, "dog@500", "dog@last" and "dog@mixers"; else the file's stem."""
    file = run_folder.find_weights(path)
    folder = file.parent.resolve()
    if file.name == run_folder.MIXERS_NAME:
        return f"{folder.name}@mixers"
    if file.name not in (run_folder.PUBLISHED_NAME, run_folder.RAW_NAME):
        return file.stem
    is_checkpoint = folder.name.startswith("checkpoint-") or (
        folder.name == "last" and file.name == run_folder.RAW_NAME
    )
    return f"{folder.parent.name}@{folder.name.removeprefix('checkpoint-')}" if is_checkpoint else folder.name


def read_adapter(path: str | Path, pipeline: DiffusionPipeline) -> AdapterWeights:
    """The file's content. Raises UserError when it is missing, is not a safetensors file, or holds no known LoRA."""
    file = run_folder.find_weights(path)
    try:
        with safe_open(file, framework="pt") as opened:
            header, keys = dict(opened.metadata() or {}), set(opened.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file.name} is not a whole safetensors file: {one_line(error)}") from error
    if basis.is_mixer_file(file):
        raise UserError(f"{file.name} holds mixers alone, without their basis; give the LoRA file beside it")
    tensors, alphas, settings = (
        (fold_raw(file), None, None) if raw_file.RAW_KEY in keys else _read_published(file, pipeline)
    )
    parts = {}
    for component, found in projections(tensors, file.name).items():
        found = {_base_path(component, path, pipeline): projection for path, projection in found.items()}
        parts[component] = found, scales(component, found, alphas, settings, file.name, pipeline)
    return AdapterWeights(file.name, file_digest(file), parts, header)


def _base_path(component: str, path: str, pipeline: DiffusionPipeline) -> str:
    """The module's path in the base; transformers 5 has no `text_model.` in CLIPTextModel, files have it or not."""
    path = kohya.published_path(component, path)
    has_prefix = component in DENOISERS or hasattr(getattr(pipeline, component, None), "text_model")
    return path if has_prefix else path.removeprefix("text_model.")


def fold_raw(file: Path) -> dict[str, torch.Tensor]:
    """A checkpoint, folded, as `published_tensors`. Raises UserError."""
    tensors, metadata = raw_file.read_raw(file)
    folded: mixer.Folded = {}
    for component, modules in raw_file.by_module(tensors).items():
        for path, parts in modules.items():
            layer = raw_file.matrices_from(parts, metadata, f"{component}.{path}").fold()
            folded.setdefault(component, {})[kohya.published_path(component, path)] = layer
    return published_file.published_tensors(folded)


def _read_published(file: Path, pipeline: DiffusionPipeline) -> tuple[dict[str, torch.Tensor], dict | None, object]:
    """Tensors in diffusers' naming, kohya's alphas, and PEFT's settings in the header. Raises UserError."""
    try:
        sizes = _dora_scales(file)
        tensors = _read_otherwise(file, pipeline)
        if tensors is not None and (others := key_names.as_peft(tensors, pipeline, file.name)):
            return others, None, _settings_beside(file, tensors, others)
        with proof.collected_warnings() if sizes else nullcontext():  # diffusers drops dora_scale, and says so
            is_unet = facts_of(type(pipeline).__name__).denoiser == "unet"
            tensors, *alphas, settings = pipeline.lora_state_dict(
                str(file.parent) if tensors is None else tensors,
                weight_name=file.name,
                use_safetensors=True,
                local_files_only=True,
                return_lora_metadata=True,
                **({"unet_config": pipeline.unet.config} if is_unet else {}),
            )
            alphas = alphas[0] if alphas else None  # of a UNet; elsewhere they are in `tensors`
        settings = settings or json.loads(run_folder.header_of(file).get(published_file.PEFT_SETTINGS, "null"))
        by_name = {key.removesuffix(kohya.DORA_SCALE): key_names.as_magnitude(size) for key, size in sizes.items()}
        labels = key_names.renamed(by_name, pipeline).items()
        return tensors | {f"{label}.lora_magnitude_vector": by_name[name] for name, label in labels}, alphas, settings
    except UserError:
        raise
    except Exception as error:  # diffusers' conversion raises any error on unknown names
        raise UserError(f"{file.name} is not a LoRA file that diffusers can read: {one_line(error)}") from error


def _read_otherwise(file: Path, pipeline: DiffusionPipeline) -> dict[str, torch.Tensor] | None:
    """The tensors of a file that diffusers cannot read: fp8 as fp32, without bundled new tokens (`tokens_inside`);
    None for any other file."""
    with safe_open(file, framework="pt") as opened:
        keys = sorted(opened.keys())
        is_short = any(opened.get_slice(key).get_dtype().startswith("F8") for key in keys)
        if not is_short and not key_names.is_read_here(keys, pipeline):
            return None
        tensors = {key: opened.get_tensor(key) for key in keys if not key.startswith(BUNDLE)}
    return {k: t.float() if t.is_floating_point() and t.element_size() == 1 else t for k, t in tensors.items()}


def _settings_beside(
    file: Path, tensors: dict[str, torch.Tensor], found: dict[str, torch.Tensor]
) -> dict[str, object] | None:
    """PEFT's settings, which it keeps in a file of its own; None for a file that has none."""
    config = file.parent / run_folder.PEFT_CONFIG
    if not config.is_file() or not any(key.startswith(key_names.PEFT_PREFIX) for key in tensors):
        return None
    settings = parse_object(config.read_bytes()[:LONGEST_CONFIG])
    components = {key.partition(".")[0] for key in found}
    return {f"{component}.{name}": value for component in components for name, value in settings.items()}


def _dora_scales(file: Path) -> dict[str, torch.Tensor]:
    """kohya's magnitudes by their keys, each (out, 1) or (out, 1, 1, 1). Raises UserError for those of columns."""
    with safe_open(file, framework="pt") as opened:
        sizes = {key: opened.get_tensor(key) for key in sorted(opened.keys()) if key.endswith(kohya.DORA_SCALE)}
    for key, size in sizes.items():
        if not kohya.is_by_rows(size):
            raise UserError(
                f"{file.name} holds DoRA by the columns of W ({key:.100} {tuple(size.shape)}), and only DoRA by its "
                "rows (out, 1) is read here: use it in the program that trained it, or train it by rows "
                "(LyCORIS: wd_on_output=True)"
            )
    return sizes


def check_fits(weights: AdapterWeights, pipeline: DiffusionPipeline, base_name: str) -> None:
    """Raises UserError, which describes both bases, unless each pair fits a layer of the base."""
    for component, (found, _) in weights.parts.items():
        model = getattr(pipeline, component, None)
        layers = {} if model is None else moslora.matrix_layers(model)
        for path, projection in found.items():
            size, name = moslora.weight_size(layers.get(path)), f"{component}.{path}"
            if (projection.up.shape[0], projection.down.shape[1]) != size[:2]:
                wanted, here = _unets(weights, pipeline)
                raise UserError(
                    f"{weights.file_name} was made for another base: it is for {wanted}, and {base_name} is {here} "
                    f"(first misfit: {name!r:.100}, rank {projection.rank})"
                )
            if wrong := _misshapen(projection, *size):
                raise _broken(weights.file_name, f"{name} has {wrong}")


def _misshapen(projection: mixer.LowRank, outputs: int, inputs: int, *kernel: int) -> str:
    """The first tensor whose shape does not fit a layer of this size, in words; "" when all do."""
    ones = (1,) * len(kernel)
    shapes = {
        "down": (projection.rank, inputs, *kernel),
        "up": (outputs, projection.rank, *ones),
        "bias": (outputs,),
        "magnitude": (1, outputs, *ones) if kernel else (outputs,),
    }
    for name, shape in shapes.items():
        tensor = getattr(projection, name)
        if tensor is not None and tuple(tensor.shape) != shape:
            return f"{name} {tuple(tensor.shape)} where {shape} belongs"
    return ""


def _unets(weights: AdapterWeights, pipeline: DiffusionPipeline) -> list[str]:
    """The UNet that the file is for, and the pipeline's, in words."""
    facts = facts_of(type(pipeline).__name__)
    if facts.denoiser != "unet" or "transformer" in weights.parts:
        adapted = weights.parts.get("transformer") or weights.parts.get("unet") or ({}, None)
        widths = sorted({projection.down.shape[1] for projection in adapted[0].values()})
        kind = "transformer" if "transformer" in weights.parts else "UNet"
        return [f"a {kind} with layers of widths {widths[:6]}", f"{facts.title}, {facts.model}"]
    found = weights.parts["unet"][0] if "unet" in weights.parts else {}
    needed = max((p.down.shape[1] for path, p in found.items() if path.endswith("attn2.to_k")), default=0)
    outputs = {p.up.shape[0] for path, p in found.items() if ".attn1." in path or ".attn2." in path}
    layers = moslora.matrix_layers(pipeline.unet)
    own = {moslora.weight_size(module)[0] for name, module in layers.items() if name.endswith("attn1.to_q")}
    texts = []
    for cross, widths in ((needed, outputs), (architecture(pipeline.unet)["cross_attention_dim"], own)):
        family = f"{FAMILIES[cross]}, " if cross in FAMILIES else ""
        seen = f"cross-attention width {cross}" if cross else "no cross-attention"
        listed = ", ".join(map(str, sorted(widths))) or "unknown"
        texts.append(f"a UNet with {family}{seen}, attention widths {listed}")
    return texts


def install(weights: AdapterWeights, pipeline: DiffusionPipeline) -> None:
    """Add the adapter under `weights.key`. Raises UserError when that fails; the components are then as before."""
    try:
        for component, (found, scales) in weights.parts.items():
            _load(component, found, scales, weights.key, pipeline)
    except Exception as error:
        pipeline.delete_adapters(weights.key)
        raise UserError(f"{weights.file_name} could not be put into the base: {one_line(error)}") from error


def _load(component: str, found: dict[str, mixer.LowRank], scales: Scales, key: str, pipeline) -> None:
    """The tensors get names for diffusers' loader: PEFT's for a UNet, its own older ones for a text encoder."""
    is_denoiser = component in DENOISERS
    down, up = ("lora_A", "lora_B") if is_denoiser else ("lora_linear_layer.down", "lora_linear_layer.up")
    tensors = {}
    for path, projection in found.items():
        parts = {
            f"{down}.weight": projection.down,
            f"{up}.weight": projection.up,
            f"{up}.bias": projection.bias,
            "lora_magnitude_vector.weight": projection.magnitude,
        }
        tensors |= {f"{component}.{path}.{name}": part for name, part in parts.items() if part is not None}
    config = {f"{component}.{name}": value for name, value in lora_config(found, scales).items()}
    model, options = getattr(pipeline, component), {"adapter_name": key, "metadata": config, "_pipeline": pipeline}
    if component == "unet":
        pipeline.load_lora_into_unet(tensors, unet=model, network_alphas=None, **options)
    elif is_denoiser:
        if "network_alphas" in signature(pipeline.load_lora_into_transformer).parameters:
            options["network_alphas"] = None
        pipeline.load_lora_into_transformer(tensors, transformer=model, **options)
    else:
        options |= {"network_alphas": None, "prefix": component}
        pipeline.load_lora_into_text_encoder(tensors, text_encoder=model, **options)


def lora_config(found: dict[str, mixer.LowRank], scales: Scales) -> dict[str, Any]:
    ranks, alphas = {path: p.rank for path, p in found.items()}, scales.alphas
    rank, alpha = most_common(ranks.values()), most_common(alphas.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": moslora.value_pattern(ranks, rank),
        "alpha_pattern": moslora.value_pattern(alphas, alpha),
        "target_modules": list(found),
        "use_rslora": scales.use_rslora,
        "use_dora": any(p.magnitude is not None for p in found.values()),
        "lora_bias": any(p.bias is not None for p in found.values()),
    }
