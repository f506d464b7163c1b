"""Rows of a run's contact sheet: their titles, order and captions."""

from dataclasses import replace

from PIL import Image

from dreambooth_moslora.disk.events import SamplesSaved, build_record
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.photos.photo_file import Photo
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training import contact_sheet
from dreambooth_moslora.training.samples import ValidationSamples


def note_first(samples: ValidationSamples) -> None:
    """As a run notes its pictures of step 0."""
    prompts, seeds = map(
        list, zip(*((request.prompt, request.seed) for request in samples.requests))
    )
    samples.run_dir.record_event(build_record(SamplesSaved(0, [""] * len(seeds), prompts, seeds)))


def test_sheet_shows_step_0_images_under_their_prompts(tmp_path):
    """A resumed run may ask for another prompt, or for another number of pictures."""
    config = TrainConfig(num_validation_images=2, validation_prompt="a dog", seed=3)
    begun, more, other_prompt = (
        ValidationSamples.from_config(replace(config, **changes), RunDir(tmp_path), 1)
        for changes in ({}, {"num_validation_images": 3}, {"validation_prompt": "a cat"})
    )
    for number, colour in enumerate(("red", "blue")):
        begun.save(begun.get_path(0, number), Image.new("RGB", (8, 8), colour))
    note_first(begun)
    rows = [contact_sheet.build_sheet_rows(config, [], samples, [])[1] for samples in (begun, more)]
    assert [row.captions for row in rows] == [("a dog",) * 2] * 2 and all(
        len(row.images) == 2 for row in rows
    )
    assert (
        contact_sheet.build_sheet_rows(
            replace(config, validation_prompt="a cat"), [], other_prompt, []
        )[1].images
        == []
    )


def test_rows_follow_each_subject_and_end_with_pairs(tmp_path):
    """Each subject has its own photos, and at most six of them; pairs are of both."""
    tables = [
        {"instance_data_dir": name, "instance_prompt": f"a photo of {name}"}
        for name in ("sks dog", "zwx cat")
    ]
    config = TrainConfig(subjects=tables, num_validation_images=1, seed=3)
    samples = ValidationSamples.from_config(config, RunDir(tmp_path), 1)
    for number in range(len(samples.requests)):
        samples.save(samples.get_path(0, number), Image.new("RGB", (8, 8), (number, 0, 0)))
        samples.latest.append(Image.new("RGB", (8, 8), (number, 100, 0)))
    note_first(samples)
    samples.latest_step = 40
    contexts = [(request, Image.new("RGB", (8, 8))) for request in samples.contexts]
    photos = []
    for number in range(9):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (8, 8), (0, 0, number)).save(path)
        photos.append(Photo(path, (8, 8), (), subject=int(number > 6)))

    rows = contact_sheet.build_sheet_rows(config, photos, samples, contexts)
    assert [row.title for row in rows] == [
        "The photos of “a photo of sks dog”",
        "Step 0: the base, before training",
        "Step 40: the same prompts, from the same noise",
        "New contexts",
        "The photos of “a photo of zwx cat”",
        "Step 0: the base, before training",
        "Step 40: the same prompts, from the same noise",
        "New contexts",
        "Two subjects in one prompt",
    ]
    colours = [[image.getpixel((0, 0)) for image in row.images] for row in rows]
    assert colours[0] == [(0, 0, number) for number in range(6)]
    assert colours[4] == [(0, 0, 7), (0, 0, 8)]
    assert colours[1:3] == [[(0, 0, 0)], [(0, 100, 0)]]
    assert colours[5:7] == [[(1, 0, 0)], [(1, 100, 0)]]
    assert rows[5].captions == ("a photo of zwx cat",)
    assert len(rows[3].captions) == 4 and all("sks dog" in text for text in rows[3].captions)
    assert rows[8].captions == ("a photo of a sks dog and a zwx cat",)


def test_first_row_names_the_adapter_that_a_run_begins_with(tmp_path):
    path = str(tmp_path / "alice" / "dog.safetensors")
    config = TrainConfig(init_adapter=path, num_validation_images=1)
    samples = ValidationSamples.from_config(config, RunDir(tmp_path), 1)
    rows = contact_sheet.build_sheet_rows(config, [], samples, [])
    assert rows[0].title == "The photos"
    assert "dog" in rows[1].title and "alice" not in rows[1].title
