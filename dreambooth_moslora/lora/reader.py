"""Any LoRA file, of this program, diffusers or kohya: its matrices under common names, and into a
pipeline.

file --read_adapter--> AdapterWeights --check_fits--> --install--> a PEFT adapter
     --read_start-->   AdapterWeights --begin_with--> a fresh one: A := down, B := up·M⁻¹ / s

A file may come from anyone. Only the matrices of a LoRA and their scales are taken from it; other
keys are refused. As a start, a file of lower rank fills the first rows of A, and one of higher rank
is reduced by SVD.

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
from dreambooth_moslora.lora import key_names, raw_file
from dreambooth_moslora.lora.key_names import ENCODER_KEYS, PEFT_KEYS, format_key
from dreambooth_moslora.lora.layer_mapping import (
    Parts,
    make_unknown_key_error,
    make_unknown_layer_error,
    map_to_lora,
)
from dreambooth_moslora.lora.lora_settings import (
    Scales,
    check_alphas,
    make_broken_error,
    parse_scales,
    read_header_settings,
    read_sidecar_settings,
)
from dreambooth_moslora.lora.metadata import get_most_common
from dreambooth_moslora.method import moslora
from dreambooth_moslora.method.mixer import Components, Folded, LowRank, Tensors
from dreambooth_moslora.settings.family_facts import DENOISERS, get_facts

logger = logging.getLogger(__name__)

Layers = dict[str, LowRank]  # by module path


def build_projections(parts: Parts, file_name: str) -> Folded:
    """Component -> module path -> matrices down (r, in, …) and up (out, r, …). Raises UserError for
    values that are not finite, and TypeError for a layer that is half there."""
    if not parts:
        raise UserError(f"{file_name} holds no LoRA projection")
    result: Folded = {}
    for (component, path), own in parts.items():
        for field, tensor in own.items():
            if not tensor.float().isfinite().all():
                name = f"{component}.{path}.{field}"
                said = "has values that are NaN, infinite or beyond single precision"
                raise make_broken_error(file_name, f"{name!r:.100} {said}")
        result.setdefault(component, {})[path] = LowRank(**own)
    # DoRA is in all layers of a component, or in none.
    for component, layers in result.items():
        if len({projection.magnitude is None for projection in layers.values()}) > 1:
            raise UserError(
                f"{file_name} holds DoRA for some layers of its {component} alone, "
                "which PEFT cannot load"
            )
    return result


def parse_state_dict(state_dict: Tensors | tuple[Tensors, object], file_name: str) -> Parts:
    """The layers in what diffusers' `lora_state_dict` gives. Raises UserError for a key of none."""
    modules, unknown = key_names.parse_keys(
        state_dict if isinstance(state_dict, dict) else state_dict[0]
    )
    strange = [module for module in modules if module.prefix.text != f"{module.component}."]
    if unknown or strange:
        raise (
            make_unknown_layer_error(file_name, strange[0])
            if strange
            else make_unknown_key_error(file_name, unknown[0])
        )
    return {(module.component, module.path): parts for module, parts in modules.items()}


PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")  # they leave the base unchanged


def build_scales(
    component: str, layers: Layers, alphas: dict[str, float], peft_settings: dict, file_name: str
) -> Scales:
    """The alphas of one component, the file's by path or PEFT's. Raises UserError for invalid or
    contradicting settings, and for a file that goes with a changed base."""
    # diffusers refuses both, too: one of them would be ignored.
    if peft_settings and alphas:
        raise make_broken_error(file_name, "it has both alphas and LoRA settings")
    prefix = f"{component}."
    settings = {k.removeprefix(prefix): v for k, v in peft_settings.items() if k.startswith(prefix)}
    if settings:
        start = settings.get("init_lora_weights", True)
        if start not in PLAIN_INITS:
            raise UserError(
                f"{file_name} goes with a changed base (init_lora_weights {start!r:.40}); "
                "export a plain LoRA"
            )
        result = parse_scales(component, layers, settings, file_name)
    # a layer without an alpha gets the most common one, as in diffusers; without any, alpha is the
    # rank
    else:
        common = get_most_common(alphas.values()) if alphas else None
        result = Scales(
            {
                path: alphas.get(path, p.rank if common is None else common)
                for path, p in layers.items()
            }
        )
    check_alphas(result.alphas, file_name)
    return result


@dataclass(frozen=True)
class AdapterWeights:
    """A LoRA file's content: component -> projections by the base's module paths, and their
    scales."""

    file_name: str
    sha256: str
    parts: dict[str, tuple[Layers, Scales]]
    header: dict[str, str]

    @property
    def key(self) -> str:
        """The name inside PEFT, from the content: a file under two names is loaded once."""
        return f"sha_{self.sha256[:16]}"


def get_adapter_name(path: str | Path) -> str:
    """The name of an adapter's file, or of a run: see `choose_run_folder.format_adapter_name`."""
    return run_folder.format_adapter_name(run_folder.find_weights(path).absolute(), folders=())


def read_adapter(path: str | Path, pipeline: DiffusionPipeline) -> AdapterWeights:
    """The file's content. Raises UserError when it is missing, is not a safetensors file, or holds
    no known LoRA."""
    file = run_folder.find_weights(path)
    tensors, header = raw_file.read_tensors(file)
    own = read_sidecar_settings(file, tensors)

    # A checkpoint's own file, or one of any tool.
    if raw_file.RAW_KEY in tensors:
        layers, alphas, settings = fold_raw(file), {}, {}
    else:
        layers, alphas, settings = _read_published(file, tensors, header, own, pipeline)

    # By the base's own paths, each projection with the scale that the file means.
    parts = {}
    for component, of_component in layers.items():
        paths = {path: _get_base_path(component, path, pipeline) for path in of_component}
        found = {paths[path]: projection for path, projection in of_component.items()}
        own = {paths[path]: alpha for path, alpha in alphas.get(component, {}).items()}
        parts[component] = found, build_scales(component, found, own, settings, file.name)
    return AdapterWeights(
        file_name=file.name,
        sha256=hash_file(file),
        parts=parts,
        header=header,
    )


def _get_base_path(component: str, path: str, pipeline: DiffusionPipeline) -> str:
    """The module's path in the base; transformers 5 has no `text_model.` in CLIPTextModel, files
    have it or not."""
    path = key_names.get_published_path(component, path)
    has_prefix = component in DENOISERS or hasattr(getattr(pipeline, component, None), "text_model")
    return path if has_prefix else path.removeprefix("text_model.")


def fold_raw(file: Path) -> Folded:
    """A checkpoint, folded, in fp32. Raises UserError."""
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
    """Matrices, alphas by component and path, and PEFT's settings. `own`: those beside the file.
    Raises UserError."""
    try:
        # Eight-bit floats have no arithmetic.
        tensors = {
            k: t.float() if t.is_floating_point() and t.element_size() == 1 else t
            for k, t in tensors.items()
        }
        parts = map_to_lora(tensors, pipeline, file.name)
        if not parts:
            # The names are none of this base's layers, until diffusers gives them others. If it
            # does not, `check_fits` refuses the file, so that the alphas that diffusers keeps apart
            # are not missed.
            is_unet = get_facts(type(pipeline).__name__).denoiser == "unet"
            options = {"unet_config": pipeline.unet.config} if is_unet else {}
            parts = parse_state_dict(pipeline.lora_state_dict(tensors, **options), file.name)
        alphas: dict[str, dict[str, float]] = {}
        for (component, path), of_layer in parts.items():
            if "alpha" in of_layer:
                alphas.setdefault(component, {})[path] = float(of_layer.pop("alpha"))
        settings = sidecar_settings or read_header_settings(header, file.name)
        if sidecar_settings or "lora_alpha" in settings:  # of one model, whatever its name
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
    """Raises UserError unless each layer of the file is one of the base, in its size."""
    for component, (found, _) in weights.parts.items():
        model = getattr(pipeline, component, None)
        layers = {} if model is None else moslora.get_matrix_layers(model)
        for path, projection in found.items():
            here = moslora.get_weight_size(layers.get(path))
            size = (len(projection.up), *projection.down.shape[1:])
            if size != here:
                name = f"{component}.{path}"
                raise raw_file.make_other_base_error(weights.file_name, name, size, here)


def install(weights: AdapterWeights, pipeline: DiffusionPipeline) -> None:
    """Add the adapter under `weights.key`. Raises UserError when that fails; the components are
    then as before."""
    try:
        for component, (found, scales) in weights.parts.items():
            _load(component, found, scales, weights.key, pipeline)
    except Exception as error:
        pipeline.delete_adapters(weights.key)
        raise UserError(
            f"{weights.file_name} could not be put into the base: {format_error(error)}"
        ) from error


def _load(component: str, layers: Layers, scales: Scales, key: str, pipeline) -> None:
    """The tensors get names for diffusers' loader: PEFT's for a UNet, its own older ones for a text
    encoder."""
    # The tensors
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
    # What every loader takes, then what each kind of model's takes
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
    """The content of a file that fits the pipeline. Raises UserError, which begins with the flag
    that named it."""
    try:
        weights = read_adapter(path, pipeline)
        check_fits(weights, pipeline)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error
    return weights


def read_start(path: str | Path, pipeline: DiffusionPipeline, use_dora: bool) -> AdapterWeights:
    """The file's content. Raises UserError for another base's, and for what no adapter of the run
    can hold."""
    weights = read_fitting("--init_adapter", path, pipeline)
    name = f"--init_adapter {weights.file_name}"

    # An adapter of this run has no biases, and magnitudes only where it is a DoRA.
    found = [
        projection
        for projections, _ in weights.parts.values()
        for projection in projections.values()
    ]
    if any(projection.bias is not None for projection in found):
        raise UserError(f"{name}: its layers have biases, which this adapter has not.")
    has_dora = any(projection.magnitude is not None for projection in found)
    if has_dora != use_dora:
        what = (
            "it holds DoRA: give --use_dora"
            if has_dora
            else "it holds no DoRA: leave --use_dora out"
        )
        raise UserError(f"{name}: {what}.")
    return weights


@torch.no_grad()
def copy_into_adapter(
    weights: AdapterWeights, components: Components, adapter_name: str = "default"
) -> str:
    """Copy the file's update into a fresh adapter; returns a line about it. Raises UserError
    without a common layer."""
    live = raw_file.get_all_layers(components, adapter_name)
    update = {
        f"{component}.{path}": (projection, scales.get_scale(path, projection.rank))
        for component, (found, scales) in weights.parts.items()
        for path, projection in found.items()
    }

    # The layers that both have go on, the others begin anew.
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
    """Give a fresh layer the update of a file, in the layer's rank, scale and mixer."""
    own = moslora.get_matrices(layer, adapter_name)
    wanted = resize_rank(projection, scale, own.down)
    up = wanted.up / own.scale
    if own.mixer is not None:
        up = torch.linalg.solve(own.mixer.cpu().double(), up, left=False)
    parts = {"lora_A": wanted.down.view(own.down.shape), "lora_B": up, "mixer": own.mixer}
    if projection.magnitude is not None:
        parts["magnitude"] = projection.magnitude.flatten()
    raw_file.fill_layer(layer, adapter_name, parts)


def resize_rank(projection: LowRank, scale: float, layer_down: Tensor) -> LowRank:
    """The update in the rank of the layer's `own` A (r, …), flattened, in fp64."""
    down, up = projection.down.double().flatten(1), scale * projection.up.double().flatten(1)
    # rows that are zero on both sides would never learn
    used = (down != 0).any(1) | (up != 0).any(0)
    down, up, rank = down[used], up[:, used], len(layer_down)
    if len(down) > rank:
        up, down = build_leading_factors(*compute_product_svd(up, down), rank)
    layer_down = layer_down.detach().cpu().double().flatten(1)
    missing = up.new_zeros(len(up), rank - len(down))
    return LowRank(torch.cat([down, layer_down[len(down) :]]), torch.cat([up, missing], dim=1))


def compute_product_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of up (out, r) · down (r, in) in fp64, without forming the (out, in) product: U
    (out, r), S (r,), Vh."""
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().T)
    left, sizes, right = torch.linalg.svd(r_up @ r_down.T)
    return q_up @ left[:, : len(sizes)], sizes, right[: len(sizes)] @ q_down.T


def build_leading_factors(
    left_vectors: Tensor, sizes: Tensor, right_vectors: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """U (out, n), S (n,), Vh (n, in) -> up (out, rank), down (rank, in) of equal norms: the best
    approximation."""
    root = sizes[:rank].sqrt()
    return left_vectors[:, :rank] * root, root[:, None] * right_vectors[:rank]
