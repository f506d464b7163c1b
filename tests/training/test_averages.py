"""The average of the adapter: published, sampled and kept in the checkpoint, while the steps go on as without it."""

from dataclasses import replace

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import RAW_NAME, RunDir
from dreambooth_moslora.training.checkpoint import check_resumed, check_whole, restore_weights
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.optimizer import MovingAverage, lent
from dreambooth_moslora.training.publish import ValidationSamples
from tests.helpers.tiny_training import adapter_sha256, paint_photos, tiny_config


@pytest.fixture(scope="module")
def runs(tiny_base, tmp_path_factory):
    """One run twice, without and with an average, and what its samples were drawn with."""
    folder, drawn = tmp_path_factory.mktemp("averages"), {}
    photos, draw = paint_photos(folder / "photos"), ValidationSamples.draw

    def note(samples, step, sampler, accelerator):
        weights = [p.detach().clone() for n, p in sampler.pipeline.unet.named_parameters() if ".lora_A." in n]
        drawn[step] = weights
        return draw(samples, step, sampler, accelerator)

    def config(name: str, **changes):
        settings = {"max_train_steps": 3, "checkpointing_steps": 1, **changes}
        return tiny_config(tiny_base, photos, folder / name, **settings)

    train(config("plain"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ValidationSamples, "draw", note)
        shown = {"num_validation_images": 1, "validation_steps": 3}
        train(config("averaged", use_ema=True, **shown))
    return folder, config, drawn


def raw_of(folder, name: str, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / name / f"checkpoint-{step}" / RAW_NAME)


def adapter_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.endswith(("lora_A", "lora_B", "mixer"))}


def bytes_of(tensors) -> set[bytes]:
    return {tensor.numpy().tobytes() for tensor in tensors}


def test_the_average_is_that_of_diffusers():
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(3, 2))]
    ours, theirs = MovingAverage(weights, 0.5), EMAModel(weights, decay=0.5)
    for step in range(1, 15):
        weights[0].data += torch.randn(3, 2)
        ours.update(step)
        theirs.step(weights)
        assert torch.allclose(ours.values()[0], theirs.shadow_params[0], atol=1e-6)
    own = weights[0].detach().clone()
    with lent(ours, weights):
        assert torch.equal(weights[0], ours.values()[0]) and not torch.equal(weights[0], own)
    assert torch.equal(weights[0], own)


@pytest.mark.slow
def test_the_steps_are_those_without_and_the_checkpoint_holds_both(runs):
    folder, _, drawn = runs
    plain = [raw_of(folder, "plain", step) for step in (1, 2, 3)]
    weights = torch.load(folder / "averaged" / "checkpoint-3" / "weights.pt", weights_only=True)["weights"]
    assert bytes_of(weights) == bytes_of(adapter_tensors(plain[-1]).values())
    kept = [1 - 2 / 11, 1 - 3 / 12]  # of steps 2 and 3; the average of step 1 is its weights
    averaged = adapter_tensors(raw_of(folder, "averaged", 3))
    for name, last in averaged.items():
        mean = plain[0][name]
        for found, share in zip(plain[1:], kept, strict=True):
            mean = mean.lerp(found[name], share)
        assert torch.allclose(last, mean, atol=1e-6)
    downs = bytes_of(tensor for name, tensor in averaged.items() if name.endswith("lora_A"))
    assert bytes_of(drawn[3]) == downs
    assert downs < bytes_of(load_file(folder / "averaged" / "pytorch_lora_weights.safetensors").values())
    assert adapter_sha256(folder / "averaged") != adapter_sha256(folder / "plain")


@pytest.mark.slow
def test_weights_that_are_not_the_adapters_are_refused(runs):
    folder, config, _ = runs
    checkpoint = RunDir(folder / "averaged").latest_checkpoint()
    with pytest.raises(UserError, match=r"weights\.pt: weight 0 is"):
        restore_weights(checkpoint, [torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(UserError, match="--use_ema: checkpoint-3 has True; you ask for False"):
        check_resumed(replace(config("averaged")), checkpoint, check_whole(checkpoint))
