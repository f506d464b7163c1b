"""Raw adapter file, for resuming and analysis: A, M and B unchanged, and the metadata to restore
them.

    <component>.<module path>.lora_A       (r, in)
                             .mixer        (r, r)
                             .lora_B       (out, r)
                             .magnitude    (out,), only for DoRA

lora_A is (r, in, h, w) for a convolution. The tensor `raw_format` makes every stock LoRA loader
refuse the file: B·A without the mixer would be wrong.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dreambooth_moslora.disk.paths import get_public_name
from dreambooth_moslora.errors import UserError, format_error
from dreambooth_moslora.lora.empty_models import get_model_config
from dreambooth_moslora.lora.metadata import (
    METADATA_KEY,
    AdapterMetadata,
    get_most_common,
    get_versions,
)
from dreambooth_moslora.lora.safetensors_file import (
    check_finite,
    read_tensors,
    write_safetensors,
)
from dreambooth_moslora.method import mixer
from dreambooth_moslora.method.mixer import Components, MixedLowRank, Tensors, compute_scale
from dreambooth_moslora.settings.family_facts import DENOISERS

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


COMPONENTS = (*DENOISERS, "text_encoder", "text_encoder_2")
"""Models of a pipeline that an adapter may be on."""
SHARED_SETTINGS = (
    "use_rslora",
    "use_dora",
    "lora_dropout",
    "mixer",
    "train_mixer",
    "mixer_seed",
)
"""Settings of which a file has one value for all its components."""
RAW_KEY = "raw_format"
"""Name of the tensor that makes stock loaders refuse a raw file."""


def build_adapter_metadata(
    components: Components,
    adapter_name: str = "default",
    *,
    base_id: str | Path = "",
    **entries: Any,
) -> AdapterMetadata:
    """Return a live adapter's metadata.

    components: models that the adapter is on
    adapter_name: of the adapter in the models
    base_id: name or path of the base
    entries: further entries
    """
    # Settings of all components; a config of PEFT itself has no mixer, which is the default.
    config = next(iter(components.values())).peft_config[adapter_name]
    settings = {
        name: getattr(config, name, getattr(AdapterMetadata, name)) for name in SHARED_SETTINGS
    }

    # The most common rank and alpha, and the modules that differ from it.
    layers = get_all_layers(components, adapter_name)
    ranks = {path: layer.r[adapter_name] for path, layer in layers.items()}
    alphas = {path: layer.lora_alpha[adapter_name] for path, layer in layers.items()}
    rank, alpha = get_most_common(ranks.values()), get_most_common(alphas.values())

    # What the base is, and which libraries trained the adapter
    return AdapterMetadata(
        rank=rank,
        alpha=alpha,
        **settings,
        ranks={path: value for path, value in ranks.items() if value != rank},
        alphas={path: value for path, value in alphas.items() if value != alpha},
        base_id=get_public_name(base_id),
        structures={name: get_model_config(model) for name, model in components.items()},
        versions=get_versions(),
        **entries,
    )


def get_all_layers(components: Components, adapter_name: str) -> dict[str, "LoraLayer"]:
    """Return `component.path` -> PEFT layer over all components."""
    from dreambooth_moslora.method import moslora

    return {
        f"{component}.{path}": layer
        for component, model in components.items()
        for path, layer in moslora.get_adapter_layers(model, adapter_name).items()
    }


def save_raw(
    components: Components,
    path: str | Path,
    metadata: AdapterMetadata,
    adapter_name: str = "default",
) -> None:
    """Write the live adapter to a raw file.

    components: the models that it is on
    path: of the file
    metadata: facts that the adapter lacks; ranks, alphas and settings are those of the adapter
    adapter_name: of the adapter in the models

    Raises UserError for NaN and infinity.
    """
    from dreambooth_moslora.method import moslora

    # Ranks, alphas and settings as the live adapter has them
    live = build_adapter_metadata(components, adapter_name)
    live_entries = ("rank", "alpha", "ranks", "alphas", "structures", "versions", *SHARED_SETTINGS)
    metadata = replace(metadata, **{name: getattr(live, name) for name in live_entries})

    # The matrices as they are trained, so that a run can resume from them
    tensors = {RAW_KEY: torch.tensor([1])}
    for module_path, layer in get_all_layers(components, adapter_name).items():
        matrices = moslora.get_matrices(layer, adapter_name)
        parts = {
            "lora_A": matrices.down,
            "mixer": matrices.mixer,
            "lora_B": matrices.up,
            "magnitude": matrices.magnitude,
        }
        for part, tensor in parts.items():
            if tensor is not None:
                tensors[f"{module_path}.{part}"] = tensor.detach().cpu().contiguous()

    check_finite(tensors, "the adapter")
    write_safetensors(Path(path), tensors, metadata.header)


def read_raw(path: str | Path) -> tuple[Tensors, AdapterMetadata]:
    """Return tensors and metadata of a raw file. Raises UserError for any other file."""
    # Published files lack the tensor that marks a raw one.
    tensors, header = read_tensors(path)
    name = Path(path).name
    if RAW_KEY not in tensors:
        raise UserError(
            f"{name} holds no raw MoSLoRA weights "
            "(a published LoRA file loads with load_lora_weights)"
        )
    del tensors[RAW_KEY]

    # Without the header the scale is unknown, and a wrong one would not be noticed.
    try:
        metadata = AdapterMetadata.from_json(header[METADATA_KEY])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{name} has lost its header, which holds alpha and the mixer's kind "
            f"({format_error(error)})"
        ) from None

    check_finite(tensors, name)
    return tensors, metadata


def load_raw(
    path: str | Path, components: Components, adapter_name: str = "default"
) -> AdapterMetadata:
    """Create a raw file's adapter in the models, bit for bit. Returns its metadata.

    Raises UserError for another base or component.
    """
    from dreambooth_moslora.method import moslora

    # Read and check everything before the first model is changed.
    tensors, metadata = read_raw(path)
    component_modules = split_by_module(tensors)
    missing = sorted(component_modules.keys() - components.keys())
    if missing:
        raise UserError(
            f"{Path(path).name} also adapts {', '.join(missing)}; load the base with it"
        )
    for component, modules in component_modules.items():
        check_fits(
            Path(path).name,
            metadata=metadata,
            component=component,
            model=components[component],
            modules=modules,
        )

    # Inject an adapter with the file's ranks and alphas, and copy the file's tensors into it.
    settings = {name: getattr(metadata, name) for name in SHARED_SETTINGS}
    for component, modules in component_modules.items():
        model = components[component]
        names = {module: f"{component}.{module}" for module in modules}
        config = moslora.build_exact_config(
            ranks={m: metadata.ranks.get(name, metadata.rank) for m, name in names.items()},
            alphas={m: metadata.alphas.get(name, metadata.alpha) for m, name in names.items()},
            rank=metadata.rank,
            alpha=metadata.alpha,
            **settings,
        )
        moslora.inject(model, config, adapter_name)
        for module, layer in moslora.get_adapter_layers(model, adapter_name).items():
            fill_layer(layer, adapter_name, modules[module])
    return metadata


def split_by_module(tensors: Tensors) -> dict[str, dict[str, Tensors]]:
    """Return component -> module path -> part name -> tensor."""
    modules: dict[str, dict[str, Tensors]] = {}
    for key, tensor in tensors.items():
        component, module_key = key.split(".", 1)
        path, part = module_key.rsplit(".", 1)
        modules.setdefault(component, {}).setdefault(path, {})[part] = tensor
    return modules


def build_matrices(parts: Tensors, metadata: AdapterMetadata, module: str) -> MixedLowRank:
    """Return A (r, in, …), M (r, r), B (out, r) and s of one module of a raw file.

    parts: the module's tensors in the file
    metadata: the file's
    module: `component.path`
    """
    rank = metadata.ranks.get(module, metadata.rank)
    alpha = metadata.alphas.get(module, metadata.alpha)
    return MixedLowRank(
        down=parts["lora_A"],
        mixer=parts.get("mixer"),
        up=parts["lora_B"],
        scale=compute_scale(alpha, rank, metadata.use_rslora),
        magnitude=parts.get("magnitude"),
    )


def check_fits(
    name: str, metadata: AdapterMetadata, component: str, model: nn.Module, modules: dict
) -> None:
    """Raise UserError unless the model has every module of the file, in its size.

    name: of the file, for the message
    metadata: the file's
    component, model: that the modules belong to, such as `unet`
    modules: module's path -> its tensors
    """
    from dreambooth_moslora.method import moslora

    model_modules = dict(model.named_modules(remove_duplicate=False))
    for module_path, parts in modules.items():
        size = (len(parts["lora_B"]), *parts["lora_A"].shape[1:])
        base_size = moslora.get_weight_size(model_modules.get(module_path))
        if size != base_size:
            raise make_other_base_error(
                name, f"{component}.{module_path}", size, base_size, metadata.base_id
            )


def make_other_base_error(
    name: str, module: str, size: tuple[int, ...], base_size: tuple[int, ...], base_id: str = ""
) -> UserError:
    """Return the error for a file with a module of another size than the base's.

    name: of the file
    module: `component.path`
    size, base_size: in the file and in the base, (out, in) or (out, in, h, w); () if the base lacks
        the module
    base_id: base that the file names
    """
    made_for = f" ({base_id})" if base_id else ""
    difference = f"is {'×'.join(map(str, base_size))}" if base_size else "does not exist"
    return UserError(
        f"{name} was made for another base{made_for}: it needs {module:.100} of "
        f"{'×'.join(map(str, size))} (out×in), which {difference} here"
    )


@torch.no_grad()
def fill_layer(layer: "LoraLayer", adapter_name: str, parts: Tensors) -> None:
    """Copy the saved tensors into the layer; `check_fits` has compared the shapes."""
    lora_b = layer.lora_B[adapter_name]
    layer.lora_A[adapter_name].weight.copy_(parts["lora_A"])

    # A mixer's layer has the product of its parameters as its weight: copy the parameters.
    if isinstance(lora_b, mixer.MixerLinear):
        lora_b.up.copy_(parts["lora_B"])
        lora_b.mixer.copy_(parts["mixer"])
    else:
        lora_b.weight.copy_(parts["lora_B"].view_as(lora_b.weight))
    if "magnitude" in parts:
        layer.lora_magnitude_vector[adapter_name].weight.copy_(parts["magnitude"])
