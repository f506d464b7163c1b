"""How a training ends when something fails after it, or while it fails."""

from dataclasses import replace

import pytest
from accelerate import Accelerator

from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.step import TrainStep
from tests.helpers.tiny_training import paint_photos, tiny_config


@pytest.fixture
def config(tiny_base, tmp_path):
    return tiny_config(tiny_base, paint_photos(tmp_path / "photos"), tmp_path / "run", max_train_steps=1)


@pytest.fixture
def lost_tracker(monkeypatch):
    def fail(_):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(Accelerator, "end_training", fail)


def lose(*_):
    raise UserError("the loss is nan")


def test_a_tracker_that_fails_at_the_end_loses_no_finished_run(config, lost_tracker, caplog):
    assert train(config).proof is not None
    assert "--report_to: ending it failed: ConnectionError no network" in caplog.text


@pytest.mark.parametrize(
    ("weight_decay", "says", "kept"),
    [(1e38, "the adapter is not finite after step 1", []), (1e30, "the gradient is nan at step 2", ["checkpoint-1"])],
)
def test_an_adapter_that_is_not_finite_becomes_no_checkpoint(weight_decay, says, kept, config):
    """The loss before a step knows nothing of what that step does: here it overflows."""
    sizes = {"adam_weight_decay": weight_decay, "learning_rate": 1e2}
    config = replace(config, max_train_steps=2, checkpointing_steps=1, **sizes)
    with pytest.raises(UserError, match=f"{says}: lower --learning_rate"):
        train(config)
    assert [path.name for path in RunDir(config.output_dir).checkpoints()] == kept


def test_a_tracker_that_fails_at_the_end_hides_no_error(config, lost_tracker, monkeypatch, caplog):
    monkeypatch.setattr(TrainStep, "accumulate_gradients", lose)
    with pytest.raises(UserError, match="the loss is nan"):
        train(config)
    assert "ConnectionError" in caplog.text


def test_an_end_that_cannot_be_written_hides_no_error(config, monkeypatch):
    def full(self, event):
        if event["type"] == "end":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(TrainStep, "accumulate_gradients", lose)
    monkeypatch.setattr(RunDir, "append_metrics", full)
    with pytest.raises(UserError, match="the loss is nan"):
        train(config)
