"""Encoded photos and words: each once, each with its own numbers and its own caption, whatever the order."""

from random import Random
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load as load_tensors
from safetensors.torch import save

from dreambooth_moslora.adapters.moslora import MoSLoraConfig, adapter_parameters, inject
from dreambooth_moslora.base import load
from dreambooth_moslora.core import StopRequestedError, UserError
from dreambooth_moslora.photos.folder import find_photos
from dreambooth_moslora.photos.photo import CropPlan, CropRule, resized_size
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.frozen_base import PromptCache, TensorCache, fingerprint
from dreambooth_moslora.training.photo_stream import PhotoEncoder, PhotoStream, collate
from dreambooth_moslora.training.prepare import fill, prompt_cache, same_everywhere
from dreambooth_moslora.training.reporter import RunContext
from tests.helpers.texts import embeds_of, equal, pooled_of
from tests.helpers.threads import as_processes
from tests.helpers.tiny_training import paint_photos

RULE = CropRule(resolution_px=64)


@pytest.fixture(scope="module")
def pipeline(tiny_base):
    return load.load_pipeline(tiny_base)


@pytest.fixture
def photos(tmp_path):
    folder = paint_photos(tmp_path / "photos")
    (folder / "1.txt").write_text("a photo of sks dog asleep")
    return find_photos(folder, "a photo of sks dog", 64).photos


def stream_of(photos, vae, cache, rule=RULE, **options) -> PhotoStream:
    return PhotoStream(photos, PhotoEncoder(vae, cache, rule), 0, "instance", **options)


def encode_ahead(stream: PhotoStream, sample_count: int) -> int:
    """Encode what these samples will show; returns the number of views."""
    return len([stream.encoder.encode(*view) for view in stream.views_ahead(sample_count)])


def test_latents_are_those_of_the_crop(pipeline, photos):
    view, _ = stream_of(photos[2:], pipeline.vae, TensorCache()).at(0)
    pixels = torch.tensor(list(Image.open(photos[2].path).resize((64, 64), Image.Resampling.LANCZOS).tobytes()))
    pixels = pixels.view(64, 64, 3).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.allclose(view.latents, load.encode_image(pipeline.vae, pixels)[0], atol=1e-4)


def test_every_photo_keeps_its_own_size_and_caption_whatever_the_shuffle(pipeline, photos):
    stream = stream_of(photos, pipeline.vae, TensorCache(), repeats=2)
    facts = {(64, 96): "a photo of sks dog", (80, 64): "a photo of sks dog asleep", (72, 72): "a photo of sks dog"}
    batch = collate([stream.at(position) for position in range(12)], 12)
    for ids, prompt, latents in zip(batch.time_ids, batch.prompts, batch.latents):
        size = tuple(int(x) for x in ids[:2])
        assert facts[size] == prompt and ids[4:].tolist() == [64, 64]
        photo = next(p for p in photos if p.size_px == size)
        plan = CropPlan(size, resized_size(size, (64, 64)), tuple(int(x) for x in ids[2:4]), (64, 64), False)
        alone = PhotoEncoder(pipeline.vae, None, RULE).encode(photo, plan)
        assert torch.equal(alone.latents, latents)
    assert sorted(map(tuple, batch.time_ids[:6, :2].tolist())) == sorted([(64, 96), (80, 64), (72, 72)] * 2)


def test_a_view_is_encoded_once_and_several_crops_differ(pipeline, photos):
    cache = TensorCache()
    stream = stream_of(photos, pipeline.vae, cache, CropRule(64, center_crop=True), repeats=3)
    assert encode_ahead(stream, 100) == 9 and cache.computed == 3
    assert len([stream.at(position) for position in range(30)]) == 30 and cache.computed == 3
    for crops, count, differing in ((3, 3, 3), (None, 12, 4)):
        stream = stream_of(photos[:1], pipeline.vae, TensorCache(), CropRule(64, crops_per_photo=crops))
        found = {tuple(stream.at(position)[0].time_ids[2:4].tolist()) for position in range(count)}
        assert len(found) >= differing


def test_a_second_run_reuses_the_disk_and_a_changed_photo_does_not(pipeline, photos, tmp_path):
    def encode() -> int:
        cache = TensorCache(tmp_path / "cache")
        encode_ahead(stream_of(photos, pipeline.vae, cache), 100)
        return cache.computed

    assert [encode(), encode()] == [3, 0]
    with Image.open(photos[0].path) as image:
        changed = image.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    changed.save(photos[0].path)
    assert encode() == 1


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGES = {
    "torn": lambda content: b"torn",
    "empty": lambda content: save({}),
    "without a digest": lambda content: save(load_tensors(content)),
    "another value": lambda content: save({name: tensor + 1 for name, tensor in load_tensors(content).items()}),
    "one bit of the last tensor": lambda content: flipped(content, len(content) - 1),
    "one bit of a name": lambda content: flipped(content, content.index(b"latents")),
    "a link to itself": None,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_changed_entry_of_the_disk_cache_is_computed_anew_and_so_is_one_of_another_vae(
    name, pipeline, photos, tmp_path
):
    cache = TensorCache(tmp_path / "cache")
    stream = stream_of(photos[:1], pipeline.vae, cache)
    expected = stream.at(0)[0].latents
    (path,) = tmp_path.rglob("*.safetensors")
    if damage := DAMAGES[name]:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
        path.symlink_to(path.name)
    for _ in range(1 + (damage is not None)):
        assert torch.equal(stream.at(0)[0].latents, expected) and cache.computed == 2
    stream.encoder.vae_identity = "another"
    assert stream.at(0) and cache.computed == 3


def test_a_photo_that_is_exchanged_while_it_is_read_is_not_kept_under_the_old_ones_name(pipeline, photos, tmp_path):
    stream = stream_of(photos[:1], pipeline.vae, TensorCache(tmp_path / "cache"))
    stream.encoder._digest(photos[0].path)
    Image.new("RGB", photos[0].size_px[::-1], "red").save(photos[0].path)
    with pytest.raises(UserError, match="was changed while it was read"):
        stream.at(0)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_fingerprints_tell_weights_apart():
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    assert fingerprint(first) != fingerprint(second)
    second.load_state_dict(first.state_dict())
    assert fingerprint(first) == fingerprint(second) != fingerprint(second.half())


def test_a_mask_comes_along_at_the_latents_size(pipeline, tmp_path):
    folder = paint_photos(tmp_path, count=3)
    mask = Image.new("L", (72, 72), 0)
    mask.paste(255, (0, 0, 36, 72))
    mask.save(folder / "2.mask.png")
    stream = stream_of(find_photos(folder, "a photo of sks dog", 64).photos, pipeline.vae, TensorCache())
    batch = collate([stream.at(position) for position in range(3)], 3)
    assert batch.mask.shape == (3, 1, 8, 8)
    is_masked = batch.time_ids[:, 0] == 72
    (half,), whole = batch.mask[is_masked], batch.mask[~is_masked]
    assert half[0, :, :4].min() > 0.99 and half[0, :, 4:].max() < 0.1 and whole.min() == 1


def test_around_a_mask_weighs_as_told_and_around_a_transparent_photo_nothing(pipeline, tmp_path):
    folder = paint_photos(tmp_path / "photos", count=2)
    first, second = sorted(folder.glob("*.png"))
    half = Image.new("L", Image.open(first).size, 0)
    half.paste(1, (0, 0, half.width // 2, half.height))  # labels of 0 and 1
    half.save(first.with_suffix(".mask.png"))
    clear = Image.open(second).convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, clear.width // 2, clear.height))
    clear.save(second)
    photos = find_photos(folder, "a photo of sks dog", 64).photos
    cache = TensorCache(tmp_path / "cache")
    for weight in (0.2, 0.7):
        encoder = PhotoEncoder(pipeline.vae, cache, CropRule(64, center_crop=True), unmasked_weight=weight)
        views = {photo.path: encoder.encode(photo, encoder.rule.plan(photo.size_px, Random(0))) for photo in photos}
        assert views[first].mask.min().item() == pytest.approx(weight) and views[first].mask.max() == 1
        assert (views[second].mask.min(), views[second].mask.max()) == (0, 1)
    assert cache.computed == 2


def test_the_empty_prompt_of_another_pipeline_is_not_found_in_the_cache(pipeline, tmp_path):
    config, found = TrainConfig(caching="disk", cache_dir=str(tmp_path)), []
    for force_zeros in (False, True):
        pipeline.register_to_config(force_zeros_for_empty_prompt=force_zeros)
        found.append(embeds_of(prompt_cache(config, pipeline, torch.device("cpu"))([""])).abs().sum().item())
    assert found[0] > 0 == found[1]


def test_a_prompt_that_the_disk_loses_while_its_encoders_are_trained_is_encoded_by_the_base(tiny_base, tmp_path):
    """An encoding by the trained adapters would be the prior's target, and stay in the cache for other runs."""
    pipeline, prompt = load.load_pipeline(tiny_base), ["a photo of a dog"]
    config = TrainConfig(caching="disk", cache_dir=str(tmp_path))
    prompt_embeds = prompt_cache(config, pipeline, torch.device("cpu"))
    before = prompt_embeds(prompt)
    [file] = tmp_path.rglob("*.safetensors")
    content = file.read_bytes()
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        inject(encoder, MoSLoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        for _, weights in adapter_parameters(encoder):
            torch.nn.init.normal_(weights)
    file.unlink()
    again = prompt_embeds(prompt)
    assert equal(before, again)
    assert file.read_bytes() == content
    assert not torch.allclose(embeds_of(load.encode_text(pipeline, prompt)), embeds_of(before), atol=1e-3)


def test_words_are_asked_once_and_known_after_the_encoders_left(pipeline):
    asked = []
    encode = lambda prompts: asked.extend(prompts) or load.encode_text(pipeline, prompts)  # noqa: E731
    prompt_embeds = PromptCache(encode, TensorCache(), "tiny")
    first = prompt_embeds(["a dog", "a cat"])
    prompt_embeds.release_encoders()
    again = prompt_embeds(["a cat", "a dog", "a dog"])
    assert asked == ["a dog", "a cat"]
    assert equal([again[0], again[2]], [first[1], first[0]])
    with pytest.raises(RuntimeError, match="a bird"):
        prompt_embeds(["a bird"])


def test_the_base_as_prior_doubles_the_batch_with_its_own_prompts(pipeline, photos):
    stream = stream_of(photos, pipeline.vae, TensorCache())
    batch = collate([stream.at(0), stream.at(1)], 2).with_base_as_prior(["a dog", "a cat"])
    assert batch.instance_count == 2 and len(batch.latents) == 4
    assert batch.prompts[2:] == ["a dog", "a cat"] and torch.equal(batch.latents[:2], batch.latents[2:])


def test_what_the_disk_does_not_give_any_more_ends_the_run_in_one_line(pipeline, photos, tmp_path):
    encode = lambda prompts: [{"prompt_embeds": torch.ones(77, 8), "pooled_prompt_embeds": torch.ones(8)}]  # noqa: E731
    prompt_embeds = PromptCache(encode, TensorCache(tmp_path / "words"), "tiny")
    prompt_embeds(["a photo of a dog"])
    prompt_embeds.release_encoders()
    stream = stream_of(photos[:1], pipeline.vae, TensorCache(tmp_path / "cache"))
    encode_ahead(stream, 1)
    stream.encoder.vae = None
    assert pooled_of(prompt_embeds(["a photo of a dog"])).shape == (1, 8) and stream.at(0)[0].latents.shape == (4, 8, 8)
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match=r"'a photo of a dog' cannot be read any more.*resume the run"):
        prompt_embeds(["a photo of a dog"])
    with pytest.raises(UserError, match=r"photo.*0\.png cannot be read any more.*resume the run"):
        stream.at(0)


KEYS = [f"{number:02d}" for number in range(5)]


@pytest.fixture
def filled(monkeypatch):
    """Fill one cache in each process; returns how many values each computed, or its error."""
    run = as_processes(monkeypatch)

    def fill_all(caches, on_machine=None, should_stop=lambda process, key: False):
        def work(accelerator):
            process = accelerator.process_index
            asked = iter(KEYS[process :: len(caches)])
            context = RunContext(None, accelerator, None, lambda: should_stop(process, next(asked)))
            entries = {key: lambda key=key: {"value": torch.tensor([float(key)])} for key in KEYS}
            assert list(fill(caches[process], context, entries)) == [1, 2, 3, 4, 5]
            return caches[process].computed

        return run(len(caches), work, on_machine)

    return fill_all


def values_in(cache: TensorCache) -> list[float]:
    """What the cache holds, without computing anything."""
    return [float(cache.get(key, lambda: {"value": torch.tensor([-1.0])})["value"]) for key in KEYS]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_in_memory_every_process_has_all_and_encodes_its_share(filled, count):
    caches = [TensorCache() for _ in range(count)]
    assert sum(filled(caches)) == 5
    assert [values_in(cache) for cache in caches] == [[0, 1, 2, 3, 4]] * count


def test_a_machine_writes_each_file_once_and_machines_that_share_no_disk_both_have_all(filled, tmp_path, monkeypatch):
    written, keep = [], TensorCache._keep
    monkeypatch.setattr(TensorCache, "_keep", lambda self, key, value: written.append(key) or keep(self, key, value))
    caches = [TensorCache(tmp_path) for _ in range(2)]
    assert filled(caches) == [3, 2] and sorted(written) == KEYS
    assert filled(caches) == [3, 2] and len(written) == 5, "the second time all is there"
    caches = [TensorCache(tmp_path / str(number // 2)) for number in range(4)]
    assert filled(caches, on_machine=2) == [2, 1, 1, 1]
    assert [values_in(cache) for cache in caches] == [[0, 1, 2, 3, 4]] * 4


def test_a_stop_in_one_process_ends_all_and_what_is_encoded_stays(filled, tmp_path):
    caches = [TensorCache(tmp_path) for _ in range(2)]
    ended = filled(caches, should_stop=lambda process, key: key == "03")
    assert [type(end) for end in ended] == [StopRequestedError] * 2
    assert [cache.computed for cache in caches] == [2, 1]
    assert filled(caches) == [3, 2]


def test_processes_that_see_other_photos_end_in_one_line(monkeypatch):
    def find(accelerator):
        context = SimpleNamespace(accelerator=accelerator)
        return same_everywhere(context, lambda: dict.fromkeys(KEYS[accelerator.process_index :], bool), "crops")

    for error in as_processes(monkeypatch)(2, find):
        assert str(error).startswith("process 1 has 4 crops (") and "the main process 5 crops (" in str(error)
