"""Ctrl-C while pictures are drawn: heard between two denoising steps, and made up for when the run goes on."""

import pytest
from PIL import Image

from dreambooth_moslora.core import StopRequestedError
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.generation.fixed_seeds import SampleRequest, stopper
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.publish import ValidationSamples
from tests.helpers.tiny_training import paint_photos, tiny_config

pytestmark = pytest.mark.usefixtures("few_steps")


@pytest.fixture
def config(tiny_base, tmp_path):
    photos = paint_photos(tmp_path / "photos")
    drawn = {"num_validation_images": 3, "validation_steps": 2, "max_train_steps": 3}
    return lambda **changes: tiny_config(tiny_base, photos, tmp_path / "run", **{**drawn, **changes})


def test_the_pipeline_is_asked_within_a_picture():
    tensors = {"latents": 1}
    assert stopper(lambda: False)(None, 0, None, tensors) is tensors
    with pytest.raises(StopRequestedError):
        stopper(lambda: True)(None, 0, None, tensors)


def test_a_stop_in_the_first_pictures_is_heard_before_they_are_all_drawn(config, tmp_path):
    samples = tmp_path / "run" / "samples"
    result = train(config(), should_stop=(samples / "step_000000_0.png").exists)
    assert result.interrupted and result.step == 0
    assert [path.name for path in samples.iterdir()] == ["step_000000_0.png"]


@pytest.mark.slow
def test_a_stop_in_later_pictures_saves_the_step_and_they_are_drawn_when_the_run_goes_on(config, tmp_path):
    run = RunDir(tmp_path / "run")
    result = train(config(), should_stop=(run.samples_dir / "step_000002_0.png").exists)
    assert result.interrupted and result.step == 2 and run.adapter_path.is_file()
    assert not (run.samples_dir / "step_000002_1.png").exists()
    train(config(resume_from_checkpoint="latest"))
    assert [event["step"] for event in run.read_metrics() if event["type"] == "sample"] == [0, 2, 3]


class Interrupted:
    """An evaluator that is interrupted the first time."""

    prompts = ()

    def __init__(self):
        self.asked = []

    def __call__(self, sampler, step):
        self.asked.append(step)
        if len(self.asked) == 1:
            raise StopRequestedError
        return {"score": 1.0, "best": {"step": step, "score": 1.0, "since": 0}}


@pytest.mark.slow
def test_a_step_that_was_not_scored_is_scored_when_the_run_goes_on(config, tmp_path):
    evaluator, plain = Interrupted(), {"num_validation_images": 0, "evaluate_steps": 2}
    train(config(**plain), evaluator=evaluator, should_stop=lambda: bool(evaluator.asked))
    assert train(config(resume_from_checkpoint="latest", **plain), evaluator=evaluator).step == 3
    assert evaluator.asked == [2, 2]
    assert [e["step"] for e in RunDir(tmp_path / "run").read_metrics() if e["type"] == "evaluation"] == [2]


@pytest.mark.parametrize("damage", [b"", b"x", None])
def test_a_damaged_picture_of_step_0_is_left_out_of_the_contact_sheet(damage, tmp_path):
    samples = ValidationSamples(RunDir(tmp_path), [SampleRequest("a dog", seed) for seed in range(2)], [], 1)
    samples.save(samples.path(0, 0), Image.new("RGB", (8, 8), "red"))
    samples.save(samples.path(0, 1), Image.new("RGB", (8, 8), "blue"))
    samples.path(0, 0).unlink() if damage is None else samples.path(0, 0).write_bytes(damage)
    assert [picture.getpixel((0, 0)) for picture in samples.first(range(2))] == [(0, 0, 255)]
