"""`--masks auto` and `--captions auto`: made in the run folder before training, once; the photos stay."""

import argparse
import json
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dreambooth_moslora.cli import evaluate
from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.photos.captions import Captioner
from dreambooth_moslora.photos.folder import find_photos, photo_report, with_made
from dreambooth_moslora.photos.masks import Segmenter
from dreambooth_moslora.photos.photo import open_mask
from dreambooth_moslora.settings.rules import remarks
from dreambooth_moslora.settings.sources import recipe_of
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training import made_before
from dreambooth_moslora.training.dry_run import made_lines
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.reporter import RunContext
from tests.helpers.threads import as_processes
from tests.helpers.tiny_clipseg import save_tiny_clipseg
from tests.helpers.tiny_training import adapter_sha256, paint_photos, tiny_config


@pytest.fixture
def photos(tmp_path):
    return paint_photos(tmp_path / "photos", count=2)


@pytest.fixture
def auto(tiny_base, photos, tmp_path):
    model = str(save_tiny_clipseg(tmp_path))
    settings = {"masks": "auto", "mask_model": model, "max_train_steps": 1, "unmasked_weight": 0.0}
    return tiny_config(tiny_base, photos, tmp_path / "run", **settings)


@pytest.fixture
def found_everywhere(monkeypatch):
    """A random CLIPSeg finds nothing: its probabilities are taken as they come, without the least peak."""
    monkeypatch.setattr("dreambooth_moslora.photos.masks.LEAST_PEAK", 0.0)


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The words that a segmenter was asked for."""
    words, ask = [], Segmenter.mask
    monkeypatch.setattr(Segmenter, "mask", lambda self, image: words.append(self.word) or ask(self, image))
    return words


@pytest.mark.slow
def test_masks_are_made_once_weigh_the_loss_and_leave_the_photos_alone(auto, photos, tmp_path, asked, found_everywhere):
    before = sorted(path.name for path in photos.iterdir())
    train(auto)
    assert sorted(path.name for path in photos.iterdir()) == before
    made = sorted(path.name for path in (tmp_path / "run" / "masks").iterdir())
    assert made == ["0.png.mask.png", "1.png.mask.png"]
    assert all(open_mask(photo) is not None for photo in photo_report(auto).photos)
    first = adapter_sha256(tmp_path / "run")
    train(auto)
    assert asked == ["dog", "dog"] and adapter_sha256(tmp_path / "run") == first
    train(replace(auto, masks="given", output_dir=str(tmp_path / "plain")))
    assert adapter_sha256(tmp_path / "plain") != first


@pytest.mark.parametrize(
    ("asked_for", "says"),
    [
        ("masks", "--mask_model CIDAS/clipseg-rd64-refined is not here"),
        ("captions", "--caption_model Qwen/Qwen3-VL-2B-Instruct is not here"),
    ],
)
def test_a_model_that_is_not_there_ends_the_run_before_the_base_is_loaded(asked_for, says, tiny_base, photos, tmp_path):
    events, config = [], tiny_config(tiny_base, photos, tmp_path / "run", **{asked_for: "auto"})
    with pytest.raises(UserError, match=says):
        train(config, events.append)
    assert not [event for event in events if getattr(event, "phase", None) == "loading"]


@pytest.mark.slow
def test_a_persons_mask_needs_no_model(tiny_base, photos, tmp_path):
    for name in ("0", "1"):
        (photos / f"{name}.mask.png").write_bytes((photos / f"{name}.png").read_bytes())
    train(tiny_config(tiny_base, photos, tmp_path / "run", masks="auto", max_train_steps=1))
    assert not (tmp_path / "run" / "masks").exists()


def test_a_dry_run_says_which_masks_would_be_made_and_advice_what_has_no_effect(tiny_base, photos, tmp_path):
    auto = tiny_config("toy", photos, tmp_path / "run", masks="auto", mask_prompt="dog")
    *_, line = made_lines(auto, photo_report(auto))
    assert line == "masks: 2 photos have none; toy-segmenter makes them before training"
    assert any("--mask_prompt has no effect with the embedded base's own net" in s for s in remarks(auto))
    real = tiny_config(tiny_base, photos, tmp_path / "run", masks="auto")
    *_, line = made_lines(real, photo_report(real))
    assert line.endswith("clipseg-rd64-refined makes them before training, looking for “dog”")
    given = tiny_config(tiny_base, photos, tmp_path / "run", mask_prompt="dog")
    assert not [line for line in made_lines(given, photo_report(given)) if line.startswith("masks")]
    assert any("without --masks auto" in line for line in remarks(given))


def test_evaluate_takes_a_moved_runs_masks_and_none_of_them_for_other_photos(auto, photos, tmp_path, found_everywhere):
    train(auto)
    moved, other = tmp_path / "moved", tmp_path / "other"
    (tmp_path / "run").rename(moved)
    shutil.copytree(photos, other)

    def masked(*flags: str) -> list[bool]:
        parser = argparse.ArgumentParser()
        evaluate.evaluate_arguments(parser)
        config = evaluate.resolve(parser.parse_args([str(moved), *flags]))
        return [photo.mask_path is not None for photo in photo_report(config).photos]

    assert masked() == [True, True]
    assert masked("--photos", str(other)) == [False, False]


@pytest.fixture
def captioned(monkeypatch) -> list[str]:
    """The words that a real language model would be captioned for; it answers by the photo's number of pixels."""
    words = []

    def loaded(config, device="cpu"):
        return Captioner("model", "dog", lambda image: words.append("dog") or f"beside {image.width} trees")

    monkeypatch.setattr("dreambooth_moslora.training.made_before.load_captioner", loaded)
    return words


@pytest.mark.slow
def test_captions_are_made_are_learnt_and_leave_the_photos_alone(tiny_base, tmp_path, captioned):
    photos, run = paint_photos(tmp_path / "photos", count=3), tmp_path / "run"
    (photos / "1.txt").write_text("sks dog, mine")
    before = sorted(path.name for path in photos.iterdir())
    auto = tiny_config(tiny_base, photos, run, captions="auto", max_train_steps=2)
    train(auto)
    assert len(captioned) == 2 and sorted(path.name for path in photos.iterdir()) == before
    kept = {name: facts["caption"] for name, facts in json.loads((run / "captions.json").read_text()).items()}
    assert kept["0.png"] == "a photo of sks dog beside 96 trees" and list(kept) == ["0.png", "2.png"]
    train(replace(auto, captions="given", output_dir=str(tmp_path / "plain")))
    for name, caption in kept.items():
        (photos / name).with_suffix(".txt").write_text(caption)
    train(replace(auto, captions="given", output_dir=str(tmp_path / "written")))
    assert adapter_sha256(tmp_path / "written") == adapter_sha256(run) != adapter_sha256(tmp_path / "plain")


def test_dry_run_and_published_file_tell_of_captions_that_are_made(photos, tmp_path):
    (photos / "0.txt").write_text("mine")
    auto = tiny_config("toy", photos, tmp_path / "run", captions="auto")
    share, line = made_lines(auto, photo_report(auto))
    assert line == "captions: 1 photos have none of their own; toy-sdxl makes them before training"
    given = tiny_config("toy", photos, tmp_path / "run", caption_model="x/y")
    assert made_lines(given, photo_report(given)) == [share]
    assert any("--caption_model has no effect" in text for text in remarks(given))
    assert recipe_of(auto)["captions"] == "auto" and "captions" not in recipe_of(given)


WORDS = ("sks dog", "zwx cat")


@pytest.fixture
def pets(tmp_path):
    """Three photos of a dog and two of a cat."""
    return [
        replace(photo, subject=number)
        for number, (words, count) in enumerate(zip(WORDS, (3, 2), strict=True))
        for photo in find_photos(paint_photos(tmp_path / words, count), words, 64).photos
    ]


@pytest.fixture
def made(monkeypatch, tmp_path, pets):
    """Make masks and captions by so many processes; returns what each found or its error, how many answers each asked
    for, and the files. `is_full(process, answers so far)` ends one."""
    run = as_processes(monkeypatch)
    tables = [{"instance_data_dir": words, "instance_prompt": words} for words in WORDS]

    def make(count: int, is_full=lambda process, done: False) -> tuple[list, list[int], dict[str, bytes]]:
        folder, done = tmp_path / f"run_{count}", [0] * count
        config = TrainConfig(subjects=tables, masks="auto", captions="auto", output_dir=str(folder))

        def asking(kind, answer):
            """What loads a Segmenter or a Captioner that answers so, on a device that tells its process."""

            def ask(device: torch.device, image: Image.Image) -> object:
                if is_full(device.index, done[device.index]):
                    raise UserError("full")
                done[device.index] += 1
                return answer(image)

            return lambda config, device: kind("model", "", partial(ask, device))

        mask = asking(Segmenter, lambda image: torch.ones(image.height, image.width))
        monkeypatch.setattr(made_before, "load_segmenter", mask)
        monkeypatch.setattr(made_before, "load_captioner", asking(Captioner, lambda i: f"beside {i.width} trees"))

        def one(accelerator):
            accelerator.device = torch.device("cpu", accelerator.process_index)
            accelerator.reduce = lambda votes, kind: votes  # nobody asks for a stop
            report = SimpleNamespace(counted=lambda phase, counts, total: counts, failure=None)
            context = RunContext(RunDir(folder), accelerator, report, bool)
            made_before.make_masks(config, context, pets)
            made_before.make_captions(config, context, pets)
            return [(photo.captions, photo.mask_path.name) for photo in with_made(config, pets)]

        found = run(count, one)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return found, done, {str(path.relative_to(folder)): path.read_bytes() for path in files}

    return make


@pytest.mark.parametrize("count", [2, 3])
def test_each_process_makes_a_part_and_the_files_are_those_of_one(made, count):
    (alone,), asked, files = made(1)
    assert asked == [10] and len(files) == 6 and alone[0][0] == ("sks dog beside 96 trees",)
    found, asked, shared = made(count)
    assert shared == files and found == [alone] * count
    assert sum(asked) == 10 and min(asked) >= 2
    assert made(count)[1] == [0] * count, "what was made stays"


def test_an_error_of_one_ends_all_and_the_next_start_goes_on(made):
    own, heard = made(2, lambda process, done: (process, done) == (0, 4))[0]
    assert str(own) == "full" and str(heard) == "the main process ended: full"
    found, asked, files = made(2)
    assert sum(asked) == 3 and len(files) == 6 and found[0] == found[1]
