"""Reads any LoRA file (this program's, diffusers', kohya's), checks that it fits the base, and loads it into
the pipeline.

file --read_adapter--> AdapterWeights --check_fits--> --install--> a PEFT adapter named by its content

A file may come from anyone. Only the matrices of a LoRA and their scales are taken from it.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionXLPipeline
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dreambooth_moslora.adapters.files.export import published_tensors
from dreambooth_moslora.adapters.files.kohya import DORA_SCALE, is_by_rows
from dreambooth_moslora.adapters.files.lora_format import Part, Scales, module_path, projections, scales
from dreambooth_moslora.adapters.files.metadata import most_common
from dreambooth_moslora.adapters.files.mixer_file import is_mixer_file
from dreambooth_moslora.adapters.files.proof import collected_warnings, published_name
from dreambooth_moslora.adapters.files.raw_file import COMPONENTS, component_tensors, matrices_from, read_raw
from dreambooth_moslora.adapters.layers import matrix_layers, value_pattern
from dreambooth_moslora.adapters.low_rank import LowRank
from dreambooth_moslora.base.load import architecture
from dreambooth_moslora.core.digests import file_digest
from dreambooth_moslora.core.errors import UserError, one_line
from dreambooth_moslora.core.run_files.adapter_files import find_weights
from dreambooth_moslora.core.run_files.run_folder import MIXERS_NAME, PUBLISHED_NAME, RAW_NAME

__all__ = ["AdapterWeights", "adapter_name", "check_fits", "install", "read_adapter"]

FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}
"""Cross-attention width of the UNet -> the model family that has it."""


@dataclass(frozen=True)
class AdapterWeights:
    """A LoRA file's content: component -> projections and scales by the base's module paths.

    `sha256` is the file's.
    """

    file_name: str
    sha256: str
    parts: dict[str, Part]
    header: dict[str, str]

    @property
    def key(self) -> str:
        """The name inside PEFT, from the content: a file under two names is loaded once."""
        return f"sha_{self.sha256[:16]}"


def adapter_name(path: str | Path) -> str:
    """`runs/dog` and the file in it are called "dog", its checkpoints "dog@500" and "dog@last", its mixers alone
    "dog@mixers", and `cat.safetensors` is "cat"."""
    file = find_weights(path)
    folder = file.parent.resolve()
    if file.name == MIXERS_NAME:
        return f"{folder.name}@mixers"
    if file.name not in (PUBLISHED_NAME, RAW_NAME):
        return file.stem
    is_checkpoint = folder.name.startswith("checkpoint-") or (folder.name == "last" and file.name == RAW_NAME)
    return f"{folder.parent.name}@{folder.name.removeprefix('checkpoint-')}" if is_checkpoint else folder.name


def read_adapter(path: str | Path, pipeline: StableDiffusionXLPipeline) -> AdapterWeights:
    """The file's content. Raises UserError when it is missing, is not a safetensors file, or holds no known LoRA."""
    file = find_weights(path)
    header, keys = _read_header(file)
    if is_mixer_file(file):
        raise UserError(f"{file.name} holds mixers alone, without their basis; give the LoRA file beside it")
    content = (fold_raw(file), None, None) if "raw_format" in keys else _read_published(file, pipeline)
    return AdapterWeights(file.name, file_digest(file), _parts(*content, file.name, pipeline), header)


def _parts(
    tensors: dict[str, Tensor],
    network_alphas: dict[str, float] | None,
    peft_metadata: object,
    file_name: str,
    pipeline: StableDiffusionXLPipeline,
) -> dict[str, Part]:
    parts = {}
    for component, found in projections(tensors, file_name).items():
        found_scales = scales(component, found, network_alphas, peft_metadata, file_name)
        names = {path: _module_name(component, path, getattr(pipeline, component, None)) for path in found}
        alphas = {names[path]: alpha for path, alpha in found_scales.alphas.items()}
        by_name = {names[path]: projection for path, projection in found.items()}
        parts[component] = by_name, Scales(alphas, found_scales.use_rslora)
    return parts


def _module_name(component: str, path: str, model: nn.Module | None) -> str:
    """The module's path in the base; transformers 5 has no `text_model.` in CLIPTextModel, files have it or not."""
    path = published_name(component, path)[1]
    return path if component == "unet" or hasattr(model, "text_model") else path.removeprefix("text_model.")


def fold_raw(file: Path) -> dict[str, Tensor]:
    """A checkpoint as the tensors of a plain LoRA in diffusers' naming: down (r, in) = A, up (out, r) = s·B·M,
    alpha = rank. Raises UserError."""
    tensors, metadata = read_raw(file)
    folded: dict[str, dict[str, LowRank]] = {}
    for component in COMPONENTS:
        for path, parts in component_tensors(tensors, component).items():
            layer = matrices_from(parts, metadata, f"{component}.{path}").fold()
            folded.setdefault(component, {})[published_name(component, path)[1]] = layer
    return published_tensors(folded)


def _read_published(file: Path, pipeline: StableDiffusionXLPipeline) -> tuple[dict[str, Tensor], dict | None, object]:
    """Tensors in diffusers' naming, kohya's alphas, and PEFT's settings in the header. Raises UserError."""
    try:
        sizes = _dora_scales(file)
        with collected_warnings() if sizes else nullcontext():  # diffusers drops dora_scale, and says so
            tensors, alphas, settings = pipeline.lora_state_dict(
                str(file.parent),
                weight_name=file.name,
                unet_config=pipeline.unet.config,
                use_safetensors=True,
                local_files_only=True,
                return_lora_metadata=True,
            )
        return tensors | _magnitudes(sizes, pipeline), alphas, settings
    except UserError:
        raise
    except Exception as error:  # diffusers' conversion raises any error on unknown names
        raise UserError(f"{file.name} is not a LoRA file that diffusers can read: {one_line(error)}") from error


def _dora_scales(file: Path) -> dict[str, Tensor]:
    """kohya's magnitudes by their keys, each (out, 1) or (out, 1, 1, 1). Raises UserError for those of columns."""
    with safe_open(file, framework="pt") as opened:
        sizes = {key: opened.get_tensor(key) for key in sorted(opened.keys()) if key.endswith(DORA_SCALE)}
    for key, size in sizes.items():
        if not is_by_rows(size):
            raise UserError(
                f"{file.name} holds DoRA by the columns of W ({key:.100} {tuple(size.shape)}), and only DoRA by its "
                "rows (out, 1) is read here: use it in the program that trained it, or train it by rows "
                "(LyCORIS: wd_on_output=True)"
            )
    return sizes


def _magnitudes(sizes: dict[str, Tensor], pipeline: StableDiffusionXLPipeline) -> dict[str, Tensor]:
    """kohya's `dora_scale` as PEFT's magnitudes: (out,), or (1, out, 1, 1) of a convolution.

    diffusers renames pairs of matrices alone, so each `dora_scale` is given to it as both of a pair.
    """
    names = {key.removesuffix(DORA_SCALE): size for key, size in sizes.items()}
    pairs = {f"{name}.lora_{side}.weight": size for name, size in names.items() for side in ("down", "up")}
    renamed, _ = pipeline.lora_state_dict(pairs, unet_config=pipeline.unet.config) if pairs else ({}, None)
    found = {}
    for key, size in renamed.items():
        component, _, rest = key.partition(".")
        magnitude = size[:, 0] if size.ndim == 2 else size.transpose(0, 1)
        found[f"{component}.{module_path(component, rest)}.lora_magnitude_vector"] = magnitude
    return found


def check_fits(weights: AdapterWeights, pipeline: StableDiffusionXLPipeline, base_name: str) -> None:
    """Raises UserError, which describes both bases, unless each pair fits a layer of the base."""
    for component, (found, _) in weights.parts.items():
        model = getattr(pipeline, component, None)
        layers = {} if model is None else matrix_layers(model)
        for path, projection in found.items():
            layer, name = layers.get(path), f"{component}.{path}"
            if (projection.down.shape[1], projection.up.shape[0]) != (_width(layer, "in"), _width(layer, "out")):
                raise UserError(
                    f"{weights.file_name} was made for another base: it is for {_describe_weights(weights)}, "
                    f"and {base_name} is {_describe_base(pipeline)} "
                    f"(first misfit: {name!r:.100}, rank {projection.rank})"
                )
            if wrong := _misshapen(projection, layer):
                raise UserError(f"{weights.file_name} is broken: {name} has {wrong}")


def _misshapen(projection: LowRank, layer: nn.Module) -> str:
    """The first tensor whose shape does not fit `layer`, in words; "" when all do."""
    kernel = tuple(getattr(layer, "kernel_size", ()))
    ones, outputs = (1,) * len(kernel), _width(layer, "out")
    shapes = {
        "down": (projection.rank, _width(layer, "in"), *kernel),
        "up": (outputs, projection.rank, *ones),
        "bias": (outputs,),
        "magnitude": (1, outputs, *ones) if kernel else (outputs,),
    }
    for name, shape in shapes.items():
        tensor = getattr(projection, name)
        if tensor is not None and tuple(tensor.shape) != shape:
            return f"{name} {tuple(tensor.shape)} where {shape} belongs"
    return ""


def _read_header(file: Path) -> tuple[dict[str, str], set[str]]:
    """The file's own metadata, and the names of its tensors. Raises UserError."""
    try:
        with safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {}), set(opened.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file.name} is not a whole safetensors file: {one_line(error)}") from error


def _width(module: nn.Module | None, side: str) -> int | None:
    """Input or output width of a linear or convolution layer."""
    for name in (f"{side}_features", f"{side}_channels"):
        if hasattr(module, name):
            return getattr(module, name)
    return None


def _describe_weights(weights: AdapterWeights) -> str:
    found = weights.parts["unet"][0] if "unet" in weights.parts else {}
    cross = {p.down.shape[1] for path, p in found.items() if path.endswith("attn2.to_k")}
    widths = {p.up.shape[0] for path, p in found.items() if ".attn1." in path or ".attn2." in path}
    return _describe(max(cross, default=0), sorted(widths))


def _describe_base(pipeline: StableDiffusionXLPipeline) -> str:
    cross_attention_dim = architecture(pipeline.unet)["cross_attention_dim"]
    return _describe(cross_attention_dim, sorted(_attention_widths(pipeline.unet)))


def _attention_widths(unet: nn.Module) -> set[int]:
    return {_width(module, "out") for name, module in matrix_layers(unet).items() if name.endswith("attn1.to_q")}


def _describe(cross: int, widths: list[int]) -> str:
    family = f"{FAMILIES[cross]}, " if cross in FAMILIES else ""
    seen = f"cross-attention width {cross}" if cross else "no cross-attention"
    return f"a UNet with {family}{seen}, attention widths {', '.join(map(str, widths)) or 'unknown'}"


def install(weights: AdapterWeights, pipeline: StableDiffusionXLPipeline) -> None:
    """Add the adapter to the pipeline's components, under `weights.key`.

    Raises UserError when that fails; the components are then as before.
    """
    try:
        for component, (found, scales) in weights.parts.items():
            _load(component, found, scales, weights.key, pipeline)
    except Exception as error:
        pipeline.delete_adapters(weights.key)
        raise UserError(f"{weights.file_name} could not be put into the base: {one_line(error)}") from error


def _load(component: str, found: dict[str, LowRank], scales: Scales, key: str, pipeline) -> None:
    config = {f"{component}.{name}": value for name, value in lora_config(found, scales).items()}
    options = {"network_alphas": None, "adapter_name": key, "metadata": config, "_pipeline": pipeline}
    tensors = _tensors(component, found)
    if component == "unet":
        pipeline.load_lora_into_unet(tensors, unet=pipeline.unet, **options)
    else:
        model = getattr(pipeline, component)
        pipeline.load_lora_into_text_encoder(tensors, text_encoder=model, prefix=component, **options)


def lora_config(found: dict[str, LowRank], scales: Scales) -> dict[str, Any]:
    """Arguments of PEFT's LoraConfig."""
    ranks, alphas = {path: p.rank for path, p in found.items()}, scales.alphas
    rank, alpha = most_common(ranks.values()), most_common(alphas.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": value_pattern(ranks, rank),
        "alpha_pattern": value_pattern(alphas, alpha),
        "target_modules": list(found),
        "use_rslora": scales.use_rslora,
        "use_dora": any(p.magnitude is not None for p in found.values()),
        "lora_bias": any(p.bias is not None for p in found.values()),
    }


def _tensors(component: str, found: dict[str, LowRank]) -> dict[str, Tensor]:
    """The tensors under names for diffusers' loader: PEFT's for a UNet, its own older ones for a text encoder."""
    down, up = ("lora_A", "lora_B") if component == "unet" else ("lora_linear_layer.down", "lora_linear_layer.up")
    tensors = {}
    for path, projection in found.items():
        parts = {
            f"{down}.weight": projection.down,
            f"{up}.weight": projection.up,
            f"{up}.bias": projection.bias,
            "lora_magnitude_vector.weight": projection.magnitude,
        }
        tensors |= {f"{component}.{path}.{name}": part for name, part in parts.items() if part is not None}
    return tensors
