"""Adapter files of honest programs: what they mean in diffusers they mean here, beside others too."""

import numpy as np
import pytest
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from dreambooth_moslora.export import PUBLISHED_NAME, adapter_facts, publish
from dreambooth_moslora.moslora import ATTENTION_PROJECTIONS, MoSLoraConfig, inject
from dreambooth_moslora.pipeline import SubjectPipeline
from tests.test_moslora import shake
from tests.test_moslora_models import PROJECTIONS
from tests.test_pipeline import differs, picture
from tests.tiny_adapters import base_bytes, random_lora


@pytest.fixture(scope="module")
def state(tiny_base):
    """A good LoRA in PEFT's naming."""
    return good_state(tiny_base)


@pytest.fixture
def subject(tiny_base):
    return SubjectPipeline.from_base(tiny_base)


def good_state(base):
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    return {f"unet.{key}": value for key, value in random_lora(unet, seed=1).items()}


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
    publish(components, folder, "dog", adapter_facts(components, base_id="tiny"))
    return folder / PUBLISHED_NAME


def save_kohya_of_ours(base, folder):
    return save_published(base, folder).with_name("dog.kohya.safetensors")


def save_dora(base, folder):
    return save_published(base, folder, use_dora=True)


def save_several_ranks(base, folder):
    return save_published(base, folder, rank_pattern={"to_k": 2, "attn1.to_v": 6}, alpha_pattern={"to_q": 3})


HONEST = [save_published, save_kohya_of_ours, save_dora, save_several_ranks]


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
