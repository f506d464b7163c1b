"""Pictures of other families are drawn with the options of encoding prompts that the adapter's run
had."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dreambooth_moslora.base.families import build_encoding_options, build_family, get_denoiser
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.image_params import GenerationParams
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.lora.metadata import AdapterMetadata, add_recipe
from dreambooth_moslora.settings.family_facts import FAMILIES, TEXT_OPTIONS
from dreambooth_moslora.settings.train_config import TrainConfig
from tests.helpers.tiny_families import tiny_pipeline

TOLD = {
    "max_sequence_length": 4,
    "text_encoder_out_layers": ("4", "5", "6"),
    "clip_skip": 2,
}
EIGHT_LAYERS = tuple("23456789")
"""FLUX 3's transformer reads the states of eight layers."""
NAMES = [facts.name for facts in FAMILIES if facts.text_options]


@pytest.fixture(
    scope="module",
    params=[
        name if name == "z_image" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES
    ],
)
def subject(request, tmp_path_factory) -> SubjectPipeline:
    return SubjectPipeline(
        tiny_pipeline(request.param, tmp_path_factory.mktemp(request.param)), "tiny"
    )


def load_adapter(subject: SubjectPipeline, file: Path, **options) -> str:
    """The name of an adapter with random weights, whose file says what one of a run with these
    settings says."""
    layers = {
        path: layer
        for path, layer in get_denoiser(subject.pipeline).named_modules()
        if path.endswith("to_q")
    }
    random, tensors = torch.Generator().manual_seed(0), {}
    for path, layer in layers.items():
        sizes = {"lora_A": (1, layer.in_features), "lora_B": (layer.out_features, 1)}
        tensors |= {
            f"{subject.family.facts.denoiser}.{path}.{n}.weight": torch.randn(
                size, generator=random
            )
            for n, size in sizes.items()
        }
    save_file(
        tensors,
        file,
        add_recipe(TrainConfig(**options), AdapterMetadata(rank=1, alpha=1.0)).header,
    )
    return subject.load_adapter(file)


def generate(
    subject: SubjectPipeline, *adapters: str, negative_prompt: str = "", **options
) -> np.ndarray:
    sides = {"height_px": 64, "width_px": 64, "adapters": tuple((name, 1.0) for name in adapters)}
    params = GenerationParams(
        "a photo of sks dog", negative_prompt, steps=1, text_options=options, **sides
    )
    return np.asarray(subject.draw(params)[0].pixels)


@pytest.mark.parametrize("option", TEXT_OPTIONS)
def test_the_files_text_options_are_the_default(option, subject, tmp_path):
    facts, value = subject.family.facts, TOLD[option]
    if facts.name == "flux3" and option == "text_encoder_out_layers":
        value = EIGHT_LAYERS
    if option not in facts.text_options:
        with pytest.raises(UserError, match=f"--{option} is not for {facts.title}; leave it out"):
            generate(subject, **{option: value})
        return
    adapter = load_adapter(subject, tmp_path / "own.safetensors", **{option: value})
    plain = load_adapter(subject, tmp_path / "plain.safetensors")
    usual, expected = generate(subject, plain), generate(subject, plain, **{option: value})
    assert not np.array_equal(usual, expected) and np.array_equal(
        generate(subject, adapter, **{option: value}), expected
    )
    assert np.array_equal(generate(subject, adapter), expected)


def test_as_many_layers_are_read_as_the_transformer_is_wide(tmp_path):
    """diffusers' script takes any number of layers. The transformer may be loaded later."""
    pipe = tiny_pipeline("flux2", tmp_path)
    family = build_family(pipe, options={"text_encoder_out_layers": (9,)})
    pipe.transformer.register_to_config(joint_attention_dim=16)
    for transformer in (pipe.transformer, None):
        pipe.register_modules(transformer=transformer)
        (text,) = family.encode_prompts(pipe, ["a dog"])
        assert text["prompt_embeds"].shape[-1] == 16


@torch.no_grad()
def test_clip_skip_counts_layers_from_the_last(tmp_path):
    """2 is the last but one, as kohya counts."""
    pipe = tiny_pipeline("sd1", tmp_path)
    texts = {}
    for layer in (None, 1, 2):
        options = build_encoding_options({"clip_skip": layer})
        (text,) = build_family(pipe, options=options).encode_prompts(pipe, ["a dog"])
        texts[layer] = text["prompt_embeds"]
    tokens = pipe.tokenizer("a dog", padding="max_length", max_length=77, return_tensors="pt")
    encoder = pipe.text_encoder
    states = encoder(tokens.input_ids, output_hidden_states=True).hidden_states
    expected = getattr(encoder, "text_model", encoder).final_layer_norm(states[-2])[0]
    torch.testing.assert_close(texts[2], expected)
    torch.testing.assert_close(texts[1], texts[None])
    assert not torch.allclose(texts[2], texts[1])
