"""Class images, `--masks auto` and `--captions auto`: made before training, once, topped up; the
photos stay."""

import argparse
import json
import shutil
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from dreambooth_moslora.base import devices
from dreambooth_moslora.cli import command_evaluate
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation import offload
from dreambooth_moslora.photos.captions import Captioner
from dreambooth_moslora.photos.folder import add_saved_sidecars, build_photo_report, find_photos
from dreambooth_moslora.photos.masks import Segmenter
from dreambooth_moslora.photos.photo_file import Photo, open_mask
from dreambooth_moslora.pictures import encode_png
from dreambooth_moslora.settings import train_config
from dreambooth_moslora.training import class_images, reporter
from dreambooth_moslora.training.class_images import (
    ClassImages,
    find_usable_class_photos,
    plan_class_images,
    split_total,
)
from dreambooth_moslora.training.loop import train
from tests.helpers.changed_base import change_token, flip_last_bit, swap_ids
from tests.helpers.threads import as_processes
from tests.helpers.tiers import slow_but
from tests.helpers.tiny import tiny_sdxl
from tests.helpers.tiny_encoders import save_tiny_clipseg
from tests.helpers.tiny_families import tiny_pipeline
from tests.helpers.tiny_training import adapter_sha256, paint_photos, tiny_config

MISSING = {
    "masks": "mask_model CIDAS/clipseg-rd64-refined",
    "captions": "caption_model Qwen/Qwen3-VL-2B-Instruct",
}
WORDS = ("sks dog", "zwx cat")
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("few_steps")


@pytest.fixture
def photos(tmp_path):
    return paint_photos(tmp_path / "photos", count=2)


@pytest.fixture
def auto(tiny_base, photos, tmp_path):
    model = str(save_tiny_clipseg(tmp_path))
    settings = {"masks": "auto", "mask_model": model, "max_train_steps": 1, "unmasked_weight": 0.0}
    return tiny_config(tiny_base, photos, tmp_path / "run", **settings)


@pytest.fixture
def lowest_peak(monkeypatch):
    """A random CLIPSeg finds nothing: its probabilities are taken as they come, without the least
    peak."""
    monkeypatch.setattr("dreambooth_moslora.photos.masks.MIN_PEAK", 0.0)


@pytest.mark.slow
def test_masks_are_made_once_and_weigh_the_loss(auto, photos, tmp_path, lowest_peak, monkeypatch):
    asked_words, ask = [], Segmenter.mask
    monkeypatch.setattr(
        Segmenter, "mask", lambda self, image: asked_words.append(self.word) or ask(self, image)
    )
    before = sorted(path.name for path in photos.iterdir())
    train(auto)
    assert sorted(path.name for path in photos.iterdir()) == before
    mask_names = sorted(path.name for path in (tmp_path / "run" / "masks").iterdir())
    assert mask_names == ["0.png.mask.png", "1.png.mask.png"]
    assert all(open_mask(photo) is not None for photo in build_photo_report(auto).photos)
    first = adapter_sha256(tmp_path / "run")
    train(auto)
    assert asked_words == ["dog", "dog"] and adapter_sha256(tmp_path / "run") == first
    train(replace(auto, masks="given", output_dir=str(tmp_path / "plain")))
    assert adapter_sha256(tmp_path / "plain") != first
    for photo in build_photo_report(auto).photos:  # a person's masks need no model
        shutil.copy(photo.mask_path, photo.path.with_suffix(".mask.png"))
    train(
        replace(
            auto, mask_model=train_config.TrainConfig().mask_model, output_dir=str(tmp_path / "own")
        )
    )
    assert adapter_sha256(tmp_path / "own") == first and not (tmp_path / "own" / "masks").exists()


@pytest.mark.parametrize("asked_for", MISSING)
def test_missing_model_ends_the_run_before_loading_the_base(asked_for, tiny_base, photos, tmp_path):
    events, config = [], tiny_config(tiny_base, photos, tmp_path / "run", **{asked_for: "auto"})
    with pytest.raises(UserError, match=f"{MISSING[asked_for]} is not here"):
        train(config, events.append)
    assert not [event for event in events if getattr(event, "phase", None) == "loading"]


def test_evaluate_uses_masks_of_a_moved_run_for_its_photos_only(
    auto, photos, tmp_path, lowest_peak
):
    train(auto)
    moved, other_photos = tmp_path / "moved", tmp_path / "other"
    (tmp_path / "run").rename(moved)
    shutil.copytree(photos, other_photos)

    def list_masked(*flags: str) -> list[bool]:
        parser = argparse.ArgumentParser()
        command_evaluate.evaluate_arguments(parser)
        config = command_evaluate.resolve_config(parser.parse_args([str(moved), *flags]))
        return [photo.mask_path is not None for photo in build_photo_report(config).photos]

    assert list_masked() == [True, True]
    assert list_masked("--photos", str(other_photos)) == [False, False]


@pytest.mark.slow
def test_captions_are_made_once_and_learnt(tiny_base, tmp_path, monkeypatch):
    """The captioner answers by the photo's number of pixels."""
    photos, run, captioned = paint_photos(tmp_path / "photos", count=3), tmp_path / "run", []
    answer = lambda image: captioned.append(image) or f"beside {image.width} trees"  # noqa: E731
    monkeypatch.setattr(
        class_images, "load_captioner", lambda *_, **__: Captioner("model", "dog", answer)
    )
    (photos / "1.txt").write_text("sks dog, mine")
    before = sorted(path.name for path in photos.iterdir())
    auto = tiny_config(tiny_base, photos, run, captions="auto", max_train_steps=2)
    train(auto)
    assert len(captioned) == 2 and sorted(path.name for path in photos.iterdir()) == before
    captions = {
        name: facts["caption"]
        for name, facts in json.loads((run / "captions.json").read_text()).items()
    }
    assert captions["0.png"] == "a photo of sks dog beside 96 trees" and list(captions) == [
        "0.png",
        "2.png",
    ]
    train(replace(auto, captions="given", output_dir=str(tmp_path / "plain")))
    for name, caption in captions.items():
        (photos / name).with_suffix(".txt").write_text(caption)
    train(replace(auto, captions="given", output_dir=str(tmp_path / "written")))
    assert (
        adapter_sha256(tmp_path / "written")
        == adapter_sha256(run)
        != adapter_sha256(tmp_path / "plain")
    )


@pytest.fixture
def make_in_processes(monkeypatch, tmp_path):
    """Make masks and captions of three dogs and two cats in some processes. Returns each one's
    photos or error, how many answers each asked for, and the files. `is_full(process, answers so
    far)` ends one."""
    each = [
        find_photos(paint_photos(tmp_path / prompt, count), prompt, 64)
        for prompt, count in zip(WORDS, (3, 2))
    ]
    pets = [
        replace(photo, subject=number)
        for number, report in enumerate(each)
        for photo in report.photos
    ]
    run = as_processes(monkeypatch)
    tables = [{"instance_data_dir": prompt, "instance_prompt": prompt} for prompt in WORDS]

    def make(
        count: int, is_full=lambda process, done: False
    ) -> tuple[list, list[int], dict[str, bytes]]:
        folder, done = tmp_path / f"run_{count}", [0] * count
        config = train_config.TrainConfig(
            subjects=tables, masks="auto", captions="auto", output_dir=str(folder)
        )

        def asking(kind, answer):
            """What loads a Segmenter or a Captioner that answers so, on a device that tells its
            process."""

            def ask(device: torch.device, image: Image.Image) -> object:
                if is_full(device.index, done[device.index]):
                    raise UserError("full")
                done[device.index] += 1
                return answer(image)

            return lambda config, device: kind("model", "", partial(ask, device))

        mask = asking(Segmenter, lambda image: torch.ones(image.height, image.width))
        monkeypatch.setattr("dreambooth_moslora.photos.masks.load_segmenter", mask)
        monkeypatch.setattr(
            class_images, "load_captioner", asking(Captioner, lambda i: f"beside {i.width} trees")
        )

        def work(accelerator):
            accelerator.device = torch.device("cpu", accelerator.process_index)
            accelerator.reduce = lambda votes, kind: votes  # nobody asks for a stop
            report = SimpleNamespace(
                report_counts=lambda phase, counts, total: counts, failure=None
            )
            context = reporter.RunContext(RunDir(folder), accelerator, report, bool)
            class_images.make_masks(config, context, pets)
            class_images.make_captions(config, context, pets)
            return [
                (photo.captions, photo.mask_path.name) for photo in add_saved_sidecars(config, pets)
            ]

        results = run(count, work)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return results, done, {str(path.relative_to(folder)): path.read_bytes() for path in files}

    return make


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_captions_and_masks(make_in_processes, count):
    (alone,), counts, files = make_in_processes(1)
    assert counts == [10] and len(files) == 6 and alone[0][0] == ("sks dog beside 96 trees",)
    results, counts, shared = make_in_processes(count)
    assert shared == files and results == [alone] * count
    assert sum(counts) == 10 and min(counts) >= 2
    assert make_in_processes(count)[1] == [0] * count, "what was made stays"


def test_error_in_one_process_ends_all_and_restart_continues(make_in_processes):
    own_error, heard = make_in_processes(2, lambda process, done: (process, done) == (0, 4))[0]
    assert str(own_error) == "full" and str(heard) == "the main process ended: full"
    results, counts, files = make_in_processes(2)
    assert sum(counts) == 3 and len(files) == 6 and results[0] == results[1]


def test_memory_of_each_sidecar_model_is_freed_when_it_is_gone(monkeypatch, tmp_path):
    accelerator = Accelerator(cpu=True)
    report = SimpleNamespace(report_counts=lambda phase, counts, total: counts, failure=None)
    context = reporter.RunContext(RunDir(tmp_path), accelerator, report, bool)
    config = train_config.TrainConfig(instance_data_dir="x", instance_prompt="sks dog")
    models, captions, freed = [], [], []

    def load(config, device):
        model = torch.nn.Linear(1, 1)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(
        devices, "free_unused_memory", lambda device: freed.append((device, models[0]()))
    )
    class_images.make_for_photos(
        config,
        context,
        kind="caption",
        photos=[Photo("0.png", (8, 8), ("sks dog",))],
        load=load,
        make=lambda photo, model: "a caption",
        keep=lambda photo, caption: captions.append(caption),
    )
    assert captions == ["a caption"] and freed == [(CPU, None)]


def build_dog_images(folder, seed=7, size=(8, 8)):
    return ClassImages(folder, "a dog", "toy", seed, size)


def build_prior_config(count):
    return train_config.TrainConfig(
        with_prior_preservation=True, class_prompt="a dog", num_class_images=count, resolution=8
    )


def list_used_images(folder, *sets):
    """The names of the pictures that are taken of these sets, with so many of each."""
    count = sum(number for _, number in sets)
    return [
        photo.path.name
        for photo in find_usable_class_photos(folder, build_prior_config(max(count, 3)), list(sets))
    ]


def read_images(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def add_missing_images(images, count, batch_size=4):
    """Paint what is missing, as a run does, in colours that tell their seed; returns the seeds of
    each call."""
    calls = []

    def paint(seed):
        return encode_png(
            Image.new("RGB", images.size_px[::-1], (seed % 256, seed // 256 % 256, 0))
        )

    images.folder.mkdir(exist_ok=True)
    for batch in images.list_missing(count, batch_size):
        calls.append(tuple(batch.seeds))
        batch.keep([paint(seed) for seed in batch.seeds])
    return calls


@pytest.mark.parametrize("damage", [None, b"", b"half a picture"])
def test_batch_with_a_missing_or_broken_image_is_regenerated(damage, tmp_path):
    """An image that was drawn alone had other bytes than in its batch."""
    images = build_dog_images(tmp_path)
    (_, seeds) = add_missing_images(images, 8)
    before, path = read_images(tmp_path), images.get_path(5)
    path.unlink() if damage is None else path.write_bytes(damage)
    assert add_missing_images(images, 8) == [seeds]
    assert read_images(tmp_path) == before
    assert add_missing_images(images, 8) == [] and len(add_missing_images(images, 10)) == 1
    assert [seeds[:2] for seeds in add_missing_images(images, 12)] == add_missing_images(
        build_dog_images(tmp_path / "new"), 10
    )[2:]


def test_class_images_match_prompt_and_size_or_are_the_users(tmp_path):
    """Sets of several sizes stand beside each other."""
    square, wide = build_dog_images(tmp_path), build_dog_images(tmp_path, size=(8, 16))
    cats = ClassImages(tmp_path, "a cat", "toy", 7, (8, 8))
    for images, count in ((square, 1), (wide, 2), (cats, 2)):
        add_missing_images(images, count)
    assert Image.open(wide.get_path(1)).size == (16, 8)
    assert add_missing_images(wide, 2) == add_missing_images(square, 1) == []
    of_both = [square.get_path(0).name, wide.get_path(0).name, wide.get_path(1).name]
    assert sorted(list_used_images(tmp_path, (square, 1), (wide, 2))) == sorted(of_both)
    Image.new("RGB", (8, 8)).save(tmp_path / "mine.png")
    assert list_used_images(tmp_path, (cats, 2)) == [
        "mine.png",
        cats.get_path(0).name,
        cats.get_path(1).name,
    ]


def test_class_images_match_text_options(tmp_path):
    text_options = {"text_encoder_out_layers": (9, 18, 27)}
    plain, with_options = (
        build_dog_images(tmp_path),
        replace(build_dog_images(tmp_path), text_options=text_options),
    )
    for images in (plain, with_options):
        assert len(add_missing_images(images, 3)) == 1
        assert list_used_images(tmp_path, (images, 3)) == [
            images.get_path(index).name for index in range(3)
        ]
    assert add_missing_images(plain, 3) == add_missing_images(with_options, 3) == []


CHANGED = {
    "the last number of the UNet": (
        lambda base: flip_last_bit(base / "unet" / "diffusion_pytorch_model.safetensors"),
        {},
    ),
    "a token's embedding": (change_token, {}),
    "two letters of a tokenizer": (swap_ids, {}),
    "the last number of the VAE": (
        lambda base: flip_last_bit(base / "vae" / "diffusion_pytorch_model.safetensors"),
        {},
    ),
    "another seed": (lambda base: None, {"seed": 4}),
}
"""How another run's base of the same name differs, and with which settings."""


@pytest.mark.parametrize(
    "name", slow_but(("the last number of the UNet", "another seed"), tuple(CHANGED))
)
def test_class_images_of_another_base_or_seed_are_not_used(
    name, tiny_base, prepare_base, tmp_path, caplog
):
    """One line says it. A person's own are taken in any case."""
    change, settings = CHANGED[name]
    base = Path(shutil.copytree(tiny_base, tmp_path / tiny_base.name))
    change(base)
    caplog.set_level("INFO", class_images.__name__)
    folder = tmp_path / "class"
    Image.new("RGB", (64, 64)).save(paint_photos(folder, 0) / "mine.png")

    def take(base: Path, **changes) -> list[str]:
        prior = {"with_prior_preservation": True, "class_data_dir": str(folder)}
        inputs = prepare_base(base, num_class_images=2, **prior, **changes)
        return [photo.path.name for photo in inputs.dataloader.prior.datasets[0].photos]

    first = take(tiny_base)
    generated = read_images(folder)
    assert sorted(first) == sorted(generated) and len(generated) == 2 and not caplog.messages
    second = take(base, **settings)
    assert first[0] == second[0] == "mine.png" and first[1] != second[1]
    (line,) = caplog.messages
    assert "1 generated class images are of another base, class prompt, size or --seed" in line
    assert "they stay unused, and 1 of “a photo of a dog” are drawn" in line

    # Both stay, each for its own run.
    assert take(tiny_base) == first
    assert read_images(folder).items() >= generated.items() and len(caplog.messages) == 1


def test_second_run_keeps_the_class_images_of_the_first(tmp_path):
    """The other run may have read it already."""
    first, second = build_dog_images(tmp_path), build_dog_images(tmp_path)
    (late,) = second.list_missing(2, batch_size=2)
    add_missing_images(first, 2)
    before = read_images(tmp_path)
    late.keep([b"another picture"] * 2)
    assert read_images(tmp_path) == before


STREAMED = {
    "sdxl": {},
    "sdxl in 8 bit, streamed in training too": {
        "gradient_checkpointing": True,
        "base_quantization": "int8",
        "stream_blocks": True,
    },
    "flux in 4 bit": {"base_quantization": "nf4"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMED)
def test_streamed_base_trains_equal_adapter(name, photos, tmp_path, monkeypatch):
    """As on a card that is smaller than the base. Then the base is whole again, and is trained."""
    tiny_pipeline(name.split()[0], tmp_path / "files").save_pretrained(tmp_path / "base")
    results, streamed, stream = [], [], offload.Placement.stream
    monkeypatch.setattr(
        offload.Placement, "stream", lambda self: streamed.append(1) or stream(self)
    )
    for is_small in (False, True):
        folder = tmp_path / f"small {is_small}"
        monkeypatch.setattr(offload.Placement, "is_memory_short", is_small)
        monkeypatch.setattr(offload.Placement, "is_too_small", is_small)
        changes = {"with_prior_preservation": True, "class_data_dir": str(folder / "class")}
        train(tiny_config(tmp_path / "base", photos, folder / "run", **changes, **STREAMED[name]))
        results.append((read_images(folder / "class"), adapter_sha256(folder / "run")))
    assert results[0] == results[1] and len(results[0][0]) == 3 and streamed == [1]


def test_base_that_generates_nan_leaves_no_class_image(photos, tmp_path):
    pipeline = tiny_sdxl(tmp_path)
    pipeline.unet.conv_out.weight.data.fill_(float("nan"))
    pipeline.save_pretrained(tmp_path / "model")
    changes = {"with_prior_preservation": True, "class_data_dir": str(tmp_path / "class")}
    with pytest.raises(UserError, match=r"images that are not finite .* mixed_precision=.bf16."):
        train(tiny_config(tmp_path / "model", photos, tmp_path / "run", **changes))
    assert not list((tmp_path / "class").iterdir())


def test_users_class_images_come_first_and_too_few_are_refused(tmp_path):
    """What a killed run was writing is removed."""
    images = build_dog_images(tmp_path)
    add_missing_images(images, 2)
    with pytest.raises(UserError, match="only 2 of 3 class images"):
        list_used_images(tmp_path, (images, 3))
    for number in range(2):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"dog_{number}.png")
    assert list_used_images(tmp_path, (images, 1)) == [
        "dog_0.png",
        "dog_1.png",
        images.get_path(0).name,
    ]
    (stale := tmp_path / ".class_1_00000.png.999999999-5e526a9a.new").touch()
    plan_class_images(tmp_path, build_prior_config(1), {(8, 8): 1}, {})
    assert not stale.exists()


def test_class_images_are_split_by_photo_sizes():
    cases = [
        ((5,), 7, (7,)),
        ((3, 1), 8, (6, 2)),
        ((98, 1, 1), 10, (8, 1, 1)),
        ((2, 2, 1), 1, (1, 0, 0)),
    ]
    for counts, total, shared in (*cases, ((1, 2), 0, (0, 0))):
        sizes = {(8, 8 * number): count for number, count in enumerate(counts, start=1)}
        assert tuple(split_total(sizes, total).values()) == shared
