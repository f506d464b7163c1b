"""Adapter files of honest programs: what they mean in diffusers they mean here, beside others too."""

import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from dreambooth_moslora.adapters.export import publish
from dreambooth_moslora.adapters.moslora import ATTENTION_PROJECTIONS, MoSLoraConfig, inject
from dreambooth_moslora.adapters.raw_file import adapter_metadata
from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from tests.adapters.test_moslora import shake
from tests.adapters.test_moslora_models import PROJECTIONS
from tests.generation.test_pipeline import differs, picture
from tests.helpers.tiny_adapters import base_bytes, save_kohya_lora


def loaded(subject, path, name="x"):
    subject.load_adapter(path, name)
    return subject


def save_published(base, folder, **options):
    """Our own two files of an adapter on the UNet and both text encoders; returns diffusers' one."""
    pipeline = SubjectPipeline.from_base(base).pipeline
    components = {name: getattr(pipeline, name) for name in ("unet", "text_encoder", "text_encoder_2")}
    for name, model in components.items():
        targets = list(ATTENTION_PROJECTIONS) if name == "unet" else PROJECTIONS
        inject(model, MoSLoraConfig(r=4, lora_alpha=11, target_modules=targets, **options))
        shake(model)
    publish(components, folder, "dog", adapter_metadata(components, base_id="tiny"))
    return folder / PUBLISHED_NAME


def save_kohya_of_ours(base, folder):
    return save_published(base, folder).with_name("dog.kohya.safetensors")


def save_dora(base, folder):
    return save_published(base, folder, use_dora=True)


def save_several_ranks(base, folder):
    return save_published(base, folder, rank_pattern={"to_k": 2, "attn1.to_v": 6}, alpha_pattern={"to_q": 3})


def save_peft(base, folder, **options):
    """As diffusers writes it, with PEFT's settings in the header."""
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    config = LoraConfig(r=4, lora_alpha=9, target_modules=list(ATTENTION_PROJECTIONS), **options)
    unet.add_adapter(config)
    generator = torch.Generator().manual_seed(0)
    state = {k: torch.randn(v.shape, generator=generator) * 0.3 for k, v in get_peft_model_state_dict(unet).items()}
    own = {f"unet.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    header = {"lora_adapter_metadata": json.dumps(own, default=str)}
    save_file({f"unet.{k}": v for k, v in state.items()}, folder / "x.safetensors", header)
    return folder / "x.safetensors"


def save_peft_patterns(base, folder):
    patterns = {"rank_pattern": {"to_k": 2, "attn1.to_v": 6}, "alpha_pattern": {"attn1.to_q": 3, "to_q": 5, "^no": 1}}
    return save_peft(base, folder, use_rslora=True, **patterns)


def save_peft_bias(base, folder):
    return save_peft(base, folder, lora_bias=True)


def save_kohya(base, folder):
    """With one alpha that is not the rank."""
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    tensors = load_file(save_kohya_lora(unet, folder / "x.safetensors"))
    save_file({k: t * 0 + 3 if k.endswith("alpha") else t for k, t in tensors.items()}, folder / "x.safetensors")
    return folder / "x.safetensors"


HONEST = [
    save_published,
    save_kohya_of_ours,
    save_dora,
    save_several_ranks,
    save_peft,
    save_peft_patterns,
    save_peft_bias,
    save_kohya,
]


@pytest.mark.parametrize("save", HONEST)
def test_an_honest_file_computes_what_diffusers_computes(save, tiny_base, subject, tmp_path):
    """Also beside another adapter, and the base is as before when it has gone."""
    file, stock = save(tiny_base, tmp_path), SubjectPipeline.from_base(tiny_base)
    stock.pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    bare, before = picture(subject), base_bytes(subject.pipeline)
    mine = picture(loaded(subject, file), adapters=(("x", 1.0),))
    assert np.array_equal(mine, picture(stock)) and differs(mine, bare)
    assert np.array_equal(picture(subject), bare)
    subject.unload_adapter("x")
    assert np.array_equal(picture(subject), bare) and base_bytes(subject.pipeline) == before


def test_an_adapter_of_the_text_encoder_alone_works_beside_others(tiny_base, state, subject, tmp_path):
    tensors = load_file(save_published(tiny_base, tmp_path))
    save_file({k: t for k, t in tensors.items() if k.startswith("text_encoder.")}, tmp_path / "words.safetensors")
    save_file(state, tmp_path / "dog.safetensors")
    bare = picture(subject)
    words = picture(loaded(subject, tmp_path / "words.safetensors", "words"), adapters=(("words", 1.0),))
    dog = picture(loaded(subject, tmp_path / "dog.safetensors", "dog"), adapters=(("dog", 1.0),))
    assert differs(words, bare) and differs(dog, words)
    assert np.array_equal(picture(subject), bare)
    assert np.array_equal(picture(subject, adapters=(("words", 1.0),)), words)
    assert np.array_equal(picture(subject, adapters=(("dog", 1.0),)), dog)
    fresh = loaded(SubjectPipeline.from_base(tiny_base), tmp_path / "dog.safetensors", "dog")
    assert np.array_equal(picture(fresh, adapters=(("dog", 1.0),)), dog)


def test_every_alpha_of_a_kohya_file_counts(tiny_base, subject, tmp_path):
    """diffusers gives all attention projections the commonest one."""
    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    tensors = load_file(save_kohya_lora(unet, tmp_path / "a.safetensors"))
    folded = {}
    for number, key in enumerate(k for k in list(tensors) if k.endswith(".alpha")):
        up = key.replace(".alpha", ".lora_up.weight")
        folded |= {key: tensors[key], up: tensors[up] * 2.0 ** (number % 3)}
        tensors[key] = tensors[key] * 2.0 ** (number % 3)
    save_file(tensors, tmp_path / "alphas.safetensors")
    save_file(tensors | folded, tmp_path / "folded.safetensors")
    for name in ("alphas", "folded"):
        subject.load_adapter(tmp_path / f"{name}.safetensors")
    assert not differs(*(picture(subject, adapters=((name, 1.0),)) for name in ("alphas", "folded")))
