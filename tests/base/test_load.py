"""The base model: names, loading, quantising, encoding and decoding, and what its UNet reads."""

import copy

import pytest
import torch
from bitsandbytes import nn as bnb
from diffusers import EDMEulerScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from peft import LoraConfig
from peft.tuners.lora import bnb as peft_bnb
from safetensors.torch import save_file
from torch import nn

from dreambooth_moslora.adapters.moslora import inject
from dreambooth_moslora.base import decode, load, machine
from dreambooth_moslora.core import UserError
from dreambooth_moslora.training.prepare import noise_schedule
from tests.helpers.texts import embeds_of, pooled_of


@pytest.fixture(scope="module")
def pipeline(tiny_base):
    return load.load_pipeline(tiny_base)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./nowhere", "does not exist"),
        ("/no/such/folder", "does not exist"),
        ("models/base.safetensors", "does not exist"),
        ("base.safetensors", "does not exist"),
        ("{here}", "no model_index"),
        ("{here}/odd.safetensors", "odd"),
        ("nobody/no-such-model", "nobody/no-such-model"),
    ],
)
def test_what_is_no_base_is_one_line(name, said, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=said) as error:
        load.load_pipeline(name.format(here=tmp_path))
    assert "\n" not in str(error.value)


def test_names(pipeline):
    """A hub id with a dot is not taken for a path."""
    sdxl = "stabilityai/stable-diffusion-xl-base-1.0"
    assert load.resolve_base(sdxl) == sdxl
    facts = load.architecture(pipeline.unet)
    assert facts["block_out_channels"] == [8, 16, 32] and facts["cross_attention_dim"] == 48
    assert load.default_resolution(pipeline) == 64


def test_everything_is_frozen_and_in_the_asked_dtype(tiny_base):
    """The VAE can keep a finer one."""
    pipeline = load.load_pipeline(tiny_base, dtype=torch.bfloat16)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        assert part.dtype == torch.bfloat16 and not part.training
        assert not any(p.requires_grad for p in part.parameters())
    exact = StableDiffusionXLPipeline.from_pretrained(tiny_base).vae.decoder.conv_in.weight
    pipeline = load.load_pipeline(tiny_base, dtype=torch.bfloat16, vae_dtype=torch.float32)
    assert pipeline.unet.dtype == torch.bfloat16
    assert torch.equal(pipeline.vae.decoder.conv_in.weight, exact)


def test_text_equals_what_the_pipeline_itself_encodes(pipeline):
    """The empty prompt is its own unconditional one."""
    for force_zeros in (True, False):
        pipeline.register_to_config(force_zeros_for_empty_prompt=force_zeros)
        texts = load.encode_text(pipeline, ["", "a photo of sks dog"])
        found, found_pooled = embeds_of(texts), pooled_of(texts)
        embeds, nothing, pooled, pooled_nothing = pipeline.encode_prompt(["a photo of sks dog"], negative_prompt=None)
        assert found.shape == (2, 77, 48) and found_pooled.shape == (2, 32)
        assert torch.allclose(found, torch.cat([nothing, embeds]), atol=1e-5)
        assert torch.allclose(found_pooled, torch.cat([pooled_nothing, pooled]), atol=1e-5)
        assert bool(found[0].any()) is not force_zeros


def test_latents_are_the_scaled_posterior_mean(pipeline):
    """Statistics that the base publishes are used."""
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    latents = load.encode_image(pipeline.vae, pixels)
    assert latents.shape == (2, 4, 8, 8)
    with torch.no_grad():
        assert torch.allclose(latents, 0.5 * pipeline.vae.encode(pixels).latent_dist.mean, atol=1e-6)
    vae = copy.deepcopy(pipeline.vae)
    vae.register_to_config(latents_mean=[1.0] * 4, latents_std=[2.0] * 4)
    assert torch.allclose(load.encode_image(vae, pixels), (latents / 0.5 - 1) / 2 * 0.5, atol=1e-6)


def test_nan_of_an_fp16_vae_is_answered_with_fp32(tiny_base, caplog):
    """Its activations pass 65504, the largest fp16 number, but not the largest fp32 number. A broken one is refused."""
    pixels, vae = torch.rand(1, 3, 64, 64), StableDiffusionXLPipeline.from_pretrained(tiny_base).vae.half()
    vae.encoder.conv_in.weight.data.fill_(6e4)
    assert load.encode_image(vae, pixels).isfinite().all()
    assert vae.dtype == torch.float32 and "float32" in caplog.text
    vae.encoder.conv_in.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="VAE"):
        load.encode_image(vae, pixels)


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


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_unet_answers_almost_as_the_dense_one(tiny_base, kind):
    dense, small = load.load_pipeline(tiny_base), load.load_pipeline(tiny_base)
    load.quantize(small.unet, kind, torch.float32)
    texts = load.encode_text(dense, ["a dog"])
    inputs = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), 500, embeds_of(texts))
    extra = {"text_embeds": pooled_of(texts), "time_ids": torch.full((1, 6), 64.0)}
    with torch.no_grad():
        a, b = (p.unet(*inputs, added_cond_kwargs=extra).sample for p in (dense, small))
    assert 0 < (a - b).norm() / a.norm() < 0.3


def test_the_noise_schedule_is_the_schedulers_own(pipeline):
    """An EDM base trains in EDM style; one of zero terminal SNR keeps its pure noise."""
    schedule = noise_schedule(pipeline.scheduler)
    assert len(schedule) == 1000 and (schedule.style, schedule.prediction_type) == ("ddpm", "epsilon")
    assert torch.allclose(schedule.sigmas, (1 / pipeline.scheduler.alphas_cumprod - 1).sqrt(), rtol=1e-4)
    edm = noise_schedule(EDMEulerScheduler())
    assert (edm.style, edm.sigma_data) == ("edm", 0.5) and len(edm.sigmas) == len(edm.timesteps)
    zero_snr = EulerDiscreteScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert noise_schedule(zero_snr).sigmas[-1].isinf()
    assert noise_schedule(zero_snr, edm_style=True).sigmas.isfinite().all()


class Unet(nn.Module):
    """One transformer block with projections of two widths, as SDXL's are named."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.conv_in = nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(width, width)})])
        self.transformer_blocks[0]["narrow"] = nn.Linear(width, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.transformer_blocks[0]["to_q"](self.conv_in(x))


KINDS = {"nf4": (bnb.Linear4bit, peft_bnb.Linear4bit), "int8": (bnb.Linear8bitLt, peft_bnb.Linear8bitLt)}


@pytest.mark.parametrize("kind", KINDS)
def test_only_projections_in_blocks_that_the_kernels_can_take_are_quantised(kind, caplog):
    """bitsandbytes' kernels for CPUs want blocks of 32 outputs. PEFT adapts the layer as a quantised one: its layer for
    dense weights would add the adapter's fp32 to the bf16 output, and round twice."""
    unet, before = Unet().to(torch.bfloat16).requires_grad_(False).eval(), torch.random.get_rng_state()
    assert load.quantize(unet, kind, torch.bfloat16) == 1
    assert torch.equal(torch.random.get_rng_state(), before), "drawn for weights that are thrown away"
    layers = unet.transformer_blocks[0]
    assert type(layers["to_q"]) is KINDS[kind][0]
    assert type(unet.conv_in) is nn.Linear and type(layers["narrow"]) is nn.Linear
    unet(torch.randn(3, 64, dtype=torch.bfloat16))
    assert not caplog.text
    inject(unet, LoraConfig(r=4, target_modules=["to_q"]))
    assert type(layers["to_q"]) is KINDS[kind][1]


def test_a_4_bit_layer_waits_where_the_dense_one_was(monkeypatch):
    """The device is for the text encoders and the VAE until training begins."""
    seen, move = [], bnb.Linear4bit.to
    monkeypatch.setattr(bnb.Linear4bit, "to", lambda self, device: seen.append(str(device)) or move(self, device))
    load.quantize(Unet(), "nf4", torch.float32, "cpu:0")
    assert seen == ["cpu:0", "cpu"]


@pytest.fixture
def vae(tiny_base):
    """Eight pixels a latent, as SDXL's; notes the shape of each decoded tensor."""
    vae = decode.load_vae_alone(tiny_base)
    vae.shapes = []
    vae.decoder.register_forward_pre_hook(lambda _, inputs: vae.shapes.append((len(inputs[0]), *inputs[0].shape[2:])))
    return vae


def free(monkeypatch, gib: float | None) -> None:
    monkeypatch.setattr(decode, "free_gib", lambda device: gib)


def test_one_latent_is_decoded_at_a_time(vae):
    latents = torch.randn(4, 4, 8, 8)
    pixels = decode.decode_pixels(vae, latents)
    assert vae.shapes == [(1, 8, 8)] * 4
    alone = [decode.decode_pixels(vae, one[None]) for one in latents]
    assert torch.equal(pixels, torch.cat(alone))


@pytest.mark.parametrize(("gib", "side", "is_tiled"), [(None, 128, 0), (20.0, 128, 0), (3.0, 128, 1), (2.0, 64, 0)])
def test_tiles_of_512_px_where_a_whole_picture_does_not_fit(vae, monkeypatch, gib, side, is_tiled):
    free(monkeypatch, gib)
    pixels = decode.decode_pixels(vae, torch.randn(1, 4, side, side))
    assert pixels.shape == (1, 3, 8 * side, 8 * side)
    assert max(side for _, *sides in vae.shapes for side in sides) == (64 if is_tiled else side)
    assert (len(vae.shapes) > 1) == bool(is_tiled) and not vae.use_tiling


def test_tiling_that_somebody_set_is_back_afterwards(vae, monkeypatch):
    free(monkeypatch, 1.0)
    vae.enable_tiling()
    with decode.tiled_where_short(vae, (1024, 1024), vae.device):
        assert vae.tile_latent_min_size == 64
    assert vae.use_tiling and vae.tile_latent_min_size == 8


def test_gpu_memory_counts_what_the_allocator_keeps_for_reuse(monkeypatch):
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * gib, 8 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 4 * gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * gib)
    assert machine.free_gib(torch.device("cuda")) == 5.0
    assert machine.free_gib(torch.device("cpu")) is None
