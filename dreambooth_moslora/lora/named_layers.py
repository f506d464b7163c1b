"""Which layers of a base the names in a file mean, and the LoRA that the file has for each.

LoHa and LoKr become a LoRA with its scale in `up`; an alpha beside plain matrices stays apart.
Names of the original blocks of a UNet are those that diffusers renames: it is handed pairs with a
number each.
"""

from collections.abc import Iterable
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora import key_names, lycoris, raw_file
from dreambooth_moslora.lora.key_names import KOHYA_KEYS, LYCORIS_PARTS, OF_LYCORIS, PAIRED, Module
from dreambooth_moslora.method.mixer import Tensors

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MOST_NUMBERS = 2**29  # of LoHa and LoKr as a LoRA: 2 GiB in fp32
# component and module path -> a LowRank's fields, and an alpha
Parts = dict[tuple[str, str], Tensors]


class Layer(NamedTuple):
    """A layer of the base, by the path that other programs know."""

    component: str
    path: str
    size: tuple[int, ...]  # (out, in) or (out, in, h, w)


def as_lora(tensors: Tensors, pipeline: "DiffusionPipeline", file_name: str) -> Parts | None:
    """The file's layers as LoRA; None for names that diffusers may know. Raises UserError."""
    modules: dict[Module, Tensors] = {}
    unknown = []
    for text, tensor in tensors.items():
        key = key_names.parse(text)
        if key is None or key.tool not in PAIRED | OF_LYCORIS:
            unknown.append(text)
        else:
            modules.setdefault(key.module, {})[key.part] = tensor
    layers = layers_named(modules, pipeline)
    unknown += [module.name for module in modules if module not in layers]
    if unknown:
        # diffusers drops DoRA's magnitudes, and knows LoHa and LoKr of few families.
        if any(parts.keys() & {"dora_scale", *LYCORIS_PARTS} for parts in modules.values()):
            raise UserError(
                f"{file_name} does not fit this base: {unknown[0]!r:.100} is no layer of it"
            )
        return None

    found: Parts = {}
    numbers = 0
    for module, parts in modules.items():
        # SDXL's text encoders share their names, and have other widths.
        rows = rows_of(parts)
        layer = next(
            (layer for layer in layers[module] if layer.size[:1] == (rows,)), layers[module][0]
        )
        if "dora_scale" in parts:
            parts["magnitude"] = as_magnitude(parts.pop("dora_scale"), module, file_name)
        if parts.keys() & LYCORIS_PARTS:
            parts = folded(parts, layer, file_name)
            numbers += parts["up"].numel() + parts["down"].numel()
        if numbers > MOST_NUMBERS:
            raise UserError(
                f"{file_name} would be a LoRA of more than {MOST_NUMBERS / 2**28:.0f} GiB, as its "
                "LoHa or LoKr has so high a rank: use it in the program that trained it, or train "
                "it with a lower dim"
            )
        found[layer.component, layer.path] = parts
    return found


def rows_of(parts: Tensors) -> int:
    """Of ΔW."""
    names = ("up", "hada_w1_a", "lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a")
    return prod(len(parts[name]) for name in names if name in parts)


def folded(parts: Tensors, layer: Layer, file_name: str) -> Tensors:
    """LoHa or LoKr as a LoRA. Raises UserError for one that does not fit the layer."""
    own = {"magnitude": parts.pop("magnitude")} if "magnitude" in parts else {}
    try:
        up, down = lycoris.lora_of(parts, layer.size)
    except ValueError as error:
        raise UserError(
            f"{file_name} is broken, or was made for another base: {layer.component}."
            f"{layer.path:.100} is {'×'.join(map(str, layer.size))} (out×in) here"
        ) from error
    inputs, ones = layer.size[1:], (1,) * (len(layer.size) - 2)
    return own | {"down": down.view(len(down), *inputs), "up": up.view(*up.shape, *ones)}


def as_magnitude(dora_scale: torch.Tensor, module: Module, file_name: str) -> torch.Tensor:
    """PEFT's magnitudes: (out, 1) -> (out,), and (out, 1, 1, 1) -> (1, out, 1, 1). Raises UserError
    for columns'."""
    if not key_names.is_by_rows(dora_scale):
        raise UserError(
            f"{file_name} holds DoRA by the columns of W ({module.name:.100}.dora_scale "
            f"{tuple(dora_scale.shape)}), and only DoRA by its rows (out, 1) is read here: use it in the program that "
            "trained it, or train it by rows (LyCORIS: wd_on_output=True)"
        )
    return dora_scale[:, 0] if dora_scale.ndim == 2 else dora_scale.transpose(0, 1)


def layers_named(
    modules: Iterable[Module], pipeline: "DiffusionPipeline"
) -> dict[Module, list[Layer]]:
    """The layers that a name may mean: SDXL's two text encoders share theirs. Without the names of
    no layer."""
    from dreambooth_moslora.method import moslora

    known: dict[str, dict[str, Layer]] = {}
    for component in raw_file.COMPONENTS:
        model, of_component = getattr(pipeline, component, None), known.setdefault(component, {})
        for own_path, module in ({} if model is None else moslora.matrix_layers(model)).items():
            path = key_names.published_path(component, own_path)
            layer = Layer(component, path, moslora.weight_size(module))
            bare = path.removeprefix("text_model.")
            of_component |= dict.fromkeys((path, bare, path.replace(".", "_")), layer)

    found = {}
    for module in modules:
        places = [known[component].get(module.path) for component in module.prefix.components]
        if layers := [layer for layer in places if layer is not None]:
            found[module] = layers
    others = [
        module for module in modules if module not in found and module.name.startswith("lora_")
    ]
    for module, (component, path) in (
        renamed(others, pipeline) if hasattr(pipeline, "unet") else {}
    ).items():
        if path in known[component]:
            found[module] = [known[component][path]]
    return found


def renamed(
    modules: Iterable[Module], pipeline: "DiffusionPipeline"
) -> dict[Module, tuple[str, str]]:
    """kohya's names, also of original blocks -> component and path, as diffusers renames pairs with
    a number each."""
    numbered = list(modules)
    pairs = {
        key_names.spell(KOHYA_KEYS, module.name, part): torch.full((1, 1), float(number))
        for number, module in enumerate(numbered)
        for part in ("down", "up")
    }
    found = {}
    for text, number in (
        pipeline.lora_state_dict(pairs, unet_config=pipeline.unet.config)[0] if pairs else {}
    ).items():
        module = key_names.parse(text).module
        found[numbered[int(number)]] = (
            module.component,
            key_names.published_path(module.component, module.path),
        )
    return found
