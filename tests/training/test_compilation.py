"""Compiled blocks of families whose rotary embeddings are complex numbers: they are real when
compiled, and nothing else changes."""

import pytest
import torch

from dreambooth_moslora.base.families import Family, build_encoding_options, build_family
from dreambooth_moslora.base.quantization import quantize
from dreambooth_moslora.method.fast_linear import WorkingCopies, enable_fast_path
from dreambooth_moslora.method.moslora import MoSLoraConfig, inject, list_adapter_parameters
from dreambooth_moslora.training import compilation
from tests.helpers.tiny_families import TINY_FAMILIES, tiny_pipeline

TURNING = ("z_image", "qwen_image", "qwen_image21", "lumina2")
"""Families with complex numbers in their blocks."""


def compute_gradients(
    family: Family, denoiser: torch.nn.Module, conditioning: dict
) -> list[torch.Tensor]:
    """The prediction (2, C, 8, 8), and its gradients: the latents' and the adapter's."""
    draws = torch.Generator().manual_seed(1)
    z = torch.randn(2, denoiser.config.in_channels, 8, 8, generator=draws)
    if family.facts.name == "qwen_image":  # which packs four places into a token
        z = z.reshape(2, -1, 16, 16)
    z.requires_grad_()
    copies = WorkingCopies(denoiser)
    with copies.attach_copies() as step:
        prediction = family.predict(denoiser, z, torch.tensor([300.0, 700.0]), None, **conditioning)
        prediction.square().mean().backward()
        step.collect()
    adapter_gradients = [weight.grad for _, weight in list_adapter_parameters(denoiser)]
    denoiser.zero_grad()
    return [prediction.detach(), z.grad, *adapter_gradients]


def test_a_turn_in_real_numbers_is_the_complex_one():
    """The product, and the gradient."""
    draws = torch.Generator().manual_seed(0)
    pairs = torch.randn(2, 5, 3, 8, 2, generator=draws, requires_grad=True)
    angles = torch.rand(2, 5, 1, 8, generator=draws) * 100
    turns = torch.polar(torch.ones_like(angles), angles)
    rotated, expected = (
        turn(pairs, turns) for turn in (compilation.rotate_real, compilation.rotate_complex)
    )
    assert (rotated - expected).norm() <= 1e-6 * expected.norm()
    weights = torch.randn(rotated.shape, generator=draws)
    gradient, expected_gradient = (
        torch.autograd.grad(turn, pairs, weights)[0] for turn in (rotated, expected)
    )
    assert (gradient - expected_gradient).norm() <= 1e-6 * expected_gradient.norm()


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("name", TURNING)
def test_compiled_blocks_rotate_in_reals_with_equal_gradients(
    name, quantization, tmp_path, monkeypatch
):
    # A family with an adapter that does something.
    pipe, row = tiny_pipeline(name, tmp_path), TINY_FAMILIES[name]
    family = build_family(pipe, options=build_encoding_options(row.settings) | row.instructed)
    with torch.no_grad():
        conditioning = family.collate(family.encode_prompts(pipe, list(row.prompts)))
    denoiser = pipe.transformer.train()
    quantize(denoiser, quantization, torch.float32)
    inject(denoiser, MoSLoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"]))
    with torch.no_grad():
        for _, weight in list_adapter_parameters(denoiser):
            weight.add_(0.1 * torch.randn_like(weight))
    assert enable_fast_path(denoiser)
    plain = compute_gradients(family, denoiser, conditioning)

    # Traced and differentiated ahead of time: inductor takes minutes.
    traced = []

    def eager(graph, inputs):
        traced.append(graph.code)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(compilation, "BACKEND", eager)
    torch._dynamo.reset()
    compilation.compile_blocks(denoiser)
    real = compute_gradients(family, denoiser, conditioning)
    assert any("view_as_real" in code for code in traced)
    assert not any("view_as_complex" in code for code in traced)
    for gradient, expected_gradient in zip(real, plain, strict=True):
        assert (gradient - expected_gradient).norm() <= 5e-6 * expected_gradient.norm()
