"""What is done before the first step: photos and words encoded, each once, with its own numbers and
its own caption, whatever the order; `--init_adapter`."""

import shutil
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from weakref import ref

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file, save

from dreambooth_moslora.base import devices, load
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import StopRequestedError, UserError
from dreambooth_moslora.method import moslora
from dreambooth_moslora.photos.augment import CropPlan, CropRule, compute_resized_size
from dreambooth_moslora.photos.folder import find_photos
from dreambooth_moslora.plan.validation import validate_run
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training import base_loading, reporter
from dreambooth_moslora.training.dataset import PhotoDataset, PhotoEncoder, collate
from dreambooth_moslora.training.encoding_cache import (
    EncodingCache,
    TextEmbeddingCache,
    digest_tensors,
)
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.prepare import (
    build_text_cache,
    choose_device,
    fill_cache,
    require_same_entries,
)
from tests.helpers.changed_base import change_token, flip_last_bit, swap_ids
from tests.helpers.threads import as_processes
from tests.helpers.tiny import embeds_of, equal, few_steps
from tests.helpers.tiny_adapters import save_diffusers_lora
from tests.helpers.tiny_training import adapter_sha256, paint_photos, tiny_config
from tests.training.conftest import flipped, stop_at

RULE = CropRule(resolution_px=64)
KEYS = [f"{number:02d}" for number in range(5)]


@pytest.fixture(scope="module")
def pipeline(tiny_base):
    return load.load_pipeline(tiny_base)


@pytest.fixture
def read(tmp_path):
    folder = paint_photos(tmp_path / "photos")
    (folder / "1.txt").write_text("a photo of sks dog asleep")
    return find_photos(folder, "a photo of sks dog", 64).photos


def stream_of(photos, vae, cache, rule=RULE, **options) -> PhotoDataset:
    return PhotoDataset(photos, PhotoEncoder(vae, cache, rule), 0, "instance", **options)


def encode_ahead(stream: PhotoDataset, sample_count: int) -> int:
    """Encode what these samples will show; returns the number of views."""
    return len([stream.encoder.encode(*view) for view in stream.list_crops(sample_count)])


def test_latents_size_and_caption_belong_to_each_photo(pipeline, read):
    """Whatever the shuffle. The base as prior doubles the batch, with its own prompts."""
    view, _ = stream_of(read[2:], pipeline.vae, EncodingCache())[0]
    pixels = torch.tensor(
        list(Image.open(read[2].path).resize((64, 64), Image.Resampling.LANCZOS).tobytes())
    )
    pixels = pixels.view(64, 64, 3).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.allclose(view.latents, load.encode_image(pipeline.vae, pixels)[0], atol=1e-4)
    stream = stream_of(read, pipeline.vae, EncodingCache(), repeats=2)
    facts = {
        (64, 96): "a photo of sks dog",
        (80, 64): "a photo of sks dog asleep",
        (72, 72): "a photo of sks dog",
    }
    batch = collate([stream[position] for position in range(12)], 12)
    for ids, prompt, latents in zip(batch.photo_inputs["time_ids"], batch.prompts, batch.latents):
        size = tuple(int(x) for x in ids[:2])
        assert facts[size] == prompt and ids[4:].tolist() == [64, 64]
        photo = next(p for p in read if p.size_px == size)
        plan = CropPlan(
            size, compute_resized_size(size, (64, 64)), tuple(int(x) for x in ids[2:4]), (64, 64)
        )
        alone = PhotoEncoder(pipeline.vae, None, RULE).encode(photo, plan)
        assert torch.equal(alone.latents, latents)
    assert sorted(map(tuple, batch.photo_inputs["time_ids"][:6, :2].tolist())) == sorted(
        [(64, 96), (80, 64), (72, 72)] * 2
    )
    with_prior = collate([stream[0], stream[1]], 2).add_base_prior(["a dog", "a cat"])
    assert with_prior.instance_count == 2 and len(with_prior.latents) == 4
    assert with_prior.prompts[2:] == ["a dog", "a cat"] and torch.equal(
        with_prior.latents[:2], with_prior.latents[2:]
    )


def test_a_view_is_encoded_once_and_several_crops_differ(pipeline, read):
    cache = EncodingCache()
    stream = stream_of(read, pipeline.vae, cache, CropRule(64, center_crop=True), repeats=3)
    assert encode_ahead(stream, 100) == 9 and cache.computed_count == 3
    assert len([stream[position] for position in range(30)]) == 30 and cache.computed_count == 3
    for crops, count, differing in ((3, 3, 3), (None, 12, 4)):
        stream = stream_of(
            read[:1], pipeline.vae, EncodingCache(), CropRule(64, crops_per_photo=crops)
        )
        time_ids = {
            tuple(stream[position][0].photo_inputs["time_ids"][2:4].tolist())
            for position in range(count)
        }
        assert len(time_ids) >= differing


def test_disk_cache_is_reused_unless_the_photo_changed(pipeline, read, tmp_path):
    def encode() -> int:
        cache = EncodingCache(tmp_path / "cache")
        encode_ahead(stream_of(read, pipeline.vae, cache), 100)
        return cache.computed_count

    assert [encode(), encode()] == [3, 0]
    changed = Image.open(read[0].path).copy()
    changed.putpixel((0, 0), (1, 2, 3))
    changed.save(read[0].path)
    assert encode() == 1


DAMAGES = {
    "torn": lambda content: b"torn",
    "empty": lambda content: save({}),
    "without a digest": lambda content: save(load_tensors(content)),
    "another value": lambda content: save(
        {name: tensor + 1 for name, tensor in load_tensors(content).items()}
    ),
    "one bit of the last tensor": lambda content: flipped(content, len(content) - 1),
    "one bit of a name": lambda content: flipped(content, content.index(b"latents")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_entry_or_other_vae_is_encoded_anew(name, pipeline, read, tmp_path):
    """Digests tell weights and types apart."""
    first, second = torch.ones(3, 30), torch.ones(3, 30)
    assert digest_tensors({"weight": first}) == digest_tensors({"weight": second})
    assert digest_tensors({"weight": first}) != digest_tensors({"weight": second.half()})
    second[-1, -1] += 1
    assert digest_tensors({"weight": first}) != digest_tensors({"weight": second})
    cache = EncodingCache(tmp_path / "cache")
    stream = stream_of(read[:1], pipeline.vae, cache)
    expected = stream[0][0].latents
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(DAMAGES[name](path.read_bytes()))
    for _ in range(2):
        assert torch.equal(stream[0][0].latents, expected) and cache.computed_count == 2
    stream.encoder.vae_identity = "another"
    assert stream[0] and cache.computed_count == 3


def test_cache_distinguishes_latent_scales_of_equal_weights(tiny_base, read, tmp_path):
    vae, cache = load.load_pipeline(tiny_base).vae, EncodingCache(tmp_path / "cache")
    usual = stream_of(read[:1], vae, cache)[0][0].latents
    for constants in ({"scaling_factor": 2.0}, {"latents_mean": [1] * 4, "latents_std": [2] * 4}):
        vae.register_to_config(**constants)
        scaled = stream_of(read[:1], vae, cache)[0][0].latents
        assert torch.equal(
            scaled, stream_of(read[:1], vae, None)[0][0].latents
        ) and not torch.equal(scaled, usual)
    assert cache.computed_count == 3


def test_mask_has_the_latents_size_and_background_weight(pipeline, tmp_path):
    """Around a transparent photo nothing."""
    folder, cache = paint_photos(tmp_path / "photos", count=3), EncodingCache(tmp_path / "cache")
    first, second, third = sorted(folder.glob("*.png"))
    for photo, label in ((first, 1), (third, 255)):  # labels of 0 and 1, and of 0 and 255
        half = Image.new("L", Image.open(photo).size, 0)
        half.paste(label, (0, 0, half.width // 2, half.height))
        half.save(photo.with_suffix(".mask.png"))
    photos = find_photos(folder, "a photo of sks dog", 64).photos
    stream = stream_of(photos[1:], pipeline.vae, EncodingCache())
    batch = collate([stream[position] for position in range(2)], 2)
    assert batch.mask.shape == (2, 1, 8, 8)
    is_masked = batch.photo_inputs["time_ids"][:, 0] == 72
    (half,), whole = batch.mask[is_masked], batch.mask[~is_masked]
    assert half[0, :, :4].min() > 0.99 and half[0, :, 4:].max() < 0.1 and whole.min() == 1
    clear = Image.open(second).convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, clear.width // 2, clear.height))
    clear.save(second)
    photos = find_photos(folder, "a photo of sks dog", 64).photos[:2]
    for weight in (0.2, 0.7):
        encoder = PhotoEncoder(
            pipeline.vae, cache, CropRule(64, center_crop=True), unmasked_weight=weight
        )
        views = {
            photo.path: encoder.encode(photo, encoder.rule.plan_crop(photo.size_px, Random(0)))
            for photo in photos
        }
        assert (
            views[first].mask.min().item() == pytest.approx(weight) and views[first].mask.max() == 1
        )
        assert (views[second].mask.min(), views[second].mask.max()) == (0, 1)
    assert cache.computed_count == 2


def test_lost_prompt_of_trained_encoders_is_encoded_by_the_base(tiny_base, tmp_path):
    """An encoding by the trained adapters would be the prior's target, and stay in the cache for
    other runs. The empty prompt of another pipeline is not found in the cache."""
    pipeline, prompt, sums = load.load_pipeline(tiny_base), ["a photo of a dog"], []
    config = TrainConfig(caching="disk", cache_dir=str(tmp_path))
    prompt_embeds = build_text_cache(config, pipeline, load.SDXL_FAMILY, {})
    before = prompt_embeds(prompt)
    [file] = tmp_path.rglob("*.safetensors")
    content = file.read_bytes()
    for force_zeros in (False, True):
        pipeline.register_to_config(force_zeros_for_empty_prompt=force_zeros)
        sums.append(
            embeds_of(build_text_cache(config, pipeline, load.SDXL_FAMILY, {})([""]))
            .abs()
            .sum()
            .item()
        )
    assert sums[0] > 0 == sums[1]
    for model in (pipeline.text_encoder, pipeline.text_encoder_2):
        moslora.inject(model, moslora.MoSLoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        for _, weights in moslora.list_adapter_parameters(model):
            torch.nn.init.normal_(weights)
    file.unlink()
    prompt_embeds._recent_embeddings.clear()
    assert equal(before, prompt_embeds(prompt)) and file.read_bytes() == content
    assert not torch.allclose(
        embeds_of(load.SDXL_FAMILY.encode_prompts(pipeline, prompt)), embeds_of(before), atol=1e-3
    )


ENCODED = {
    "a token's embedding": (change_token, 3, 0),
    "two letters of a tokenizer": (swap_ids, 3, 0),
    "the last number of the VAE": (
        lambda base: flip_last_bit(base / "vae" / "diffusion_pytorch_model.safetensors"),
        0,
        1,
    ),
    "nothing": (lambda base: None, 0, 0),
}
"""What differs in another base, and how many texts and photos are encoded for it."""


@pytest.mark.parametrize("name", ENCODED)
def test_encodings_of_another_base_are_not_taken_from_the_disk(
    name, tiny_base, prepare_base, tmp_path
):
    """And those of the same base, which lies elsewhere, are."""
    change, texts, views = ENCODED[name]
    first = prepare_base(tiny_base)
    base = Path(shutil.copytree(tiny_base, tmp_path / tiny_base.name))
    change(base)
    second = prepare_base(base)
    for inputs, computed in ((first, (3, 1)), (second, (texts, views))):
        caches = inputs.text_cache.cache, inputs.dataloader.instance.encoder.cache
        assert tuple(cache.computed_count for cache in caches) == computed

    # What it trains on is what it encodes itself.
    prompt = ["a photo of sks dog"]
    expected = load.SDXL_FAMILY.encode_prompts(load.load_pipeline(base), prompt)
    assert equal(second.text_cache(prompt), expected)


def test_prompt_lost_after_the_encoders_were_freed_ends_the_run(pipeline, read, tmp_path):
    encoded_prompts = []
    texts = partial(load.SDXL_FAMILY.encode_prompts, pipeline)
    encode = lambda prompts: encoded_prompts.extend(prompts) or texts(prompts)  # noqa: E731
    in_memory, on_disk = (
        TextEmbeddingCache(encode, cache, "tiny")
        for cache in (EncodingCache(), EncodingCache(tmp_path / "w"))
    )
    for prompt_embeds in (in_memory, on_disk):
        first = prompt_embeds(["a dog", "a cat"])
        prompt_embeds.release_encoders()
        again = prompt_embeds(["a cat", "a dog", "a dog"])
        assert equal([again[0], again[2]], [first[1], first[0]])
    assert encoded_prompts == ["a dog", "a cat"] * 2
    with pytest.raises(UserError, match="a bird"):
        in_memory(["a bird"])
    stream = stream_of(read[:1], pipeline.vae, EncodingCache(tmp_path / "cache"))
    encode_ahead(stream, 1)
    stream.encoder.vae = None
    assert stream[0][0].latents.shape == (4, 8, 8)
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    # The last texts are in memory: no step reads the disk for them again.
    assert equal(on_disk(["a dog"]), [first[0]])
    on_disk._recent_embeddings.clear()
    with pytest.raises(UserError, match=r"'a dog' cannot be read any more.*resume the run"):
        on_disk(["a dog"])
    with pytest.raises(UserError, match=r"photo.*0\.png cannot be read any more.*resume the run"):
        stream[0]


@pytest.fixture
def filled(monkeypatch):
    """Fill one cache in each process; returns how many values each computed, or its error."""
    run = as_processes(monkeypatch)

    def fill_all(caches, on_machine=None, should_stop=lambda process, key: False):
        def work(accelerator):
            process = accelerator.process_index
            keys = iter(KEYS[process :: len(caches)])
            context = reporter.RunContext(
                None, accelerator, None, lambda: should_stop(process, next(keys))
            )
            entries = {key: lambda key=key: {"value": torch.tensor([float(key)])} for key in KEYS}
            assert list(fill_cache(caches[process], context, entries)) == [1, 2, 3, 4, 5]
            return caches[process].computed_count

        return run(len(caches), work, on_machine)

    return fill_all


def values_in(cache: EncodingCache) -> list[float]:
    """What the cache holds, without computing anything."""
    return [float(cache.get(key, lambda: {"value": torch.tensor([-1.0])})["value"]) for key in KEYS]


def test_processes_share_encoding_and_write_each_file_once(filled, tmp_path, monkeypatch):
    """In memory, on one disk, and on machines that share no disk."""
    for count in (1, 2, 3):
        caches = [EncodingCache() for _ in range(count)]
        assert sum(filled(caches)) == 5
        assert [values_in(cache) for cache in caches] == [[0, 1, 2, 3, 4]] * count
    written, keep = [], EncodingCache._write
    monkeypatch.setattr(
        EncodingCache,
        "_write",
        lambda self, key, value: written.append(key) or keep(self, key, value),
    )
    caches = [EncodingCache(tmp_path) for _ in range(2)]
    assert filled(caches) == [3, 2] and sorted(written) == KEYS
    assert filled(caches) == [3, 2] and len(written) == 5, "the second time all is there"
    caches = [EncodingCache(tmp_path / str(number // 2)) for number in range(4)]
    assert filled(caches, on_machine=2) == [2, 1, 1, 1]
    assert [values_in(cache) for cache in caches] == [[0, 1, 2, 3, 4]] * 4


def test_stop_in_one_process_ends_all_and_keeps_encodings(filled, tmp_path):
    caches = [EncodingCache(tmp_path) for _ in range(2)]
    ended = filled(caches, should_stop=lambda process, key: key == "03")
    assert [type(end) for end in ended] == [StopRequestedError] * 2
    assert [cache.computed_count for cache in caches] == [2, 1]
    assert filled(caches) == [3, 2]


def test_processes_that_see_other_photos_end_in_one_line(monkeypatch):
    def find(accelerator):
        context = SimpleNamespace(accelerator=accelerator)
        return require_same_entries(
            context, lambda: dict.fromkeys(KEYS[accelerator.process_index :], bool), "crops"
        )

    for error in as_processes(monkeypatch)(2, find):
        assert str(error).startswith(
            "process 1 has 4 crops ("
        ) and "the main process 5 crops (" in str(error)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"num_validation_images": 1}, {"caching": "off"}])
def test_the_vae_leaves_memory_unless_it_is_needed_again(
    changes, tiny_base, photos, tmp_path, monkeypatch
):
    load, loaded, is_vae_alive = base_loading.load_base, [], []

    def load_base(*arguments, **options):
        pipeline = load(*arguments, **options)
        loaded.append(ref(pipeline.vae))
        return pipeline

    monkeypatch.setattr(base_loading, "load_base", load_base)

    def note(event):
        if event.kind == "step":
            is_vae_alive.append(loaded[0]() is not None)

    with few_steps():
        train(tiny_config(tiny_base, photos, tmp_path / "run", max_train_steps=1, **changes), note)
    assert is_vae_alive == [bool(changes)]


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_text_encoders_that_do_not_fit_the_gpu_encode_on_the_cpu(kind, gpu, monkeypatch):
    """Of 8 GiB each, where 10 are free. A transformer's have up to 16."""
    gpu(8, free_gib=10)
    monkeypatch.setattr(devices, "measure_apple_memory", lambda: (16.0, 6.0))
    encoder = torch.nn.Linear(2**15, 2**17, bias=False, device="meta", dtype=torch.bfloat16)
    places = [choose_device([encoder] * count, torch.device(kind)).type for count in (1, 2)]
    assert places == [kind, "cpu"]


def test_fp32_warns_once_for_a_base_as_large_as_sdxl(tiny_base, caplog, monkeypatch):
    single, half = torch.float32, torch.bfloat16
    cases = [("cuda", single, half, f"--mixed_precision {half}") for half in ("bf16", "fp16")]
    cases += [("cuda", single, "no", None), ("cuda", half, "bf16", None)]
    cases += [("cpu", single, "no", None)]
    large = Base.find("stabilityai/stable-diffusion-xl-base-1.0")
    for device, dtype, fast, advice in cases:
        monkeypatch.setattr(devices, "choose_family_precision", lambda facts, fast=fast: fast)
        caplog.clear()
        base_loading.warn_of_slow_precision(Base.find(tiny_base), dtype, torch.device(device))
        assert not caplog.records
        base_loading.warn_of_slow_precision(large, dtype, torch.device(device))
        lines = [
            record.message for record in caplog.records if record.name == base_loading.__name__
        ]
        assert [advice in line and "\n" not in line for line in lines] == [True] * (
            advice is not None
        )


@pytest.fixture
def file(tiny_base, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    return save_diffusers_lora(unet, tmp_path / "old", seed=1, rank=3, size=0.1)


@pytest.fixture
def config(tiny_base, photos, tmp_path, file):
    start = {"target_modules": ("to_q", "to_k"), "init_adapter": str(file)}
    return lambda **changes: tiny_config(tiny_base, photos, tmp_path / "run", **start | changes)


def test_zero_learning_rate_publishes_the_initial_adapter(config, file, tmp_path, caplog):
    train(config(learning_rate=0.0, max_train_steps=1, rank=5, lora_alpha=2))
    published, initial = deltas(RunDir(tmp_path / "run").adapter_path), deltas(file)
    assert published and all(
        torch.dist(published[n], initial[n]) < 1e-5 * initial[n].norm() for n in published
    )
    messages = [line for line in caplog.messages if "--init_adapter" in line]
    left_out = len(initial) - len(published)
    assert (
        len(messages) == 1
        and f": {len(published)} layers go on from it, 0 begin anew, and " in messages[0]
    )
    assert f"{left_out} of its layers are left out." in messages[0]


def deltas(path):
    tensors = load_file(path)
    ends = (".lora_A.weight", ".lora_B.weight")
    modules = {key.removesuffix(ends[0]) for key in tensors if key.endswith(ends[0])}
    return {
        name: tensors[name + ends[1]].double() @ tensors[name + ends[0]].double()
        for name in modules
    }


@pytest.mark.slow
def test_it_learns_on_and_a_resumed_run_needs_the_file_no_more(config, file, tmp_path):
    train(config(seed=1, max_train_steps=3))
    unbroken, initial = adapter_sha256(tmp_path / "run"), deltas(file)
    published = deltas(RunDir(tmp_path / "run").adapter_path)
    assert all(
        1e-4 < torch.dist(published[n], initial[n]) / initial[n].norm() < 0.9 for n in published
    )
    train(config(seed=1, max_train_steps=3), *stop_at(2))
    file.unlink()
    train(config(seed=1, max_train_steps=3, resume_from_checkpoint="latest"))
    assert adapter_sha256(tmp_path / "run") == unbroken


def test_unusable_initial_adapter_is_refused_before_loading(config, file):
    def said() -> str:
        with pytest.raises(UserError, match=r"--init_adapter .*: ") as error:
            validate_run(config(), Base.of(config()))
        return str(error.value)

    file.write_bytes(b"no adapter")
    assert "not a safetensors file" in said()
    file.unlink()
    assert "there is no such file or folder" in said()
