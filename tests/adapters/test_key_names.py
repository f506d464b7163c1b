"""LoHa, LoKr, floats of eight bits, and names that diffusers does not read: the ΔW that their definition says."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from dreambooth_moslora.adapters import key_names
from dreambooth_moslora.adapters.kohya_file import kohya_name
from dreambooth_moslora.adapters.proof import relative_difference
from dreambooth_moslora.core import UserError
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from tests.adapters.test_lora_file import changes
from tests.generation.test_pipeline import picture
from tests.helpers.live_adapters import CONVOLUTIONS
from tests.helpers.tiny_adapters import save_kohya_lora

ALPHA = 3.0
KINDS = {
    "LoHa": LoHaConfig(r=2, alpha=ALPHA, target_modules=["to_q"]),
    "LoHa of a high rank": LoHaConfig(r=8, alpha=ALPHA, target_modules=["to_q", "to_k"]),
    "LoHa of convolutions": LoHaConfig(r=2, alpha=ALPHA, target_modules=CONVOLUTIONS),
    "LoHa with cores": LoHaConfig(r=2, alpha=ALPHA, target_modules=CONVOLUTIONS, use_effective_conv2d=True),
    "LoKr": LoKrConfig(r=2, alpha=ALPHA, target_modules=["to_q"], decompose_factor=4),
    "LoKr of two products": LoKrConfig(r=1, alpha=ALPHA, target_modules=["to_k"], decompose_both=True),
    "LoKr of convolutions": LoKrConfig(r=2, alpha=ALPHA, target_modules=CONVOLUTIONS),
    "LoKr with cores": LoKrConfig(r=2, alpha=ALPHA, target_modules=CONVOLUTIONS, use_effective_conv2d=True),
    "LoKr of whole matrices": LoKrConfig(r=64, alpha=64, target_modules=["to_q"]),
}


def shaken(unet, config):
    model, generator = get_peft_model(unet, config), torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def as_lycoris(base, file, config, prefix="lycoris") -> dict[str, torch.Tensor]:
    """Write what PEFT's own layers hold under the names of LyCORIS; returns the ΔW that PEFT computes from them. Two
    whole matrices have no scale in LyCORIS."""
    model, tensors, wanted = shaken(UNet2DConditionModel.from_pretrained(base, subfolder="unet"), config), {}, {}
    for path, layer in model.base_model.model.named_modules():
        if hasattr(layer, "adapter_layer_names") and "default" in layer.scaling:
            is_whole = all("default" in getattr(layer, part, ()) for part in ("lokr_w1", "lokr_w2"))
            wanted[f"unet.{path}"] = layer.get_delta_weight("default").detach() / (
                layer.scaling["default"] if is_whole else 1
            )
            name = f"{prefix}_{path.replace('.', '_')}"
            tensors[f"{name}.alpha"] = torch.tensor(float(config.alpha))
            for kind in layer.adapter_layer_names:
                if "default" in getattr(layer, kind):
                    tensors[f"{name}.{kind}"] = getattr(layer, kind)["default"].detach().contiguous()
    save_file(tensors, file)
    return wanted


def of_file(base, file) -> dict[str, torch.Tensor]:
    """The changes of the base by a file."""
    subject = SubjectPipeline.from_base(base)
    subject.activate(((subject.load_adapter(file), 1.0),))
    return changes(subject.pipeline)


def worst(found, wanted) -> float:
    assert found.keys() == wanted.keys() and found
    return max(relative_difference(found[name], change) for name, change in wanted.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_lycoris_changes_each_weight_as_its_definition_says(kind, tiny_base, tmp_path):
    wanted = as_lycoris(tiny_base, tmp_path / "x.safetensors", KINDS[kind], "lora_unet" if "two" in kind else "lycoris")
    assert worst(of_file(tiny_base, tmp_path / "x.safetensors"), wanted) < 1e-5


RENAMED = {
    "lycoris": lambda component, path: f"lycoris_{path.replace('.', '_')}",
    "PEFT": lambda component, path: f"base_model.model.{path}",
    "bare": lambda component, path: path,
    "dotted": lambda component, path: f"{component}.{path}",
}


@pytest.mark.parametrize("name", RENAMED)
def test_a_file_with_other_names_is_the_same_adapter(name, tiny_base, state, tmp_path):
    """Its alpha is not the rank."""
    kohya, other = {}, {}
    for key, tensor in state.items():
        component, _, rest = key.partition(".")
        path, side = rest.removesuffix(".weight").rsplit(".", 1)
        part = "lora_down.weight" if side == "lora_A" else "lora_up.weight"
        for names, written in ((kohya, kohya_name(component, path)), (other, RENAMED[name](component, path))):
            names |= {f"{written}.{part}": tensor, f"{written}.alpha": torch.tensor(3.0)}
    save_file(kohya, tmp_path / "kohya.safetensors")
    save_file(other, tmp_path / "other.safetensors")
    assert (
        worst(of_file(tiny_base, tmp_path / "other.safetensors"), of_file(tiny_base, tmp_path / "kohya.safetensors"))
        < 1e-6
    )


def test_loha_under_the_names_of_sdxl_s_original_blocks_is_read(tiny_base, tmp_path):
    wanted = as_lycoris(tiny_base, tmp_path / "x.safetensors", KINDS["LoHa"], "lora_unet")
    tensors = load_file(tmp_path / "x.safetensors")
    original = {key.replace("mid_block_attentions_0", "middle_block_1"): tensor for key, tensor in tensors.items()}
    save_file(original, tmp_path / "x.safetensors")
    assert original.keys() != tensors.keys() and worst(of_file(tiny_base, tmp_path / "x.safetensors"), wanted) < 1e-5


def test_what_peft_saves_is_read_with_its_settings(tiny_base, tmp_path):
    """Of the second text encoder, whose names the first has too."""
    text = SubjectPipeline.from_base(tiny_base).pipeline.text_encoder_2
    config = LoraConfig(r=4, lora_alpha=9, target_modules=["q_proj"], alpha_pattern={"layers.1.self_attn.q_proj": 2})
    model = shaken(text, config)
    model.save_pretrained(tmp_path)
    wanted = {
        f"text_encoder_2.{path}": layer.get_delta_weight("default").detach()
        for path, layer in model.base_model.model.named_modules()
        if path.endswith("q_proj")
    }
    assert worst(of_file(tiny_base, tmp_path / "adapter_model.safetensors"), wanted) < 1e-6


def test_floats_of_eight_bits_are_cast(tiny_base, state, subject, tmp_path):
    """Also where kohya's names go on to diffusers."""
    short = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in state.items()}
    save_file(short, tmp_path / "short.safetensors")
    save_file({key: tensor.float() for key, tensor in short.items()}, tmp_path / "long.safetensors")
    drawn = {}
    for name in ("short", "long"):
        subject.load_adapter(tmp_path / f"{name}.safetensors", name)
        drawn[name] = picture(subject, adapters=((name, 1.0),))
    assert (drawn["short"] == drawn["long"]).all() and (drawn["short"] != picture(subject)).any()


def test_new_tokens_in_the_file_are_left_out_and_named(tiny_base, subject, tmp_path, caplog):
    file = save_kohya_lora(subject.pipeline.unet, tmp_path / "x.safetensors")
    wanted = of_file(tiny_base, file)
    save_file(load_file(file) | {"bundle_emb.sks.clip_l": torch.ones(1, 16)}, file)
    assert worst(of_file(tiny_base, file), wanted) == 0
    assert "x.safetensors also holds new tokens (sks), which are not read from there" in caplog.text


QUERY = "lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"


def refused(subject, folder, tensors, said):
    save_file(tensors, folder / "x.safetensors")
    with pytest.raises(UserError, match=said):
        subject.load_adapter(folder / "x.safetensors")


def test_what_is_broken_or_of_another_base_is_refused_in_one_line(subject, tmp_path):
    pair = {f"{QUERY}.lokr_w1": torch.ones(4, 4), f"{QUERY}.lokr_w2": torch.ones(2, 2)}
    misfit = r"x.safetensors is broken, or was made for another base: unet.*attn1.to_q is \d+×\d+ \(out×in\) here"
    refused(subject, tmp_path, pair, misfit)
    refused(subject, tmp_path, {f"{QUERY}.lokr_w1": torch.ones(4, 4)}, misfit)
    huge = {f"{QUERY}.lokr_w1": torch.ones(10**6, 1), f"{QUERY}.lokr_w2": torch.ones(1, 10**6)}
    refused(subject, tmp_path, huge, misfit)
    core = {"lokr_t2": torch.ones(1, 1, 1, 1), "lokr_w2_a": torch.ones(1, 10**5), "lokr_w2_b": torch.ones(1, 10**5)}
    parts = {"lokr_w1": torch.ones(1, 1), "alpha": torch.ones(1)} | core
    refused(subject, tmp_path, {f"{QUERY}.{part}": tensor for part, tensor in parts.items()}, misfit)
    refused(subject, tmp_path, {"lycoris_nowhere.lokr_w1": torch.ones(4, 4)}, "'lycoris_nowhere' is no layer of it")
    refused(subject, tmp_path, pair | {f"{QUERY}.lokr_w1": torch.ones(4, 4).int()}, misfit)


def test_a_file_that_would_be_too_large_as_a_lora_is_refused(tiny_base, subject, tmp_path, monkeypatch):
    monkeypatch.setattr(key_names, "MOST_NUMBERS", 1000)
    as_lycoris(tiny_base, tmp_path / "x.safetensors", KINDS["LoKr"])
    with pytest.raises(UserError, match=r"would be a LoRA of more than .* GiB, as"):
        subject.load_adapter(tmp_path / "x.safetensors")


def test_settings_beside_the_file_are_checked_like_those_in_a_header(subject, tmp_path):
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    width = subject.pipeline.unet.get_submodule(path).in_features
    pair = {"lora_A.weight": torch.ones(2, width), "lora_B.weight": torch.ones(width, 2)}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": "four"}))
    refused(
        subject,
        tmp_path,
        {f"base_model.model.{path}.{part}": tensor for part, tensor in pair.items()},
        "an alpha of 'four'",
    )
