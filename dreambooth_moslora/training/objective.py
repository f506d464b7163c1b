"""Training objective: add noise to latents, and compare the denoiser's prediction with its target.

Three ways to add noise n to latents x at step i of the base's schedule, a = alpha_i its cumulative
product:

    ddpm   z = sqrt(a)·x + sqrt(1 - a)·n
           the denoiser predicts n, or v = sqrt(a)·n - sqrt(1 - a)·x
    flow   z = (1 - s)·x + s·n
           the transformer predicts n - x (Liu et al. 2022)
    edm    z = x + sigma·n,  sigma = sqrt(1/a - 1)
           its output is converted to x itself (Karras et al. 2022)

With prior preservation (Ruiz et al. 2022) a batch holds instance and prior images:

    total = instance + prior_loss_weight · prior
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from dreambooth_moslora.settings import loss_weightings
from dreambooth_moslora.settings.train_config import TrainConfig


@dataclass(frozen=True)
class NoiseSchedule:
    """Noise levels of a base.

    sigmas: (T,) noise-to-signal ratios
    timesteps: (T,) as the denoiser gets them
    prediction_type: `epsilon`, `v_prediction` or `flow`
    style: `ddpm`, `edm` or `flow`
    sigma_data: of bases trained with EDM's own preconditioning (Playground v2.5)
    shift_line: slope and intercept of the logarithm of a flow's shift, by tokens
    """

    sigmas: torch.Tensor
    timesteps: torch.Tensor
    prediction_type: str = "epsilon"
    style: str = "ddpm"
    sigma_data: float | None = None
    shift_line: tuple[float, float] | None = None

    @classmethod
    def from_alphas(
        cls, alphas_cumprod: torch.Tensor, prediction_type: str, style: str
    ) -> "NoiseSchedule":
        """From cumulative products (T,) in (0, 1]; a zero (zero-terminal-SNR bases) gives an
        infinite sigma."""
        sigmas = (1 / alphas_cumprod.double() - 1).sqrt().float()
        return cls(
            sigmas=sigmas,
            timesteps=torch.arange(len(sigmas)),
            prediction_type=prediction_type,
            style=style,
        )

    def __len__(self) -> int:
        return len(self.sigmas)

    def to(self, device: torch.device) -> "NoiseSchedule":
        """Return a copy whose tables are on `device`; indices into them must be there too."""
        return replace(self, sigmas=self.sigmas.to(device), timesteps=self.timesteps.to(device))

    def compute_signal_and_noise(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of x and n at `index` (B,), (B, 1, 1, 1) each: √α and √(1 - α), of a flow 1 - s
        and s."""
        sigma = self.sigmas[index].view(-1, 1, 1, 1)
        if self.style == "flow":
            share = 1 / (1 + 1 / sigma)
            return 1 - share, share

        # Where sigma is infinite, there is noise alone, and 0 · inf would be NaN.
        signal = (1 + sigma**2).rsqrt()
        return signal, torch.where(sigma.isinf(), torch.ones_like(sigma), sigma * signal)

    def compute_noise_share(self, index: torch.Tensor) -> torch.Tensor:
        """Return the factor (B,) of n at `index` (B,)."""
        return self.compute_signal_and_noise(index)[1].flatten()

    def snr(self, index: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio (B,): alpha / (1 - alpha) = 1 / sigma²."""
        return self.sigmas[index] ** -2


@dataclass(frozen=True)
class NoisySample:
    """Noised latents of B images.

    denoiser_input: (B, C, h, w) as the denoiser gets them
    latents: (B, C, h, w) the same, not scaled
    timesteps: (B,) for the denoiser
    timestep_indices: (B,) into the schedule
    """

    denoiser_input: torch.Tensor
    latents: torch.Tensor
    timesteps: torch.Tensor
    timestep_indices: torch.Tensor


@dataclass(frozen=True)
class LossParts:
    """Loss of a batch, one number each; `total` is the one to differentiate. A batch without images
    of a kind has 0 for it."""

    total: torch.Tensor
    instance: torch.Tensor
    prior: torch.Tensor

    def share(self, of_all: float) -> "LossParts":
        """Return the part of a micro-batch's losses that a chunk of it contributes: the share
        `of_all` of its instance images, or of its prior ones."""
        return LossParts(
            total=self.total * of_all,
            instance=self.instance * of_all,
            prior=self.prior * of_all,
        )


def sample_flow_timesteps(
    schedule: NoiseSchedule,
    count: int,
    generator: torch.Generator,
    scheme: str,
    mean: float,
    std: float,
    mode: float,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Indices (count,) of a flow's noise levels, drawn as diffusers' scripts do (Esser et al. 2024,
    section 3.1).

    schedule: the base's
    count: how many to draw
    generator: draws on the CPU
    scheme: `logit_normal`, `mode`, or any other for equal chances
    mean, std: of the normal distribution of `logit_normal`
    mode: the scale of `mode`
    tokens: (count,) of the images; None for no shift

    The shift turns the share s of noise into fs/(1 + (f - 1)s), with f = exp(slope·tokens +
    intercept) by the base's scheduler. Pictures are drawn with it too, but FLUX.2's with another f,
    which depends on the number of steps.
    """
    # How far down the schedule, in [0, 1).
    if scheme == "logit_normal":
        noise_levels = torch.normal(mean, std, (count,), generator=generator).sigmoid()
    else:
        noise_levels = torch.rand(count, generator=generator)
    if scheme == "mode":
        noise_levels = (
            1 - noise_levels - mode * ((math.pi * noise_levels / 2).cos() ** 2 - 1 + noise_levels)
        )

    # The shift. The levels begin with pure noise, so the share of noise is 1 - drawn.
    if tokens is not None and schedule.shift_line is not None:
        factor = (schedule.shift_line[0] * tokens + schedule.shift_line[1]).exp()
        noise_levels = 1 - factor * (1 - noise_levels) / (1 + (factor - 1) * (1 - noise_levels))
    return (noise_levels * len(schedule)).long().clamp(max=len(schedule) - 1)


def add_noise_offset(
    noise: torch.Tensor, strength: float, generator: torch.Generator
) -> torch.Tensor:
    """Noise (B, C, h, w) plus a draw per channel of deviation `strength`, so that brightness is
    learnt (Guttenberg 2023, "Diffusion with Offset Noise"; kohya's and diffusers'
    `--noise_offset`). A strength of 0 draws nothing."""
    if strength == 0:
        return noise
    return noise + strength * torch.randn(*noise.shape[:2], 1, 1, generator=generator)


def add_noise(
    schedule: NoiseSchedule, latents: torch.Tensor, noise: torch.Tensor, index: torch.Tensor
) -> NoisySample:
    """Mix latents and noise (B, C, h, w) at noise levels `index` (B,), and scale the mix to unit
    variance."""
    timesteps = schedule.timesteps[index]
    signal, spread = schedule.compute_signal_and_noise(index)
    if schedule.style != "edm":
        noisy = signal * latents + spread * noise
        return NoisySample(
            denoiser_input=noisy, latents=noisy, timesteps=timesteps, timestep_indices=index
        )

    # EDM's mix grows with sigma: the scale is c_in of Karras et al. 2022, table 1.
    sigma = schedule.sigmas[index].view(-1, 1, 1, 1)
    noisy = latents + sigma * noise
    scale = signal
    if schedule.sigma_data is not None:
        scale = (sigma**2 + schedule.sigma_data**2).rsqrt()
    return NoisySample(
        denoiser_input=noisy * scale,
        latents=noisy,
        timesteps=timesteps,
        timestep_indices=index,
    )


def compute_target(
    schedule: NoiseSchedule, latents: torch.Tensor, noise: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """Return what `convert_prediction` should return, (B, C, h, w): the noise, the velocity, or in
    EDM style the latents."""
    if schedule.style == "edm":
        return latents
    if schedule.style == "flow":
        return noise - latents
    if schedule.prediction_type == "epsilon":
        return noise
    signal, spread = schedule.compute_signal_and_noise(index)
    return signal * noise - spread * latents


def convert_prediction(
    schedule: NoiseSchedule, output: torch.Tensor, noisy: NoisySample
) -> torch.Tensor:
    """Return the denoiser's output (B, C, h, w) unchanged; in EDM style, the clean latents which it
    implies."""
    if schedule.style != "edm":
        return output
    sigma = schedule.sigmas[noisy.timestep_indices].view(-1, 1, 1, 1)

    # A base with EDM's own preconditioning: c_skip·z + c_out·F of Karras et al. 2022, table 1.
    if schedule.sigma_data is not None:
        variance = sigma**2 + schedule.sigma_data**2
        c_out = sigma * schedule.sigma_data * variance.rsqrt()
        sign = 1 if schedule.prediction_type == "epsilon" else -1
        return schedule.sigma_data**2 / variance * noisy.latents + sign * c_out * output

    # A base of DDPM: z = x + sigma·n is solved for x.
    if schedule.prediction_type == "epsilon":
        return noisy.latents - sigma * output
    return noisy.latents / (1 + sigma**2) - sigma * (1 + sigma**2).rsqrt() * output


# Formulas of `settings.loss_weightings`: schedule, index (B,) and the parameters of the row ->
# weights (B,) of the images' squared errors.


def error_of_noise(schedule: NoiseSchedule, index: torch.Tensor) -> torch.Tensor:
    """1/sigma²: turns an error of the latents, EDM's, into one of the noise. It is 1 for EDM's own
    bases."""
    snr = schedule.snr(index)
    return snr if schedule.sigma_data is None else torch.ones_like(snr)


def min_snr(schedule: NoiseSchedule, index: torch.Tensor, gamma: float) -> torch.Tensor:
    """min(SNR, gamma)/SNR for the noise, one more for the velocity (Hang et al. 2023)."""
    clipped = (gamma / schedule.snr(index)).clamp(max=1)  # 1 where the SNR is zero
    return clipped if schedule.prediction_type == "epsilon" else clipped + 1


def debiased(schedule: NoiseSchedule, index: torch.Tensor) -> torch.Tensor:
    """Weigh as kohya does: 1/sqrt(SNR) for noise, 1/(SNR + 1) for velocity, SNR at most 1000. The
    noise's error becomes that of the latents, up to a power (Yu et al. 2023, "Debias the Training
    of Diffusion Models", arXiv 2310.08442)."""
    snr = schedule.snr(index).clamp(max=1000)
    return snr.rsqrt() if schedule.prediction_type == "epsilon" else 1 / (snr + 1)


def sigma_sqrt(schedule: NoiseSchedule, index: torch.Tensor) -> torch.Tensor:
    """1/s² for the share s of noise in a flow (Esser et al. 2024)."""
    return schedule.compute_noise_share(index) ** -2


def cosmap(schedule: NoiseSchedule, index: torch.Tensor) -> torch.Tensor:
    """2/(pi·(1 - 2s + 2s²)) for the share s of noise in a flow (Esser et al. 2024)."""
    share = schedule.compute_noise_share(index)
    return 2 / (math.pi * (1 - 2 * share + 2 * share**2))


def error_of_latents(schedule: NoiseSchedule, index: torch.Tensor) -> torch.Tensor:
    """s²: turns an error of a flow's velocity v into one of the latents z - s·v that it implies."""
    return schedule.compute_noise_share(index) ** 2


WEIGHTING_FORMULAS: dict[str, Callable[..., torch.Tensor]] = {
    formula.__name__: formula
    for formula in (
        error_of_noise,
        min_snr,
        debiased,
        sigma_sqrt,
        cosmap,
        error_of_latents,
    )
}


def compute_weights(
    config: TrainConfig,
    schedule: NoiseSchedule,
    index: torch.Tensor,
    instance_count: int,
) -> torch.Tensor:
    """Weights (B,) of the images' squared errors: the product of the rows of
    `loss_weightings.WEIGHTINGS` that the settings ask for.

    config: asks for weightings, and has their parameters
    schedule: the base's noise levels
    index: (B,) into the schedule
    instance_count: how many images are the subject's, which come first
    """
    weights = torch.ones_like(schedule.snr(index))
    for name, row in loss_weightings.WEIGHTINGS.items():
        if not row.is_active(config, schedule.style):
            continue
        parameters = [getattr(config, setting) for setting in row.parameters]
        factors = WEIGHTING_FORMULAS[name](schedule, index, *parameters)
        if row.spares_prior:
            factors[instance_count:] = 1
        weights = weights * factors
    return weights


def compute_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor,
    instance_count: int,
    prior_loss_weight: float = 1.0,
    mask: torch.Tensor | None = None,
) -> LossParts:
    """Mean squared error of the instance and of the prior images, and their weighted sum, in fp32.

    prediction, target: (B, C, h, w)
    weights: (B,) of the images
    instance_count: how many are the subject's, which come first; the others are prior images, and
        either may be none
    prior_loss_weight: of the prior's error in the sum
    mask: (B, 1, h, w) weights of positions in [0, 1]; None for 1 everywhere
    """
    per_image = weights * compute_image_errors(prediction.float(), target.float(), mask)

    # A part of a micro-batch can have the subject's images alone, or the prior's.
    instance = compute_mean(per_image[:instance_count])
    prior = compute_mean(per_image[instance_count:])
    return LossParts(
        total=instance + prior_loss_weight * prior,
        instance=instance.detach(),
        prior=prior.detach(),
    )


def compute_mean(errors: torch.Tensor) -> torch.Tensor:
    """Return the mean of errors (B,); 0 of none."""
    return errors.mean() if len(errors) else errors.new_zeros(())


def compute_image_errors(
    prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Mean squared error (B,) of each image; prediction, target (B, C, h, w); mask
    (B, 1, h, w)."""
    errors = torch.square(prediction - target)
    if mask is None:
        return errors.flatten(1).mean(1)

    # The mean is weighted, so that a small subject counts in full. Times the mask's largest weight,
    # an image without the subject counts no more than its positions do.
    places = mask.float().expand_as(errors).flatten(1)
    return places.amax(1) * (places * errors.flatten(1)).sum(1) / places.sum(1).clamp(min=1e-6)
