"""One step of the trainer searches no model."""

from torch import nn

from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.train_step import TrainStep
from tests.helpers.tiny_training import paint_photos, tiny_config

PRIOR = {"with_prior_preservation": True, "prior": "adapter_off"}


def test_a_step_walks_over_no_model(tiny_base, tmp_path, monkeypatch):
    """SDXL's UNet has 7,530 modules: to list them, or to set their mode again, took 9 and 15 ms."""
    walked, roots = [], []
    step = TrainStep.accumulate_gradients

    def watched(train_step: TrainStep):
        roots[:] = train_step.components.values() if train_step.step else ()
        losses = step(train_step)
        roots.clear()
        return losses

    def note(name: str) -> None:
        usual = getattr(nn.Module, name)

        def walk(self, *given, **named):
            walked.extend(name for root in roots if root is self)
            return usual(self, *given, **named)

        monkeypatch.setattr(nn.Module, name, walk)

    monkeypatch.setattr(TrainStep, "accumulate_gradients", watched)
    note("modules")
    note("train")
    photos = paint_photos(tmp_path / "photos")
    train(tiny_config(tiny_base, photos, tmp_path / "run", max_train_steps=2, **PRIOR))
    assert not walked
