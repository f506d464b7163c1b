"""LoRA of transformers under the names of other programs: each layer gets the ΔW that the program
means.

The original layouts are those that the tools map (ComfyUI, kohya's sd-scripts, musubi-tuner,
ai-toolkit).
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora import empty_models, reader, verify
from dreambooth_moslora.lora.describe import describe
from dreambooth_moslora.method import moslora
from dreambooth_moslora.settings import family_facts
from tests.helpers.tiny_families import TINY_FAMILIES, TinyFamily, three, tiny_pipeline
from tools import formats_table

UNET_LAYERS = (
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
)
"""Layers that SDXL's and Stable Diffusion 1.5's UNets both have."""


def list_layers(row: TinyFamily, tool: str) -> dict[str, tuple[str, ...]]:
    """Return the layers of a file -> those of diffusers that have its rows.

    They are of the original layout, where the family has another and the tool may use it.
    """
    if row.original and tool not in ("diffusers", "OneTrainer"):
        return dict(row.original)
    paths = (row.one_layer,) if row.one_layer else UNET_LAYERS
    return {path: (path,) for path in paths}


FAMILIES = {name: dict(row.original) for name, row in TINY_FAMILIES.items() if row.original}
SWAPPED = {"final_layer.adaLN_modulation.1"}
"""Layers whose halves, shift and scale, are swapped in diffusers."""
SPELLINGS = {
    "diffusers": lambda denoiser, path: f"{denoiser}.{path}",
    "kohya": lambda _, path: f"lora_unet_{path.replace('.', '_')}",
    "OneTrainer": lambda _, path: f"lora_transformer_{path.replace('.', '_')}",
    "LyCORIS": lambda _, path: f"lycoris_{path.replace('.', '_')}",
    "ComfyUI": lambda _, path: f"diffusion_model.{path}",
    "PEFT": lambda _, path: f"base_model.model.{path}",
}
"""Tool -> its name of a layer of the denoiser."""


def make_lora(rows, columns, draw):
    parts = {"lora_down.weight": draw(4, columns), "lora_up.weight": draw(rows, 4)}
    change = 3 / 4 * parts["lora_up.weight"] @ parts["lora_down.weight"]
    return parts | {"alpha": torch.tensor(3.0)}, change


def make_peft_lora(rows, columns, draw):
    parts = {"lora_A.weight": draw(4, columns), "lora_B.weight": draw(rows, 4)}
    return parts, parts["lora_B.weight"] @ parts["lora_A.weight"]


def make_peft_lora_with_alpha(rows, columns, draw):
    parts, change = make_peft_lora(rows, columns, draw)
    return parts | {"alpha": torch.tensor(3.0)}, 3 / 4 * change


def make_fused_lora(rows, columns, draw):
    """Make a LoRA whose q, k and v were trained separately: each has its own columns of `up`."""
    parts, _ = make_lora(rows, columns, draw)
    down, up = draw(6, columns), torch.zeros(rows, 6)
    for number, block in enumerate(up.split(-(-rows // 3))):
        block[:, 2 * number : 2 * number + 2] = draw(len(block), 2)
    parts |= {"lora_down.weight": down, "lora_up.weight": up}
    return parts, 3 / 6 * up @ down


def make_loha(rows, columns, draw):
    parts = {f"hada_{name}_a": draw(rows, 2) for name in ("w1", "w2")}
    parts |= {f"hada_{name}_b": draw(2, columns) for name in ("w1", "w2")}
    first, second = (parts[f"hada_{name}_a"] @ parts[f"hada_{name}_b"] for name in ("w1", "w2"))
    return parts | {"alpha": torch.tensor(3.0)}, 3 / 2 * first * second


def make_lokr(rows, columns, draw):
    up, down = draw(rows // 2, 2), draw(2, columns // 4)
    parts = {"lokr_w1": draw(2, 4), "lokr_w2_a": up, "lokr_w2_b": down}
    change = 3 / 2 * torch.kron(parts["lokr_w1"], up @ down)
    return parts | {"alpha": torch.tensor(3.0)}, change


def make_whole_lokr(rows, columns, draw):
    """Make a LoKr of two whole matrices, for which alpha has no meaning."""
    parts = {"lokr_w1": draw(2, 4), "lokr_w2": draw(rows // 2, columns // 4)}
    return parts | {"alpha": torch.tensor(3.0)}, torch.kron(*parts.values())


def make_dora(rows, columns, draw):
    parts, change = make_lora(rows, columns, draw)
    return parts | {"dora_scale": draw(rows, 1).abs() + 1}, change


def make_dora_lokr(rows, columns, draw):
    parts, change = make_lokr(rows, columns, draw)
    return parts | {"dora_scale": draw(rows, 1).abs() + 1}, change


KINDS = {
    "LoRA": (make_lora, make_peft_lora, make_peft_lora_with_alpha, make_fused_lora),
    "LoHa": (make_loha,),
    "LoKr": (make_lokr, make_whole_lokr),
    "DoRA": (make_dora, make_dora_lokr),
}
"""Column of the page of formats -> files of that kind."""
CELLS = [
    (facts, tool, kind)
    for facts in family_facts.FAMILIES
    for tool in formats_table.TOOLS
    for kind in formats_table.KINDS
]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Return a function from a family to its tiny pipeline, which is built once."""
    cache = {}

    def pipeline(family):
        if family not in cache:
            cache[family] = tiny_pipeline(family, tmp_path_factory.mktemp(family))
        return cache[family]

    return pipeline


def write_file(file: Path, model, layers: dict, kind, tool):
    """Write a file with these original layers; return ΔW and magnitudes of diffusers' layers."""
    generator, tensors, expected = torch.Generator().manual_seed(5), {}, {}

    def draw(*sizes):
        return 0.3 * torch.randn(sizes, generator=generator)

    for path, diffusers_paths in layers.items():
        sizes = [moslora.get_weight_size(model.get_submodule(name)) for name in diffusers_paths]
        parts, change = kind(sum(rows for rows, _ in sizes), sizes[0][1], draw)
        name = SPELLINGS[tool]("unet" if hasattr(model, "down_blocks") else "transformer", path)
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        magnitude = parts["dora_scale"][:, 0] if "dora_scale" in parts else None
        if path in SWAPPED:
            change = torch.cat(change.chunk(2)[::-1])
            magnitude = None if magnitude is None else torch.cat(magnitude.chunk(2)[::-1])
        start = 0
        for name, (rows, _) in zip(diffusers_paths, sizes, strict=True):
            part_rows = slice(start, start + rows)
            expected[name] = change[part_rows], None if magnitude is None else magnitude[part_rows]
            start += rows
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    return expected


@pytest.mark.parametrize(
    ("facts", "tool", "kind"),
    CELLS,
    ids=[f"{facts.name}-{tool}-{kind}" for facts, tool, kind in CELLS],
)
def test_each_cell_of_the_page_of_formats_holds(facts, tool, kind, pipelines, tmp_path):
    pipeline, file = pipelines(facts.name), tmp_path / "x.safetensors"
    layers = list_layers(TINY_FAMILIES[facts.name], tool)
    denoiser = getattr(pipeline, facts.denoiser)
    for make in KINDS[kind]:
        expected = write_file(file, denoiser, layers, make, tool)
        if formats_table.is_read(tool, facts, kind):
            check_read(file, pipeline, facts, make, layers, expected)
        else:
            with pytest.raises(UserError):
                reader.check_fits(reader.read_adapter(file, pipeline), pipeline)


def test_a_transformer_has_no_layers_of_a_unet(pipelines, tmp_path, monkeypatch):
    pipeline, file = pipelines("z_image"), tmp_path / "x.safetensors"
    monkeypatch.setitem(SPELLINGS, "kohya", lambda _, path: f"unet.{path}")
    layers = list_layers(TINY_FAMILIES["z_image"], "kohya")
    write_file(file, pipeline.transformer, layers, make_lora, "kohya")
    with pytest.raises(UserError):
        reader.check_fits(reader.read_adapter(file, pipeline), pipeline)


def check_read(file, pipeline, facts, make, layers, expected):
    """Check that the file gives these layers these ΔW and magnitudes."""
    assert describe(file)["kind"]
    weights = reader.read_adapter(file, pipeline)
    reader.check_fits(weights, pipeline)
    read_layers, scales = weights.parts[facts.denoiser]
    fused = {name for names in layers.values() if len(names) > 1 for name in names}
    assert read_layers.keys() == expected.keys()
    for path, (change, magnitude) in expected.items():
        layer = read_layers[path]
        delta = scales.get_scale(path, layer.rank) * layer.delta
        assert verify.compute_relative_difference(delta, change) < 1e-6, path
        assert (layer.magnitude is None) == (magnitude is None)
        assert magnitude is None or torch.equal(layer.magnitude, magnitude), path
        if make is make_fused_lora and path in fused:
            assert layer.rank == 2, "not the rank of q, k and v together"


def test_diffusers_own_conversions_agree(pipelines, tmp_path):
    """Compare LoRA where diffusers converts it: not of the last layers."""
    cases = [(family, "kohya", make_lora) for family in ("flux", "flux2", "z_image")]
    cases += [(family, "ComfyUI", make_peft_lora) for family in ("flux2", "krea2")]
    for family, tool, kind in cases:
        pipeline, file = pipelines(family), tmp_path / "x.safetensors"
        layers = dict(FAMILIES[family])
        for last in ("final_layer.adaLN_modulation.1", "final_layer.linear"):
            layers.pop(last, None)
        write_file(file, pipeline.transformer, layers, kind, tool)
        converted = pipeline.lora_state_dict(str(tmp_path), weight_name=file.name)
        read_layers, scales = reader.read_adapter(file, pipeline).parts["transformer"]
        for path, layer in read_layers.items():
            pair = (converted[f"transformer.{path}.lora_{side}.weight"] for side in "BA")
            delta = scales.get_scale(path, layer.rank) * layer.delta
            assert verify.compute_relative_difference(delta, torch.matmul(*pair)) < 1e-6, (
                family,
                path,
            )


def test_flux_single_blocks_are_split_into_four(tmp_path):
    """Use the full width, which diffusers' converter assumes: q, k, v and the MLP's."""
    pipeline = tiny_pipeline("flux", tmp_path)
    sizes = {"num_attention_heads": 24, "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56]}
    config = dict(pipeline.transformer.config) | sizes | {"num_layers": 1, "num_single_layers": 1}
    wide = empty_models.build_empty_model({"class": "FluxTransformer2DModel", "config": config})
    pipeline.transformer = wide
    block = "single_transformer_blocks.0"
    layers = {"single_blocks.0.linear1": (*three(f"{block}.attn"), f"{block}.proj_mlp")}
    expected = write_file(file := tmp_path / "x.safetensors", wide, layers, make_lora, "kohya")
    read_layers, scales = reader.read_adapter(file, pipeline).parts["transformer"]
    assert read_layers.keys() == expected.keys()
    for path, (change, _) in expected.items():
        delta = scales.get_scale(path, read_layers[path].rank) * read_layers[path].delta
        assert verify.compute_relative_difference(delta, change) < 1e-6, path


@torch.no_grad()
@pytest.mark.parametrize("family", ["flux", "z_image"])
def test_dora_of_an_original_layer_merges_by_its_definition(family, tmp_path):
    """Compare with W' = dora_scale · (W + ΔW) / ‖W + ΔW‖ for each row."""
    pipeline, file = tiny_pipeline(family, tmp_path), tmp_path / "x.safetensors"
    expected = write_file(file, pipeline.transformer, FAMILIES[family], make_dora, "kohya")
    bases = {path: pipeline.transformer.get_submodule(path).weight.clone() for path in expected}
    reader.install(reader.read_adapter(file, pipeline), pipeline)
    for path, (change, magnitude) in expected.items():
        layer, moved = pipeline.transformer.get_submodule(path), bases[path] + change
        layer.merge()
        merged = magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True)
        assert verify.compute_relative_difference(layer.get_base_layer().weight, merged) < 1e-5, (
            path
        )


LOKR = {"lokr_w1": torch.ones(2, 4), "lokr_w2": torch.ones(48, 8)}  # 96 × 32
LORA = {"lora_down.weight": torch.ones(2, 32), "lora_up.weight": torch.ones(32, 2)}
DORA = LORA | {"dora_scale": torch.ones(32, 1)}
NO_LAYER = "no layers of it, in the layout of diffusers or of its original files, such as "
JOINT, QKV = "lora_unet_joint_blocks_{}_x_block_attn_qkv", "lora_unet_layers_0_attention_qkv"
REFUSED = {
    "a LoRA of no layer": ("sd3", "lora_unet_x", LORA, f"{NO_LAYER}'lora_unet_x', as kohya spells"),
    "no layer": ("flux2", "diffusion_model.x.y", LOKR, f"{NO_LAYER}'diffusion_model.*ComfyUI"),
    "another family's": ("z_image", JOINT.format(0), LOKR, f"{NO_LAYER}'lora_unet.*kohya"),
    "a missing block": ("sd3", JOINT.format(7), LOKR, NO_LAYER),
    "an endless block": ("sd3", JOINT.format(123456789), LOKR, NO_LAYER),
    "a hidden number": ("sd3", "diffusion_model.x.123456789.joint_blocks", LOKR, NO_LAYER),
    "too few rows": ("z_image", QKV, LOKR | {"lokr_w2": torch.ones(32, 8)}, NO_LAYER),
    "too few columns": (
        "z_image",
        QKV,
        LOKR | {"lokr_w2": torch.ones(48, 4)},
        "is broken, or was made for another base: transformer.layers.0.attention.to_q is 96×32",
    ),
    "DoRA of no layer": ("z_image", "lora_unet_x", DORA, f"{NO_LAYER}'lora_unet_x'"),
    "DoRA of columns": (
        "z_image",
        "lora_unet_layers_0_attention_to_q",
        DORA | {"dora_scale": torch.ones(1, 32)},
        "holds DoRA by the columns of W",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_unknown_layer_is_refused_with_the_tools_spelling(name, pipelines, tmp_path):
    family, layer, parts, message = REFUSED[name]
    file = tmp_path / "x.safetensors"
    save_file({f"{layer}.{part}": tensor.clone() for part, tensor in parts.items()}, file)
    pipeline = pipelines(family)
    with pytest.raises(UserError, match=message) as error:
        reader.check_fits(reader.read_adapter(file, pipeline), pipeline)
    assert "\n" not in str(error.value)


def test_a_layer_under_two_names_is_refused(pipelines, tmp_path):
    fused, query = "lora_unet_layers_0_attention_qkv", "lora_unet_layers_0_attention_to_q"
    tensors = {f"{fused}.{part}": tensor.clone() for part, tensor in LOKR.items()}
    tensors |= {f"{query}.{part}": tensor.clone() for part, tensor in LORA.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"it has layers\.0\.attention\.to_q under two names"):
        reader.read_adapter(tmp_path / "x.safetensors", pipelines("z_image"))
