"""SubjectPipeline on the tiny base: same parameters, same pixels; adapters come, combine and go;
previews; a GPU with little memory; a base with zero terminal SNR."""

import json
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from diffusers import StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save

from dreambooth_moslora.base import devices, load
from dreambooth_moslora.disk.run_folder import RAW_NAME
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation import offload, previews, sampling
from dreambooth_moslora.generation.image_params import (
    SCHEDULERS,
    GenerationParams,
    Image,
    Provenance,
    Step,
    describe_black_images,
    read_recipe,
)
from dreambooth_moslora.generation.pipeline import SubjectPipeline, find_scheduler_name
from dreambooth_moslora.lora import raw_file, writer
from tests.helpers.live_adapters import facts_of, live
from tests.helpers.tiny import save_tiny_sdxl, tiny_sdxl
from tests.helpers.tiny_adapters import save_diffusers_lora, save_kohya_lora
from tests.helpers.tiny_families import tiny_pipeline

SIZES = {"height_px": 64, "width_px": 64}
PARAMS = GenerationParams("a photo of a sks dog", seed=3, steps=3, guidance_scale=4.0, **SIZES)
OTHER_DEVICE = "cpu:0"
"""Not the device named `cpu`, but with its memory: here models can really be moved, and draw."""


@pytest.fixture(scope="module")
def files(tiny_base, tmp_path_factory):
    """Two diffusers adapters, one of them also in kohya's form."""
    folder = tmp_path_factory.mktemp("adapters")
    unet = SubjectPipeline.from_base(tiny_base).pipeline.unet
    return {
        **{
            name: save_diffusers_lora(unet, folder / name, seed)
            for name, seed in (("dog", 1), ("cat", 2))
        },
        "dog_kohya": save_kohya_lora(unet, folder / "dog_kohya.safetensors", seed=1),
    }


@pytest.fixture(scope="module")
def pipeline(tiny_base, files):
    subject = SubjectPipeline.from_base(tiny_base)
    for name, file in files.items():
        subject.load_adapter(file, name)
    return subject


def generate_first(subject, params=PARAMS, **changes) -> np.ndarray:
    """The first one that is streamed."""
    images = [
        event for event in subject.generate(replace(params, **changes)) if isinstance(event, Image)
    ]
    return np.asarray(images[0].pixels)


def generate_with(subject, **scales) -> np.ndarray:
    return generate_first(subject, adapters=tuple(scales.items()))


def has_difference(a, b) -> bool:
    return bool(np.abs(a.astype(int) - b.astype(int)).max() > 2)


def test_an_image_does_not_depend_on_how_many_are_generated(
    pipeline,
):
    """Each step is reported with a preview, and the image follows the last step."""
    alone = [generate_first(pipeline, seed=PARAMS.seed + i) for i in range(2)]
    events = list(pipeline.generate(replace(PARAMS, num_images=2)))
    together = [np.asarray(event.pixels) for event in events if isinstance(event, Image)]
    assert all(
        np.array_equal(a, b) for a, b in zip(together, alone, strict=True)
    ) and has_difference(*together)
    kinds = [type(event) for event in events]
    assert kinds == [Step, previews.Preview] * 3 + [Image] + [Step, previews.Preview] * 3 + [Image]
    assert [(e.index, e.step, e.steps, e.num_images) for e in events if isinstance(e, Step)][3] == (
        1,
        1,
        3,
        2,
    )
    assert events[-3].eta_sec == 0
    assert {e.pixels.size for e in events if isinstance(e, Image | previews.Preview)} == {(64, 64)}


def test_the_png_reproduces_its_image_on_a_newly_loaded_base(pipeline, files, tiny_base, tmp_path):
    params = replace(
        PARAMS,
        adapters=(("dog", 0.7), ("cat", 0.2)),
        negative_prompt="blur",
        scheduler="dpmpp_2m_karras",
    )
    image = next(e for e in pipeline.generate(params) if isinstance(e, Image))
    recipe = read_recipe(image.save(tmp_path / "a.png"))
    assert dict(recipe.provenance.adapter_sha256)["dog"] == pipeline.adapters["dog"].sha256
    assert str(tmp_path) not in (tmp_path / "a.png").read_bytes().decode("latin1")
    fresh = SubjectPipeline.from_base(tiny_base)
    for name, _ in recipe.params.adapters:
        fresh.load_adapter(files[name], name)
    assert np.array_equal(generate_first(fresh, recipe.params), np.asarray(image.pixels))


def test_adapters_combine_and_switch_without_a_trace(pipeline, tiny_base):
    """Scale 0 and no adapter give the base's image bit for bit."""
    base = generate_first(SubjectPipeline.from_base(tiny_base))
    dog, cat, less = (
        generate_with(pipeline, **{n: scale})
        for n, scale in (("dog", 1.0), ("cat", 1.0), ("dog", 0.3))
    )
    combined = generate_with(pipeline, dog=1.0, cat=1.0)
    assert (
        has_difference(dog, cat)
        and has_difference(combined, dog)
        and has_difference(combined, cat)
        and has_difference(base, dog)
    )
    assert np.array_equal(generate_with(pipeline, dog=1.0, cat=0.0), dog)
    assert np.array_equal(generate_with(pipeline, dog=0.0), base) and np.array_equal(
        generate_first(pipeline), base
    )
    assert not has_difference(generate_with(pipeline, dog_kohya=1.0), dog)
    tagged = generate_first(pipeline, prompt=PARAMS.prompt + " <lora:dog:0.3>")
    assert has_difference(less, dog) and np.array_equal(tagged, less)


def test_scales_of_equal_files_add_up(tiny_base, files, tmp_path):
    subject = SubjectPipeline.from_base(tiny_base)
    subject.load_adapter(files["dog"])
    subject.load_adapter(shutil.copy(files["dog"], tmp_path / "rex.safetensors"))
    assert np.array_equal(
        generate_with(subject, dog=0.5, rex=0.25), generate_with(subject, dog=0.75)
    )
    assert np.array_equal(generate_with(subject, dog=0.5, rex=-0.5), generate_first(subject))


def test_each_scheduler_has_its_class_options_and_image(pipeline):
    base_scheduler = pipeline.pipeline.scheduler
    images = [generate_first(pipeline, scheduler=scheduler) for scheduler in SCHEDULERS]
    assert all(has_difference(a, b) for a, b in pairwise(images))
    assert pipeline.pipeline.scheduler is base_scheduler
    for name, expected in SCHEDULERS.items():
        scheduler_object = pipeline._build_scheduler(name)
        assert type(scheduler_object).__name__ == expected.class_name
        assert {key: scheduler_object.config[key] for key in expected.options} == expected.options
        assert (scheduler_object.config.beta_start, scheduler_object.config.beta_end) == (
            0.00085,
            0.012,
        )


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_preview_estimates_the_clean_latents(pipeline, name):
    scheduler = pipeline._build_scheduler(name)
    scheduler.set_timesteps(6)
    tracker = previews.PreviewTracker(scheduler)
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = scheduler.sigmas[0]
    alphas = 1 / (1 + scheduler.sigmas**2).sqrt()
    x = clean + sigma * noise if name == "euler" else (clean + sigma * noise) * alphas[0]
    for step, timestep in enumerate(scheduler.timesteps):
        if name != "euler":  # what is not clean is noise, also after more of it was added
            noise = (x - alphas[step] * clean) / (alphas[step] * scheduler.sigmas[step])
        x = scheduler.step(noise, timestep, x, return_dict=False)[0]
        estimate = tracker.estimate_clean_latents(step, x)
        assert (step == 0 and name == "euler") or torch.allclose(estimate, clean, atol=1e-3)


OWN_SCHEDULERS = [
    (diffusers.EulerDiscreteScheduler(), "euler"),
    (diffusers.EulerDiscreteScheduler(use_karras_sigmas=True), "euler"),
    (diffusers.FlowMatchEulerDiscreteScheduler(), "euler"),
    (diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True), "dpmpp_2m_karras"),
    (
        diffusers.DPMSolverMultistepScheduler(
            algorithm_type="sde-dpmsolver++", use_karras_sigmas=True
        ),
        "dpmpp_2m_sde_karras",
    ),
    (diffusers.DPMSolverMultistepScheduler(), None),
    (diffusers.PNDMScheduler(skip_prk_steps=True), None),
    (diffusers.HeunDiscreteScheduler(), None),
    (diffusers.LCMScheduler(), None),
    (diffusers.EulerAncestralDiscreteScheduler(), None),
    (diffusers.EDMDPMSolverMultistepScheduler(), None),
]


@pytest.mark.parametrize(
    ("base_scheduler", "name"), OWN_SCHEDULERS, ids=lambda value: type(value).__name__
)
def test_a_base_samples_with_its_scheduler_by_default(base_scheduler, name, tmp_path, tiny_base):
    """The PNG names it if it has a name here."""
    assert find_scheduler_name(base_scheduler) == name
    if "FlowMatch" in type(base_scheduler).__name__:
        return
    pipeline = load.load_pipeline(tiny_base)
    pipeline.scheduler = type(base_scheduler).from_config(
        {**pipeline.scheduler.config, **base_scheduler.config}
    )
    subject = SubjectPipeline(pipeline, "tiny")
    if "EDM" in type(base_scheduler).__name__:
        with pytest.raises(UserError, match="Euler does not know the noise levels"):
            subject.draw(replace(PARAMS, scheduler="euler"))
    *_, last, _, image = subject.generate(PARAMS)
    assert last.eta_sec == 0 and last.step == last.steps >= PARAMS.steps
    kind = SCHEDULERS[name].class_name if name else type(base_scheduler).__name__
    assert type(pipeline.scheduler).__name__ == kind and np.asarray(image.pixels).std() > 0
    recipe = read_recipe(image.save(tmp_path / "one.png"))
    assert recipe.params.scheduler == image.params.scheduler == name
    assert np.array_equal(generate_first(subject, recipe.params), np.asarray(image.pixels))


def test_noise_that_a_scheduler_adds_is_the_same_in_any_batch(tiny_base):
    pipeline = load.load_pipeline(tiny_base)
    pipeline.scheduler = SubjectPipeline(pipeline, "tiny")._build_scheduler("dpmpp_2m_sde_karras")
    encode = partial(load.SDXL_FAMILY.encode_prompts, pipeline)
    sampler = sampling.Sampler(pipeline, encode, 64, torch.device("cpu"), 4.0, inference_steps=4)
    requests = [sampling.SampleRequest("a dog", seed) for seed in range(3)]
    together, alone = list(sampler(requests, 3)), list(sampler(requests, 1))
    assert all(
        np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1 for a, b in zip(together, alone)
    )
    assert has_difference(np.asarray(alone[0]), np.asarray(alone[1]))


class LinearVae(torch.nn.Module):
    """Every latent is one 8 x 8 patch of one colour: the case that a linear map can meet
    exactly."""

    config, dtype = SimpleNamespace(latent_channels=4, scaling_factor=0.25), torch.float32

    def decode(self, latents):
        mix = torch.tensor([[0.1, 0.05, 0.0, 0.02], [0.0, 0.1, 0.05, 0.0], [0.03, 0.0, 0.02, 0.1]])
        colours = torch.einsum("rc,bchw->brhw", mix, latents) + 0.1
        return SimpleNamespace(sample=torch.nn.functional.interpolate(colours, scale_factor=8.0))


@pytest.mark.parametrize("statistics", [{}, {"latents_mean": [1.0] * 4, "latents_std": [8.0] * 4}])
def test_preview_colours_are_those_of_the_vae(statistics):
    """A VAE may state its latents' mean and deviation, as Playground v2.5's."""
    vae, latents = LinearVae(), previews.sample_smooth_latents(4, seed=7)
    vae.config = SimpleNamespace(latent_channels=4, scaling_factor=0.25, **statistics)
    mean, deviation = (1.0, 8.0) if statistics else (0.0, 1.0)
    decoded = vae.decode(latents / 0.25 * deviation + mean).sample[0, :, ::8, ::8]
    truth = (decoded / 2 + 0.5).clamp(0, 1) * 255
    preview = np.asarray(previews.LatentColours(vae)(latents, (32, 32))).astype(float)
    assert np.abs(preview - truth.permute(1, 2, 0).numpy()).max() <= 1.01


def test_a_stop_ends_after_the_step_and_leaves_no_thread(pipeline):
    """Closing the iterator stops too."""
    stop, events, before = threading.Event(), [], generate_first(pipeline)
    for event in pipeline.generate(
        replace(PARAMS, steps=50, num_images=4), should_stop=stop.is_set
    ):
        events.append(event)
        stop.set()
    assert not any(isinstance(event, Image) for event in events)
    assert len([e for e in events if isinstance(e, Step)]) < 50
    assert pipeline.draw(PARAMS, lambda: True) == []
    closed = pipeline.generate(replace(PARAMS, steps=200))
    next(closed)
    closed.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "generate"]
    assert np.array_equal(generate_first(pipeline), before)


def test_a_prompt_without_parameters_is_refused(pipeline):
    with pytest.raises(UserError, match=r"give GenerationParams\('a photo'\)"):
        pipeline.draw("a photo")


def test_an_image_that_cannot_be_generated_is_refused(pipeline, monkeypatch):
    """An allocation beyond the address space fails as a too large image does."""
    # SDXL's usual
    assert pipeline.complete(replace(PARAMS, guidance_scale=None)).guidance_scale == 5.0
    with pytest.raises(UserError, match=r"'rex'.*loaded are: .*dog_kohya"):
        pipeline.generate(replace(PARAMS, adapters=(("rex", 1.0),)))
    monkeypatch.setattr(pipeline.pipeline.unet, "forward", lambda *_, **__: torch.empty(2**50))
    freed = []
    monkeypatch.setattr(devices, "free_unused_memory", freed.append)
    with pytest.raises(UserError, match="too little memory for 64 x 64 px"):
        generate_first(pipeline)
    assert freed == [pipeline.home.device]


def test_apples_gpu_computes_in_fp16_and_its_memory_is_freed(apple, tiny_base, monkeypatch):
    subject = SubjectPipeline.from_base(tiny_base, resting=True)
    assert (subject.home.device.type, subject.pipeline.unet.dtype) == ("mps", torch.float16)
    emptied = []
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: emptied.append(1))
    devices.free_unused_memory(subject.home.device)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 3 * 2**30)
    assert emptied and devices.measure_peak_gib(subject.home.device) == 3


def test_a_file_of_no_adapter_for_the_base_is_refused(pipeline, files, tmp_path):
    state, before = load_file(files["dog"]), dict(pipeline.adapters)
    first = next(iter(state))
    contents = {
        "wide": {
            key: value.repeat(1, 2) if "lora_A" in key else value for key, value in state.items()
        },
        "flux": {"transformer." + key: value for key, value in state.items()},
        "plain": {"weight": torch.zeros(2, 2)},
        "nan": state | {first: state[first] * torch.nan},
        "half": {key: value for key, value in state.items() if "lora_B" not in key},
        "text": b"hello",
        "cut": files["dog"].read_bytes()[:-100],
        "pickle": pickle.dumps(state),
    }
    for name, content in contents.items():
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(content if isinstance(content, bytes) else save(content))
    torch.save(state, tmp_path / "old.bin")
    (tmp_path / "empty").mkdir()
    for name in (*(f"{name}.safetensors" for name in contents), "old.bin", "empty", "missing"):
        message = (
            r"was made for another base: .*16×32 \(out×in\), which is 16×16 here"
            if name.startswith("wide")
            else None
        )
        with pytest.raises(UserError, match=message) as error:
            pipeline.load_adapter(tmp_path / name)
        assert "\n" not in str(error.value), name
    assert pipeline.adapters == before


@pytest.mark.slow
def test_the_least_recently_used_adapter_is_dropped_first(tiny_base, files, monkeypatch):
    monkeypatch.setattr("dreambooth_moslora.generation.pipeline.RESIDENT_ADAPTERS", 2)
    subject = SubjectPipeline.from_base(tiny_base)
    assert subject.load_adapter(files["dog"]) == "dog"
    assert subject.load_adapter(files["dog"].parent, "rex") == "rex"
    assert subject.pipeline.get_list_adapters() == {"unet": [subject.adapters["dog"].key]}
    dog = generate_with(subject, rex=1.0)
    subject.load_adapter(files["cat"])
    subject.load_adapter(files["dog_kohya"])
    assert list(subject.adapters) == ["cat", "dog_kohya"]
    subject.load_adapter(files["cat"])
    subject.load_adapter(files["dog"])
    assert set(subject.adapters) == {"cat", "dog"} and np.array_equal(
        generate_with(subject, dog=1.0), dog
    )
    for name in list(subject.adapters):
        subject.unload_adapter(name)
    assert not subject.adapters and not subject.pipeline.get_list_adapters().get("unet")


def test_a_raw_checkpoint_gives_its_published_files_image(pipeline, tmp_path):
    facts = facts_of(components := live(lora_alpha=8, mixer="kaiming"))
    writer.publish(components, tmp_path / "rex", "rex", facts)
    raw_file.save_raw(components, tmp_path / "rex" / "checkpoint-20" / RAW_NAME, facts)
    names = [
        pipeline.load_adapter(path)
        for path in (tmp_path / "rex", tmp_path / "rex" / "checkpoint-20")
    ]
    assert names == ["rex", "rex@20"]
    published, raw = (generate_with(pipeline, **{name: 1.0}) for name in names)
    assert not has_difference(published, raw) and has_difference(
        published, generate_first(pipeline)
    )


def test_threads_wait_for_each_other(pipeline):
    expected = {name: generate_with(pipeline, **{name: 1.0}) for name in ("dog", "cat")}
    with ThreadPoolExecutor(2) as pool:
        got = {
            n: [pool.submit(generate_with, pipeline, **{n: 1.0}) for _ in range(3)]
            for n in expected
        }
    assert all(
        np.array_equal(image.result(), expected[name]) for name in got for image in got[name]
    )


def test_a_vae_that_overflows_in_fp16_decodes_as_in_fp32(tmp_path):
    """Activations leave the range of fp16, and the norms remove the factor again."""
    images = []
    for dtype in (torch.float16, torch.float32):
        pipeline = tiny_sdxl(tmp_path / str(dtype))
        with torch.no_grad():
            pipeline.vae.decoder.conv_in.weight.mul_(3e5)
        *_, preview, image = SubjectPipeline(pipeline.to(dtype), "tiny").generate(PARAMS)
        assert pipeline.vae.dtype == dtype
        images.append(np.stack([preview.pixels, image.pixels]).astype(int))
    half, full = images
    assert full.std() > 1 and np.abs(half - full).max() <= 8


@pytest.mark.parametrize("threshold", [1.1, -1.1])
def test_an_image_that_the_safety_checker_refuses_is_black(threshold, tmp_path):
    """No cosine reaches the first threshold, and each exceeds the second. Class images are not
    checked."""
    base = tiny_pipeline("sd1", tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
    config = transformers.CLIPConfig(vision_config=sizes, projection_dim=16)
    checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.fill_(threshold)
    side = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    reader = transformers.CLIPImageProcessor(**side)
    expected = generate_first(SubjectPipeline(base, "tiny"), height_px=64, width_px=64)
    base.register_modules(safety_checker=checker.eval(), feature_extractor=reader)
    result = generate_first(SubjectPipeline(base, "tiny"), height_px=64, width_px=64)
    assert np.array_equal(result, expected if threshold > 0 else 0 * expected)
    (sample,) = sampling.generate_images(base, "a dog", [1], (64, 64))
    assert sample.getbbox()


def test_a_small_gpu_holds_one_model_at_a_time(tiny_base, monkeypatch):
    """A large GPU holds all models."""
    offloads, enable = [], StableDiffusionXLPipeline.enable_model_cpu_offload
    noted = lambda self, gpu_id=None, device=None: (  # noqa: E731
        offloads.append(str(device)) or enable(self, gpu_id, device)
    )
    monkeypatch.setattr(StableDiffusionXLPipeline, "enable_model_cpu_offload", noted)
    expected = generate_first(SubjectPipeline.from_base(tiny_base))
    set_free_gib(monkeypatch, 24.0)
    large = SubjectPipeline.from_base(tiny_base, device=OTHER_DEVICE)
    assert (
        np.array_equal(generate_first(large), expected)
        and not offloads
        and not large.home.is_resting
    )
    weights = offload.measure_weights_gib(large.pipeline)
    monkeypatch.setattr(offload, "MIN_FREE_BESIDE_MODEL_GIB", 0.0)
    set_free_gib(monkeypatch, 1.4 * weights)
    small = SubjectPipeline.from_base(tiny_base, device=OTHER_DEVICE)
    assert [generate_first(small).tolist() for _ in range(2)] == [expected.tolist()] * 2
    assert set(offloads) == {OTHER_DEVICE}
    small.pipeline.vae.decoder.register_forward_pre_hook(lambda *_: offloads.append("decode"))
    freed = []
    monkeypatch.setattr(
        devices, "free_unused_memory", lambda device: freed.append((device, hooked_models(small)))
    )
    generate_first(small)
    assert offloads[-2:] == ["decode", OTHER_DEVICE]  # the VAE leaves when it has decoded
    assert not hooked_models(small) and small.pipeline.device == torch.device("cpu")
    assert freed == [(torch.device(OTHER_DEVICE), [])]  # once, when the models have left


def hooked_models(subject: SubjectPipeline) -> list:
    return [part for part in subject.pipeline.components.values() if hasattr(part, "_hf_hook")]


def set_free_gib(monkeypatch, gib: float) -> None:
    monkeypatch.setattr(devices, "measure_free_gib", lambda device: gib)


def test_a_base_of_zero_terminal_snr_has_its_guidance_rescaled(tiny_base, tmp_path, monkeypatch):
    """Other bases are sampled as usual."""
    velocity = save_tiny_sdxl(tmp_path / "v", prediction_type="v_prediction")
    base = shutil.copytree(velocity, tmp_path / "zero")
    file = base / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rescale_betas_zero_snr": True}))
    rescales, call = [], StableDiffusionXLPipeline.__call__

    def noted(self, *arguments, **options):
        rescales.append(options.get("guidance_rescale"))
        return call(
            self, *arguments, num_inference_steps=options.pop("num_inference_steps", 2), **options
        )

    monkeypatch.setattr(StableDiffusionXLPipeline, "__call__", noted)
    pipeline = load.load_pipeline(base)
    pipeline.set_progress_bar_config(disable=True)
    subject = SubjectPipeline(pipeline, "tiny")
    for name in SCHEDULERS:
        scheduler = subject._build_scheduler(name)
        scheduler.set_timesteps(10)
        assert int(scheduler.timesteps[0]) == 999, name
    images = [
        generate_first(subject, guidance_scale=9.0),
        *sampling.generate_images(pipeline, "a dog", [1], (64, 64)),
    ]
    assert rescales == [0.7, 0.7] and all(np.asarray(image).std() > 0 for image in images)
    for base in map(load.load_pipeline, (tiny_base, velocity)):
        assert (
            load.get_guidance_rescale(base) == 0.0
            and base.scheduler.config.timestep_spacing == "leading"
        )


def test_black_pictures_are_counted():
    black, grey = (PIL.Image.new("RGB", (8, 8), colour) for colour in ("black", "grey"))
    images = [Image(0, pixels, PARAMS, Provenance()) for pixels in (black, grey, black)]
    assert describe_black_images(images).startswith(
        "2 of them are black: "
    ) and not describe_black_images(images[1:2])
