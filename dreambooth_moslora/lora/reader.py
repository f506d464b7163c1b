"""Reader of any LoRA file, of this program, diffusers or kohya: its matrices under common names,
and into a pipeline.

file --read_adapter--> AdapterWeights --check_fits--> --install--> a PEFT adapter
     --read_start-->   AdapterWeights --copy_into_adapter--> a fresh one: A := down, B := up·M⁻¹ / s

A file may come from anyone. Only the matrices of a LoRA and their scales are read from it; keys of
anything else are refused. As a start, a file of lower rank fills the first rows of A, and one of
higher rank is reduced by SVD.

<component>.<module path>.<part>  ->  component -> module path -> LowRank
"""

import logging
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from torch import Tensor

from dreambooth_moslora.disk import run_folder
from dreambooth_moslora.disk.contents import hash_file
from dreambooth_moslora.errors import UserError, format_error
from dreambooth_moslora.lora import key_names, raw_file, safetensors_file
from dreambooth_moslora.lora.key_names import ENCODER_KEYS, PEFT_KEYS, format_key
from dreambooth_moslora.lora.layer_mapping import (
    Parts,
    make_unknown_error,
    map_to_lora,
)
from dreambooth_moslora.lora.lora_settings import (
    Scales,
    build_scales,
    make_broken_error,
    read_header_settings,
    read_sidecar_settings,
)
from dreambooth_moslora.lora.metadata import get_most_common
from dreambooth_moslora.method import moslora
from dreambooth_moslora.method.mixer import Components, Folded, LowRank, Tensors
from dreambooth_moslora.settings.family_facts import DENOISERS, get_facts

logger = logging.getLogger(__name__)

Layers = dict[str, LowRank]
"""Module path -> matrices."""


def build_projections(parts: Parts, file_name: str) -> Folded:
    """Return component -> module path -> matrices down (r, in, …) and up (out, r, …).

    Raises UserError for values that are not finite, and TypeError for an incomplete layer.
    """
    if not parts:
        raise UserError(f"{file_name} holds no LoRA projection")
    folded: Folded = {}
    for (component, path), matrices in parts.items():
        for field, tensor in matrices.items():
            if not tensor.float().isfinite().all():
                raise make_broken_error(
                    file_name,
                    f"{f'{component}.{path}.{field}'!r:.100} has values that are NaN, infinite or "
                    "beyond single precision",
                )
        folded.setdefault(component, {})[path] = LowRank(**matrices)
    # PEFT has DoRA in all layers of a component, or in none.
    for component, layers in folded.items():
        if len({projection.magnitude is None for projection in layers.values()}) > 1:
            raise UserError(
                f"{file_name} holds DoRA for some layers of its {component} alone, "
                "which PEFT cannot load"
            )
    return folded


def parse_state_dict(state_dict: Tensors | tuple[Tensors, object], file_name: str) -> Parts:
    """Return the layers in a result of diffusers' `lora_state_dict`.

    Raises UserError for a key that belongs to no layer.
    """
    modules, unknown = key_names.parse_keys(
        state_dict if isinstance(state_dict, dict) else state_dict[0]
    )
    strange = [module for module in modules if module.prefix.text != f"{module.component}."]
    if unknown or strange:
        raise make_unknown_error(file_name, strange, unknown)
    return {(module.component, module.path): parts for module, parts in modules.items()}


@dataclass(frozen=True)
class AdapterWeights:
    """Content of a LoRA file: component -> projections by the base's module paths, and their
    scales."""

    file_name: str
    sha256: str
    parts: dict[str, tuple[Layers, Scales]]
    header: dict[str, str]

    @property
    def key(self) -> str:
        """Name inside PEFT, from the content: a file under two names is loaded once."""
        return f"sha_{self.sha256[:16]}"


def get_adapter_name(path: str | Path) -> str:
    """Return the name of an adapter's file, or of a run: see `run_folder.format_adapter_name`."""
    return run_folder.format_adapter_name(run_folder.find_weights(path).absolute(), folders=())


def read_adapter(path: str | Path, pipeline: DiffusionPipeline) -> AdapterWeights:
    """Return the file's content.

    Raises UserError if it is missing, is not a safetensors file, or holds no known LoRA.
    """
    file = run_folder.find_weights(path)
    tensors, header = safetensors_file.read_tensors(file)
    sidecar_settings = read_sidecar_settings(file, tensors)

    # A checkpoint's raw file, or a LoRA file of any tool
    if raw_file.RAW_KEY in tensors:
        layers, alphas, settings = fold_raw(file), {}, {}
    else:
        layers, alphas, settings = _read_published(
            file, tensors, header, sidecar_settings, pipeline
        )

    # The projections by the base's module paths, each with its scale
    parts = {}
    for component, file_layers in layers.items():
        paths = {path: _get_base_path(component, path, pipeline) for path in file_layers}
        base_layers = {paths[path]: projection for path, projection in file_layers.items()}
        base_alphas = {paths[path]: alpha for path, alpha in alphas.get(component, {}).items()}
        scales = build_scales(component, base_layers, base_alphas, settings, file.name)
        parts[component] = base_layers, scales
    return AdapterWeights(
        file_name=file.name,
        sha256=hash_file(file),
        parts=parts,
        header=header,
    )


def _get_base_path(component: str, path: str, pipeline: DiffusionPipeline) -> str:
    """Return the module's path in the base.

    transformers 5 has no `text_model.` in CLIPTextModel; files may have it or not.
    """
    path = key_names.get_published_path(component, path)
    has_prefix = component in DENOISERS or hasattr(getattr(pipeline, component, None), "text_model")
    return path if has_prefix else path.removeprefix("text_model.")


def fold_raw(file: Path) -> Folded:
    """Return a checkpoint's adapter, folded, in fp32. Raises UserError for a broken file."""
    tensors, metadata = raw_file.read_raw(file)
    folded: Folded = {}
    for component, modules in raw_file.split_by_module(tensors).items():
        for path, parts in modules.items():
            layer = raw_file.build_matrices(parts, metadata, f"{component}.{path}").fold()
            folded.setdefault(component, {})[path] = layer
    return folded


def _read_published(
    file: Path,
    tensors: Tensors,
    header: dict[str, str],
    sidecar_settings: dict,
    pipeline: DiffusionPipeline,
) -> tuple[Folded, dict[str, dict], dict]:
    """Return matrices, alphas by component and path, and PEFT's settings.

    file: its path
    tensors, header: its content
    sidecar_settings: PEFT's settings beside the file
    pipeline: with the base's models

    Raises UserError for a file that is not a LoRA of this base.
    """
    try:
        # 8-bit floats have no arithmetic.
        tensors = {
            k: t.float() if t.is_floating_point() and t.element_size() == 1 else t
            for k, t in tensors.items()
        }
        parts = map_to_lora(tensors, pipeline, file.name)
        if not parts:
            # Let diffusers rename keys that are no layers of this base. `check_fits` refuses what
            # is still unknown, so the alphas that diffusers returns separately are not needed.
            is_unet = get_facts(type(pipeline).__name__).denoiser == "unet"
            options = {"unet_config": pipeline.unet.config} if is_unet else {}
            parts = parse_state_dict(pipeline.lora_state_dict(tensors, **options), file.name)
        alphas: dict[str, dict[str, float]] = {}
        for (component, path), matrices in parts.items():
            if "alpha" in matrices:
                alphas.setdefault(component, {})[path] = float(matrices.pop("alpha"))
        settings = sidecar_settings or read_header_settings(header, file.name)
        if sidecar_settings or "lora_alpha" in settings:
            # Settings of one model apply to whatever component the file has.
            settings = {
                f"{component}.{name}": value
                for component, _ in parts
                for name, value in settings.items()
            }
        return build_projections(parts, file.name), alphas, settings
    except UserError:
        raise
    except Exception as error:  # diffusers' conversion raises any error on unknown names
        raise UserError(
            f"{file.name} is not a LoRA file that diffusers can read: {format_error(error)}"
        ) from error


def check_fits(weights: AdapterWeights, pipeline: DiffusionPipeline) -> None:
    """Raise UserError unless each layer of the file is one of the base, in its size."""
    for component, (projections, _) in weights.parts.items():
        model = getattr(pipeline, component, None)
        layers = {} if model is None else moslora.get_matrix_layers(model)
        for path, projection in projections.items():
            base_size = moslora.get_weight_size(layers.get(path))
            size = (len(projection.up), *projection.down.shape[1:])
            if size != base_size:
                raise raw_file.make_other_base_error(
                    weights.file_name, f"{component}.{path}", size, base_size
                )


def install(weights: AdapterWeights, pipeline: DiffusionPipeline) -> None:
    """Add the adapter under `weights.key`.

    Raises UserError if that fails; the components are then as before.
    """
    try:
        for component, (layers, scales) in weights.parts.items():
            _load(component, layers, scales, weights.key, pipeline)
    except Exception as error:
        pipeline.delete_adapters(weights.key)
        raise UserError(
            f"{weights.file_name} could not be put into the base: {format_error(error)}"
        ) from error


def _load(component: str, layers: Layers, scales: Scales, key: str, pipeline) -> None:
    """Load one component through diffusers' loader.

    The tensors get PEFT's names for a denoiser, and diffusers' older names for a text encoder.
    """
    # The tensors under the loader's keys
    is_denoiser = component in DENOISERS
    tool = PEFT_KEYS if is_denoiser else ENCODER_KEYS
    tensors = {}
    for path, projection in layers.items():
        name = f"{component}.{path}"
        parts = {
            format_key(tool, name, part): getattr(projection, part)
            for part in ("down", "up", "bias")
        }
        parts[format_key(PEFT_KEYS, name, "magnitude") + ".weight"] = projection.magnitude
        tensors |= {key: part for key, part in parts.items() if part is not None}

    # Options of every loader, then those of the loader of each kind of model
    config = {
        f"{component}.{name}": value for name, value in build_lora_config(layers, scales).items()
    }
    model = getattr(pipeline, component)
    options = {"adapter_name": key, "metadata": config, "_pipeline": pipeline}
    if component == "unet":
        pipeline.load_lora_into_unet(tensors, unet=model, network_alphas=None, **options)
    elif is_denoiser:
        if "network_alphas" in signature(pipeline.load_lora_into_transformer).parameters:
            options["network_alphas"] = None
        pipeline.load_lora_into_transformer(tensors, transformer=model, **options)
    else:
        options |= {"network_alphas": None, "prefix": component}
        pipeline.load_lora_into_text_encoder(tensors, text_encoder=model, **options)


def build_lora_config(layers: Layers, scales: Scales) -> dict[str, Any]:
    """Return the arguments of PEFT's LoraConfig for these layers and scales."""
    ranks, alphas = {path: p.rank for path, p in layers.items()}, scales.alphas
    rank, alpha = get_most_common(ranks.values()), get_most_common(alphas.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": moslora.build_value_pattern(ranks, rank),
        "alpha_pattern": moslora.build_value_pattern(alphas, alpha),
        "target_modules": list(layers),
        "use_rslora": scales.use_rslora,
        "use_dora": any(p.magnitude is not None for p in layers.values()),
        "lora_bias": any(p.bias is not None for p in layers.values()),
    }


def read_fitting(flag: str, path: str | Path, pipeline: DiffusionPipeline) -> AdapterWeights:
    """Return the content of a file that fits the pipeline.

    Raises UserError that begins with `flag`, which named the file.
    """
    try:
        weights = read_adapter(path, pipeline)
        check_fits(weights, pipeline)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error
    return weights


def read_start(path: str | Path, pipeline: DiffusionPipeline, use_dora: bool) -> AdapterWeights:
    """Return the content of the file that a run starts from.

    Raises UserError for another base's, and for a file with parts that the run's adapter lacks.
    """
    # The file's layers are those of the base, in their sizes.
    weights = read_fitting("--init_adapter", path, pipeline)
    name = f"--init_adapter {weights.file_name}"

    # This run's adapter has no biases, and magnitudes only if it is a DoRA.
    layers = [layer for by_path, _ in weights.parts.values() for layer in by_path.values()]
    if any(layer.bias is not None for layer in layers):
        raise UserError(f"{name}: its layers have biases, which this adapter has not.")
    has_dora = any(layer.magnitude is not None for layer in layers)
    if has_dora != use_dora:
        raise UserError(
            f"{name}: it holds DoRA: give --use_dora."
            if has_dora
            else f"{name}: it holds no DoRA: leave --use_dora out."
        )
    return weights


@torch.no_grad()
def copy_into_adapter(
    weights: AdapterWeights, components: Components, adapter_name: str = "default"
) -> str:
    """Copy the file's update into a fresh adapter; return a line about it.

    Raises UserError if file and adapter have no common layer.
    """
    # The layers of the run's adapter, and those of the file with their scales
    live = raw_file.get_all_layers(components, adapter_name)
    update = {
        f"{component}.{path}": (projection, scales.get_scale(path, projection.rank))
        for component, (layers, scales) in weights.parts.items()
        for path, projection in layers.items()
    }

    # Only layers that both have are copied; the adapter's other layers stay fresh.
    common = [path for path in live if path in update]
    if not common:
        first = f"it holds {min(update)}, the run trains {min(live)}"
        raise UserError(
            f"--init_adapter {weights.file_name}: no layer of it is trained here ({first})."
        )
    for path in common:
        copy_into_layer(live[path], adapter_name, *update[path])
    return (
        f"--init_adapter {weights.file_name}: {len(common)} layers go on from it, "
        f"{len(live) - len(common)} begin anew, and {len(update) - len(common)} of its layers are "
        "left out."
    )


def copy_into_layer(layer: LoraLayer, adapter_name: str, projection: LowRank, scale: float) -> None:
    """Copy the file's update into a fresh layer, in the layer's rank, scale and mixer.

    projection, scale: the update ΔW = scale · up·down
    """
    matrices = moslora.get_matrices(layer, adapter_name)
    resized = resize_rank(projection, scale, matrices.down)

    # ΔW = s·B·M·A, so B := up·M⁻¹ / s
    lora_b = resized.up / matrices.scale
    if matrices.mixer is not None:
        lora_b = torch.linalg.solve(matrices.mixer.cpu().double(), lora_b, left=False)
    lora_a = resized.down.view(matrices.down.shape)
    parts = {"lora_A": lora_a, "lora_B": lora_b, "mixer": matrices.mixer}
    if projection.magnitude is not None:
        parts["magnitude"] = projection.magnitude.flatten()
    raw_file.fill_layer(layer, adapter_name, parts)


def resize_rank(projection: LowRank, scale: float, layer_down: Tensor) -> LowRank:
    """Return the update in the rank of the layer's A (r, …), flattened, in fp64.

    Unused rows keep the layer's A, beside zeros in B.
    """
    down, up = projection.down.double().flatten(1), scale * projection.up.double().flatten(1)
    # Rows that are zero on both sides would never learn.
    is_used = (down != 0).any(1) | (up != 0).any(0)
    down, up, rank = down[is_used], up[:, is_used], len(layer_down)
    if len(down) > rank:
        up, down = truncate_rank(up, down, rank)
    layer_down = layer_down.detach().cpu().double().flatten(1)
    missing = up.new_zeros(len(up), rank - len(down))
    return LowRank(torch.cat([down, layer_down[len(down) :]]), torch.cat([up, missing], dim=1))


def truncate_rank(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return up (out, rank) and down (rank, in) of equal norms: the best approximation of that rank
    to up (out, r) · down (r, in), in fp64.

    It is from the product's thin SVD, for which the (out, in) product is not formed.
    """
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    left_vectors, sizes, right_vectors = torch.linalg.svd(r_up @ r_down.T)
    root = sizes[:rank].sqrt()
    return (
        q_up @ left_vectors[:, :rank] * root,
        root[:, None] * (right_vectors[:rank] @ q_down.T),
    )
