"""The base model: names, loading, and what its UNet reads."""

import copy

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from dreambooth_moslora.base import decode, load
from dreambooth_moslora.core import UserError
from dreambooth_moslora.training.prepare import noise_schedule


@pytest.fixture(scope="module")
def pipeline(tiny_base):
    return load.load_pipeline(tiny_base)


def test_a_hub_id_with_a_dot_is_not_taken_for_a_path():
    assert load.resolve_base("stabilityai/stable-diffusion-xl-base-1.0") == "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "models/base.safetensors", "base.safetensors"])
def test_a_missing_path_is_named(name):
    with pytest.raises(UserError, match="does not exist"):
        load.resolve_base(name)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match="no model_index"):
        load.load_pipeline(tmp_path)


def test_an_unreachable_hub_id_is_one_line():
    with pytest.raises(UserError) as error:
        load.load_pipeline("nobody/no-such-model")
    assert "nobody/no-such-model" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="odd"):
        load.load_pipeline(tmp_path / "odd.safetensors")


def test_everything_is_frozen_and_in_the_asked_dtype(tiny_base):
    pipeline = load.load_pipeline(tiny_base, dtype=torch.bfloat16)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        assert part.dtype == torch.bfloat16 and not part.training
        assert not any(p.requires_grad for p in part.parameters())


def test_default_resolution_is_the_unets_own(pipeline):
    assert load.default_resolution(pipeline) == 64


def test_text_equals_what_the_pipeline_itself_encodes(pipeline):
    prompts = ["a photo of sks dog", "a dog"]
    cond = load.encode_text(pipeline, prompts)
    embeds, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    assert cond.embeds.shape == (2, 77, 48) and cond.pooled.shape == (2, 32)
    assert torch.equal(cond.embeds, embeds) and torch.equal(cond.pooled, pooled)


def test_the_empty_prompt_is_the_pipelines_own_unconditional(pipeline):
    for force_zeros in (True, False):
        pipeline.register_to_config(force_zeros_for_empty_prompt=force_zeros)
        cond = load.encode_text(pipeline, ["", "a dog"])
        embeds, nothing, pooled, pooled_nothing = pipeline.encode_prompt(["a dog"], negative_prompt=None)
        assert torch.allclose(cond.embeds, torch.cat([nothing, embeds]), atol=1e-5)
        assert torch.allclose(cond.pooled, torch.cat([pooled_nothing, pooled]), atol=1e-5)
        assert bool(cond.embeds[0].any()) is not force_zeros


def test_latents_are_the_scaled_posterior_mean(pipeline):
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    latents = load.encode_image(pipeline.vae, pixels)
    assert latents.shape == (2, 4, 8, 8)
    with torch.no_grad():
        assert torch.allclose(latents, 0.5 * pipeline.vae.encode(pixels).latent_dist.mean, atol=1e-6)


def test_published_latent_statistics_are_used(pipeline):
    pixels = torch.rand(1, 3, 64, 64)
    plain = load.encode_image(pipeline.vae, pixels)
    vae = copy.deepcopy(pipeline.vae)
    vae.register_to_config(latents_mean=[1.0] * 4, latents_std=[2.0] * 4)
    assert torch.allclose(load.encode_image(vae, pixels), (plain / 0.5 - 1) / 2 * 0.5, atol=1e-6)


def overflowing_vae(tiny_base, dtype):
    """A VAE whose activations pass 65504, the largest fp16 number, but not the largest fp32 number."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_base)
    with torch.no_grad():
        pipeline.vae.encoder.conv_in.weight.mul_(1e6)
    return pipeline.vae.to(dtype)


def test_nan_of_an_fp16_vae_is_answered_with_fp32(tiny_base, caplog):
    pixels = torch.rand(1, 3, 64, 64)
    vae = overflowing_vae(tiny_base, torch.float32).half()
    vae.encoder.conv_in.weight.data.fill_(6e4)
    latents = load.encode_image(vae, pixels)
    assert latents.isfinite().all() and vae.dtype == torch.float32
    assert "float32" in caplog.text


def test_a_broken_vae_is_refused(tiny_base):
    vae = overflowing_vae(tiny_base, torch.float32)
    vae.encoder.conv_in.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="VAE"):
        load.encode_image(vae, torch.rand(1, 3, 64, 64))


def test_architecture_tells_bases_apart(pipeline):
    facts = load.architecture(pipeline.unet)
    assert facts["block_out_channels"] == [8, 16, 32] and facts["cross_attention_dim"] == 48


def test_decoding_undoes_the_latents_scale(pipeline):
    latents = torch.randn(2, 4, 8, 8) * 0.5
    pictures = decode.decode_image(pipeline.vae, latents)
    with torch.no_grad():
        truth = pipeline.image_processor.postprocess(pipeline.vae.decode(latents / 0.5).sample, output_type="pil")
    assert [p.size for p in pictures] == [(64, 64)] * 2
    for ours, theirs in zip(pictures, truth):
        difference = torch.tensor(list(ours.tobytes())).int() - torch.tensor(list(theirs.tobytes())).int()
        assert difference.abs().max() <= 1


def test_a_picture_that_is_not_finite_is_said(tiny_base, caplog):
    vae = StableDiffusionXLPipeline.from_pretrained(tiny_base).vae.half()
    assert decode.decode_image(vae, torch.zeros(1, 4, 8, 8)) and not caplog.text
    (picture,) = decode.decode_image(vae, torch.full((1, 4, 8, 8), float("nan")))
    assert picture.getextrema() == ((0, 0),) * 3 and "not finite (NaN)" in caplog.text
    assert vae.dtype == torch.float16  # it is not to blame


def test_the_vae_can_keep_a_finer_dtype_than_the_rest(tiny_base):
    exact = StableDiffusionXLPipeline.from_pretrained(tiny_base).vae.decoder.conv_in.weight
    pipeline = load.load_pipeline(tiny_base, dtype=torch.bfloat16, vae_dtype=torch.float32)
    assert pipeline.unet.dtype == torch.bfloat16
    assert torch.equal(pipeline.vae.decoder.conv_in.weight, exact)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_unet_answers_almost_as_the_dense_one(tiny_base, kind):
    dense, small = load.load_pipeline(tiny_base), load.load_pipeline(tiny_base)
    load.quantize(small.unet, kind, torch.float32)
    cond = load.encode_text(dense, ["a dog"])
    inputs = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), 500, cond.embeds)
    extra = {"text_embeds": cond.pooled, "time_ids": torch.full((1, 6), 64.0)}
    with torch.no_grad():
        a, b = (p.unet(*inputs, added_cond_kwargs=extra).sample for p in (dense, small))
    assert 0 < (a - b).norm() / a.norm() < 0.3


def test_the_noise_schedule_is_the_schedulers_own(pipeline):
    schedule = noise_schedule(pipeline.scheduler)
    assert len(schedule) == 1000 and (schedule.style, schedule.prediction_type) == ("ddpm", "epsilon")
    assert torch.allclose(schedule.sigmas, (1 / pipeline.scheduler.alphas_cumprod - 1).sqrt(), rtol=1e-4)


def test_an_edm_base_trains_in_edm_style():
    from diffusers import EDMEulerScheduler

    schedule = noise_schedule(EDMEulerScheduler())
    assert (schedule.style, schedule.sigma_data) == ("edm", 0.5) and len(schedule.sigmas) == len(schedule.timesteps)


def test_a_zero_terminal_snr_base_keeps_its_pure_noise():
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert noise_schedule(scheduler).sigmas[-1].isinf()
    assert noise_schedule(scheduler, edm_style=True).sigmas.isfinite().all()
