"""DoRA in kohya's form: a pipeline that reads it has the weights that its definition gives.

W' = dora_scale · (W + ΔW) / ‖W + ΔW‖ for each row, as LyCORIS merges it and as PEFT does.
"""

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from dreambooth_moslora.adapters.describe import describe
from dreambooth_moslora.adapters.export import publish
from dreambooth_moslora.adapters.moslora import ATTENTION_PROJECTIONS, MoSLoraConfig, inject
from dreambooth_moslora.adapters.proof import BOUNDS, kohya_name, relative_difference
from dreambooth_moslora.adapters.raw_file import adapter_metadata
from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from tests.adapters.test_moslora import shake
from tests.adapters.test_moslora_models import PROJECTIONS
from tests.helpers.tiny_adapters import save_kohya_lora

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


def changes(pipeline) -> dict[str, torch.Tensor]:
    """`component.path` -> W' − W of every adapted layer, as PEFT merges it."""
    found = {}
    for component in COMPONENTS:
        for path, layer in getattr(pipeline, component).named_modules():
            if isinstance(layer, LoraLayer):
                before = layer.get_base_layer().weight.detach().clone()
                layer.merge()
                found[f"{component}.{path}"] = layer.get_base_layer().weight.detach() - before
    return found


def changes_read(base, file) -> dict[str, torch.Tensor]:
    subject = SubjectPipeline.from_base(base)
    subject.activate(((subject.load_adapter(file), 1.0),))
    return changes(subject.pipeline)


def worst(found, wanted) -> float:
    assert found.keys() == wanted.keys() and found
    return max(relative_difference(found[name], change) for name, change in wanted.items())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, BOUNDS[torch.float16])])
def test_a_trained_dora_comes_back_from_both_files(dtype, bound, tiny_base, tmp_path):
    pipeline = SubjectPipeline.from_base(tiny_base).pipeline
    components = {name: getattr(pipeline, name) for name in COMPONENTS}
    for name, model in components.items():
        targets = list(ATTENTION_PROJECTIONS) if name == "unet" else PROJECTIONS
        inject(model, MoSLoraConfig(r=4, lora_alpha=11, target_modules=targets, use_dora=True))
        shake(model)
    publish(components, tmp_path, "dog", adapter_metadata(components, base_id="tiny"), dtype)
    assert ", DoRA, PEFT keys" in describe(tmp_path / PUBLISHED_NAME)["kind"]
    wanted = changes(pipeline)
    for file in (PUBLISHED_NAME, "dog.kohya.safetensors"):
        assert worst(changes_read(tiny_base, tmp_path / file), wanted) < bound


def other_program_s(base, file, shape=(-1, 1)) -> dict[str, torch.Tensor]:
    """A file as LyCORIS writes it, alpha apart from the rank, and the changes that its definition gives."""
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    tensors, wanted = load_file(save_kohya_lora(unet, file, size=0.2)), {}
    generator = torch.Generator().manual_seed(2)
    for path, module in unet.named_modules():
        name = kohya_name("unet", path)
        if f"{name}.alpha" not in tensors:
            continue
        weight = module.weight.detach()
        tensors[f"{name}.alpha"] = torch.tensor(3.0)
        moved = weight + 3 / 4 * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
        size = weight.norm(dim=1, keepdim=True) * (1 + 0.3 * torch.rand(len(weight), 1, generator=generator))
        tensors[f"{name}.dora_scale"] = size if shape == (-1, 1) else torch.ones(1, weight.shape[1])
        wanted[f"unet.{path}"] = size * moved / moved.norm(dim=1, keepdim=True) - weight
    save_file(tensors, file)
    return wanted


def test_another_program_s_dora_is_what_its_definition_says(tiny_base, tmp_path):
    wanted = other_program_s(tiny_base, tmp_path / "x.safetensors")
    assert describe(tmp_path / "x.safetensors")["kind"] == "DoRA, kohya keys"
    assert worst(changes_read(tiny_base, tmp_path / "x.safetensors"), wanted) < 1e-5


def test_dora_by_columns_is_refused_in_one_line(tiny_base, subject, tmp_path):
    other_program_s(tiny_base, tmp_path / "x.safetensors", shape=(1, -1))
    assert "DoRA by columns, which is not read" in describe(tmp_path / "x.safetensors")["kind"]
    with pytest.raises(UserError, match=r"x.safetensors holds DoRA by the columns of W \(lora_unet.*dora_scale \(1, "):
        subject.load_adapter(tmp_path / "x.safetensors")


def test_dora_for_some_layers_alone_is_refused_in_one_line(tiny_base, subject, tmp_path):
    other_program_s(tiny_base, tmp_path / "x.safetensors")
    tensors = load_file(tmp_path / "x.safetensors")
    del tensors[next(key for key in tensors if key.endswith(".dora_scale"))]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="holds DoRA for some layers of its unet alone"):
        subject.load_adapter(tmp_path / "x.safetensors")
