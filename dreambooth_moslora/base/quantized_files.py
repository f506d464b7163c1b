"""Single files with quantized weights, in fp8 and int8 with scales, which are read as dense weights
W.

    X.weight        W8 (out, in), float8 or int8
    X.weight_scale  W = scale · W8: one number, one per row, or one per block of 128 × 128. Older
                    files call it `scale_weight`, DeepSeek `weight_scale_inv`
    X.SCB           bitsandbytes' int8: W = SCB / 127 · W8, one number per row
    X.comfy_quant   ComfyUI's JSON of the layer's format, as bytes; it may be in the file's header

With `convrot` in that JSON, W8 is the quantized W·H, group by group of the columns. H is ConvRot's
regular Hadamard matrix (arXiv 2512.03673), which is its own inverse. Scales of inputs serve 8-bit
arithmetic and are ignored: layers compute in the run's precision.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dreambooth_moslora.base import model_files
from dreambooth_moslora.disk.contents import parse_json
from dreambooth_moslora.disk.safetensors_header import read_header
from dreambooth_moslora.errors import UserError, format_error

SCALE_DIVISORS = {"scale_weight": 1, "weight_scale": 1, "weight_scale_inv": 1, "SCB": 127}
"""Last part of the name of a weight's scale -> divisor of the scale."""
UNUSED_PARTS = ("scale_input", "input_scale", "scaled_fp8", "comfy_quant", "weight_format")
"""Last parts of the names of tensors beside a weight that are not its scale."""
FORMATS = (
    *("float8_e4m3fn", "float8_e4m3fn_rowwise", "float8_e4m3fn_blockwise", "float8_e5m2"),
    *("int8_tensorwise", "int8_blockwise"),
)
"""Supported formats of ComfyUI and convert_to_quant. Some files omit the format's name."""
UNREAD_FORMATS = {"weight_scale_2": "nvfp4", "bitsandbytes__nf4": "nf4", "bitsandbytes__fp4": "fp4"}
"""Last part of a tensor's name -> unsupported format that has no other mark."""
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WEIGHT_DTYPES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, *SCALE_DTYPES)
DEFAULT_BLOCK_SIZE = 128
"""Rows and columns of a block, unless the file states them."""
DEFAULT_GROUP_SIZE = 256
"""Columns that ConvRot rotates together, unless the file states them."""


class QuantizedFile:
    """Safetensors file with quantized weights.

    `layers` is {layer: {last part of a tensor's name: its dtype}}, of the denoiser alone where the
    file is a whole checkpoint, `other_layers` those of its other parts.
    """

    def __init__(self, path: Path):
        self.path = path
        layers = model_files.group_quantized(path)
        is_whole = any(
            name.startswith(model_files.DENOISER_PREFIX) for name in model_files.read_shapes(path)
        )
        prefix = model_files.DENOISER_PREFIX if is_whole else ""
        self.layers = {
            layer: parts for layer, parts in layers.items() if f"{layer}.".startswith(prefix)
        }
        self.other_layers = [layer for layer in layers if layer not in self.layers]

        # The header may name the layers without the prefix.
        formats = read_formats(path)
        self.formats = {
            layer: formats.get(layer) or formats.get(layer.removeprefix(prefix)) or {}
            for layer in self.layers
        }

    def check(self) -> None:
        """Raise UserError for an unsupported format, by reading one layer of each kind, and for a
        scale of any layer that is not finite."""
        checked = set()
        with safe_open(self.path, "pt") as file:
            for layer, dtypes in self.layers.items():
                mark = join(layer, "comfy_quant")
                settings = file.get_tensor(mark).tolist() if "comfy_quant" in dtypes else None
                kind = str((sorted(dtypes.items()), self.formats[layer], settings))
                names = dtypes.keys() & SCALE_DIVISORS.keys() if kind in checked else dtypes
                parts = {part: file.get_tensor(join(layer, part)) for part in names}
                if kind in checked:
                    self.check_scales(layer, parts)
                else:
                    self.restore(layer, parts)
                checked.add(kind)

    def dequantize(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Replace each quantized weight and its scale in `tensors` by the dense weight in `dtype`,
        one after the other, without a second copy of all. Raises UserError as `check` does."""
        for layer, dtypes in self.layers.items():
            weight = self.restore(layer, {part: tensors.pop(join(layer, part)) for part in dtypes})
            if weight is not None:
                tensors[join(layer, "weight")] = weight.to(dtype)

    def restore(self, layer: str, parts: dict[str, Tensor]) -> Tensor | None:
        """Return a layer's dense weight in fp32, as `restore_weight` does. Raises UserError with
        the name of an unsupported format, and as `check_scales` does."""
        self.check_scales(layer, parts)
        try:
            settings = self.formats[layer]
            if "comfy_quant" in parts:
                settings = parse_json(parts["comfy_quant"].numpy().tobytes()) | settings
            return restore_weight(parts, settings)
        except (ValueError, TypeError) as error:
            unread = [
                UNREAD_FORMATS[part]
                for dtypes in self.layers.values()
                for part in dtypes.keys() & UNREAD_FORMATS.keys()
            ]
            raise UserError(
                f"{self.path} holds weights in {unread[0] if unread else format_error(error)}, "
                "which is not read here: take the same model in bf16, scaled fp8 or int8."
            ) from error

    def check_scales(self, layer: str, parts: dict[str, Tensor]) -> None:
        """Raise UserError for a scale of the layer that is NaN or infinite: one makes the images
        black."""
        for part in SCALE_DIVISORS.keys() & parts.keys():
            if not parts[part].float().isfinite().all():
                raise UserError(
                    f"{self.path} holds NaN or infinite values, first in {join(layer, part)}: "
                    "download the file again, or take the same model from elsewhere."
                )


@dataclass
class Header:
    """ComfyUI's entry in a file's header: {layer: JSON of its format}."""

    layers: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_formats(path: Path) -> dict[str, dict[str, Any]]:
    """Return the layers' formats in a file's header. Raises UserError for invalid JSON."""
    text = read_header(path).metadata.get("_quantization_metadata", "{}")
    try:
        return parse_json(text, Header).layers
    except UserError as error:
        raise UserError(f"{path}: _quantization_metadata in its header: {error}.") from error


def join(layer: str, part: str) -> str:
    """Return the name of a layer's tensor; of the whole file's mark without a layer."""
    return f"{layer}.{part}".removeprefix(".")


def restore_weight(parts: dict[str, Tensor], settings: dict[str, Any]) -> Tensor | None:
    """Return a layer's dense weight in fp32, so that it is rounded once; a weight without a scale
    unchanged, and None without a weight.

    parts: last part of a name -> tensor: `weight` (out, in) or (out, in, h, w), and its scales
    settings: ComfyUI's JSON of the layer; {} without one

    Raises ValueError with the name of an unsupported format.
    """
    if settings.get("format", FORMATS[0]) not in FORMATS:
        raise ValueError(settings["format"])

    # Require exactly one supported scale of a supported weight.
    weight = parts.get("weight")
    scales = [part for part in parts if part not in ("weight", *UNUSED_PARTS)]
    if not scales and (weight is None or weight.is_floating_point()):
        return weight
    is_supported = (
        len(scales) == 1 and scales[0] in SCALE_DIVISORS and parts[scales[0]].dtype in SCALE_DTYPES
    )
    is_by_rows = not parts.get("weight_format", torch.zeros(1)).any()  # bitsandbytes' row order
    if not is_supported or not is_by_rows or weight is None or weight.dtype not in WEIGHT_DTYPES:
        kinds = (f"{part}: {str(tensor.dtype)[6:]}" for part, tensor in sorted(parts.items()))
        raise ValueError(f"an unknown format ({', '.join(kinds)})")
    options = settings.get("params", {}) | settings
    scale = parts[scales[0]].float() / SCALE_DIVISORS[scales[0]]
    restored = weight.float() * expand_scale(
        scale, weight.shape, options.get("group_size", DEFAULT_BLOCK_SIZE)
    )

    # Rotate rotated columns back.
    if options.get("convrot"):
        size = options.get("convrot_groupsize", DEFAULT_GROUP_SIZE)
        if weight.ndim != 2 or not 0 < size <= weight.shape[1] or weight.shape[1] % size:
            raise ValueError(f"int8 with convrot in groups of {size} of {weight.shape[1]} columns")
        matrix = build_hadamard(size)
        restored = (restored.unflatten(1, (-1, size)) @ matrix).flatten(1)
    return restored


def expand_scale(scale: Tensor, shape: Sequence[int], block: int) -> Tensor:
    """Expand a scale to a tensor that multiplies a weight.

    scale: one number; (out,) or (out, 1); or (blocks of rows, blocks of columns)
    shape: of the weight, (out, in) or (out, in, h, w)
    block: rows and columns of a block; the last blocks may be smaller

    Raises ValueError for another shape.
    """
    is_by_rows = scale.numel() == shape[0] == scale.shape[0]
    if scale.numel() == 1 or is_by_rows:
        return scale.reshape(-1, *(1,) * (len(shape) - 1))
    counts = zip(scale.shape, shape, strict=False)
    is_by_blocks = all(block * (count - 1) < size <= block * count for count, size in counts)
    if scale.ndim != 2 or len(shape) != 2 or not is_by_blocks:
        sizes = ["×".join(map(str, size)) for size in (scale.shape, shape)]
        raise ValueError(f"eight bits with {sizes[0]} scales for {sizes[1]} numbers")
    rows = scale.repeat_interleave(block, dim=0)[: shape[0]]
    return rows.repeat_interleave(block, dim=1)[:, : shape[1]]


def build_hadamard(size: int) -> Tensor:
    """Build ConvRot's orthogonal matrix (size, size): the Kronecker power of a matrix of 4 × 4
    whose rows have equal sums. Raises ValueError for a size that is not a power of 4."""
    quarter = 0.5 - torch.eye(4).flip(0)
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, quarter)
    if len(matrix) != size:
        raise ValueError(f"int8 with convrot in groups of {size}")
    return matrix
