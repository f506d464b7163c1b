"""Which layers of a base the names in a file mean, and the LoRA that the file has for each.

A name is of a layer in diffusers' layout, or of one in the original layout, in which the base's
authors and ComfyUI keep its weights. diffusers converts files of such weights, so it is asked what
becomes of each: it is handed numbered rows in place of weights (`map_original_layers`). One
original layer may be several of diffusers' (q, k and v in one), each of which has some rows of its
ΔW. The original blocks of a UNet are those that diffusers' LoRA loader renames (`renamed`).

LoHa and LoKr become a LoRA with its scale in `up`; an alpha beside plain matrices stays apart.
"""

import re
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora import key_names, lycoris, raw_file
from dreambooth_moslora.lora.key_names import (
    KOHYA_KEYS,
    LYCORIS_PARTS,
    READ_PARTS,
    FileModule,
    Modules,
)
from dreambooth_moslora.method.mixer import Tensors

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Parts = dict[tuple[str, str], Tensors]
"""Component and module path -> the fields of a LowRank, and an alpha."""


class Layer(NamedTuple):
    """A layer of the base, by the path that other programs know."""

    component: str
    path: str
    size: tuple[int, ...]  # (out, in) or (out, in, h, w)


Share = tuple[Layer, torch.Tensor | None]
"""A layer of the base, and which rows of a file's ΔW it has, by number; None for all."""
Shares = dict[FileModule, list[Share]]


def map_to_lora(tensors: Tensors, pipeline: "DiffusionPipeline", file_name: str) -> Parts | None:
    """The file's layers as LoRA; None for names that diffusers may know. Raises UserError."""
    # What the names mean here
    modules, unknown = key_names.parse_keys(tensors)
    shares = find_shares(modules, pipeline)
    strange = [module for module in modules if module not in shares]
    strange += [module for module, parts in modules.items() if parts.keys() - READ_PARTS]
    if unknown or strange:
        # diffusers drops DoRA's magnitudes, and knows LoHa and LoKr of few families.
        if not any(parts.keys() & {"dora_scale", *LYCORIS_PARTS} for parts in modules.values()):
            return None
        raise (
            make_unknown_layer_error(file_name, strange[0])
            if strange
            else make_unknown_key_error(file_name, unknown[0])
        )

    # Each module's matrices, for each of its layers
    found: Parts = {}
    for module, parts in modules.items():
        if "dora_scale" in parts:
            parts["magnitude"] = to_magnitude(parts.pop("dora_scale"), module, file_name)
        if parts.keys() & LYCORIS_PARTS:
            parts = fold_lycoris(parts, shares[module], file_name)
        for layer, rows in shares[module]:
            if (layer.component, layer.path) in found:
                raise UserError(f"{file_name} is broken: it has {layer.path:.100} under two names")
            found[layer.component, layer.path] = parts if rows is None else select_rows(parts, rows)
    return found


def make_unknown_layer_error(file_name: str, module: FileModule) -> UserError:
    return UserError(
        f"{file_name} does not fit this base: it has names that are no layers of it, in the layout "
        f"of diffusers or of its original files, such as {module.name!r:.100}, as "
        f"{module.prefix.tool} spells it"
    )


def make_unknown_key_error(file_name: str, key: str) -> UserError:
    said = f"{key!r:.100} does not belong to one"
    return UserError(f"{file_name} is not a LoRA of a diffusion model: {said}")


def select_rows(parts: Tensors, rows: torch.Tensor) -> Tensors:
    """The LoRA of these rows of ΔW."""
    own = {part: tensor[rows] if part in ROW_PARTS else tensor for part, tensor in parts.items()}
    # Where q, k and v were trained apart, each has columns of `up` to itself, beside zeros.
    used = own["up"].flatten(1).any(0)
    if used.any():
        own |= {"up": own["up"][:, used], "down": own["down"][used]}
        if "alpha" in own:  # alpha/r stays
            own["alpha"] = own["alpha"].double() * int(used.sum()) / len(used)
    return own


ROW_PARTS = ("up", "bias", "magnitude")


def count_rows(parts: Tensors) -> int:
    """Of ΔW."""
    names = ("up", "hada_w1_a", "lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a")
    return prod(len(parts[name]) for name in names if name in parts)


def fold_lycoris(parts: Tensors, shares: list[Share], file_name: str) -> Tensors:
    """LoHa or LoKr as a LoRA. Raises UserError for one that does not fit its layers."""
    own = {"magnitude": parts.pop("magnitude")} if "magnitude" in parts else {}
    component, path, size = shares[0][0]
    size = (sum(layer.size[0] for layer, _ in shares), *size[1:])
    try:
        up, down = lycoris.convert_to_lora(parts, size)
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{file_name} is broken, or was made for another base: {component}.{path:.100} is "
            f"{'×'.join(map(str, size))} (out×in) here"
        ) from error
    own["down"] = down.view(len(down), *size[1:])
    own["up"] = up.view(*up.shape, *(1,) * (len(size) - 2))
    return own


def to_magnitude(dora_scale: torch.Tensor, module: FileModule, file_name: str) -> torch.Tensor:
    """PEFT's magnitudes: (out, 1) -> (out,), and (out, 1, 1, 1) -> (1, out, 1, 1).

    Raises UserError for those of columns."""
    if not key_names.is_row_magnitude(dora_scale):
        raise UserError(
            f"{file_name} holds DoRA by the columns of W ({module.name:.100}.dora_scale "
            f"{tuple(dora_scale.shape)}), and only DoRA by its rows (out, 1) is read here: use it "
            "in the program that trained it, or train it by rows (LyCORIS: wd_on_output=True)"
        )
    return dora_scale[:, 0] if dora_scale.ndim == 2 else dora_scale.transpose(0, 1)


def find_shares(modules: Modules, pipeline: "DiffusionPipeline") -> Shares:
    """The layers that have a part of each module of a file, without modules that are none."""
    from dreambooth_moslora.method import moslora

    # The base's layers, by every spelling of their paths
    known: dict[str, dict[str, Layer]] = {}
    for component in raw_file.COMPONENTS:
        model, known[component] = getattr(pipeline, component, None), {}
        for own_path, module in ({} if model is None else moslora.get_matrix_layers(model)).items():
            path = key_names.get_published_path(component, own_path)
            layer = Layer(component, path, moslora.get_weight_size(module))
            spellings = path, path.removeprefix("text_model."), path.replace(".", "_")
            known[component] |= dict.fromkeys(spellings, layer)

    # Modules with diffusers' names
    found = {}
    for module, parts in modules.items():
        places = [known[component].get(module.path) for component in module.prefix.components]
        if layers := [layer for layer in places if layer is not None]:
            # SDXL's text encoders share their names, and have other widths.
            fitting = [layer for layer in layers if layer.size[:1] == (count_rows(parts),)]
            found[module] = [((fitting or layers)[0], None)]

    # The others: with the names of the family's original files
    others = {module: parts for module, parts in modules.items() if module not in found}
    if not hasattr(pipeline, "unet"):
        others = {
            module: parts
            for module, parts in others.items()
            if "transformer" in module.prefix.components
        }
        return found | map_original_layers(others, pipeline.transformer, known["transformer"])
    labels = rename_kohya_modules(
        [module for module in others if module.name.startswith("lora_")], pipeline
    )
    for module, (prefix, path) in labels.items():
        if path in known[prefix.components[0]]:
            found[module] = [(known[prefix.components[0]][path], None)]
    return found


MAX_ROWS = 2**16  # more than any layer has
ABSENT_ROWS = torch.full((7 * 3072, 1), -1)
"""Where the file has nothing of a weight. FLUX.1's converter cuts some to fixed sizes."""


class OriginalFile(dict[str, torch.Tensor]):
    """The weights of a file in the original layout. A converter finds each that it asks for."""

    def __missing__(self, name: str) -> torch.Tensor:
        return ABSENT_ROWS

    def pop(self, name: str, default: torch.Tensor = ABSENT_ROWS) -> torch.Tensor:
        return super().pop(name, default)


DEPTH_ENTRIES = ("num_layers", "num_single_layers", "n_layers")
"""Entries of a transformer's configuration that say how many blocks it has."""


def map_original_layers(modules: Modules, model: nn.Module, layers: dict[str, Layer]) -> Shares:
    """The layers that have rows of these modules, which may be layers of the original file."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES as CLASSES

    converter = CLASSES.get(type(model).__name__, {}).get("checkpoint_mapping_fn")
    if converter is None or not modules:
        return {}

    # Each weight's rows are numbers: of the module, and of the row in it.
    depth = max(model.config.get(name) or 1 for name in DEPTH_ENTRIES)
    file = OriginalFile(
        {f"{blocks}.{n}.": ABSENT_ROWS for blocks in COUNTED_BLOCKS for n in range(depth)}
    )
    for number, (module, parts) in enumerate(modules.items()):
        path = key_names.to_dotted_path(module)
        # A converter counts up to the largest number of a block.
        is_within = all(int(n) < max(depth, 10) for n in re.findall(r"\d+", path))
        if is_within and count_rows(parts) < MAX_ROWS:
            file[f"{path}.weight"] = number * MAX_ROWS + torch.arange(count_rows(parts))[:, None]
    try:
        converted = converter(file)
    except Exception:  # converters raise any error on weights of something else
        return {}

    # They come back where the layers of diffusers are.
    found: Shares = {}
    numbered = list(modules)
    for name, rows in converted.items():
        layer = layers.get(name.removesuffix(".weight"))
        if layer and name.endswith(".weight") and rows.min() >= 0:
            module = numbered[int(rows[0]) // MAX_ROWS]
            found.setdefault(module, []).append((layer, rows.flatten() % MAX_ROWS))
    return {
        module: shares
        for module, shares in found.items()
        if all(len(rows) == layer.size[0] for layer, rows in shares)
        and sum(len(rows) for _, rows in shares) == count_rows(modules[module])
    }


COUNTED_BLOCKS = ("joint_blocks", "double_blocks", "single_blocks")
"""Blocks of which a converter expects all: those of SD 3 and FLUX.1."""


def rename_kohya_modules(
    modules: list[FileModule], pipeline: "DiffusionPipeline"
) -> dict[FileModule, FileModule]:
    """kohya's names in a UNet's file -> diffusers', as it renames pairs with a number each."""
    pairs = {
        key_names.format_key(KOHYA_KEYS, module.name, part): torch.full((1, 1), float(number))
        for number, module in enumerate(modules)
        for part in ("down", "up")
    }
    if not pairs:
        return {}
    names, _ = pipeline.lora_state_dict(pairs, unet_config=pipeline.unet.config)
    return {
        modules[int(number)]: key_names.parse_key(text).module for text, number in names.items()
    }
