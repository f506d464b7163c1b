"""The raw adapter file, for resuming and analysis: A, M and B unchanged, and the metadata to
restore them.

    <component>.<module path>.lora_A (r, in)   .mixer (r, r)   .lora_B (out, r)   [.magnitude (out,) for DoRA]

A LoKr has A₂ (r/f, in/f), W₁ (f, f) and B₂ (out/f, r/f) under these names; lora_A is (r, in, h, w)
for a convolution. The tensor `raw_format` makes every stock LoRA loader refuse the file: B·A
without the mixer would be wrong.

Before it, safetensors files in general: written atomically and in a fixed order, read without
running code, finite. And models without weights, a few MB for an SDXL UNet: every parameter is a
single zero, expanded by strides of 0.
"""

import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from dreambooth_moslora.disk.atomic import atomic_write
from dreambooth_moslora.disk.paths import public_name, user_path
from dreambooth_moslora.errors import UserError, one_line
from dreambooth_moslora.lora.metadata import HEADER, AdapterMetadata, most_common, versions
from dreambooth_moslora.method import mixer
from dreambooth_moslora.method.mixer import Components, MixedLowRank, Tensors, nominal_scale, untied
from dreambooth_moslora.settings import families, table

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


def check_finite(tensors: Tensors, owner: str) -> None:
    """Raises UserError for NaN and infinity. `owner` begins the message."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.element_size() == 1:
            tensor = tensor.float()  # eight-bit floats have no isfinite
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{owner} holds NaN or infinite values, first in {key}; use an earlier checkpoint"
            )


def write_file(path: Path, tensors: Tensors, header: dict[str, str]) -> None:
    """Write a safetensors file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, with_sorted_metadata(save(tensors, metadata=header)))


def with_sorted_metadata(content: bytes) -> bytes:
    """The safetensors file with sorted metadata: equal adapters then have equal hashes."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def read_tensors(path: str | Path) -> tuple[Tensors, dict[str, str]]:
    """Tensors and header strings of a safetensors file. Raises UserError for pickles and any other
    file."""
    path = user_path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    with path.open("rb") as file:
        # in a safetensors file: the header's length in 8 bytes, and its opening brace
        start = file.read(9)
    if (
        start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        and start[8:] != b"{"
    ):
        raise UserError(
            f"{path.name} is a pickled file, which can run code when it is opened; use a .safetensors file"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path.name} is truncated or not a safetensors file: {one_line(error)}"
        ) from None


def model_config(model: nn.Module) -> dict[str, object]:
    """{"class", "config"}, JSON-able and without file names, for `empty_model`."""
    config = model.config
    values = config.to_diff_dict() if hasattr(config, "to_diff_dict") else dict(config)
    values = {k: v for k, v in values.items() if not k.startswith("_") and k not in PRIVATE}
    return {"class": type(model).__name__, "config": json.loads(json.dumps(values, default=str))}


CLASSES = {facts.model: "diffusers" for facts in families.FAMILIES}
CLASSES |= dict.fromkeys(("CLIPTextModel", "CLIPTextModelWithProjection"), "transformers")
"""Class of an adapted model -> its library. A file names the class, so no other class is ever
built."""
# of all blocks, each as deep as the deepest: SDXL's UNet has 60, its text encoders 12 and 32
MOST_LAYERS = 2000
DEPTHS = ("layers_per_block", "transformer_layers_per_block", "num_hidden_layers")
DEPTHS += ("num_layers", "num_single_layers", "n_layers")
PRIVATE = ("name_or_path", "quantization_config", "transformers_version", "dtype", "torch_dtype")


def empty_model(description: Mapping[str, object]) -> nn.Module:
    """The model of a `model_config`, with zeros that take no memory. Raises UserError for any other
    class."""
    name, config = description.get("class"), description.get("config")
    if name not in CLASSES or not isinstance(config, dict):
        raise UserError(
            f"{name!r:.60} is not a part of a model that can be built; it has {', '.join(CLASSES)}"
        )
    blocks = config.get("down_block_types")  # the constructor judges unreadable numbers
    if (len(blocks) if isinstance(blocks, list) else 1) * prod(
        deepest(config.get(n)) for n in DEPTHS
    ) > MOST_LAYERS:
        raise UserError(
            f"the {name} that the file describes has more than {MOST_LAYERS} layers, as no known one has"
        )
    try:
        return build(str(name), config).eval()
    except Exception as error:  # constructors raise any error on contradictory sizes
        raise UserError(
            f"the {name} that the file describes cannot be built: {one_line(error)}"
        ) from error


def deepest(depths: object) -> int:
    """The largest number in a number or a list, nested or not; 1 for anything else."""
    if isinstance(depths, list):
        return max(map(deepest, depths), default=1)
    return max(1, depths) if isinstance(depths, int) else 1


def build(name: str, config: dict) -> nn.Module:
    """Every parameter is a zero with strides of 0."""
    kind = getattr(import_module(CLASSES[name]), name)
    with torch.device("meta"):
        if CLASSES[name] == "diffusers":
            names = inspect.signature(kind.__init__).parameters  # of this version
            model = kind.from_config(
                {name: value for name, value in config.items() if name in names}
            )
        # an attention implementation may name a kernel on the hub, which is code: a file must not
        # choose it
        else:
            model = kind(
                kind.config_class(
                    **{k: v for k, v in config.items() if "attn_implementation" not in k}
                )
            )
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            zero = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
            module._parameters[key] = nn.Parameter(zero, requires_grad=False)
        for key, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            module._buffers[key] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return model


COMPONENTS = (*families.DENOISERS, "text_encoder", "text_encoder_2")
SHARED_SETTINGS = (
    "use_rslora",
    "use_dora",
    "lora_dropout",
    "mixer",
    "train_mixer",
    "mixer_seed",
    "mixer_factor",
)
"""A file has one value of each for all its components."""
RAW_KEY = "raw_format"


def adapter_metadata(
    components: Components, adapter_name: str = "default", *, base_id: str | Path = "", **said: Any
) -> AdapterMetadata:
    """A live adapter's metadata. Raises UserError for an unknown component, and for several
    settings."""
    check_components(components)
    settings = {}
    for name in SHARED_SETTINGS:  # PEFT's own config has no mixer
        configs = [model.peft_config[adapter_name] for model in components.values()]
        values = {getattr(config, name, getattr(AdapterMetadata, name)) for config in configs}
        if len(values) > 1:
            raise UserError(
                f"the components of one adapter file need one {name}, but have {sorted(values)}"
            )
        settings[name] = values.pop()
    settings["mixer_factor"] *= settings["mixer"] == table.KRONECKER
    layers = all_layers(components, adapter_name)
    ranks = {path: layer.r[adapter_name] for path, layer in layers.items()}
    alphas = {path: layer.lora_alpha[adapter_name] for path, layer in layers.items()}
    rank, alpha = most_common(ranks.values()), most_common(alphas.values())
    return AdapterMetadata(
        rank=rank,
        alpha=alpha,
        **settings,
        ranks={path: r for path, r in ranks.items() if r != rank},
        alphas={path: a for path, a in alphas.items() if a != alpha},
        base_id=public_name(base_id),
        structures={name: model_config(model) for name, model in components.items()},
        versions=versions(),
        **said,
    )


def check_components(components: Components) -> None:
    """Raises UserError for an unknown component, or none."""
    unknown = sorted(set(components) - set(COMPONENTS))
    if unknown or not components:
        raise UserError(f"components are {', '.join(COMPONENTS)}, not {unknown or 'an empty dict'}")


def check_storable(components: Components, adapter_name: str) -> None:
    """Raises UserError for an unknown component, and for DoRA on a convolution, which the files
    cannot hold."""
    check_components(components)
    for path, layer in all_layers(components, adapter_name).items():
        if adapter_name in layer.lora_magnitude_vector and isinstance(
            layer.get_base_layer(), nn.Conv2d
        ):
            raise UserError(f"{path} is a convolution with DoRA, which cannot be saved here")


def all_layers(components: Components, adapter_name: str) -> dict[str, "LoraLayer"]:
    """`component.path` -> PEFT layer, over all components."""
    from dreambooth_moslora.method import moslora

    return {
        f"{component}.{path}": layer
        for component, model in components.items()
        for path, layer in moslora.adapter_layers(model, adapter_name).items()
    }


def save_raw(
    components: Components,
    path: str | Path,
    metadata: AdapterMetadata,
    adapter_name: str = "default",
) -> None:
    """Write the live adapter, with its own ranks, alphas and settings. Raises UserError for NaN or
    infinity."""
    from dreambooth_moslora.method import moslora

    check_storable(components, adapter_name)
    live = adapter_metadata(components, adapter_name)
    taken = ("rank", "alpha", "ranks", "alphas", "structures", "versions", *SHARED_SETTINGS)
    metadata = replace(metadata, **{name: getattr(live, name) for name in taken})
    tensors = {RAW_KEY: torch.tensor([1])}
    for module_path, layer in all_layers(components, adapter_name).items():
        stored = moslora.stored_matrices(layer, adapter_name)
        stored += (moslora.matrices_of(layer, adapter_name).magnitude,)
        for part, tensor in zip(("lora_A", "mixer", "lora_B", "magnitude"), stored, strict=True):
            if tensor is not None:
                tensors[f"{module_path}.{part}"] = tensor.detach().cpu().contiguous()
    check_finite(tensors, "the adapter")
    write_file(Path(path), tensors, metadata.header)


def read_raw(path: str | Path) -> tuple[Tensors, AdapterMetadata]:
    """Tensors and metadata of a raw file. Raises UserError for any other file, and for a broken
    one."""
    tensors, header = read_tensors(path)
    name = Path(path).name
    if RAW_KEY not in tensors:
        raise UserError(
            f"{name} holds no raw MoSLoRA weights (a published LoRA file loads with load_lora_weights)"
        )
    del tensors[RAW_KEY]
    try:
        metadata = AdapterMetadata.from_json(header[HEADER])
    except (KeyError, ValueError) as error:
        lost = "has lost its header, which holds alpha and the mixer's kind"
        raise UserError(f"{name} {lost} ({one_line(error)})") from None
    check_whole(name, tensors, metadata)
    check_finite(tensors, name)
    return tensors, metadata


def check_whole(name: str, tensors: Tensors, metadata: AdapterMetadata) -> None:
    """Raises UserError unless the modules have exactly the matrices that the metadata says, of its
    ranks."""
    if not tensors:
        raise UserError(f"{name} is broken: it holds no module")
    for key, tensor in tensors.items():
        if (
            key.count(".") < 2
            or key.split(".", 1)[0] not in COMPONENTS
            or not tensor.is_floating_point()
        ):
            raise UserError(f"{name} is broken: {key!r:.100} does not belong to an adapter")
    for component, modules in by_module(tensors).items():
        for path, parts in modules.items():
            found = {part: tuple(tensor.shape) for part, tensor in parts.items()}
            rank = metadata.ranks.get(f"{component}.{path}", metadata.rank)
            inputs, outputs = found.get("lora_A", (0, 0))[1:], found.get("lora_B", (0,))[:1]
            inputs = inputs if len(inputs) in (1, 3) else (0,)  # (in,) or (in, h, w)
            own = rank // metadata.factor
            sizes = {"lora_A": (own, *inputs), "lora_B": (*outputs, own)}
            if metadata.mixer != "none":
                sizes["mixer"] = (
                    metadata.factor if metadata.mixer == table.KRONECKER else rank,
                ) * 2
            if metadata.use_dora:
                sizes["magnitude"] = (outputs[0] * metadata.factor,)
            is_odd = metadata.mixer == table.KRONECKER and (
                not metadata.mixer_factor or rank % metadata.factor
            )
            if is_odd or found != sizes:
                raise UserError(
                    f"{name} is broken: {component}.{path:.100} is not whole, or not of its rank"
                )


def load_raw(
    path: str | Path, components: Components, adapter_name: str = "default"
) -> AdapterMetadata:
    """Create a raw file's adapter in the models, bit for bit. Raises UserError for another base or
    component."""
    from dreambooth_moslora.method import moslora

    check_components(components)
    tensors, metadata = read_raw(path)
    by_component = by_module(tensors)
    if missing := sorted(by_component.keys() - components.keys()):
        raise UserError(
            f"{Path(path).name} also adapts {', '.join(missing)}; load the base with it"
        )
    for component, modules in by_component.items():
        check_fits(Path(path).name, metadata, component, components[component], modules)
    settings = {name: getattr(metadata, name) for name in SHARED_SETTINGS}
    for component, modules in by_component.items():
        ranks = {path: metadata.ranks.get(f"{component}.{path}", metadata.rank) for path in modules}
        alphas = {
            path: metadata.alphas.get(f"{component}.{path}", metadata.alpha) for path in modules
        }
        config = moslora.exact_config(ranks, alphas, metadata.rank, metadata.alpha, **settings)
        moslora.inject(components[component], config, adapter_name)
        for path, layer in moslora.adapter_layers(components[component], adapter_name).items():
            fill(layer, adapter_name, modules[path])
    return metadata


def by_module(tensors: Tensors) -> dict[str, dict[str, Tensors]]:
    """Component -> module path -> part name -> tensor."""
    modules: dict[str, dict[str, Tensors]] = {}
    for key, tensor in tensors.items():
        component, rest = key.split(".", 1)
        path, part = rest.rsplit(".", 1)
        modules.setdefault(component, {}).setdefault(path, {})[part] = tensor
    return modules


def matrices_from(parts: Tensors, metadata: AdapterMetadata, module: str) -> MixedLowRank:
    """A (r, in, …), M (r, r), B (out, r) and s of one module (`component.path`) of a raw file, a
    LoKr's untied."""
    rank, alpha = (
        metadata.ranks.get(module, metadata.rank),
        metadata.alphas.get(module, metadata.alpha),
    )
    matrices = parts["lora_A"], parts.get("mixer"), parts["lora_B"]
    if metadata.mixer == table.KRONECKER:
        matrices = untied(*matrices)
    return MixedLowRank(
        *matrices, nominal_scale(alpha, rank, metadata.use_rslora), parts.get("magnitude")
    )


def check_fits(
    name: str, metadata: AdapterMetadata, component: str, model: nn.Module, modules: dict
) -> None:
    """Raises UserError unless the model has every module of the file, in its size."""
    from dreambooth_moslora.method import moslora

    made_for = f" ({metadata.base_id})" if metadata.base_id else ""
    known = dict(model.named_modules(remove_duplicate=False))
    for module_path, parts in modules.items():
        own, here = (
            (len(parts["lora_B"]), *parts["lora_A"].shape[1:]),
            moslora.weight_size(known.get(module_path)),
        )
        size = tuple(side * metadata.factor for side in own)
        if size != here:
            there = f"is {'×'.join(map(str, here))}" if here else "does not exist"
            raise UserError(
                f"{name} was made for another base{made_for}: it needs {component}.{module_path} of "
                f"{'×'.join(map(str, size))} (out×in), which {there} here"
            )


@torch.no_grad()
def fill(layer: "LoraLayer", adapter_name: str, parts: Tensors) -> None:
    """Copy the saved tensors into the layer; `check_fits` has compared the shapes."""
    lora_a, lora_b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    (lora_a.tied if isinstance(lora_a, mixer.KroneckerDown) else lora_a.weight).copy_(
        parts["lora_A"]
    )
    if isinstance(lora_b, mixer.MixerLinear):
        lora_b.up.copy_(parts["lora_B"])
        lora_b.mixer.copy_(parts["mixer"])
    else:
        lora_b.weight.copy_(parts["lora_B"].view_as(lora_b.weight))
    if "magnitude" in parts:
        layer.lora_magnitude_vector[adapter_name].weight.copy_(parts["magnitude"])
