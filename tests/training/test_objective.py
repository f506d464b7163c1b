"""The objective against diffusers' schedulers and against itself in another parametrisation."""

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
)
from diffusers.training_utils import compute_snr

from dreambooth_moslora.settings import loss_weightings
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training import objective
from dreambooth_moslora.training.objective import NoiseSchedule

SCHEDULER = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
INDEX, EARLIER = torch.tensor([3, 400, 999]), torch.tensor([3, 400, 900])
ALL = 3
"""Images of the subject in `tensors`: each of them."""


def schedule(prediction_type="epsilon", style="ddpm") -> NoiseSchedule:
    return NoiseSchedule.from_alphas(SCHEDULER.alphas_cumprod, prediction_type, style)


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)


def test_ddpm_noise_and_velocity_equal_diffusers(tensors):
    latents, noise, _ = tensors
    noisy = objective.add_noise(schedule(), latents, noise, INDEX)
    assert torch.allclose(
        noisy.denoiser_input, SCHEDULER.add_noise(latents, noise, INDEX), atol=1e-5
    )
    assert torch.equal(objective.compute_target(schedule(), latents, noise, INDEX), noise)
    velocity = objective.compute_target(schedule("v_prediction"), latents, noise, INDEX)
    assert torch.allclose(velocity, SCHEDULER.get_velocity(latents, noise, INDEX), atol=1e-5)
    latents, noise, _ = tensors
    plan = NoiseSchedule.from_alphas(torch.tensor([0.9, 0.5, 0.0]), "v_prediction", "ddpm")
    index = torch.tensor([0, 1, 2])
    noisy = objective.add_noise(plan, latents, noise, index)
    assert torch.equal(noisy.latents[2], noise[2])
    assert torch.equal(objective.compute_target(plan, latents, noise, index)[2], -latents[2])
    assert objective.compute_weights(TrainConfig(snr_gamma=5.0), plan, index, ALL)[2] == 2


def weights(plan, index):
    """Those of a run without settings about the loss."""
    return objective.compute_weights(TrainConfig(), plan, index, ALL)


def convert_and_target(plan, tensors, index=INDEX):
    """What the UNet's output means, and what it should have been."""
    latents, noise, output = tensors
    noisy = objective.add_noise(plan, latents, noise, index)
    return objective.convert_prediction(plan, output, noisy), objective.compute_target(
        plan, latents, noise, index
    )


def test_edm_loss_weighs_latent_error_by_inverse_sigma_squared(
    tensors,
):
    """A perfect prediction costs nothing."""
    latents, noise, _ = tensors
    plans = schedule(), schedule(style="edm")
    ddpm, edm = (objective.add_noise(plan, latents, noise, INDEX) for plan in plans)
    assert torch.allclose(ddpm.denoiser_input, edm.denoiser_input, atol=1e-5) and torch.equal(
        ddpm.timesteps, edm.timesteps
    )
    ddpm, edm = (
        objective.compute_image_errors(*convert_and_target(plan, tensors), None)
        * weights(plan, INDEX)
        for plan in plans
    )
    assert torch.allclose(edm, ddpm, rtol=1e-3)
    for kind in ("epsilon", "v_prediction"):
        answer = objective.compute_target(schedule(kind), latents, noise, INDEX)
        clean, _ = convert_and_target(schedule(kind, "edm"), (latents, noise, answer))
        assert torch.allclose(clean, latents, atol=2e-4)
    latents, noise, output = tensors
    truth, plan = EulerDiscreteScheduler.from_config(SCHEDULER.config), schedule(style="edm")
    sigmas = truth.sigmas[:-1].flip(0)[EARLIER].view(-1, 1, 1, 1)
    clean = latents + sigmas * noise - sigmas * output
    losses = objective.compute_loss(
        *convert_and_target(plan, tensors, EARLIER), weights(plan, EARLIER), ALL
    )
    assert float(losses.total) == pytest.approx(
        float(((clean - latents) ** 2 / sigmas**2).mean()), rel=1e-3
    )


@pytest.mark.parametrize(("kind", "extra"), [("epsilon", 0.0), ("v_prediction", 1.0)])
def test_min_snr_is_that_of_diffusers_script(kind, extra, tensors):
    """min(SNR, gamma) / SNR, and one more for velocity; the prior loss is the plain mean (arXiv
    2303.09556, 3.4)."""
    latents, noise, output = tensors
    truth = DDPMScheduler.from_config(SCHEDULER.config, prediction_type=kind)
    plan, subjects, gamma = schedule(kind), 2, 5.0
    answer = noise if kind == "epsilon" else truth.get_velocity(latents, noise, EARLIER)
    errors = (output - answer).square().mean((1, 2, 3)).tolist()
    weights = [min(snr, gamma) / snr + extra for snr in compute_snr(truth, EARLIER).tolist()]
    instance = (weights[0] * errors[0] + weights[1] * errors[1]) / 2
    target = objective.compute_target(plan, latents, noise, EARLIER)
    clipped = objective.compute_weights(TrainConfig(snr_gamma=gamma), plan, EARLIER, subjects)
    losses = objective.compute_loss(output, target, clipped, subjects, 0.25)
    expected = [instance, errors[2], instance + 0.25 * errors[2]]
    assert [float(loss) for loss in (losses.instance, losses.prior, losses.total)] == pytest.approx(
        expected, rel=1e-4
    )
    assert weights[0] - extra < 0.05 and weights[1] - extra == 1


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_edm_bases_are_preconditioned_as_diffusers_does(kind, tensors):
    latents, noise, output = tensors
    truth = EDMEulerScheduler(prediction_type=kind)
    plan = NoiseSchedule(truth.sigmas[:-1], truth.timesteps, kind, "edm", truth.config.sigma_data)
    sigma = truth.sigmas[EARLIER].view(-1, 1, 1, 1)
    sample = latents + sigma * noise
    noisy = objective.add_noise(plan, latents, noise, EARLIER)
    assert torch.allclose(noisy.denoiser_input, truth.precondition_inputs(sample, sigma))
    clean = truth.precondition_outputs(sample, output, sigma)
    assert torch.allclose(objective.convert_prediction(plan, output, noisy), clean, atol=1e-5)


def test_loss_weighs_instance_prior_and_masks(tensors):
    """An image without the subject counts as its places do; an ordinary loss is the squared error
    bit for bit."""
    prediction, target = torch.zeros(4, 4, 2, 2), torch.ones(4, 4, 2, 2)
    target[2:] = 3
    losses = objective.compute_loss(
        prediction, target, torch.ones(4), instance_count=2, prior_loss_weight=0.5
    )
    assert (losses.instance, losses.prior, losses.total) == (1, 9, 5.5)
    alone = objective.compute_loss(prediction[:1], target[:1], torch.ones(1), 1)
    assert alone.prior == 0 and alone.total == alone.instance == 1
    target = torch.ones(4, 4, 2, 2)
    target[..., 0, 0] = 2
    mask = torch.stack([torch.full((1, 2, 2), weight) for weight in (1.0, 0.2, 0.0, 0.0)])
    mask[3, 0, 0, 0] = 1
    losses = objective.compute_image_errors(prediction, target, mask).tolist()
    assert losses == pytest.approx([7 / 4, 0.2 * 7 / 4, 0, 4])
    target, _, output = tensors
    plain = objective.compute_image_errors(output, target, None)
    assert torch.equal(plain, ((output - target) ** 2).flatten(1).mean(1))


def test_debiased_weights_turn_noise_error_into_latent_error():
    """1/sqrt(SNR), and 1/(SNR + 1) for velocity; kohya counts the SNR up to 1000."""
    index = torch.tensor([0, 400, 999])
    snr = compute_snr(SCHEDULER, index).clamp(max=1000)
    assert objective.debiased(schedule(), index).tolist() == pytest.approx(
        snr.rsqrt().tolist(), rel=1e-4
    )
    velocity = objective.debiased(schedule("v_prediction"), index)
    assert velocity.tolist() == pytest.approx((1 / (snr + 1)).tolist(), rel=1e-4) and snr[0] == 1000


def test_noise_offset_shifts_channels_only_with_strength():
    noise, seed = torch.randn(500, 4, 8, 8), torch.Generator().manual_seed(1)
    assert objective.add_noise_offset(noise, 0.0, seed) is noise
    shift = objective.add_noise_offset(noise, 0.3, seed) - noise
    assert shift.std((2, 3)).max() < 1e-6 and shift.std().item() == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize(
    ("style", "settings", "names"),
    [
        ("ddpm", {}, ()),
        ("ddpm", {"snr_gamma": 5.0}, ("min_snr",)),
        ("ddpm", {"debiased_estimation_loss": True}, ("debiased",)),
        ("edm", {}, ("error_of_noise",)),
        ("flow", {"weighting_scheme": "logit_normal"}, ()),
        ("flow", {"weighting_scheme": "cosmap"}, ("cosmap",)),
        ("flow", {"weighting_scheme": "none", "precondition_outputs": True}, ("error_of_latents",)),
    ],
)
def test_each_setting_about_the_loss_is_a_row_of_the_weightings(style, settings, names):
    config, rows = TrainConfig(**settings), loss_weightings.WEIGHTINGS.items()
    assert tuple(name for name, row in rows if row.is_active(config, style)) == names
    assert objective.WEIGHTING_FORMULAS.keys() == loss_weightings.WEIGHTINGS.keys()
