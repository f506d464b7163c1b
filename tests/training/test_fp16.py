"""fp16 and its gradient scaler, on the CPU: what a step does that overflows."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.training import loop
from dreambooth_moslora.training.loop import Training
from tests.helpers.tiny_training import paint_photos, tiny_config

SETTINGS = {"max_train_steps": 3, "lr_scheduler": "linear", "adam_epsilon": 1e-5}


@pytest.fixture
def scaled(monkeypatch):
    """Make the run what `--mixed_precision fp16` makes it on a GPU: accelerate refuses that on a CPU."""
    make_accelerator = loop.make_accelerator

    def use(init_scale: float, backoff: float) -> None:
        def make(config, run_dir):
            accelerator = make_accelerator(config, run_dir)
            accelerator.state._shared_state["_mixed_precision"] = "fp16"
            accelerator.native_amp = True
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, backoff_factor=backoff)
            return accelerator

        monkeypatch.setattr(loop, "make_accelerator", make)

    return use


def steps_of(folder) -> list[dict]:
    return [record for record in RunDir(folder).read_metrics() if record["type"] == "step"]


def adapter(folder) -> dict[str, torch.Tensor]:
    return load_file(RunDir(folder).latest_checkpoint() / "moslora_weights.safetensors")


def test_a_step_that_overflows_is_done_again_and_neither_counts_nor_moves_the_schedule(tiny_base, tmp_path, scaled):
    photos = paint_photos(tmp_path / "photos")
    scaled(init_scale=2.0**10, backoff=0.5)
    loop.train(tiny_config(tiny_base, photos, tmp_path / "plain", **SETTINGS))
    scaled(init_scale=2.0**30, backoff=0.25)
    result = loop.train(tiny_config(tiny_base, photos, tmp_path / "scaled", **SETTINGS))
    found, plain = steps_of(tmp_path / "scaled"), steps_of(tmp_path / "plain")
    skipped, done = ([step for step in found if step["skipped"] is kind] for kind in (True, False))
    assert result.step == 3 and len(skipped) > 1
    assert all(step["step"] == 1 and step["grad_norm"] is None for step in skipped)
    assert [step["step"] for step in done] == [1, 2, 3]
    assert [step["lr"] for step in done] == [step["lr"] for step in plain]
    expected, trained = adapter(tmp_path / "plain"), adapter(tmp_path / "scaled")
    for name, weights in expected.items():
        torch.testing.assert_close(trained[name], weights, rtol=0.02, atol=1e-4)


def test_a_run_whose_steps_all_overflow_ends_in_one_line(tiny_base, tmp_path, scaled):
    scaled(init_scale=2.0**30, backoff=0.999)
    photos = paint_photos(tmp_path / "photos")
    with pytest.raises(UserError, match=r"the gradient is .* at step 1: lower --learning_rate"):
        loop.train(tiny_config(tiny_base, photos, tmp_path / "run", **SETTINGS))
    assert len(steps_of(tmp_path / "run")) == 20
    assert not RunDir(tmp_path / "run").adapter_path.exists()


@pytest.mark.parametrize(("precision", "major", "advised"), [("fp16", 7, False), ("fp16", 8, True), ("bf16", 8, False)])
def test_bf16_is_advised_only_to_a_run_in_fp16_on_a_card_that_has_it(precision, major, advised, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (major, 0))
    accelerator = SimpleNamespace(device=torch.device("cuda"), mixed_precision=precision)
    error = Training.diverged(SimpleNamespace(accelerator=accelerator, run_dir=RunDir(tmp_path)), "the loss is nan")
    assert ("--mixed_precision bf16" in str(error)) is advised
