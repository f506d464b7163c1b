"""Masks and captions of a run are shared out to its processes, and are the files that one process makes."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.photos.captions import Captioner
from dreambooth_moslora.photos.folder import find_photos
from dreambooth_moslora.photos.masks import Segmenter
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training import made_before as run_captions
from dreambooth_moslora.training import made_before as run_masks
from dreambooth_moslora.training.reporter import RunContext
from tests.helpers.threads import as_processes
from tests.helpers.tiny_training import paint_photos

WORDS = ("sks dog", "zwx cat")


@pytest.fixture
def photos(tmp_path):
    """Three photos of a dog and two of a cat."""
    return [
        replace(photo, subject=number)
        for number, (words, count) in enumerate(zip(WORDS, (3, 2), strict=True))
        for photo in find_photos(paint_photos(tmp_path / words, count), words, 64).photos
    ]


@pytest.fixture
def made(monkeypatch, tmp_path, photos):
    """Make masks and captions by so many processes; returns what each found or its error, how many answers each asked
    for, and the files. `is_full(process, answers so far)` ends one."""
    run = as_processes(monkeypatch)
    tables = [{"instance_data_dir": words, "instance_prompt": words} for words in WORDS]

    def make(count: int, is_full=lambda process, done: False) -> tuple[list, list[int], dict[str, bytes]]:
        folder, done = tmp_path / f"run_{count}", [0] * count
        config = TrainConfig(subjects=tables, masks="auto", captions="auto", output_dir=str(folder))

        def ask(device: torch.device) -> None:
            if is_full(device.index, done[device.index]):
                raise UserError("full")
            done[device.index] += 1

        def mask(device: torch.device, image: Image.Image) -> torch.Tensor:
            return ask(device) or torch.ones(image.height, image.width)

        def surroundings(device: torch.device, image: Image.Image) -> str:
            return ask(device) or f"beside {image.width} trees"

        segmenter = lambda one, device: Segmenter("model", "", partial(mask, device))  # noqa: E731
        captioner = lambda one, device: Captioner("model", "", partial(surroundings, device))  # noqa: E731
        monkeypatch.setattr(run_masks, "load_segmenter", segmenter)
        monkeypatch.setattr(run_captions, "load_captioner", captioner)

        def one(accelerator):
            accelerator.device = torch.device("cpu", accelerator.process_index)
            accelerator.reduce = lambda votes, kind: votes  # nobody asks for a stop
            report = SimpleNamespace(counted=lambda phase, counts, total: counts, failure=None)
            context = RunContext(config, RunDir(folder), accelerator, report, bool)
            found = run_captions.captioned_photos(context, run_masks.masked_photos(context, photos))
            return [(photo.captions, photo.mask_path.name) for photo in found]

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
