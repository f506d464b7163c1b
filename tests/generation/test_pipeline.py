"""SubjectPipeline on the tiny base: same parameters, same pixels; adapters come, combine and go."""

import pickle
import threading
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from dreambooth_moslora.adapters.export import publish
from dreambooth_moslora.adapters.moslora import MoSLoraConfig, adapter_parameters, inject
from dreambooth_moslora.adapters.raw_file import adapter_metadata, save_raw
from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import RAW_NAME
from dreambooth_moslora.generation.params import SCHEDULERS, GenerationParams, Image, Step, read_recipe
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.generation.progress import LatentColours, Preview, PreviewTracker, smooth_latents
from tests.helpers.tiny_adapters import TARGETS, save_diffusers_lora, save_kohya_lora

PARAMS = GenerationParams("a photo of a sks dog", seed=3, steps=3, guidance_scale=4.0)


@pytest.fixture(scope="module")
def files(tiny_base, tmp_path_factory):
    """Two diffusers adapters, one of them also in kohya's form."""
    folder = tmp_path_factory.mktemp("adapters")
    unet = SubjectPipeline.from_base(tiny_base).pipeline.unet
    return {
        "dog": save_diffusers_lora(unet, folder / "dog", seed=1),
        "cat": save_diffusers_lora(unet, folder / "cat", seed=2),
        "dog_kohya": save_kohya_lora(unet, folder / "dog_kohya.safetensors", seed=1),
    }


@pytest.fixture(scope="module")
def pipeline(tiny_base, files):
    subject = SubjectPipeline.from_base(tiny_base)
    for name, file in files.items():
        subject.load_adapter(file, name)
    return subject


def test_guidance_that_is_not_given_is_sdxls_usual(pipeline):
    assert pipeline.complete(replace(PARAMS, guidance_scale=None)).guidance_scale == 5.0


def pictures(subject, params) -> list[np.ndarray]:
    return [np.asarray(event.pixels) for event in subject.generate(params) if isinstance(event, Image)]


def picture(subject, params=PARAMS, **changes) -> np.ndarray:
    return pictures(subject, replace(params, **changes))[0]


def differs(a, b) -> bool:
    return bool(np.abs(a.astype(int) - b.astype(int)).max() > 2)


def test_an_image_does_not_depend_on_how_many_are_made(pipeline):
    three = pictures(pipeline, replace(PARAMS, num_images=3))
    alone = [picture(pipeline, seed=PARAMS.seed + i) for i in range(3)]
    assert all(np.array_equal(a, b) for a, b in zip(three, alone))
    assert differs(three[0], three[1])


def test_every_step_is_reported_with_a_preview_and_the_image_comes_last(pipeline):
    events = list(pipeline.generate(replace(PARAMS, num_images=2)))
    kinds = [type(event) for event in events]
    assert kinds == [Step, Preview] * 3 + [Image] + [Step, Preview] * 3 + [Image]
    assert [(e.index, e.step, e.steps, e.num_images) for e in events if isinstance(e, Step)][3] == (1, 1, 3, 2)
    assert events[-3].eta_sec == 0
    assert {e.pixels.size for e in events if isinstance(e, Image | Preview)} == {(64, 64)}


def test_the_png_gives_the_same_picture_in_a_new_process_of_the_base(pipeline, files, tiny_base, tmp_path):
    params = replace(PARAMS, adapters=(("dog", 0.7), ("cat", 0.2)), negative_prompt="blur", scheduler="dpmpp_2m_karras")
    image = next(e for e in pipeline.generate(params) if isinstance(e, Image))
    recipe = read_recipe(image.save(tmp_path / "a.png"))
    assert dict(recipe.provenance.adapter_sha256)["dog"] == pipeline.adapters["dog"].sha256
    assert str(tmp_path) not in (tmp_path / "a.png").read_bytes().decode("latin1")
    fresh = SubjectPipeline.from_base(tiny_base)
    for name, _ in recipe.params.adapters:
        fresh.load_adapter(files[name], name)
    assert np.array_equal(picture(fresh, recipe.params), np.asarray(image.pixels))


def test_scale_zero_and_no_adapter_are_the_untouched_base_bit_for_bit(pipeline, tiny_base):
    base = picture(SubjectPipeline.from_base(tiny_base))
    with_dog = picture(pipeline, adapters=(("dog", 1.0),))
    assert differs(base, with_dog)
    assert np.array_equal(picture(pipeline, adapters=(("dog", 0.0),)), base)
    assert np.array_equal(picture(pipeline), base)
    assert np.array_equal(picture(pipeline, adapters=(("dog", 1.0), ("cat", 0.0))), with_dog)


def test_adapters_combine_and_switch_without_a_trace(pipeline):
    dog, both = picture(pipeline, adapters=(("dog", 1.0),)), picture(pipeline, adapters=(("dog", 1.0), ("cat", 1.0)))
    cat = picture(pipeline, adapters=(("cat", 1.0),))
    assert differs(dog, cat) and differs(both, dog) and differs(both, cat)
    assert np.array_equal(picture(pipeline, adapters=(("dog", 1.0),)), dog)
    assert differs(picture(pipeline, adapters=(("dog", 0.3),)), dog)


def test_the_kohya_form_computes_what_the_diffusers_form_computes(pipeline):
    ours, theirs = (picture(pipeline, adapters=((name, 1.0),)) for name in ("dog", "dog_kohya"))
    assert not differs(ours, theirs)


def test_a_lora_tag_in_the_prompt_acts(pipeline):
    tagged = picture(pipeline, prompt=PARAMS.prompt + " <lora:dog:0.7>")
    assert np.array_equal(tagged, picture(pipeline, adapters=(("dog", 0.7),)))


def test_all_schedulers_draw_something_of_their_own(pipeline):
    seen = [picture(pipeline, scheduler=scheduler) for scheduler in SCHEDULERS]
    assert all(differs(a, b) for a, b in pairwise(seen))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_has_its_class_its_options_and_the_noise_levels_of_the_base(pipeline, name):
    made = pipeline._scheduler(name)
    assert type(made).__name__ == SCHEDULERS[name].class_name
    assert {key: made.config[key] for key in SCHEDULERS[name].options} == SCHEDULERS[name].options
    assert (made.config.beta_start, made.config.beta_end) == (0.00085, 0.012)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_preview_finds_the_clean_latents_when_the_model_is_right(pipeline, name):
    scheduler = pipeline._scheduler(name)
    scheduler.set_timesteps(6)
    tracker = PreviewTracker(scheduler)
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = scheduler.sigmas[0]
    x = (clean + sigma * noise) / (1 if name == "euler" else (1 + sigma**2).sqrt())
    for step, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(noise, timestep, x, return_dict=False)[0]
        estimate = tracker.clean_latents(step, x)
        assert step == 0 or torch.allclose(estimate, clean, atol=1e-3)


class LinearVae(torch.nn.Module):
    """Every latent is one 8 x 8 patch of one colour: the case that a linear map can meet exactly."""

    config = SimpleNamespace(latent_channels=4, scaling_factor=0.25)
    device, dtype = torch.device("cpu"), torch.float32

    def decode(self, latents):
        mix = torch.tensor([[0.1, 0.05, 0.0, 0.02], [0.0, 0.1, 0.05, 0.0], [0.03, 0.0, 0.02, 0.1]])
        colours = torch.einsum("rc,bchw->brhw", mix, latents) + 0.1
        return SimpleNamespace(sample=torch.nn.functional.interpolate(colours, scale_factor=8.0))


def test_preview_colours_are_those_of_the_vae():
    vae, latents = LinearVae(), smooth_latents(4, seed=7)
    truth = (vae.decode(latents / vae.config.scaling_factor).sample[0, :, ::8, ::8] / 2 + 0.5).clamp(0, 1) * 255
    preview = np.asarray(LatentColours(vae)(latents, (32, 32))).astype(float)
    assert np.abs(preview - truth.permute(1, 2, 0).numpy()).max() <= 1.01


def test_stopping_ends_after_the_step_and_leaves_the_pipeline_usable(pipeline):
    stop = threading.Event()
    events = []
    for event in pipeline.generate(replace(PARAMS, steps=50, num_images=4), should_stop=stop.is_set):
        events.append(event)
        stop.set()
    assert not any(isinstance(event, Image) for event in events)
    assert len([e for e in events if isinstance(e, Step)]) < 50
    assert np.array_equal(picture(pipeline), picture(pipeline))


def test_closing_the_iterator_stops_the_work(pipeline):
    events = pipeline.generate(replace(PARAMS, steps=200))
    next(events)
    events.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "generate"]


def test_too_little_memory_is_told_with_the_size(pipeline, monkeypatch):
    """An allocation beyond any machine's address space fails as a too large picture does."""
    monkeypatch.setattr(pipeline.pipeline.unet, "forward", lambda *_, **__: torch.empty(2**50))
    with pytest.raises(UserError, match="too little memory for 64 x 64 px"):
        picture(pipeline)


def test_an_unknown_adapter_names_those_there_are(pipeline):
    with pytest.raises(UserError, match=r"'rex'.*loaded are: .*dog_kohya"):
        pipeline.generate(replace(PARAMS, adapters=(("rex", 1.0),)))


def test_an_adapter_of_another_base_is_refused_with_both_architectures(pipeline, files, tmp_path):
    state = {key: value.repeat(1, 2) if "lora_A" in key else value for key, value in load_file(files["dog"]).items()}
    save_file(state, tmp_path / "wide.safetensors")
    with pytest.raises(UserError) as error:
        pipeline.load_adapter(tmp_path / "wide.safetensors")
    assert "cross-attention width 96" in str(error.value) and "cross-attention width 48" in str(error.value)
    assert "\n" not in str(error.value) and "wide" not in pipeline.adapters


def bad_files(files, folder):
    """Name -> file that must be refused."""
    state = load_file(files["dog"])
    first = next(iter(state))
    contents = {
        "flux.safetensors": {"transformer." + key: value for key, value in state.items()},
        "plain.safetensors": {"weight": torch.zeros(2, 2)},
        "nan.safetensors": state | {first: state[first] * torch.nan},
        "half.safetensors": {key: value for key, value in state.items() if "lora_B" not in key},
    }
    for name, tensors in contents.items():
        save_file(tensors, folder / name)
    (folder / "text.safetensors").write_text("hello")
    (folder / "cut.safetensors").write_bytes(files["dog"].read_bytes()[:-100])
    (folder / "pickle.safetensors").write_bytes(pickle.dumps(state))
    torch.save(state, folder / "old.bin")
    (folder / "empty").mkdir()
    return [*contents, "text.safetensors", "cut.safetensors", "pickle.safetensors", "old.bin", "empty", "missing"]


def test_what_is_no_adapter_is_refused_in_one_line(pipeline, files, tmp_path):
    before = dict(pipeline.adapters)
    for name in bad_files(files, tmp_path):
        with pytest.raises(UserError) as error:
            pipeline.load_adapter(tmp_path / name)
        assert "\n" not in str(error.value), name
    assert pipeline.adapters == before


def test_the_least_used_adapter_makes_room_and_reloading_is_by_content(tiny_base, files, monkeypatch):
    monkeypatch.setattr("dreambooth_moslora.generation.pipeline.RESIDENT_ADAPTERS", 2)
    subject = SubjectPipeline.from_base(tiny_base)
    assert subject.load_adapter(files["dog"]) == "dog"
    assert subject.load_adapter(files["dog"].parent, "rex") == "rex"
    assert subject.pipeline.get_list_adapters() == {"unet": [subject.adapters["dog"].key]}
    dog = picture(subject, adapters=(("rex", 1.0),))
    subject.load_adapter(files["cat"])
    subject.load_adapter(files["dog_kohya"])
    assert list(subject.adapters) == ["cat", "dog_kohya"]
    subject.load_adapter(files["dog"])
    assert np.array_equal(picture(subject, adapters=(("dog", 1.0),)), dog)
    for name in list(subject.adapters):
        subject.unload_adapter(name)
    assert not subject.adapters and not subject.pipeline.get_list_adapters().get("unet")


def test_an_adapter_that_is_asked_for_again_does_not_make_room_for_the_next(tiny_base, files, monkeypatch):
    monkeypatch.setattr("dreambooth_moslora.generation.pipeline.RESIDENT_ADAPTERS", 2)
    subject = SubjectPipeline.from_base(tiny_base)
    for name in ("dog", "cat", "dog", "dog_kohya"):
        subject.load_adapter(files[name], name)
    assert list(subject.adapters) == ["dog", "dog_kohya"]


def test_two_threads_wait_for_each_other(pipeline):
    expected = {name: picture(pipeline, adapters=((name, 1.0),)) for name in ("dog", "cat")}
    got: dict[str, list[np.ndarray]] = {"dog": [], "cat": []}

    def work(name):
        for _ in range(3):
            got[name].append(picture(pipeline, adapters=((name, 1.0),)))

    threads = [threading.Thread(target=work, args=(name,)) for name in got]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(np.array_equal(image, expected[name]) for name in got for image in got[name])
    assert [len(images) for images in got.values()] == [3, 3]


def test_a_checkpoint_of_ours_computes_what_its_published_file_computes(pipeline, tmp_path):
    """The raw A, M, B of a checkpoint, and the folded file: the same pictures, under names that tell them apart."""
    unet = UNet2DConditionModel.from_config(pipeline.pipeline.unet.config)
    inject(unet, MoSLoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, mixer="kaiming"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in adapter_parameters(unet, "default"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    facts = adapter_metadata({"unet": unet}, base_id="tiny")
    publish({"unet": unet}, tmp_path / "rex", "rex", facts)
    save_raw({"unet": unet}, tmp_path / "rex" / "checkpoint-20" / RAW_NAME, facts)
    names = [pipeline.load_adapter(path) for path in (tmp_path / "rex", tmp_path / "rex" / "checkpoint-20")]
    assert names == ["rex", "rex@20"]
    published, raw = (picture(pipeline, adapters=((name, 1.0),)) for name in names)
    assert not differs(published, raw) and differs(published, picture(pipeline))


def test_drawn_in_the_calling_thread_a_picture_is_the_same_file(subject, tmp_path):
    params = GenerationParams("a photo of a dog", seed=3, steps=2, num_images=2)
    streamed = [event for event in subject.generate(params) if hasattr(event, "save")]
    drawn = subject.draw(params)
    assert [image.png() for image in drawn] == [image.png() for image in streamed]
    assert drawn[1].save(tmp_path / "one.png").read_bytes() == drawn[1].png()
    assert subject.draw(params, lambda: True) == []
