"""Single files in fp8 and int8: the base that they make is the dense one, to the precision of the
format; any other format is one line that names it."""

import json
import math
import re
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreambooth_moslora.base import load
from dreambooth_moslora.base.quantized_files import QuantizedFile, build_hadamard
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.plan.plan import make_plan
from tests.helpers.single_file import PREFIX, save_single_file, z_image_layout
from tests.helpers.tiny import tiny_sdxl
from tests.helpers.tiny_families import tiny_pipeline
from tests.helpers.tiny_training import paint_photos, tiny_config

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def as_json(settings):
    """ComfyUI's JSON as a tensor of bytes."""
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def hadamard_entry(row, column):
    """An entry of ConvRot's matrix of 16 x 16: each digit of four turns the sign where both make
    three."""
    signs = [-1 if r + c == 3 else 1 for r, c in zip(divmod(row, 4), divmod(column, 4))]
    return signs[0] * signs[1] / 4


H16 = torch.tensor([[hadamard_entry(row, column) for column in range(16)] for row in range(16)])


def fp8(weight, scale_name, dtype=E4M3, **beside):
    factor = weight.abs().max() / torch.finfo(dtype).max
    return {"weight": (weight / factor).to(dtype), scale_name: factor, **beside}


def fp8_by_rows(weight):
    factors = weight.abs().amax(1, keepdim=True) / 448
    return {"weight": (weight / factors).to(E4M3), "weight_scale": factors}


def fp8_by_blocks(weight, size=128, **beside):
    """Of 128 x 128 as DeepSeek's, the last ones cut short."""
    quantized = torch.empty(weight.shape, dtype=E4M3)
    counts = [math.ceil(length / size) for length in weight.shape]
    factors = torch.empty(*counts)
    for row, column in product(*map(range, counts)):
        block = slice(size * row, size * row + size), slice(size * column, size * column + size)
        factors[row, column] = weight[block].abs().max() / 448
        quantized[block] = (weight[block] / factors[row, column]).to(E4M3)
    return {"weight": quantized, "weight_scale_inv": factors, **beside}


def int8(weight, dim, **settings):
    factors = (weight.abs().amax(dim, keepdim=True) if dim else weight.abs().max()) / 127
    parts = {"weight": (weight / factors).round().to(torch.int8), "weight_scale": factors}
    return parts | ({"comfy_quant": as_json(settings)} if settings else {})


def int8_of_bitsandbytes(weight):
    largest = weight.abs().amax(1)
    quantized = (127 * weight / largest[:, None]).round().to(torch.int8)
    return {"weight": quantized, "SCB": largest, "weight_format": torch.tensor(0).byte()}


def convrot(weight, **settings):
    if weight.shape[1] % 16:
        return int8(weight, 1, format="int8_tensorwise")
    rotated = (weight.unflatten(1, (-1, 16)) @ H16.T).flatten(1)
    return int8(rotated, 1, **settings | {"convrot": True, "convrot_groupsize": 16})


ONE = torch.tensor(1.0)
KINDS = {  # a dense weight -> what the file has of it, and the most of it that is lost
    "fp8, old names": (lambda w: fp8(w, "scale_weight", scale_input=ONE), 0.03),
    "fp8": (lambda w: fp8(w, "weight_scale", input_scale=ONE), 0.03),
    "fp8 e5m2": (lambda w: fp8(w, "weight_scale", E5M2), 0.06),
    "fp8 by rows": (fp8_by_rows, 0.03),
    "fp8 by blocks": (fp8_by_blocks, 0.03),
    "int8": (lambda w: int8(w, None, format="int8_tensorwise"), 0.03),
    "int8 by rows": (lambda w: int8(w, 1, format="int8_tensorwise", per_row=True), 0.01),
    "int8, unmarked": (lambda w: int8(w, 1), 0.01),
    "bitsandbytes": (int8_of_bitsandbytes, 0.01),
    "convrot": (lambda w: convrot(w, format="int8_tensorwise"), 0.01),
    "convrot without a format": (convrot, 0.01),
}


def quantized(state, kind, prefix=""):
    """A file's tensors, each matrix of those whose names begin so as `kind` keeps it."""
    stored = {}
    for name, value in state.items():
        layer, _, part = name.rpartition(".")
        if part == "weight" and value.ndim == 2 and name.startswith(prefix):
            parts = kind(value.clone())
            stored |= {f"{layer}.{part}": tensor for part, tensor in parts.items()}
        else:
            stored[name] = value
    return {name: tensor.clone().contiguous() for name, tensor in stored.items()}


def relative_error(result, truth):
    return float((result.float() - truth.float()).norm() / truth.float().norm())


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A folder, and its transformer in the layout of its authors."""
    folder = tmp_path_factory.mktemp("dense")
    pipe = tiny_pipeline("z_image", folder / "files")
    pipe.save_pretrained(folder / "model")
    state = z_image_layout(pipe.transformer.state_dict())
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "d.safetensors")
    (folder / "d").symlink_to(folder / "model")
    return folder, state


@pytest.mark.parametrize("name", KINDS)
def test_a_quantized_file_is_the_dense_base_to_its_precision(name, dense, tmp_path):
    folder, state = dense
    kind, tolerance = KINDS[name]
    save_file(quantized(state, kind), tmp_path / "q.safetensors")
    (tmp_path / "q").symlink_to(folder / "model")

    pipe = load.load_pipeline(tmp_path / "q.safetensors")
    truth = load.load_pipeline(folder / "d.safetensors").transformer.state_dict()
    loaded = pipe.transformer.state_dict()
    errors = [relative_error(loaded[key], truth[key]) for key in truth if truth[key].ndim == 2]
    assert loaded.keys() == truth.keys() and 1e-5 < max(errors) < tolerance
    assert all(torch.equal(loaded[key], truth[key]) for key in truth if truth[key].ndim != 2)


def read_all(tensors, folder, dtype, header=None):
    """The tensors of a file with these, as they are handed on."""
    path = folder / "x.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, header)
    read = load_file(path)
    QuantizedFile(path).dequantize(read, dtype)
    return read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_a_weight_is_its_number_times_its_scale_rounded_once(name, dtype, tmp_path):
    weight = torch.randn(200, 320, generator=torch.Generator().manual_seed(0))
    parts = KINDS[name][0](weight)
    scale = parts.get("SCB", torch.zeros(0)).double() / 127
    for spelling in ("scale_weight", "weight_scale", "weight_scale_inv"):
        scale = parts.get(spelling, scale).double()
    if scale.shape == (2, 3):
        scale = torch.kron(scale, torch.ones(128, 128))[:200, :320]
    truth = parts["weight"].double() * (scale if scale.ndim != 1 else scale[:, None])
    if "convrot" in name:
        truth = (truth.unflatten(1, (-1, 16)) @ H16.double()).flatten(1)

    tensors = {f"a.{part}": tensor for part, tensor in parts.items()} | {"b.scale": ONE}
    restored = read_all(tensors | {"scaled_fp8": torch.zeros(2)}, tmp_path, dtype)
    assert restored.keys() == {"a.weight", "b.scale"} and restored["a.weight"].dtype == dtype
    assert relative_error(restored["a.weight"], truth) < (3e-7 if dtype == torch.float32 else 2e-3)


def test_formats_in_the_header_apply_to_the_denoiser_alone(tmp_path):
    """The header alone says that the weight is rotated."""
    weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    parts = int8((weight.unflatten(1, (2, 256)) @ build_hadamard(256)).flatten(1), 1)
    settings = {"layers": {f"{PREFIX}a": {"format": "int8_tensorwise", "convrot": True}}}
    tensors = {f"{PREFIX}a.{part}": tensor for part, tensor in parts.items()}
    encoder_tensors = {f"text_encoders.b.{part}": tensor for part, tensor in parts.items()}
    header = {"_quantization_metadata": json.dumps(settings)}
    restored = read_all(tensors | encoder_tensors, tmp_path, torch.float32, header)
    assert relative_error(restored.pop(f"{PREFIX}a.weight"), weight) < 0.01
    assert restored.keys() == encoder_tensors.keys()


def test_convrots_matrix_is_orthogonal_with_equal_sums():
    matrix = build_hadamard(256)
    assert torch.equal(matrix @ matrix, torch.eye(256)) and torch.equal(build_hadamard(16), H16)
    assert (matrix.sum(0) == 1).all() and (matrix.sum(1) == 1).all()


SCALE, BYTES = torch.ones(32, 1), torch.zeros(32, 32, dtype=torch.uint8)
INT8, FP8 = torch.zeros(32, 32, dtype=torch.int8), torch.zeros(32, 32).to(E4M3)
E8M0 = torch.ones(32, 1).to(torch.float8_e8m0fnu)
UNSUPPORTED = {  # what the file has of a layer of 32 x 32, and what the message calls it
    "nvfp4": ({"weight": BYTES, "weight_scale": E8M0, "weight_scale_2": ONE}, "nvfp4"),
    "marked": ({"weight": BYTES, "comfy_quant": as_json({"format": "nvfp4"})}, "nvfp4"),
    "mxfp8": (
        {"weight": FP8, "weight_scale": E8M0, "comfy_quant": as_json({"format": "mxfp8"})},
        "mxfp8",
    ),
    "mxfp8 of width 32, unmarked": (
        {"weight": FP8, "weight_scale": E8M0},
        "unknown format .weight: float8_e4m3fn, weight_scale: float8_e8m0fnu",
    ),
    "4 bit": (
        {"weight": INT8, "weight_scale": SCALE, "comfy_quant": as_json({"format": "convrot_w4a4"})},
        "convrot_w4a4",
    ),
    "nf4": (
        {"weight": BYTES, "weight.absmax": BYTES, "weight.quant_state.bitsandbytes__nf4": BYTES},
        "nf4",
    ),
    "int8 alone": ({"weight": INT8}, "unknown format .weight: int8"),
    "another scale": ({"weight": FP8, "pre_quant_scale": SCALE, "weight_scale": ONE}, "pre_quant"),
    "a GPU's order": ({"weight": INT8, "SCB": SCALE, "weight_format": ONE.byte()}, "SCB: float32"),
    "scale of another name": ({"weight": FP8, "scale": ONE}, "scale: float32, weight: float8"),
    "scale in the weight's name": ({"weight": FP8, "weight.scale": ONE}, "weight.scale: float32"),
    "zero point": ({"weight": INT8, "weight_scale": SCALE, "zero_point": SCALE}, "zero_point"),
    "int32 alone": ({"weight": INT8.int()}, "unknown format .weight: int32"),
    "groups of more memory than there is": (
        {
            "weight": INT8,
            "weight_scale": SCALE,
            "comfy_quant": as_json({"convrot": True, "convrot_groupsize": 4**30}),
        },
        "of 32 columns",
    ),
    "packed": ({"qweight": INT8, "wscales": SCALE}, "unknown format .qweight: int8"),
    "quanto": ({"weight._data": INT8, "weight._scale": SCALE}, "_data: int8, _scale: float32"),
    "odd blocks": ({"weight": FP8, "weight_scale_inv": torch.ones(3, 5)}, "3×5 scales for 32×32"),
    "groups that do not fit": (
        {
            "weight": INT8,
            "weight_scale": SCALE,
            "comfy_quant": as_json({"convrot": True, "params": {"convrot_groupsize": 64}}),
        },
        "groups of 64 of 32 columns",
    ),
    "no JSON": ({"weight": INT8, "weight_scale": SCALE, "comfy_quant": BYTES[0]}, "not valid JSON"),
    "odd groups": (
        {
            "weight": INT8,
            "weight_scale": SCALE,
            "comfy_quant": as_json({"convrot": True, "convrot_groupsize": 32}),
        },
        "convrot in groups of 32",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_format_is_refused_by_name(name, dense, tmp_path):
    folder, state = dense
    parts, says = UNSUPPORTED[name]
    layer = f"{PREFIX}layers.0.attention.out"
    stored = {key: value for key, value in state.items() if key != f"{layer}.weight"}
    stored |= {f"{layer}.{part}": tensor for part, tensor in parts.items()}
    save_file(
        {key: t.clone().contiguous() for key, t in stored.items()}, tmp_path / "q.safetensors"
    )
    (tmp_path / "q").symlink_to(folder / "model")
    message = rf"holds weights in .*{says}.*take the same"
    with pytest.raises(UserError, match=message) as error:
        load.load_pipeline(tmp_path / "q.safetensors")
    assert "\n" not in str(error.value)

    # A training says it before its photos are encoded, in the dry run.
    photos = paint_photos(tmp_path / "photos")
    with pytest.raises(UserError, match=message):
        make_plan(tiny_config(tmp_path / "q.safetensors", photos, tmp_path / "run"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("scale_name", ["weight_scale", "SCB"])
def test_a_scale_that_is_not_finite_is_named(scale_name, value, tmp_path):
    """It is in the second of two equal layers: formats are checked by the first."""
    kind = int8_of_bitsandbytes if scale_name == "SCB" else fp8_by_rows
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    tensors = quantized({"a.weight": weight, "b.weight": weight}, kind)
    tensors[f"b.{scale_name}"].view(-1)[3] = value
    path = tmp_path / "q.safetensors"
    save_file(tensors, path)
    message = rf"^{re.escape(str(path))} holds NaN or infinite values, first in b\.{scale_name}:"
    with pytest.raises(UserError, match=message):
        QuantizedFile(path).check()
    with pytest.raises(UserError, match=message):
        QuantizedFile(path).dequantize(tensors, torch.bfloat16)


@pytest.mark.parametrize("name", ["fp8, old names", "int8 by rows", "convrot"])
def test_a_checkpoints_unet_alone_may_be_quantized(name, tmp_path):
    pipe = tiny_sdxl(tmp_path / "files")
    pipe.save_pretrained(tmp_path / "model")
    state = load_file(save_single_file(pipe, tmp_path / "dense.safetensors"))
    kind, tolerance = KINDS[name]
    for stem, prefix in {"unet": PREFIX, "all": ""}.items():
        save_file(quantized(state, kind, prefix), tmp_path / f"{stem}.safetensors")
        (tmp_path / stem).symlink_to(tmp_path / "model")
    loaded = load.load_pipeline(tmp_path / "unet.safetensors").unet.state_dict()
    truth = pipe.unet.state_dict()
    errors = [relative_error(loaded[key], truth[key]) for key in truth if truth[key].ndim == 2]
    assert loaded.keys() == truth.keys() and max(errors) < tolerance
    with pytest.raises(UserError, match=r"is quantized outside the UNet too \(conditioner"):
        load.load_pipeline(tmp_path / "all.safetensors")
