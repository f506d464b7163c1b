"""Map the names in a LoRA file to the layers of a base, and its matrices to a LoRA of each layer.

A name is of a layer in diffusers' layout, or in the original layout, in which the base's authors
and ComfyUI keep its weights. diffusers can convert a checkpoint in the original layout, so its
converter is run on numbered rows in place of weights (`map_original_layers`). One original layer
may be several of diffusers' (q, k and v in one); each of them gets some rows of its ΔW. A UNet's
original blocks are renamed by diffusers' LoRA loader (`rename_kohya_modules`).

LoHa and LoKr become a LoRA with its scale in `up`; the alpha of a plain LoRA is kept beside its
matrices.
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
"""A layer of the base, and the indices of its rows in a module's ΔW; None for all rows."""
Shares = dict[FileModule, list[Share]]


def map_to_lora(tensors: Tensors, pipeline: "DiffusionPipeline", file_name: str) -> Parts | None:
    """Return the file's layers as LoRA; None for names that only diffusers may know.

    Raises UserError for a file that does not fit the base, is broken, or is not a LoRA.
    """
    # The base's layers that the names mean, and the names that mean none
    modules, unknown = key_names.parse_keys(tensors)
    shares = find_shares(modules, pipeline)
    strange = [module for module in modules if module not in shares]
    strange += [module for module, parts in modules.items() if parts.keys() - READ_PARTS]
    if unknown or strange:
        # diffusers drops DoRA's magnitudes, and knows LoHa and LoKr of few families.
        if not any(parts.keys() & {"dora_scale", *LYCORIS_PARTS} for parts in modules.values()):
            return None
        raise make_unknown_error(file_name, strange, unknown)

    # Each module's matrices, for each of its layers
    lora_layers: Parts = {}
    for module, parts in modules.items():
        if "dora_scale" in parts:
            parts["magnitude"] = to_magnitude(parts.pop("dora_scale"), module, file_name)
        if parts.keys() & LYCORIS_PARTS:
            parts = fold_lycoris(parts, shares[module], file_name)
        for layer, rows in shares[module]:
            if (layer.component, layer.path) in lora_layers:
                raise UserError(f"{file_name} is broken: it has {layer.path:.100} under two names")
            lora_layers[layer.component, layer.path] = (
                parts if rows is None else select_rows(parts, rows)
            )
    return lora_layers


def make_unknown_error(file_name: str, strange: list[FileModule], unknown: list[str]) -> UserError:
    """Return the error for a file with layers that the base lacks, or with keys of an unknown
    spelling."""
    if not strange:
        return UserError(
            f"{file_name} is not a LoRA of a diffusion model: {unknown[0]!r:.100} does not belong "
            "to one"
        )
    return UserError(
        f"{file_name} does not fit this base: it has names that are no layers of it, in the layout "
        f"of diffusers or of its original files, such as {strange[0].name!r:.100}, as "
        f"{strange[0].prefix.tool} spells it"
    )


def select_rows(parts: Tensors, rows: torch.Tensor) -> Tensors:
    """Return the LoRA of some rows of ΔW."""
    selected = {
        part: tensor[rows] if part in ("up", "bias", "magnitude") else tensor
        for part, tensor in parts.items()
    }
    # Where q, k and v were trained separately, each uses only some columns of `up`.
    is_used = selected["up"].flatten(1).any(0)
    if is_used.any():
        selected |= {"up": selected["up"][:, is_used], "down": selected["down"][is_used]}
        if "alpha" in selected:  # so that alpha/r stays the same
            selected["alpha"] = selected["alpha"].double() * int(is_used.sum()) / len(is_used)
    return selected


def count_rows(parts: Tensors) -> int:
    """Return the number of rows of a module's ΔW."""
    names = ("up", "hada_w1_a", "lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a")
    return prod(len(parts[name]) for name in names if name in parts)


def fold_lycoris(parts: Tensors, shares: list[Share], file_name: str) -> Tensors:
    """Return LoHa or LoKr as a LoRA. Raises UserError if it does not fit its layers."""
    lora_parts = {"magnitude": parts.pop("magnitude")} if "magnitude" in parts else {}
    component, path, size = shares[0][0]
    size = (sum(layer.size[0] for layer, _ in shares), *size[1:])
    try:
        up, down = lycoris.convert_to_lora(parts, size)
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{file_name} is broken, or was made for another base: {component}.{path:.100} is "
            f"{'×'.join(map(str, size))} (out×in) here"
        ) from error
    lora_parts["down"] = down.view(len(down), *size[1:])
    lora_parts["up"] = up.view(*up.shape, *(1,) * (len(size) - 2))
    return lora_parts


def to_magnitude(dora_scale: torch.Tensor, module: FileModule, file_name: str) -> torch.Tensor:
    """Return DoRA's magnitudes in PEFT's shape: (out, 1) -> (out,), (out, 1, 1, 1) -> (1, out, 1,
    1).

    Raises UserError for the magnitudes of columns.
    """
    if not key_names.is_row_magnitude(dora_scale):
        raise UserError(
            f"{file_name} holds DoRA by the columns of W ({module.name:.100}.dora_scale "
            f"{tuple(dora_scale.shape)}), and only DoRA by its rows (out, 1) is read here: use it "
            "in the program that trained it, or train it by rows (LyCORIS: wd_on_output=True)"
        )
    return dora_scale[:, 0] if dora_scale.ndim == 2 else dora_scale.transpose(0, 1)


def find_shares(modules: Modules, pipeline: "DiffusionPipeline") -> Shares:
    """Return the layers that each module of a file belongs to, without unknown modules."""
    from dreambooth_moslora.method import moslora

    # The base's layers, by every spelling of their paths
    base_layers: dict[str, dict[str, Layer]] = {}
    for component in raw_file.COMPONENTS:
        model, base_layers[component] = getattr(pipeline, component, None), {}
        for base_path, module in (
            {} if model is None else moslora.get_matrix_layers(model)
        ).items():
            path = key_names.get_published_path(component, base_path)
            layer = Layer(component, path, moslora.get_weight_size(module))
            spellings = path, path.removeprefix("text_model."), path.replace(".", "_")
            base_layers[component] |= dict.fromkeys(spellings, layer)

    # Modules with diffusers' names
    shares = {}
    for module, parts in modules.items():
        matches = [
            base_layers[component].get(module.path) for component in module.prefix.components
        ]
        if layers := [layer for layer in matches if layer is not None]:
            # SDXL's text encoders share their names, and have other widths.
            fitting = [layer for layer in layers if layer.size[:1] == (count_rows(parts),)]
            shares[module] = [((fitting or layers)[0], None)]

    # Modules with the names of the family's original files
    original_modules = {module: parts for module, parts in modules.items() if module not in shares}
    if not hasattr(pipeline, "unet"):
        original_modules = {
            module: parts
            for module, parts in original_modules.items()
            if "transformer" in module.prefix.components
        }
        return shares | map_original_layers(
            original_modules, pipeline.transformer, base_layers["transformer"]
        )
    labels = rename_kohya_modules(
        [module for module in original_modules if module.name.startswith("lora_")], pipeline
    )
    for module, (prefix, path) in labels.items():
        if path in base_layers[prefix.components[0]]:
            shares[module] = [(base_layers[prefix.components[0]][path], None)]
    return shares


MAX_ROWS = 2**16
"""More rows than any layer has."""
ABSENT_ROWS = torch.full((7 * 3072, 1), -1)
"""Rows of a weight that the file lacks. FLUX.1's converter cuts some to fixed sizes."""


class OriginalFile(dict[str, torch.Tensor]):
    """Weights of a file in the original layout, in which a converter finds each that it asks
    for."""

    def __missing__(self, name: str) -> torch.Tensor:
        return ABSENT_ROWS

    def pop(self, name: str, default: torch.Tensor = ABSENT_ROWS) -> torch.Tensor:
        return super().pop(name, default)


DEPTH_ENTRIES = ("num_layers", "num_single_layers", "n_layers")
"""Entries of a transformer's configuration with the number of its blocks."""


def map_original_layers(modules: Modules, model: nn.Module, layers: dict[str, Layer]) -> Shares:
    """Return the layers that have rows of modules named as in the original checkpoint.

    modules: of a LoRA file; those that the original checkpoint lacks are left out
    model: the base's transformer
    layers: its layers by path
    """
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES as CLASSES

    converter = CLASSES.get(type(model).__name__, {}).get("checkpoint_mapping_fn")
    if converter is None or not modules:
        return {}

    # Number each row of each module: module_index · MAX_ROWS + row.
    depth = max(model.config.get(name) or 1 for name in DEPTH_ENTRIES)
    original_file = OriginalFile(
        {f"{blocks}.{block}.": ABSENT_ROWS for blocks in COUNTED_BLOCKS for block in range(depth)}
    )
    for module_index, (module, parts) in enumerate(modules.items()):
        path = key_names.to_dotted_path(module)
        # A converter counts up to the largest block number that it finds.
        is_within = all(int(block) < max(depth, 10) for block in re.findall(r"\d+", path))
        if is_within and count_rows(parts) < MAX_ROWS:
            original_file[f"{path}.weight"] = (
                module_index * MAX_ROWS + torch.arange(count_rows(parts))[:, None]
            )
    try:
        converted = converter(original_file)
    except Exception:  # converters raise any error on weights of something else
        return {}

    # The converter has put these numbers where diffusers' layers are.
    shares: Shares = {}
    numbered_modules = list(modules)
    for name, rows in converted.items():
        layer = layers.get(name.removesuffix(".weight"))
        if layer and name.endswith(".weight") and rows.min() >= 0:
            module = numbered_modules[int(rows[0]) // MAX_ROWS]
            shares.setdefault(module, []).append((layer, rows.flatten() % MAX_ROWS))
    return {
        module: module_shares
        for module, module_shares in shares.items()
        if all(len(rows) == layer.size[0] for layer, rows in module_shares)
        and sum(len(rows) for _, rows in module_shares) == count_rows(modules[module])
    }


COUNTED_BLOCKS = ("joint_blocks", "double_blocks", "single_blocks")
"""Blocks of which a converter expects all: those of SD 3 and FLUX.1."""


def rename_kohya_modules(
    modules: list[FileModule], pipeline: "DiffusionPipeline"
) -> dict[FileModule, FileModule]:
    """Return kohya's names of a UNet's modules -> diffusers' names, as its LoRA loader renames
    them."""
    pairs = {
        key_names.format_key(KOHYA_KEYS, module.name, part): torch.full((1, 1), float(index))
        for index, module in enumerate(modules)
        for part in ("down", "up")
    }
    if not pairs:
        return {}
    renamed, _ = pipeline.lora_state_dict(pairs, unet_config=pipeline.unet.config)
    return {
        modules[int(index)]: key_names.parse_key(text).module for text, index in renamed.items()
    }
