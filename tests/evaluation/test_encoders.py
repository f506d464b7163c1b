"""Encoders agree with transformers called directly, and a vector does not depend on its batch."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import normalize
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from dreambooth_moslora.core import UserError
from dreambooth_moslora.evaluation.metrics import Clip, Encoders, load_encoders
from tests.helpers.tiny import tiny_tokenizer
from tests.helpers.tiny_encoders import save_tiny_encoders

TEXTS = ["a dog", "a photo of a very small dog on a wide beach, at night", "cat " * 60]


def pictures(sizes=((64, 48), (40, 90), (32, 32), (51, 51))) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_tiny_encoders(tmp_path_factory.mktemp("encoders"))


def assert_close(ours: torch.Tensor, direct: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert (ours - normalize(direct.float(), dim=-1)).abs().max() < tolerance


def test_encoders_by_folder_agree_with_the_whole_clip_model(folders):
    """Against CLIPModel's own forward pass, one picture and text at a time."""
    encoders = load_encoders(clip=folders[0], dino=folders[1])
    clip, processor = CLIPModel.from_pretrained(folders[0]).eval(), CLIPImageProcessor.from_pretrained(folders[0])
    tokenizer = CLIPTokenizer.from_pretrained(folders[0])
    pixels = [processor(p, return_tensors="pt").pixel_values for p in pictures()]
    words = [tokenizer(t, truncation=True, max_length=77, return_tensors="pt").input_ids for t in TEXTS]
    with torch.no_grad():
        images = torch.cat([clip(pixel_values=x, input_ids=words[0]).image_embeds for x in pixels])
        texts = torch.cat([clip(pixel_values=pixels[0], input_ids=w).text_embeds for w in words])
    assert_close(encoders.clip_images(pictures()), images)
    assert_close(encoders.clip_texts(TEXTS), texts)


def test_dino_by_folder_agrees_with_the_class_token(folders):
    encoders = load_encoders(clip=folders[0], dino=folders[1])
    dino, processor = Dinov2Model.from_pretrained(folders[1]).eval(), AutoImageProcessor.from_pretrained(folders[1])
    with torch.no_grad():
        direct = [dino(processor(p, return_tensors="pt").pixel_values).pooler_output for p in pictures()]
    assert_close(encoders.dino_images(pictures()), torch.cat(direct))


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_vectors_are_units_and_do_not_depend_on_the_batch(folders, batch_size):
    encoders = load_encoders(clip=folders[0], dino=folders[1])
    whole = [encoders.clip_images(pictures()), encoders.dino_images(pictures()), encoders.clip_texts(TEXTS)]
    encoders.batch_size = batch_size
    parts = [encoders.clip_images(pictures()), encoders.dino_images(pictures()), encoders.clip_texts(TEXTS)]
    for a, b in zip(whole, parts):
        assert (a - b).abs().max() < 1e-5
        assert torch.allclose(a.norm(dim=-1), torch.ones(len(a)), atol=1e-5)


def test_an_encoder_that_is_not_there_is_one_clear_line(folders, tmp_path):
    with pytest.raises(UserError, match="cannot be loaded"):
        load_encoders(clip=tmp_path / "nowhere", dino=folders[1])


def test_another_model_is_no_encoder_with_made_up_weights(folders):
    with pytest.raises(UserError, match="is no CLIPModel: it has no "):
        load_encoders(clip=folders[1], dino=folders[1])
    with pytest.raises(UserError, match="reads not only pictures"):
        load_encoders(clip=folders[0], dino=folders[0])


def test_names_carry_no_path(folders):
    assert load_encoders(clip=folders[0], dino=folders[1]).names == ("clip", "dino")


@pytest.fixture(scope="module")
def full_size(tmp_path_factory) -> tuple[Encoders, nn.Module, nn.Module]:
    """CLIP ViT-L/14 and DINOv2-base as their configurations say, with random weights; and CLIP's two towers."""
    torch.manual_seed(0)
    size = {"height": 224, "width": 224}
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        image_size=224,
        projection_dim=768,
    )
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    text = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
        eos_token_id=tokenizer.eos_token_id,
    )
    towers = CLIPVisionModelWithProjection(vision).eval(), CLIPTextModelWithProjection(text).eval()
    clip = Clip(
        lambda pixels: towers[0](pixel_values=pixels).image_embeds,
        lambda words: towers[1](words.input_ids, attention_mask=words.attention_mask).text_embeds,
        tokenizer,
        CLIPImageProcessor(size={"shortest_edge": 224}, crop_size=size),
    )
    encoders = Encoders(
        clip,
        Dinov2Model(Dinov2Config(image_size=518, patch_size=14)).eval(),
        BitImageProcessor(size={"shortest_edge": 256}, crop_size=size),
        batch_size=2,
    )
    return encoders, *towers


@pytest.mark.slow
def test_full_size_architectures_agree_with_transformers_and_do_not_depend_on_the_batch(full_size):
    encoders, vision, text_tower = full_size
    some, clip = pictures()[:2], encoders.clip
    with torch.no_grad():
        images = torch.cat([vision(clip.processor(p, return_tensors="pt").pixel_values).image_embeds for p in some])
        views = [encoders.dino_processor(p, return_tensors="pt").pixel_values for p in some]
        dino = torch.cat([encoders.dino(v).last_hidden_state[:, 0] for v in views])
        words = [clip.tokenizer(t, truncation=True, max_length=77, return_tensors="pt").input_ids for t in TEXTS]
        text = torch.cat([text_tower(ids).text_embeds for ids in words])
    assert images.shape == (2, 768) and dino.shape == (2, 768) and text.shape == (3, 768)
    assert_close(encoders.clip_images(some), images)
    assert_close(encoders.dino_images(some), dino)
    assert_close(encoders.clip_texts(TEXTS), text)
