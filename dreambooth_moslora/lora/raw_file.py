"""The raw adapter file, for resuming and analysis: A, M and B unchanged, and the metadata to
restore them.

    <component>.<module path>.lora_A       (r, in)
                             .mixer        (r, r)
                             .lora_B       (out, r)
                             .magnitude    (out,), for DoRA alone

lora_A is (r, in, h, w) for a convolution. The tensor `raw_format` makes every stock LoRA loader
refuse the file: B·A without the mixer would be wrong.

Before it, safetensors files in general: written atomically and in a fixed order, read without
running code, finite. And models without weights, a few MB for an SDXL UNet: every parameter is a
single zero, expanded by strides of 0.
"""

import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from dreambooth_moslora.disk.atomic import write_atomic
from dreambooth_moslora.disk.paths import expand_user_path, get_public_name
from dreambooth_moslora.errors import UserError, format_error
from dreambooth_moslora.lora.metadata import (
    METADATA_KEY,
    AdapterMetadata,
    get_most_common,
    get_versions,
)
from dreambooth_moslora.method import mixer
from dreambooth_moslora.method.mixer import Components, MixedLowRank, Tensors, compute_scale
from dreambooth_moslora.settings import family_facts

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


def check_finite(tensors: Tensors, owner: str) -> None:
    """Raises UserError for NaN and infinity. `owner` begins the message."""
    for key, tensor in tensors.items():
        # Eight-bit floats have no isfinite.
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise UserError(
                f"{owner} holds NaN or infinite values, first in {key}; use an earlier checkpoint"
            )


def write_safetensors(path: Path, tensors: Tensors, header: dict[str, str]) -> None:
    """Write a safetensors file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, sort_metadata(save(tensors, metadata=header)))


def sort_metadata(content: bytes) -> bytes:
    """The safetensors file with sorted metadata: equal adapters then have equal hashes."""
    # A file is the header's length in 8 bytes, the header in JSON, and the tensors.
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))

    # Spaces fill the header, so that the tensors begin at a multiple of 8.
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def read_tensors(path: str | Path) -> tuple[Tensors, dict[str, str]]:
    """Tensors and header strings of a safetensors file. Raises UserError for any other file."""
    path = expand_user_path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path.name} is truncated or not a safetensors file: {format_error(error)}"
        ) from None


def get_model_config(model: nn.Module) -> dict[str, object]:
    """{"class", "config"}, JSON-able and without file names, for `build_empty_model`."""
    # A config of transformers tells what differs from its defaults; one of diffusers is a dict.
    config = model.config
    values = config.to_diff_dict() if hasattr(config, "to_diff_dict") else dict(config)

    # Nothing of where the model came from, and nothing that weights have.
    public = {}
    for name, value in values.items():
        if not name.startswith("_") and name not in PRIVATE_ENTRIES:
            public[name] = value
    return {"class": type(model).__name__, "config": json.loads(json.dumps(public, default=str))}


MODEL_LIBRARIES = {facts.model: "diffusers" for facts in family_facts.FAMILIES}
MODEL_LIBRARIES |= dict.fromkeys(("CLIPTextModel", "CLIPTextModelWithProjection"), "transformers")
"""Class of an adapted model -> its library. A file names the class, so no other class is ever
built."""
PRIVATE_ENTRIES = (
    "name_or_path",
    "quantization_config",
    "transformers_version",
    "dtype",
    "torch_dtype",
)
"""Entries of a configuration that no file holds."""


def build_empty_model(description: Mapping[str, object]) -> nn.Module:
    """The model of a `get_model_config`, with zeros that take no memory. Raises UserError for any
    other class."""
    name, config = description.get("class"), description.get("config")
    if name not in MODEL_LIBRARIES or not isinstance(config, dict):
        raise UserError(
            f"{name!r:.60} is not a part of a model that can be built; "
            f"it has {', '.join(MODEL_LIBRARIES)}"
        )

    try:
        return build_model(str(name), config).eval()
    except Exception as error:  # constructors raise any error on contradictory sizes
        raise UserError(
            f"the {name} that the file describes cannot be built: {format_error(error)}"
        ) from error


def build_model(name: str, config: dict) -> nn.Module:
    """A model of that class, in which every parameter is a zero with strides of 0."""
    kind = getattr(import_module(MODEL_LIBRARIES[name]), name)
    with torch.device("meta"):
        if MODEL_LIBRARIES[name] == "diffusers":
            # A file may be of another version, whose models have other entries.
            known = inspect.signature(kind.__init__).parameters
            values = {entry: value for entry, value in config.items() if entry in known}
            model = kind.from_config(values)
        else:
            # An attention implementation may name a kernel on the hub, which is code: a file must
            # not choose it.
            values = {}
            for entry, value in config.items():
                if "attn_implementation" not in entry:
                    values[entry] = value
            model = kind(kind.config_class(**values))

    # Meta tensors cannot compute. Zeros can, and need no memory.
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            zero = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
            module._parameters[key] = nn.Parameter(zero, requires_grad=False)
        for key, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            module._buffers[key] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return model


COMPONENTS = (*family_facts.DENOISERS, "text_encoder", "text_encoder_2")
"""The models of a pipeline that an adapter may be on."""
SHARED_SETTINGS = (
    "use_rslora",
    "use_dora",
    "lora_dropout",
    "mixer",
    "train_mixer",
    "mixer_seed",
)
"""A file has one value of each for all its components."""
RAW_KEY = "raw_format"
"""The tensor that makes stock loaders refuse a raw file."""


def build_adapter_metadata(
    components: Components,
    adapter_name: str = "default",
    *,
    base_id: str | Path = "",
    **entries: Any,
) -> AdapterMetadata:
    """A live adapter's metadata. `said` are further entries."""
    # The settings that a file has once for all components. PEFT's own config has no mixer, and
    # then the default says so.
    config = next(iter(components.values())).peft_config[adapter_name]
    settings = {}
    for name in SHARED_SETTINGS:
        settings[name] = getattr(config, name, getattr(AdapterMetadata, name))

    # Ranks and alphas: the usual one, and the modules that differ from it.
    layers = get_all_layers(components, adapter_name)
    ranks = {path: layer.r[adapter_name] for path, layer in layers.items()}
    alphas = {path: layer.lora_alpha[adapter_name] for path, layer in layers.items()}
    rank, alpha = get_most_common(ranks.values()), get_most_common(alphas.values())
    other_ranks = {path: own for path, own in ranks.items() if own != rank}
    other_alphas = {path: own for path, own in alphas.items() if own != alpha}

    return AdapterMetadata(
        rank=rank,
        alpha=alpha,
        **settings,
        ranks=other_ranks,
        alphas=other_alphas,
        base_id=get_public_name(base_id),
        structures={name: get_model_config(model) for name, model in components.items()},
        versions=get_versions(),
        **entries,
    )


def get_all_layers(components: Components, adapter_name: str) -> dict[str, "LoraLayer"]:
    """`component.path` -> PEFT layer, over all components."""
    from dreambooth_moslora.method import moslora

    found = {}
    for component, model in components.items():
        for path, layer in moslora.get_adapter_layers(model, adapter_name).items():
            found[f"{component}.{path}"] = layer
    return found


def save_raw(
    components: Components,
    path: str | Path,
    metadata: AdapterMetadata,
    adapter_name: str = "default",
) -> None:
    """Write the live adapter.

    components: the models that it is on
    path: of the file
    metadata: what the adapter itself does not know; ranks, alphas and settings are the live ones
    adapter_name: which one, if the models have several

    Raises UserError for NaN and infinity.
    """
    from dreambooth_moslora.method import moslora

    # What the live adapter is, whatever the metadata said.
    live = build_adapter_metadata(components, adapter_name)
    taken = ("rank", "alpha", "ranks", "alphas", "structures", "versions", *SHARED_SETTINGS)
    metadata = replace(metadata, **{name: getattr(live, name) for name in taken})

    # The matrices as they are learnt, so that a run goes on from them.
    tensors = {RAW_KEY: torch.tensor([1])}
    for module_path, layer in get_all_layers(components, adapter_name).items():
        found = moslora.get_matrices(layer, adapter_name)
        parts = {
            "lora_A": found.down,
            "mixer": found.mixer,
            "lora_B": found.up,
            "magnitude": found.magnitude,
        }
        for part, tensor in parts.items():
            if tensor is not None:
                tensors[f"{module_path}.{part}"] = tensor.detach().cpu().contiguous()

    check_finite(tensors, "the adapter")
    write_safetensors(Path(path), tensors, metadata.header)


def read_raw(path: str | Path) -> tuple[Tensors, AdapterMetadata]:
    """Tensors and metadata of a raw file. Raises UserError for any other file."""
    tensors, header = read_tensors(path)
    name = Path(path).name
    if RAW_KEY not in tensors:
        raise UserError(
            f"{name} holds no raw MoSLoRA weights "
            "(a published LoRA file loads with load_lora_weights)"
        )
    del tensors[RAW_KEY]

    # Without the header the scale is not known, and a wrong one would go unnoticed.
    try:
        metadata = AdapterMetadata.from_json(header[METADATA_KEY])
    except (KeyError, ValueError) as error:
        lost = "has lost its header, which holds alpha and the mixer's kind"
        raise UserError(f"{name} {lost} ({format_error(error)})") from None

    check_finite(tensors, name)
    return tensors, metadata


def load_raw(
    path: str | Path, components: Components, adapter_name: str = "default"
) -> AdapterMetadata:
    """Create a raw file's adapter in the models, bit for bit. Raises UserError for another base or
    component."""
    from dreambooth_moslora.method import moslora

    # Read and compare everything before the first model is changed.
    tensors, metadata = read_raw(path)
    by_component = split_by_module(tensors)
    missing = sorted(by_component.keys() - components.keys())
    if missing:
        raise UserError(
            f"{Path(path).name} also adapts {', '.join(missing)}; load the base with it"
        )
    for component, modules in by_component.items():
        check_fits(
            Path(path).name,
            metadata=metadata,
            component=component,
            model=components[component],
            modules=modules,
        )

    # An adapter of the file's ranks and alphas, whose values then become the file's.
    settings = {name: getattr(metadata, name) for name in SHARED_SETTINGS}
    for component, modules in by_component.items():
        model = components[component]
        ranks, alphas = {}, {}
        for module in modules:
            ranks[module] = metadata.ranks.get(f"{component}.{module}", metadata.rank)
            alphas[module] = metadata.alphas.get(f"{component}.{module}", metadata.alpha)
        config = moslora.build_exact_config(
            ranks=ranks,
            alphas=alphas,
            rank=metadata.rank,
            alpha=metadata.alpha,
            **settings,
        )
        moslora.inject(model, config, adapter_name)
        for module, layer in moslora.get_adapter_layers(model, adapter_name).items():
            fill_layer(layer, adapter_name, modules[module])
    return metadata


def split_by_module(tensors: Tensors) -> dict[str, dict[str, Tensors]]:
    """Component -> module path -> part name -> tensor."""
    modules: dict[str, dict[str, Tensors]] = {}
    for key, tensor in tensors.items():
        component, rest = key.split(".", 1)
        path, part = rest.rsplit(".", 1)
        modules.setdefault(component, {}).setdefault(path, {})[part] = tensor
    return modules


def build_matrices(parts: Tensors, metadata: AdapterMetadata, module: str) -> MixedLowRank:
    """A (r, in, …), M (r, r), B (out, r) and s of one module of a raw file.

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
    """Raises UserError unless the model has every module of the file, in its size.

    name: of the file, for the message
    metadata: the file's
    component, model: where the file's modules are to be, such as `unet`
    modules: module's path -> its tensors
    """
    from dreambooth_moslora.method import moslora

    known = dict(model.named_modules(remove_duplicate=False))
    for module_path, parts in modules.items():
        size = (len(parts["lora_B"]), *parts["lora_A"].shape[1:])
        here = moslora.get_weight_size(known.get(module_path))
        if size != here:
            raise make_other_base_error(
                name, f"{component}.{module_path}", size, here, metadata.base_id
            )


def make_other_base_error(
    name: str, module: str, size: tuple[int, ...], base_size: tuple[int, ...], base_id: str = ""
) -> UserError:
    """The error for a file with a module of another size than the base's.

    name: of the file
    module: `component.path`
    size, base_size: in the file, and in the base, (out, in) or (out, in, h, w); () if it has no
    such one
    base_id: whose the file says that it is
    """
    made_for = f" ({base_id})" if base_id else ""
    wanted = "×".join(map(str, size))
    there = f"is {'×'.join(map(str, base_size))}" if base_size else "does not exist"
    return UserError(
        f"{name} was made for another base{made_for}: "
        f"it needs {module:.100} of {wanted} (out×in), which {there} here"
    )


@torch.no_grad()
def fill_layer(layer: "LoraLayer", adapter_name: str, parts: Tensors) -> None:
    """Copy the saved tensors into the layer; `check_fits` has compared the shapes."""
    lora_b = layer.lora_B[adapter_name]
    layer.lora_A[adapter_name].weight.copy_(parts["lora_A"])

    # The parameters, not the product of them that a mixer's layer has as its weight.
    if isinstance(lora_b, mixer.MixerLinear):
        lora_b.up.copy_(parts["lora_B"])
        lora_b.mixer.copy_(parts["mixer"])
    else:
        lora_b.weight.copy_(parts["lora_B"].view_as(lora_b.weight))
    if "magnitude" in parts:
        layer.lora_magnitude_vector[adapter_name].weight.copy_(parts["magnitude"])
